"""When each task runs: grids, calendars, sessions, dependencies, and what follows from failure.

Comes from: desk.py, kernel/inbox.py (events wake tasks)
Goes to: kernel/timetable.py, kernel/runner.py, kernel/supervisor.py
"""

import asyncio
import logging
import random
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import copy_context
from typing import Any

import msgspec

from nightdesk.abc import Clock, Observer, Place
from nightdesk.errors import (
    CommandError,
    DuplicateTaskError,
    UnknownTaskError,
)
from nightdesk.kernel.dependencies import Dependencies
from nightdesk.kernel.entries import (
    DONE,
    NEVER,
    Entry,
    Mode,
    Outcome,
    Registration,
    Stage,
)
from nightdesk.kernel.figures import Histogram
from nightdesk.kernel.hours import Calendars
from nightdesk.kernel.loop import OWNER
from nightdesk.kernel.planner import Planner
from nightdesk.kernel.reports import Reports, reason_in
from nightdesk.kernel.runner import Runner
from nightdesk.kernel.sessions import Session, Sessions
from nightdesk.kernel.supervisor import Supervisor, describe
from nightdesk.kernel.timetable import MS_NS, Timetable, WallTable
from nightdesk.kernel.triggers import compile_trigger
from nightdesk.model.health import TaskHealth
from nightdesk.model.priority import Priority
from nightdesk.model.schedule import Schedule

__all__ = ["Scheduler"]

_SECOND_NS = 1_000_000_000
_BLOCKED_NS = 250 * MS_NS  # R-24; less may be the machine's doing
_REMEMBERED = 64  # runs of one task that its figures are taken from

_IDLE, _HELD, _RUNNING = Stage.IDLE, Stage.HELD, Stage.RUNNING

_log = logging.getLogger(__name__)


class Scheduler:
    """Runs registered tasks at their times.

    Attributes:
        lags: How late cycles began, over all tasks, in nanoseconds.

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
        self._calendars = calendars or Calendars()
        self._step_observers = [
            o.on_step for o in observers if type(o).on_step is not Observer.on_step
        ]
        self._on_change = on_change
        self._escalate_after = escalate_after
        self._supervisor = supervisor or Supervisor(random=random, observers=observers)
        self._group_limits = dict(group_limits or {})
        self._runner = Runner(
            clock=clock,
            max_concurrent=max_concurrent,
            capacities={f"group:{name}": n for name, n in self._group_limits.items()},
            on_ran=self._on_ran,
            on_failed=self._on_failed,
            on_stuck=self._on_stuck,
        )
        self._context = copy_context()
        self._context.run(OWNER.set, "")
        self._entries: dict[str, Entry] = {}
        self._dependencies = Dependencies(self._entries)
        self._reports = Reports(
            clock, place, self._runner.keys, self._dependencies.missing
        )
        self._listening: dict[str, dict[str, Entry]] = {}
        self._sessions = Sessions(clock)
        self._dues = Timetable(clock, self._fall_due)
        self._walls: WallTable[Entry | Session] = WallTable(
            clock, self._strike, self._on_jump
        )
        self._planner = Planner(
            random, self._dues.insert, self._enqueue, self._complete
        )
        self.lags = Histogram()
        self._started = False
        self._stopping = False

    # --- Registration -------------------------------------------------------------------------------

    def add(
        self,
        registration: Registration,
        *,
        status: TaskHealth | str | None = None,
        streak: int = 0,
    ) -> None:
        """Register a task; it runs at once if the scheduler does.

        Args:
            status: What is known from before: a task that was paused, quarantined, stopped or
                completed stays so until somebody resumes it.
            streak: Failures in a row before it came here; they count towards quarantine.

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
        self._dependencies.check(registration)
        if self._started:
            for name in registration.after:
                self._entry(name)
        pool = self._runner.pool_of(registration.priority, trigger)
        entry = Entry(registration, trigger, pool, self._context)
        entry.claims = self._claims(registration)
        self._entries[entry.id] = entry
        self._listen(entry)
        self._restore(entry, status)
        entry.failures = self._supervisor.remember(streak, self._monotonic())
        if self._started:
            self._connect(entry)
            if entry.mode == "active":
                self._arm_first(entry, self._monotonic())

    async def remove(self, task_id: str, timeout_s: float = 5.0) -> bool:
        """Take a task out, cancelling the cycle it is in; False if that goes on after `timeout_s`."""
        entry = self._entry(task_id)
        entry.mode = "removed"
        self._unlisten(entry)
        self._dependencies.disconnect(entry)
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

    def is_active(self, task_id: str) -> bool:
        """Return whether a task works: it is here, and nobody and nothing has set it aside."""
        entry = self._entries.get(task_id)
        return entry is not None and entry.mode == "active"

    @property
    def task_count(self) -> int:
        return len(self._entries)

    async def start(self) -> None:
        """Check the dependencies and begin to run, also after a `stop`.

        Raises:
            UnknownTaskError: A task named in some `after` does not exist.
        """
        if self._started:
            return
        for entry in self._entries.values():
            for name in entry.registration.after:
                self._entry(name)
        self._started = True
        self._stopping = False
        self._dues.start()
        self._walls.start()
        self._runner.start()
        for entry in self._entries.values():
            self._connect(entry)
        now = self._monotonic()
        for entry in self._entries.values():
            if entry.mode == "active":
                self._arm_first(entry, now)

    async def stop(self, timeout_s: float = 8.0) -> list[str]:
        """Run nothing new, wait for what runs, cancel the rest after half of `timeout_s`.

        Returns:
            The tasks whose cycle still goes on, by name.
        """
        self._stopping = True
        self._dues.stop()
        self._walls.stop()
        stuck = await self._runner.stop(timeout_s) if self._started else []
        self._started = False
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

    def _restore(self, entry: Entry, status: TaskHealth | str | None) -> None:
        if status is None:
            return
        mode = status if isinstance(status, str) else status.status
        if mode in ("paused", "quarantined", "stopped", "completed"):
            entry.mode = mode  # type: ignore[assignment]
        if isinstance(status, TaskHealth):
            entry.why = reason_in(status.why)
            entry.last_error = status.last_error

    def _listen(self, entry: Entry) -> None:
        for name in entry.trigger.events:
            self._listening.setdefault(name, {})[entry.id] = entry

    def _connect(self, entry: Entry) -> None:
        """Introduce a new entry to its market and to the tasks it comes after."""
        session = self._sessions.join(entry)
        if session is not None:
            if session.change_ns:
                self._walls.insert(session, session.change_ns)
            warning = session.calendar.warning(self._clock.now_ns())
            if warning is not None:
                _log.warning("%s", warning)
        self._dependencies.connect(entry)

    def _unlisten(self, entry: Entry) -> None:
        for name in entry.trigger.events:
            self._listening.get(name, {}).pop(entry.id, None)
        self._sessions.leave(entry)

    # --- Commands ------------------------------------------------------------------------------------

    def successes(self, task_id: str) -> int | None:
        """Return how often a task has succeeded; None if it is not here."""
        entry = self._entries.get(task_id)
        return entry.successes if entry is not None else None

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
            self._dues.insert(entry, self._monotonic())
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

    def _set_aside(self, entry: Entry, mode: Mode, why: str) -> None:
        entry.mode = mode
        entry.why = why
        entry.due_ns = NEVER
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
                self._arm_first(entry, self._monotonic())
        self._tell(entry)

    def _tell(self, entry: Entry) -> None:
        if self._on_change is not None:
            self._on_change(entry.id, self._reports.health(entry))

    # --- Due times by the monotonic clock --------------------------------------------------------------

    def _arm_first(self, entry: Entry, now: int) -> None:
        """Plan the first run after a start, a resume or a new schedule."""
        trigger = entry.trigger
        entry.due_ns = NEVER
        if trigger.by_wall_clock:
            self._plan_wall(entry)
        elif trigger.kind == "every":
            self._planner.begin_grid(entry, now)
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

    def _fall_due(self, entry: Entry, now: int) -> None:
        due = entry.due_ns
        if entry.mode == "backoff":
            entry.mode = "active"
            if entry.asleep:
                entry.due_ns = NEVER  # its market closed meanwhile
                return
        elif entry.stage is not _IDLE or entry.mode != "active":
            return  # a run under way or queued makes this tick superfluous: `Planner.rearm` counts it
        elif 0 <= entry.grid_ns <= due:
            entry.grid_ns += entry.interval_ns
        entry.due_ns = NEVER
        entry.ready_ns = due
        self._enqueue(entry)

    def _enqueue(self, entry: Entry) -> None:
        if self._stopping:
            return
        if entry.after_seen is None or self._dependencies.admit(entry):
            self._runner.enqueue(entry)
        else:
            entry.stage = _HELD

    def _release_held(self, entry: Entry) -> None:
        held = entry.stage is _HELD and entry.mode == "active"
        if held and self._dependencies.admit(entry):
            self._runner.enqueue(entry)

    # --- After a cycle -------------------------------------------------------------------------------------

    def _on_ran(self, entry: Entry, outcome: Outcome, blocked: bool) -> None:
        now = entry.ended_ns
        entry.successes += 1
        self._remember(entry, now - entry.started_ns, blocked)
        if entry.failures is not None:
            self._supervisor.forgive(entry.failures)
        if outcome is DONE and entry.mode != "removed":
            self._complete(entry, "it said so")
        elif entry.mode == "active":
            self._planner.rearm(entry, now, outcome)
            if entry.again:
                entry.again = False
                entry.ready_ns = now
                self._enqueue_idle(entry)
        if entry.dependents is not None:
            for dependent in entry.dependents:
                self._release_held(dependent)

    def _remember(self, entry: Entry, duration: int, blocked: bool) -> None:
        lag = entry.started_ns - entry.ready_ns
        runs = entry.runs
        entry.runs = runs + 1
        self.lags.add(lag)
        lags, durations = entry.lags, entry.durations
        if lags is None or durations is None:
            entry.lags, entry.durations = array("q", (lag,)), array("q", (duration,))
        elif runs < _REMEMBERED:
            lags.append(lag)
            durations.append(duration)
        else:
            lags[runs % _REMEMBERED] = lag
            durations[runs % _REMEMBERED] = duration
        for on_step in self._step_observers:
            on_step(entry.id, entry.started_ns, duration, max(0, lag))
        if blocked and duration > _BLOCKED_NS:
            text = f"held the loop for {duration / 1e9:.2f} s without awaiting"
            self._note_overrun(entry, "blocking", text)
        if entry.interval_ns and duration > entry.interval_ns:
            # The grid stretches by itself: the next run is the next point of it after this moment.
            interval = entry.interval_ns / 1e9
            text = f"took {duration / 1e9:.2f} s, longer than its interval of {interval:g} s"
            self._note_overrun(entry, "overrun", text)

    def _note_overrun(self, entry: Entry, kind: str, text: str) -> None:
        entry.overruns += 1
        self._supervisor.warn(entry.id, kind, text, entry.ended_ns)

    def _complete(self, entry: Entry, why: str) -> None:
        entry.mode = "completed"
        entry.why = why
        entry.due_ns = NEVER
        self._tell(entry)
        for dependent in entry.dependents or ():
            self._release_held(dependent)
        if entry.registration.on_final is not None:
            entry.registration.on_final(self._reports.health(entry))

    # --- Failure --------------------------------------------------------------------------------------------

    def _on_failed(
        self, entry: Entry, error: BaseException | None, blocked: bool
    ) -> None:
        now = entry.ended_ns
        self._remember(entry, now - entry.started_ns, blocked)
        entry.spins = 0
        if error is None:
            return  # stopped or removed: nothing follows
        entry.errors += 1
        entry.last_error = describe(error)
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
        self._dues.insert(entry, now + int(verdict.delay_s * _SECOND_NS))

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
        entry.due_ns = NEVER
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
        entry.wall_ns = due
        self._walls.insert(entry, due)

    def _strike(self, what: Entry | Session, due: int, now: int) -> None:
        """An instant has come: of a market, or of a task, which runs once however many have passed."""
        if isinstance(what, Session):
            if due == what.change_ns:
                self._look_at(what)
            return
        if due != what.wall_ns:
            return  # planned anew meanwhile
        what.wall_ns, passed = what.trigger.following(due, now)
        if what.wall_ns:
            self._walls.insert(what, what.wall_ns)
        if what.mode not in ("active", "backoff") or what.asleep:
            return
        monotonic = what.fired_ns = self._monotonic()
        what.missed += passed
        if what.mode == "backoff" or what.stage is not _IDLE:
            what.missed += 1
        elif what.trigger.jitter_ns:
            self._dues.insert(what, self._planner.jittered(what, monotonic))
        else:
            what.ready_ns = monotonic - (now - due)
            self._enqueue(what)

    def _on_jump(self, moved_ns: int) -> None:
        """Plan anew if somebody set the clock back; a clock set forward is seen by what became due."""
        for session in self._sessions.all():
            self._look_at(session)
        if moved_ns >= 0:
            return
        wall, monotonic = self._clock.now_ns(), self._monotonic()
        for entry in self._entries.values():
            if entry.wall_ns and entry.trigger.kind == "cron":
                since_run = (
                    None if entry.fired_ns == NEVER else monotonic - entry.fired_ns
                )
                entry.wall_ns = entry.trigger.first_new(wall, since_run)
                self._walls.insert(entry, entry.wall_ns)

    def _look_at(self, session: Session) -> None:
        """Let the tasks of a market follow a change of its phase at once."""
        changed = self._sessions.look_at(session)
        if session.change_ns:
            self._walls.insert(session, session.change_ns)
        if not changed:
            return
        self._planner.begin_anew()
        now = self._monotonic()
        for entry in changed:
            if entry.mode != "active" or entry.trigger.by_wall_clock:
                continue
            entry.due_ns = entry.grid_ns = NEVER
            if entry.trigger.kind == "every":
                self._planner.begin_grid(entry, now)
            elif entry.trigger.kind in ("continuous", "once") and not entry.asleep:
                entry.ready_ns = now
                self._enqueue_idle(entry)

    # --- Health -----------------------------------------------------------------------------------------------

    def health(self, task_id: str) -> TaskHealth:
        """Return how one task is.

        Raises:
            UnknownTaskError: No such task.
        """
        return self._reports.health(self._entry(task_id))

    def health_all(self) -> list[TaskHealth]:
        """Return how every task is, in order of registration."""
        return [self._reports.health(entry) for entry in self._entries.values()]

    def task_ids(self) -> list[str]:
        """Return the ids of all tasks, in order of registration."""
        return list(self._entries)

    def health_of(self, statuses: Collection[str]) -> list[TaskHealth]:
        """Return how the tasks are that do not work: in `backoff`, `quarantined`, `stopped` ..."""
        return [
            self._reports.health(entry)
            for entry in self._entries.values()
            if entry.mode in statuses
        ]

    def count_by_status(self) -> Counter[str]:
        """Return how many tasks there are of each status, of 10,000 within a millisecond or two."""
        entries = self._entries.values()
        counts = Counter(str(entry.mode) for entry in entries if entry.mode != "active")
        active = [e for e in entries if e.asleep or e.stage is not _IDLE]
        counts.update(
            map(self._reports.status, (e for e in active if e.mode == "active"))
        )
        counts["waiting"] += len(entries) - counts.total()
        return +counts

    def next_run_in_words(self, task_id: str) -> str:
        """Return when a task runs next: `in 4 s`, `Mon 09:15 IST`, `paused until Mon 09:15 IST`."""
        return self._reports.words(self._entry(task_id))

    def stats(self) -> dict[str, Any]:
        """Return counts and the distribution of lags over all tasks."""
        return {
            "tasks": len(self._entries),
            "runs": self.lags.count,
            "due": len(self._dues),
            **self._runner.stats(),
            **{
                f"lag_{name}_s": value / 1e9
                for name, value in self.lags.summary().items()
            },
        }
