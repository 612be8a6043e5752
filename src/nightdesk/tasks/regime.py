"""Learn how restless each instrument usually is, and say when it is calmer or wilder than that.

Comes from: sources/, tasks/candles.py
Goes to: model/context.py
"""

import math
from collections import deque
from typing import ClassVar, Literal

import msgspec

from nightdesk.abc import Place, Task
from nightdesk.model.context import TaskContext
from nightdesk.model.events import CandleClosed, Event, QuoteChanged
from nightdesk.model.instrument import instrument_key
from nightdesk.model.priority import Priority
from nightdesk.tasks._execution import check
from nightdesk.tasks._histogram import Histogram

__all__ = ["RegimeContext", "RegimeTask", "Restlessness"]

MAX_WAITING = 4096


class Restlessness(msgspec.Struct):
    """What is known of one instrument.

    Attributes:
        variance: Exponentially weighted mean of squared returns per sample.
        volatility_ppm: Its root, in parts per million per sample.
        history: Distribution of past volatilities.
        regime: `learning`, `calm`, `normal` or `wild`.
        candidate, streak: A regime must be seen `confirm` times in a row before it counts.
    """

    price: float
    sampled_ns: int
    variance: float = 0.0
    samples: int = 0
    volatility_ppm: int = 0
    regime: str = "learning"
    candidate: str = "learning"
    streak: int = 0
    since_ns: int = 0
    history: Histogram = msgspec.field(default_factory=lambda: Histogram(limit=20_000))


class RegimeContext(TaskContext, kw_only=True):
    """How to sample, and what was learned.

    Attributes:
        source: `quotes` samples the middle price each `sample_s`; `candles` takes closes of `timeframe`.
        window: Samples over which the volatility is averaged (its centre of mass).
        warm_up: Samples before a regime is named.
        calm_below, wild_above: Shares of the own history.
        confirm: Samples in a row that must agree.
        changes: How often a regime changed.
    """

    source: Literal["quotes", "candles"] = "quotes"
    timeframe: str = "1m"
    sample_s: float = 5.0
    window: int = 20
    warm_up: int = 60
    calm_below: float = 0.25
    wild_above: float = 0.90
    confirm: int = 3
    max_instruments: int = 256
    instruments: dict[str, Restlessness] = msgspec.field(default_factory=dict)
    changes: int = 0


class RegimeTask(Task[RegimeContext]):
    """A volatility regime per instrument, judged by that instrument's own history.

    There is no fixed threshold to configure: what is wild for one pair is calm for another.
    """

    context_class: ClassVar[type[TaskContext]] = RegimeContext
    priority: ClassVar[Priority] = Priority.LOW
    runs_in: ClassVar[Place] = "background"
    listens: ClassVar[tuple[type[Event], ...]] = (QuoteChanged, CandleClosed)

    def __init__(self, context: RegimeContext) -> None:
        super().__init__(context)
        c = context
        check(
            f"RegimeTask {c.task_id!r}",
            {
                "sample_s": (c.sample_s > 0, c.sample_s, "more than 0"),
                "window": (c.window >= 2, c.window, "at least 2"),
                "warm_up": (c.warm_up >= 2, c.warm_up, "at least 2"),
                "wild_above": (
                    0 <= c.calm_below < c.wild_above <= 1,
                    c.wild_above,
                    "a share above `calm_below`, both from 0 to 1",
                ),
                "confirm": (c.confirm >= 1, c.confirm, "at least 1"),
                "max_instruments": (
                    c.max_instruments >= 1,
                    c.max_instruments,
                    "at least 1",
                ),
            },
        )
        self._quotes: dict[str, QuoteChanged] = {}
        self._closes: deque[CandleClosed] = deque(maxlen=MAX_WAITING)

    def wants(self, event: Event) -> bool:
        """Keep the newest quote; only a candle wakes the task."""
        if isinstance(event, QuoteChanged):
            if self.context.source == "quotes":
                key = instrument_key(event.symbol, event.venue)
                if (
                    key in self._quotes
                    or len(self._quotes) < self.context.max_instruments
                ):
                    self._quotes[key] = event
            return False
        if self.context.source == "quotes" or not isinstance(event, CandleClosed):
            return False
        if event.timeframe == self.context.timeframe:
            self._closes.append(event)
        return bool(self._closes)

    async def _handle_executing(self) -> None:
        self.wait(self.context.sample_s)
        known = dict(self.context.instruments)
        sampled = False
        for key, quote in self._quotes.items():
            middle = float(quote.bid + quote.ask) / 2
            sampled |= self._sample(known, key, middle, quote.ts_received_ns)
        while self._closes:
            candle = self._closes.popleft()
            key = instrument_key(candle.symbol, candle.venue)
            sampled |= self._sample(known, key, float(candle.close), candle.ts_event_ns)
        if sampled:
            self.evolve_context(instruments=known)

    def _sample(
        self, known: dict[str, Restlessness], key: str, price: float, ts_ns: int
    ) -> bool:
        """Take one price in; an unchanged time is the same quote again, whose market has said nothing new."""
        if price <= 0:
            return False
        seen = known.get(key)
        if seen is None:
            if len(known) >= self.context.max_instruments:
                return False
            known[key] = Restlessness(price=price, sampled_ns=ts_ns)
            return True
        if ts_ns <= seen.sampled_ns:
            return False
        change = math.log(price / seen.price)
        weight = 1 / min(seen.samples + 1, self.context.window)
        variance = seen.variance + weight * (change * change - seen.variance)
        now = msgspec.structs.replace(
            seen,
            price=price,
            sampled_ns=ts_ns,
            variance=variance,
            samples=seen.samples + 1,
            volatility_ppm=round(math.sqrt(variance) * 1_000_000),
        )
        known[key] = now
        self._judge(key, now)
        now.history.add(now.volatility_ppm)
        return True

    def _judge(self, key: str, seen: Restlessness) -> None:
        if seen.samples < self.context.warm_up:
            return
        rank = seen.history.rank(seen.volatility_ppm)
        regime = "normal"
        if rank >= self.context.wild_above:
            regime = "wild"
        elif rank < self.context.calm_below:
            regime = "calm"
        seen.streak = seen.streak + 1 if regime == seen.candidate else 1
        seen.candidate = regime
        if regime == seen.regime or seen.streak < self.context.confirm:
            return
        self.desk.log.info(
            "regime changed",
            key=key,
            before=seen.regime,
            now=regime,
            volatility_ppm=seen.volatility_ppm,
        )
        seen.regime, seen.since_ns = regime, seen.sampled_ns
        self.evolve_context(changes=self.context.changes + 1)
