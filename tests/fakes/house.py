"""Gate, positions and order protocol over a fake venue, wired as the desk wires them; dies and is rebuilt."""

import asyncio
import random
from decimal import Decimal
from typing import Any

from fakes.clock import ManualClock
from fakes.store import CrashableStore
from fakes.venue import FakeVenue
from nightdesk.abc import Observer
from nightdesk.config import RiskConfig
from nightdesk.model.events import Event, OrderEvent, QuoteChanged
from nightdesk.model.order import Order, OrderRequest, OrderType, Side
from nightdesk.orders.protocol import OrderProtocol
from nightdesk.portfolio.positions import Positions
from nightdesk.risk.gate import Gate

__all__ = ["House", "Listener", "quote", "request"]


class Listener(Observer):
    def __init__(self) -> None:
        self.alerts: list[tuple[str, str, str]] = []
        self.orders: list[tuple[Order, Event]] = []

    def on_alert(self, level: str, source: str, text: str) -> None:
        self.alerts.append((level, source, text))

    def on_order(self, order: Order, event: Event) -> None:
        self.orders.append((order, event))


def quote(
    bid: str = "100",
    ask: str = "100.2",
    *,
    venue: str = "A",
    symbol: str = "BTC/USDT",
    ns: int = 0,
) -> QuoteChanged:
    return QuoteChanged(
        symbol=symbol,
        venue=venue,
        bid=Decimal(bid),
        ask=Decimal(ask),
        bid_quantity=Decimal(1000),
        ask_quantity=Decimal(1000),
        ts_received_ns=ns,
    )


def request(
    quantity: str = "1", price: str | None = "100", side: Side = Side.BUY, **more: Any
) -> OrderRequest:
    return OrderRequest(
        symbol=more.pop("symbol", "BTC/USDT"),
        venue=more.pop("venue", "A"),
        side=side,
        quantity=Decimal(quantity),
        price=None if price is None else Decimal(price),
        type=OrderType.MARKET if price is None else OrderType.LIMIT,
        **more,
    )


class House:
    """One run of a desk; `next()` is the run after it has died, over the same disk and venue."""

    def __init__(
        self,
        venue: FakeVenue | None = None,
        store: CrashableStore | None = None,
        clock: ManualClock | None = None,
        limits: RiskConfig | None = None,
        **options: Any,
    ) -> None:
        self.clock = clock or ManualClock()
        self.store = store or CrashableStore()
        self.venue = venue or FakeVenue()
        self.venues = {self.venue.name: self.venue}
        self.listener = Listener()
        self.events: list[Event] = []
        self.quotes = {
            self.venue.name: quote(venue=self.venue.name, ns=self.clock.now_ns())
        }
        self.limits = limits or RiskConfig(
            max_quote_age_s=1e9, max_orders_per_s=100_000
        )
        self.positions = Positions()
        self.gate = Gate(
            self.limits,
            clock=self.clock,
            store=self.store,
            instruments=self.instrument,
            positions=self.positions,
            quote=lambda symbol, venue: self.quotes.get(venue),
            observers=(self.listener,),
        )
        self.options = options
        self.orders = OrderProtocol(
            code="tst",
            gate=self.gate,
            venues=self.venues,
            store=self.store,
            clock=self.clock,
            random=random.Random(1),
            emit=self.emit,
            positions=self.positions,
            instruments=self.instrument,
            observers=(self.listener,),
            **options,
        )

    def instrument(self, symbol: str, venue: str) -> Any:
        return (
            self.venue.instruments().get(symbol) if venue == self.venue.name else None
        )

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, OrderEvent):
            self.orders.on_event(event)

    async def open(self) -> "House":
        await self.store.start()
        await self.gate.load()
        await self.venue.start(self.emit, self.clock, random.Random(2))
        self.report = await self.orders.recover()
        await self.orders.start()
        return self

    def next(self, keep: int = 0) -> "House":
        """The run after a crash: of the saves that nobody awaited, the first `keep` reached the disk."""
        self.store.flush(keep)
        store = CrashableStore(self.store.disk, self.store.epoch + 1)
        self.venue.hook = lambda point: None
        return House(self.venue, store, self.clock, self.limits, **self.options)

    async def settle(self, seconds: float = 0.0) -> None:
        """Let everything under way go on for `seconds`, in steps short enough for each watcher to act in."""
        left = seconds
        while True:
            for _ in range(20):
                await asyncio.sleep(0)
            if left <= 0:
                return
            await self.clock.advance(min(left, 0.25))
            left -= 0.25
