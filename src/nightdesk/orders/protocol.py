"""An order's whole way: leave from the gate, a durable intent, one send, proof, fills booked once.

Comes from: handle.py (submit, cancel), kernel/inbox.py (order events)
Goes to: risk/gate.py, stores/, venues/, portfolio/positions.py

The order of steps in `submit` is the promise "nothing sent twice, nothing lost" (R-2, R-3). At every
point where the process may die, the next start finds either no intent and no request, or an intent whose
fate the venue can prove.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from nightdesk.abc import Clock, Delete, Emit, Observer, Put, Store, Venue
from nightdesk.errors import (
    NightdeskError,
    OrderDeniedError,
    OutcomeUnknownError,
    VenueRejectedError,
)
from nightdesk.model.events import (
    CancelRejected,
    Event,
    OrderAccepted,
    OrderDenied,
    OrderEvent,
    OrderRejected,
    OrderUnknown,
)
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Fill, Order, OrderRequest, OrderStatus, VenueOrder
from nightdesk.model.position import Position
from nightdesk.model.recovery import RecoveryReport, RecoveryStep
from nightdesk.orders.balances import BalanceCheck
from nightdesk.orders.ids import ClientOrderIds, highest_sequence
from nightdesk.orders.ledger import Change, Ledger
from nightdesk.orders.reconciler import Reconciler, SweepReport
from nightdesk.orders.records import (
    archive_batch,
    cursor_put,
    fill_put,
    load_records,
    order_put,
    position_put,
)
from nightdesk.orders.resolver import Resolver

__all__ = ["ADOPTED", "GateLike", "OrderProtocol", "PositionsLike"]

ADOPTED = "adopted"
"""The task id of orders that are ours by their id and that no record knows."""

_MOST_ORDERS = 100_000
_MOST_EARLY = 100_000


class GateLike(Protocol):
    """What the protocol asks of the risk gate."""

    def reserve(
        self, task_id: str, request: OrderRequest, client_order_id: str
    ) -> object: ...
    def release(self, client_order_id: str) -> None: ...
    def update(self, order: Order) -> None: ...
    def restore(self, orders: Iterable[Order]) -> None: ...
    def why_stopped(self, request: OrderRequest) -> str | None: ...
    def set_external(self, venue: str, orders: list[VenueOrder]) -> None: ...
    def halt_now(self, reason: str, actor: str) -> None: ...
    def halt_symbol_now(
        self, symbol: str, venue: str, reason: str, actor: str = ...
    ) -> None: ...
    async def halt(self, reason: str, actor: str) -> None: ...
    async def halt_symbol(
        self, symbol: str, venue: str, reason: str, actor: str = ...
    ) -> None: ...


class PositionsLike(Protocol):
    """What the protocol asks of the positions."""

    def apply(self, fill: Fill, instrument: Instrument | None = None) -> Position: ...
    def record(self, symbol: str, venue: str) -> bytes: ...
    def restore(self, data: bytes) -> Position: ...
    def all(self) -> list[Position]: ...


class OrderProtocol:
    """The ledger, and the only way to change it.

    Args:
        code: Three characters of this desk, part of every client order id.
        venues: By name; may still be empty while the desk is being built.
        emit: The inbox: what the protocol learns goes in there and comes back by `on_event`.
        instruments: `(symbol, venue)` to the instrument, or None.
        orphans: What to do with an open order that is ours by its id and in no record.

    Attributes:
        on_order_changed: Called after each change of an order is booked.
    """

    def __init__(
        self,
        *,
        code: str,
        gate: GateLike,
        venues: Mapping[str, Venue],
        store: Store,
        clock: Clock,
        random: random.Random,
        emit: Emit,
        positions: PositionsLike,
        instruments: Callable[[str, str], Instrument | None],
        observers: Sequence[Observer] = (),
        orphans: Literal["adopt", "cancel"] = "adopt",
    ) -> None:
        self.on_order_changed: Callable[[Order, Event], None] = _nobody
        self._code = code
        self._gate = gate
        self._venues = venues
        self._store = store
        self._clock = clock
        self._emit = emit
        self._positions = positions
        self._instruments = instruments
        self._observers = tuple(observers)
        self._orphans = orphans
        self._ids: ClientOrderIds | None = None
        self._early: deque[OrderEvent] | None = deque(maxlen=_MOST_EARLY)
        self._cursors: dict[str, int] = {}
        self._ledger = Ledger(code)
        self._balances = BalanceCheck(store, clock, positions.all)
        self._resolver = Resolver(
            self._ledger,
            venues,
            clock,
            random,
            emit,
            on_reopen=self._reopen,
            alert=self._alert,
        )
        self._reconciler = Reconciler(
            self._ledger,
            venues,
            clock,
            emit,
            resolver=self._resolver,
            balances=self._balances,
            gate=gate,
            adopt=self._adopt,
            cursors=self._cursors,
        )

    # --- life -----------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Read the ledger, without asking any venue."""
        await self._load(RecoveryReport())
        self._open_ids()

    async def recover(self, *, dry_run: bool = False) -> RecoveryReport:
        """Do all that stands between an opened store and the first order (R-9).

        Events that venues emit meanwhile wait until the ledger is there. A difference between ledger and
        venue halts trading and is in the report.

        Args:
            dry_run: Read and ask only: nothing is emitted, saved, adopted or halted.
        """
        report = RecoveryReport(dry_run=dry_run)
        started_ns = self._clock.monotonic_ns()
        step = RecoveryStep(name="ledger")
        report.steps.append(step)
        step.count = await self._load(report)
        step.duration_ms = (self._clock.monotonic_ns() - started_ns) / 1e6
        if not dry_run:
            self._open_ids()
        await self._reconciler.recover(report)
        if not dry_run:
            self._begin_cursors()
        return report

    async def start(self) -> None:
        """Begin to look after orders whose fate is unknown."""
        await self._resolver.start()

    async def stop(self) -> None:
        """Stop asking. Open orders stay at their venues: the next start finds them."""
        await self._resolver.stop()

    async def sweep(self) -> SweepReport:
        """Compare ledger and venues once (R-10); call it every 10 to 30 s."""
        return await self._reconciler.sweep()

    # --- sending --------------------------------------------------------------------------------------

    async def submit(self, task_id: str, request: OrderRequest) -> Order:
        """Pass the gate, make the intent durable, send once; return the order as it then stands.

        Raises:
            OrderDeniedError: The gate refused; nothing was sent.
            StateNotWritableError: The intent could not be made durable; nothing was sent.
        """
        assert self._ids is not None, "submit before recover: the ledger is not loaded"
        parent = self._ledger.order(request.parent) if request.parent else None
        cid = self._ids.next(parent.attempt + 1 if parent else 0)
        self._reserve(task_id, request, cid)
        now = self._clock.now_ns()
        order = self._ledger.add(
            Order(
                client_order_id=cid,
                task_id=task_id,
                request=request,
                status=OrderStatus.SUBMITTED,
                attempt=parent.attempt + 1 if parent else 0,
                created_ns=now,
                updated_ns=now,
            )
        )
        try:
            await self._store.save([order_put(order)])
        except asyncio.CancelledError:
            # The intent may reach the disk; that nothing was sent is said right behind it.
            self._report(
                OrderRejected,
                order,
                code="NOT_SENT",
                reason="its task was cancelled before the send",
            )
            raise
        except Exception:
            self._ledger.discard(cid)
            self._gate.release(cid)
            raise
        stopped = self._gate.why_stopped(request)
        if stopped is not None:  # the kill switch fell while the disk was busy
            self._report(
                OrderRejected,
                order,
                code="TRADING_HALTED",
                reason=f"not sent: {stopped}",
            )
        else:
            await self._send(self._venues[request.venue], order)
        return self._ledger.order(cid) or order

    def _reserve(self, task_id: str, request: OrderRequest, cid: str) -> None:
        try:
            if request.venue not in self._venues:
                raise OrderDeniedError(
                    "UNKNOWN_INSTRUMENT", f"no venue {request.venue!r} is configured"
                )
            if self._ledger.count_of(task_id) >= _MOST_ORDERS:
                # Dropping the oldest would make the task believe that less was filled.
                raise OrderDeniedError(
                    "TOO_MANY_ORDERS",
                    f"task {task_id!r} has {_MOST_ORDERS} orders on record, the limit",
                )
            self._gate.reserve(task_id, request, cid)
        except OrderDeniedError as denied:
            now = self._clock.now_ns()
            event = OrderDenied(
                venue=request.venue,
                symbol=request.symbol,
                client_order_id=cid,
                code=denied.code,
                reason=denied.reason,
                ts_event_ns=now,
                ts_received_ns=now,
            )
            self._emit(event)
            raise

    async def _send(self, venue: Venue, order: Order) -> None:
        """The one send. Whatever is not proof of a refusal leaves the order unknown (R-4)."""
        try:
            venue_order_id = await venue.submit(order)
        except VenueRejectedError as error:
            self._report(OrderRejected, order, code=error.code, reason=error.reason)
        except OutcomeUnknownError as error:
            self._report(OrderUnknown, order, reason=error.reason)
        except asyncio.CancelledError:
            self._report(
                OrderUnknown,
                order,
                reason="its task was cancelled while the request was under way",
            )
            raise
        except Exception as error:
            self._report(OrderUnknown, order, reason=f"{type(error).__name__}: {error}")
        else:
            self._report(OrderAccepted, order, venue_order_id=venue_order_id)

    async def cancel(self, client_order_id: str) -> Order:
        """Ask the venue to cancel; the order's end is told by an event, never assumed (R-8).

        Raises:
            NightdeskError: The ledger knows no such order.
        """
        order = self._ledger.order(client_order_id)
        if order is None:
            raise NightdeskError(
                f"no order {client_order_id!r} in the ledger. See `nightdesk orders`."
            )
        venue = self._venues.get(order.request.venue)
        if not order.status.is_open or venue is None:
            return order
        changed = self._ledger.request_cancel(client_order_id, self._clock.now_ns())
        if changed is not None:
            self._save_soon([order_put(changed)])
        try:
            await venue.cancel(changed or order)
        except VenueRejectedError as error:
            self._report(CancelRejected, order, reason=f"{error.code}: {error.reason}")
        except Exception:
            self._watch_cancel(venue, order, 0.25)
        except asyncio.CancelledError:
            self._watch_cancel(venue, order, 0.25)
            raise
        else:
            # The word that it is cancelled may get lost on the way: look if it has not come.
            self._watch_cancel(venue, order, 2.0)
        return self._ledger.order(client_order_id) or order

    def _watch_cancel(self, venue: Venue, order: Order, after_s: float) -> None:
        now = self._ledger.order(order.client_order_id)
        if now is not None and now.status.is_open:
            void_ns = self._clock.now_ns() + round(
                (venue.expiry_s + venue.index_lag_s) * 1e9
            )
            self._resolver.watch(
                order.client_order_id, after_s=after_s, reopen_ns=void_ns
            )

    def _report(self, kind: type[OrderEvent], order: Order, **facts: Any) -> None:
        now = self._clock.now_ns()
        facts.setdefault("venue_order_id", order.venue_order_id)
        self._emit(
            kind(
                venue=order.request.venue,
                symbol=order.request.symbol,
                client_order_id=order.client_order_id,
                ts_event_ns=now,
                ts_received_ns=now,
                **facts,
            )
        )

    # --- hearing --------------------------------------------------------------------------------------

    def on_event(self, event: OrderEvent) -> None:
        """Take one order event in, whoever sent it and however often."""
        if self._early is not None:
            # Full: the oldest are dropped. Recovery asks the venues for all of it anyway.
            self._early.append(event)
            return
        if isinstance(event, CancelRejected):
            self._on_cancel_rejected(event)
            return
        change = self._ledger.apply(event, self._clock.now_ns())
        if change is None:
            return
        self._book(change, event)
        if change.order is not None and change.order.venue_order_id is not None:
            for late in self._ledger.claim_strangers(
                change.order, self._clock.now_ns()
            ):
                self._book(late, event, is_counted=True)

    def _on_cancel_rejected(self, event: CancelRejected) -> None:
        """Filled, gone, or never there: only the venue's own word about the order tells."""
        order = self._ledger.order(event.client_order_id)
        if order is not None and order.status.is_open:
            self._resolver.watch(event.client_order_id, after_s=0.0)
            self._tell(order, event)

    def _book(
        self, change: Change, event: OrderEvent, *, is_counted: bool = False
    ) -> None:
        """Make one change known: positions, limits, store, then whoever watches."""
        order, fill = change.order, change.fill
        batch: list[Put | Delete] = []
        if fill is not None:
            batch.append(fill_put(fill))
            if not is_counted:
                batch += self._count(fill)
        if order is not None:
            batch.append(order_put(order))
            self._gate.update(order)
        self._save_soon(batch)
        if change.trouble:
            self._answer_trouble(change, event)
        if change.adopts and fill is not None:
            self._reconciler.note_orphan(fill)
        if order is not None:
            if order.status is OrderStatus.UNKNOWN or self._ledger.missing(
                order.client_order_id
            ):
                self._resolver.watch(order.client_order_id, only_unknown=True)
            self._tell(order, event)

    def _count(self, fill: Fill) -> list[Put]:
        """Book a fill to its position, ours or not; return what must be saved with it in one batch."""
        symbol, venue = fill.symbol, fill.venue
        self._positions.apply(fill, self._instruments(symbol, venue))
        puts = [position_put(symbol, venue, self._positions.record(symbol, venue))]
        if fill.ts_event_ns > self._cursors.get(venue, 0):
            self._cursors[venue] = fill.ts_event_ns
            puts.append(cursor_put(venue, fill.ts_event_ns))
        return puts

    def _answer_trouble(self, change: Change, event: OrderEvent) -> None:
        if change.halts:
            self._gate.halt_symbol_now(event.symbol, event.venue, change.trouble)
        self._alert("critical" if change.halts else "warning", change.trouble)

    def _reopen(self, client_order_id: str) -> None:
        order = self._ledger.reopen(client_order_id, self._clock.now_ns())
        if order is not None:
            self._save_soon([order_put(order)])
            now = self._clock.now_ns()
            event = CancelRejected(
                venue=order.request.venue,
                symbol=order.request.symbol,
                client_order_id=client_order_id,
                venue_order_id=order.venue_order_id,
                reason="the venue holds it as working: the cancel did not take place",
                ts_event_ns=now,
                ts_received_ns=now,
            )
            self._tell(order, event)

    async def _adopt(self, found: VenueOrder) -> Order:
        """Take an order that is ours by its id into the ledger, or ask to cancel it, as configured (T-23)."""
        now = self._clock.now_ns()
        order = self._ledger.add(
            Order(
                client_order_id=found.client_order_id,
                task_id=ADOPTED,
                request=OrderRequest(
                    symbol=found.symbol,
                    venue=found.venue,
                    side=found.side,
                    quantity=found.quantity,
                    type=found.type,
                    price=found.price,
                ),
                status=OrderStatus.ACCEPTED,
                venue_order_id=found.venue_order_id,
                created_ns=found.ts_event_ns,
                updated_ns=now,
            )
        )
        await self._store.save([order_put(order)])
        self._gate.update(order)
        self._alert(
            "warning",
            f"adopted order {found.client_order_id} at {found.venue}: ours by its id, in no record",
        )
        self._resolver.watch(order.client_order_id, after_s=0.0)
        self._report(OrderAccepted, order)
        if self._orphans == "cancel" and order.status.is_open:
            await self.cancel(order.client_order_id)
        return self._ledger.order(order.client_order_id) or order

    def _tell(self, order: Order, event: Event) -> None:
        self.on_order_changed(order, event)
        for observer in self._observers:
            observer.on_order(order, event)

    def _alert(self, level: str, text: str) -> None:
        for observer in self._observers:
            observer.on_alert(level, "orders", text)

    # --- looking --------------------------------------------------------------------------------------

    def orders_of(self, task_id: str) -> list[Order]:
        """Return every order of one task, oldest first: the truth about its fills."""
        return self._ledger.orders_of(task_id)

    def order(self, client_order_id: str) -> Order | None:
        return self._ledger.order(client_order_id)

    def open_orders(self) -> list[Order]:
        """Return every order that a venue might still execute, unknown ones among them."""
        return self._ledger.open_orders()

    def recent(self, limit: int = 50) -> list[Order]:
        """Return the newest orders, oldest of them first."""
        return self._ledger.recent(limit)

    def fills(self, limit: int = 50) -> list[Fill]:
        """Return the newest fills, at most 1,000, oldest of them first."""
        return self._ledger.fills(limit)

    @property
    def fill_count(self) -> int:
        """Fills booked, those of earlier runs and of others on the account among them."""
        return self._ledger.fill_count

    @property
    def unresolved_count(self) -> int:
        """Orders about which a venue is being asked."""
        return len(self._resolver)

    async def forget(self, task_id: str) -> int:
        """Move the finished orders of a task that is gone to the archive; return how many.

        Never for a task that still runs: it would believe that nothing was filled and send again. Their
        fills stay: a venue reports them again after a restart, and what is not known is booked.
        """
        orders = self._ledger.forget(task_id)
        if orders:
            await self._store.save(archive_batch(orders))
        return len(orders)

    # --- records ----------------------------------------------------------------------------------------

    async def _load(self, report: RecoveryReport) -> int:
        """Read the ledger. A lost order or fill makes totals too small, and a task would send the rest
        again: such damage is a difference, and nothing is guessed."""
        records = await load_records(self._store, self._positions.restore)
        self._cursors.update(records.cursors)
        report.quarantined += records.quarantined
        report.quarantined += map(str, await self._balances.load())
        report.differences += records.damaged
        report.differences += self._ledger.restore(records.orders, records.fills)
        if not report.dry_run:
            self._gate.restore(self._ledger.open_orders())
            self._take_early()
        return len(records.orders)

    def _take_early(self) -> None:
        early, self._early = self._early, None
        for event in early or ():
            self.on_event(event)

    def _open_ids(self) -> None:
        newest = highest_sequence(self._ledger.ids())
        first = max(self._clock.now_ns() // 1_000_000, newest + 1)
        self._ids = ClientOrderIds(self._code, self._store.epoch, first)

    def _begin_cursors(self) -> None:
        """From the first start on, fills are read from here: what was traded before is not ours."""
        now = self._clock.now_ns()
        fresh = [name for name in self._venues if name not in self._cursors]
        self._cursors.update(dict.fromkeys(fresh, now))
        self._save_soon([cursor_put(name, now) for name in fresh])

    def _save_soon(self, batch: Sequence[Put | Delete]) -> None:
        """Queue `batch` behind everything saved before; a later intent is durable only with it (R-15)."""
        if not batch:
            return
        try:
            self._store.save(batch)
        except (NightdeskError, ValueError) as error:
            # Booked in memory all the same; the venue knows it, and the next start reads it there again.
            self._gate.halt_now(f"orders cannot be saved: {error}", "orders")


def _nobody(order: Order, event: Event) -> None:
    pass
