"""A signal: an opinion about an instrument, never an order."""

from decimal import Decimal

import msgspec

from nightdesk.model.order import Side

__all__ = ["TradeSignal"]


class TradeSignal(msgspec.Struct, frozen=True, kw_only=True):
    """`strength` runs from 0 to 1. Prices are proposals; size never comes from a signal (S-10)."""

    symbol: str
    side: Side
    strength: float
    source: str
    entry_price: Decimal | None = None
    stop_loss: Decimal | None = None
    take_profit: Decimal | None = None
    ts_event_ns: int = 0
