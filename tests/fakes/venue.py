"""A venue that does what a script says, and knows for certain what it did."""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import msgspec

from nightdesk.abc import Clock, Emit, Venue
from nightdesk.errors import OutcomeUnknownError, QueryFailedError, VenueRejectedError
from nightdesk.model.events import OrderCanceled, OrderEvent, OrderExpired, OrderFilled
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Fill, Order, OrderStatus, OrderType, Side, VenueOrder

__all__ = ["FakeVenue", "btc"]

ZERO = Decimal(0)


def btc(venue: str = "A", symbol: str = "BTC/USDT", **changes: Any) -> Instrument:
    """The common fixture of T-1 to T-25."""
    facts: dict[str, Any] = {
        "tick_size": Decimal("0.1"),
        "lot_size": Decimal("0.001"),
        "min_quantity": Decimal("0.001"),
        "min_notional": Decimal("5"),
        "maker_fee": Decimal("0.0002"),
        "taker_fee": Decimal("0.0005"),
    }
    return Instrument(symbol=symbol, venue=venue, **(facts | changes))


class FakeVenue(Venue):
    """Holds orders until told to fill or end them.

    Attributes:
        submits: Answers to the next submits: `accept`, `reject`, `lost_reply`, `lost_request`, `garbage`,
            `fill:QUANTITY` (accepted and filled so far, told before the reply); `accept` without one.
        cancels: Answers to the next cancels: `ok`, `lost_reply`, `lost_request`, `filled_first`; `ok` without one.
        failing: How many of the next questions get no usable answer.
        lookup: `all` finds every order by its id, `open_only` just working ones, `listed_only` none; all
            only after `index_lag_s`.
        telling: `now` emits events at once, `hold` keeps them in `outbox`, `drop` loses them.
        requests: Every request that arrived, in order, as `(verb, client_order_id)`.
        hook: Called at every entry and exit of a request; may raise.
    """

    def __init__(
        self,
        name: str = "A",
        *,
        lookup: str = "all",
        expiry_s: float = 0.0,
        index_lag_s: float = 0.0,
    ) -> None:
        self.name = name
        self.lookup = lookup
        self.expiry_s = expiry_s
        self.index_lag_s = index_lag_s
        self.submits: deque[str] = deque()
        self.cancels: deque[str] = deque()
        self.failing = 0
        self.telling = "now"
        self.outbox: list[OrderEvent] = []
        self.requests: list[tuple[str, str]] = []
        self.questions: list[str] = []
        self.hook: Callable[[str], None] = lambda point: None
        self.orders: dict[str, VenueOrder] = {}
        self.trades: list[Fill] = []
        self.deposits: dict[str, Decimal] = {
            "BTC": Decimal(10),
            "USDT": Decimal(100_000),
        }
        self.skew_ns = 0
        self._placed_ns: dict[str, int] = {}
        self.listed = {"BTC/USDT": btc(name)}
        self._emit: Emit = lambda event: None

    # What a test says -----------------------------------------------------------------------------

    def fill(
        self,
        client_order_id: str,
        quantity: str | Decimal,
        price: str | None = None,
        fee: str = "0",
    ) -> Fill:
        order = self.orders[client_order_id]
        quantity = min(Decimal(quantity), order.quantity - order.filled_quantity)
        filled = order.filled_quantity + quantity
        fill = Fill(
            venue=self.name,
            symbol=order.symbol,
            trade_id=f"t{len(self.trades) + 1}",
            venue_order_id=order.venue_order_id,
            client_order_id=client_order_id,
            side=order.side,
            quantity=quantity,
            price=Decimal(price) if price else order.price or Decimal(100),
            fee=Decimal(fee),
            fee_asset="USDT",
            ts_event_ns=self._clock.now_ns(),
        )
        self.trades.append(fill)
        status = (
            OrderStatus.FILLED
            if filled == order.quantity
            else OrderStatus.PARTIALLY_FILLED
        )
        self._change(client_order_id, filled_quantity=filled, status=status)
        self._tell(
            OrderFilled(
                **self._names(client_order_id), fill=fill, ts_event_ns=fill.ts_event_ns
            )
        )
        return fill

    def end(
        self, client_order_id: str, status: OrderStatus = OrderStatus.CANCELED
    ) -> None:
        self._change(client_order_id, status=status)
        kind = OrderExpired if status is OrderStatus.EXPIRED else OrderCanceled
        filled = self.orders[client_order_id].filled_quantity
        self._tell(
            kind(
                **self._names(client_order_id),
                filled_quantity=filled,
                ts_event_ns=self._clock.now_ns(),
            )
        )

    def place(
        self,
        client_order_id: str,
        quantity: str = "1",
        price: str = "100",
        side: Side = Side.BUY,
    ) -> VenueOrder:
        """An order that no desk of ours has on record."""
        order = VenueOrder(
            venue=self.name,
            symbol="BTC/USDT",
            venue_order_id=f"v{len(self.orders) + 1}",
            client_order_id=client_order_id,
            side=side,
            type=OrderType.LIMIT,
            quantity=Decimal(quantity),
            price=Decimal(price),
            status=OrderStatus.ACCEPTED,
            filled_quantity=ZERO,
            ts_event_ns=self._clock.now_ns(),
        )
        self._keep(order)
        return order

    def delay_index(self, client_order_id: str, seconds: float) -> None:
        """Make look-ups find an order later than `index_lag_s` promises."""
        self._placed_ns[client_order_id] += round(seconds * 1e9)

    def release(self) -> None:
        """Emit what was held, in order."""
        held, self.outbox = self.outbox, []
        for event in held:
            self._emit(event)

    def working(self) -> list[VenueOrder]:
        return [order for order in self.orders.values() if order.status.is_open]

    @property
    def executed(self) -> Decimal:
        return sum((fill.quantity for fill in self.trades), ZERO)

    # The contract -----------------------------------------------------------------------------------

    async def start(self, emit: Emit, clock: Clock, random: random.Random) -> None:
        self._emit, self._clock = emit, clock

    async def stop(self) -> None:
        pass

    def instruments(self) -> Mapping[str, Instrument]:
        return self.listed

    async def submit(self, order: Order) -> str:
        self.hook("submit")
        await asyncio.sleep(0)
        answer = self.submits.popleft() if self.submits else "accept"
        if answer == "lost_request":
            raise OutcomeUnknownError(self.name, "no reply")
        self.requests.append(("submit", order.client_order_id))
        if answer == "reject":
            raise VenueRejectedError(self.name, "INSUFFICIENT_BALANCE", "not enough")
        self._accept(order)
        self.hook("accepted")
        if answer.startswith("fill:"):
            self.fill(order.client_order_id, answer.removeprefix("fill:"))
        await asyncio.sleep(0)
        self.hook("replied")
        if answer == "lost_reply":
            raise OutcomeUnknownError(self.name, "no reply")
        if answer == "garbage":
            raise ValueError("<html>Bad gateway</html>")
        return self.orders[order.client_order_id].venue_order_id

    def _accept(self, order: Order) -> None:
        request = order.request
        assert order.client_order_id not in self.orders, "an id was used twice"
        self._keep(
            VenueOrder(
                venue=self.name,
                symbol=request.symbol,
                venue_order_id=f"v{len(self.orders) + 1}",
                client_order_id=order.client_order_id,
                side=request.side,
                type=request.type,
                quantity=request.quantity,
                price=request.price,
                status=OrderStatus.ACCEPTED,
                filled_quantity=ZERO,
                ts_event_ns=self._clock.now_ns(),
            )
        )

    async def cancel(self, order: Order) -> None:
        cid = order.client_order_id
        self.hook("cancel")
        await asyncio.sleep(0)
        answer = self.cancels.popleft() if self.cancels else "ok"
        if answer == "lost_request":
            raise OutcomeUnknownError(self.name, "no reply")
        self.requests.append(("cancel", cid))
        known = self.orders.get(cid)
        if answer == "filled_first" and known is not None and known.status.is_open:
            self.fill(cid, known.quantity - known.filled_quantity)
        if known is None or not self.orders[cid].status.is_open:
            raise VenueRejectedError(self.name, "ORDER_NOT_OPEN", "filled or unknown")
        self.end(cid)
        self.hook("canceled")
        if answer == "lost_reply":
            raise OutcomeUnknownError(self.name, "no reply")

    async def find_order(self, symbol: str, client_order_id: str) -> VenueOrder | None:
        self._question(f"find_order {client_order_id}")
        await asyncio.sleep(0)
        found = self.orders.get(client_order_id)
        if found is None or self.lookup == "listed_only" or not self._is_indexed(found):
            return None
        return (
            None if self.lookup == "open_only" and not found.status.is_open else found
        )

    async def open_orders(self) -> list[VenueOrder]:
        self._question("open_orders")
        await asyncio.sleep(0)
        return [order for order in self.working() if self._is_indexed(order)]

    async def fills(self, since_ns: int) -> list[Fill]:
        self._question("fills")
        await asyncio.sleep(0)
        newest = self._clock.now_ns() - round(self.index_lag_s * 1e9)
        return [fill for fill in self.trades if since_ns <= fill.ts_event_ns <= newest]

    async def balances(self) -> dict[str, Decimal]:
        self._question("balances")
        balances = dict(self.deposits)
        for fill in self.trades:
            balances["BTC"] = balances.get("BTC", ZERO) + fill.side.sign * fill.quantity
        return balances

    async def venue_time_ns(self) -> int:
        self._question("venue_time")
        return self._clock.now_ns() + self.skew_ns

    # Inside -----------------------------------------------------------------------------------------

    def _question(self, question: str) -> None:
        self.questions.append(question)
        if self.failing:
            self.failing -= 1
            raise QueryFailedError(self.name, question, "scripted")

    def _is_indexed(self, order: VenueOrder) -> bool:
        age_ns = self._clock.now_ns() - self._placed_ns[order.client_order_id]
        return age_ns >= self.index_lag_s * 1e9

    def _keep(self, order: VenueOrder) -> None:
        self.orders[order.client_order_id] = order
        self._placed_ns[order.client_order_id] = self._clock.now_ns()

    def _change(self, client_order_id: str, **changes: Any) -> None:
        self.orders[client_order_id] = msgspec.structs.replace(
            self.orders[client_order_id], **changes
        )

    def _names(self, client_order_id: str) -> dict[str, Any]:
        order = self.orders[client_order_id]
        return {
            "venue": self.name,
            "symbol": order.symbol,
            "client_order_id": client_order_id,
            "venue_order_id": order.venue_order_id,
        }

    def _tell(self, event: OrderEvent) -> None:
        if self.telling == "now":
            self._emit(event)
        elif self.telling == "hold":
            self.outbox.append(event)
