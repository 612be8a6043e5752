"""What the feed shows of one instrument, less what our own orders have taken of it.

Comes from: market/book.py, sources/ (QuoteChanged, BookChanged)
Goes to: market/matching.py
"""

from collections.abc import Iterator
from decimal import Decimal

from nightdesk.market.book import Book, Level
from nightdesk.model.events import BookChanged, QuoteChanged
from nightdesk.model.order import Side

__all__ = ["ShownMarket"]

_NOTHING = Decimal(0)
_MAX_TAKEN = 1_000


class ShownMarket:
    """The other people's orders, as far as the feed shows them.

    The quote is the best level wherever there is one, because it is the fresher stream; the book
    adds the levels beyond it. The feed cannot know what we took, so each level we took from keeps
    what is left of it: more shown adds the difference, less shown caps it, and a level that the
    market has left is forgotten. One shown unit is therefore given away at most once.
    """

    def __init__(self) -> None:
        self.book = Book()
        self.ts_ns: int | None = None
        self._quote: dict[Side, Level] = {}
        self._best: dict[
            Side, Level | None
        ] = {}  # of the quote; a side without quantity has none
        self._taken: dict[Side, dict[Decimal, list[Decimal]]] = {
            Side.BUY: {},
            Side.SELL: {},
        }

    def on_quote(self, ts_ns: int, quote: QuoteChanged) -> None:
        self.ts_ns = ts_ns
        self._quote = {
            Side.BUY: (quote.bid, quote.bid_quantity),
            Side.SELL: (quote.ask, quote.ask_quantity),
        }
        self._best = {
            side: level if level[1] > 0 else None for side, level in self._quote.items()
        }
        for side, taken in self._taken.items():
            if taken:
                self._refresh_best(side, taken)

    def on_book(self, ts_ns: int, change: BookChanged) -> bool:
        """Take a book message in; return whether anything usable changed."""
        if not self.book.apply(change):
            return False
        if not self._quote:
            self.ts_ns = ts_ns
        for side, taken in self._taken.items():
            if taken:
                self._refresh_deeper(side, taken)
        return True

    def best(self, side: Side) -> Decimal | None:
        """Return the best shown price of `side`, or None."""
        level = self._best_level(side)
        return level[0] if level else None

    def quantity(self, side: Side, price: Decimal) -> Decimal | None:
        """Return what is shown at `price` of `side`; None if the feed does not reach that far."""
        level = self._best_level(side)
        if level is None:
            return None
        if price == level[0]:
            return level[1]
        if (price - level[0]) * side.sign > 0:
            return _NOTHING
        return self.book.quantity(side, price) if self.book.synchronised else None

    def against(self, side: Side, limit: Decimal | None) -> Iterator[Level]:
        """Yield `(price, quantity)` that an order of `side` could take, best first, none beyond `limit`."""
        other = side.opposite
        for price, shown in self._levels(other):
            if limit is not None and (price - limit) * side.sign > 0:
                return
            left = self._left(other, price, shown)
            if left > 0:
                yield price, left

    def take(self, side: Side, price: Decimal, quantity: Decimal) -> None:
        """Remember that an order of `side` took `quantity` at `price`."""
        other = side.opposite
        taken = self._taken[other]
        if price in taken:
            taken[price][1] -= quantity
        else:
            shown = self.quantity(other, price) or _NOTHING
            taken[price] = [shown, shown - quantity]
            if len(taken) > _MAX_TAKEN:  # far from the market by now: forget the oldest
                del taken[next(iter(taken))]

    def _best_level(self, side: Side) -> Level | None:
        if self._best:
            return self._best[side]
        return self.book.best(side) if self.book.synchronised else None

    def _levels(self, side: Side) -> Iterator[Level]:
        best = self._best_level(side)
        if best is None:
            return
        yield best
        if self.book.synchronised:
            yield from self.book.levels(side, worse_than=best[0])

    def _left(self, side: Side, price: Decimal, shown: Decimal) -> Decimal:
        entry = self._taken[side].get(price)
        return shown if entry is None else entry[1]

    def _refresh_best(self, side: Side, taken: dict[Decimal, list[Decimal]]) -> None:
        best, shown = self._quote[side]
        for price in [price for price in taken if (price - best) * side.sign > 0]:
            del taken[price]  # the market has left this level
        if best in taken:
            _show(taken[best], shown)

    def _refresh_deeper(self, side: Side, taken: dict[Decimal, list[Decimal]]) -> None:
        quoted = self._quote[side][0] if self._quote else None
        for price in list(taken):
            if price == quoted:
                continue
            shown = self.book.quantity(side, price)
            if shown:
                _show(taken[price], shown)
            else:
                del taken[price]


def _show(entry: list[Decimal], shown: Decimal) -> None:
    before, left = entry
    entry[0] = shown
    entry[1] = left + shown - before if shown > before else min(left, shown)
