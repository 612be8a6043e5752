"""The next run of a task by the monotonic clock: grids, delays, and spare time.

Comes from: kernel/scheduler.py
Goes to: kernel/timetable.py
"""

import random
from collections.abc import Callable

from nightdesk.kernel.entries import Entry, Outcome
from nightdesk.kernel.timetable import MS_NS

__all__ = ["Planner"]

_SECOND_NS = 1_000_000_000
_FREE_DELAY_NS = 100 * MS_NS
_MAX_SPINS = 64  # runs in a row at no delay, before a task rests for one slot
_STARTS_PER_MS = 16


class Planner:
    """Decides when an entry is due next.

    Args:
        random: For jitter.
        insert: Lets an entry be due at an instant.
        run_now: Lets it run as soon as it can.
        complete: Ends it, with the reason.
    """

    def __init__(
        self,
        random: random.Random,
        insert: Callable[[Entry, int], None],
        run_now: Callable[[Entry], None],
        complete: Callable[[Entry, str], None],
    ) -> None:
        self._random = random
        self._insert = insert
        self._run_now = run_now
        self._complete = complete
        self._started: dict[int, int] = {}

    def begin_grid(self, entry: Entry, now: int) -> None:
        """Start the fixed rate anew: at once, but sixteen tasks of one interval per millisecond.

        So a few tasks start together, and 100,000 do not fire in one burst for ever after. Not one
        per millisecond: each wake-up of an idle process costs more than sixteen small runs.
        """
        interval = entry.interval_ns
        if entry.asleep or not interval:
            return
        number = self._started.get(interval, 0)
        self._started[interval] = number + 1
        entry.grid_ns = now + number // _STARTS_PER_MS * MS_NS % interval
        self._insert(entry, self.jittered(entry, entry.grid_ns))

    def begin_anew(self) -> None:
        """The grids that begin from now on are spread from the first place again."""
        self._started.clear()

    def jittered(self, entry: Entry, due_ns: int) -> int:
        """Return `due_ns` with the random delay of the task's schedule."""
        jitter = entry.trigger.jitter_ns
        return due_ns + int(self._random.random() * jitter) if jitter else due_ns

    def rearm(self, entry: Entry, now: int, outcome: Outcome) -> None:
        """Plan the next run after a good one."""
        if outcome is not None and type(outcome) not in (float, int):
            outcome = None  # a plain function may return what it likes
        interval = entry.interval_ns
        grid = entry.grid_ns
        if outcome is None and interval and grid >= 0:
            if grid <= now:  # ticks that passed meanwhile become this one run
                passed = (now - grid) // interval + 1
                entry.missed += passed
                grid += passed * interval
                entry.grid_ns = grid
            self._insert(entry, self.jittered(entry, grid))
        elif entry.asleep:
            return
        elif outcome is not None:
            self._rearm_after(entry, now, outcome)  # type: ignore[arg-type]
        else:
            self._rearm_by_kind(entry, now)

    def _rearm_after(self, entry: Entry, now: int, delay_s: float) -> None:
        """The task said itself when: its word goes before the schedule's."""
        delay = int(delay_s * _SECOND_NS) if 0 < delay_s < 1e9 else 0
        if not delay:
            entry.spins += 1
            if entry.spins < _MAX_SPINS:
                self._again(entry, now)
                return
            # Two states that hand the task to each other for ever must not stop time itself.
            delay = MS_NS
        entry.spins = 0
        if 0 <= entry.grid_ns < now + delay:
            behind = now + delay - entry.grid_ns
            entry.grid_ns += (behind // entry.interval_ns + 1) * entry.interval_ns
        self._insert(entry, now + delay)

    def _rearm_by_kind(self, entry: Entry, now: int) -> None:
        kind = entry.trigger.kind
        if kind == "free":
            self._insert(entry, now + _FREE_DELAY_NS)
        elif kind == "once" or (kind == "instant" and not entry.wall_ns):
            self._complete(entry, "ran as scheduled")
        elif kind == "continuous":
            # A run shorter than a slot rests until the next one: an empty task would otherwise spin.
            if now - entry.started_ns >= MS_NS:
                self._again(entry, now)
            else:
                self._insert(entry, now + MS_NS)

    def _again(self, entry: Entry, now: int) -> None:
        entry.ready_ns = now
        self._run_now(entry)
