"""Orders and fills. One `Order` is the whole story of one request to a venue."""

from decimal import Decimal
from enum import StrEnum

import msgspec

__all__ = [
    "Fill",
    "Liquidity",
    "Order",
    "OrderRequest",
    "OrderStatus",
    "OrderType",
    "Side",
    "TimeInForce",
    "VenueOrder",
]


class Side(StrEnum):
    BUY = "BUY"
    SELL = "SELL"

    @property
    def opposite(self) -> "Side":
        return Side.SELL if self is Side.BUY else Side.BUY

    @property
    def sign(self) -> int:
        """+1 for BUY, -1 for SELL."""
        return 1 if self is Side.BUY else -1


class OrderType(StrEnum):
    MARKET = "MARKET"
    LIMIT = "LIMIT"
    STOP_MARKET = "STOP_MARKET"
    STOP_LIMIT = "STOP_LIMIT"
    TRAILING_STOP_MARKET = "TRAILING_STOP_MARKET"


class TimeInForce(StrEnum):
    GTC = "GTC"
    IOC = "IOC"
    FOK = "FOK"
    GTD = "GTD"


class Liquidity(StrEnum):
    MAKER = "MAKER"
    TAKER = "TAKER"


class OrderStatus(StrEnum):
    """Where an order stands. `UNKNOWN`: sent, and no source has yet proved what became of it."""

    INITIALIZED = "INITIALIZED"
    DENIED = "DENIED"
    SUBMITTED = "SUBMITTED"
    UNKNOWN = "UNKNOWN"
    ACCEPTED = "ACCEPTED"
    REJECTED = "REJECTED"
    PENDING_CANCEL = "PENDING_CANCEL"
    PARTIALLY_FILLED = "PARTIALLY_FILLED"
    FILLED = "FILLED"
    CANCELED = "CANCELED"
    EXPIRED = "EXPIRED"

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL

    @property
    def is_open(self) -> bool:
        """Sent or about to be, and possibly alive at the venue. UNKNOWN counts: it may be working."""
        return self not in _TERMINAL


_TERMINAL = frozenset(
    {
        OrderStatus.DENIED,
        OrderStatus.REJECTED,
        OrderStatus.FILLED,
        OrderStatus.CANCELED,
        OrderStatus.EXPIRED,
    }
)


class OrderRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a task asks for. The desk adds identity and makes it an `Order`.

    Attributes:
        price: Limit price in quote units; None for a market order.
        trigger_price: For stop orders.
        expire_ns: For GTD: the venue cancels the rest at this instant (UTC nanoseconds).
        parent: Client order id of the order that this one replaces or hedges.
    """

    symbol: str
    venue: str
    side: Side
    quantity: Decimal
    type: OrderType = OrderType.LIMIT
    price: Decimal | None = None
    trigger_price: Decimal | None = None
    time_in_force: TimeInForce = TimeInForce.GTC
    post_only: bool = False
    reduce_only: bool = False
    expire_ns: int | None = None
    parent: str | None = None


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One order from intent to final proof. The ledger replaces it by a newer value at each event.

    Attributes:
        client_order_id: Ours, unique for ever, sent with the order (R-1).
        task_id: Who asked.
        attempt: 0, or which replacement of `request.parent` this is.
        filled_quantity, average_price: Sum and weighted mean of the booked fills.
        fees: Fee asset to sum of fees, e.g. `{"USDT": Decimal("0.02")}`.
        reason: Why it was denied, rejected, cancelled or is unknown.
    """

    client_order_id: str
    task_id: str
    request: OrderRequest
    status: OrderStatus = OrderStatus.INITIALIZED
    venue_order_id: str | None = None
    attempt: int = 0
    filled_quantity: Decimal = Decimal(0)
    average_price: Decimal | None = None
    fees: dict[str, Decimal] = {}
    reason: str | None = None
    created_ns: int = 0
    updated_ns: int = 0

    @property
    def remaining_quantity(self) -> Decimal:
        return self.request.quantity - self.filled_quantity

    @property
    def working_quantity(self) -> Decimal:
        """What the venue might still execute: the remainder while open, else zero."""
        return self.remaining_quantity if self.status.is_open else Decimal(0)


class Fill(msgspec.Struct, frozen=True, kw_only=True):
    """One execution. `key` identifies it for ever, whoever reports it (R-7)."""

    venue: str
    symbol: str
    trade_id: str
    venue_order_id: str
    client_order_id: str
    side: Side
    quantity: Decimal
    price: Decimal
    fee: Decimal = Decimal(0)
    fee_asset: str = ""
    liquidity: Liquidity = Liquidity.TAKER
    ts_event_ns: int = 0

    @property
    def key(self) -> str:
        return f"{self.venue}|{self.symbol}|{self.trade_id}|{self.venue_order_id}"


class VenueOrder(msgspec.Struct, frozen=True, kw_only=True):
    """An order as the venue itself reports it, ours or not."""

    venue: str
    symbol: str
    venue_order_id: str
    client_order_id: str
    side: Side
    type: OrderType
    quantity: Decimal
    price: Decimal | None
    status: OrderStatus
    filled_quantity: Decimal
    average_price: Decimal | None = None
    reason: str | None = None
    ts_event_ns: int = 0
