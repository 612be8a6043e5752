"""Raw Binance market messages, as a recorder wrote them: `<receipt ns> <JSON>`.

Spot and futures differ in small ways: futures changes name the last sequence of the message before
(`pu`), spot ones only their own first. Both become one proof: first is at most last plus one.

Comes from: sources/_recordings.py
Goes to: sources/_recordings.py
"""

from decimal import Decimal

import msgspec

from nightdesk.model.events import BookChanged, Event, QuoteChanged, TradePrinted
from nightdesk.model.order import Side
from nightdesk.sources._context import (
    Naming,
    Stamped,
    check_levels,
    check_number,
    check_stamp,
    check_symbol,
)

__all__ = ["BinanceMessages"]

_MILLISECOND = 1_000_000
_MOST_SYMBOLS = 10_000
_Levels = list[tuple[Decimal, Decimal]]


class _Envelope(msgspec.Struct):
    """Either a stream's message or, without `stream`, the REST snapshot of a book."""

    stream: str = ""
    data: msgspec.Raw = msgspec.Raw(b"")
    lastUpdateId: int = 0
    symbol: str = ""
    bids: _Levels = []
    asks: _Levels = []
    E: int = 0


class _Ticker(msgspec.Struct):
    s: str
    b: Decimal
    B: Decimal
    a: Decimal
    A: Decimal
    E: int = 0


class _Trade(msgspec.Struct):
    s: str
    t: int
    p: Decimal
    q: Decimal
    T: int
    m: bool
    X: str = "MARKET"


class _Depth(msgspec.Struct):
    s: str
    U: int
    u: int
    b: _Levels
    a: _Levels
    E: int = 0
    pu: int = 0


class BinanceMessages:
    """Turns lines into events. A snapshot without a symbol belongs to the symbol seen last."""

    def __init__(self, naming: Naming) -> None:
        self._naming = naming
        self._symbols: dict[str, str] = {}
        self._last_symbol = ""
        self._envelope = msgspec.json.Decoder(_Envelope)
        self._ticker = msgspec.json.Decoder(_Ticker)
        self._trade = msgspec.json.Decoder(_Trade)
        self._depth = msgspec.json.Decoder(_Depth)

    def parse(self, line: bytes) -> Stamped | None:
        """Return the event of one line; None for messages that nobody here needs.

        Raises:
            ValueError, msgspec.MsgspecError: The line makes no sense.
        """
        stamp_text, separator, text = line.partition(b" ")
        if not separator:
            raise ValueError("no JSON after the time")
        stamp = check_stamp(int(stamp_text))
        envelope = self._envelope.decode(text)
        event = self._event(stamp, envelope)
        return None if event is None else (stamp, event)

    def _event(self, stamp: int, envelope: _Envelope) -> Event | None:
        if not envelope.stream:
            return self._on_snapshot(stamp, envelope)
        kind = envelope.stream.partition("@")[2]
        if kind == "bookTicker":
            return self._on_ticker(stamp, self._ticker.decode(envelope.data))
        if kind == "trade":
            return self._on_trade(stamp, self._trade.decode(envelope.data))
        if kind.startswith("depth"):
            return self._on_depth(stamp, self._depth.decode(envelope.data))
        return None

    def _on_ticker(self, stamp: int, message: _Ticker) -> Event:
        self._last_symbol = message.s
        check_levels(((message.b, message.B), (message.a, message.A)))
        return QuoteChanged(
            symbol=self._symbol_of(message.s),
            venue=self._naming.venue,
            bid=message.b,
            bid_quantity=message.B,
            ask=message.a,
            ask_quantity=message.A,
            ts_event_ns=check_stamp(message.E * _MILLISECOND),
            ts_received_ns=stamp,
        )

    def _on_trade(self, stamp: int, message: _Trade) -> Event | None:
        self._last_symbol = message.s
        if message.X != "MARKET" or not message.q:
            return None  # insurance fund and liquidations settle beside the book
        return TradePrinted(
            symbol=self._symbol_of(message.s),
            venue=self._naming.venue,
            price=check_number(message.p, "price"),
            quantity=check_number(message.q, "quantity"),
            side=Side.SELL if message.m else Side.BUY,
            trade_id=str(message.t),
            ts_event_ns=check_stamp(message.T * _MILLISECOND),
            ts_received_ns=stamp,
        )

    def _on_depth(self, stamp: int, message: _Depth) -> Event:
        self._last_symbol = message.s
        check_levels(message.b)
        check_levels(message.a)
        return BookChanged(
            symbol=self._symbol_of(message.s),
            venue=self._naming.venue,
            bids=message.b,
            asks=message.a,
            first_sequence=message.pu + 1 if message.pu else message.U,
            last_sequence=message.u,
            ts_event_ns=check_stamp(message.E * _MILLISECOND),
            ts_received_ns=stamp,
        )

    def _on_snapshot(self, stamp: int, envelope: _Envelope) -> Event:
        if not envelope.lastUpdateId:
            raise ValueError("neither a stream's message nor a snapshot of a book")
        check_levels(envelope.bids)
        check_levels(envelope.asks)
        return BookChanged(
            symbol=self._symbol_of(envelope.symbol or self._last_symbol),
            venue=self._naming.venue,
            bids=envelope.bids,
            asks=envelope.asks,
            first_sequence=envelope.lastUpdateId,
            last_sequence=envelope.lastUpdateId,
            is_snapshot=True,
            ts_event_ns=check_stamp(envelope.E * _MILLISECOND),
            ts_received_ns=stamp,
        )

    def _symbol_of(self, recorded: str) -> str:
        known = self._symbols.get(recorded)
        if known is None:
            if len(self._symbols) >= _MOST_SYMBOLS:
                raise ValueError(f"more than {_MOST_SYMBOLS} instruments")
            known = self._symbols[recorded] = self._naming.symbol_of(
                check_symbol(recorded)
            )
        return known
