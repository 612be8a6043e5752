"""The fixture of the paper exchange's tests: venues A and B, BTC/USDT, and a clock that is moved by hand."""

import asyncio
import random
from collections.abc import Iterable
from decimal import Decimal
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from nightdesk.market.matching import MatchingEngine
from nightdesk.model.events import BookChanged, Event, QuoteChanged, TradePrinted
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Order, OrderRequest, OrderType, Side
from nightdesk.model.statement import StatementRow, Traded
from nightdesk.venues.paper import PaperVenue

D = Decimal
SYMBOL = "BTC/USDT"
SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND
RICH = {"BTC": D(1000), "USDT": D(10_000_000)}


def instrument(venue: str = "A", **changes: Any) -> Instrument:
    facts: dict[str, Any] = {
        "symbol": SYMBOL,
        "venue": venue,
        "tick_size": D("0.1"),
        "lot_size": D("0.001"),
        "min_quantity": D("0.001"),
        "min_notional": D(5),
        "maker_fee": D("0.0002"),
        "taker_fee": D("0.0005"),
    }
    return Instrument(**{**facts, **changes})


def quote(
    bid: str,
    ask: str,
    bid_quantity: str = "1",
    ask_quantity: str = "1",
    venue: str = "A",
) -> QuoteChanged:
    return QuoteChanged(
        symbol=SYMBOL,
        venue=venue,
        bid=D(bid),
        bid_quantity=D(bid_quantity),
        ask=D(ask),
        ask_quantity=D(ask_quantity),
    )


def trade(
    side: Side, quantity: str, price: str, trade_id: str = "", venue: str = "A"
) -> TradePrinted:
    return TradePrinted(
        symbol=SYMBOL,
        venue=venue,
        price=D(price),
        quantity=D(quantity),
        side=side,
        trade_id=trade_id,
    )


def book(
    bids: Iterable[tuple[str, str]],
    asks: Iterable[tuple[str, str]],
    first: int = 0,
    last: int = 0,
    snapshot: bool = False,
) -> BookChanged:
    return BookChanged(
        symbol=SYMBOL,
        venue="A",
        bids=[(D(p), D(q)) for p, q in bids],
        asks=[(D(p), D(q)) for p, q in asks],
        first_sequence=first,
        last_sequence=last,
        is_snapshot=snapshot,
    )


def order(
    client_order_id: str,
    side: Side,
    quantity: str,
    price: str | None = None,
    venue: str = "A",
    **more: Any,
) -> Order:
    kind = more.pop("type", OrderType.LIMIT if price is not None else OrderType.MARKET)
    request = OrderRequest(
        symbol=more.pop("symbol", SYMBOL),
        venue=venue,
        side=side,
        quantity=D(quantity),
        type=kind,
        price=D(price) if price is not None else None,
        **more,
    )
    return Order(client_order_id=client_order_id, task_id="test", request=request)


def engine(**options: Any) -> MatchingEngine:
    """Return an engine of venue A with much money and the market at 100.0 / 100.2, one unit each."""
    changes = options.pop("instrument", {})
    matching = MatchingEngine("A", [instrument(**changes)], **options)
    matching.deposit(START, RICH)
    matching.on_quote(START, quote("100.0", "100.2"))
    return matching


def fills_of(rows: Iterable[StatementRow]) -> list[tuple[str, Decimal, Decimal]]:
    """Return `(client order id, quantity, price)` of the fills among `rows`."""
    return [
        (r.fill.client_order_id, r.fill.quantity, r.fill.price)
        for r in rows
        if isinstance(r, Traded)
    ]


class ManualClock:
    """Time stands still until a test moves it; sleepers wake in order of their time."""

    def __init__(self, start_ns: int = START) -> None:
        self.ns = start_ns
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._number = 0
        self.turns = (
            12  # loop iterations that everything gets to react before time moves on
        )

    def now_ns(self) -> int:
        return self.ns

    def monotonic_ns(self) -> int:
        return self.ns

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        self._number += 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(self._sleepers, (self.ns + round(seconds * 1e9), self._number, future))
        await future

    async def advance(self, seconds: float) -> None:
        """Move time, waking every sleeper at its own instant and letting it work before the next."""
        await settle(self.turns)
        end = self.ns + round(seconds * 1e9)
        while self._sleepers and self._sleepers[0][0] <= end:
            due, _, future = heappop(self._sleepers)
            self.ns = max(self.ns, due)
            if not future.done():
                future.set_result(None)
            await settle(self.turns)
        self.ns = end


async def settle(turns: int = 12) -> None:
    """Let every ready callback run."""
    for _ in range(turns):
        await asyncio.sleep(0)


class PaperHouse:
    """A paper venue with its clock, and everything it emitted."""

    def __init__(
        self,
        directory: Path | None = None,
        *,
        clock: ManualClock | None = None,
        **options: Any,
    ) -> None:
        self.clock = clock or ManualClock()
        self.events: list[Event] = []
        self._has_market = options.pop("has_market", True)
        venue_options = {
            key: options.pop(key)
            for key in ("latency_ms", "faults", "seed", "expiry_s", "balances")
            if key in options
        }
        instruments = [instrument(**options.pop("instrument", {}))]
        self.matching = MatchingEngine("A", instruments, **options)
        self.venue = PaperVenue(
            "A",
            instruments=instruments,
            matching=self.matching,
            directory=directory,
            **{"balances": RICH, **venue_options},
        )

    async def __aenter__(self) -> "PaperHouse":
        await self.venue.start(self.events.append, self.clock, random.Random(7))
        if self._has_market:
            self.venue.on_market(quote("100.0", "100.2"))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.venue.stop()
