"""Whatever is in a recording, the source plays the rest, tells what it skipped, and stays small."""

import gzip
import json
import random
import tracemalloc
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from fakes.paper import ManualClock
from nightdesk.errors import ConfigError
from nightdesk.model.events import BookChanged, Event, QuoteChanged, TradePrinted
from nightdesk.sources.replay import ReplaySource, start_ns

FIRST = 1_723_161_253_000_000_000
ODD_NUMBERS = ["NaN", "sNaN", "Infinity", "-1", "1e999999", "1e-999999"]


async def play(
    path: Path, emit: Callable[[Event], None] | None = None, **options: Any
) -> tuple[ReplaySource, list[Event]]:
    events: list[Event] = []
    source = ReplaySource("r", files=[path], venue="v", speed="max", **options)
    clock = ManualClock()
    await source.start(emit or events.append, clock, random.Random(1))
    for _ in range(2_000):
        if source.finished:
            break
        await clock.advance(1.0)
    assert source.finished
    await source.stop()
    return source, events


def message(stream: str, data: Any, stamp: int = FIRST) -> str:
    return f"{stamp} {json.dumps({'stream': stream, 'data': data})}\n"


def ticker(stamp: int = FIRST, **changed: Any) -> str:
    data = {"s": "BTCUSDT", "b": "10", "B": "1", "a": "11", "A": "1", **changed}
    return message("x@bookTicker", data, stamp)


def trade(**changed: Any) -> str:
    data = {"s": "BTCUSDT", "t": 1, "p": "10", "q": "1", "T": 1, "m": True, **changed}
    return message("x@trade", data)


def depth(level: list[str]) -> str:
    return message("x@depth", {"s": "BTCUSDT", "U": 1, "u": 1, "b": [level], "a": []})


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "recording"
    path.write_text("".join(lines))
    return path


def bomb(path: Path, head: bytes, filling: bytes, megabytes: int) -> Path:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(megabytes):
            file.write(filling * (1_000_000 // len(filling)))
    return path


@pytest.mark.parametrize("number", ODD_NUMBERS)
async def test_a_number_that_would_break_arithmetic_never_becomes_an_event(
    tmp_path: Path, number: str
) -> None:
    bad = [ticker(b=number), ticker(A=number), trade(p=number), trade(q=number)]
    bad += [depth([number, "1"]), depth(["1", number])]

    source, events = await play(written(tmp_path, ticker(), *bad, ticker()))

    assert [type(event) for event in events] == [QuoteChanged, QuoteChanged]
    assert source.stats()["bad_lines"] == len(bad)


@pytest.mark.parametrize("number", [*ODD_NUMBERS, "1e900000"])
async def test_a_csv_of_trades_may_hold_any_number(tmp_path: Path, number: str) -> None:
    good = "1325317920,4.39,0.45\n"
    bad = [f"{number},1,1\n", f"1325317920,{number},1\n", f"1325317920,1,{number}\n"]

    source, events = await play(written(tmp_path, good, *bad, good))

    assert [type(event) for event in events] == [TradePrinted, TradePrinted]
    assert source.stats()["bad_lines"] == len(bad)


@pytest.mark.parametrize("number", ODD_NUMBERS)
async def test_bars_may_hold_any_number(tmp_path: Path, number: str) -> None:
    path = tmp_path / "minute_btcusd_20161007_trade.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", f"0,{number},2,1,1,1\n1e999,1,2,1,1,1\n0,1,2,1,1,1\n")

    source, events = await play(path)

    assert len(events) == 2
    assert source.stats()["bad_lines"] == 2


@pytest.mark.parametrize(
    "line",
    [
        ticker(stamp=10**300),
        ticker(stamp=-5),
        ticker(E=10**18),
        ticker(E=-1),
        ticker(s=""),
        ticker(s="BTC\x1b[2JUSDT"),
        ticker(s="x" * 1000),
        f"{FIRST} " + '{"stream":"x@trade","data":' + "[" * 200_000 + "\n",
        f"{FIRST} \udcff\n".encode("utf-8", "surrogateescape").decode("latin-1"),
        "\x00\n",
    ],
    ids=lambda text: ascii(text)[:40],
)
async def test_a_line_of_nonsense_is_skipped(tmp_path: Path, line: str) -> None:
    source, events = await play(written(tmp_path, ticker(), line, ticker()))

    assert len(events) == 2
    assert source.stats()["bad_lines"] == 1


async def test_endless_new_instruments_are_not_all_remembered(tmp_path: Path) -> None:
    lines = [ticker(s=f"C{number}USDT") for number in range(10_050)]

    source, events = await play(written(tmp_path, *lines))

    assert len(events) == 10_000
    assert source.stats()["bad_lines"] == 50


async def test_a_file_of_nothing_but_nonsense_is_given_up(tmp_path: Path) -> None:
    path = bomb(tmp_path / "a.gz", ticker().encode(), b"\n", 1)

    source, events = await play(path)

    assert len(events) == 1
    assert source.stats()["bad_lines"] == 10_002
    assert source.finished


@pytest.mark.parametrize(
    ("name", "head", "format_"),
    [
        ("a.gz", ticker().encode(), "binance"),
        ("a.gz", b"", "trades"),
        ("a.json.gz", b"[]", "candles"),
    ],
)
async def test_a_small_file_that_unpacks_to_100_megabytes_stays_small(
    tmp_path: Path, name: str, head: bytes, format_: str
) -> None:
    path = bomb(tmp_path / name, head, b" ", 100)
    tracemalloc.start()

    source, _ = await play(path, format=format_)

    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size < 1_000_000
    assert most < (150_000_000 if format_ == "candles" else 20_000_000)
    assert source.stats()["bad_lines"] >= 1


async def test_a_zip_that_unpacks_to_100_megabytes_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "minute_btcusd_20161007_trade.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.csv", "w") as file,
    ):
        for _ in range(100):
            file.write(b"0" * 1_000_000)
    tracemalloc.start()

    source, events = await play(path)

    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not events
    assert most < 30_000_000
    assert "longer than" in source.stats()["first_bad_lines"][0]


def test_the_kind_of_a_bomb_is_told_without_unpacking_it(tmp_path: Path) -> None:
    path = bomb(tmp_path / "a.gz", b"", b"0", 100)
    tracemalloc.start()

    with pytest.raises(ConfigError, match="fits no known recording"):
        start_ns([path])

    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5_000_000


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3_000_000,
        "5",
        '"text"',
        "null",
        "{}",
        "[5]",
        "[[]]",
        '{"candles": 7}',
        '{"candles": {"a": 1}}',
        '[{"start": "x"}]',
        '[{"start": 1e999999, "open": 1}]',
        '[{"base": 1, "counter": 2, "sizeInMillis": "x"}]',
        '[{"sizeInMillis": -60000, "openTimeInMillis": 1}]',
    ],
    ids=lambda text: text[:30],
)
async def test_json_that_is_no_bars_ends_the_file_and_nothing_else(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "candles.json"
    path.write_text(text)

    _, events = await play(path, format="candles")

    assert not events


async def test_a_source_that_fails_says_so_and_ends(tmp_path: Path) -> None:
    def refuse(event: Event) -> None:
        raise ZeroDivisionError("no room")

    source, _ = await play(written(tmp_path, ticker()), refuse)

    assert "no room" in source.stats()["first_bad_lines"][0]


async def test_a_gzip_in_several_parts_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    half = "".join(ticker(FIRST + n) for n in range(5_000)).encode()
    path.write_bytes(gzip.compress(half) + gzip.compress(half))

    source, events = await play(path)

    assert len(events) == 10_000
    assert source.stats()["bad_lines"] == 0


async def test_a_book_with_empty_levels_is_still_a_book(tmp_path: Path) -> None:
    _, events = await play(written(tmp_path, depth(["10", "0"])))

    (change,) = events
    assert isinstance(change, BookChanged)
    assert change.bids == [(Decimal(10), Decimal(0))]
