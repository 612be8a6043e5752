"""Market-aware tasks and the shared cache (design 003): `TaskManager.register_task`, `CacheManager`."""

from collections.abc import Awaitable, Callable
from typing import Any

import psutil

from nightdesk.compat.registration import BackgroundTaskManager, TaskConfig
from nightdesk.kernel.cache import Cache as CacheManager
from nightdesk.kernel.clock import SystemClock
from nightdesk.kernel.hours import Calendars
from nightdesk.model.priority import Priority
from nightdesk.model.schedule import Schedule

__all__ = ["INTERVALS", "CacheManager", "TaskManager"]

INTERVALS: dict[Priority, tuple[float, float | str]] = {
    Priority.CRITICAL: (5.0, 60.0),
    Priority.HIGH: (30.0, 300.0),
    Priority.NORMAL: (30.0, 300.0),
    Priority.LOW: (60.0, "pause"),
}
"""Seconds between runs while the session is open, and while it is closed."""


class TaskManager:
    """Runs tasks at the pace of an exchange's session.

    Design 003 calls the priorities critical, important and nice-to-have: critical, high and low here.
    """

    def __init__(
        self,
        calendar: str = "NSE",
        *,
        calendars: Calendars | None = None,
        clock: Any = None,
    ) -> None:
        self.calendar = calendar
        self._clock = clock or SystemClock()
        self._calendars = calendars or Calendars(cache_dir=None)
        self._manager = BackgroundTaskManager(calendars=self._calendars, clock=clock)
        self._pending: list[TaskConfig] = []
        self._started_ns = 0
        self.scheduler = self._manager.scheduler

    def register_task(
        self,
        name: str,
        coro: Callable[[], Awaitable[Any]],
        priority: str = "critical",
        market_hours_only: bool = False,
    ) -> None:
        """Register `coro`, a function that returns a coroutine, to run at the pace of its priority.

        Raises:
            ValueError: No such priority.
        """
        rank = Priority.parse(priority)
        opened, closed = INTERVALS[rank]
        schedule = Schedule(
            every_s=opened,
            calendar=self.calendar,
            open_s=opened,
            closed_s="pause" if market_hours_only else closed,  # type: ignore[arg-type]
        )
        self._pending.append(
            TaskConfig(name=name, func=coro, priority=rank, schedule=schedule)
        )

    async def start(self) -> int:
        """Start every registered task; return how many.

        Raises:
            NoTasksError: None is registered.
        """
        self._started_ns = self._clock.now_ns()
        for config in self._pending:
            await self._manager.add_task(config)
        self._pending.clear()
        return await self._manager.start_all()

    async def stop(self) -> list[str]:
        return await self._manager.stop_all()

    def is_market_open(self) -> bool:
        return self._calendars.get(self.calendar).is_open(self._clock.now_ns())

    def get_health(self) -> dict[str, Any]:
        """Return what `/api/system/tasks` of design 003 shows: tasks, restarts, resources, uptime, session."""
        process = psutil.Process()
        return {
            "market_open": self.is_market_open(),
            "uptime_s": (self._clock.now_ns() - self._started_ns) / 1e9,
            "memory_mb": process.memory_info().rss / 1e6,
            "cpu_s": sum(process.cpu_times()[:2]),
            "tasks": self._manager.get_all_health(),
        }
