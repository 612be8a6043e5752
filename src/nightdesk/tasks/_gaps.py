"""What arbitrage looks for: gaps between two books, and swaps that moved a pool.

Comes from: tasks/arbitrage.py
Goes to: tasks/_legs.py
"""

from collections import OrderedDict
from collections.abc import Mapping
from decimal import Decimal

import msgspec

from nightdesk.model.events import PoolSwap, QuoteChanged
from nightdesk.model.instrument import Instrument
from nightdesk.tasks._execution import seconds
from nightdesk.tasks._legs import coarser_lot, net_edge, to_ppm

__all__ = ["Gap", "PoolRules", "RecentlySeen", "best_gap"]


class Gap(msgspec.Struct, frozen=True, gc=False):
    """Buy here, sell there: for `quantity` the prices hold, since that much is shown on both books."""

    buy: QuoteChanged
    sell: QuoteChanged
    quantity: Decimal
    edge: Decimal


def best_gap(
    quotes: Mapping[str, QuoteChanged],
    instruments: Mapping[str, Instrument],
    most: Decimal,
    least_edge: Decimal,
    max_age_s: float,
    now_ns: int,
) -> Gap | None:
    """Return the gap between the two venues of `quotes` that is worth at least `least_edge`, or None."""
    if len(quotes) < 2:
        return None
    one, other = quotes.values()
    oldest = now_ns - seconds(max_age_s)
    if one.ts_received_ns < oldest or other.ts_received_ns < oldest:
        return None
    for buy, sell in ((one, other), (other, one)):
        # One comparison answers nearly every quote: without crossed books there is no edge.
        if not 0 < buy.ask < sell.bid:
            continue
        at_buy, at_sell = instruments[buy.venue], instruments[sell.venue]
        edge = net_edge(buy.ask, at_buy.taker_fee, sell.bid, at_sell.taker_fee)
        if edge < least_edge:
            return None
        shown = min(most, buy.ask_quantity, sell.bid_quantity)
        quantity = coarser_lot(shown, at_buy, at_sell)
        legal = at_buy.is_tradable(quantity, buy.ask) and at_sell.is_tradable(
            quantity, sell.bid
        )
        return Gap(buy, sell, quantity, edge) if legal else None
    return None


class PoolRules(msgspec.Struct, frozen=True, kw_only=True):
    """When a swap counts: a bare price impact fires on most swaps of a thin pool.

    Attributes:
        pools: Verified pools, as `chain:address`; any case.
        pairs: Allowed pairs.
        costs_ppm: Fees, slippage and fixed cost of acting on it, per notional.
        least_edge_ppm: What must remain.
    """

    pools: frozenset[str]
    pairs: frozenset[str]
    min_impact_ppm: int
    min_liquidity_usd: Decimal
    min_value_usd: Decimal
    costs_ppm: int
    least_edge_ppm: int

    def judge(self, swap: PoolSwap) -> tuple[int, str | None]:
        """Return the net edge in ppm, and the reason to refuse or None."""
        impact = abs(swap.price_impact_ppm)
        edge = impact - self.costs_ppm
        if impact < self.min_impact_ppm:
            return edge, "impact_below_minimum"
        if f"{swap.chain}:{swap.pool}".lower() not in self.pools:
            return edge, "pool_not_verified"
        if swap.pair not in self.pairs:
            return edge, "pair_not_allowed"
        if swap.liquidity_usd < self.min_liquidity_usd:
            return edge, "liquidity_below_floor"
        if swap.value_usd < self.min_value_usd:
            return edge, "value_below_floor"
        if edge <= 0 or edge < self.least_edge_ppm:
            return edge, "edge_not_positive" if edge <= 0 else "edge_below_minimum"
        return edge, None

    @staticmethod
    def costs(*ratios: Decimal, fixed_usd: Decimal, trade_usd: Decimal) -> int:
        """Return the sum of `ratios` and of a fixed cost per trade, in ppm."""
        return sum(to_ppm(r) for r in ratios) + to_ppm(fixed_usd / trade_usd)


class RecentlySeen:
    """The newest keys, bounded: the oldest is forgotten first."""

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._keys: OrderedDict[str, None] = OrderedDict()

    def add(self, key: str) -> bool:
        """Return whether `key` is new."""
        if key in self._keys:
            return False
        self._keys[key] = None
        if len(self._keys) > self._most:
            self._keys.popitem(last=False)
        return True
