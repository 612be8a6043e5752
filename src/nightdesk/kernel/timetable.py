"""Due times: by the monotonic clock for intervals, by the wall clock for calendars (R-27).

Intervals fall into slots of one millisecond, which is what a loop's timers can keep: a dictionary
from slot to entries and one heap of slots make 100,000 periodic tasks cheap, with one timer for all.

Comes from: kernel/scheduler.py
Goes to: kernel/scheduler.py (what is due)
"""

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context
from heapq import heappop, heappush
from typing import Generic, TypeVar

from nightdesk.abc import Clock
from nightdesk.kernel.entries import NEVER, Entry
from nightdesk.kernel.loop import LANE, Lane

__all__ = ["MS_NS", "SLACK_NS", "Timetable", "WallTable"]

MS_NS = 1_000_000
SLACK_NS = 100_000  # a timer may ring this early
_SECOND_NS = 1_000_000_000
_NO_SLOT = 1 << 62
_ENTRIES_PER_RING = 1024
_POLL_S = 5.0
_JUMP_NS = _SECOND_NS // 2

_log = logging.getLogger(__name__)

T = TypeVar("T")


def _critical_context() -> Context:
    # Timers of the scheduler are background work, but the most urgent of it.
    context = Context()
    context.run(LANE.set, Lane.CRITICAL)
    return context


class Timetable:
    """Which entry is due when, by the monotonic clock.

    Args:
        on_due: Called with an entry whose `due_ns` has come, and with the time now.
    """

    def __init__(self, clock: Clock, on_due: Callable[[Entry, int], None]) -> None:
        self._monotonic = clock.monotonic_ns
        self._on_due = on_due
        self._context = _critical_context()
        self._slots: dict[int, list[Entry]] = {}
        self._heap: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_slot = _NO_SLOT
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to ring, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._set_timer()

    def stop(self) -> None:
        """Ring no more."""
        self._loop = None
        self._set_timer()

    def insert(self, entry: Entry, due_ns: int) -> None:
        """Let `entry` be due at `due_ns`, instead of whenever it was."""
        entry.due_ns = due_ns
        slot = -(-due_ns // MS_NS)
        armed = entry.armed
        if 0 <= armed <= slot:
            return  # rings earlier, and looks again then: no heap of stale alarms
        entry.armed = slot
        bucket = self._slots.get(slot)
        if bucket is not None:
            bucket.append(entry)
            return
        self._slots[slot] = [entry]
        heappush(self._heap, slot)
        if slot < self._timer_slot:
            self._set_timer()

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self._slots.values())

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._heap or self._loop is None:
            self._timer_slot = _NO_SLOT
            return
        self._timer_slot = self._heap[0]
        delay_ns = self._timer_slot * MS_NS - self._monotonic()
        self._timer = self._loop.call_later(
            max(0.0, delay_ns / _SECOND_NS), self._ring, context=self._context
        )

    def _ring(self) -> None:
        """Hand over what is due, at most so many at once that others get their turn in between."""
        self._timer = None
        self._timer_slot = -1  # nobody sets the timer while the heap is being read
        now = self._monotonic()
        last = (now + SLACK_NS) // MS_NS
        heap = self._heap
        handed = 0
        while heap and heap[0] <= last and handed < _ENTRIES_PER_RING:
            slot = heappop(heap)
            bucket = self._slots.pop(slot)
            handed += len(bucket)
            for entry in bucket:
                if entry.armed != slot:
                    continue  # due at another time by now
                entry.armed = NEVER
                due = entry.due_ns
                if due > now + SLACK_NS:
                    self.insert(entry, due)
                elif due >= 0:
                    self._on_due(entry, now)
        self._set_timer()


class WallTable(Generic[T]):
    """Which thing is due when, by the wall clock, which may be set at any time.

    Args:
        on_due: Called with a thing, the instant it was entered for, and the time now.
        on_jump: Called when the clock was set, with the nanoseconds it moved.
    """

    def __init__(
        self,
        clock: Clock,
        on_due: Callable[[T, int, int], None],
        on_jump: Callable[[int], None],
    ) -> None:
        self._clock = clock
        self._on_due = on_due
        self._on_jump = on_jump
        self._context = _critical_context()
        self._heap: list[tuple[int, int, T]] = []
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._offset_ns = 0

    def start(self) -> None:
        """Begin to ring, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._offset_ns = self._clock.now_ns() - self._clock.monotonic_ns()
        self._set_timer()

    def stop(self) -> None:
        """Ring no more."""
        self._loop = None
        self._set_timer()

    def insert(self, what: T, due_ns: int) -> None:
        """Let `what` be due at `due_ns`; the receiver tells stale instants from current ones."""
        self._count += 1
        heappush(self._heap, (due_ns, self._count, what))
        if self._heap[0][2] is what:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._heap or self._loop is None:
            return
        left_s = (self._heap[0][0] - self._clock.now_ns()) / _SECOND_NS
        # Not one long sleep: the clock may be set meanwhile, and the machine suspended.
        delay_s = min(max(0.0, left_s), _POLL_S)
        self._timer = self._loop.call_later(delay_s, self._ring, context=self._context)

    def _ring(self) -> None:
        now = self._clock.now_ns()
        offset = now - self._clock.monotonic_ns()
        jumped, self._offset_ns = offset - self._offset_ns, offset
        if abs(jumped) >= _JUMP_NS:
            _log.warning("the wall clock was set by %+.1f s", jumped / _SECOND_NS)
            self._on_jump(jumped)
        heap = self._heap
        while heap and heap[0][0] <= now + SLACK_NS:
            due, _, what = heappop(heap)
            self._on_due(what, due, max(now, due))
        self._set_timer()
