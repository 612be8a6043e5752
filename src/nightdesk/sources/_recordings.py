"""Recordings become events: what kind of file it is, and what each of its lines says.

Every parser yields `(stamp_ns, event)` with the file's own times; the replay moves them to the desk's.
Lines that make no sense are counted and named, and the rest goes on.

Comes from: sources/_binance.py, sources/_bars.py
Goes to: sources/replay.py
"""

import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path

from nightdesk.errors import ConfigError
from nightdesk.model.events import TradePrinted
from nightdesk.model.order import Side
from nightdesk.sources._bars import json_bars, lean_bars
from nightdesk.sources._binance import BinanceMessages
from nightdesk.sources._context import (
    BAD_LINE,
    MAX_LINE,
    Naming,
    Problems,
    Stamped,
    check_number,
    check_stamp,
)

__all__ = ["FORMATS", "Naming", "Problems", "Stamped", "detect", "events_of"]

FORMATS = ("binance", "trades", "lean", "candles")
_SECOND = 1_000_000_000
_CHUNK = 256 * 1024
_GZIP = 31  # zlib's word for a gzip header and trailer
_MAX_JSON = 64 * 1024 * 1024
_PATIENCE = 10_000
"""Lines of nonsense in a row after which a file is given up: each one costs the desk time and yields nothing."""
# A zip may be encrypted, or packed in ways that Python does not know: it says so by a RuntimeError.
_BAD_FILE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError)


def detect(path: Path) -> str:
    """Return the format of a recording by its content.

    Raises:
        ConfigError: It is none of `FORMATS`, or cannot be read.
    """
    if path.suffix == ".zip":
        return "lean"
    try:
        start = next(_chunks(path), b"").lstrip()[:200]
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            str(path), [f"the recording cannot be read: {error}."]
        ) from error
    if re.match(rb"\d{16,20} [\[{]", start):
        return "binance"
    if re.match(rb"\d{9,10}(\.\d+)?,[\d.eE+-]+,[\d.eE+-]+\s", start):
        return "trades"
    if start[:1] in (b"[", b"{"):
        return "candles"
    raise ConfigError(
        str(path),
        [
            f"its start {start[:40]!r} fits no known recording. Name one by `format`: {', '.join(FORMATS)}."
        ],
    )


def events_of(
    path: Path, format_: str, naming: Naming, problems: Problems
) -> Iterator[Stamped]:
    """Yield the events of one recording, oldest first, reading it piece by piece."""
    parser = {
        "binance": _binance,
        "trades": _trades,
        "lean": _lean,
        "candles": _candles,
    }[format_]
    try:
        yield from parser(path, naming, problems)
    except _BAD_FILE as error:
        problems.add(str(path), 0, f"ends early: {error}")


def _binance(path: Path, naming: Naming, problems: Problems) -> Iterator[Stamped]:
    messages = BinanceMessages(naming)
    in_a_row = 0
    for number, line in enumerate(_lines(path), 1):
        try:
            event = messages.parse(line)
        except BAD_LINE as error:
            problems.add(str(path), number, str(error))
            in_a_row = _lose_patience(in_a_row)
            continue
        in_a_row = 0
        if event is not None:
            yield event


def _trades(path: Path, naming: Naming, problems: Problems) -> Iterator[Stamped]:
    """`seconds,price,amount`, as bitcoincharts.com keeps it in files called `bitstampUSD`.

    The aggressor is not recorded: a price above the last one means a buyer.
    """
    currency = re.search(r"[A-Z]{3}$", path.name.split(".")[0])
    symbol = naming.symbol_of(
        f"BTC{currency[0]}" if currency else path.name.split(".")[0]
    )
    side, last = Side.BUY, Decimal(0)
    in_a_row = 0
    for number, line in enumerate(_lines(path), 1):
        try:
            seconds, price_text, quantity_text = line.decode().strip().split(",")
            when = check_number(Decimal(seconds), "time")
            stamp = check_stamp(round(when * _SECOND))
            price, quantity = (
                check_number(Decimal(price_text), "price").normalize() + 0,
                check_number(Decimal(quantity_text), "quantity").normalize() + 0,
            )
            if not (price > 0 and quantity > 0):
                raise ValueError(
                    f"price {price} and quantity {quantity} must be above 0"
                )
        except BAD_LINE as error:
            problems.add(str(path), number, str(error))
            in_a_row = _lose_patience(in_a_row)
            continue
        in_a_row = 0
        if price != last:
            side = Side.BUY if price > last else Side.SELL
            last = price
        yield (
            stamp,
            TradePrinted(
                symbol=symbol,
                venue=naming.venue,
                price=price,
                quantity=quantity,
                side=side,
                trade_id=str(number),
                ts_event_ns=stamp,
                ts_received_ns=stamp,
            ),
        )


def _lean(path: Path, naming: Naming, problems: Problems) -> Iterator[Stamped]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as stream:
                yield from _guarded(
                    path, lean_bars(path, stream, naming, problems), problems
                )


def _candles(path: Path, naming: Naming, problems: Problems) -> Iterator[Stamped]:
    data = bytearray()
    for chunk in _chunks(path):
        data += chunk
        if len(data) > _MAX_JSON:
            problems.add(str(path), 0, f"is larger than {_MAX_JSON >> 20} MiB")
            return
    yield from _guarded(path, json_bars(path, bytes(data), naming, problems), problems)


def _guarded(
    path: Path, events: Iterable[Stamped], problems: Problems
) -> Iterator[Stamped]:
    try:
        yield from events
    except BAD_LINE as error:
        problems.add(str(path), 0, f"cannot be read: {error}")


def _lose_patience(bad_lines: int) -> int:
    if bad_lines >= _PATIENCE:
        raise EOFError(f"{_PATIENCE} lines in a row make no sense; it is given up")
    return bad_lines + 1


def _lines(path: Path) -> Iterator[bytes]:
    """Yield line by line, up to one that is longer than any message could be."""
    rest = bytearray()
    for chunk in _chunks(path):
        *lines, tail = chunk.split(b"\n")
        if lines:
            yield bytes(rest) + lines[0]
            yield from lines[1:]
            rest.clear()
        rest += tail
        if len(rest) > MAX_LINE:
            raise EOFError(f"a line is longer than {MAX_LINE} bytes")
    if rest:
        yield bytes(rest)


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield the content, unpacked. A file that breaks off gives all that it holds before the error."""
    with path.open("rb") as stream:
        if path.suffix != ".gz":
            while chunk := stream.read(_CHUNK):
                yield chunk
            return
        unpack = zlib.decompressobj(_GZIP)
        while chunk := stream.read(_CHUNK):
            # Piece by piece: a small file may unpack to more than the machine has memory.
            while chunk:
                yield unpack.decompress(chunk, _CHUNK)
                chunk = unpack.unconsumed_tail
                if unpack.eof and unpack.unused_data:  # several gzips in a row
                    chunk, unpack = unpack.unused_data, zlib.decompressobj(_GZIP)
        if not unpack.eof:
            raise EOFError("the compressed data is cut off")
