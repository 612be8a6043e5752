"""The background tasks that learn: candles, regimes, spreads, pool impacts."""

import random
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.desk import START_NS, FakeDesk, attach, pass_time, reborn, settle
from nightdesk.model.events import CandleClosed, PoolSwap, QuoteChanged, TradePrinted
from nightdesk.model.order import Side
from nightdesk.tasks._histogram import Histogram
from nightdesk.tasks.candles import CandlesContext, CandlesTask, timeframe_ns
from nightdesk.tasks.pool_impact import PoolImpactContext, PoolImpactTask
from nightdesk.tasks.regime import RegimeContext, RegimeTask
from nightdesk.tasks.spread_watch import SpreadWatchContext, SpreadWatchTask

D = Decimal
MINUTE = 60 * 10**9
OLD = 1_600_000_020_000_000_000  # a minute's start, years before the desk's clock


def trade(
    at_s: float, price: str, quantity: str = "1", symbol: str = "BTC/USDT"
) -> TradePrinted:
    return TradePrinted(
        ts_event_ns=OLD + int(at_s * 10**9),
        symbol=symbol,
        venue="A",
        price=D(price),
        quantity=D(quantity),
        side=Side.BUY,
        trade_id=str(at_s),
    )


async def candles(desk: FakeDesk, **changes: Any) -> CandlesTask:
    facts: dict[str, Any] = {"task_id": "candles", "timeframes": ("1m",)}
    task: CandlesTask = await attach(
        CandlesTask(CandlesContext(**(facts | changes))), desk
    )
    await settle(task)
    return task


def closed(desk: FakeDesk) -> list[tuple[int, str, str, str, str, str]]:
    return [
        (
            (e.ts_open_ns - OLD) // MINUTE,
            str(e.open),
            str(e.high),
            str(e.low),
            str(e.close),
            str(e.volume),
        )
        for e in desk.emitted
        if isinstance(e, CandleClosed)
    ]


async def test_a_candle_is_what_its_trades_say_and_the_first_half_seen_one_is_a_hole() -> (
    None
):
    desk = FakeDesk()
    task = await candles(desk)
    woken = [
        task.wants(t)
        for t in (
            trade(30, "10"),
            trade(60, "11", "2"),
            trade(70, "15"),
            trade(80, "9"),
            trade(119.999, "12", "0.5"),
            trade(120, "13"),
        )
    ]
    await settle(task)

    assert woken == [False, False, False, False, False, True]
    assert closed(desk) == [(1, "11", "15", "9", "12", "4.5")]
    assert task.context.emitted == 1
    assert [(h.reason, h.from_ns) for h in task.context.holes] == [("partial", OLD)]


async def test_minutes_without_trades_are_a_hole_and_no_candle_is_made_up() -> None:
    desk = FakeDesk()
    task = await candles(desk)
    for t in (trade(1, "10"), trade(61, "11"), trade(301, "12"), trade(361, "13")):
        task.wants(t)
    await settle(task)

    assert [c[0] for c in closed(desk)] == [1, 5]
    hole = task.context.holes[-1]
    assert (hole.reason, hole.from_ns, hole.to_ns) == (
        "no_trades",
        OLD + 2 * MINUTE,
        OLD + 5 * MINUTE,
    )


async def test_a_quiet_market_closes_its_candle_by_the_clock_of_the_trades() -> None:
    desk = FakeDesk()
    task = await candles(desk)
    task.wants(trade(1, "10"))
    task.wants(trade(61, "11"))
    await settle(task)
    await pass_time(task, desk, 60.0)
    assert closed(desk) == []
    await pass_time(task, desk, 3.0)
    assert [c[0] for c in closed(desk)] == [1]

    task.wants(trade(119, "99"))
    await settle(task)
    assert (task.context.late, len(closed(desk))) == (1, 1)


async def test_a_trade_out_of_order_is_late_and_changes_nothing() -> None:
    desk = FakeDesk()
    task = await candles(desk)
    for t in (trade(1, "10"), trade(61, "11"), trade(59, "99")):
        task.wants(t)
    again = trade(62, "12")
    task.wants(again)
    task.wants(again)
    await settle(task)

    assert task.context.late == 1
    assert task.context.bars["BTC/USDT@A|1m"].trades == 2


async def test_a_restart_marks_the_candle_in_the_making_as_partial() -> None:
    desk = FakeDesk()
    task = await candles(desk)
    for t in (trade(1, "10"), trade(61, "11"), trade(62, "12")):
        task.wants(t)
    await settle(task)
    task = await reborn(task, desk)
    for t in (trade(100, "13"), trade(121, "14"), trade(181, "15")):
        task.wants(t)
    await settle(task)

    assert [c[0] for c in closed(desk)] == [2]
    assert [h.reason for h in task.context.holes] == ["partial", "partial"]


async def test_only_wanted_instruments_and_no_more_than_the_bound() -> None:
    desk = FakeDesk()
    task = await candles(desk, max_instruments=2, instruments=("BTC/USDT@A",))
    for symbol in ("ETH/USDT", "BTC/USDT", "SOL/USDT"):
        task.wants(trade(1, "10", symbol=symbol))
    await settle(task)

    assert set(task.context.bars) == {"BTC/USDT@A|1m"}
    assert task.context.ignored == 2


async def test_a_timeframe_no_longer_asked_for_is_dropped() -> None:
    desk = FakeDesk()
    task = await candles(desk, timeframes=("1m", "5m"))
    task.wants(trade(1, "10"))
    await settle(task)
    task = await attach(CandlesTask(task.context.evolve(timeframes=("5m",))), desk)
    task.wants(trade(2, "10"))
    await settle(task)

    assert set(task.context.bars) == {"BTC/USDT@A|5m"}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 900), st.integers(1, 50)), min_size=1, max_size=60
    )
)
async def test_every_candle_equals_the_plain_definition(
    raw: list[tuple[int, int]],
) -> None:
    desk = FakeDesk()
    task = await candles(desk)
    trades = [trade(at, str(price)) for at, price in sorted(raw, key=lambda r: r[0])]
    for t in trades:
        task.wants(t)
    await settle(task)

    minutes: dict[int, list[Decimal]] = {}
    for t in trades:
        minutes.setdefault((t.ts_event_ns - OLD) // MINUTE, []).append(t.price)
    expected = [
        (m, str(p[0]), str(max(p)), str(min(p)), str(p[-1]), str(len(p)))
        for m, p in sorted(minutes.items())
    ]
    assert closed(desk) == expected[1:-1]


def test_timeframes_are_read_and_wrong_ones_named() -> None:
    assert [timeframe_ns(t) // 10**9 for t in ("15s", "1m", "5m", "1h", "1d")] == [
        15,
        60,
        300,
        3600,
        86400,
    ]
    for wrong in ("", "m", "0m", "5x", "1.5m"):
        with pytest.raises(ValueError, match="expected a number and one of"):
            timeframe_ns(wrong)


# Regime --------------------------------------------------------------------------------------


async def regime(desk: FakeDesk, **changes: Any) -> RegimeTask:
    facts: dict[str, Any] = {
        "task_id": "regime",
        "sample_s": 1.0,
        "warm_up": 30,
        "window": 5,
    }
    task: RegimeTask = await attach(
        RegimeTask(RegimeContext(**(facts | changes))), desk
    )
    await settle(task)
    return task


async def walk(
    task: RegimeTask, desk: FakeDesk, steps: int, size: float, chance: random.Random
) -> None:
    for _ in range(steps):
        price = D(str(round(100 + chance.gauss(0, size), 6)))
        assert task.wants(desk.quote(str(price), str(price))) is False
        await task.step()
        desk.clock.advance(1.0)


async def test_a_market_wilder_than_its_own_past_is_called_wild_and_calms_down_again() -> (
    None
):
    desk = FakeDesk()
    chance = random.Random(3)
    task = await regime(desk)

    def seen() -> str:
        return task.context.instruments["BTC/USDT@A"].regime

    await walk(task, desk, 20, 0.01, chance)
    assert seen() == "learning"
    await walk(task, desk, 300, 0.01, chance)
    await walk(task, desk, 12, 0.5, chance)
    assert seen() == "wild"
    task = await reborn(task, desk)
    assert seen() == "wild"
    await walk(task, desk, 40, 0.001, chance)
    assert seen() == "calm"
    assert task.context.changes >= 2


async def test_the_same_quote_seen_again_is_no_sample() -> None:
    desk = FakeDesk()
    task = await regime(desk)
    task.wants(desk.quote("100", "101"))
    for _ in range(5):
        await task.step()

    assert task.context.instruments["BTC/USDT@A"].samples == 0


async def test_from_candles_it_takes_the_closes_of_its_timeframe() -> None:
    desk = FakeDesk()
    task = await regime(desk, source="candles", max_instruments=1)
    one = D(1)

    def candle(
        number: int, timeframe: str = "1m", symbol: str = "BTC/USDT", close: str = "100"
    ) -> CandleClosed:
        return CandleClosed(
            ts_event_ns=number, symbol=symbol, venue="A", timeframe=timeframe, ts_open_ns=0,
            open=one, high=one, low=one, close=D(close), volume=one,
        )  # fmt: skip

    woken = [
        task.wants(candle(1)),
        task.wants(candle(2, "5m")),
        task.wants(candle(3, close="101")),
        task.wants(candle(4, symbol="ETH/USDT")),
        task.wants(candle(5, close="0")),
        task.wants(desk.quote("1", "2")),
    ]
    await settle(task)

    assert woken[0] is True
    assert woken[-1] is False
    assert set(task.context.instruments) == {"BTC/USDT@A"}
    seen = task.context.instruments["BTC/USDT@A"]
    assert (seen.samples, seen.volatility_ppm) == (1, 9950)


# Spreads ---------------------------------------------------------------------------------------


async def test_the_spread_is_learned_in_both_directions_from_fresh_quotes_only() -> (
    None
):
    desk = FakeDesk()
    task: SpreadWatchTask = await attach(
        SpreadWatchTask(
            SpreadWatchContext(task_id="s", symbol="BTC/USDT", venues=("A", "B"))
        ),
        desk,
    )
    await settle(task)
    assert task.wants(desk.quote("100", "101", "A")) is False
    await pass_time(task, desk, 2.0)
    assert task.context.samples == 0
    assert task.context.skipped >= 2

    desk.clock.advance(1.0)
    for index in range(100):
        task.wants(desk.quote("100", "101", "A"))
        task.wants(desk.quote("99" if index < 90 else "103", "104", "B"))
        task.wants(desk.quote("1", "2", "C"))
        await settle(task)
        await settle(task)  # a second step within the interval weighs nothing
        desk.clock.advance(1.0)

    c = task.context
    assert c.samples == 100
    assert c.current_ppm == {"A->B": 19801, "B->A": -38461}
    assert abs(c.quantiles_ppm["A->B"]["p50"] + 19801) < 600
    assert abs(c.quantiles_ppm["A->B"]["p99"] - 19801) < 600
    task = await reborn(task, desk)
    assert task.context.histograms["A->B"].count == 100


# Pools -----------------------------------------------------------------------------------------


def swap(number: int, impact: int, pool: str = "0xA", **changes: Any) -> PoolSwap:
    facts: dict[str, Any] = {
        "ts_event_ns": START_NS + number,
        "chain": "base",
        "pool": pool,
        "pair": "WETH/USDC",
        "transaction_hash": f"0x{number}",
        "log_index": 0,
        "price_impact_ppm": impact,
        "value_usd": D(1000),
        "price": D(3000),
    }
    return PoolSwap(**(facts | changes))


async def test_each_pool_has_its_own_distribution_and_depth() -> None:
    desk = FakeDesk()
    task: PoolImpactTask = await attach(
        PoolImpactTask(PoolImpactContext(task_id="p")), desk
    )
    await settle(task)
    for number in range(200):
        task.wants(swap(number, -100 if number % 4 else 100))
    task.wants(swap(0, 100, is_confirmed=True))
    task.wants(swap(500, 50_000))
    task.wants(swap(501, 20_000, pool="0xB"))
    await settle(task)
    await settle(task)

    a, b = task.context.pools["base:0xa"], task.context.pools["base:0xb"]
    assert (a.up, a.down, a.strong, task.context.swaps, task.context.repeated) == (
        51,
        150,
        1,
        202,
        1,
    )
    assert abs(a.quantiles_ppm["p50"] - 100) <= 3
    assert a.usd_per_percent is not None
    assert abs(a.usd_per_percent - 100_000) < 3_000
    assert abs(b.quantiles_ppm["p50"] - 20_000) < 600
    again = await reborn(task, desk)
    assert again.context.pools == task.context.pools


async def test_the_number_of_pools_and_of_waiting_swaps_is_bounded() -> None:
    desk = FakeDesk()
    task: PoolImpactTask = await attach(
        PoolImpactTask(PoolImpactContext(task_id="p", max_pools=3)), desk
    )
    await settle(task)
    for number in range(5):
        task.wants(swap(number, 100, pool=f"0x{number}"))
    await settle(task)
    assert set(task.context.pools) == {"base:0x2", "base:0x3", "base:0x4"}
    assert task.context.forgotten == 2

    woken = [task.wants(swap(number, 1)) for number in range(10, 10_010)]
    assert woken.count(True) == 1
    await settle(task)
    assert task.context.dropped == 10_000 - 8192


# The distribution under them ---------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-1_000_000, 1_000_000), min_size=1, max_size=200),
    st.floats(0.01, 1.0),
)
def test_a_quantile_is_right_to_five_percent(values: list[int], share: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = sorted(values)[
        max(0, -(-int(share * len(values) * 1_000_000) // 1_000_000) - 1)
    ]
    around = [abs(exact - v) for v in values]
    found = histogram.quantile(share)

    assert found is not None
    nearest = min(values, key=lambda v: abs(v - found))
    assert abs(found - nearest) <= 0.05 * abs(nearest) + 1
    assert min(around) == 0


def test_the_past_fades_and_space_is_bounded() -> None:
    histogram = Histogram(limit=1000)
    for _ in range(900):
        histogram.add(10)
    for _ in range(5000):
        histogram.add(1000)

    assert histogram.rank(1000) < 0.01
    assert histogram.count < 1000
    assert Histogram().quantile(0.5) is None
    assert Histogram().quantiles() == {}
    assert Histogram().rank(1) == 0.0


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: CandlesTask(CandlesContext(timeframes=())), "timeframes"),
        (lambda: CandlesTask(CandlesContext(grace_s=-1)), "grace_s"),
        (lambda: RegimeTask(RegimeContext(wild_above=0.1)), "wild_above"),
        (lambda: RegimeTask(RegimeContext(window=1)), "window"),
        (
            lambda: SpreadWatchTask(
                SpreadWatchContext(symbol="BTC/USDT", venues=("A",))
            ),
            "venues",
        ),
        (
            lambda: SpreadWatchTask(SpreadWatchContext(symbol="X", venues=("A", "B"))),
            "symbol",
        ),
        (lambda: PoolImpactTask(PoolImpactContext(max_pools=0)), "max_pools"),
    ],
)
def test_a_wrong_parameter_is_named(make: Any, field: str) -> None:
    with pytest.raises(ValueError, match=f"`{field}` is .*expected"):
        make()


def test_a_quote_for_the_regime_is_bounded_by_its_instruments() -> None:
    task = RegimeTask(RegimeContext(max_instruments=1))
    one = D(1)
    for symbol in ("A/X", "B/X"):
        task.wants(
            QuoteChanged(
                symbol=symbol,
                venue="A",
                bid=one,
                ask=one,
                bid_quantity=one,
                ask_quantity=one,
            )
        )

    assert list(task._quotes) == ["A/X@A"]
