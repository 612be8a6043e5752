"""How a task is, in figures and in words an operator can act on.

Comes from: kernel/scheduler.py
Goes to: telemetry/, control.py
"""

from array import array
from collections.abc import Callable

from nightdesk.abc import Clock, Place
from nightdesk.kernel.entries import Entry, Stage
from nightdesk.kernel.hours import instant_in_words
from nightdesk.kernel.locks import KeyQueues
from nightdesk.model.health import TaskHealth

__all__ = ["Reports", "reason_in"]

_ADVICE = "; `nightdesk tasks resume"


class Reports:
    """Builds `TaskHealth` and the words in it when somebody asks; nothing is kept up to date for it.

    Args:
        keys: Knows who holds what a task waits for.
        missing: Which tasks of its `after` an entry still waits for.
    """

    def __init__(
        self,
        clock: Clock,
        place: Place,
        keys: KeyQueues,
        missing: Callable[[Entry], list[str]],
    ) -> None:
        self._clock = clock
        self._place = place
        self._keys = keys
        self._missing = missing

    def health(self, entry: Entry) -> TaskHealth:
        registration = entry.registration
        wall, monotonic = self._clock.now_ns(), self._clock.monotonic_ns()
        due = _next_run_ns(entry, wall, monotonic)
        p50, p99 = _quantiles(entry.durations, 0.5, 0.99)
        return TaskHealth(
            task_id=entry.id,
            type=registration.type,
            priority=str(registration.priority),
            group=registration.group,
            runs_in=self._place,
            status=self.status(entry),
            why=self._words(entry, due, wall, monotonic),
            runs=entry.runs,
            errors=entry.errors,
            restarts=entry.restarts,
            streak=entry.failures.streak if entry.failures else 0,
            overruns=entry.overruns,
            missed=entry.missed,
            last_run_ns=wall - (monotonic - entry.started_ns) if entry.runs else 0,
            next_run_ns=due,
            last_error=entry.last_error,
            lag_p99_s=_quantiles(entry.lags, 0.99)[0],
            duration_p50_s=p50,
            duration_p99_s=p99,
        )

    @staticmethod
    def status(entry: Entry) -> str:
        """Return the status alone: of 10,000 tasks in milliseconds, where all of their health takes half a second."""
        if entry.mode != "active":
            return entry.mode
        if entry.stage is Stage.RUNNING:
            return "running"
        return "paused" if entry.asleep and entry.stage is Stage.IDLE else "waiting"

    def words(self, entry: Entry) -> str:
        """Return when the task runs next, or why it does not."""
        wall, monotonic = self._clock.now_ns(), self._clock.monotonic_ns()
        due = _next_run_ns(entry, wall, monotonic)
        return self._words(entry, due, wall, monotonic)

    def _words(self, entry: Entry, due: int, wall: int, monotonic: int) -> str:
        if entry.mode == "quarantined":
            return f"quarantined: {entry.why}{_ADVICE} {entry.id}` runs it again"
        if entry.mode not in ("active", "backoff"):
            return f"{entry.mode}: {entry.why}" if entry.why else entry.mode
        if entry.stage is not Stage.IDLE:
            return self._words_of_stage(entry, monotonic)
        if entry.mode == "backoff":
            return f"{entry.last_error}; restart {_how_soon(due, wall, 'UTC')}"
        timezone = entry.trigger.timezone
        if entry.asleep:
            if not due:
                return "paused: its market opens no more"
            return f"paused until {instant_in_words(due, wall, timezone)}"
        soon = _how_soon(due, wall, timezone) if due else ""
        if entry.trigger.events:
            events = f"on {', '.join(entry.trigger.events)}"
            return f"{soon} or {events}" if soon else events
        return soon or "when it is woken"

    def _words_of_stage(self, entry: Entry, monotonic: int) -> str:
        if entry.stage is Stage.RUNNING:
            return f"running for {(monotonic - entry.started_ns) / 1e9:.1f} s"
        if entry.stage is Stage.HELD:
            return f"waits for a run of {', '.join(self._missing(entry))}"
        if entry.stage is Stage.KEYS:
            return self._keys.why(entry.id).replace(" group:", " a slot of group ")
        return "waits for its turn"


def reason_in(words: str) -> str:
    """Return the bare reason from the words of a task that was set aside: what is kept over a restart."""
    return words.partition(": ")[2].partition(_ADVICE)[0]


def _next_run_ns(entry: Entry, wall: int, monotonic: int) -> int:
    if entry.mode not in ("active", "backoff"):
        return 0
    if entry.asleep and entry.trigger.calendar is not None:
        return entry.trigger.calendar.next_change(wall) or 0
    times = [wall + max(0, entry.due_ns - monotonic)] if entry.due_ns >= 0 else []
    if entry.wall_ns:
        times.append(entry.wall_ns)
    return min(times, default=0)


def _how_soon(due_ns: int, now_ns: int, timezone: str) -> str:
    left_s = max(0, due_ns - now_ns) / 1e9
    if left_s < 120:
        return f"in {left_s:.0f} s" if left_s >= 10 else f"in {left_s:.1f} s"
    if left_s < 7200:
        return f"in {left_s / 60:.0f} min"
    return instant_in_words(due_ns, now_ns, timezone)


def _quantiles(values: "array[int] | None", *shares: float) -> list[float]:
    """Return the values in seconds beneath which these shares of `values` lie."""
    if not values:
        return [0.0] * len(shares)
    ordered = sorted(values)
    last = len(ordered) - 1
    return [
        max(0, ordered[min(last, int(share * len(ordered)))]) / 1e9 for share in shares
    ]
