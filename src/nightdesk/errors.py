"""Every exception of Nightdesk. Each builds its message from named facts and keeps them.

A message says what was found, where, what was expected, and the next step.
`exit_code` is what the command line returns when the error ends it.
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "CapacityError",
    "CommandError",
    "ConfigError",
    "DeskHaltedError",
    "DeskNotRunningError",
    "DeskSilentError",
    "DuplicateTaskError",
    "FieldError",
    "MissingExtraError",
    "NewerSchemaError",
    "NightdeskError",
    "NoTasksError",
    "OrderDeniedError",
    "OutcomeUnknownError",
    "QueryFailedError",
    "RecordCorruptError",
    "SimulationStuckError",
    "StateDamagedError",
    "StateLockedError",
    "StateNotWritableError",
    "TaskCycleError",
    "UnknownTaskError",
    "UnknownTypeError",
    "VenueRejectedError",
]


class NightdeskError(Exception):
    """Base of all. `exit_code` 1: unexpected."""

    exit_code = 1


class ConfigError(NightdeskError):
    """The configuration cannot be used. Lists every problem found, not just the first."""

    exit_code = 2

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.source = source
        self.problems = list(problems)
        super().__init__("\n".join(f"{source}: {problem}" for problem in self.problems))


class FieldError(ConfigError):
    """One key of the configuration is wrong."""

    def __init__(
        self,
        source: str,
        key: str,
        expected: str,
        found: object,
        line: int | None = None,
    ) -> None:
        self.key, self.expected, self.found, self.line = key, expected, found, line
        where = f"line {line}: " if line is not None else ""
        super().__init__(source, [f"{where}`{key}` is {found!r}, expected {expected}."])


class UnknownTypeError(ConfigError):
    """No file of a collection has this name."""

    def __init__(self, kind: str, name: str, known: Iterable[str], where: str) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        near = get_close_matches(name, self.known, n=1)
        hint = (
            f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(self.known)}."
        )
        super().__init__(where, [f"no {kind} type {name!r}. {hint}"])


class NoTasksError(NightdeskError):
    """Nothing would ever run (R-26)."""

    exit_code = 3

    def __init__(self, source: str) -> None:
        self.source = source
        super().__init__(
            f"{source}: `tasks` lists 0 entries, so nothing would ever run.\n"
            "Add one, e.g. `- type: position_monitor`, or pass `--allow-empty` to start an idle desk."
        )


class StateLockedError(NightdeskError):
    """Another desk owns the state directory (R-21)."""

    exit_code = 4

    def __init__(
        self, directory: str, pid: int | None, host: str, started: str
    ) -> None:
        self.directory, self.pid, self.host, self.started = (
            directory,
            pid,
            host,
            started,
        )
        owner = (
            f"process {pid} on {host}, started {started}" if pid else "another process"
        )
        super().__init__(
            f"{directory} is in use by {owner}. "
            "Stop that desk first (`nightdesk stop`), or give this one a directory of its own with `--state DIR`."
        )


class StateDamagedError(NightdeskError):
    """Acknowledged data cannot be read. Nothing is guessed: the desk does not start (R-16)."""

    exit_code = 5

    def __init__(self, path: str, found: str, next_step: str) -> None:
        self.path, self.found, self.next_step = path, found, next_step
        super().__init__(f"{path}: {found}. {next_step}")


class StateNotWritableError(StateDamagedError):
    """The state directory cannot be written: read-only, full, or refused."""


class NewerSchemaError(StateDamagedError):
    """Written by a newer Nightdesk; left untouched (R-22)."""

    def __init__(self, path: str, found: int, known: int) -> None:
        super().__init__(
            path,
            f"schema version {found} is newer than this program knows ({known})",
            "Upgrade nightdesk, or restore a backup made by this version (`nightdesk state restore`).",
        )


class RecordCorruptError(NightdeskError):
    """One record cannot be decoded. Its bytes are kept in quarantine, the others still load."""

    def __init__(self, kind: str, key: str, found: str) -> None:
        self.kind, self.key, self.found = kind, key, found
        super().__init__(f"{kind} {key!r} cannot be decoded: {found}")


class DeskHaltedError(NightdeskError):
    """Reconciliation at start found a difference; trading is halted until an operator has looked."""

    exit_code = 6

    def __init__(self, differences: Iterable[str]) -> None:
        self.differences = list(differences)
        super().__init__(
            "reconciliation at start found differences: "
            + "; ".join(self.differences)
            + ". Compare with the venue, then `nightdesk resume-trading --reason ...`."
        )


class TaskCycleError(NightdeskError):
    """Tasks wait for each other in a circle."""

    exit_code = 2

    def __init__(self, circle: Iterable[str]) -> None:
        self.circle = list(circle)
        super().__init__(
            f"tasks wait for each other in a circle: {' -> '.join(self.circle)}. Remove one `after`."
        )


class DuplicateTaskError(NightdeskError, ValueError):
    exit_code = 2

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        super().__init__(
            f"a task {task_id!r} exists already. Give this one another `id`, or remove the first."
        )


class UnknownTaskError(NightdeskError, KeyError):
    exit_code = 2

    def __init__(self, task_id: str, known: Iterable[str]) -> None:
        self.task_id = task_id
        near = get_close_matches(task_id, list(known), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "See `nightdesk tasks`."
        self._text = f"no task {task_id!r}. {hint}"
        super().__init__(self._text)

    def __str__(self) -> str:
        return self._text


class OrderDeniedError(NightdeskError):
    """Our own gate refused an order; nothing was sent. `code` is one of T-24."""

    def __init__(self, code: str, reason: str) -> None:
        self.code, self.reason = code, reason
        super().__init__(f"order denied ({code}): {reason}")


class VenueRejectedError(NightdeskError):
    """The venue proved, by a code of its allow-list, that it did not accept the request (R-4)."""

    def __init__(self, venue: str, code: str, reason: str) -> None:
        self.venue, self.code, self.reason = venue, code, reason
        super().__init__(f"{venue} rejected the request ({code}): {reason}")


class OutcomeUnknownError(NightdeskError):
    """A request left and no reply proves what became of it. Only evidence may end this (R-5)."""

    def __init__(self, venue: str, reason: str) -> None:
        self.venue, self.reason = venue, reason
        super().__init__(f"{venue}: outcome unknown: {reason}")


class QueryFailedError(NightdeskError):
    """A question to a venue got no usable answer. Never evidence of anything (R-5)."""

    def __init__(self, venue: str, question: str, reason: str) -> None:
        self.venue, self.question, self.reason = venue, question, reason
        super().__init__(f"{venue}: {question} failed: {reason}")


class CapacityError(NightdeskError):
    """A bound was reached. Says which, and what happens now."""

    def __init__(self, what: str, limit: int, consequence: str) -> None:
        self.what, self.limit = what, limit
        super().__init__(f"{what} is full ({limit}): {consequence}")


class MissingExtraError(NightdeskError):
    """A library of an optional extra is not installed."""

    exit_code = 2

    def __init__(self, feature: str, extra: str) -> None:
        self.feature, self.extra = feature, extra
        super().__init__(
            f"{feature} needs the extra {extra!r}: pip install 'nightdesk[{extra}]'"
        )


class CommandError(NightdeskError):
    """A command could not be carried out; the text is for the operator."""

    exit_code = 2


class DeskNotRunningError(NightdeskError):
    """A command needs a desk, and none runs in this state directory."""

    exit_code = 3

    def __init__(self, directory: str) -> None:
        self.directory = directory
        super().__init__(
            f"no desk is running in {directory}. Start one with `nightdesk run` or `nightdesk demo`, "
            "or name another directory with `--state DIR`."
        )


class DeskSilentError(NightdeskError):
    """A desk is there and does not answer. Says what is known of it."""

    def __init__(
        self, directory: str, verb: str, waited_s: float, pid: int | None
    ) -> None:
        self.directory, self.verb, self.pid = directory, verb, pid
        process = f" (process {pid})" if pid else ""
        super().__init__(
            f"the desk in {directory}{process} did not answer {verb!r} within {waited_s:g} s. "
            "Its loop may be blocked: see log.jsonl there. `nightdesk halt` stops trading all the same."
        )


class SimulationStuckError(NightdeskError):
    """Under the virtual clock nothing is ready, no timer is set, and nothing outside is under way."""

    def __init__(self, time_s: float, waiting: Iterable[str]) -> None:
        self.time_s, self.waiting = time_s, list(waiting)
        names = ", ".join(self.waiting[:10]) or "none"
        more = f" and {len(self.waiting) - 10} more" if len(self.waiting) > 10 else ""
        super().__init__(
            f"the simulation stands still at {time_s:.6f} s: no timer is set and nothing can wake a task "
            f"(waiting: {names}{more}). Give one of them a timeout, or call `hold()` around work outside the loop."
        )
