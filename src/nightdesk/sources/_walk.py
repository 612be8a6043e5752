"""One simulated instrument: a price that wanders in whole ticks, with quotes and trades at each venue.

Prices and quantities are counted in ticks and lots, so that the same seed gives the same Decimals on
every machine; the normal distribution only decides how many ticks a step has.

Comes from: sources/simulated.py
Goes to: sources/simulated.py
"""

import math
import random
from collections.abc import Iterator, Sequence
from decimal import Decimal

import msgspec

from nightdesk.model.events import Event, QuoteChanged, TradePrinted
from nightdesk.model.order import Side

__all__ = ["MarketSpec", "Walk"]

_SECOND = 1_000_000_000
_HEARTBEAT_NS = _SECOND
_PULL = 0.002  # how strongly, per second, the price is drawn back to where it began


class MarketSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One simulated market.

    Attributes:
        price: Where it begins.
        volatility_ppm: Standard deviation of the price over one second.
        spread_ticks: Distance of ask and bid.
        quantity: Typical quantity of the best level, in base units.
        trades_per_s: Public trades at each venue.
    """

    price: Decimal
    tick_size: Decimal = Decimal("0.01")
    lot_size: Decimal = Decimal("0.001")
    volatility_ppm: Decimal = Decimal(25)
    spread_ticks: int = 2
    quantity: Decimal = Decimal("0.5")
    trades_per_s: float = 4.0


class _Post:
    """What one venue shows of the market."""

    __slots__ = (
        "ask_lots",
        "bid_lots",
        "bid_ticks",
        "quoted_ns",
        "trade_number",
        "venue",
    )

    def __init__(self, venue: str) -> None:
        self.venue = venue
        self.bid_ticks = 0
        self.bid_lots = 0
        self.ask_lots = 0
        self.quoted_ns = 0
        self.trade_number = 0


class Walk:
    """Steps one market; the last venue drifts away from the others for the length of a gap."""

    def __init__(
        self,
        symbol: str,
        spec: MarketSpec,
        venues: Sequence[str],
        random: random.Random,
    ) -> None:
        self.symbol = symbol
        self._spec = spec
        self._random = random
        self._home = int(spec.price / spec.tick_size)
        self._fair = self._home
        self._lots = max(2, int(spec.quantity / spec.lot_size))
        self._posts = [_Post(venue) for venue in venues]
        self._gap_ticks = 0
        self._gap_until_ns = 0

    def open_gap(self, gap_ppm: int, until_ns: int) -> None:
        """Let the last venue stand `gap_ppm` above or below the others until `until_ns`."""
        sign = self._random.choice((-1, 1))
        self._gap_ticks = sign * max(1, self._fair * gap_ppm // 1_000_000)
        self._gap_until_ns = until_ns

    def step(self, now_ns: int, elapsed_s: float) -> Iterator[Event]:
        """Yield what happens until `now_ns`: trades at the standing quotes, then the new quotes."""
        for post in self._posts:
            if (
                post.quoted_ns
                and self._random.random() < self._spec.trades_per_s * elapsed_s
            ):
                yield from self._trade(post, now_ns)
        self._move(elapsed_s)
        if self._gap_ticks and now_ns >= self._gap_until_ns:
            self._gap_ticks = 0
        for number, post in enumerate(self._posts):
            drift = self._gap_ticks if number and number == len(self._posts) - 1 else 0
            yield from self._quote(post, now_ns, max(1, self._fair + drift))

    def _move(self, elapsed_s: float) -> None:
        if self._random.random() < 0.5:
            return  # markets stand still more often than a normal distribution does
        sigma = (
            self._fair
            * float(self._spec.volatility_ppm)
            / 1e6
            * math.sqrt(2 * elapsed_s)
        )
        pull = (self._home - self._fair) * _PULL * elapsed_s
        self._fair = max(10, self._fair + round(self._random.gauss(pull, sigma)))

    def _trade(self, post: _Post, now_ns: int) -> Iterator[Event]:
        side = self._random.choice((Side.BUY, Side.SELL))
        standing = post.ask_lots if side is Side.BUY else post.bid_lots
        lots = min(standing, self._random.randint(1, self._lots))
        if lots <= 0:
            return
        ticks = post.bid_ticks + (self._spec.spread_ticks if side is Side.BUY else 0)
        if side is Side.BUY:
            post.ask_lots -= lots
        else:
            post.bid_lots -= lots
        post.trade_number += 1
        yield TradePrinted(
            symbol=self.symbol,
            venue=post.venue,
            price=ticks * self._spec.tick_size,
            quantity=lots * self._spec.lot_size,
            side=side,
            trade_id=f"{now_ns // 1_000_000}-{post.trade_number}",
            ts_event_ns=now_ns,
            ts_received_ns=now_ns,
        )
        if post.ask_lots and post.bid_lots:
            yield self._show(post, now_ns)

    def _quote(self, post: _Post, now_ns: int, fair: int) -> Iterator[Event]:
        bid_ticks = fair - self._spec.spread_ticks // 2
        is_due = now_ns - post.quoted_ns >= _HEARTBEAT_NS
        if bid_ticks != post.bid_ticks or not post.bid_lots or not post.ask_lots:
            post.bid_ticks = bid_ticks
            post.bid_lots = self._some_lots()
            post.ask_lots = self._some_lots()
        elif self._random.random() < 0.2:
            post.bid_lots = self._some_lots()
        elif not is_due:
            return
        yield self._show(post, now_ns)

    def _show(self, post: _Post, now_ns: int) -> QuoteChanged:
        post.quoted_ns = now_ns
        tick, lot = self._spec.tick_size, self._spec.lot_size
        return QuoteChanged(
            symbol=self.symbol,
            venue=post.venue,
            bid=post.bid_ticks * tick,
            bid_quantity=post.bid_lots * lot,
            ask=(post.bid_ticks + self._spec.spread_ticks) * tick,
            ask_quantity=post.ask_lots * lot,
            ts_event_ns=now_ns,
            ts_received_ns=now_ns,
        )

    def _some_lots(self) -> int:
        return self._random.randint(max(1, self._lots // 5), 2 * self._lots)
