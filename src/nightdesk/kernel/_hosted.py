"""What the pool remembers of one hosted task.

Comes from: kernel/hosts.py
Goes to: kernel/hosts.py
"""

import msgspec

from nightdesk.kernel._link import HostLink
from nightdesk.kernel._wire import HostedTask
from nightdesk.model.health import TaskHealth
from nightdesk.model.priority import Priority

__all__ = ["Hosted"]

_decode_health = msgspec.msgpack.Decoder(TaskHealth).decode
_COUNTS = ("runs", "errors", "restarts", "overruns", "missed")


class Hosted:
    """One task, over all the hosts it has lived in.

    Attributes:
        task: With its newest saved context: where a fresh host takes it up.
        status: Why it has no host (`backoff`, `quarantined`); "" while it has one.
        report: Its host's last word on its health, encoded.
        resumes_ns: Monotonic time before which the watch does not place it.
    """

    def __init__(self, task: HostedTask, number: int) -> None:
        self.task = task
        self.number = number
        self.link: HostLink | None = None
        self.status = ""
        self.why = ""
        self.report: msgspec.Raw | None = None
        self.offences = 0
        self.offended_ns = 0
        self.resumes_ns = 0
        self._carried = dict.fromkeys(_COUNTS, 0)

    def rest(self, status: str, why: str) -> None:
        """Note that it runs nowhere, and why."""
        self.status, self.why = status, why

    def leave(self) -> None:
        """Its host is gone: keep its counts, which the next host begins at zero."""
        last = self.health()
        self._carried = {name: getattr(last, name) for name in _COUNTS}
        self._carried["restarts"] += 1
        self.report = None
        self.link = None
        self.resumes_ns = 0

    def health(self) -> TaskHealth:
        """Return its health over all its hosts."""
        health = (
            _decode_health(self.report) if self.report is not None else self._bare()
        )
        health.runs_in = "background"
        health.host = self.link.process.pid if self.link is not None else None
        for name in _COUNTS:
            setattr(health, name, getattr(health, name) + self._carried[name])
        if self.status:
            health.status, health.why = self.status, self.why
        return health

    def _bare(self) -> TaskHealth:
        return TaskHealth(
            task_id=self.task.task_id,
            type=self.task.type,
            priority=str(self.task.priority or Priority.NORMAL),
            group=self.task.group,
            why="on its way to its host",
        )
