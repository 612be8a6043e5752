"""Contexts on their way to the store: encoded at each checkpoint, handed over in one piece.

Comes from: desk.py
Goes to: kernel/switch.py (the snapshot of a switch), stores/
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from nightdesk.abc import Batch, Clock, Delete, Put, Shelf, Task
from nightdesk.errors import NightdeskError
from nightdesk.model.context import TaskContext
from nightdesk.model.serializer import encode_context

__all__ = ["Checkpoints", "shelf_of"]


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
        self._last: dict[str, bytes] = {}
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
        self._last[context.task_id] = body
        data = encode_context(
            context,
            type=type_name,
            schema=task.schema_version,
            saved_ns=self._clock.now_ns(),
            epoch=epoch,
        )
        self.put(Put("context", context.task_id, data, shelf_of(context.state)))
        return True

    def put(self, record: Put) -> None:
        """Remember an encoded record; it is durable soon, or at the next switch."""
        self._changed[record.kind, record.key] = record
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(
                self._flush_s, self._flush
            )

    def forget(self, task_id: str) -> None:
        """Drop what is remembered of a removed task."""
        self._last.pop(task_id, None)
        self._changed.pop(("context", task_id), None)

    def swap(self) -> list[Put]:
        """Return every changed record and start anew: the switch's snapshot."""
        changed, self._changed = self._changed, {}
        return list(changed.values())

    async def drain(self) -> None:
        """Write what waits and wait until it is durable."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch = self.swap()
        if batch:
            await self._save(batch)
        if self._writes:
            await asyncio.gather(*self._writes, return_exceptions=True)

    async def delete(self, task_id: str) -> None:
        self.forget(task_id)
        await self._save([Delete("context", task_id)])

    def _flush(self) -> None:
        self._timer = None
        batch = self.swap()
        if not batch:
            return
        try:
            write = asyncio.ensure_future(self._save(batch))
        except NightdeskError:
            self._changed = {(put.kind, put.key): put for put in batch} | self._changed
            return
        self._writes.add(write)
        write.add_done_callback(self._written)

    def _written(self, write: asyncio.Future[None]) -> None:
        self._writes.discard(write)
        if not write.cancelled():
            write.exception()  # the store's own failure callback halts the desk; here it is only taken note of
