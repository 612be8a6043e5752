"""How many orders a second the paper venue matches, in process, and with its statement on disk.

Comes from: cli/
Goes to: market/matching.py, venues/paper.py
"""

import asyncio
import gc
import random
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from time import perf_counter
from typing import Any

from nightdesk.kernel.clock import SystemClock
from nightdesk.market.matching import MatchingEngine
from nightdesk.model.events import QuoteChanged, TradePrinted
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Order, OrderRequest, OrderType, Side
from nightdesk.venues.paper import PaperVenue

__all__ = ["bench", "engine_orders_per_s", "venue_orders_per_s"]

_SYMBOL = "BTC/USDT"
_INSTRUMENT = Instrument(
    symbol=_SYMBOL,
    venue="paper",
    tick_size=Decimal("0.1"),
    lot_size=Decimal("0.001"),
    min_quantity=Decimal("0.001"),
    min_notional=Decimal(5),
    maker_fee=Decimal("0.0002"),
    taker_fee=Decimal("0.0005"),
)
_MONEY = {"BTC": Decimal(10**6), "USDT": Decimal(10**12)}
_RESTING = 500


def bench(orders: int = 20_000, rounds: int = 3) -> dict[str, Any]:
    """Return the best of some rounds: every order is matched, half as taker, half as maker."""
    engine, venue = [], []
    for _ in range(rounds):
        gc.collect()
        gc.freeze()  # what the harness prepared is not the venue's to clean up
        engine.append(engine_orders_per_s(orders))
        venue.append(asyncio.run(venue_orders_per_s(orders // 2)))
    gc.unfreeze()
    return {
        "orders": orders,
        "rounds": rounds,
        "engine_orders_per_s": round(max(engine)),
        "venue_orders_per_s": round(max(venue)),
        "what": "a quote, submit and match per order, and a trade for every second one; "
        "the venue also writes its statement and reports the fill",
    }


def engine_orders_per_s(count: int) -> float:
    """Return the rate of the engine alone, with 500 other orders in the book."""
    matching = MatchingEngine("paper", [_INSTRUMENT])
    matching.deposit(1, _MONEY)
    matching.on_quote(1, _quote(0))
    for number in range(_RESTING):
        matching.submit(
            1, _order(f"r{number}", Side.BUY, Decimal(90) - Decimal(number % 50) / 10)
        )
    steps = _steps(count)
    begin = perf_counter()
    for now, (order, quote, trade) in enumerate(steps, 2):
        matching.on_quote(now, quote)
        matching.submit(now, order)
        if trade:
            matching.on_trade(now, trade)
    elapsed = perf_counter() - begin
    assert len(matching.open_orders()) == _RESTING, (
        "every order should have been matched"
    )
    return count / elapsed


async def venue_orders_per_s(count: int) -> float:
    """Return the rate of the whole venue: coroutine, engine, statement in the page cache, fill event."""
    filled: list[object] = []
    with tempfile.TemporaryDirectory() as directory:
        venue = PaperVenue(
            "paper",
            instruments=[_INSTRUMENT],
            matching=MatchingEngine("paper", [_INSTRUMENT]),
            balances=_MONEY,
            directory=Path(directory),
        )
        await venue.start(filled.append, SystemClock(), random.Random(1))
        steps = _steps(count)
        begin = perf_counter()
        for order, quote, trade in steps:
            venue.on_market(quote)
            await venue.submit(order)
            if trade:
                venue.on_market(trade)
        await _until(lambda: len(filled) >= count)
        elapsed = perf_counter() - begin
        await venue.stop()
    return count / elapsed


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - a benchmark has nothing else to do
        await asyncio.sleep(0)


def _steps(count: int) -> list[tuple[Order, QuoteChanged, TradePrinted | None]]:
    return [
        (_order(f"t{n}", Side.BUY, Decimal("100.2")), _quote(n), None)
        if n % 2
        else (_order(f"m{n}", Side.SELL, Decimal("100.1")), _quote(n), _trade(n))
        for n in range(count)
    ]


def _order(name: str, side: Side, price: Decimal) -> Order:
    request = OrderRequest(
        symbol=_SYMBOL,
        venue="paper",
        side=side,
        quantity=Decimal("0.5"),
        type=OrderType.LIMIT,
        price=price,
    )
    return Order(client_order_id=name, task_id="bench", request=request)


def _quote(number: int) -> QuoteChanged:
    return QuoteChanged(
        symbol=_SYMBOL,
        venue="paper",
        bid=Decimal("100.0"),
        bid_quantity=Decimal(1 + number % 3),
        ask=Decimal("100.2"),
        ask_quantity=Decimal(1 + number % 4 // 2 * 5),
    )


def _trade(number: int) -> TradePrinted:
    return TradePrinted(
        symbol=_SYMBOL,
        venue="paper",
        price=Decimal("100.1"),
        quantity=Decimal("0.5"),
        side=Side.BUY,
        trade_id=str(number),
    )


if __name__ == "__main__":
    print(bench())
