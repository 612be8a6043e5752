"""What every parser of recordings needs: names for symbols, and a place for complaints.

Comes from: sources/replay.py
Goes to: sources/_recordings.py
"""

import logging
from collections.abc import Mapping
from decimal import Decimal

import msgspec

from nightdesk.model.events import Event

__all__ = ["Naming", "Problems", "Stamped"]

Stamped = tuple[int, Event]
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
