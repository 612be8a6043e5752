"""Positions: the signed sum of fills per instrument, with cost, profit and fees, exact.

Comes from: orders/protocol.py
Goes to: risk/gate.py, reports.py
"""

from collections.abc import Callable, Iterable
from decimal import Context, Decimal

import msgspec

from nightdesk.model.events import QuoteChanged
from nightdesk.model.instrument import Instrument, instrument_key
from nightdesk.model.order import Fill
from nightdesk.model.position import Position

__all__ = ["Positions", "QuoteLookup"]

QuoteLookup = Callable[[str, str], QuoteChanged | None]

_ZERO = Decimal(0)
# Tokens with 18 decimals need more digits than the default 28 for price times quantity.
_EXACT = Context(prec=60)


class _Book(msgspec.Struct, kw_only=True):
    """What is kept of one instrument: enough to continue after a restart without the old fills.

    Attributes:
        quantity: Signed, base units.
        cost: Signed price times quantity of what is held.
        cash: Quote units received minus paid by all trades, before fees.
        fees: By asset, as charged.
        fees_quote: Those that were charged in quote or base, in quote units at the price of their fill.
    """

    symbol: str
    venue: str
    quantity: Decimal = _ZERO
    cost: Decimal = _ZERO
    cash: Decimal = _ZERO
    fees: dict[str, Decimal] = {}
    fees_quote: Decimal = _ZERO
    updated_ns: int = 0

    def position(self) -> Position:
        return Position(
            symbol=self.symbol,
            venue=self.venue,
            quantity=self.quantity,
            average_price=self.cost / self.quantity if self.quantity else _ZERO,
            realized_pnl=_EXACT.add(self.cash, self.cost),
            fees=dict(self.fees),
            updated_ns=self.updated_ns,
        )

    def trade(self, delta: Decimal, price: Decimal) -> None:
        """Take `delta` in at `price`. What shrinks the position leaves at its average price."""
        self.cash = _EXACT.fma(-delta, price, self.cash)
        before, after = self.quantity, self.quantity + delta
        if before * delta >= 0:
            self.cost = _EXACT.fma(delta, price, self.cost)
        elif after * before > 0:
            self.cost = _EXACT.divide(_EXACT.multiply(self.cost, after), before)
        else:  # closed, and what is left over opens the other side
            self.cost = _EXACT.multiply(after, price)
        self.quantity = after

    def charge(self, fill: Fill, base: str, quote: str) -> None:
        if not fill.fee:
            return
        self.fees[fill.fee_asset] = self.fees.get(fill.fee_asset, _ZERO) + fill.fee
        if fill.fee_asset == base:
            self.fees_quote = _EXACT.fma(fill.fee, fill.price, self.fees_quote)
        elif fill.fee_asset == quote:
            self.fees_quote += fill.fee


_decoder = msgspec.json.Decoder(_Book)
_encoder = msgspec.json.Encoder()


class Positions:
    """Every position of the desk, netted per instrument. Whoever books must book each fill once.

    A fee in the base asset makes what is held smaller by the fee, as though it had been sold at the
    price of its fill; a fee in a third asset is kept in `fees` and in no money figure, since nothing here
    knows its price (`unpriced_fees`).
    """

    def __init__(self) -> None:
        self._books: dict[str, _Book] = {}
        self._positions: dict[str, Position] = {}

    def apply(self, fill: Fill, instrument: Instrument | None = None) -> Position:
        """Book one fill and return the position it makes."""
        key = instrument_key(fill.symbol, fill.venue)
        book = self._books.get(key)
        if book is None:
            book = self._books[key] = _Book(
                symbol=fill.symbol, venue=fill.venue, fees={}
            )
        base, quote = (
            (instrument.base, instrument.quote) if instrument else _assets(fill.symbol)
        )
        delta = fill.side.sign * fill.quantity
        if fill.fee and fill.fee_asset == base:
            delta -= fill.fee
        book.trade(delta, fill.price)
        book.charge(fill, base, quote)
        book.updated_ns = max(book.updated_ns, fill.ts_event_ns)
        position = self._positions[key] = book.position()
        return position

    def of(self, symbol: str, venue: str) -> Position:
        """Return the position, flat if nothing was ever traded."""
        return self._positions.get(instrument_key(symbol, venue)) or Position(
            symbol=symbol, venue=venue
        )

    def all(self) -> list[Position]:
        """Return every position that was ever held, also those that are flat now, by instrument."""
        return [self._positions[key] for key in sorted(self._positions)]

    def rebuild(self, fills: Iterable[Fill]) -> None:
        """Forget everything and book `fills`, oldest first."""
        self._books.clear()
        self._positions.clear()
        for fill in fills:
            self.apply(fill)

    # --- across a restart ---------------------------------------------------------------------------

    def record(self, symbol: str, venue: str) -> bytes:
        """Return one position as it is saved, together with the fill that changed it."""
        return _encoder.encode(self._books[instrument_key(symbol, venue)])

    def restore(self, data: bytes) -> Position:
        """Take one saved position in.

        Raises:
            msgspec.MsgspecError: `data` is no saved position.
        """
        book = _decoder.decode(data)
        key = instrument_key(book.symbol, book.venue)
        self._books[key] = book
        position = self._positions[key] = book.position()
        return position

    # --- money --------------------------------------------------------------------------------------

    def realized_pnl(self) -> Decimal:
        """Return the profit of everything closed, before fees, in quote units."""
        return sum(
            (position.realized_pnl for position in self._positions.values()), _ZERO
        )

    def fees_in_quote(self) -> Decimal:
        """Return the fees that were charged in quote or base, in quote units at the price of their fill."""
        return sum((book.fees_quote for book in self._books.values()), _ZERO)

    def unpriced_fees(self) -> dict[str, Decimal]:
        """Return fees in third assets, which `fees_in_quote` and `equity` leave out."""
        found: dict[str, Decimal] = {}
        for book in self._books.values():
            own = _assets(book.symbol)
            for asset, fee in book.fees.items():
                if asset not in own:
                    found[asset] = found.get(asset, _ZERO) + fee
        return found

    def unrealized_pnl(self, quote: QuoteLookup) -> Decimal | None:
        """Return the profit if all were closed at the touch now; None if a held instrument has no quote."""
        total = _ZERO
        for position in self._positions.values():
            if not position.quantity:
                continue
            market = quote(position.symbol, position.venue)
            if market is None:
                return None
            total += position.unrealized_pnl(
                market.bid if position.quantity > 0 else market.ask
            )
        return total

    def equity(self, starting: Decimal, quote: QuoteLookup) -> Decimal | None:
        """Return `starting` plus all profit minus all fees, marked at the touch; None if a mark is missing."""
        unrealized = self.unrealized_pnl(quote)
        if unrealized is None:
            return None
        return starting + self.realized_pnl() + unrealized - self.fees_in_quote()


def _assets(symbol: str) -> tuple[str, str]:
    base, _, rest = symbol.partition("/")
    return base, rest.split(":")[0]
