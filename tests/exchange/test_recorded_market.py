"""The paper venue on recorded ticks, under the virtual clock: real prices, nothing invented, the same twice."""

import asyncio
import random
from bisect import bisect_right
from decimal import Decimal
from pathlib import Path

import pytest

from fakes.paper import SYMBOL, D, order
from nightdesk.market.matching import MatchingEngine
from nightdesk.model.events import (
    Event,
    OrderCanceled,
    OrderFilled,
    QuoteChanged,
    TradePrinted,
)
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import OrderStatus, Side
from nightdesk.simulation.virtual import VirtualClock, VirtualLoop
from nightdesk.sources.replay import ReplaySource
from nightdesk.venues.paper import PaperVenue, read_rows, summarise
from recordings import recording

LISTED = Instrument(
    symbol=SYMBOL,
    venue="binance",
    tick_size=D("0.01"),
    lot_size=D("0.00001"),
    min_quantity=D("0.00001"),
    min_notional=D(5),
    maker_fee=D("0.001"),
    taker_fee=D("0.001"),
)
TOTAL, CHILD = D("0.5"), D("0.05")


class Sliced:
    """Buys 0.5 BTC in children of 0.05 at the best bid, moving after it: what an iceberg does, in ten lines."""

    def __init__(self, venue: PaperVenue) -> None:
        self.venue = venue
        self.filled = Decimal(0)
        self.quote: QuoteChanged | None = None
        self.news = asyncio.Event()

    def on_event(self, event: Event) -> None:
        if isinstance(event, QuoteChanged):
            self.quote = event
        if isinstance(event, OrderFilled):
            self.filled += event.fill.quantity
        if isinstance(event, (OrderFilled, OrderCanceled)):
            self.news.set()

    async def run(self, clock: VirtualClock) -> None:
        number = 0
        while self.filled < TOTAL:
            await clock.sleep(0.2)
            if self.quote is None:
                continue
            number += 1
            quantity = min(CHILD, TOTAL - self.filled)
            child = order(
                f"c{number}",
                Side.BUY,
                str(quantity),
                str(self.quote.bid),
                venue="binance",
            )
            await self.venue.submit(child)
            await clock.sleep(3.0)
            found = await self.venue.find_order(SYMBOL, child.client_order_id)
            assert found is not None
            if not found.status.is_terminal:
                self.news.clear()
                await self.venue.cancel(child)
                await self.news.wait()
            await clock.sleep(0.05)


async def trade_on(
    path: Path, directory: Path, loop: VirtualLoop
) -> tuple[list[Event], bytes]:
    source = ReplaySource("replay", files=[path], venue="binance", speed="max")
    clock = VirtualClock(loop, source.first_event_ns())
    venue = PaperVenue(
        "binance",
        instruments=[LISTED],
        matching=MatchingEngine("binance", [LISTED]),
        balances={"USDT": D(100_000)},
        directory=directory,
        latency_ms=(1, 15),
    )
    buyer = Sliced(venue)
    market: list[Event] = []

    def emit(event: Event) -> None:
        market.append(event)
        venue.on_market(event)
        buyer.on_event(event)

    await venue.start(emit, clock, random.Random("seed"))
    await source.start(emit, clock, random.Random("seed"))
    await buyer.run(clock)
    await source.stop()
    await venue.stop()
    return market, (directory / "statement.jsonl").read_bytes()


def in_virtual_time(path: Path, directory: Path) -> tuple[list[Event], bytes]:
    loop = VirtualLoop(1)
    try:
        return loop.run_until_complete(trade_on(path, directory, loop))
    finally:
        loop.close()


@pytest.mark.recordings
def test_a_sliced_order_completes_on_recorded_ticks_inside_the_market_and_the_same_twice(
    tmp_path: Path,
) -> None:
    path = recording("market_raw/binance_spot_btcusdt_20240808.gz")

    market, statement = in_virtual_time(path, tmp_path / "1")
    _, again = in_virtual_time(path, tmp_path / "2")

    assert statement == again
    said = summarise(read_rows(tmp_path / "1" / "statement.jsonl"))
    assert sum(line.filled for line in said.values()) == TOTAL
    assert all(line.placed == 1 for line in said.values())
    assert {line.status for line in said.values()} <= {
        OrderStatus.FILLED,
        OrderStatus.CANCELED,
    }
    assert_inside(market)


def assert_inside(market: list[Event]) -> None:
    """Each fill lies between the lowest and highest of the quote before it, the one at it, and its instant's trades."""
    quotes = [event for event in market if isinstance(event, QuoteChanged)]
    trades = [event for event in market if isinstance(event, TradePrinted)]
    quoted = [event.ts_received_ns for event in quotes]
    traded = [event.ts_received_ns for event in trades]
    fills = [event.fill for event in market if isinstance(event, OrderFilled)]
    assert len(fills) >= 10
    for fill in fills:
        at = bisect_right(quoted, fill.ts_event_ns)
        near = quotes[max(0, at - 2) : at]
        until = bisect_right(traded, fill.ts_event_ns)
        prints = [t.price for t in trades[max(0, until - 1) : until]]
        low = min([*(q.bid for q in near), *prints])
        high = max([*(q.ask for q in near), *prints])
        assert low <= fill.price <= high
