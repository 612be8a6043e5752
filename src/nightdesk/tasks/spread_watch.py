"""Learn how far the prices of one symbol usually lie apart on different venues.

Comes from: sources/
Goes to: model/context.py
"""

from itertools import permutations
from typing import ClassVar

import msgspec

from nightdesk.abc import Place, Task
from nightdesk.model.context import TaskContext
from nightdesk.model.events import Event, QuoteChanged
from nightdesk.model.priority import Priority
from nightdesk.tasks._execution import check, seconds
from nightdesk.tasks._histogram import Histogram
from nightdesk.tasks._legs import to_ppm

__all__ = ["SpreadWatchContext", "SpreadWatchTask"]


class SpreadWatchContext(TaskContext, kw_only=True):
    """What to compare, and what was learned.

    Attributes:
        symbol, venues: One symbol on two to eight venues.
        sample_s: Time between two samples.
        max_age_s: Older quotes are no sample: a silent venue has no spread.
        current_ppm: Newest sample by `A->B`: what buying on A and selling on B would earn before fees.
        quantiles_ppm: p50 to p99.9 of each.
        skipped: Samples without two fresh quotes.
    """

    symbol: str
    venues: tuple[str, ...]
    sample_s: float = 1.0
    max_age_s: float = 5.0
    samples: int = 0
    skipped: int = 0
    current_ppm: dict[str, int] = msgspec.field(default_factory=dict)
    quantiles_ppm: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)
    histograms: dict[str, Histogram] = msgspec.field(default_factory=dict)


class SpreadWatchTask(Task[SpreadWatchContext]):
    """The distribution of the spread between venues, in both directions.

    Its p99 is what an arbitrage should ask for at least: gaps below it are this market's noise.
    """

    context_class: ClassVar[type[TaskContext]] = SpreadWatchContext
    priority: ClassVar[Priority] = Priority.LOW
    runs_in: ClassVar[Place] = "background"
    listens: ClassVar[tuple[type[Event], ...]] = (QuoteChanged,)

    def __init__(self, context: SpreadWatchContext) -> None:
        super().__init__(context)
        c = context
        check(
            f"SpreadWatchTask {c.task_id!r}",
            {
                "symbol": ("/" in c.symbol, c.symbol, "a pair such as BTC/USDT"),
                "venues": (
                    2 <= len(set(c.venues)) == len(c.venues) <= 8,
                    c.venues,
                    "two to eight different venues",
                ),
                "sample_s": (c.sample_s > 0, c.sample_s, "more than 0"),
                "max_age_s": (c.max_age_s > 0, c.max_age_s, "more than 0"),
            },
        )
        self._quotes: dict[str, QuoteChanged] = {}
        self._due_ns = 0

    def wants(self, event: Event) -> bool:
        """Keep the newest quote of each venue; a sample is taken by the clock, not by the feed."""
        if (
            isinstance(event, QuoteChanged)
            and event.symbol == self.context.symbol
            and event.venue in self.context.venues
        ):
            self._quotes[event.venue] = event
        return False

    async def _handle_executing(self) -> None:
        now = self.desk.clock.now_ns()
        if (
            now >= self._due_ns
        ):  # a step for another reason must not weigh this moment twice
            self._due_ns = now + seconds(self.context.sample_s)
            self._sample(now)
        self.wait((self._due_ns - now) / 1e9)

    def _sample(self, now: int) -> None:
        c = self.context
        oldest = now - seconds(c.max_age_s)
        fresh = [
            quote
            for venue in c.venues
            if (quote := self._quotes.get(venue)) is not None
            and quote.ts_received_ns >= oldest
            and quote.ask > 0
        ]
        if len(fresh) < 2:
            self.evolve_context(skipped=c.skipped + 1)
            return
        histograms = dict(c.histograms)
        current = {}
        for buy, sell in permutations(fresh, 2):
            name = f"{buy.venue}->{sell.venue}"
            current[name] = to_ppm((sell.bid - buy.ask) / buy.ask)
            # A copy, so that contexts already handed over for saving never change.
            old = histograms.get(name, Histogram())
            histograms[name] = msgspec.structs.replace(old, buckets=dict(old.buckets))
            histograms[name].add(current[name])
        self.evolve_context(
            samples=c.samples + 1,
            current_ppm=current,
            histograms=histograms,
            quantiles_ppm={name: h.quantiles() for name, h in histograms.items()},
        )
