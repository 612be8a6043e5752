"""Markets that open and close, and the tasks that keep their hours.

Comes from: kernel/scheduler.py
Goes to: kernel/scheduler.py (tasks whose phase changed)
"""

from nightdesk.abc import Clock
from nightdesk.kernel.entries import Entry
from nightdesk.kernel.hours import Calendar
from nightdesk.kernel.timetable import SLACK_NS

__all__ = ["Session", "Sessions"]


class Session:
    """One market and its tasks. `change_ns` is the instant at which `phase` ends, 0 if none is known."""

    __slots__ = ("calendar", "change_ns", "entries", "phase")

    def __init__(self, calendar: Calendar) -> None:
        self.calendar = calendar
        self.phase = ""
        self.change_ns = 0
        self.entries: dict[str, Entry] = {}


class Sessions:
    """The markets that any task names."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sessions: dict[str, Session] = {}

    def join(self, entry: Entry) -> Session | None:
        """Let `entry` keep the hours it names; return its market if that is a new one."""
        calendar = entry.trigger.calendar
        if calendar is None:
            self._apply(entry, "open")
            return None
        session = self._sessions.get(calendar.name)
        is_new = session is None
        if session is None:
            session = self._sessions[calendar.name] = Session(calendar)
            self.look_at(session)
        session.entries[entry.id] = entry
        self._apply(entry, session.phase)
        return session if is_new else None

    def leave(self, entry: Entry) -> None:
        for session in self._sessions.values():
            session.entries.pop(entry.id, None)

    def all(self) -> list[Session]:
        return list(self._sessions.values())

    def look_at(self, session: Session) -> list[Entry]:
        """Read the phase of a market; return the tasks whose interval or rest changes with it."""
        wall = self._clock.now_ns() + SLACK_NS  # a timer may ring a little early
        phase = session.calendar.phase(wall)
        session.change_ns = session.calendar.next_change(wall) or 0
        if phase == session.phase:
            return []
        session.phase = phase
        return [e for e in session.entries.values() if self._apply(e, phase)]

    def _apply(self, entry: Entry, phase: str) -> bool:
        before = entry.asleep, entry.interval_ns
        entry.asleep = phase in entry.trigger.pauses
        entry.interval_ns = entry.trigger.interval_ns(phase)
        return (entry.asleep, entry.interval_ns) != before
