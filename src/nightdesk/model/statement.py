"""A venue's own statement: one row per thing that happened there, in order, and nothing else is its truth.

Comes from: market/matching.py
Goes to: venues/_statement.py
"""

from decimal import Decimal

import msgspec

from nightdesk.model.order import Fill, OrderStatus, OrderType, Side, TimeInForce

__all__ = [
    "CancelRefused",
    "Deposited",
    "Ended",
    "Placed",
    "Refused",
    "StatementRow",
    "Traded",
    "TriggerMoved",
    "Triggered",
]


class _Row(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    gc=False,
    tag_field="row",
    omit_defaults=True,
):
    """`sequence` counts the rows of one statement from 1 without a gap; `ts_ns` is the venue's clock."""

    sequence: int
    ts_ns: int
    account: str = "main"


class Deposited(_Row, frozen=True, kw_only=True, gc=False, tag="deposited"):
    asset: str
    quantity: Decimal


class Placed(_Row, frozen=True, kw_only=True, gc=False, tag="placed"):
    """An order was accepted.

    Attributes:
        trail: Distance that a trailing stop keeps from the market.
        lock_rate: Money (BUY) or base (SELL) set aside per unit that is still open.
    """

    venue_order_id: str
    client_order_id: str
    symbol: str
    side: Side
    type: OrderType
    quantity: Decimal
    price: Decimal | None = None
    trigger_price: Decimal | None = None
    trail: Decimal | None = None
    time_in_force: TimeInForce = TimeInForce.GTC
    post_only: bool = False
    reduce_only: bool = False
    expire_ns: int | None = None
    lock_rate: Decimal = Decimal(0)


class Refused(_Row, frozen=True, kw_only=True, gc=False, tag="refused"):
    """A request was answered with proof that no order came of it."""

    client_order_id: str
    symbol: str
    code: str
    reason: str


class Traded(_Row, frozen=True, kw_only=True, gc=False, tag="traded"):
    fill: Fill


class Triggered(_Row, frozen=True, kw_only=True, gc=False, tag="triggered"):
    """A stop order became a market or limit order."""

    venue_order_id: str


class TriggerMoved(_Row, frozen=True, kw_only=True, gc=False, tag="trigger_moved"):
    """A trailing stop followed the market."""

    venue_order_id: str
    trigger_price: Decimal


class Ended(_Row, frozen=True, kw_only=True, gc=False, tag="ended"):
    """An order was cancelled or expired with `filled_quantity` executed. Full fills need no such row."""

    venue_order_id: str
    client_order_id: str
    symbol: str
    status: OrderStatus
    filled_quantity: Decimal
    reason: str = ""


class CancelRefused(_Row, frozen=True, kw_only=True, gc=False, tag="cancel_refused"):
    client_order_id: str
    symbol: str
    code: str
    reason: str


StatementRow = (
    Deposited
    | Placed
    | Refused
    | Traded
    | Triggered
    | TriggerMoved
    | Ended
    | CancelRefused
)
