"""What the pool asks of the desk, and what it remembers of one hosted task.

Comes from: kernel/hosts.py
Goes to: kernel/hosts.py
"""

from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from nightdesk.abc import Shelf
from nightdesk.kernel._link import HostLink
from nightdesk.kernel._wire import HostedTask
from nightdesk.model.events import Event
from nightdesk.model.health import TaskHealth
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Order, OrderRequest
from nightdesk.model.position import Position
from nightdesk.model.priority import Priority

__all__ = ["HostCallbacks", "HostLimits", "Hosted", "HostedTaskError"]


class _Status(msgspec.Struct):
    status: str = "waiting"


_decode_status = msgspec.msgpack.Decoder(_Status).decode
_decode_health = msgspec.msgpack.Decoder(TaskHealth).decode
_COUNTS = ("runs", "errors", "restarts", "overruns", "missed")


class HostLimits(Protocol):
    """`background` of `desk.yaml`."""

    @property
    def hosts(self) -> int: ...
    @property
    def stall_s(self) -> float: ...
    @property
    def memory_mb(self) -> int: ...


class HostCallbacks(Protocol):
    """What hosted tasks need of the desk. The coroutines may take their time, the rest must be quick."""

    async def submit(self, task_id: str, request: OrderRequest) -> Order: ...
    async def cancel(self, task_id: str, client_order_id: str) -> Order: ...
    async def save_private(self, task_id: str, key: str, data: bytes) -> None: ...
    async def load_private(self, task_id: str, key: str) -> bytes | None: ...
    def save_context(self, task_id: str, data: bytes, shelf: Shelf) -> None: ...
    def orders(self, task_id: str) -> list[Order]: ...
    def positions(self) -> list[Position]: ...
    def instruments(self) -> Iterable[Instrument]: ...
    def emit(self, task_id: str, event: Event) -> None: ...
    def alert(self, task_id: str, level: str, text: str) -> None: ...
    def log(
        self, task_id: str, level: str, text: str, fields: dict[str, Any]
    ) -> None: ...

    def on_offender(self, task_id: str, kind: str, detail: str, stack: str) -> None:
        """A task harmed its host. `kind`: `slow` (a first warning), `stuck`, `leaks`, `crashes`, `ignores stop`."""

    def on_refused(self, task_id: str, text: str, is_context: bool) -> None:
        """A task cannot be built in its host; `is_context`: its saved context is the reason."""

    def on_health_changed(self, task_id: str, health: TaskHealth) -> None:
        """A pause, a quarantine, or the end of one: what must survive a restart of the desk."""

    def on_finished(self, task_id: str) -> None:
        """A task reached its end; its last context came by `save_context` before."""


class HostedTaskError(Exception):
    """What a hosted task raised, as observers see it: the exception itself stays in its process."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind, self.text = kind, text
        super().__init__(f"{kind}: {text}")


class Hosted:
    """One task, over all the hosts it has lived in.

    Attributes:
        task: With its newest saved context: where a fresh host takes it up.
        status: Why it has no host (`backoff`, `quarantined`, `completed`); "" while it has one.
        report: Its host's last word on its health, encoded.
        stack: Where it stood when it first held its host for too long.
    """

    def __init__(self, task: HostedTask, number: int) -> None:
        self.task = task
        self.id = task.task_id
        self.number = number
        self.link: HostLink | None = None
        self.status = ""
        self.why = ""
        self.report: msgspec.Raw | None = None
        self.offences = 0
        self.offended_ns = 0
        self.stack = ""
        self._carried = dict.fromkeys(_COUNTS, 0)

    def change(self, **changes: Any) -> None:
        """Change what a fresh host is told of it."""
        self.task = msgspec.structs.replace(self.task, **changes)

    def rest(self, status: str, why: str) -> None:
        """Note that it runs nowhere, and why."""
        self.status, self.why = status, why

    def lose_host(self, why: str) -> bool:
        """Its host is gone; return whether it shall have another: who is in quarantine stays there."""
        last = self.health()
        self.leave()
        if last.status == "quarantined":
            self.rest("quarantined", last.why)
            return False
        self.rest("backoff", why)
        return True

    def leave(self) -> None:
        """Keep its counts, which the next host begins at zero."""
        last, self.link = self.health(), None
        self._carried = {name: getattr(last, name) for name in _COUNTS}
        self._carried["restarts"] += 1
        self.change(streak=last.streak)
        self.report = None

    def status_now(self) -> str:
        """Return the status of its health without decoding all of it."""
        if self.report is None or (self.status and self.status != "completed"):
            return self.status or "waiting"
        return _decode_status(self.report).status

    def health(self) -> TaskHealth:
        """Return its health over all its hosts."""
        bare = self.report is None
        health = self._bare() if self.report is None else _decode_health(self.report)
        health.runs_in = "background"
        health.host = self.link.process.pid if self.link is not None else None
        for name in _COUNTS:
            setattr(health, name, getattr(health, name) + self._carried[name])
        if self.status and (bare or self.status != "completed"):
            health.status, health.why = self.status, self.why
        return health

    def _bare(self) -> TaskHealth:
        return TaskHealth(
            task_id=self.id,
            type=self.task.type,
            priority=str(self.task.priority or Priority.NORMAL),
            group=self.task.group,
            why="on its way to its host",
        )
