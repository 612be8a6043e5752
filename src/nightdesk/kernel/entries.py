"""What the scheduler and the runner know of each task.

Comes from: desk.py (registrations)
Goes to: kernel/scheduler.py, kernel/runner.py
"""

import asyncio
import inspect
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from enum import Enum, IntEnum
from functools import partial
from typing import Any, Final, Literal, cast

import msgspec

from nightdesk.abc import Place
from nightdesk.kernel.loop import LANE, OWNER, Lane
from nightdesk.kernel.supervisor import Failures
from nightdesk.kernel.triggers import Trigger
from nightdesk.model.health import TaskHealth
from nightdesk.model.priority import Priority
from nightdesk.model.schedule import Schedule

__all__ = [
    "DONE",
    "NEVER",
    "Cause",
    "Done",
    "Entry",
    "Mode",
    "Outcome",
    "Pool",
    "Registration",
    "Stage",
    "Worker",
]


class Done(Enum):
    """The type of `DONE`."""

    DONE = "done"


DONE: Final = Done.DONE
"""What a cycle returns to end its task."""

NEVER: Final = -1
"""A monotonic instant that is none: 0 is one, under a virtual clock."""

Outcome = float | Done | None
Cycle = Callable[[], Coroutine[Any, Any, Outcome]]
Mode = Literal[
    "active", "backoff", "paused", "quarantined", "stopped", "completed", "removed"
]
Cause = Literal["", "timeout", "stop"]


class Registration(msgspec.Struct, kw_only=True):
    """What is run, and how.

    Attributes:
        cycle: Runs once and returns the seconds until the next run, None (the schedule decides; without
            one, 0.1 s), or `DONE` to end the task. Raises on failure.
        start: Awaited once before the first cycle, again if it raised.
        schedule: None is a task that says itself when to run again.
        keys: Cycles with a common key never overlap.
        after: Tasks of which each must have succeeded since this one last ran; a completed one always has.
        timeout_s: A cycle that takes longer is cancelled and counts as failed.
        on_final: Called with the last health when the task is done.
    """

    task_id: str
    type: str
    cycle: Callable[[], Awaitable[Outcome]]
    start: Callable[[], Awaitable[None]] | None = None
    schedule: Schedule | None = None
    priority: Priority = Priority.NORMAL
    keys: tuple[str, ...] = ()
    group: str | None = None
    after: tuple[str, ...] = ()
    timeout_s: float | None = None
    runs_in: Place = "desk"
    on_final: Callable[[TaskHealth], None] | None = None


class Stage(IntEnum):
    """Where an active task stands between two runs."""

    IDLE = 0
    HELD = 1  # due, but a task it comes after has not run
    READY = 2
    KEYS = 3
    RUNNING = 4


class Entry:
    """One registered task: what the scheduler and the runner know of it. Slots, since there may be 100,000."""

    __slots__ = (
        "after_seen",
        "again",
        "armed",
        "asleep",
        "claims",
        "cycle",
        "dependents",
        "due_ns",
        "durations",
        "ended_ns",
        "enter",
        "errors",
        "failures",
        "fired_ns",
        "granted",
        "grid_ns",
        "id",
        "interval_ns",
        "lags",
        "last_error",
        "missed",
        "mode",
        "overruns",
        "pool",
        "ready_ns",
        "registration",
        "restarts",
        "runs",
        "spins",
        "stage",
        "started_ns",
        "successes",
        "timeout_ns",
        "trigger",
        "wall_ns",
        "why",
        "worker",
    )

    def __init__(
        self,
        registration: Registration,
        trigger: Trigger,
        pool: "Pool",
        context: Context,
    ) -> None:
        self.id = registration.task_id
        self.registration = registration
        self.trigger = trigger
        self.move_to(pool, context)
        self.cycle = _first_cycle(self)
        self.mode: Mode = "active"
        self.stage = Stage.IDLE
        self.why = ""
        self.claims: tuple[str, ...] = ()
        self.granted = False
        self.worker: Worker | None = None
        self.again = False
        self.asleep = False
        self.timeout_ns = int((registration.timeout_s or 0) * 1e9)
        self.armed = self.due_ns = self.grid_ns = self.fired_ns = NEVER
        self.ready_ns = self.interval_ns = self.wall_ns = 0
        self.runs = self.successes = self.errors = self.restarts = self.overruns = (
            self.missed
        ) = 0
        self.spins = self.started_ns = self.ended_ns = 0
        self.last_error = ""
        self.failures: Failures | None = None
        self.lags: array[int] | None = None
        self.durations: array[int] | None = None
        self.after_seen: dict[str, int] | None = None
        self.dependents: list[Entry] | None = None

    def move_to(self, pool: "Pool", context: Context) -> None:
        """Run in `pool` from now on.

        Each task has a context of its own: what a cycle binds (log fields, say) is not seen by the
        next cycle of the same worker, and whatever it starts inherits its lane and its owner.
        """
        self.pool = pool
        own = context.copy()
        own.run(OWNER.set, self.id)
        own.run(LANE.set, pool.lane)
        self.enter = own.run


def _first_cycle(entry: Entry) -> Cycle:
    """Return the cycle that runs `start` first and then makes way for the plain one."""
    registration = entry.registration
    cycle = _as_coroutine_function(registration.cycle)
    if registration.start is None:
        return cycle
    start = registration.start

    async def first() -> Outcome:
        await start()
        entry.cycle = cycle
        return await cycle()

    return first


def _as_coroutine_function(cycle: Callable[[], Awaitable[Outcome]]) -> Cycle:
    # A partial is unwrapped here, because `inspect` takes a long look at one of a method.
    function = cycle.func if isinstance(cycle, partial) else cycle
    if inspect.iscoroutinefunction(function):
        return cast(Cycle, cycle)

    async def run() -> Outcome:
        return await cycle()

    return run


class Pool:
    """The entries of one priority that are ready, and the workers that run them.

    `awake` counts workers that are running or about to: while there is one, nobody else is woken.
    """

    __slots__ = ("awake", "idle", "lane", "limit", "rank", "ready", "size")

    def __init__(self, rank: int, lane: Lane, limit: int) -> None:
        self.rank = rank
        self.lane = lane
        self.limit = limit
        self.ready: deque[Entry] = deque()
        self.idle: list[Worker] = []
        self.awake = 0
        self.size = 0


class Worker:
    """An asyncio task that runs one cycle after the other.

    Attributes:
        awake: It runs, or is about to.
        abandoned: Its cycle ignored a cancellation: the worker ends with it.
        cause: Why its cycle was cancelled by us.
        deadline_ns: When the next measure against its cycle is due; 0 is never.
    """

    __slots__ = (
        "abandoned",
        "awake",
        "cancels",
        "cause",
        "deadline_ns",
        "entry",
        "gate",
        "pool",
        "task",
    )

    task: asyncio.Task[None]

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.entry: Entry | None = None
        self.gate: asyncio.Future[None] | None = None
        self.awake = True
        self.abandoned = False
        self.cause: Cause = ""
        self.cancels = 0
        self.deadline_ns = 0

    def cancel(self, cause: Cause) -> None:
        self.cause = cause
        self.cancels += 1
        self.task.cancel()
