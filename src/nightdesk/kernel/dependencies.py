"""Tasks that run after others.

Comes from: kernel/scheduler.py
Goes to: kernel/scheduler.py (tasks that may run now)
"""

from collections.abc import Mapping

from nightdesk.errors import TaskCycleError
from nightdesk.kernel.entries import Entry, Registration

__all__ = ["Dependencies"]


class Dependencies:
    """`after: [a, b]`: a task runs when `a` and `b` have each succeeded since it was last let run.

    So its first run waits for one good run of each, and from then on it follows the slowest of them. A task
    that is completed or removed holds nobody up.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries

    def check(self, new: Registration) -> None:
        """Refuse a circle.

        Raises:
            TaskCycleError: Names it.
        """
        if not new.after:
            return

        def follow(name: str, trail: list[str]) -> None:
            if name == new.task_id:
                raise TaskCycleError([*trail, name])
            if name in trail:
                return
            entry = self._entries.get(name)
            for further in entry.registration.after if entry is not None else ():
                follow(further, [*trail, name])

        for name in new.after:
            follow(name, [new.task_id])

    def connect(self, entry: Entry) -> None:
        """Let the tasks that `entry` comes after know it."""
        if not entry.registration.after or entry.after_seen is not None:
            return
        entry.after_seen = dict.fromkeys(entry.registration.after, 0)
        for name in entry.after_seen:
            other = self._entries[name]
            other.dependents = [*(other.dependents or ()), entry]

    def disconnect(self, entry: Entry) -> None:
        for name in entry.registration.after:
            other = self._entries.get(name)
            if other is not None and other.dependents:
                other.dependents = [d for d in other.dependents if d is not entry]

    def admit(self, entry: Entry) -> bool:
        """Return whether `entry` may run, and if so begin to wait for the next runs of the others."""
        seen = entry.after_seen
        if seen is None:
            return True
        if self.missing(entry):
            return False
        for name in seen:
            other = self._entries.get(name)
            seen[name] = other.successes if other is not None else 0
        return True

    def missing(self, entry: Entry) -> list[str]:
        """Return the tasks that `entry` still waits for."""
        missing = []
        for name, count in (entry.after_seen or {}).items():
            other = self._entries.get(name)
            if other is None or other.mode == "completed":
                continue  # it will not run again: nothing to wait for
            if other.successes <= count:
                missing.append(name)
        return missing
