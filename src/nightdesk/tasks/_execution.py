"""Arithmetic of parent orders, shared by the tasks that trade: stock-taking, prices, refusals, freshness.

Comes from: tasks/
Goes to: model/order.py
"""

from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from enum import Enum
from typing import Any

import msgspec

from nightdesk.abc import Desk
from nightdesk.model.events import QuoteChanged
from nightdesk.model.instrument import Instrument, instrument_key
from nightdesk.model.order import Order, OrderStatus, Side

__all__ = [
    "LIVE",
    "PERMANENT_DENIALS",
    "ZERO",
    "Freshness",
    "Progress",
    "Refusal",
    "as_side",
    "check",
    "crossing_price",
    "growing_delay_s",
    "is_behind",
    "least_tradable",
    "pegged_price",
    "progress_of",
    "reached_venue",
    "refusal_of",
    "seconds",
    "touch",
    "trailing_refusals",
    "worst_first_step",
]

ZERO = Decimal(0)
LIVE = frozenset({OrderStatus.ACCEPTED, OrderStatus.PARTIALLY_FILLED})
"""Open states in which the venue has proved that the order works; in the other open states its fate is being decided."""

PERMANENT_DENIALS = frozenset(
    {
        "NOTIONAL_BELOW_MINIMUM",
        "NOTIONAL_EXCEEDS_MAX_PER_ORDER",
        "PRICE_NOT_ON_TICK",
        "QUANTITY_BELOW_MINIMUM",
        "QUANTITY_EXCEEDS_MAXIMUM",
        "QUANTITY_NOT_ON_LOT",
        "SYMBOL_NOT_ALLOWED",
        "UNKNOWN_INSTRUMENT",
    }
)
"""Answers of the gate that the same request would get again for ever."""


class Refusal(Enum):
    """Why a venue did not take an order."""

    POST_ONLY = "POST_ONLY_REJECTED"
    BALANCE = "INSUFFICIENT_BALANCE"
    OTHER = "REJECTED"


class Progress(msgspec.Struct, frozen=True):
    """What a set of orders came to so far.

    Attributes:
        filled: Sum of the fills, base units.
        value: Sum of price times quantity of the fills, quote units.
        open: Orders that may still be executed, oldest first.
    """

    filled: Decimal = ZERO
    value: Decimal = ZERO
    open: tuple[Order, ...] = ()

    @property
    def working(self) -> Decimal:
        return sum((order.working_quantity for order in self.open), ZERO)

    @property
    def average_price(self) -> Decimal:
        """Weighted mean price of the fills, 0 while there is none."""
        return self.value / self.filled if self.filled else ZERO


def progress_of(orders: Iterable[Order]) -> Progress:
    """Take stock of `orders`."""
    filled = value = ZERO
    still_open = []
    for order in orders:
        if order.filled_quantity:
            filled += order.filled_quantity
            value += order.filled_quantity * (order.average_price or ZERO)
        if order.status.is_open:
            still_open.append(order)
    return Progress(filled, value, tuple(still_open))


def reached_venue(orders: Iterable[Order]) -> list[Order]:
    """Return the orders without those that our own gate denied."""
    return [order for order in orders if order.status is not OrderStatus.DENIED]


def check(owner: str, claims: Mapping[str, tuple[bool, Any, str]]) -> None:
    """Raise one ValueError that lists every claim that does not hold.

    Args:
        owner: The task, for the message.
        claims: Field to (holds, found, expected).
    """
    wrong = [
        f"`{field}` is {found!r}, expected {expected}"
        for field, (holds, found, expected) in claims.items()
        if not holds
    ]
    if wrong:
        raise ValueError(f"{owner}: {'; '.join(wrong)}")


def as_side(value: Any) -> Side:
    """Return the side called `value`, in any case, also given as another enumeration's member."""
    if type(value) is Side:
        return value
    name = value.name if isinstance(value, Enum) else str(value)
    try:
        return Side(name.upper())
    except ValueError:
        raise ValueError(f"`side` is {value!r}, expected BUY or SELL") from None


def seconds(duration_s: float) -> int:
    """Return `duration_s` in nanoseconds."""
    return int(duration_s * 1_000_000_000)


def growing_delay_s(count: int, first: float = 0.25, most: float = 60.0) -> float:
    """Return the delay before attempt number `count` + 1: `first`, then twice as long each time."""
    if count <= 0:
        return 0.0
    return min(most, first * 2.0 ** min(count - 1, 30))


# --- Prices ---------------------------------------------------------------------------------------


def touch(side: Side, quote: QuoteChanged) -> Decimal:
    """Return the price at which an order of `side` is executed at once."""
    return quote.ask if side is Side.BUY else quote.bid


def is_behind(side: Side, price: Decimal, limit: Decimal | None) -> bool:
    """Return whether trading at `price` would be worse than `limit`."""
    return limit is not None and (price - limit) * side.sign > 0


def pegged_price(
    instrument: Instrument,
    side: Side,
    quote: QuoteChanged,
    offset_ticks: int,
    *,
    limit: Decimal | None = None,
    post_only: bool = False,
) -> Decimal:
    """Return best bid minus the offset for a BUY, best ask plus the offset for a SELL, on the grid.

    Args:
        offset_ticks: 0 joins the queue, positive stands behind it, negative goes towards the other side.
        limit: Worst price, never passed.
        post_only: Stay at least one tick away from the other side of the book.
    """
    tick = instrument.tick_size
    best = quote.bid if side is Side.BUY else quote.ask
    price = best - side.sign * offset_ticks * tick
    if post_only:
        price = _nearer(side, price, touch(side, quote) - side.sign * tick)
    if limit is not None:
        price = _nearer(side, price, limit)
    return instrument.passive_price(side, price)


def crossing_price(
    instrument: Instrument, side: Side, price: Decimal, buffer: Decimal = ZERO
) -> Decimal:
    """Return `price` made worse by the ratio `buffer`, on the grid, never worse than that."""
    return instrument.passive_price(side, price * (1 + side.sign * buffer))


def _nearer(side: Side, one: Decimal, other: Decimal) -> Decimal:
    """The more cautious of two prices: the lower for a BUY, the higher for a SELL."""
    return min(one, other) if side is Side.BUY else max(one, other)


def least_tradable(instrument: Instrument, price: Decimal) -> Decimal:
    """Return the smallest quantity on the lot grid that satisfies the venue's minimums at `price`."""
    quantity = max(instrument.min_quantity, instrument.lot_size)
    if price > 0:
        quantity = max(quantity, instrument.min_notional / price)
    return (quantity / instrument.lot_size).to_integral_value(
        ROUND_CEILING
    ) * instrument.lot_size


def worst_first_step(
    instrument: Instrument, quantity: Decimal, price: Decimal
) -> tuple[str, str] | None:
    """Return the code and the words with which an order of `quantity` must be refused, or None."""
    if quantity < instrument.min_quantity or quantity <= 0:
        return (
            "QUANTITY_BELOW_MINIMUM",
            f"child quantity {quantity} is below the least quantity {instrument.min_quantity} of {instrument.key}",
        )
    if quantity * price < instrument.min_notional:
        return (
            "NOTIONAL_BELOW_MINIMUM",
            f"child of {quantity} at {price} is worth {quantity * price}, below the least notional "
            f"{instrument.min_notional} of {instrument.key}; take children of at least {least_tradable(instrument, price)}",
        )
    return None


# --- Refusals -------------------------------------------------------------------------------------


def refusal_of(order: Order) -> Refusal | None:
    """Return why the venue did not take `order`, or None if it took it."""
    text = (order.reason or "").upper().replace("-", "_").replace(" ", "_")
    post_only = (
        "POST_ONLY" in text or "IMMEDIATELY_MATCH" in text or "LIMIT_MAKER" in text
    )
    if order.status is OrderStatus.REJECTED:
        if post_only:
            return Refusal.POST_ONLY
        if "BALANCE" in text or "INSUFFICIENT" in text:
            return Refusal.BALANCE
        return Refusal.OTHER
    ended = order.status in (OrderStatus.CANCELED, OrderStatus.EXPIRED)
    if ended and post_only and not order.filled_quantity:
        return Refusal.POST_ONLY  # some venues accept first and cancel at once
    return None


def trailing_refusals(
    orders: Sequence[Order], after: str | None = None
) -> list[Refusal]:
    """Return the refusals in a row at the end of `orders`, all of the kind of the last one.

    Args:
        after: Orders up to this client order id are forgiven.
    """
    found: list[Refusal] = []
    for order in reversed(orders):
        refusal = None if order.client_order_id == after else refusal_of(order)
        if refusal is None or (found and refusal is not found[0]):
            break
        found.append(refusal)
    return found


# --- Freshness ------------------------------------------------------------------------------------


class Freshness:
    """Hands out quotes that are young enough to act on, and alerts once when one is not."""

    def __init__(self, desk: Desk, max_age_s: float) -> None:
        self._desk = desk
        self._max_age_s = max_age_s
        self._stale: set[str] = set()

    def quote(self, symbol: str, venue: str) -> QuoteChanged | None:
        """Return the newest quote, or None if there is none, it is too old, or it is one-sided."""
        quote = self._desk.price(symbol, venue)
        key = instrument_key(symbol, venue)
        if quote is None or quote.bid <= 0 or quote.ask <= 0:
            return None
        age_ns = self._desk.clock.now_ns() - quote.ts_received_ns
        if age_ns <= seconds(self._max_age_s):
            self._stale.discard(key)
            return quote
        if key not in self._stale:
            self._stale.add(key)
            self._desk.alert(
                "warning",
                f"the price of {key} is {age_ns / 1e9:.1f} s old, more than {self._max_age_s} s: "
                "nothing is triggered until a fresh one arrives",
            )
        return None
