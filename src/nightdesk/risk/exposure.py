"""What open orders could still do: reserved quantities per instrument, so that many tasks cannot overshoot together.

Comes from: risk/gate.py
Goes to: risk/gate.py
"""

from collections.abc import Iterable
from decimal import Decimal

import msgspec

from nightdesk.model.instrument import instrument_key
from nightdesk.model.order import OrderRequest, Side

__all__ = ["Exposure", "Reservation"]

_ZERO = Decimal(0)


class Reservation(msgspec.Struct, kw_only=True):
    """One open order's share of the limits. `quantity` is what the venue might still execute."""

    client_order_id: str
    task_id: str
    key: str
    side: Side
    quantity: Decimal
    price: Decimal | None
    reduce_only: bool = False
    is_unknown: bool = False


class _Side(msgspec.Struct):
    working: Decimal = _ZERO
    reducing: Decimal = _ZERO


class _Account(msgspec.Struct):
    buy: _Side
    sell: _Side
    price: Decimal | None = None
    unknown: dict[str, None] = {}

    def side(self, side: Side) -> _Side:
        return self.buy if side is Side.BUY else self.sell


class Exposure:
    """Sums of reservations, kept up to date at each change, so that a check costs the same with 10,000 orders."""

    def __init__(self) -> None:
        self._reservations: dict[str, Reservation] = {}
        self._accounts: dict[str, _Account] = {}

    def __len__(self) -> int:
        return len(self._reservations)

    def get(self, client_order_id: str) -> Reservation | None:
        return self._reservations.get(client_order_id)

    def add(
        self,
        task_id: str,
        request: OrderRequest,
        client_order_id: str,
        price: Decimal | None,
    ) -> Reservation:
        """Reserve the whole of `request`."""
        reservation = Reservation(
            client_order_id=client_order_id,
            task_id=task_id,
            key=instrument_key(request.symbol, request.venue),
            side=request.side,
            quantity=_ZERO,
            price=price,
            reduce_only=request.reduce_only,
        )
        self._reservations[client_order_id] = reservation
        account = self._account(reservation.key)
        account.price = price if price is not None else account.price
        self.resize(reservation, request.quantity)
        return reservation

    def resize(self, reservation: Reservation, quantity: Decimal) -> None:
        """Set what the order might still execute; less than nothing counts as nothing."""
        quantity = max(quantity, _ZERO)
        change = quantity - reservation.quantity
        if not change:
            return
        side = self._account(reservation.key).side(reservation.side)
        side.working += change
        if reservation.reduce_only:
            side.reducing += change
        reservation.quantity = quantity

    def mark_unknown(self, reservation: Reservation, is_unknown: bool) -> None:
        """Say whether the fate of the order is unknown."""
        if reservation.is_unknown == is_unknown:
            return
        reservation.is_unknown = is_unknown
        unknown = self._account(reservation.key).unknown
        if is_unknown:
            unknown[reservation.client_order_id] = None
        else:
            unknown.pop(reservation.client_order_id, None)

    def remove(self, client_order_id: str) -> None:
        """Give the rest of a reservation back. Harmless if there is none."""
        reservation = self._reservations.pop(client_order_id, None)
        if reservation is not None:
            self.resize(reservation, _ZERO)
            self.mark_unknown(reservation, False)

    def unresolved(self, key: str) -> Iterable[str]:
        """Return the ids of the orders of one instrument whose fate is unknown."""
        account = self._accounts.get(key)
        return account.unknown if account else ()

    def working(self, key: str, side: Side) -> Decimal:
        """Return what open orders of one side might still execute."""
        account = self._accounts.get(key)
        return account.side(side).working if account else _ZERO

    def reducing(self, key: str, side: Side) -> Decimal:
        """Return the part of `working` that is reduce-only."""
        account = self._accounts.get(key)
        return account.side(side).reducing if account else _ZERO

    def worst_quantity(
        self, key: str, held: Decimal, side: Side, more: Decimal = _ZERO
    ) -> Decimal:
        """Return the largest position, unsigned, that open orders and `more` of one side could make of `held`."""
        buys = self.working(key, Side.BUY) + (more if side is Side.BUY else _ZERO)
        sells = self.working(key, Side.SELL) + (more if side is Side.SELL else _ZERO)
        return max(abs(held), abs(held + buys), abs(held - sells))

    def price(self, key: str) -> Decimal | None:
        """Return the price at which the newest order of an instrument was valued."""
        account = self._accounts.get(key)
        return account.price if account else None

    def keys(self) -> Iterable[str]:
        return self._accounts.keys()

    def _account(self, key: str) -> _Account:
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = _Account(_Side(), _Side(), None, {})
        return account
