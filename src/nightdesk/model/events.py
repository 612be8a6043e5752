"""Events: what happened, as past participles. All enter the desk by `kernel/inbox.py`.

Every event has `ts_event_ns` (when it happened, by the sender's clock) and
`ts_received_ns` (when its last byte reached us, by ours); both are UTC
nanoseconds and 0 when unknown. The difference may be negative on real feeds.
"""

from decimal import Decimal
from typing import Any

import msgspec

from nightdesk.model.order import Fill, Side

__all__ = [
    "BookChanged",
    "CancelRejected",
    "CandleClosed",
    "CommandReceived",
    "Event",
    "FeedStalled",
    "Opportunity",
    "OrderAccepted",
    "OrderCanceled",
    "OrderDenied",
    "OrderEvent",
    "OrderExpired",
    "OrderFilled",
    "OrderRejected",
    "OrderUnknown",
    "PoolSwap",
    "QuoteChanged",
    "TradePrinted",
    "TradingStateChanged",
]


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, gc=False):
    ts_event_ns: int = 0
    ts_received_ns: int = 0

    @property
    def duplicate_key(self) -> str | None:
        """Durable identity: a second event with the same key is dropped. None: never a duplicate."""
        return None

    @property
    def conflation_key(self) -> str | None:
        """Waiting events with the same key are replaced by the newest. None: every one counts."""
        return None


class QuoteChanged(Event, frozen=True, kw_only=True, gc=False):
    """Best bid and ask of one instrument."""

    symbol: str
    venue: str
    bid: Decimal
    bid_quantity: Decimal
    ask: Decimal
    ask_quantity: Decimal

    @property
    def conflation_key(self) -> str | None:
        return f"quote|{self.symbol}@{self.venue}"


class TradePrinted(Event, frozen=True, kw_only=True, gc=False):
    """A public trade. `side` is the aggressor's."""

    symbol: str
    venue: str
    price: Decimal
    quantity: Decimal
    side: Side
    trade_id: str


class BookChanged(Event, frozen=True, kw_only=True):
    """Levels of a book, `(price, quantity)`; quantity 0 removes the level.

    `is_snapshot` replaces the book. `first_sequence..last_sequence` prove that nothing is missing.
    """

    symbol: str
    venue: str
    bids: list[tuple[Decimal, Decimal]]
    asks: list[tuple[Decimal, Decimal]]
    first_sequence: int = 0
    last_sequence: int = 0
    is_snapshot: bool = False


class CandleClosed(Event, frozen=True, kw_only=True, gc=False):
    """A finished bar. `ts_open_ns` is its first instant; volumes in base units."""

    symbol: str
    venue: str
    timeframe: str
    ts_open_ns: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal


class PoolSwap(Event, frozen=True, kw_only=True, gc=False):
    """A swap seen in a pool of an automated market maker."""

    chain: str
    pool: str
    pair: str
    transaction_hash: str
    log_index: int
    price_impact_ppm: int
    value_usd: Decimal
    price: Decimal
    liquidity_usd: Decimal = Decimal(0)
    is_confirmed: bool = False

    @property
    def duplicate_key(self) -> str | None:
        return f"{self.chain}|{self.transaction_hash}|{self.log_index}|{int(self.is_confirmed)}"


class FeedStalled(Event, frozen=True, kw_only=True, gc=False):
    """A source has been silent for longer than it may."""

    source: str
    silent_s: float


class Opportunity(Event, frozen=True, kw_only=True):
    """What makes the switch act: a cause, worth `edge_ppm` of its notional, until `deadline_ns`."""

    handler: str
    edge_ppm: int
    deadline_ns: int
    cause: Event
    details: dict[str, Any] = {}


class OrderEvent(Event, frozen=True, kw_only=True, gc=False):
    """Something that happened to one order of ours."""

    venue: str
    symbol: str
    client_order_id: str
    venue_order_id: str | None = None


class OrderDenied(OrderEvent, frozen=True, kw_only=True, gc=False):
    """Refused by our own gate: never sent. `code` is one of T-24."""

    code: str
    reason: str


class OrderAccepted(OrderEvent, frozen=True, kw_only=True, gc=False):
    """The venue holds it as a working order."""


class OrderRejected(OrderEvent, frozen=True, kw_only=True, gc=False):
    """The venue proved that it did not accept the order."""

    code: str
    reason: str


class OrderUnknown(OrderEvent, frozen=True, kw_only=True, gc=False):
    """Sent, and the reply proves nothing. Being resolved (R-5)."""

    reason: str


class OrderFilled(OrderEvent, frozen=True, kw_only=True, gc=False):
    fill: Fill


class OrderCanceled(OrderEvent, frozen=True, kw_only=True, gc=False):
    """Terminal. `filled_quantity` is the venue's own total, so that a missed fill shows."""

    filled_quantity: Decimal
    reason: str = ""


class OrderExpired(OrderEvent, frozen=True, kw_only=True, gc=False):
    filled_quantity: Decimal
    reason: str = ""


class CancelRejected(OrderEvent, frozen=True, kw_only=True, gc=False):
    """A cancel was refused: the order is usually filled or gone. Never assumed cancelled."""

    reason: str


class TradingStateChanged(Event, frozen=True, kw_only=True, gc=False):
    """The risk gate moved between ACTIVE, REDUCING and HALTED."""

    state: str
    reason: str
    actor: str


class CommandReceived(Event, frozen=True, kw_only=True):
    """An operator's command, as it came through the control socket."""

    verb: str
    arguments: dict[str, Any]
    actor: str
    reason: str = ""
