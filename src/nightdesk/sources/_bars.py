"""Candles of several makers: zipped CSV as QuantConnect's Lean keeps it, and three shapes of JSON.

A bar becomes known at its end: `CandleClosed` then, and with it a quote around its close, so that a
paper venue has a market. Files of quotes give their own bid and ask instead.

Comes from: sources/_recordings.py
Goes to: sources/_recordings.py
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path
from typing import IO, Any

import msgspec

from nightdesk.model.events import CandleClosed, QuoteChanged
from nightdesk.sources._context import (
    BAD_LINE,
    MAX_LINE,
    Naming,
    Problems,
    Stamped,
    check_number,
    check_stamp,
    check_symbol,
)

__all__ = ["json_bars", "lean_bars"]

_SECOND = 1_000_000_000
_MILLISECOND = 1_000_000
_LENGTHS = {
    "second": (1, "1s"),
    "minute": (60, "1m"),
    "hour": (3600, "1h"),
    "daily": (86400, "1d"),
}
_UNITS = {"S": 1, "M": 60, "H": 3600, "D": 86400}
_exact = msgspec.json.Decoder(float_hook=Decimal)


def lean_bars(
    path: Path, stream: IO[bytes], naming: Naming, problems: Problems
) -> Iterator[Stamped]:
    """Yield the bars of one CSV; day, length and symbol stand in the name of the zip file."""
    found = re.search(
        r"(second|minute|hour|daily)_([a-z]+?)(?:_(\d{8}))?_(trade|quote)", path.name
    )
    if found is None:
        problems.add(
            str(path),
            0,
            "its name says neither length nor symbol, e.g. minute_btcusd_20161007_trade.zip",
        )
        return
    length, recorded, day, kind = found.groups()
    symbol = naming.symbol_of(recorded.upper())
    seconds, timeframe = _LENGTHS[length]
    midnight = _day_ns(day) if day else None
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), b""), 1):
        if len(line) == MAX_LINE:
            raise EOFError(f"a line is longer than {MAX_LINE} bytes")
        try:
            cells = line.decode().strip().split(",")
            open_ns = _open_ns(cells[0], midnight)
            values = [Decimal(cell) for cell in cells[1:]]
            if kind == "quote":
                yield _quote_bar(naming, symbol, open_ns + seconds * _SECOND, values)
            else:
                yield from _bar(naming, symbol, timeframe, open_ns, seconds, values)
        except BAD_LINE as error:
            problems.add(str(path), number, str(error) or type(error).__name__)


def json_bars(
    path: Path, data: bytes, naming: Naming, problems: Problems
) -> Iterator[Stamped]:
    """Yield the bars of a JSON file: an array of bars, or one under `candles` or `ohlc`."""
    content = _exact.decode(data)
    symbol = naming.symbol_of(check_symbol(_symbol_in(path.name, content)))
    seconds = _length_in(path.name, content)
    if seconds <= 0:
        raise ValueError(f"a bar of {seconds} s")
    bars = (
        content
        if isinstance(content, list)
        else content.get("candles") or content.get("ohlc") or []
    )
    for number, bar in enumerate(bars, 1):
        try:
            open_ns, values = _json_bar(bar, seconds)
            yield from _bar(
                naming, symbol, _timeframe(seconds), open_ns, seconds, values
            )
        except BAD_LINE as error:
            problems.add(str(path), number, f"bar: {error or type(error).__name__}")


def _json_bar(bar: dict[str, Any], seconds: int) -> tuple[int, list[Decimal]]:
    if "openTimeInMillis" in bar:
        open_ns = _whole(bar["openTimeInMillis"]) * _MILLISECOND
    elif "endTime" in bar:
        # The end is given as the last millisecond of the bar.
        open_ns = (_whole(bar["endTime"]) + 1) * _MILLISECOND - seconds * _SECOND
    else:
        open_ns = _whole(bar["start"]) * _SECOND
    names = ("open", "high", "low", "close")
    values = [
        Decimal(bar[name] if name in bar else bar[f"{name}Price"]) for name in names
    ]
    return open_ns, [*values, Decimal(bar["volume"])]


def _whole(value: Any) -> int:
    """Return a number of JSON as an int; without a bound, `1e999999` would take half a minute."""
    return int(check_number(Decimal(value), "a time"))


def _bar(
    naming: Naming,
    symbol: str,
    timeframe: str,
    open_ns: int,
    seconds: int,
    values: list[Decimal],
) -> Iterator[Stamped]:
    opened, high, low, close, volume = (check_number(v, "a value") for v in values)
    if not (
        low <= min(opened, close)
        and max(opened, close) <= high
        and low > 0
        and volume >= 0
    ):
        raise ValueError(
            f"open {opened}, high {high}, low {low}, close {close} make no candle"
        )
    end_ns = check_stamp(open_ns + seconds * _SECOND)
    check_stamp(open_ns)
    yield (
        end_ns,
        CandleClosed(
            symbol=symbol,
            venue=naming.venue,
            timeframe=timeframe,
            ts_open_ns=open_ns,
            open=opened,
            high=high,
            low=low,
            close=close,
            volume=volume,
            ts_event_ns=end_ns,
            ts_received_ns=end_ns,
        ),
    )
    yield end_ns, _close_quote(naming, symbol, end_ns, close, volume)


def _close_quote(
    naming: Naming, symbol: str, stamp: int, close: Decimal, volume: Decimal
) -> QuoteChanged:
    """A quote around the close, on the recording's own price grid, with a tenth of the bar's volume."""
    unit = Decimal(1).scaleb(min(int(close.as_tuple().exponent), -2))
    half = close * naming.spread_ppm / 2_000_000
    return QuoteChanged(
        symbol=symbol,
        venue=naming.venue,
        bid=(close - half).quantize(unit, ROUND_FLOOR),
        bid_quantity=volume / 10,
        ask=(close + half).quantize(unit, ROUND_CEILING),
        ask_quantity=volume / 10,
        ts_event_ns=stamp,
        ts_received_ns=stamp,
    )


def _quote_bar(
    naming: Naming, symbol: str, end_ns: int, values: list[Decimal]
) -> Stamped:
    _, _, _, bid, bid_quantity, _, _, _, ask, ask_quantity = (
        check_number(value, "a value") for value in values
    )
    return check_stamp(end_ns), QuoteChanged(
        symbol=symbol,
        venue=naming.venue,
        bid=bid,
        bid_quantity=bid_quantity,
        ask=ask,
        ask_quantity=ask_quantity,
        ts_event_ns=end_ns,
        ts_received_ns=end_ns,
    )


def _open_ns(text: str, midnight: int | None) -> int:
    if midnight is not None:
        return midnight + int(text) * _MILLISECOND
    return (
        round(datetime.strptime(text, "%Y%m%d %H:%M").replace(tzinfo=UTC).timestamp())
        * _SECOND
    )


def _day_ns(day: str) -> int:
    return (
        round(datetime.strptime(day, "%Y%m%d").replace(tzinfo=UTC).timestamp())
        * _SECOND
    )


def _symbol_in(name: str, content: Any) -> str:
    if (
        isinstance(content, list)
        and content
        and {"base", "counter"} <= content[0].keys()
    ):
        return f"{content[0]['base']}{content[0]['counter']}"
    found = re.search(r"([A-Z]{3,5})-([A-Z]{3,5})-PT?\d", name)
    return "".join(found.groups()) if found else name.split(".")[0]


def _length_in(name: str, content: Any) -> int:
    if isinstance(content, list) and content and "sizeInMillis" in content[0]:
        return _whole(content[0]["sizeInMillis"]) // 1000
    found = re.search(r"PT?(\d+)([SMHD])", name)
    return int(found[1]) * _UNITS[found[2]] if found else 60


def _timeframe(seconds: int) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds % length == 0:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
