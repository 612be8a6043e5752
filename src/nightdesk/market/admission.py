"""Why the paper exchange would refuse an order: one question after the other, each with a code of its own.

Comes from: market/matching.py
Goes to: market/matching.py
"""

from decimal import Decimal
from typing import Any

from nightdesk.market.accounts import Accounts
from nightdesk.market.liquidity import ShownMarket
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import OrderRequest, OrderType, Side, TimeInForce

__all__ = ["lock_rate", "refusal", "short_of_funds", "terms"]

Refusal = tuple[str, str]
_NOTHING = Decimal(0)
_LIMITS = frozenset({OrderType.LIMIT, OrderType.STOP_LIMIT})
_NEED_A_MARKET = frozenset({OrderType.MARKET, OrderType.TRAILING_STOP_MARKET})
_STOPS = frozenset(
    {OrderType.STOP_MARKET, OrderType.STOP_LIMIT, OrderType.TRAILING_STOP_MARKET}
)


def refusal(
    ts_ns: int,
    request: OrderRequest,
    instrument: Instrument,
    shown: ShownMarket,
    is_fresh: bool,
) -> Refusal | None:
    """Return `(code, reason)` if the venue refuses `request` by its own rules, else None. Funds come later."""
    return (
        _wrong_shape(ts_ns, request)
        or _off_grid(request, instrument)
        or _against_the_market(request, shown, is_fresh)
        or _too_small(request, instrument, shown)
    )


def lock_rate(
    request: OrderRequest, instrument: Instrument, shown: ShownMarket
) -> Decimal:
    """Return what one unit of `request` sets aside: base for a SELL, quote with fee for a BUY."""
    if request.side is Side.SELL:
        return Decimal(1)
    price = _expected_price(request, shown)
    fee = (
        max(instrument.maker_fee, instrument.taker_fee, _NOTHING)
        if instrument.fee_in == "quote"
        else _NOTHING
    )
    return price * (1 + fee)


def short_of_funds(
    request: OrderRequest,
    instrument: Instrument,
    rate: Decimal,
    account: str,
    accounts: Accounts,
) -> Refusal | None:
    """Return the refusal if `account` has less free than `request` would lock."""
    asset = instrument.quote if request.side is Side.BUY else instrument.base
    needed, free = rate * request.quantity, accounts.free(account, asset)
    if needed > free:
        return "INSUFFICIENT_BALANCE", f"needs {needed} {asset}, {free} are free"
    return None


def terms(request: OrderRequest, shown: ShownMarket) -> dict[str, Any]:
    """Return what the venue writes down of an admitted request."""
    kind = request.type
    trail = None
    if kind is OrderType.TRAILING_STOP_MARKET:
        best = shown.best(request.side.opposite)
        assert best is not None and request.trigger_price is not None, "refused before"
        trail = abs(best - request.trigger_price)
    is_gtd = request.time_in_force is TimeInForce.GTD
    return {
        "symbol": request.symbol,
        "side": request.side,
        "type": kind,
        "quantity": request.quantity,
        "price": request.price if kind in _LIMITS else None,
        "trigger_price": request.trigger_price if kind in _STOPS else None,
        "trail": trail,
        "time_in_force": request.time_in_force,
        "post_only": request.post_only,
        "reduce_only": request.reduce_only,
        "expire_ns": request.expire_ns if is_gtd else None,
    }


def _wrong_shape(ts_ns: int, request: OrderRequest) -> Refusal | None:
    if request.type in _LIMITS and (request.price is None or request.price <= 0):
        return (
            "PRICE_MISSING",
            f"a {request.type} order needs a price above 0, found {request.price}",
        )
    if request.type in _STOPS and (
        request.trigger_price is None or request.trigger_price <= 0
    ):
        return (
            "TRIGGER_PRICE_MISSING",
            f"a {request.type} order needs a trigger price above 0",
        )
    if request.post_only and (
        request.type is not OrderType.LIMIT
        or request.time_in_force in (TimeInForce.IOC, TimeInForce.FOK)
    ):
        return (
            "POST_ONLY_NOT_POSSIBLE",
            "post-only goes with a LIMIT order that may rest",
        )
    if request.time_in_force is TimeInForce.GTD:
        if request.expire_ns is None:
            return "EXPIRY_MISSING", "a GTD order needs `expire_ns`"
        if request.expire_ns <= ts_ns:
            return (
                "EXPIRY_IN_PAST",
                f"`expire_ns` {request.expire_ns} is not after {ts_ns}",
            )
    return None


def _off_grid(request: OrderRequest, instrument: Instrument) -> Refusal | None:
    quantity = request.quantity
    if quantity < instrument.min_quantity or quantity <= 0:
        return (
            "QUANTITY_BELOW_MINIMUM",
            f"quantity {quantity} is below {instrument.min_quantity}",
        )
    if quantity > instrument.max_quantity:
        return (
            "QUANTITY_ABOVE_MAXIMUM",
            f"quantity {quantity} is above {instrument.max_quantity}",
        )
    if quantity % instrument.lot_size:
        return (
            "QUANTITY_NOT_ON_LOT",
            f"quantity {quantity} is no multiple of {instrument.lot_size}",
        )
    for price in (request.price, request.trigger_price):
        if price is not None and price % instrument.tick_size:
            return (
                "PRICE_NOT_ON_TICK",
                f"price {price} is no multiple of {instrument.tick_size}",
            )
    return None


def _against_the_market(
    request: OrderRequest, shown: ShownMarket, is_fresh: bool
) -> Refusal | None:
    best = shown.best(request.side.opposite) if is_fresh else None
    sign = request.side.sign
    if best is None:
        if request.post_only or request.type in _NEED_A_MARKET:
            return (
                "NO_MARKET",
                f"no fresh {request.side.opposite} quote of {request.symbol}",
            )
        return None
    price, trigger = request.price, request.trigger_price
    if request.post_only and price is not None and (price - best) * sign >= 0:
        return "POST_ONLY_WOULD_TAKE", f"{request.side} at {price} would meet {best}"
    if request.type in _STOPS and trigger is not None and (best - trigger) * sign >= 0:
        return (
            "STOP_WOULD_TRIGGER",
            f"{request.side} stop {trigger} is already met by {best}",
        )
    return None


def _too_small(
    request: OrderRequest, instrument: Instrument, shown: ShownMarket
) -> Refusal | None:
    if request.reduce_only:
        return None  # what is left of a position may always be closed
    notional = request.quantity * _expected_price(request, shown)
    if notional < instrument.min_notional:
        return (
            "NOTIONAL_BELOW_MINIMUM",
            f"notional {notional} is below {instrument.min_notional}",
        )
    return None


def _expected_price(request: OrderRequest, shown: ShownMarket) -> Decimal:
    price = request.price or request.trigger_price or shown.best(request.side.opposite)
    assert price is not None, "an order without any price was refused before"
    return price
