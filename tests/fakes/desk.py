"""A desk handle over a small venue that does exactly what a test tells it, with a real ledger's rules.

`submit` refuses off-grid requests, every request is recorded in `sent`, and orders change only by
scripted answers: acknowledge, fill, reject, lose the reply, cancel, let the fill beat the cancel.
"""

import random
from collections import defaultdict, deque
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import msgspec

from nightdesk.errors import OrderDeniedError
from nightdesk.model.events import Event, QuoteChanged
from nightdesk.model.instrument import Instrument, instrument_key
from nightdesk.model.order import (
    Liquidity,
    Order,
    OrderRequest,
    OrderStatus,
    OrderType,
    Side,
    TimeInForce,
)
from nightdesk.model.position import Position

ZERO = Decimal(0)
START_NS = 1_700_000_000_000_000_000


class Crash(BaseException):
    """The process ends here: nothing after this line runs."""


class FakeClock:
    """Time that moves only when a test moves it."""

    def __init__(self) -> None:
        self.now = START_NS

    def now_ns(self) -> int:
        return self.now

    def monotonic_ns(self) -> int:
        return self.now - START_NS

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * 1_000_000_000)


class SilentLog:
    """Takes structured log lines and keeps them."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def __getattr__(self, level: str) -> Any:
        return lambda text, **facts: self.lines.append((level, text, facts))


def instrument(
    symbol: str = "BTC/USDT", venue: str = "A", **changes: Any
) -> Instrument:
    """The common fixture of T-1 to T-25."""
    facts: dict[str, Any] = {
        "symbol": symbol,
        "venue": venue,
        "tick_size": Decimal("0.1"),
        "lot_size": Decimal("0.001"),
        "min_quantity": Decimal("0.001"),
        "min_notional": Decimal("5"),
        "maker_fee": Decimal("0.0002"),
        "taker_fee": Decimal("0.0005"),
    }
    return Instrument(**(facts | changes))


class FakeDesk:
    """`abc.Desk` for one task.

    Attributes:
        sent: Every request that reached the venue, as an order.
        cancels: Client order ids of every cancel that reached it.
        script: Answers to the next submits at a venue: `accept`, `fill`, `lost` (accepted, reply lost),
            `vanish` (never arrived, reply lost), `crash_before`, `crash_after`, or `reject:REASON`;
            without one, an order is accepted, and executed at the touch if it crosses.
        cancel_script: Answers to the next cancels: `now`, `held`, `refused`; `held` without one.
    """

    def __init__(
        self, *instruments: Instrument, task_id: str = "task", seed: int = 1
    ) -> None:
        self.task_id = task_id
        self.clock = FakeClock()
        self.random = random.Random(seed)
        self.cache: dict[str, Any] = {}
        self.log = SilentLog()
        self.instruments = {i.key: i for i in instruments or (instrument(),)}
        self.quotes: dict[str, QuoteChanged] = {}
        self.ledger: dict[str, Order] = {}
        self.sent: list[Order] = []
        self.cancels: list[str] = []
        self.alerts: list[tuple[str, str]] = []
        self.emitted: list[Event] = []
        self.saved: dict[str, bytes] = {}
        self.script: dict[str, deque[str]] = defaultdict(deque)
        self.cancel_script: deque[str] = deque()
        self.denials: deque[str] = deque()
        self.held_positions: dict[str, Position] = {}
        self.checkpoints = 0
        self.at_venue: dict[str, Decimal] = {}

    # What a test says ---------------------------------------------------------

    def quote(
        self,
        bid: str,
        ask: str,
        venue: str = "A",
        symbol: str = "BTC/USDT",
        quantity: str = "1000",
    ) -> QuoteChanged:
        event = QuoteChanged(
            symbol=symbol,
            venue=venue,
            bid=Decimal(bid),
            ask=Decimal(ask),
            bid_quantity=Decimal(quantity),
            ask_quantity=Decimal(quantity),
            ts_event_ns=self.clock.now,
            ts_received_ns=self.clock.now,
        )
        self.quotes[instrument_key(symbol, venue)] = event
        return event

    def answer(self, *answers: str, venue: str = "A") -> None:
        self.script[venue].extend(answers)

    def open_orders(self, venue: str | None = None) -> list[Order]:
        return [
            o
            for o in self.ledger.values()
            if o.status.is_open and venue in (None, o.request.venue)
        ]

    def only_open(self, venue: str | None = None) -> Order:
        orders = self.open_orders(venue)
        assert len(orders) == 1, orders
        return orders[0]

    def fill(
        self,
        order: Order | str,
        quantity: Decimal | str | None = None,
        price: Decimal | str | None = None,
        liquidity: Liquidity = Liquidity.MAKER,
    ) -> Order:
        """Execute (a part of) a working order."""
        order = self.ledger[order if isinstance(order, str) else order.client_order_id]
        assert order.status.is_open, order
        quantity = order.remaining_quantity if quantity is None else Decimal(quantity)
        price = order.request.price if price is None else Decimal(price)
        assert price is not None
        assert 0 < quantity <= order.remaining_quantity, (quantity, order)
        self.at_venue[order.client_order_id] = order.filled_quantity + quantity
        return self._book(order, quantity, price, liquidity)

    def end(self, order: Order | str, status: OrderStatus, reason: str = "") -> Order:
        key = order if isinstance(order, str) else order.client_order_id
        assert self.ledger[key].status.is_open, self.ledger[key]
        return self._change(self.ledger[key], status=status, reason=reason or None)

    def acknowledge_cancel(self, order: Order | str) -> Order:
        return self.end(order, OrderStatus.CANCELED)

    def resolve(self, order: Order | str, *, accepted: bool) -> Order:
        """The desk has found out what became of an UNKNOWN order."""
        key = order if isinstance(order, str) else order.client_order_id
        assert self.ledger[key].status is OrderStatus.UNKNOWN
        if accepted:
            return self._change(self.ledger[key], status=OrderStatus.ACCEPTED)
        return self.end(key, OrderStatus.REJECTED, "not found at the venue")

    def total(self, venue: str | None = None, side: Side | None = None) -> Decimal:
        """Sum of executions by the venue's own statement."""
        return sum(
            (
                quantity
                for key, quantity in self.at_venue.items()
                if venue in (None, self.ledger[key].request.venue)
                and side in (None, self.ledger[key].request.side)
            ),
            ZERO,
        )

    def working(self) -> Decimal:
        return sum((o.working_quantity for o in self.ledger.values()), ZERO)

    def quantities(self) -> list[str]:
        return [str(order.request.quantity) for order in self.sent]

    # The handle -----------------------------------------------------------------

    async def submit(self, request: OrderRequest) -> Order:
        if self.denials:
            raise OrderDeniedError(self.denials.popleft(), "the fake gate says no")
        self._check_grid(request)
        answers = self.script[request.venue]
        answer = answers.popleft() if answers else "accept"
        order = self._intent(request)
        if answer == "crash_before":
            raise Crash
        self.sent.append(order)
        if answer == "crash_after":
            raise Crash
        if answer in ("lost", "vanish"):
            return self._change(order, status=OrderStatus.UNKNOWN, reason="no reply")
        if answer.startswith("reject:"):
            return self.end(order, OrderStatus.REJECTED, answer.removeprefix("reject:"))
        order = self._change(order, status=OrderStatus.ACCEPTED)
        if answer == "fill":
            price = request.price or self._touch(request)
            taker = request.type is OrderType.MARKET or not request.post_only
            return self.fill(
                order,
                price=price,
                liquidity=Liquidity.TAKER if taker else Liquidity.MAKER,
            )
        return order if answer == "rest" else self._match(order)

    async def cancel(self, client_order_id: str) -> Order:
        order = self.ledger[client_order_id]
        assert order.status.is_open, f"cancel of a finished order {order}"
        self.cancels.append(client_order_id)
        answer = self.cancel_script.popleft() if self.cancel_script else "held"
        if answer == "refused":
            return order
        order = self._change(order, status=OrderStatus.PENDING_CANCEL)
        return self.acknowledge_cancel(order) if answer == "now" else order

    def orders(self) -> list[Order]:
        return list(self.ledger.values())

    def order(self, client_order_id: str) -> Order | None:
        return self.ledger.get(client_order_id)

    def price(self, symbol: str, venue: str) -> QuoteChanged | None:
        return self.quotes.get(instrument_key(symbol, venue))

    def instrument(self, symbol: str, venue: str) -> Instrument:
        return self.instruments[instrument_key(symbol, venue)]

    def position(self, symbol: str, venue: str) -> Position:
        key = instrument_key(symbol, venue)
        base = self.held_positions.get(key, Position(symbol=symbol, venue=venue))
        own = sum(
            (
                o.filled_quantity * o.request.side.sign
                for o in self.ledger.values()
                if instrument_key(o.request.symbol, o.request.venue) == key
            ),
            ZERO,
        )
        return msgspec.structs.replace(base, quantity=base.quantity + own)

    def positions(self) -> list[Position]:
        return [self.position(i.symbol, i.venue) for i in self.instruments.values()]

    async def checkpoint(self) -> None:
        self.checkpoints += 1

    def emit(self, event: Event) -> None:
        self.emitted.append(event)

    def alert(self, level: str, text: str) -> None:
        self.alerts.append((level, text))

    async def save(self, key: str, data: bytes) -> None:
        self.saved[key] = data

    async def load(self, key: str) -> bytes | None:
        return self.saved.get(key)

    # The venue ------------------------------------------------------------------

    def _intent(self, request: OrderRequest) -> Order:
        number = len(self.ledger) + 1
        order = Order(
            client_order_id=f"nd{number:06d}",
            task_id=self.task_id,
            request=request,
            status=OrderStatus.SUBMITTED,
            created_ns=self.clock.now,
            updated_ns=self.clock.now,
        )
        self.ledger[order.client_order_id] = order
        self.at_venue[order.client_order_id] = ZERO
        return order

    def _check_grid(self, request: OrderRequest) -> None:
        grid = self.instrument(request.symbol, request.venue)
        price = request.price or self._touch(request)
        assert request.quantity % grid.lot_size == 0, f"off the lot grid: {request}"
        assert request.price is None or request.price % grid.tick_size == 0, (
            f"off the tick grid: {request}"
        )
        assert grid.is_tradable(request.quantity, price), f"below minimum: {request}"

    def _touch(self, request: OrderRequest) -> Decimal:
        quote = self.quotes[instrument_key(request.symbol, request.venue)]
        return quote.ask if request.side is Side.BUY else quote.bid

    def _match(self, order: Order) -> Order:
        """Execute what crosses the touch; reject a post-only order that would."""
        request = order.request
        at_market = request.type is OrderType.MARKET
        crosses = at_market or self._crosses(request)
        if crosses and request.post_only:
            return self.end(order, OrderStatus.REJECTED, "POST_ONLY would take")
        if crosses:
            quote = self.quotes[instrument_key(request.symbol, request.venue)]
            shown = (
                quote.ask_quantity if request.side is Side.BUY else quote.bid_quantity
            )
            quantity = min(order.remaining_quantity, shown)
            order = self.fill(order, quantity, self._touch(request), Liquidity.TAKER)
        ends = at_market or request.time_in_force is TimeInForce.IOC
        if ends and order.status.is_open:
            return self.end(order, OrderStatus.EXPIRED, "nothing more at this price")
        return order

    def _crosses(self, request: OrderRequest) -> bool:
        assert request.price is not None
        touch = self._touch(request)
        return (request.price - touch) * request.side.sign >= 0

    def _book(
        self, order: Order, quantity: Decimal, price: Decimal, liquidity: Liquidity
    ) -> Order:
        grid = self.instrument(order.request.symbol, order.request.venue)
        rate = grid.maker_fee if liquidity is Liquidity.MAKER else grid.taker_fee
        in_base = grid.fee_in == "base" and order.request.side is Side.BUY
        asset = grid.base if in_base else grid.quote
        fee = quantity * rate * (1 if in_base else price)
        value = order.filled_quantity * (order.average_price or ZERO) + quantity * price
        filled = order.filled_quantity + quantity
        complete = filled == order.request.quantity
        status = OrderStatus.FILLED if complete else order.status
        if not complete and status is OrderStatus.ACCEPTED:
            status = OrderStatus.PARTIALLY_FILLED
        return self._change(
            order,
            status=status,
            filled_quantity=filled,
            average_price=value / filled,
            fees={**order.fees, asset: order.fees.get(asset, ZERO) + fee},
        )

    def _change(self, order: Order, **changes: Any) -> Order:
        order = msgspec.structs.replace(order, updated_ns=self.clock.now, **changes)
        self.ledger[order.client_order_id] = order
        return order


async def attach(task: Any, desk: FakeDesk) -> Any:
    """Give `task` its handle and start it."""
    task.desk = desk
    await task.start()
    return task


async def settle(task: Any, most: int = 100) -> None:
    """Step `task` until it wants to wait or has ended."""
    for _ in range(most):
        result = await task.step()
        if not result.should_continue or result.next_delay > 0:
            return
    raise AssertionError(f"still busy after {most} cycles in {task.context.state}")


async def pass_time(task: Any, desk: FakeDesk, seconds: float) -> None:
    """Let `seconds` go by as the scheduler would: the task steps whenever it asked to."""
    end = desk.clock.now + int(seconds * 1_000_000_000)
    while True:
        result = await task.step()
        if not result.should_continue:
            break
        due = desk.clock.now + max(int(result.next_delay * 1_000_000_000), 1)
        if due > end:
            break
        desk.clock.now = due
    desk.clock.now = end


async def reborn(task: Any, desk: FakeDesk, context: Any = None) -> Any:
    """Kill `task` and start a new one from its (or an older) saved context."""
    kind = type(task)
    saved = msgspec.json.encode(task.context if context is None else context)
    return await attach(kind(msgspec.json.decode(saved, type=kind.context_class)), desk)


def sides(orders: Iterable[Order]) -> list[tuple[str, str, str]]:
    """Venue, side and quantity of each order, for readable assertions."""
    return [
        (o.request.venue, o.request.side.value, f"{o.request.quantity:.3f}")
        for o in orders
    ]
