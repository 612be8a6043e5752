"""When each task runs: grids, calendars, sessions, dependencies, and the answers to failure.

Due times fall into slots of one millisecond, which is what a loop's timers can keep: a dictionary from
slot to entries and one heap of slots make 100,000 periodic tasks cheap, with one timer for all.
Intervals are counted by the monotonic clock, calendars by the wall clock (R-27).

Comes from: desk.py, kernel/inbox.py (events wake tasks)
Goes to: kernel/runner.py, kernel/supervisor.py
"""

import asyncio
import logging
import random
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import Context, copy_context
from heapq import heappop, heappush
from typing import Any

import msgspec

from nightdesk.abc import Clock, Observer, Place
from nightdesk.errors import (
    CommandError,
    DuplicateTaskError,
    TaskCycleError,
    UnknownTaskError,
)
from nightdesk.kernel.figures import Histogram
from nightdesk.kernel.hours import Calendar, Calendars, instant_in_words
from nightdesk.kernel.loop import LANE, OWNER, Lane
from nightdesk.kernel.runner import (
    DONE,
    Entry,
    Finish,
    Outcome,
    Registration,
    Runner,
    Stage,
)
from nightdesk.kernel.supervisor import Supervisor, describe
from nightdesk.kernel.triggers import compile_trigger
from nightdesk.model.health import TaskHealth
from nightdesk.model.priority import Priority
from nightdesk.model.schedule import Schedule

__all__ = ["Scheduler"]

_MS_NS = 1_000_000
_SECOND_NS = 1_000_000_000
_SLACK_NS = 100_000  # a timer may ring this early
_NEVER = 1 << 62
_ENTRIES_PER_RING = 1024
_FREE_DELAY_NS = 100 * _MS_NS
_MAX_SPINS = 64  # runs in a row at no delay, before a task rests for one slot
_BLOCKED_NS = 50 * _MS_NS
_WALL_POLL_S = 5.0
_CLOCK_JUMP_NS = _SECOND_NS // 2
_REMEMBERED = 64  # runs of one task that its figures are taken from
_MAX_COALESCED = 1000

_IDLE, _HELD, _RUNNING = Stage.IDLE, Stage.HELD, Stage.RUNNING

_log = logging.getLogger(__name__)


class _Session:
    """One market calendar and the tasks that keep its hours."""

    __slots__ = ("calendar", "change_ns", "entries", "phase")

    def __init__(self, calendar: Calendar) -> None:
        self.calendar = calendar
        self.phase = ""
        self.change_ns = 0
        self.entries: dict[str, Entry] = {}


class Scheduler:
    """Runs registered tasks at their times.

    Args:
        max_concurrent: Cycles under way at once, in all.
        group_limits: The same for groups.
        on_change: Told when a task is paused, quarantined, completed, stopped or started again, so
            that it can be kept.
        place: Where this scheduler is; shows in the health of its tasks.
        supervisor: Answers failures; the default follows R-23.
        escalate_after: So many quarantined tasks of one group pause the rest of the group.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        random: random.Random,
        calendars: Calendars | None = None,
        observers: Sequence[Observer] = (),
        max_concurrent: int = 1000,
        group_limits: Mapping[str, int] | None = None,
        on_change: Callable[[str, TaskHealth], None] | None = None,
        place: Place = "desk",
        supervisor: Supervisor | None = None,
        escalate_after: int | None = None,
    ) -> None:
        self._clock = clock
        self._monotonic = clock.monotonic_ns
        self._random = random
        self._calendars = calendars or Calendars()
        self._step_observers = [
            o.on_step for o in observers if type(o).on_step is not Observer.on_step
        ]
        self._on_change = on_change
        self._place = place
        self._escalate_after = escalate_after
        self._supervisor = supervisor or Supervisor(random=random, observers=observers)
        self._group_limits = dict(group_limits or {})
        self._runner = Runner(
            clock=clock,
            max_concurrent=max_concurrent,
            capacities={f"group:{name}": n for name, n in self._group_limits.items()},
            on_finished=self._on_finished,
            on_stuck=self._on_stuck,
        )
        self._context = copy_context()
        self._context.run(OWNER.set, "")
        self._timer_context = Context()
        self._timer_context.run(LANE.set, Lane.CRITICAL)
        self._entries: dict[str, Entry] = {}
        self._listening: dict[str, dict[str, Entry]] = {}
        self._sessions: dict[str, _Session] = {}
        self._started = False
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        # Due times.
        self._slots: dict[int, list[Entry]] = {}
        self._slot_heap: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_slot = _NEVER
        self._phases: dict[int, int] = {}
        # Calendar times.
        self._walls: list[tuple[int, int, Entry | _Session]] = []
        self._wall_count = 0
        self._wall_timer: asyncio.TimerHandle | None = None
        self._offset_ns = 0
        self._lags = Histogram()

    # --- Registration -------------------------------------------------------------------------------

    def add(
        self, registration: Registration, *, status: TaskHealth | str | None = None
    ) -> None:
        """Register a task; it runs at once if the scheduler does.

        Args:
            status: What is known from before: a task that was paused, quarantined, stopped or
                completed stays so until somebody resumes it.

        Raises:
            DuplicateTaskError: The id is taken.
            ConfigError: The schedule cannot be used.
            TaskCycleError: Its `after` closes a circle.
            UnknownTaskError: The scheduler runs, and a task named in `after` does not exist.
        """
        if registration.task_id in self._entries:
            raise DuplicateTaskError(registration.task_id)
        trigger = compile_trigger(
            registration.schedule, self._calendars, f"task {registration.task_id!r}"
        )
        self._check_after(registration)
        pool = self._runner.pool_of(registration.priority, trigger)
        entry = Entry(registration, trigger, pool, self._context)
        entry.claims = self._claims(registration)
        self._entries[entry.id] = entry
        self._listen(entry)
        self._restore(entry, status)
        if self._started:
            self._connect(entry)
            if entry.mode == "active":
                self._arm_first(entry, self._monotonic())

    async def remove(self, task_id: str, timeout_s: float = 5.0) -> bool:
        """Take a task out, cancelling the cycle it is in; False if that goes on after `timeout_s`."""
        entry = self._entry(task_id)
        entry.mode = "removed"
        self._unlisten(entry)
        self._runner.withdraw(entry)
        waits = self._runner.cancel(entry)
        del self._entries[task_id]
        for dependent in entry.dependents or ():
            self._release_held(dependent)
        end = self._monotonic() + int(timeout_s * _SECOND_NS)
        while waits and entry.worker is not None:
            if self._monotonic() >= end:
                _log.error("task %s was removed but ignores its cancellation", task_id)
                return False
            await asyncio.sleep(0.005)
        return True

    def knows(self, task_id: str) -> bool:
        """Return whether a task of this id is registered."""
        return task_id in self._entries

    @property
    def task_count(self) -> int:
        return len(self._entries)

    async def start(self) -> None:
        """Check the dependencies and begin to run.

        Raises:
            UnknownTaskError: A task named in some `after` does not exist.
        """
        if self._started:
            return
        for entry in self._entries.values():
            for name in entry.registration.after:
                self._entry(name)
        self._loop = asyncio.get_running_loop()
        self._started = True
        self._offset_ns = self._clock.now_ns() - self._monotonic()
        for entry in self._entries.values():
            self._connect(entry)
        self._runner.start()
        now = self._monotonic()
        for entry in self._entries.values():
            if entry.mode == "active":
                self._arm_first(entry, now)
        self._set_timer()

    async def stop(self, timeout_s: float = 8.0) -> list[str]:
        """Run nothing new, wait for what runs, cancel the rest after half of `timeout_s`.

        Returns:
            The tasks whose cycle still goes on, by name.
        """
        self._stopping = True
        for timer in (self._timer, self._wall_timer):
            if timer is not None:
                timer.cancel()
        stuck = await self._runner.stop(timeout_s) if self._started else []
        for task_id in stuck:
            _log.error("task %s ignores its cancellation and is left behind", task_id)
        return stuck

    def _entry(self, task_id: str) -> Entry:
        entry = self._entries.get(task_id)
        if entry is None:
            raise UnknownTaskError(task_id, self._entries)
        return entry

    def _claims(self, registration: Registration) -> tuple[str, ...]:
        if registration.group in self._group_limits:
            return (*registration.keys, f"group:{registration.group}")
        return registration.keys

    def _check_after(self, new: Registration) -> None:
        if self._started:
            for name in new.after:
                self._entry(name)

        def follow(name: str, trail: list[str]) -> None:
            if name == new.task_id:
                raise TaskCycleError([*trail, name])
            entry = self._entries.get(name)
            for further in entry.registration.after if entry is not None else ():
                follow(further, [*trail, name])

        for name in new.after:
            follow(name, [new.task_id])

    def _restore(self, entry: Entry, status: TaskHealth | str | None) -> None:
        if status is None:
            return
        mode = status if isinstance(status, str) else status.status
        if mode in ("paused", "quarantined", "stopped", "completed"):
            entry.mode = mode  # type: ignore[assignment]
        if isinstance(status, TaskHealth):
            entry.why = status.why if entry.mode != "active" else ""
            entry.last_error = status.last_error

    def _listen(self, entry: Entry) -> None:
        for name in entry.trigger.events:
            self._listening.setdefault(name, {})[entry.id] = entry

    def _connect(self, entry: Entry) -> None:
        """Introduce a new entry to its market and to the tasks it comes after."""
        calendar = entry.trigger.calendar
        if calendar is not None:
            session = self._sessions.get(calendar.name)
            if session is None:
                session = self._sessions[calendar.name] = _Session(calendar)
                self._look_at(session)
            session.entries[entry.id] = entry
        self._take_phase(entry)
        if entry.registration.after:
            entry.after_seen = dict.fromkeys(entry.registration.after, 0)
            for name in entry.after_seen:
                other = self._entries[name]
                other.dependents = [*(other.dependents or ()), entry]

    def _unlisten(self, entry: Entry) -> None:
        for name in entry.trigger.events:
            self._listening.get(name, {}).pop(entry.id, None)
        for session in self._sessions.values():
            session.entries.pop(entry.id, None)
        for name in entry.registration.after:
            other = self._entries.get(name)
            if other is not None and other.dependents:
                other.dependents = [d for d in other.dependents if d is not entry]

    # --- Commands ------------------------------------------------------------------------------------

    def wake(self, task_id: str) -> None:
        """Run the task as soon as its keys and a slot are free; while it runs, run it once more.

        An event that concerns a task is a reason to run even while its market is closed.

        Raises:
            UnknownTaskError: No such task.
        """
        entry = self._entry(task_id)
        if entry.mode != "active" or not self._started:
            entry.again = True  # remembered until it may run
        elif entry.stage is _IDLE:
            entry.ready_ns = self._monotonic()
            self._enqueue(entry)
        elif entry.stage is _RUNNING:
            entry.again = True

    def on_event_type(self, name: str) -> int:
        """Wake every task whose schedule names this event type; return how many there are.

        Tasks whose market is in a phase in which they pause do not run.
        """
        listening = self._listening.get(name, {})
        for entry in listening.values():
            if not entry.asleep:
                self.wake(entry.id)
        return len(listening)

    def trigger(self, task_id: str) -> None:
        """Run a task now, whatever its schedule says.

        Raises:
            CommandError: It is paused, quarantined, stopped or completed.
        """
        entry = self._entry(task_id)
        if entry.mode not in ("active", "backoff"):
            raise CommandError(
                f"task {task_id!r} is {entry.mode}; `nightdesk tasks resume {task_id}` first."
            )
        if entry.mode == "backoff":
            self._activate(entry)
        else:
            self.wake(task_id)

    def pause(self, task_id: str, reason: str = "") -> None:
        """Let the current cycle end and run no other until `resume`."""
        self._set_aside(self._entry(task_id), "paused", reason or "by the operator")

    def resume(self, task_id: str) -> None:
        """Run a task again that was paused, quarantined or stopped, or waits after a failure.

        Raises:
            CommandError: Its last cycle still runs, ignoring its cancellation.
        """
        entry = self._entry(task_id)
        if entry.mode != "active":
            self._activate(entry)

    def stop_task(self, task_id: str) -> None:
        """Cancel the current cycle and run no other until `start_task`."""
        entry = self._entry(task_id)
        self._set_aside(entry, "stopped", "by the operator")
        self._runner.cancel(entry)

    def start_task(self, task_id: str) -> None:
        """Run a task again, also one that was completed. Harmless if it runs."""
        self.resume(task_id)

    def start_all(self, group: str | None = None) -> list[str]:
        """Start every task that is stopped, of `group` or of all; return their ids."""
        chosen = [e.id for e in self._members(group) if e.mode == "stopped"]
        for task_id in chosen:
            self.start_task(task_id)
        return chosen

    def stop_all(self, group: str | None = None) -> list[str]:
        """Stop every task that may run, of `group` or of all; return their ids."""
        chosen = [e.id for e in self._members(group) if e.mode in ("active", "backoff")]
        for task_id in chosen:
            self.stop_task(task_id)
        return chosen

    def adjust(
        self,
        task_id: str,
        *,
        schedule: Schedule | None = None,
        priority: Priority | str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Change a task while it runs; what is None stays. 0 seconds switch the timeout off.

        Raises:
            ConfigError: The new schedule cannot be used; the task keeps the old one.
            ValueError: No such priority.
        """
        entry = self._entry(task_id)
        changes: dict[str, Any] = {}
        if priority is not None:
            changes["priority"] = Priority.parse(priority)
        if timeout_s is not None:
            changes["timeout_s"] = timeout_s or None
        if schedule is not None:
            trigger = compile_trigger(schedule, self._calendars, f"task {task_id!r}")
            changes["schedule"] = schedule
            self._unlisten(entry)
            entry.trigger = trigger
        entry.registration = msgspec.structs.replace(entry.registration, **changes)
        entry.timeout_ns = int((entry.registration.timeout_s or 0) * _SECOND_NS)
        waited = entry.stage not in (_IDLE, _RUNNING)
        self._runner.withdraw(entry)
        pool = self._runner.pool_of(entry.registration.priority, entry.trigger)
        if pool is not entry.pool:
            entry.move_to(pool, self._context)
        if schedule is not None:
            self._listen(entry)
            if self._started:
                self._connect(entry)
                if entry.mode == "active":
                    self._arm_first(entry, self._monotonic())
        if waited and entry.stage is _IDLE and entry.mode == "active":
            self._enqueue(entry)

    def _members(self, group: str | None) -> list[Entry]:
        return [
            entry
            for entry in self._entries.values()
            if group is None or entry.registration.group == group
        ]

    def _set_aside(self, entry: Entry, mode: str, why: str) -> None:
        entry.mode = mode  # type: ignore[assignment]
        entry.why = why
        entry.due_ns = 0
        entry.again = False
        self._runner.withdraw(entry)
        self._tell(entry)

    def _activate(self, entry: Entry) -> None:
        if entry.worker is not None and entry.mode == "quarantined":
            raise CommandError(
                f"task {entry.id!r} cannot be resumed: its last cycle still runs, ignoring its "
                "cancellation. Restart the desk, and make the task let `asyncio.CancelledError` pass."
            )
        entry.mode = "active"
        entry.why = ""
        entry.failures = None
        entry.spins = 0
        if self._started:
            if entry.stage is _RUNNING:
                entry.again = True
            else:
                self._take_phase(entry)
                self._arm_first(entry, self._monotonic())
        self._tell(entry)

    def _tell(self, entry: Entry) -> None:
        if self._on_change is not None:
            self._on_change(entry.id, self._health(entry))

    # --- Due times by the monotonic clock --------------------------------------------------------------

    def _arm_first(self, entry: Entry, now: int) -> None:
        """Plan the first run after a start, a resume or a new schedule."""
        trigger = entry.trigger
        entry.due_ns = 0
        if trigger.by_wall_clock:
            self._plan_wall(entry)
        elif trigger.kind == "every":
            self._begin_grid(entry, now)
        elif trigger.kind != "event" and not entry.asleep:
            entry.ready_ns = now
            self._enqueue_idle(entry)
        if entry.again:
            entry.again = False
            entry.ready_ns = now
            self._enqueue_idle(entry)

    def _enqueue_idle(self, entry: Entry) -> None:
        if entry.stage is _IDLE:
            self._enqueue(entry)

    def _begin_grid(self, entry: Entry, now: int) -> None:
        """Start the fixed rate anew: at once, but one task per millisecond of those with one interval.

        So a few tasks start together, and 100,000 do not fire in one burst for ever after.
        """
        interval = entry.interval_ns
        if entry.asleep or not interval:
            return
        number = self._phases.get(interval, 0)
        self._phases[interval] = number + 1
        entry.grid_ns = now + number * _MS_NS % interval
        self._insert(entry, self._jittered(entry, entry.grid_ns))

    def _jittered(self, entry: Entry, due_ns: int) -> int:
        jitter = entry.trigger.jitter_ns
        return due_ns + int(self._random.random() * jitter) if jitter else due_ns

    def _insert(self, entry: Entry, due_ns: int) -> None:
        """Let `entry` be due at `due_ns`."""
        entry.due_ns = due_ns
        slot = -(-due_ns // _MS_NS)
        armed = entry.armed
        if armed and armed <= slot:
            return  # rings earlier, and looks again then: no heap of stale alarms
        entry.armed = slot
        bucket = self._slots.get(slot)
        if bucket is not None:
            bucket.append(entry)
            return
        self._slots[slot] = [entry]
        heappush(self._slot_heap, slot)
        if slot < self._timer_slot:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._slot_heap or self._loop is None or self._stopping:
            self._timer_slot = _NEVER
            return
        self._timer_slot = self._slot_heap[0]
        delay_ns = self._timer_slot * _MS_NS - self._monotonic()
        self._timer = self._loop.call_later(
            max(0.0, delay_ns / _SECOND_NS), self._ring, context=self._timer_context
        )

    def _ring(self) -> None:
        """Hand over what is due, at most so many at once that others get their turn in between."""
        self._timer = None
        now = self._monotonic()
        last = (now + _SLACK_NS) // _MS_NS
        heap = self._slot_heap
        handed = 0
        while heap and heap[0] <= last and handed < _ENTRIES_PER_RING:
            slot = heappop(heap)
            bucket = self._slots.pop(slot)
            handed += len(bucket)
            for entry in bucket:
                if entry.armed == slot:
                    entry.armed = 0
                    if entry.due_ns:
                        self._fall_due(entry, now)
        self._set_timer()

    def _fall_due(self, entry: Entry, now: int) -> None:
        due = entry.due_ns
        if due > now + _SLACK_NS:
            self._insert(entry, due)
        elif entry.mode == "backoff":
            entry.mode = "active"
            entry.due_ns = 0
            entry.ready_ns = due
            self._enqueue(entry)
        elif entry.stage is _IDLE and entry.mode == "active":
            # A run that is under way or queued makes this tick superfluous: `_rearm` counts it.
            if entry.grid_ns and due >= entry.grid_ns:
                entry.grid_ns += entry.interval_ns
            entry.due_ns = 0
            entry.ready_ns = due
            self._enqueue(entry)

    def _enqueue(self, entry: Entry) -> None:
        if self._stopping:
            return
        if entry.after_seen is not None and not self._may_follow(entry):
            entry.stage = _HELD
            return
        self._runner.enqueue(entry)

    # --- Dependencies ------------------------------------------------------------------------------------

    def _may_follow(self, entry: Entry) -> bool:
        """Whether every task of `after` succeeded since this one last ran; if so, begin to count anew."""
        seen = entry.after_seen
        assert seen is not None
        if self._missing(entry):
            return False
        for name in seen:
            other = self._entries.get(name)
            seen[name] = other.runs - other.errors if other is not None else 0
        return True

    def _missing(self, entry: Entry) -> list[str]:
        missing = []
        for name, count in (entry.after_seen or {}).items():
            other = self._entries.get(name)
            if other is None or other.mode == "completed":
                continue  # it will not run again: nothing to wait for
            if other.runs - other.errors <= count:
                missing.append(name)
        return missing

    def _release_held(self, entry: Entry) -> None:
        if entry.stage is _HELD and entry.mode == "active" and self._may_follow(entry):
            self._runner.enqueue(entry)

    # --- After a cycle -------------------------------------------------------------------------------------

    def _on_finished(self, entry: Entry, finish: Finish) -> None:
        started, ended, outcome, failure, cause, blocked = finish
        lag = started - entry.ready_ns
        duration = ended - started
        runs = entry.runs
        entry.runs = runs + 1
        self._remember(entry, runs, lag, duration)
        for on_step in self._step_observers:
            on_step(entry.id, started, duration, lag if lag > 0 else 0)
        if blocked and duration > _BLOCKED_NS:
            self._note_blocking(entry, duration, ended)
        if entry.interval_ns and duration > entry.interval_ns:
            self._note_overrun(entry, duration, ended)
        if failure is not None:
            self._fail(entry, failure, ended)
            return
        if entry.failures is not None:
            self._supervisor.forgive(entry.failures)
        if cause:
            return  # stopped or removed: nothing follows
        if outcome is DONE:
            self._complete(entry, "done")
        elif entry.mode == "active":
            self._rearm(entry, ended, outcome)
            if entry.again:
                entry.again = False
                if entry.mode == "active" and entry.stage is _IDLE:
                    entry.ready_ns = ended
                    self._enqueue(entry)
        if entry.dependents is not None:
            for dependent in entry.dependents:
                self._release_held(dependent)

    def _remember(self, entry: Entry, runs: int, lag: int, duration: int) -> None:
        self._lags.add(lag)
        lags, durations = entry.lags, entry.durations
        if lags is None or durations is None:
            entry.lags, entry.durations = array("q", (lag,)), array("q", (duration,))
        elif len(lags) < _REMEMBERED:
            lags.append(lag)
            durations.append(duration)
        else:
            index = runs % _REMEMBERED
            lags[index] = lag
            durations[index] = duration

    def _rearm(self, entry: Entry, now: int, outcome: Outcome) -> None:
        """Plan the next run after a good one."""
        interval = entry.interval_ns
        grid = entry.grid_ns
        if outcome is None and interval and grid:
            if grid <= now:  # ticks that passed meanwhile become this one run
                passed = (now - grid) // interval + 1
                entry.missed += passed
                grid += passed * interval
                entry.grid_ns = grid
            self._insert(entry, self._jittered(entry, grid))
            return
        if entry.asleep:
            return
        if outcome is not None:
            assert outcome is not DONE
            self._rearm_after(entry, now, outcome)
            return
        kind = entry.trigger.kind
        if kind == "free":
            self._insert(entry, now + _FREE_DELAY_NS)
        elif kind == "continuous":
            self._rearm_continuous(entry, now)
        elif kind == "once" or (kind == "instant" and not entry.wall_ns):
            self._complete(entry, "ran as scheduled")

    def _rearm_after(self, entry: Entry, now: int, delay_s: Any) -> None:
        """The task said itself when: its word goes before the schedule's."""
        delay = int(delay_s * _SECOND_NS) if 0 < delay_s < 1e9 else 0
        if not delay:
            entry.spins += 1
            if entry.spins < _MAX_SPINS:
                entry.ready_ns = now
                self._enqueue(entry)
                return
            # Two states that hand the task to each other for ever must not stop time itself.
            delay = _MS_NS
        entry.spins = 0
        if entry.grid_ns and now + delay > entry.grid_ns:
            behind = now + delay - entry.grid_ns
            entry.grid_ns += (behind // entry.interval_ns + 1) * entry.interval_ns
        self._insert(entry, now + delay)

    def _rearm_continuous(self, entry: Entry, now: int) -> None:
        # A run shorter than a slot rests until the next one: an empty task would otherwise spin.
        if now - entry.started_ns >= _MS_NS:
            entry.ready_ns = now
            self._enqueue(entry)
        else:
            self._insert(entry, now + _MS_NS)

    def _complete(self, entry: Entry, why: str) -> None:
        entry.mode = "completed"
        entry.why = why
        entry.due_ns = 0
        self._tell(entry)
        for dependent in entry.dependents or ():
            self._release_held(dependent)
        if entry.registration.on_final is not None:
            entry.registration.on_final(self._health(entry))

    def _note_blocking(self, entry: Entry, duration: int, now: int) -> None:
        entry.overruns += 1
        text = f"held the loop for {duration / 1e9:.2f} s without awaiting"
        self._supervisor.warn(entry.id, "blocking", text, now)

    def _note_overrun(self, entry: Entry, duration: int, now: int) -> None:
        # The grid stretches by itself: the next run is the next point of it after this moment.
        entry.overruns += 1
        text = f"took {duration / 1e9:.2f} s, longer than its interval of {entry.interval_ns / 1e9:g} s"
        self._supervisor.warn(entry.id, "overrun", text, now)

    # --- Failure --------------------------------------------------------------------------------------------

    def _fail(self, entry: Entry, error: BaseException, now: int) -> None:
        entry.errors += 1
        entry.last_error = describe(error)
        entry.spins = 0
        entry.failures, verdict = self._supervisor.answer(
            entry.id,
            entry.registration.type,
            entry.failures,
            error,
            now_ns=now,
            runs=entry.runs,
        )
        if entry.mode != "active":
            return  # paused, stopped or removed while it ran
        if verdict.quarantined:
            self._quarantine(entry, verdict.consequence)
            return
        entry.mode = "backoff"
        entry.why = verdict.consequence
        entry.restarts += 1
        self._insert(entry, now + int(verdict.delay_s * _SECOND_NS))

    def _on_stuck(self, entry: Entry) -> None:
        error = RuntimeError("its cycle was cancelled and goes on all the same")
        now = self._monotonic()
        entry.last_error = describe(error)
        verdict = self._supervisor.quarantine(
            entry.id, entry.registration.type, error, now
        )
        if entry.mode != "removed":
            self._quarantine(entry, verdict.consequence)

    def _quarantine(self, entry: Entry, why: str) -> None:
        entry.mode = "quarantined"
        entry.why = why.removeprefix("quarantined: ")
        entry.due_ns = 0
        self._tell(entry)
        group = entry.registration.group
        if self._escalate_after is None or group is None:
            return
        fallen = [e for e in self._members(group) if e.mode == "quarantined"]
        if len(fallen) >= self._escalate_after:
            reason = f"group {group}: {len(fallen)} of its tasks are quarantined"
            for member in self._members(group):
                if member.mode in ("active", "backoff"):
                    self._set_aside(member, "paused", reason)

    # --- Calendar times by the wall clock ----------------------------------------------------------------

    def _plan_wall(self, entry: Entry) -> None:
        due = entry.trigger.next_wall(self._clock.now_ns())
        if due is None:
            entry.wall_ns = 0
            entry.missed += 1
            self._complete(entry, "its time had passed when it was started")
            return
        self._insert_wall(entry, due)

    def _insert_wall(self, what: Entry | _Session, due_ns: int) -> None:
        if isinstance(what, Entry):
            what.wall_ns = due_ns
        else:
            what.change_ns = due_ns
        self._wall_count += 1
        heappush(self._walls, (due_ns, self._wall_count, what))
        if self._walls[0][2] is what or self._wall_timer is None:
            self._set_wall_timer()

    def _set_wall_timer(self) -> None:
        if self._wall_timer is not None:
            self._wall_timer.cancel()
            self._wall_timer = None
        if not self._walls or self._loop is None or self._stopping:
            return
        left_s = (self._walls[0][0] - self._clock.now_ns()) / _SECOND_NS
        # Not one long sleep: the wall clock may be set meanwhile, and the machine suspended.
        delay_s = min(max(0.0, left_s), _WALL_POLL_S)
        self._wall_timer = self._loop.call_later(
            delay_s, self._on_wall, context=self._timer_context
        )

    def _on_wall(self) -> None:
        self._wall_timer = None
        now = self._clock.now_ns()
        self._notice_jump(now)
        walls = self._walls
        while walls and walls[0][0] <= now + _SLACK_NS:
            due, _, what = heappop(walls)
            if isinstance(what, _Session):
                if due == what.change_ns:
                    self._look_at(what)
            elif due == what.wall_ns:
                self._strike(what, due, max(now, due))
        self._set_wall_timer()

    def _strike(self, entry: Entry, due: int, now: int) -> None:
        """An instant of the calendar has come for `entry`: run it, once, however many have passed."""
        passed = -1
        following = None
        for following in self._instants(entry, due):
            passed += 1
            if following > now or passed >= _MAX_COALESCED:
                break
        else:
            following = None
        if following is None:
            entry.wall_ns = 0
        else:
            self._insert_wall(entry, max(following, now + 1))
        if entry.mode not in ("active", "backoff") or entry.asleep:
            return
        entry.missed += max(0, passed)
        monotonic = self._monotonic()
        entry.fired_ns = monotonic
        if entry.mode == "backoff" or entry.stage is not _IDLE:
            entry.missed += 1
        elif entry.trigger.jitter_ns:
            self._insert(entry, self._jittered(entry, monotonic))
        else:
            entry.ready_ns = monotonic - (now - due)
            self._enqueue(entry)

    def _instants(self, entry: Entry, due: int) -> Iterable[int]:
        return entry.trigger.walls(due) if entry.trigger.kind == "cron" else ()

    def _notice_jump(self, now: int) -> None:
        """Plan anew if somebody set the clock back; a clock set forward is seen by what became due."""
        offset = now - self._monotonic()
        jumped, self._offset_ns = offset - self._offset_ns, offset
        if abs(jumped) < _CLOCK_JUMP_NS:
            return
        _log.warning("the wall clock was set by %+.1f s", jumped / _SECOND_NS)
        for session in self._sessions.values():
            self._look_at(session)
        if jumped < 0:
            for entry in list(self._entries.values()):
                if entry.wall_ns and entry.trigger.kind == "cron":
                    self._insert_wall(entry, self._first_new(entry, now))

    def _first_new(self, entry: Entry, now: int) -> int:
        """Return the next instant of `entry` that its last run does not already stand for.

        After the clock was set back by an hour, the daily job of 10:00 that ran must not run again,
        and the job of each minute must not be silent for an hour. So an instant counts as new when
        half of its period has really passed since the last run.
        """
        following = entry.trigger.walls(now)
        first, second = next(iter(following)), next(iter(following))
        if entry.fired_ns:
            real = self._monotonic() + (first - now) - entry.fired_ns
            if 2 * real < second - first:
                return second
        return first

    # --- Sessions -------------------------------------------------------------------------------------------

    def _look_at(self, session: _Session) -> None:
        """Read the phase of a market and let its tasks follow a change at once."""
        wall = self._clock.now_ns()
        phase = session.calendar.phase(wall + _SLACK_NS)
        change = session.calendar.next_change(wall + _SLACK_NS)
        changed, session.phase = session.phase not in ("", phase), phase
        if change is not None:
            self._insert_wall(session, change)
        if not changed:
            return
        now = self._monotonic()
        self._phases.clear()
        for entry in list(session.entries.values()):
            before = entry.interval_ns, entry.asleep
            self._take_phase(entry)
            if (entry.interval_ns, entry.asleep) != before and entry.mode == "active":
                entry.due_ns = entry.grid_ns = 0
                if not entry.trigger.by_wall_clock:
                    self._wake_up(entry, now)

    def _wake_up(self, entry: Entry, now: int) -> None:
        if entry.trigger.kind == "every":
            self._begin_grid(entry, now)
        elif entry.trigger.kind in ("continuous", "once") and not entry.asleep:
            entry.ready_ns = now
            self._enqueue_idle(entry)

    def _take_phase(self, entry: Entry) -> None:
        calendar = entry.trigger.calendar
        phase = self._sessions[calendar.name].phase if calendar is not None else "open"
        entry.asleep = phase in entry.trigger.pauses
        entry.interval_ns = entry.trigger.interval_ns(phase)

    # --- Health -----------------------------------------------------------------------------------------------

    def health(self, task_id: str) -> TaskHealth:
        """Return how one task is.

        Raises:
            UnknownTaskError: No such task.
        """
        return self._health(self._entry(task_id))

    def health_all(self) -> list[TaskHealth]:
        """Return how every task is, in order of registration."""
        return [self._health(entry) for entry in self._entries.values()]

    def next_run_in_words(self, task_id: str) -> str:
        """Return when a task runs next: `in 4 s`, `Mon 09:15 IST`, `paused until Mon 09:15 IST`."""
        return self._words(self._entry(task_id))

    def stats(self) -> dict[str, Any]:
        """Return counts and the distribution of lags over all tasks."""
        return {
            "tasks": len(self._entries),
            "runs": self._lags.count,
            "slots": len(self._slots),
            **self._runner.stats(),
            **{
                f"lag_{name}_s": value / 1e9
                for name, value in self._lags.summary().items()
            },
        }

    def _health(self, entry: Entry) -> TaskHealth:
        registration = entry.registration
        wall, monotonic = self._clock.now_ns(), self._monotonic()
        return TaskHealth(
            task_id=entry.id,
            type=registration.type,
            priority=str(registration.priority),
            group=registration.group,
            runs_in=self._place,
            status=self._status(entry),
            why=self._words(entry),
            runs=entry.runs,
            errors=entry.errors,
            restarts=entry.restarts,
            overruns=entry.overruns,
            missed=entry.missed,
            last_run_ns=wall - (monotonic - entry.started_ns) if entry.runs else 0,
            next_run_ns=self._next_run_ns(entry, wall, monotonic),
            last_error=entry.last_error,
            lag_p99_s=_quantile(entry.lags, 0.99),
            duration_p50_s=_quantile(entry.durations, 0.5),
            duration_p99_s=_quantile(entry.durations, 0.99),
        )

    def _status(self, entry: Entry) -> str:
        if entry.mode != "active":
            return entry.mode
        if entry.stage is _RUNNING:
            return "running"
        return "paused" if entry.asleep and entry.stage is _IDLE else "waiting"

    def _next_run_ns(self, entry: Entry, wall: int, monotonic: int) -> int:
        if entry.mode not in ("active", "backoff"):
            return 0
        if entry.asleep and entry.trigger.calendar is not None:
            return self._sessions[entry.trigger.calendar.name].change_ns
        times = [wall + max(0, entry.due_ns - monotonic)] if entry.due_ns else []
        return min([*times, *([entry.wall_ns] if entry.wall_ns else [])], default=0)

    def _words(self, entry: Entry) -> str:
        wall, monotonic = self._clock.now_ns(), self._monotonic()
        if entry.mode == "paused":
            return f"paused {entry.why}"
        if entry.mode == "quarantined":
            return f"{entry.why}; `nightdesk tasks resume {entry.id}` runs it again"
        if entry.mode not in ("active", "backoff"):
            return f"{entry.mode}: {entry.why}" if entry.why else entry.mode
        if entry.stage is not _IDLE:
            return self._words_of_stage(entry, monotonic)
        due = self._next_run_ns(entry, wall, monotonic)
        if entry.mode == "backoff":
            return f"{entry.last_error}; {_how_soon(due, wall, 'UTC')}"
        if entry.asleep:
            when = instant_in_words(due, wall, entry.trigger.timezone) if due else ""
            return (
                f"paused until {when}" if when else "paused: its market opens no more"
            )
        text = _how_soon(due, wall, entry.trigger.timezone) if due else ""
        events = f"on {', '.join(entry.trigger.events)}" if entry.trigger.events else ""
        return " or ".join(filter(None, (text, events))) or "when it is woken"

    def _words_of_stage(self, entry: Entry, monotonic: int) -> str:
        if entry.stage is _RUNNING:
            return f"running for {(monotonic - entry.started_ns) / 1e9:.1f} s"
        if entry.stage is _HELD:
            return f"waits for a run of {', '.join(self._missing(entry))}"
        if entry.stage is Stage.KEYS:
            return self._runner.keys.why(entry.id).replace("group:", "a slot of group ")
        return "waits for its turn"


def _how_soon(due_ns: int, now_ns: int, timezone: str) -> str:
    left_s = max(0, due_ns - now_ns) / 1e9
    if left_s < 120:
        return f"in {left_s:.0f} s" if left_s >= 10 else f"in {left_s:.1f} s"
    if left_s < 7200:
        return f"in {left_s / 60:.0f} min"
    return instant_in_words(due_ns, now_ns, timezone)


def _quantile(values: "array[int] | None", share: float) -> float:
    if not values:
        return 0.0
    ordered = sorted(values)
    return max(0, ordered[min(len(ordered) - 1, int(share * len(ordered)))]) / 1e9
