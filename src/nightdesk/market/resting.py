"""Orders that wait in a book of our own, by price and then time, each with the queue ahead of it.

Comes from: market/matching.py
Goes to: market/matching.py
"""

from collections.abc import Iterator
from decimal import Decimal

import msgspec
from sortedcontainers import SortedDict

from nightdesk.market.liquidity import ShownMarket
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import OrderStatus, OrderType, Side, TimeInForce, VenueOrder

__all__ = ["Resting", "Working"]

_NOTHING = Decimal(0)


class Working(msgspec.Struct, kw_only=True):
    """One accepted order as the engine keeps it.

    Attributes:
        awake: False while a stop order waits for its trigger.
        cost: Sum of price times quantity of the fills.
        ahead: Other people's quantity at this price that trades first; None while the feed does not
            reach this price. Not part of the statement: after a restart the whole level is ahead.
    """

    venue_order_id: str
    client_order_id: str
    account: str
    instrument: Instrument
    side: Side
    type: OrderType
    quantity: Decimal
    price: Decimal | None
    trigger_price: Decimal | None
    trail: Decimal | None
    time_in_force: TimeInForce
    post_only: bool
    reduce_only: bool
    expire_ns: int | None
    lock_rate: Decimal
    placed_ns: int
    updated_ns: int
    status: OrderStatus = OrderStatus.ACCEPTED
    awake: bool = True
    filled: Decimal = _NOTHING
    cost: Decimal = _NOTHING
    reason: str | None = None
    ahead: Decimal | None = None

    @property
    def symbol(self) -> str:
        return self.instrument.symbol

    @property
    def remaining(self) -> Decimal:
        return self.quantity - self.filled

    @property
    def is_limit(self) -> bool:
        return self.price is not None

    @property
    def may_rest(self) -> bool:
        return self.is_limit and self.time_in_force in (
            TimeInForce.GTC,
            TimeInForce.GTD,
        )

    def report(self, venue: str) -> VenueOrder:
        """Return the order as the venue answers a look-up."""
        return VenueOrder(
            venue=venue,
            symbol=self.symbol,
            venue_order_id=self.venue_order_id,
            client_order_id=self.client_order_id,
            side=self.side,
            type=self.type,
            quantity=self.quantity,
            price=self.price,
            status=self.status,
            filled_quantity=self.filled,
            average_price=self.cost / self.filled if self.filled else None,
            reason=self.reason,
            ts_event_ns=self.updated_ns,
        )


class Resting:
    """The resting limit orders of one side of one instrument."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._is_buy = side is Side.BUY
        self._best: Decimal | None = None  # asked far more often than it changes
        self._levels: SortedDict[Decimal, dict[str, Working]] = SortedDict()

    def __bool__(self) -> bool:
        return self._best is not None

    def add(self, order: Working) -> None:
        assert order.price is not None
        level = self._levels.get(order.price)
        if level is None:
            level = self._levels[order.price] = {}
            self._best = self._levels.peekitem(-1 if self._is_buy else 0)[0]
        level[order.venue_order_id] = order

    def remove(self, order: Working) -> None:
        level = self._levels.get(order.price)
        if level is None or level.pop(order.venue_order_id, None) is None:
            return
        if not level:
            del self._levels[order.price]
            at_best = -1 if self._is_buy else 0
            self._best = self._levels.peekitem(at_best)[0] if self._levels else None

    def is_reached(self, price: Decimal) -> bool:
        """Return whether any order stands at `price` or better for the other side."""
        best = self._best
        if best is None:
            return False
        return best >= price if self._is_buy else best <= price

    def prices(self) -> list[Decimal]:
        return list(self._levels)

    def reached(self, price: Decimal) -> list[Working]:
        """Return the orders at `price` or better for the other side, by price, then time."""
        if not self.is_reached(price):
            return []
        return [
            order
            for p in self._prices_from(price)
            for order in self._levels[p].values()
        ]

    def update_queues(
        self, shown: ShownMarket, changed: "list[Decimal] | None" = None
    ) -> None:
        """Move the orders up where less than their queue is still shown.

        Args:
            shown: The market after the message.
            changed: Prices that the message changed; None for everything from the best price on.
        """
        if changed is None:
            best = shown.best(self.side)
            if best is None or not self.is_reached(best):
                return
            prices = self._prices_from(best)
        else:
            prices = [price for price in changed if price in self._levels]
        for price in prices:
            there = shown.quantity(self.side, price)
            if there is None:
                continue
            for order in self._levels[price].values():
                if order.ahead is None or order.ahead > there:
                    order.ahead = there

    def hit(
        self, price: Decimal, quantity: Decimal
    ) -> Iterator[tuple[Working, Decimal]]:
        """Share a public trade of `quantity` at `price` among the orders it reached.

        The trade is spent once, in the order of price and time: on the orders at better prices
        first, at its own price on the public queue before each order and then on the order.
        """
        left = quantity
        passed = _NOTHING
        for order in self.reached(price):
            if order.status.is_terminal:
                continue  # ended by a fill of the same trade
            if order.price == price:
                if order.ahead is None:
                    continue  # nobody knows what stood before it, so the trade proves nothing
                public = min(max(order.ahead - passed, _NOTHING), left)
                left -= public
                passed += public
                order.ahead = max(order.ahead - passed, _NOTHING)
                if order.ahead:
                    continue
            share = min(left, order.remaining)
            if share > 0:
                left -= share
                yield order, share

    def _prices_from(self, price: Decimal) -> list[Decimal]:
        if self._is_buy:
            return list(self._levels.irange(minimum=price, reverse=True))
        return list(self._levels.irange(maximum=price))
