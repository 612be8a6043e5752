"""A `Schedule` compiled: which clock it follows, and when it is due next.

Comes from: kernel/scheduler.py
Goes to: kernel/scheduler.py
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from math import isfinite
from typing import Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from nightdesk.errors import ConfigError
from nightdesk.kernel.hours import Calendar, Calendars
from nightdesk.model.schedule import Schedule

__all__ = ["MIN_INTERVAL_S", "Trigger", "compile_trigger"]

Kind = Literal["free", "every", "cron", "instant", "once", "continuous", "event"]
SECOND_NS = 1_000_000_000
MIN_INTERVAL_S = 0.001  # what a loop's timers can keep
_MAX_INTERVAL_S = 366 * 86_400.0
_MAX_COALESCED = 1000


class Trigger:
    """When one task is due. Intervals are counted by the monotonic clock, calendars by the wall clock (R-27).

    Attributes:
        kind: `free` is a task without schedule, which says itself when it wants to run again.
        events: Names of event types that are a reason to run, beside whatever else there is.
        calendar: The market whose sessions choose the interval; None for round the clock.
        pauses: Phases of `calendar` in which the task rests.
        timezone: In which an operator reads its due times.
    """

    __slots__ = (
        "_expression",
        "_instant_ns",
        "_intervals_ns",
        "_seconds_ns",
        "calendar",
        "events",
        "jitter_ns",
        "kind",
        "pauses",
        "timezone",
        "zone",
    )

    def __init__(
        self, kind: Kind, schedule: Schedule, calendar: Calendar | None
    ) -> None:
        self.kind: Kind = kind
        self.events = schedule.on
        self.calendar = calendar
        self.zone = ZoneInfo(schedule.timezone)
        self.timezone = schedule.timezone
        if calendar is not None and schedule.timezone == "UTC":
            self.timezone = calendar.timezone
        self.jitter_ns = _ns(schedule.jitter_s)
        phases = {"open": schedule.open_s, "closed": schedule.closed_s}
        if kind == "every":
            phases = {
                phase: value if value is not None else schedule.every_s or "pause"
                for phase, value in phases.items()
            }
        self.pauses = frozenset(p for p, value in phases.items() if value == "pause")
        self._intervals_ns = {
            phase: _ns(value)
            for phase, value in phases.items()
            if isinstance(value, float | int)
        }
        self._expression = schedule.cron or ""
        self._seconds_ns = 0
        self._instant_ns = 0
        if schedule.at is not None:
            self._read_at(schedule.at)

    def interval_ns(self, phase: str) -> int:
        """Return the interval in `phase`, 0 if it has none there."""
        return self._intervals_ns.get(phase, 0)

    def next_wall(self, after_ns: int) -> int | None:
        """Return the first due instant after `after_ns` (UTC), or None if there is none any more."""
        if self.kind == "instant":
            return self._instant_ns if self._instant_ns > after_ns else None
        return next(self.walls(after_ns), None)

    def walls(self, after_ns: int) -> Iterator[int]:
        """Yield the due instants after `after_ns`: of a cron expression, or of `at` every day."""
        # Seconds of a daily time are added afterwards: only five-field expressions are kept right
        # when clocks change (02:30 in the gap runs once, 01:30 in the fold runs once).
        after_s = (after_ns - self._seconds_ns) // SECOND_NS
        start = datetime.fromtimestamp(after_s, self.zone)
        for moment in CronSim(self._expression, start):
            due_ns = (
                int(moment.astimezone(UTC).timestamp()) * SECOND_NS + self._seconds_ns
            )
            if due_ns > after_ns:
                yield due_ns

    def following(self, due_ns: int, now_ns: int) -> tuple[int, int]:
        """Return the first instant after `now_ns` (0: none), and how many after `due_ns` it passes over."""
        if self.kind != "cron":
            return 0, 0
        passed = 0
        for instant in self.walls(due_ns):
            if instant > now_ns or passed >= _MAX_COALESCED:
                return max(instant, now_ns + 1), passed
            passed += 1
        return 0, passed

    def first_new(self, now_ns: int, since_run_ns: int | None) -> int:
        """Return the first instant after `now_ns` that the last run does not already stand for.

        After the clock was set back by an hour, the daily job of 10:00 that ran must not run again,
        and the job of each minute must not be silent for an hour. So an instant counts as new when
        half of its period has really passed since the last run.

        Args:
            since_run_ns: Monotonic time since the last run, None if there was none.
        """
        instants = self.walls(now_ns)
        first, second = next(instants), next(instants)
        if since_run_ns is not None:
            real_ns = since_run_ns + first - now_ns
            if 2 * real_ns < second - first:
                return second
        return first

    @property
    def by_wall_clock(self) -> bool:
        """Whether due times are instants of the calendar rather than intervals."""
        return self.kind in ("cron", "instant")

    def _read_at(self, at: str) -> None:
        if self.kind == "instant":
            moment = datetime.fromisoformat(at)
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=self.zone)
            self._instant_ns = int(moment.timestamp() * 1_000_000) * 1000
            return
        hour, minute, *second = (int(part) for part in at.split(":"))
        self._expression = f"{minute} {hour} * * *"
        self._seconds_ns = sum(second) * SECOND_NS


def compile_trigger(
    schedule: Schedule | None, calendars: Calendars, where: str
) -> Trigger:
    """Return the trigger of `schedule`.

    Args:
        where: Whose schedule it is, for the message.

    Raises:
        ConfigError: Lists everything that is wrong with the schedule.
        UnknownTypeError: No such calendar.
        MissingExtraError: The calendar's library is not installed.
    """
    if schedule is None:
        return _free()
    problems = list(_problems(schedule))
    if problems:
        raise ConfigError(where, problems)
    calendar = calendars.get(schedule.calendar)
    return Trigger(_kind(schedule), schedule, None if calendar.always else calendar)


@cache
def _free() -> Trigger:
    """A trigger never changes, so all tasks without a schedule share one."""
    return Trigger("free", Schedule(), None)


def _kind(schedule: Schedule) -> Kind:
    if schedule.cron is not None:
        return "cron"
    if schedule.at is not None:
        return "cron" if _is_daily(schedule.at) else "instant"
    if schedule.once:
        return "once"
    if schedule.continuous:
        return "continuous"
    if schedule.every_s is not None or _has_interval(schedule):
        return "every"
    return "event"


def _has_interval(schedule: Schedule) -> bool:
    return any(
        isinstance(value, float | int) for value in (schedule.open_s, schedule.closed_s)
    )


def _is_daily(at: str) -> bool:
    return "-" not in at and "T" not in at


def _problems(schedule: Schedule) -> Iterator[str]:
    triggers = {
        "every_s": schedule.every_s is not None or (_has_interval(schedule)),
        "cron": schedule.cron is not None,
        "at": schedule.at is not None,
        "once": schedule.once,
        "continuous": schedule.continuous,
    }
    given = [name for name, is_given in triggers.items() if is_given]
    if not given and not schedule.on:
        yield "the schedule names no trigger; give one of every_s, cron, at, once, continuous, on, or open_s and closed_s."
    if len(given) > 1:
        yield f"the schedule names {len(given)} triggers ({', '.join(given)}); keep one (`on` may stand beside it)."
    for name in ("every_s", "open_s", "closed_s"):
        value = getattr(schedule, name)
        if (
            value is not None
            and value != "pause"
            and not (MIN_INTERVAL_S <= value <= _MAX_INTERVAL_S)
        ):
            yield f"`{name}` is {value!r}, expected seconds from {MIN_INTERVAL_S} to {_MAX_INTERVAL_S:.0f}."
    if not (isfinite(schedule.jitter_s) and 0 <= schedule.jitter_s <= 86_400):
        yield f"`jitter_s` is {schedule.jitter_s!r}, expected seconds from 0 to 86400."
    try:
        zone = ZoneInfo(schedule.timezone)
    except (KeyError, ValueError, OSError):
        yield f"`timezone` is {schedule.timezone!r}, expected an IANA name such as 'Asia/Kolkata'."
        return
    if schedule.cron is not None:
        try:
            next(CronSim(schedule.cron, datetime(2026, 1, 1, tzinfo=zone)))
        except (CronSimError, StopIteration) as error:
            yield f"`cron` is {schedule.cron!r}, expected five or six fields that some day matches ({error or 'none does'})."
    if schedule.at is not None and not _is_instant_or_time(schedule.at):
        yield f"`at` is {schedule.at!r}, expected 'HH:MM', 'HH:MM:SS' or an instant such as '2026-11-23T09:15:00+05:30'."


def _is_instant_or_time(at: str) -> bool:
    try:
        if not _is_daily(at):
            return datetime.fromisoformat(at).year >= 1970
        parts = at.split(":")
        limits = (24, 60, 60)
        return len(parts) in (2, 3) and all(
            part.isascii() and part.isdigit() and int(part) < limit
            for part, limit in zip(parts, limits, strict=False)
        )
    except ValueError:
        return False


def _ns(seconds: float | str | None) -> int:
    return round(float(seconds) * SECOND_NS) if seconds and seconds != "pause" else 0
