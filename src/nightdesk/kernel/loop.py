"""The event loop in lanes: background callbacks run in short slices between two polls of the sockets.

A callback belongs to the lane that `LANE` has in its context. Everything a background task starts,
in whatever library, copies its context and so inherits the lane. The desk's own lane is the loop's
ordinary queue; the other four have queues here, from which one pump callback serves at most a slice
per loop iteration. An event that arrives therefore waits for one slice, not for a whole round.

Comes from: desk.py
Goes to: kernel/switch.py (closes and opens the lanes), kernel/watchdog.py (asks who holds the loop)
"""

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from enum import IntEnum
from functools import cache
from heapq import heapify, heappop, heappush
from typing import Any, Literal, TypeVar, TypeVarTuple, cast

from nightdesk.errors import CommandError
from nightdesk.kernel.clock import monotonic_s

__all__ = [
    "LANE",
    "OWNER",
    "Lane",
    "LaneLoop",
    "in_lanes",
    "lane",
    "new_event_loop",
    "run_in_desk_lane",
]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
LoopKind = Literal["auto", "uvloop", "asyncio"]


class Lane(IntEnum):
    """Where a callback queues: the desk's own lane, then `Priority.rank + 1`."""

    DESK = 0
    CRITICAL = 1
    HIGH = 2
    NORMAL = 3
    LOW = 4


LANE: ContextVar[Lane] = ContextVar("LANE", default=Lane.DESK)
OWNER: ContextVar[str] = ContextVar("OWNER", default="")

# Turns of the background lanes: 8 critical, 4 high, 2 normal, 1 low of every 15. A lane that is
# empty gives its turn to the best lane that is not, so the shares only bind when all are busy. This
# counts turns, not time, so that it is the same under a virtual clock; and it is what keeps `low`
# from starving: at most 14 callbacks of others run between two of its own.
_TURNS = (1, 2, 1, 3, 1, 2, 1, 4, 1, 2, 1, 3, 1, 2, 1)
_TIMERS_PER_SLICE = 32
_MAX_OFFENDERS = 256
# Before 3.12 a task does not tell its context, and the owner of a task that blocks would be unknown.
_TASKS_TELL_CONTEXT = hasattr(asyncio.Task, "get_context")

_log = logging.getLogger(__name__)


@contextmanager
def lane(lane: Lane) -> Iterator[None]:
    """Start what is started inside in `lane`."""
    token = LANE.set(lane)
    try:
        yield
    finally:
        LANE.reset(token)


def run_in_desk_lane(callback: Callable[[*Ts], T], *args: *Ts) -> T:
    """Call `callback` now, so that whatever it starts is the desk's, even if a background task calls."""
    if not LANE.get():
        return callback(*args)
    context = copy_context()
    context.run(LANE.set, Lane.DESK)
    return context.run(callback, *args)


class _LaneTimer(asyncio.TimerHandle):
    """A timer of a background lane. Thousands of them share one timer of the loop beneath."""

    __slots__ = ()
    _loop: "LaneLoop"
    _scheduled: (
        bool  # it waits in the heap; `asyncio.sleep` also cancels timers that have rung
    )

    def cancel(self) -> None:
        if not self.cancelled():
            asyncio.Handle.cancel(self)
            if self._scheduled:
                self._loop._on_timer_cancelled()


class LaneLoop(asyncio.AbstractEventLoop):
    """What a loop in lanes can do beyond an asyncio loop; mixed into uvloop's, asyncio's and the virtual one.

    Attributes:
        lanes_closed: The background is parked.
        slice_s: Longest stretch of background work per iteration, unless one callback takes longer.
        slice_callbacks: The same as a count, for a loop whose time stands still between callbacks.
        timer_grain_s: Delays beneath are rounded up to it, so that no timer rings early and spins.
        timer_resolution_s: Timers that are due within it are due now.
        new_ready_queue: Makes the queue of a lane.
    """

    lanes_closed = False
    slice_s = 100e-6
    slice_callbacks: int
    timer_grain_s: float
    timer_resolution_s: float
    new_ready_queue: Callable[[], deque[asyncio.Handle]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Bound once: `super()` costs more than the rest of the hot path together.
        self._base_call_soon = super().call_soon
        self._base_call_later = super().call_later
        self._bare = Context()  # knows no lane, so it is the desk's
        self._queues: list[deque[asyncio.Handle]] = [
            self.new_ready_queue() for _ in Lane
        ]
        self._timers: list[tuple[float, int, _LaneTimer]] = []
        self._timer_count = 0
        self._timers_cancelled = 0
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = math.inf
        self._pump_callback = self._pump
        self._pump_due = False
        self._turn = 0
        self._ran = [0] * len(Lane)
        self._slices = 0
        self._overruns = 0
        self._offenders: dict[str, tuple[int, float]] = {}
        self._in_hand: asyncio.Handle | None = None
        self._owner = ""
        self._thread = 0
        self._lanes_gone = False

    # --- Sorting callbacks into lanes ---------------------------------------------------------

    def call_soon(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Queue `callback` in the lane of `context`, else of the current context."""
        # The hot path, called for every step of every task. Written out by cases because handing
        # on `*args` and `context=` in one form costs half as much again (measured: 0.2 us a call).
        if context is None:
            lane = LANE.get()
            if not lane:
                return self._base_call_soon(callback, *args)
        else:
            lane = context.get(LANE, Lane.DESK)
            if not lane:
                if args:
                    return self._base_call_soon(callback, *args, context=context)
                return self._base_call_soon(callback, context=context)
        handle = asyncio.Handle(callback, args, self, context)
        if self._lanes_gone or handle._source_traceback:  # type: ignore[attr-defined]
            self._check_caller()
        self._queues[lane].append(handle)
        if not self._pump_due and not self.lanes_closed:
            self._pump_due = True
            self._base_call_soon(self._pump_callback, context=self._bare)
        return handle

    def call_soon_threadsafe(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        lane = LANE.get() if context is None else context.get(LANE, Lane.DESK)
        if not lane:
            return super().call_soon_threadsafe(callback, *args, context=context)
        handle = asyncio.Handle(callback, args, self, context)
        super().call_soon_threadsafe(self._enter, lane, handle, context=self._bare)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        lane = LANE.get() if context is None else context.get(LANE, Lane.DESK)
        if not lane:
            return self._base_call_later(delay, callback, *args, context=context)
        return self._add_timer(self.time() + delay, callback, args, context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        lane = LANE.get() if context is None else context.get(LANE, Lane.DESK)
        if not lane:
            return super().call_at(when, callback, *args, context=context)
        return self._add_timer(when, callback, args, context)

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: Any = None,
        context: Context | None = None,
        **kwargs: Any,
    ) -> asyncio.Task[T]:
        """Create a task, named after its owner unless it has a name."""
        if context is None:
            context = copy_context()
        if name is None:
            name = context.get(OWNER, "") or None
        task = super().create_task(coro, name=name, context=context, **kwargs)
        if not _TASKS_TELL_CONTEXT:
            task._owner_context = context  # type: ignore[attr-defined]
        return task

    def _enter(self, lane: Lane, handle: asyncio.Handle) -> None:
        self._queues[lane].append(handle)
        self._wake_pump()

    def _check_caller(self) -> None:
        if self._lanes_gone:
            raise RuntimeError("Event loop is closed")
        if self._thread and threading.get_ident() != self._thread:
            raise RuntimeError(
                "Non-thread-safe operation invoked on an event loop other than the current one"
            )

    # --- Timers of the background ---------------------------------------------------------------

    def _add_timer(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context | None,
    ) -> asyncio.TimerHandle:
        # A timer of the loop beneath fires outside any slice: 10,000 that are due together would
        # hold up the desk for as long as they take. Here they fall due inside the slices.
        if self._lanes_gone:
            self._check_caller()
        timer = _LaneTimer(when, callback, args, self, context)
        timer._scheduled = True
        self._timer_count += 1
        heappush(self._timers, (when, self._timer_count, timer))
        if when < self._alarm_at and not self._pump_due and not self.lanes_closed:
            self._set_alarm()
        return timer

    def _on_timer_cancelled(self) -> None:
        self._timers_cancelled += 1
        if self._timers_cancelled > 64 and self._timers_cancelled * 2 > len(
            self._timers
        ):
            self._timers[:] = [
                entry for entry in self._timers if not entry[2].cancelled()
            ]
            heapify(self._timers)
            self._timers_cancelled = 0

    def _set_alarm(self) -> None:
        """Wake the pump when the first timer is due."""
        if not self._timers:
            return
        when = self._timers[0][0]
        if self._alarm is not None:
            if self._alarm_at <= when:
                return
            self._alarm.cancel()
        delay = max(0.0, when - self.time())
        if self.timer_grain_s:
            delay = math.ceil(delay / self.timer_grain_s) * self.timer_grain_s
        self._alarm_at = when
        self._alarm = self._base_call_later(delay, self._on_alarm, context=self._bare)

    def _on_alarm(self) -> None:
        self._alarm = None
        self._alarm_at = math.inf
        self._wake_pump()

    def _queue_due_timers(self, now: float) -> None:
        timers = self._timers
        limit = now + self.timer_resolution_s
        for _ in range(_TIMERS_PER_SLICE):
            if not timers or timers[0][0] > limit:
                return
            timer = heappop(timers)[2]
            timer._scheduled = False
            if timer.cancelled():
                self._timers_cancelled -= 1
            else:
                lane = timer._context.get(LANE)  # type: ignore[attr-defined]
                self._queues[lane or Lane.NORMAL].append(timer)

    # --- The pump -------------------------------------------------------------------------------

    def _wake_pump(self) -> None:
        if not self._pump_due and not self.lanes_closed:
            self._pump_due = True
            self._base_call_soon(self._pump_callback, context=self._bare)

    def _pump(self) -> None:
        self._pump_due = False
        if self.lanes_closed:
            return
        try:
            self._run_slice()
        finally:
            self._in_hand = None
            if not self.lanes_closed:
                if self.queued or (
                    self._timers
                    and self._timers[0][0] <= self.time() + self.timer_resolution_s
                ):
                    self._wake_pump()
                else:
                    self._set_alarm()

    def _run_slice(self) -> None:
        queues, ran, time = self._queues, self._ran, self.time
        turn = self._turn
        began = now = time()
        if self._timers and self._timers[0][0] <= now + self.timer_resolution_s:
            self._queue_due_timers(now)
        limit = self.slice_s
        self._slices += 1
        for _ in range(self.slice_callbacks):
            lane = _TURNS[turn]
            turn = turn + 1 if turn < 14 else 0
            queue = queues[lane]
            if not queue:
                for lane in (1, 2, 3, 4):
                    queue = queues[lane]
                    if queue:
                        break
                else:
                    break
            handle = queue.popleft()
            if handle._cancelled:
                continue
            self._in_hand = handle
            handle._run()
            before, now = now, time()
            took = now - before
            ran[lane] += 1
            if took > limit:
                self._note_overrun(handle, took)
            # The next callback will probably take as long as this one: stop before the slice is exceeded.
            if now - began + took > limit or self.lanes_closed:
                break
        self._turn = turn

    def _note_overrun(self, handle: asyncio.Handle, took_s: float) -> None:
        self._overruns += 1
        owner = handle._context.get(OWNER) or ""  # type: ignore[attr-defined]
        count, worst = self._offenders.get(owner, (0, 0.0))
        if count or len(self._offenders) < _MAX_OFFENDERS:
            self._offenders[owner] = (count + 1, max(worst, took_s))
        if self.get_debug() and took_s >= getattr(self, "slow_callback_duration", 0.1):
            _log.warning("Executing %r took %.3f seconds", handle, took_s)

    # --- Parking ----------------------------------------------------------------------------------

    def close_lanes(self) -> None:
        """Park the background: from now until `open_lanes` only the desk's own lane runs."""
        self.lanes_closed = True

    def open_lanes(self) -> None:
        """Let the background go on where it was. Harmless when it is open."""
        if self.lanes_closed:
            self.lanes_closed = False
            if self.queued:
                self._wake_pump()
            else:
                self._set_alarm()

    @property
    def queued(self) -> int:
        """Background callbacks that are ready to run."""
        _, critical, high, normal, low = self._queues
        return len(critical) + len(high) + len(normal) + len(low)

    # --- Who holds the loop -----------------------------------------------------------------------

    def set_owner(self, name: str) -> None:
        """Say whose code runs in the desk's lane until the next call; "" for nobody's."""
        self._owner = name

    def current_owner(self) -> str:
        """Return whose code runs now: a task's id, else an asyncio task's name, else "".

        May be called from another thread, as a hint: the loop goes on meanwhile.
        """
        handle = self._in_hand
        if handle is not None:
            owner = handle._context.get(OWNER)  # type: ignore[attr-defined]
            if owner:
                return cast(str, owner)
        if self._owner:
            return self._owner
        task: Any = asyncio.current_task(self)
        if task is None:
            return ""
        context = (
            task.get_context()
            if _TASKS_TELL_CONTEXT
            else getattr(task, "_owner_context", self._bare)
        )
        return context.get(OWNER) or cast(str, task.get_name())

    def lane_stats(self) -> dict[str, Any]:
        """Return what waits, what ran, and who overran a slice."""
        lanes = [lane for lane in Lane if lane is not Lane.DESK]
        return {
            "closed": self.lanes_closed,
            "queued": {lane.name.lower(): len(self._queues[lane]) for lane in lanes},
            "ran": {lane.name.lower(): self._ran[lane] for lane in lanes},
            "timers": len(self._timers) - self._timers_cancelled,
            "slices": self._slices,
            "overruns": self._overruns,
            "offenders": {
                owner: {"count": count, "worst_us": round(worst * 1e6)}
                for owner, (count, worst) in self._offenders.items()
            },
        }

    # --- Life -------------------------------------------------------------------------------------

    def run_forever(self) -> None:
        self._thread = threading.get_ident()
        try:
            super().run_forever()
        finally:
            self._thread = 0

    def stop(self) -> None:
        # Whoever stops the loop next cancels the tasks and waits for them: they must be able to run.
        self.open_lanes()
        super().stop()

    def close(self) -> None:
        if self.is_running():
            super().close()  # refuses, in its own words
        self._lanes_gone = True
        for queue in self._queues:
            for handle in queue:
                handle.cancel()
            queue.clear()
        self._timers.clear()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        super().close()


# What the loop beneath may say otherwise, as the virtual one does.
_DEFAULTS: dict[str, Any] = {
    "slice_callbacks": 1 << 30,
    "timer_grain_s": 0.0,
    "timer_resolution_s": 0.0,
    "new_ready_queue": staticmethod(deque),
}


@cache
def in_lanes(base: type[asyncio.AbstractEventLoop]) -> type[LaneLoop]:
    """Return `base` with lanes: a subclass that takes the same arguments.

    Example:
        >>> in_lanes(asyncio.SelectorEventLoop).__name__
        'SelectorEventLoopInLanes'
    """
    own = {name: getattr(base, name, value) for name, value in _DEFAULTS.items()}
    return type(f"{base.__name__}InLanes", (LaneLoop, base), own)


@cache
def _uvloop_in_lanes() -> type[LaneLoop]:
    import uvloop

    loop_class = in_lanes(uvloop.Loop)
    loop_class.timer_grain_s = 0.001
    # uvloop's own time stands still for a millisecond at a time; ours must not, since slices and
    # the desk's clock are measured by it. uvloop itself uses `time()` for differences only.
    loop_class.time = staticmethod(monotonic_s)  # type: ignore[method-assign,assignment]
    return loop_class


def new_event_loop(kind: LoopKind = "auto", slice_us: int = 100) -> LaneLoop:
    """Return a new loop in lanes.

    Args:
        kind: `auto` takes uvloop where it is installed.
        slice_us: Longest stretch of background work between two polls of the sockets.

    Raises:
        CommandError: `uvloop` was asked for and is not installed.
    """
    loop_class = in_lanes(asyncio.SelectorEventLoop)
    if kind != "asyncio":
        try:
            loop_class = _uvloop_in_lanes()
        except ImportError as error:
            if kind == "uvloop":
                raise CommandError(
                    "the loop 'uvloop' was asked for, but uvloop is not installed. "
                    "`pip install uvloop`, or set `kernel.loop: asyncio`."
                ) from error
    loop = loop_class()
    loop.slice_s = slice_us / 1e6
    return loop
