"""The simulated market: the same seed, the same market; gaps that pay; swaps that are not all worth it."""

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from fakes.paper import START, SYMBOL, D, ManualClock, PaperHouse, order
from nightdesk.errors import ConfigError
from nightdesk.model.events import Event, PoolSwap, QuoteChanged, TradePrinted
from nightdesk.model.order import Side
from nightdesk.sources.simulated import SimulatedSource


async def events_of(
    seconds: float, *, desk_seed: int = 1, **options: Any
) -> list[Event]:
    clock, events = ManualClock(), []  # type: ManualClock, list[Event]
    source = SimulatedSource("sim", **{"venues": ["a", "b"], **options})
    await source.start(events.append, clock, random.Random(desk_seed))
    await clock.advance(seconds)
    await source.stop()
    return events


async def test_the_same_seed_gives_the_same_events_and_another_seed_others() -> None:
    first = await events_of(10, seed=4, swaps=True, desk_seed=1)
    second = await events_of(10, seed=4, swaps=True, desk_seed=2)
    other = await events_of(10, seed=5, swaps=True)

    assert first == second
    assert first != other


async def test_without_a_seed_of_its_own_it_takes_the_desks() -> None:
    assert await events_of(5, desk_seed=1) == await events_of(5, desk_seed=1)
    assert await events_of(5, desk_seed=1) != await events_of(5, desk_seed=2)


async def test_quotes_and_trades_lie_on_the_grid_and_trades_at_the_standing_quote() -> (
    None
):
    quotes: dict[tuple[str, str], QuoteChanged] = {}
    count = Counter[str]()
    for event in await events_of(
        30,
        seed=2,
        markets={
            "X/Y": {"price": 50, "tick_size": "0.05", "lot_size": "0.1", "quantity": 3}
        },
    ):
        count[type(event).__name__] += 1
        if isinstance(event, QuoteChanged):
            assert event.bid < event.ask
            assert event.bid % D("0.05") == event.ask % D("0.05") == 0
            assert event.bid_quantity > 0
            assert event.bid_quantity % D("0.1") == 0
            quotes[event.venue, event.symbol] = event
        elif isinstance(event, TradePrinted):
            standing = quotes[event.venue, event.symbol]
            price, shown = (
                (standing.ask, standing.ask_quantity)
                if event.side is Side.BUY
                else (standing.bid, standing.bid_quantity)
            )
            assert event.price == price
            assert event.quantity <= shown
    assert count["QuoteChanged"] > 300
    assert count["TradePrinted"] > 100


async def test_two_venues_drift_apart_now_and_then_by_more_than_the_fees() -> None:
    """About one gap in 25 s, one to three seconds long, wide enough for 0.1 % on both legs."""
    last: dict[str, QuoteChanged] = {}
    opened: list[int] = []
    closed: list[int] = []
    is_open = False
    markets = {SYMBOL: {"price": 60_000, "tick_size": "0.1"}}
    for event in await events_of(600, seed=8, markets=markets, swaps=None):
        if isinstance(event, QuoteChanged):
            last[event.venue] = event
        if len(last) < 2:
            continue
        a, b = last["a"], last["b"]
        edge = max(a.bid / b.ask, b.bid / a.ask) - 1
        if (edge > D("0.002")) is not is_open:
            is_open = not is_open
            (opened if is_open else closed).append(event.ts_event_ns)

    lengths = [(end - begin) / 1e9 for begin, end in zip(opened, closed, strict=False)]
    assert 12 <= len(opened) <= 40
    assert all(0.5 <= length <= 7 for length in lengths)


async def test_without_gaps_and_with_one_venue_there_are_none() -> None:
    source = SimulatedSource("sim", venues="a", gap_every_s=0.001)
    clock = ManualClock()
    await source.start(lambda _: None, clock, random.Random(1))
    await clock.advance(2)
    await source.stop()

    assert source.stats()["gaps"] == 0
    assert source.stats()["emitted"] > 0
    assert not source.finished


async def test_swaps_are_large_and_small_in_known_and_unknown_pools_and_confirmed_later() -> (
    None
):
    swaps = [
        event
        for event in await events_of(400, seed=3, swaps={"every_s": 1})
        if isinstance(event, PoolSwap)
    ]
    first = [swap for swap in swaps if not swap.is_confirmed]
    confirmed = [swap for swap in swaps if swap.is_confirmed]

    large = [swap for swap in first if swap.price_impact_ppm > 5_000]
    assert 0.15 < len(large) / len(first) < 0.45
    assert {swap.liquidity_usd < 100_000 for swap in large} == {True, False}
    assert len({swap.duplicate_key for swap in swaps}) == len(swaps)
    assert abs(len(confirmed) - len(first)) < 10
    by_hash = {swap.transaction_hash: swap for swap in first}
    assert all(
        swap.ts_received_ns - by_hash[swap.transaction_hash].ts_event_ns
        >= 2_000_000_000
        for swap in confirmed
    )


async def test_a_late_step_is_not_made_up_for_by_a_burst() -> None:
    clock, times = ManualClock(), []  # type: ManualClock, list[int]
    source = SimulatedSource("sim", venues="a", seed=1, interval_ms=50)
    await source.start(
        lambda event: times.append(clock.now_ns()), clock, random.Random(1)
    )
    await clock.advance(1)
    clock.ns += 60_000_000_000
    await clock.advance(1)
    await source.stop()

    steps = sorted(set(times))
    assert max(later - earlier for earlier, later in pairwise(steps)) >= 59_000_000_000
    assert len([step for step in steps if step > START + 60_000_000_000]) < 30


async def test_an_iceberg_sized_order_fills_by_resting_within_a_minute() -> None:
    async with PaperHouse() as house:
        markets = {SYMBOL: {"price": 100, "tick_size": "0.1", "quantity": "0.5"}}
        source = SimulatedSource("sim", venues="A", markets=markets, seed=6)
        await source.start(house.venue.on_market, house.clock, random.Random(1))
        await house.clock.advance(1)
        for number in range(60):
            found = await house.venue.open_orders()
            if (
                not found
                and sum(fill.quantity for fill in await house.venue.fills(0)) < 2
            ):
                market = house.matching._markets[SYMBOL].shown
                bid = market.best(Side.BUY)
                await house.venue.submit(
                    order(f"o{number}", Side.BUY, "0.2", str(bid), post_only=True)
                )
            await house.clock.advance(1)
        await source.stop()

        assert sum(fill.quantity for fill in await house.venue.fills(0)) >= 2


@pytest.mark.parametrize(
    "options",
    [
        {"venues": []},
        {"venues": "a", "interval_ms": 0},
        {"venues": "a", "markets": {"X/Y": {"price": "dear"}}},
        {"venues": "a", "markets": {"X/Y": {"price": 1, "volatility": 3}}},
        {"venues": "a", "swaps": {"every": 3}},
    ],
)
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="sim"):
        SimulatedSource("sim", **options)
