"""A position: the signed sum of fills of one instrument, with its cost and result."""

from decimal import Decimal

import msgspec

__all__ = ["Position"]


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """Signed quantity (+ long, - short), average entry price, and money in quote units.

    `fees` are by asset; `realized_pnl` is before fees.
    """

    symbol: str
    venue: str
    quantity: Decimal = Decimal(0)
    average_price: Decimal = Decimal(0)
    realized_pnl: Decimal = Decimal(0)
    fees: dict[str, Decimal] = {}
    updated_ns: int = 0

    def unrealized_pnl(self, price: Decimal) -> Decimal:
        """Return the profit if the whole position were closed at `price`, before fees."""
        return (price - self.average_price) * self.quantity
