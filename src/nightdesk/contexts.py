"""Contexts on their way to the store: encoded at each checkpoint, handed over in one piece.

Comes from: desk.py
Goes to: kernel/switch.py (the snapshot of a switch), stores/
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from nightdesk.abc import Batch, Clock, Delete, Put, Shelf, Task
from nightdesk.errors import CapacityError, NightdeskError
from nightdesk.model.context import TaskContext
from nightdesk.model.serializer import encode_context

__all__ = ["Checkpoints", "shelf_of"]

_AGAIN_S = 1.0
_MAX_BYTES = 6 * 1024 * 1024
"""Of one context: it must pass into the store, and from a background host to the desk, together with others."""


def shelf_of(state: str) -> Shelf:
    """Return where a context in `state` belongs: `active`, `completed` or `errored`."""
    if state == "COMPLETED":
        return "completed"
    return "errored" if state in ("ERROR", "CANCELLED") else "active"


class Checkpoints:
    """Keeps the newest encoding of every context that changed since the last hand-over.

    Encoding happens here, in the task's own lane, so the switch only swaps a
    dictionary (design 4). What is not taken by a switch is written `flush_s` later.
    """

    def __init__(
        self,
        clock: Clock,
        save: Callable[[Batch], Awaitable[None]],
        *,
        flush_s: float = 0.02,
    ) -> None:
        self._clock = clock
        self._save = save
        self._flush_s = flush_s
        self._changed: dict[tuple[str, str], Put] = {}
        self._newest: dict[tuple[str, str], Put] = {}  # not known to be durable yet
        self._last: dict[str, bytes] = {}
        self._is_drained = False
        self._timer: asyncio.TimerHandle | None = None
        self._writes: set[asyncio.Future[None]] = set()

    def remember(self, context: TaskContext) -> None:
        """Take `context` as what the store holds: it is written again when it has changed."""
        self._last[context.task_id] = msgspec.json.encode(context)

    def mark(self, task: Task[Any], type_name: str, epoch: int) -> bool:
        """Encode the task's context; remember it if it differs from what was last saved."""
        context = task.context
        if not context.should_save_flag:
            return False
        body = msgspec.json.encode(context)
        if self._last.get(context.task_id) == body:
            return False
        if len(body) > _MAX_BYTES:  # here, where its own task hears of it
            raise CapacityError(
                f"the context of {context.task_id!r} of {len(body)} bytes",
                _MAX_BYTES,
                "it was not saved. Keep large data in a file of its own.",
            )
        data = encode_context(
            context,
            type=type_name,
            schema=task.schema_version,
            saved_ns=self._clock.now_ns(),
            epoch=epoch,
        )
        self._last[context.task_id] = body
        self.put(Put("context", context.task_id, data, shelf_of(context.state)))
        return True

    def put(self, record: Put) -> None:
        """Remember an encoded record; it is durable soon, or at the next switch."""
        key = record.kind, record.key
        self._changed[key] = self._newest[key] = record
        self._flush_in(self._flush_s)

    def forget(self, task_id: str) -> None:
        """Drop what is remembered of a removed task."""
        self._last.pop(task_id, None)
        for waiting in (self._changed, self._newest):
            for kind in ("context", "health"):
                waiting.pop((kind, task_id), None)

    def swap(self) -> list[Put]:
        """Return every changed record and start anew: the switch's snapshot."""
        changed, self._changed = self._changed, {}
        return list(changed.values())

    async def drain(self) -> None:
        """Write what waits and wait until it is durable; the store is about to close."""
        self._is_drained = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writes:  # first: what fails comes back
            await asyncio.gather(*self._writes, return_exceptions=True)
        batch = self.swap()
        if batch:
            await self.write(batch)

    async def delete(self, task_id: str) -> None:
        self.forget(task_id)
        await self._save([Delete("context", task_id), Delete("health", task_id)])

    def write(self, batch: Batch) -> Awaitable[None]:
        """Hand `batch`, as `swap` gave it, to the store. What does not become durable is kept and written later."""
        try:
            write = asyncio.ensure_future(self._save(batch))
        except NightdeskError:
            self._keep(batch)
            raise
        self._writes.add(write)
        write.add_done_callback(lambda done: self._written(done, batch))
        return write

    def _flush(self) -> None:
        self._timer = None
        batch = self.swap()
        if not batch:
            return
        # What fails is kept, and the store's own failure callback halts the desk.
        with contextlib.suppress(NightdeskError):
            self.write(batch)

    def _flush_in(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._flush)

    def _written(self, write: asyncio.Future[None], batch: Batch) -> None:
        self._writes.discard(write)
        if write.cancelled() or write.exception() is not None:
            self._keep(batch)
            return
        for record in batch:
            key = record.kind, record.key
            if self._newest.get(key) is record:
                del self._newest[key]

    def _keep(self, batch: Batch) -> None:
        """Take back what is not durable, except where something newer is under way (a full disk may get space again)."""
        for record in batch:
            key = record.kind, record.key
            if isinstance(record, Put) and self._newest.get(key) is record:
                self._changed.setdefault(key, record)
        if self._changed and not self._is_drained:
            self._flush_in(_AGAIN_S)
