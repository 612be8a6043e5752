"""One instrument at the paper exchange: what the feed shows of it, and where our orders wait.

Comes from: market/matching.py
Goes to: market/liquidity.py, market/resting.py
"""

from nightdesk.market.liquidity import ShownMarket
from nightdesk.market.resting import Resting, Working
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Side

__all__ = ["Listing"]

_RECENT_TRADES = 1_000


class Listing:
    """One instrument: what the feed shows, and where our orders wait.

    Attributes:
        sleeping: Stop orders before their trigger.
        hungry: Market orders whose rest waits for more to be shown.
        eager: Limit orders at or beyond the other side: they arrived while the market was stale, or
            more was asked than was shown. They take the market as it is until it leaves them; at
            their own price they could trade outside of it.
    """

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self.shown = ShownMarket()
        self.buys, self.sells = Resting(Side.BUY), Resting(Side.SELL)
        self.sleeping: dict[str, Working] = {}
        self.hungry: dict[str, Working] = {}
        self.eager: dict[str, Working] = {}
        self.reducing: dict[str, Working] = {}
        self._recent_trades: dict[str, None] = {}

    @property
    def is_idle(self) -> bool:
        return not (self.sleeping or self.hungry or self.buys or self.sells)

    def resting(self, side: Side) -> Resting:
        return self.buys if side is Side.BUY else self.sells

    def is_fresh(self, now_ns: int, stale_after_ns: int) -> bool:
        return (
            self.shown.ts_ns is not None and now_ns - self.shown.ts_ns <= stale_after_ns
        )

    def is_repeated(self, trade_id: str) -> bool:
        """Return whether a public trade came before; feeds repeat some after a reconnect."""
        if trade_id in self._recent_trades:
            return True
        if trade_id:
            self._recent_trades[trade_id] = None
            if len(self._recent_trades) > _RECENT_TRADES:
                del self._recent_trades[next(iter(self._recent_trades))]
        return False

    def forget(self, order: Working) -> None:
        if order.price is not None:
            self.resting(order.side).remove(order)
        for place in (self.sleeping, self.hungry, self.eager, self.reducing):
            place.pop(order.venue_order_id, None)
