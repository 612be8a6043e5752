"""Recordings replayed: every format, the recorded times, and no line that can stop it."""

import gzip
import json
import random
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fakes.paper import SECOND, D, ManualClock
from nightdesk.config import Config, SourceConfig
from nightdesk.errors import ConfigError
from nightdesk.market.book import Book
from nightdesk.model.events import (
    BookChanged,
    CandleClosed,
    Event,
    QuoteChanged,
    TradePrinted,
)
from nightdesk.model.order import Side
from nightdesk.sources.replay import ReplaySource, start_ns
from nightdesk.wiring import build_source
from recordings import recording

FIRST = 1_723_161_253_000_000_000


class RealClock(ManualClock):
    """A clock that does not say where it started: its time does not jump."""

    def __init__(self) -> None:
        super().__init__()


class VirtualClock(ManualClock):
    def __init__(self, start_ns: int) -> None:
        super().__init__(start_ns)
        self.start_ns = start_ns


async def play(
    clock: ManualClock, seconds: float = 1e6, **options: Any
) -> tuple[ReplaySource, list[Event]]:
    events: list[Event] = []
    source = ReplaySource("replay", **{"venue": "binance", **options})
    await source.start(events.append, clock, random.Random(1))
    for _ in range(100_000):
        if source.finished:
            break
        await clock.advance(seconds)
    await source.stop()
    return source, events


def line(stamp: int, stream: str, data: dict[str, Any]) -> str:
    return f"{stamp} {json.dumps({'stream': stream, 'data': data})}\n"


def ticker(stamp: int, bid: str = "10.0", ask: str = "10.1") -> str:
    return line(
        stamp,
        "btcusdt@bookTicker",
        {"u": 1, "s": "BTCUSDT", "b": bid, "B": "1", "a": ask, "A": "2"},
    )


def shortened(path: Path, copy: Path) -> Path:
    copy.write_bytes(path.read_bytes()[:-30])
    return copy


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw.gz"
    ms = FIRST // 1_000_000
    trade = {
        "e": "trade",
        "E": ms,
        "s": "BTCUSDT",
        "t": 7,
        "p": "10.0",
        "q": "0.5",
        "T": ms + 1270,
        "m": True,
    }
    depth = {"s": "BTCUSDT", "U": 4, "u": 6, "b": [["9.9", "3"]], "a": [], "E": ms}
    future = {
        "s": "BTCUSDT",
        "U": 90,
        "u": 99,
        "pu": 6,
        "b": [],
        "a": [["10.2", "1"]],
        "E": ms,
    }
    snapshot = {"lastUpdateId": 3, "bids": [["9.8", "1"]], "asks": [["10.3", "1"]]}
    text = (
        ticker(FIRST)
        + line(FIRST + 1000, "btcusdt@trade", trade)
        + f"{FIRST + 2000} {json.dumps(snapshot)}\n"
        + line(FIRST + SECOND, "btcusdt@depth@100ms", depth)
        + "garbage\n"
        + f"{FIRST + SECOND} {{not json\n"
        + f"{FIRST + SECOND} {{}}\n"
        + line(
            FIRST + SECOND,
            "btcusdt@bookTicker",
            {"s": "BTCUSDT", "b": "x", "B": "1", "a": "2", "A": "2"},
        )
        + line(FIRST + SECOND, "btcusdt@kline_1m", {"s": "BTCUSDT"})
        + line(
            FIRST + SECOND, "btcusdt@trade", {**trade, "t": 8, "X": "INSURANCE_FUND"}
        )
        + line(FIRST + 2 * SECOND, "btcusdt@depth@0ms", future)
        + line(FIRST + 3 * SECOND, "btcusdt@trade", {**trade, "t": 9, "m": False})
    )
    with gzip.open(path, "wt") as stream:
        stream.write(text)
    return path


async def test_binance_messages_become_events(raw: Path) -> None:
    source, events = await play(VirtualClock(FIRST), files=[raw], speed="max")

    assert [type(event).__name__ for event in events] == [
        "QuoteChanged",
        "TradePrinted",
        "BookChanged",
        "BookChanged",
        "BookChanged",
        "TradePrinted",
    ]
    quote, sell, snapshot, spot, future, buy = events
    assert isinstance(quote, QuoteChanged)
    assert (quote.symbol, quote.venue, quote.bid, quote.ask_quantity) == (
        "BTC/USDT",
        "binance",
        D(10),
        D(2),
    )
    assert isinstance(sell, TradePrinted)
    assert isinstance(buy, TradePrinted)
    assert (sell.side, sell.trade_id, buy.side) == (Side.SELL, "7", Side.BUY)
    assert isinstance(snapshot, BookChanged)
    assert (snapshot.is_snapshot, snapshot.last_sequence, snapshot.symbol) == (
        True,
        3,
        "BTC/USDT",
    )
    assert isinstance(spot, BookChanged)
    assert (spot.first_sequence, spot.last_sequence) == (4, 6)
    assert isinstance(future, BookChanged)
    assert (future.first_sequence, future.last_sequence) == (7, 99)
    assert source.finished


async def test_bad_lines_are_counted_named_and_skipped(raw: Path) -> None:
    source, _ = await play(VirtualClock(FIRST), files=str(raw), speed="max")

    stats = source.stats()
    assert stats["bad_lines"] == 4
    assert f"{raw}, line 5" in stats["first_bad_lines"][0]


async def test_under_a_virtual_clock_the_desk_lives_at_the_recorded_time(
    raw: Path,
) -> None:
    clock = VirtualClock(start_ns([raw]))
    times: list[tuple[int, int]] = []
    source = ReplaySource("replay", files=[raw], venue="binance", speed="max")
    await source.start(
        lambda event: times.append((event.ts_received_ns, clock.now_ns())),
        clock,
        random.Random(1),
    )
    await clock.advance(10)

    assert clock.start_ns == source.first_event_ns() == FIRST
    assert [received for received, _ in times] == [now for _, now in times]
    assert times[-1][0] == FIRST + 3 * SECOND


async def test_negative_ages_are_kept_on_a_clock_that_is_elsewhere(raw: Path) -> None:
    _, events = await play(VirtualClock(5 * FIRST), files=[raw])

    sell = events[1]
    assert sell.ts_received_ns == 5 * FIRST + 1000
    assert sell.ts_received_ns - sell.ts_event_ns == 1000 - 1_270_000_000
    assert events[0].ts_event_ns == 0


async def test_twice_the_speed_takes_half_the_time(raw: Path) -> None:
    clock = RealClock()
    begin = clock.now_ns()

    _, events = await play(clock, seconds=0.01, files=[raw], speed=2)

    assert events[-1].ts_received_ns - begin == round(1.5 * SECOND)


async def test_at_full_speed_under_a_real_clock_nothing_is_waited_for(
    raw: Path,
) -> None:
    clock = RealClock()
    begin = clock.now_ns()

    _, events = await play(clock, seconds=0, files=[raw], speed="max")

    assert clock.now_ns() == begin
    assert {event.ts_received_ns for event in events} == {begin}


async def test_several_files_are_merged_by_their_stamps(tmp_path: Path) -> None:
    for name, stamps in (("a", (0, 2, 4)), ("b", (1, 3))):
        (tmp_path / name).write_text(
            "".join(ticker(FIRST + n * SECOND, bid=f"1{n}.0", ask="20") for n in stamps)
        )

    _, events = await play(
        VirtualClock(FIRST), files=[tmp_path / "b", tmp_path / "a"], symbol="X/Y"
    )

    assert [event.bid for event in events if isinstance(event, QuoteChanged)] == [
        10,
        11,
        12,
        13,
        14,
    ]
    assert {event.symbol for event in events if isinstance(event, QuoteChanged)} == {
        "X/Y"
    }
    assert start_ns([tmp_path / "b", tmp_path / "a"]) == FIRST


async def test_a_file_that_breaks_off_plays_as_far_as_it_goes(
    raw: Path, tmp_path: Path
) -> None:
    cut = shortened(raw, tmp_path / "cut.gz")

    source, _ = await play(VirtualClock(FIRST), files=[cut])

    assert source.finished
    assert "ends early" in source.stats()["first_bad_lines"][-1]


async def test_trades_of_a_csv_get_their_side_by_the_tick_rule(tmp_path: Path) -> None:
    path = tmp_path / "bitstampUSD.csv"
    path.write_text(
        "1315922016,5.8,1.0\n1315922024,5.83,3.0\n1315922029,5.83,1\n1315922030,5.7,0\n1315922031,5.7,2\nx\n"
    )

    source, events = await play(VirtualClock(1), files=[path])

    trades = [event for event in events if isinstance(event, TradePrinted)]
    assert [(trade.side, trade.price, trade.symbol) for trade in trades] == [
        (Side.BUY, D("5.8"), "BTC/USD"),
        (Side.BUY, D("5.83"), "BTC/USD"),
        (Side.BUY, D("5.83"), "BTC/USD"),
        (Side.SELL, D("5.7"), "BTC/USD"),
    ]
    assert source.problems.count == 2


async def test_lean_bars_close_at_their_end_with_a_quote_around_the_close(
    tmp_path: Path,
) -> None:
    path = tmp_path / "crypto_coinbase_minute_btcusd_20161007_trade.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "20161007.csv",
            "0,611.78,611.91,611.78,611.9,1.13\n60000,1,0.5,2,1,1\nx,1\n",
        )

    source, events = await play(VirtualClock(1), files=[path])

    candle, quote = events
    assert isinstance(candle, CandleClosed)
    assert (candle.timeframe, candle.ts_open_ns, candle.close) == (
        "1m",
        1_475_798_400 * SECOND,
        D("611.9"),
    )
    assert isinstance(quote, QuoteChanged)
    assert quote.bid < candle.close < quote.ask
    assert (quote.bid, quote.ask) == (D("611.86"), D("611.94"))
    assert source.problems.count == 2


async def test_lean_quote_bars_give_their_own_bid_and_ask(tmp_path: Path) -> None:
    path = tmp_path / "crypto_bybit_minute_btcusdt_20221213_quote.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.csv", "0,1,2,1,1.5,10,2,3,2,2.5,20\n")

    _, events = await play(VirtualClock(1), files=[path])

    (quote,) = events
    assert isinstance(quote, QuoteChanged)
    assert (quote.bid, quote.bid_quantity, quote.ask, quote.ask_quantity) == (
        D("1.5"),
        D(10),
        D("2.5"),
        D(20),
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "BTC_USDT.json",
            [{"base": "BTC", "counter": "USDT", "open": "1", "high": "2", "low": "1", "close": "2", "volume": "5",
              "openTimeInMillis": 1613692800000, "sizeInMillis": 60000}],
            ("BTC/USDT", "1m", 1_613_692_800),
        ),
        (
            "Binance-ETH-USD-PT5M-2023.json",
            {"ohlc": [{"endTime": 1678730699999, "openPrice": 1673.58, "highPrice": 1677.62, "lowPrice": 1672.44,
                       "closePrice": 1672.99, "volume": 65.3033}]},
            ("ETH/USD", "5m", 1_678_730_400),
        ),
        (
            "Coinbase-BTC-USD-PT4H-2016.json",
            {"candles": [{"start": "1463544000", "low": "455.3", "high": "456.81", "open": "456.16",
                          "close": "456.02", "volume": "561.8"}]},
            ("BTC/USD", "4h", 1_463_544_000),
        ),
    ],
)  # fmt: skip
async def test_candles_of_json_files(
    tmp_path: Path, name: str, content: Any, expected: tuple[str, str, int]
) -> None:
    bars = content if isinstance(content, list) else next(iter(content.values()))
    bars.append({"open": "1"})
    (tmp_path / name).write_text(json.dumps(content))

    source, events = await play(VirtualClock(1), files=[tmp_path / name])

    candle = events[0]
    assert isinstance(candle, CandleClosed)
    assert (candle.symbol, candle.timeframe, candle.ts_open_ns // SECOND) == expected
    assert source.problems.count == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"files": []}, "no recording"),
        ({"files": ["/no/such/file"]}, "does not exist"),
        ({"speed": 0}, "speed"),
        ({"format": "parquet"}, "format"),
    ],
)
def test_wrong_options_are_named(
    raw: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        ReplaySource("replay", **{"files": [raw], "venue": "a", **options})


def test_a_file_of_no_known_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello")
    (tmp_path / "empty.zip").write_bytes(b"PK nothing")
    (tmp_path / "minute_btcusd.zip").write_bytes(b"PK nothing")

    with pytest.raises(ConfigError, match="no known recording"):
        start_ns([tmp_path / "x"])
    with pytest.raises(ConfigError, match="no event"):
        start_ns([tmp_path / "empty.zip"])


# Real recordings ---------------------------------------------------------------------------------


@pytest.mark.recordings
@pytest.mark.parametrize("market", ["spot", "usdm"])
async def test_the_recorded_book_proves_its_sequence_and_ends_at_the_recorded_quote(
    market: str,
) -> None:
    path = recording(f"market_raw/binance_{market}_btcusdt_20240808.gz")
    events: list[Event] = []
    source = ReplaySource("replay", files=[path], venue="binance", speed="max")
    books, last = Book(), None
    for _, event in source._events():
        events.append(event)
        if isinstance(event, BookChanged):
            books.apply(event)
        if isinstance(event, QuoteChanged):
            last = event

    assert (books.synchronised, books.gaps, source.problems.count) == (True, 0, 0)
    assert last is not None
    assert books.best(Side.BUY)[0] == last.bid  # type: ignore[index]
    assert books.best(Side.SELL)[0] == last.ask  # type: ignore[index]
    assert len(events) == (41_249 if market == "spot" else 93_954)
    trades = [
        int(event.trade_id) for event in events if isinstance(event, TradePrinted)
    ]
    assert trades == sorted(set(trades))


@pytest.mark.recordings
async def test_a_whole_recording_plays_under_a_virtual_clock() -> None:
    path = recording("market_raw/binance_spot_btcusdt_20240808.gz")
    clock = VirtualClock(start_ns([path]))
    clock.turns = 2

    source, events = await play(clock, seconds=400, files=[path], speed="max")

    assert source.finished
    assert len(events) == 41_249
    ages = sorted(
        event.ts_received_ns - event.ts_event_ns
        for event in events
        if event.ts_event_ns
    )
    assert -1.3e9 < ages[len(ages) // 2] < -1.2e9


@pytest.mark.recordings
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("candles/BTC_USDT_1m_2021-02-19_1week.json.gz", 10_080),
        ("candles/Binance-ETH-USD-PT5M-20230313_20230315.json.gz", 580),
        ("candles/crypto_bitfinex_hour_btcusd_trade.zip", 733),
        ("candles/crypto_coinbase_second_btcusd_20161007_trade.zip", 4_063),
    ],
)
def test_recorded_candles_are_read_whole(name: str, count: int) -> None:
    source = ReplaySource("replay", files=[recording(name)], venue="x")

    candles = [
        event for _, event in source._events() if isinstance(event, CandleClosed)
    ]

    assert (len(candles), source.problems.count) == (count, 0)
    assert all(a.ts_open_ns < b.ts_open_ns for a, b in pairwise(candles))


@pytest.mark.parametrize("kind", [VirtualClock, RealClock])
async def test_recordings_of_two_venues_keep_their_distance_in_time(
    tmp_path: Path, kind: type[ManualClock]
) -> None:
    """Otherwise prices of different times would be compared, and gaps found that never were."""
    early, late = tmp_path / "early", tmp_path / "late"
    early.write_text(ticker(FIRST) + ticker(FIRST + 60 * SECOND))
    late.write_text(ticker(FIRST + 30 * SECOND))
    clock = kind(FIRST) if kind is VirtualClock else kind()
    began_ns = clock.now_ns()
    received: dict[str, list[int]] = {}
    sources = []
    for path in (early, late):
        source = ReplaySource(
            path.name, files=[path], venue=path.name, origin_ns=start_ns([early, late])
        )
        events = received.setdefault(path.name, [])
        await source.start(
            lambda event, events=events: events.append(event.ts_received_ns),
            clock,
            random.Random(1),
        )
        sources.append(source)
    while not all(source.finished for source in sources):
        await clock.advance(1)
    for source in sources:
        await source.stop()

    assert [(ns - began_ns) // SECOND for ns in received["early"]] == [0, 60]
    assert [(ns - began_ns) // SECOND for ns in received["late"]] == [30]


def test_the_desk_gives_all_its_recordings_one_origin(tmp_path: Path) -> None:
    paths = [tmp_path / "early", tmp_path / "late"]
    for number, path in enumerate(paths):
        path.write_text(ticker(FIRST + number * 30 * SECOND))
    entries = tuple(
        SourceConfig(
            name=path.name,
            type="replay",
            options={"files": [str(path)], "venue": path.name},
        )
        for path in paths
    )

    sources = [build_source(entry, Config(sources=entries)) for entry in entries]

    assert [source._origin_ns for source in sources] == [FIRST, FIRST]  # type: ignore[attr-defined]
