"""Learn how strongly swaps usually move each pool.

Comes from: sources/
Goes to: model/context.py
"""

from collections import deque
from decimal import Decimal
from typing import ClassVar

import msgspec

from nightdesk.abc import Place, Task
from nightdesk.model.context import TaskContext
from nightdesk.model.events import Event, PoolSwap
from nightdesk.model.priority import Priority
from nightdesk.tasks._execution import ZERO, check
from nightdesk.tasks._gaps import RecentlySeen
from nightdesk.tasks._histogram import Histogram

__all__ = ["PoolHabits", "PoolImpactContext", "PoolImpactTask"]

IDLE_S = 5.0
MAX_WAITING = 8192


class PoolHabits(msgspec.Struct):
    """What is known of one pool.

    Attributes:
        up, down: Swaps by the direction in which they moved the price.
        value_usd: Sum of the swaps' values.
        usd_per_percent: Median value that moves the price by one percent: the pool's depth as it was lived.
        strong: Swaps beyond the pool's own p99 at the time.
    """

    pair: str
    up: int = 0
    down: int = 0
    value_usd: Decimal = ZERO
    strong: int = 0
    last_ns: int = 0
    usd_per_percent: int | None = None
    quantiles_ppm: dict[str, int] = {}
    impacts: Histogram = msgspec.field(default_factory=Histogram)
    depths: Histogram = msgspec.field(default_factory=Histogram)


class PoolImpactContext(TaskContext, kw_only=True):
    """What was learned of each pool, by `chain:address`.

    Attributes:
        max_pools: Beyond it the pool that was quiet for longest is forgotten, and counted in `forgotten`.
        repeated: Swaps that were told a second time, as confirmed.
        dropped: Swaps that came faster than they could be counted.
    """

    max_pools: int = 256
    pools: dict[str, PoolHabits] = msgspec.field(default_factory=dict)
    swaps: int = 0
    repeated: int = 0
    forgotten: int = 0
    dropped: int = 0


class PoolImpactTask(Task[PoolImpactContext]):
    """The distribution of price impacts per pool: half a percent is an event in one pool and noise in another."""

    context_class: ClassVar[type[TaskContext]] = PoolImpactContext
    priority: ClassVar[Priority] = Priority.LOW
    runs_in: ClassVar[Place] = "background"
    listens: ClassVar[tuple[type[Event], ...]] = (PoolSwap,)

    def __init__(self, context: PoolImpactContext) -> None:
        super().__init__(context)
        check(
            f"PoolImpactTask {context.task_id!r}",
            {"max_pools": (context.max_pools >= 1, context.max_pools, "at least 1")},
        )
        self._waiting: deque[PoolSwap] = deque()
        self._dropped = 0
        self._seen = RecentlySeen()

    def wants(self, event: Event) -> bool:
        """Keep a swap for the next cycle; when too many wait, the newest is dropped and counted."""
        assert isinstance(event, PoolSwap)
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(event)
        else:
            self._dropped += 1
        return len(self._waiting) == MAX_WAITING // 2

    async def _handle_executing(self) -> None:
        self.wait(IDLE_S)
        if not self._waiting:
            return
        pools = dict(self.context.pools)
        touched: set[str] = set()
        swaps = repeated = 0
        while self._waiting:
            swap = self._waiting.popleft()
            if not self._seen.add(
                f"{swap.chain}|{swap.transaction_hash}|{swap.log_index}"
            ):
                repeated += 1
                continue
            swaps += 1
            name = f"{swap.chain}:{swap.pool}".lower()
            if name not in touched:
                touched.add(name)
                pools[name] = _copy(pools.get(name) or PoolHabits(pair=swap.pair))
            _learn(pools[name], swap)
        for name in touched:
            habits = pools[name]
            habits.quantiles_ppm = habits.impacts.quantiles()
            habits.usd_per_percent = habits.depths.quantile(0.5)
        c = self.context
        self.evolve_context(
            pools=self._bounded(pools),
            swaps=c.swaps + swaps,
            repeated=c.repeated + repeated,
            dropped=c.dropped + self._dropped,
            forgotten=c.forgotten + max(0, len(pools) - c.max_pools),
        )
        self._dropped = 0

    def _bounded(self, pools: dict[str, PoolHabits]) -> dict[str, PoolHabits]:
        surplus = len(pools) - self.context.max_pools
        if surplus <= 0:
            return pools
        quiet = sorted(pools, key=lambda name: (pools[name].last_ns, name))[:surplus]
        return {name: habits for name, habits in pools.items() if name not in quiet}


def _copy(habits: PoolHabits) -> PoolHabits:
    """A copy that may be changed, while the context that is being saved keeps the old one."""
    return msgspec.structs.replace(
        habits,
        impacts=msgspec.structs.replace(
            habits.impacts, buckets=dict(habits.impacts.buckets)
        ),
        depths=msgspec.structs.replace(
            habits.depths, buckets=dict(habits.depths.buckets)
        ),
    )


def _learn(habits: PoolHabits, swap: PoolSwap) -> None:
    impact = abs(swap.price_impact_ppm)
    usual = habits.impacts.quantile(0.99)
    if usual is not None and habits.impacts.count >= 100 and impact > usual:
        habits.strong += 1
    habits.impacts.add(impact)
    if impact and swap.value_usd > 0:
        habits.depths.add(int(swap.value_usd * 10_000 / impact))
    habits.up += swap.price_impact_ppm > 0
    habits.down += swap.price_impact_ppm < 0
    habits.value_usd += swap.value_usd
    habits.last_ns = max(habits.last_ns, swap.ts_event_ns, swap.ts_received_ns)
