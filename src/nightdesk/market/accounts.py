"""Balances and positions of the accounts at one venue: what is owned, what is set aside.

Comes from: market/matching.py
Goes to: market/matching.py
"""

from decimal import Decimal

from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Fill, Side

__all__ = ["Accounts"]

_NOTHING = Decimal(0)


class Accounts:
    """Totals, locks and positions, keyed by account.

    A position is the signed sum of an account's fills, with base fees taken off, and does not know
    deposits: it says what trading has built up, which is what `reduce_only` may take down.
    """

    def __init__(self) -> None:
        self._totals: dict[str, dict[str, Decimal]] = {}
        self._locked: dict[str, dict[str, Decimal]] = {}
        self._positions: dict[tuple[str, str], Decimal] = {}

    def deposit(self, account: str, asset: str, quantity: Decimal) -> None:
        totals = self._totals.setdefault(account, {})
        totals[asset] = totals.get(asset, _NOTHING) + quantity

    def lock(self, account: str, asset: str, quantity: Decimal) -> None:
        """Set `quantity` aside, or give it back if negative."""
        locked = self._locked.setdefault(account, {})
        locked[asset] = locked.get(asset, _NOTHING) + quantity

    def book(self, account: str, instrument: Instrument, fill: Fill) -> None:
        """Move what one fill moves: base, quote, fee, position."""
        sign = fill.side.sign
        base = fill.quantity * sign
        self.deposit(account, instrument.base, base)
        self.deposit(account, instrument.quote, -sign * fill.quantity * fill.price)
        if fill.fee:
            self.deposit(account, fill.fee_asset, -fill.fee)
            if fill.fee_asset == instrument.base:
                base -= fill.fee
        key = (account, instrument.symbol)
        self._positions[key] = self._positions.get(key, _NOTHING) + base

    def free(self, account: str, asset: str) -> Decimal:
        return self.total(account, asset) - self._locked.get(account, {}).get(
            asset, _NOTHING
        )

    def total(self, account: str, asset: str) -> Decimal:
        return self._totals.get(account, {}).get(asset, _NOTHING)

    def totals(self, account: str) -> dict[str, Decimal]:
        return dict(self._totals.get(account, {}))

    def locked(self, account: str) -> dict[str, Decimal]:
        return {
            asset: locked
            for asset, locked in self._locked.get(account, {}).items()
            if locked
        }

    def reducible(self, account: str, symbol: str, side: Side) -> Decimal:
        """Return how much an order of `side` can take the position down; 0 if it would build it up."""
        position = self._positions.get((account, symbol), _NOTHING)
        return max(_NOTHING, -position * side.sign)

    def position(self, account: str, symbol: str) -> Decimal:
        return self._positions.get((account, symbol), _NOTHING)
