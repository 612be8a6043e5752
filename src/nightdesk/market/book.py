"""A book from a snapshot and the changes after it, with proof that none is missing.

Comes from: sources/ (BookChanged)
Goes to: market/liquidity.py
"""

from collections import deque
from collections.abc import Iterable, Iterator
from decimal import Decimal

from sortedcontainers import SortedDict

from nightdesk.model.events import BookChanged
from nightdesk.model.order import Side

__all__ = ["Book", "Level"]

Level = tuple[Decimal, Decimal]
_NOTHING = Decimal(0)


class Book:
    """One instrument's price levels, usable only while `synchronised`.

    Changes that arrive before the snapshot wait for it (the oldest are dropped when the buffer is
    full). A change follows the last one when its `first_sequence` is not above the last sequence
    plus one; anything later is a gap: the levels are thrown away and the book waits for the next
    snapshot. Feeds without sequences send 0 and are taken as they come.

    Attributes:
        gaps: How often the proof failed.
    """

    def __init__(self, *, buffer: int = 10_000, depth: int = 10_000) -> None:
        self.synchronised = False
        self.sequence = 0
        self.gaps = 0
        self._depth = depth
        self._bids: SortedDict[Decimal, Decimal] = SortedDict()
        self._asks: SortedDict[Decimal, Decimal] = SortedDict()
        self._waiting: deque[BookChanged] = deque(maxlen=buffer)

    def apply(self, change: BookChanged) -> bool:
        """Take one message in; return whether the levels changed."""
        if change.is_snapshot:
            return self._load(change)
        if not self.synchronised:
            self._waiting.append(change)
            return False
        return self._follow(change)

    def best(self, side: Side) -> Level | None:
        """Return the best bid (BUY) or ask (SELL), or None where nothing is known."""
        levels = self._side(side)
        if not levels:
            return None
        level: Level = levels.peekitem(-1 if side is Side.BUY else 0)
        return level

    def quantity(self, side: Side, price: Decimal) -> Decimal:
        """Return what stands at `price`, 0 if nothing."""
        shown: Decimal = self._side(side).get(price, _NOTHING)
        return shown

    def levels(self, side: Side, worse_than: Decimal | None = None) -> Iterator[Level]:
        """Yield levels from the best to the worst, only those beyond `worse_than` if given."""
        levels = self._side(side)
        if side is Side.BUY:
            prices = levels.irange(
                maximum=worse_than, inclusive=(True, False), reverse=True
            )
        else:
            prices = levels.irange(minimum=worse_than, inclusive=(False, True))
        for price in prices:
            yield price, levels[price]

    def _side(self, side: Side) -> "SortedDict[Decimal, Decimal]":
        return self._bids if side is Side.BUY else self._asks

    def _load(self, snapshot: BookChanged) -> bool:
        if self.synchronised and 0 < snapshot.last_sequence < self.sequence:
            return False  # older than what the changes have already built
        self._bids.clear()
        self._asks.clear()
        self._put(snapshot)
        self.sequence = snapshot.last_sequence
        self.synchronised = True
        waiting, self._waiting = self._waiting, deque(maxlen=self._waiting.maxlen)
        for change in waiting:
            self.apply(change)
        return self.synchronised

    def _follow(self, change: BookChanged) -> bool:
        if change.last_sequence:
            if change.last_sequence <= self.sequence:
                return False
            if change.first_sequence > self.sequence + 1:
                self._lose(change)
                return False
            self.sequence = change.last_sequence
        self._put(change)
        return True

    def _lose(self, change: BookChanged) -> None:
        self.gaps += 1
        self.synchronised = False
        self._bids.clear()
        self._asks.clear()
        self._waiting.append(change)

    def _put(self, change: BookChanged) -> None:
        _merge(self._bids, change.bids)
        _merge(self._asks, change.asks)
        while len(self._bids) > self._depth:
            self._bids.popitem(0)
        while len(self._asks) > self._depth:
            self._asks.popitem(-1)


def _merge(levels: "SortedDict[Decimal, Decimal]", changes: Iterable[Level]) -> None:
    for price, quantity in changes:
        if quantity:
            levels[price] = quantity
        else:
            levels.pop(price, None)
