"""Registered functions (design 004): `BackgroundTaskManager`, `TaskConfig`, `TaskPriority`.

The fault that design reports, a manager that starts with nothing registered and
looks healthy, cannot happen: `start_all` of zero tasks raises `NoTasksError`.
"""

import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from nightdesk.errors import NoTasksError, UnknownTaskError
from nightdesk.kernel.clock import SystemClock
from nightdesk.kernel.hours import Calendars
from nightdesk.kernel.loop import Lane, lane
from nightdesk.kernel.runner import Registration
from nightdesk.kernel.scheduler import Scheduler
from nightdesk.model.health import TaskHealth
from nightdesk.model.priority import Priority
from nightdesk.model.schedule import Schedule

__all__ = ["BackgroundTaskManager", "TaskConfig", "TaskPriority"]


class TaskPriority:
    """Names of design 004 for the one scale of priorities; MEDIUM is `normal`."""

    CRITICAL = Priority.CRITICAL
    HIGH = Priority.HIGH
    MEDIUM = Priority.NORMAL
    NORMAL = Priority.NORMAL
    LOW = Priority.LOW


class TaskConfig(msgspec.Struct, kw_only=True):
    """A function to run.

    Attributes:
        interval: Seconds between runs; None runs it once.
        timeout: Seconds after which one run is cancelled.
        schedule: Any other trigger; `interval` is short for `Schedule(every_s=...)`.
    """

    name: str
    func: Callable[[], Awaitable[Any]]
    interval: float | None = None
    priority: Priority | str = Priority.NORMAL
    timeout: float | None = None
    after: tuple[str, ...] = ()
    schedule: Schedule | None = None


class BackgroundTaskManager:
    """Runs registered functions on the running loop, supervised: restarts, back-off, quarantine, health."""

    def __init__(
        self,
        enable_health_monitoring: bool = True,
        health_check_interval: float = 30.0,
        enable_auto_recovery: bool = True,
        *,
        calendars: Calendars | None = None,
        seed: int = 1,
        max_concurrent: int = 1000,
        clock: Any = None,
    ) -> None:
        self.enable_health_monitoring = enable_health_monitoring
        self.health_check_interval = health_check_interval
        self.enable_auto_recovery = enable_auto_recovery
        self._configs: dict[str, tuple[TaskConfig, str | None]] = {}
        self._running = False
        self.scheduler = Scheduler(
            clock=clock or SystemClock(),
            random=random.Random(seed),
            observers=(),
            max_concurrent=max_concurrent,
            calendars=calendars or Calendars(cache_dir=None),
            on_change=None,
            place="desk",
        )

    async def add_task(
        self,
        config: TaskConfig,
        group: str | None = None,
        start_immediately: bool = False,
    ) -> None:
        """Register a function; it runs from `start_all` or `start_task` on.

        Raises:
            DuplicateTaskError: The name is taken (also a ValueError, as in design 004).
        """
        schedule = config.schedule or (
            Schedule(once=True)
            if config.interval is None
            else Schedule(every_s=config.interval)
        )
        self.scheduler.add(
            Registration(
                task_id=config.name,
                type="function",
                cycle=_cycle(config.func),
                schedule=schedule,
                priority=Priority.parse(config.priority),
                group=group,
                after=config.after,
                timeout_s=config.timeout,
            ),
            status="stopped",
        )
        self._configs[config.name] = (config, group)
        if start_immediately:
            await self.start_task(config.name)

    async def start_all(self, group: str | None = None) -> int:
        """Start every task, or those of `group`; return how many.

        Raises:
            NoTasksError: There is none, so nothing would ever run.
        """
        names = [
            name
            for name, (_, of) in self._configs.items()
            if group is None or of == group
        ]
        if not names:
            raise NoTasksError(f"group {group!r}" if group else "BackgroundTaskManager")
        for name in names:
            await self.start_task(name)
        return len(names)

    async def start_task(self, name: str) -> None:
        """Start one task.

        Raises:
            UnknownTaskError: No task has this name.
        """
        if name not in self._configs:
            raise UnknownTaskError(name, self._configs)
        if not self._running:
            self._running = True
            with lane(Lane.DESK):
                await self.scheduler.start()
        self.scheduler.start_task(name)

    async def stop_task(self, name: str) -> None:
        if name not in self._configs:
            raise UnknownTaskError(name, self._configs)
        self.scheduler.stop_task(name)

    async def stop_all(self, timeout: float = 8.0) -> list[str]:
        """Stop everything; return the names of tasks that would not stop."""
        self._running = False
        return await self.scheduler.stop(timeout)

    def get_health(self, name: str) -> TaskHealth:
        """Return one task's health: last and next run, runs, errors, restarts, lag, durations."""
        return self.scheduler.health(name)

    def get_all_health(self) -> dict[str, TaskHealth]:
        return {health.task_id: health for health in self.scheduler.health_all()}

    @property
    def task_count(self) -> int:
        return len(self._configs)


def _cycle(function: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[None]]:
    async def cycle() -> None:
        await function()

    return cycle
