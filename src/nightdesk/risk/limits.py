"""What an order must satisfy by itself: the grid of its instrument, the allow-list, size, collar (T-24).

Comes from: risk/gate.py
Goes to: risk/gate.py
"""

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Protocol

from nightdesk.abc import Clock
from nightdesk.errors import OrderDeniedError
from nightdesk.model.events import QuoteChanged
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import OrderRequest, OrderType, Side

__all__ = ["Limits", "QuoteLookup", "check_grid", "check_value", "price_of"]

QuoteLookup = Callable[[str, str], QuoteChanged | None]

_WITH_PRICE = frozenset({OrderType.LIMIT, OrderType.STOP_LIMIT})
_WITH_TRIGGER = frozenset(
    {OrderType.STOP_MARKET, OrderType.STOP_LIMIT, OrderType.TRAILING_STOP_MARKET}
)


class Limits(Protocol):
    """The section `risk` of desk.yaml. None switches a limit off; money in quote units."""

    @property
    def max_notional_per_order(self) -> Decimal | None: ...
    @property
    def max_position_notional(self) -> Decimal | None: ...
    @property
    def max_gross_notional(self) -> Decimal | None: ...
    @property
    def max_daily_loss(self) -> Decimal | None: ...
    @property
    def max_orders_per_s(self) -> int: ...
    @property
    def price_collar_ppm(self) -> int | None: ...
    @property
    def max_quote_age_s(self) -> float: ...
    @property
    def allowed_symbols(self) -> tuple[str, ...]: ...
    @property
    def starting_equity(self) -> Decimal: ...


def check_grid(
    request: OrderRequest, instrument: Instrument | None, limits: Limits
) -> Instrument:
    """Return the instrument if `request` is one that its venue can take at all.

    Raises:
        OrderDeniedError: With the code of the first rule broken.
    """
    if limits.allowed_symbols and request.symbol not in limits.allowed_symbols:
        raise OrderDeniedError(
            "SYMBOL_NOT_ALLOWED",
            f"symbol {request.symbol!r} is not in `risk.allowed_symbols`",
        )
    if instrument is None:
        raise OrderDeniedError(
            "UNKNOWN_INSTRUMENT",
            f"venue {request.venue!r} lists no instrument {request.symbol!r}",
        )
    _check_quantity(request.quantity, instrument)
    if request.type in _WITH_PRICE:
        _check_price("price", request.price, instrument)
    if request.type in _WITH_TRIGGER:
        _check_price("trigger price", request.trigger_price, instrument)
    return instrument


def _check_quantity(quantity: Decimal, instrument: Instrument) -> None:
    if not quantity.is_finite():
        raise OrderDeniedError(
            "QUANTITY_NOT_ON_LOT", f"quantity {quantity} is no number"
        )
    if quantity < instrument.min_quantity or quantity <= 0:
        raise OrderDeniedError(
            "QUANTITY_BELOW_MINIMUM",
            f"quantity {quantity} is below minimum {instrument.min_quantity}",
        )
    if quantity > instrument.max_quantity:
        raise OrderDeniedError(
            "QUANTITY_EXCEEDS_MAXIMUM",
            f"quantity {quantity} exceeds maximum {instrument.max_quantity}",
        )
    if not _is_multiple(quantity, instrument.lot_size):
        raise OrderDeniedError(
            "QUANTITY_NOT_ON_LOT",
            f"quantity {quantity} is no multiple of lot {instrument.lot_size}",
        )


def _check_price(name: str, price: Decimal | None, instrument: Instrument) -> None:
    if price is None or not price.is_finite() or price <= 0:
        raise OrderDeniedError(
            "PRICE_MISSING", f"{name} is {price}, expected a number above 0"
        )
    if not _is_multiple(price, instrument.tick_size):
        raise OrderDeniedError(
            "PRICE_NOT_ON_TICK",
            f"{name} {price} is no multiple of tick {instrument.tick_size}",
        )


def _is_multiple(value: Decimal, step: Decimal) -> bool:
    try:
        return not value % step
    except InvalidOperation:  # more digits apart than decimal arithmetic keeps
        return False


def price_of(
    request: OrderRequest, quote: QuoteChanged | None, clock: Clock, limits: Limits
) -> Decimal | None:
    """Return the price at which `request` counts against limits: its own, or the touch for a market order.

    A SELL below the bid is executed at the bid, so it counts at that.
    A reduce-only order may go without any price: a missing quote must not keep a desk from closing. Every
    other order needs a fresh quote, to be valued or to be held against the collar.

    Raises:
        OrderDeniedError: NO_PRICE.
    """
    own = request.price if request.type in _WITH_PRICE else request.trigger_price
    if own is not None and quote is not None and request.side is Side.SELL:
        own = max(own, quote.bid)
    if own is not None and limits.price_collar_ppm is None:
        return own
    problem = _quote_problem(quote, clock, limits)
    if problem and not request.reduce_only:
        raise OrderDeniedError(
            "NO_PRICE", f"{request.symbol}@{request.venue} {problem}"
        )
    if own is not None or quote is None:
        return own
    return quote.ask if request.side is Side.BUY else quote.bid


def _quote_problem(quote: QuoteChanged | None, clock: Clock, limits: Limits) -> str:
    if quote is None or quote.bid <= 0 or quote.ask <= 0:
        return "has no two-sided quote"
    age_ns = clock.now_ns() - quote.ts_received_ns
    if age_ns > limits.max_quote_age_s * 1e9:
        return f"has a quote that is {age_ns / 1e9:.1f} s old, limit {limits.max_quote_age_s} s"
    return ""


def check_value(
    request: OrderRequest,
    price: Decimal,
    instrument: Instrument,
    quote: QuoteChanged | None,
    limits: Limits,
) -> Decimal:
    """Return the notional of `request` if it lies between the bounds and its price inside the collar.

    Raises:
        OrderDeniedError: NOTIONAL_BELOW_MINIMUM, NOTIONAL_EXCEEDS_MAX_PER_ORDER, PRICE_OUTSIDE_COLLAR.
    """
    notional = request.quantity * price
    stated = request.price or request.trigger_price or price  # the venue goes by these
    own = request.quantity * stated
    if own < instrument.min_notional:
        raise OrderDeniedError(
            "NOTIONAL_BELOW_MINIMUM",
            f"notional {own} is below minimum {instrument.min_notional}",
        )
    most = limits.max_notional_per_order
    if most is not None and notional > most and not request.reduce_only:
        raise OrderDeniedError(
            "NOTIONAL_EXCEEDS_MAX_PER_ORDER",
            f"notional {notional} exceeds limit {most}",
        )
    if (
        limits.price_collar_ppm is not None
        and quote is not None
        and request.type in _WITH_PRICE
    ):
        _check_collar(request, quote, limits.price_collar_ppm)
    return notional


def _check_collar(request: OrderRequest, quote: QuoteChanged, collar_ppm: int) -> None:
    """Only the side that would pay too much is bounded: a patient order far from the market costs nothing."""
    assert request.price is not None
    if request.side is Side.BUY:
        bound = quote.ask * (1_000_000 + collar_ppm) / 1_000_000
        outside = request.price > bound
    else:
        bound = quote.bid * (1_000_000 - collar_ppm) / 1_000_000
        outside = request.price < bound
    if outside:
        raise OrderDeniedError(
            "PRICE_OUTSIDE_COLLAR",
            f"{request.side} price {request.price} is beyond {bound.normalize():f}, {collar_ppm} ppm from the market",
        )
