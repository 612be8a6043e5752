"""A scheduler under virtual time, and tasks that write down when they ran."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from datetime import datetime
from typing import Any

from nightdesk.abc import Observer
from nightdesk.kernel.loop import in_lanes
from nightdesk.kernel.runner import Registration
from nightdesk.kernel.scheduler import Scheduler
from nightdesk.model.health import TaskHealth
from nightdesk.model.schedule import Schedule
from nightdesk.simulation.virtual import VirtualClock, VirtualLoop

SECOND_NS = 1_000_000_000


def instant_ns(text: str) -> int:
    """Return an ISO instant in UTC nanoseconds."""
    moment = datetime.fromisoformat(text)
    assert moment.tzinfo is not None
    return round(moment.timestamp()) * SECOND_NS


class JumpClock(VirtualClock):
    """Somebody may set its wall clock; its monotonic side goes on."""

    set_by_ns = 0

    def now_ns(self) -> int:
        return super().now_ns() + self.set_by_ns

    def jump(self, seconds: float) -> None:
        self.set_by_ns += int(seconds * SECOND_NS)


class RecordingObserver(Observer):
    def __init__(self) -> None:
        self.steps: list[str] = []
        self.failures: list[tuple[str, str]] = []

    def on_step(
        self, task_id: str, started_ns: int, duration_ns: int, lag_ns: int
    ) -> None:
        self.steps.append(task_id)

    def on_task_failed(
        self, task_id: str, error: BaseException, consequence: str
    ) -> None:
        self.failures.append((task_id, consequence))


class World:
    """Virtual time in which tasks run; `runs` holds `(task, seconds since the start)`."""

    def __init__(
        self, start: str = "2026-11-23T00:00:00+00:00", seed: int = 1, **options: Any
    ) -> None:
        self.loop: Any = in_lanes(VirtualLoop)(seed)
        self.clock = JumpClock(self.loop, instant_ns(start))
        self.observer = RecordingObserver()
        self.changes: list[tuple[str, TaskHealth]] = []
        self.scheduler = Scheduler(
            clock=self.clock,
            random=random.Random(seed),
            observers=[self.observer],
            on_change=lambda task_id, health: self.changes.append((task_id, health)),
            **options,
        )
        self.runs: list[tuple[str, float]] = []
        self.under_way: Counter[str] = Counter()
        self.overlaps: list[str] = []
        self._started = False

    @property
    def now_s(self) -> float:
        return self.clock.monotonic_ns() / SECOND_NS

    def add(
        self,
        task_id: str,
        body: Callable[[], Awaitable[Any]] | None = None,
        *,
        status: TaskHealth | str | None = None,
        every_s: float | None = None,
        schedule: Schedule | None = None,
        **fields: Any,
    ) -> None:
        """Register a task whose cycle writes down its start and then awaits `body`."""

        async def cycle() -> Any:
            self.runs.append((task_id, self.now_s))
            if self.under_way[task_id]:
                self.overlaps.append(task_id)
            self.under_way[task_id] += 1
            try:
                return await body() if body is not None else None
            finally:
                self.under_way[task_id] -= 1

        if every_s is not None:
            schedule = Schedule(every_s=every_s)
        self.scheduler.add(
            Registration(
                task_id=task_id,
                type="test",
                cycle=cycle,
                schedule=schedule,
                **fields,
            ),
            status=status,
        )

    def play(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.do(asyncio.sleep(seconds))

    def do(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine beside the scheduler."""

        async def main() -> Any:
            try:
                if not self._started:
                    await self.scheduler.start()
                    self._started = True
                return await coroutine
            finally:
                coroutine.close()

        return self.loop.run_until_complete(main())

    def times(self, task_id: str) -> list[float]:
        return [seconds for name, seconds in self.runs if name == task_id]

    def count(self, task_id: str) -> int:
        return len(self.times(task_id))

    def close(self) -> None:
        if self._started:
            self.loop.run_until_complete(self.scheduler.stop(1.0))
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()
