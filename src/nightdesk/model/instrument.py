"""What can be traded, and the grid its orders must lie on."""

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import cached_property

import msgspec

from nightdesk.model.order import Side

__all__ = ["Instrument", "instrument_key"]


def instrument_key(symbol: str, venue: str) -> str:
    """Return the name under which one instrument is known to locks, caches and limits: `BTC/USDT@binance`."""
    return f"{symbol}@{venue}"


class Instrument(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """One instrument at one venue.

    Attributes:
        symbol: ccxt form, `BTC/USDT` for spot.
        venue: Name of the venue in `desk.yaml`.
        tick_size: Every price is a multiple of it. Quote units.
        lot_size: Every quantity is a multiple of it. Base units.
        min_quantity, max_quantity: Bounds of one order. Base units.
        min_notional: Least price times quantity of one order. Quote units.
        maker_fee, taker_fee: Ratios (0.001 is 0.1 %); a maker fee may be negative.
        fee_in: `quote`, or `base`: then a bought quantity arrives smaller by the fee.
    """

    symbol: str
    venue: str
    tick_size: Decimal
    lot_size: Decimal
    min_quantity: Decimal
    max_quantity: Decimal = Decimal("1000000000")
    min_notional: Decimal = Decimal(0)
    maker_fee: Decimal = Decimal(0)
    taker_fee: Decimal = Decimal(0)
    fee_in: str = "quote"

    @cached_property
    def key(self) -> str:
        return instrument_key(self.symbol, self.venue)

    @cached_property
    def base(self) -> str:
        return self.symbol.split("/")[0]

    @cached_property
    def quote(self) -> str:
        return self.symbol.split("/")[1].split(":")[0]

    def floor_quantity(self, quantity: Decimal) -> Decimal:
        """Return the largest legal multiple of the lot that is not above `quantity`."""
        return (quantity / self.lot_size).to_integral_value(ROUND_FLOOR) * self.lot_size

    def passive_price(self, side: Side, price: Decimal) -> Decimal:
        """Return `price` on the tick grid, rounded away from the market: a BUY down, a SELL up."""
        rounding = ROUND_FLOOR if side is Side.BUY else ROUND_CEILING
        return (price / self.tick_size).to_integral_value(rounding) * self.tick_size

    def is_tradable(self, quantity: Decimal, price: Decimal) -> bool:
        """Return whether an order of `quantity` at `price` would satisfy the venue's minimums."""
        return quantity >= self.min_quantity and quantity * price >= self.min_notional
