"""The truth about orders and fills: what each event means for an order, and each fill once.

Comes from: orders/protocol.py
Goes to: orders/protocol.py

Plain bookkeeping without any waiting. Events may come twice, in any order and from two feeds; the state
after all of them is the same (F14). Three rules make it so: a fill counts by its key, a positive
outranks a negative, and an end that names more fills than are booked waits for them.
"""

from collections import deque
from collections.abc import Iterable, KeysView
from decimal import Context, Decimal
from typing import Any

import msgspec
from msgspec.structs import replace

from nightdesk.model.events import (
    OrderAccepted,
    OrderCanceled,
    OrderEvent,
    OrderExpired,
    OrderFilled,
    OrderRejected,
    OrderUnknown,
)
from nightdesk.model.order import Fill, Order, OrderStatus
from nightdesk.orders.ids import is_ours

__all__ = ["Change", "Ledger"]

_ZERO = Decimal(0)
_EXACT = Context(prec=60)  # see portfolio/positions.py
_RECENT_FILLS = 1_000
_RECENT_STRANGERS = 1_000
_UNPROVEN = frozenset(
    {OrderStatus.INITIALIZED, OrderStatus.SUBMITTED, OrderStatus.UNKNOWN}
)
_WORKING = frozenset({OrderStatus.ACCEPTED, OrderStatus.PARTIALLY_FILLED})
_ENDED = frozenset({OrderStatus.CANCELED, OrderStatus.EXPIRED})


class Change(msgspec.Struct, frozen=True):
    """What one event changed.

    Attributes:
        order: The order as it stands now; None if no order of ours is concerned.
        fill: Newly booked.
        trouble: What an operator must hear.
        halts: Whether the instrument must be halted for it.
        adopts: The order is ours by its id, and the ledger does not know it.
    """

    order: Order | None = None
    fill: Fill | None = None
    trouble: str = ""
    halts: bool = False
    adopts: bool = False


class _Totals(msgspec.Struct):
    """The booked fills of one order id, exact, whether or not the order itself is known."""

    quantity: Decimal = _ZERO
    cost: Decimal = _ZERO
    fees: dict[str, Decimal] = {}

    def add(self, fill: Fill) -> None:
        self.quantity += fill.quantity
        self.cost = _EXACT.fma(fill.price, fill.quantity, self.cost)
        if fill.fee:
            self.fees[fill.fee_asset] = self.fees.get(fill.fee_asset, _ZERO) + fill.fee


class _End(msgspec.Struct, frozen=True):
    """An end the venue told, which waits for the fills that it names."""

    status: OrderStatus
    filled_quantity: Decimal
    reason: str | None


class Ledger:
    """Orders by client order id, and the fills that belong to them.

    Attributes:
        fill_count: Fills booked, those of earlier runs among them.
        last_change_ns: When the last event changed something, by our clock.
    """

    def __init__(self, code: str) -> None:
        self.fill_count = 0
        self.last_change_ns = 0
        self._code = code
        self._orders: dict[str, Order] = {}
        self._open: dict[str, None] = {}
        self._by_task: dict[str, dict[str, None]] = {}
        self._by_venue_id: dict[tuple[str, str], str] = {}
        self._totals: dict[str, _Totals] = {}
        self._keys: set[str] = set()
        self._ends: dict[str, _End] = {}
        self._fills: deque[Fill] = deque(maxlen=_RECENT_FILLS)
        # Fills that named neither an id of ours nor an order we knew: they may turn out to be ours.
        self._strangers: deque[Fill] = deque(maxlen=_RECENT_STRANGERS)

    # --- looking --------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._orders)

    def ids(self) -> KeysView[str]:
        """Return every client order id; all of them are ours."""
        return self._orders.keys()

    def order(self, client_order_id: str) -> Order | None:
        return self._orders.get(client_order_id)

    def orders_of(self, task_id: str) -> list[Order]:
        """Return the orders of one task, oldest first."""
        return [self._orders[cid] for cid in self._by_task.get(task_id, ())]

    def count_of(self, task_id: str) -> int:
        return len(self._by_task.get(task_id, ()))

    def open_orders(self) -> list[Order]:
        """Return every order that the venue might still execute, oldest first."""
        return [self._orders[cid] for cid in self._open]

    def recent(self, limit: int) -> list[Order]:
        """Return the newest orders, oldest of them first."""
        newest: list[Order] = []
        for cid in reversed(self._orders):
            if len(newest) >= limit:
                break
            newest.append(self._orders[cid])
        return newest[::-1]

    def fills(self, limit: int) -> list[Fill]:
        """Return the newest fills, oldest of them first."""
        return list(self._fills)[-limit:]

    def has_fill(self, key: str) -> bool:
        return key in self._keys

    def booked(self, client_order_id: str) -> Decimal:
        """Return the sum of the fills booked under an id."""
        totals = self._totals.get(client_order_id)
        return totals.quantity if totals else _ZERO

    def missing(self, client_order_id: str) -> Decimal:
        """Return how much the venue said was filled before the order ended, and is not booked yet."""
        end = self._ends.get(client_order_id)
        return (
            max(end.filled_quantity - self.booked(client_order_id), _ZERO)
            if end
            else _ZERO
        )

    def is_ours(self, client_order_id: str) -> bool:
        return is_ours(client_order_id, self._code)

    def client_id_of(self, venue: str, venue_order_id: str) -> str | None:
        """Return our id of an order that a venue names by its own."""
        return self._by_venue_id.get((venue, venue_order_id))

    # --- loading ----------------------------------------------------------------------------------------

    def restore(self, orders: Iterable[Order], fills: Iterable[Fill]) -> list[str]:
        """Take up the records of earlier runs, oldest first; return where they contradict each other.

        An order that was on its way when the desk ended is UNKNOWN: nobody was there to hear the reply.
        """
        for order in sorted(
            orders, key=lambda order: (order.created_ns, order.client_order_id)
        ):
            if order.status in (OrderStatus.INITIALIZED, OrderStatus.SUBMITTED):
                order = replace(
                    order,
                    status=OrderStatus.UNKNOWN,
                    reason="the desk ended before the reply was recorded",
                )
            self._keep(order)
        for fill in fills:
            self._keys.add(fill.key)
            self._count(fill)
        return [
            f"order {cid} says {order.filled_quantity} filled, its saved fills sum to {self.booked(cid)}"
            for cid, order in self._orders.items()
            if order.filled_quantity != self.booked(cid)
        ]

    def add(self, order: Order) -> Order:
        """Take a new or adopted order in; fills that were booked under its id before count."""
        totals = self._totals.get(order.client_order_id)
        if totals is not None:
            order = self._with_totals(order, totals, order.updated_ns)
        self._keep(order)
        return order

    def discard(self, client_order_id: str) -> None:
        """Forget an order that was never sent and whose intent is not durable."""
        order = self._orders.pop(client_order_id, None)
        if order is not None:
            self._open.pop(client_order_id, None)
            self._by_task[order.task_id].pop(client_order_id, None)

    def forget(self, task_id: str) -> list[Order]:
        """Drop the finished orders of one task and return them; their fills stay known."""
        finished = [
            order for order in self.orders_of(task_id) if not order.status.is_open
        ]
        for order in finished:
            cid = order.client_order_id
            del self._orders[cid], self._by_task[task_id][cid]
            if order.venue_order_id is not None:
                self._by_venue_id.pop((order.request.venue, order.venue_order_id), None)
        if not self._by_task.get(task_id, True):
            del self._by_task[task_id]
        return finished

    # --- what events mean -------------------------------------------------------------------------------

    def apply(self, event: OrderEvent, now_ns: int) -> Change | None:
        """Take one event in. None: it changed nothing."""
        change = self._apply(event, now_ns)
        if change is not None:
            self.last_change_ns = now_ns
        return change

    def _apply(self, event: OrderEvent, now_ns: int) -> Change | None:
        if isinstance(event, OrderFilled):
            return self._book(event.fill, now_ns)
        order = self._orders.get(event.client_order_id)
        if order is None:
            return None
        if isinstance(event, OrderAccepted):
            return self._accept(order, event, now_ns)
        if isinstance(event, (OrderCanceled, OrderExpired)):
            return self._end(order, event, now_ns)
        if isinstance(event, OrderRejected):
            return self._reject(order, event, now_ns)
        if isinstance(event, OrderUnknown) and order.status in (
            OrderStatus.INITIALIZED,
            OrderStatus.SUBMITTED,
        ):
            return self._set(
                order, now_ns, status=OrderStatus.UNKNOWN, reason=event.reason
            )
        return None

    def request_cancel(self, client_order_id: str, now_ns: int) -> Order | None:
        """Note that a cancel was asked for; what is unproven stays unproven. None: nothing changed."""
        order = self._orders[client_order_id]
        if order.status not in _WORKING:
            return None
        return self._set(order, now_ns, status=OrderStatus.PENDING_CANCEL).order

    def reopen(self, client_order_id: str, now_ns: int) -> Order | None:
        """Take a cancel back that never reached the venue: it holds the order as working. None: nothing changed."""
        order = self._orders[client_order_id]
        if (
            order.status is not OrderStatus.PENDING_CANCEL
            or client_order_id in self._ends
        ):
            return None
        status = (
            OrderStatus.PARTIALLY_FILLED
            if order.filled_quantity
            else OrderStatus.ACCEPTED
        )
        return self._set(order, now_ns, status=status).order

    def _accept(self, order: Order, event: OrderAccepted, now_ns: int) -> Change | None:
        revived = order.status is OrderStatus.REJECTED
        if order.status in _UNPROVEN or revived:
            return self._set(
                order,
                now_ns,
                trouble=_revival(order) if revived else "",
                status=OrderStatus.ACCEPTED,
                venue_order_id=event.venue_order_id or order.venue_order_id,
                reason=None,
            )
        if order.venue_order_id is None and event.venue_order_id is not None:
            return self._set(order, now_ns, venue_order_id=event.venue_order_id)
        return None

    def _reject(self, order: Order, event: OrderRejected, now_ns: int) -> Change | None:
        if order.status in _UNPROVEN:
            return self._set(
                order,
                now_ns,
                status=OrderStatus.REJECTED,
                reason=f"{event.code}: {event.reason}",
            )
        if order.status is OrderStatus.REJECTED:
            return None
        return Change(
            order,
            trouble=f"order {order.client_order_id} is {order.status} and was reported rejected; ignored",
        )

    def _end(
        self, order: Order, event: OrderCanceled | OrderExpired, now_ns: int
    ) -> Change | None:
        cid = order.client_order_id
        if order.status is OrderStatus.FILLED:
            return None
        voi = order.venue_order_id or event.venue_order_id
        status = (
            OrderStatus.EXPIRED
            if isinstance(event, OrderExpired)
            else OrderStatus.CANCELED
        )
        known = self._ends.get(cid)
        total = max(event.filled_quantity, known.filled_quantity if known else _ZERO)
        booked = self.booked(cid)
        # Taken, and ended without a fill, while nobody could find it: as good as never arrived.
        trouble = (
            _revival(order) if order.status is OrderStatus.REJECTED and total else ""
        )
        if known is not None and total == known.filled_quantity:
            return None
        if total > booked:
            # Ended for its task only with all its fills: otherwise the task would send the missing part again.
            self._ends[cid] = _End(status, total, event.reason or None)
            return self._set(
                order,
                now_ns,
                trouble,
                status=OrderStatus.PENDING_CANCEL,
                venue_order_id=voi,
                reason=f"{status} at the venue with {total} filled, {booked} booked so far",
            )
        if order.status in _ENDED:
            return None
        return self._set(
            order,
            now_ns,
            trouble,
            status=status,
            venue_order_id=voi,
            reason=event.reason or None,
        )

    def _book(self, fill: Fill, now_ns: int) -> Change | None:
        if fill.key in self._keys or fill.quantity <= 0:
            return None
        self._keys.add(fill.key)
        if fill.client_order_id not in self._orders:
            known = self._by_venue_id.get((fill.venue, fill.venue_order_id))
            if known is not None:
                fill = replace(fill, client_order_id=known)
        self._count(fill)
        order = self._orders.get(fill.client_order_id)
        if order is None:
            return self._book_stranger(fill)
        revived = order.status is OrderStatus.REJECTED
        order = self._with_totals(
            order, self._totals[fill.client_order_id], now_ns, fill.venue_order_id
        )
        self._keep(order)
        if order.remaining_quantity < 0:
            text = f"order {order.client_order_id} is overfilled: quantity {order.request.quantity}, filled {order.filled_quantity}"
            return Change(order, fill, text, halts=True)
        return Change(order, fill, _revival(order) if revived else "", halts=revived)

    def _book_stranger(self, fill: Fill) -> Change:
        if self.is_ours(fill.client_order_id):
            text = f"fill {fill.trade_id} belongs to order {fill.client_order_id}, which is ours by its id and not in the ledger"
            return Change(None, fill, text, adopts=True)
        return Change(None, fill)

    def claim_strangers(self, order: Order, now_ns: int) -> list[Change]:
        """Give fills that named only the venue's order id, and came before we knew it, to their order."""
        if order.venue_order_id is None or not self._strangers:
            return []
        changes = []
        for fill in [
            f
            for f in self._strangers
            if (f.venue, f.venue_order_id)
            == (order.request.venue, order.venue_order_id)
        ]:
            self._strangers.remove(fill)
            fill = replace(fill, client_order_id=order.client_order_id)
            self._totals.setdefault(order.client_order_id, _Totals()).add(fill)
            order = self._with_totals(
                order, self._totals[order.client_order_id], now_ns
            )
            self._keep(order)
            changes.append(Change(order, fill))
        return changes

    # --- keeping ----------------------------------------------------------------------------------------

    def _count(self, fill: Fill) -> None:
        self.fill_count += 1
        self._fills.append(fill)
        if fill.client_order_id in self._orders or self.is_ours(fill.client_order_id):
            self._totals.setdefault(fill.client_order_id, _Totals()).add(fill)
        else:
            self._strangers.append(fill)

    def _with_totals(
        self,
        order: Order,
        totals: _Totals,
        now_ns: int,
        venue_order_id: str | None = None,
    ) -> Order:
        """Return `order` with its booked fills, and the status that follows from them."""
        status, reason = order.status, order.reason
        end = self._ends.get(order.client_order_id)
        if totals.quantity >= order.request.quantity:
            status, reason = OrderStatus.FILLED, None
            self._ends.pop(order.client_order_id, None)
        elif end is not None and totals.quantity >= end.filled_quantity:
            status, reason = end.status, end.reason
            del self._ends[order.client_order_id]
        elif status not in _ENDED and status is not OrderStatus.PENDING_CANCEL:
            status, reason = OrderStatus.PARTIALLY_FILLED, None
        return replace(
            order,
            status=status,
            reason=reason,
            venue_order_id=order.venue_order_id or venue_order_id or None,
            filled_quantity=totals.quantity,
            average_price=totals.cost / totals.quantity,
            fees=dict(totals.fees),
            updated_ns=now_ns,
        )

    def _set(
        self, order: Order, now_ns: int, trouble: str = "", **changes: Any
    ) -> Change:
        order = replace(order, updated_ns=now_ns, **changes)
        self._keep(order)
        return Change(order, trouble=trouble, halts=bool(trouble))

    def _keep(self, order: Order) -> None:
        cid = order.client_order_id
        if cid not in self._orders:
            self._by_task.setdefault(order.task_id, {})[cid] = None
        self._orders[cid] = order
        if order.status.is_open:
            self._open[cid] = None
        else:
            self._open.pop(cid, None)
        if order.venue_order_id is not None:
            self._by_venue_id[(order.request.venue, order.venue_order_id)] = cid


def _revival(order: Order) -> str:
    return (
        f"order {order.client_order_id} counted as rejected ({order.reason}), and the venue shows that it took it; "
        "it may have been replaced meanwhile"
    )
