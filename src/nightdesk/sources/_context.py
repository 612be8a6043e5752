"""What every parser of recordings needs: names for symbols, and a place for complaints.

Comes from: sources/replay.py
Goes to: sources/_recordings.py
"""

import logging
from collections.abc import Iterable, Mapping
from decimal import Decimal

import msgspec

from nightdesk.model.events import Event

__all__ = [
    "BAD_LINE",
    "MAX_LINE",
    "Naming",
    "Problems",
    "Stamped",
    "check_levels",
    "check_number",
    "check_stamp",
    "check_symbol",
]

Stamped = tuple[int, Event]
BAD_LINE = (
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    msgspec.MsgspecError,
)
"""What a line of nonsense may raise on its way to an event."""

MAX_LINE = 4 * 1024 * 1024
"""Bytes. A snapshot of a whole book has some hundred thousand."""

_LARGEST = Decimal("1e30")
_SMALLEST = Decimal("1e-30")
_LAST_NS = 2**63 - 1
_MAX_NAME = 64
_QUOTES = (
    "USDT",
    "USDC",
    "FDUSD",
    "BUSD",
    "TUSD",
    "DAI",
    "USD",
    "EUR",
    "GBP",
    "INR",
    "BTC",
    "ETH",
    "BNB",
)
_log = logging.getLogger(__name__)


class Naming(msgspec.Struct, frozen=True, kw_only=True):
    """How a recording's instruments are called in the desk.

    Attributes:
        symbol: Name for everything in the file, if it holds one instrument.
        symbols: Recorded name to ours, for files with several.
        spread_ppm: Distance of bid and ask of the quotes that stand for a candle's close.
    """

    venue: str
    symbol: str | None = None
    symbols: Mapping[str, str] = {}
    spread_ppm: Decimal = Decimal(100)

    def symbol_of(self, recorded: str) -> str:
        """Return our name of `recorded`: as mapped, as given, or split before its quote currency."""
        mapped = self.symbols.get(recorded) or self.symbol
        if mapped:
            return mapped
        text = recorded.upper().replace("-", "").replace("_", "")
        is_perpetual = text.endswith("PERP")
        text = text.removesuffix("PERP")
        for quote in _QUOTES:
            base = text.removesuffix(quote)
            if base and base != text:
                return f"{base}/{quote}:{base}" if is_perpetual else f"{base}/{quote}"
        return recorded


def check_number(value: Decimal, name: str) -> Decimal:
    """Return a price or quantity that arithmetic can bear: 0, or 1e-30 to 1e30. `1e999999` is text of eight bytes.

    Raises:
        ValueError: It is something else, such as NaN.
    """
    if value.is_finite() and (_SMALLEST <= value <= _LARGEST or not value):
        return value
    raise ValueError(f"{name} is {str(value)[:40]}, expected 0 or a number above")


def check_levels(levels: Iterable[tuple[Decimal, Decimal]]) -> None:
    """Check every price and quantity of a book.

    Raises:
        ValueError: One makes no sense.
    """
    for price, quantity in levels:
        check_number(price, "price")
        check_number(quantity, "quantity")


def check_stamp(ns: int) -> int:
    """Return an instant that lies between 1970 and 2262.

    Raises:
        ValueError: It does not.
    """
    if 0 <= ns <= _LAST_NS:
        return ns
    raise ValueError("its time is not between the years 1970 and 2262")


def check_symbol(text: str) -> str:
    """Return a recorded name that may become a key, a log line and a word in a terminal.

    Raises:
        ValueError: It is no name.
    """
    if 0 < len(text) <= _MAX_NAME and text.isprintable():
        return text
    raise ValueError(f"{text[:40]!a} is no name of an instrument")


class Problems:
    """Counts what could not be read; logs the first, then every 2^n-th (R-25), and keeps a few."""

    def __init__(self, kept: int = 20) -> None:
        self.count = 0
        self.kept: list[str] = []
        self._limit = kept

    def add(self, path: str, line: int, found: str) -> None:
        self.count += 1
        text = (
            f"{path}, line {line}: {found[:200]}" if line else f"{path}: {found[:200]}"
        )
        if len(self.kept) < self._limit:
            self.kept.append(text)
        if self.count & (self.count - 1) == 0:
            _log.warning("recording: %s (skipped; %d so far)", text, self.count)
