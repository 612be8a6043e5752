"""Group commit: one thread that takes everything waiting, commits it once, and wakes all who wait.

Comes from: stores/_directory.py
Goes to: stores/sqlite.py, stores/files.py (the commit itself)

An fsync takes as long for a hundred batches as for one, and on the loop's thread it would
stand between an event and its handler (R-18). While one group is being synced the next gathers.

What happens to a save that cannot be written:

- *Failed write or fsync* (R-17): this save and every later one fail. Nothing is tried again,
  because the kernel may have dropped the pages that it could not write.
- *Disk full*: the space was refused before anything was written, so a second try is safe. The
  save fails, so that no order leaves without its intent, but its batch **stays in line**: it is
  written, in order and before every later batch, as soon as there is space. Nothing is dropped,
  and a durable batch still implies that every earlier one is durable (R-15). For the caller a failed
  save therefore means "not known to be durable", as after a crash.
- *Queue full*: `save` raises `CapacityError` at once and takes nothing.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from nightdesk.abc import Batch, Clock, Delete, Put
from nightdesk.errors import CapacityError, StateNotWritableError
from nightdesk.stores._seal import READY, Failed

__all__ = ["OVERHEAD", "DiskFull", "GroupWriter", "Keeper", "Operations", "WriterState"]

T = TypeVar("T")
Operations = list[Put | Delete]
WriterState = Literal["ok", "full", "failed"]

_GROUP_BYTES = 16 * 1024 * 1024
_GROUP_BATCHES = 4096
OVERHEAD = 128
_RETRY_S = 0.25
_IDLE_S = 0.02
_LATENCIES = 4096


class DiskFull(Exception):
    """A commit was refused for want of space, and nothing of it was written."""


class Keeper(Protocol):
    """What a group writer writes to."""

    def commit(self, operations: Operations) -> None:
        """Make `operations` durable, all or none; they name each record once.

        Raises:
            DiskFull: Nothing was written; trying again is safe.
            Exception: Anything else is final.
        """

    def rest(self, *, busy: bool) -> bool:
        """Do some housekeeping: after a group (`busy`), or when nothing came for a while.

        Returns whether more of it waits.
        """


# A plain tuple, not a named one: one is made for each save, and a named one takes five times as long.
_Save = tuple[Batch, int, "asyncio.Future[None] | None"]


class _Job(NamedTuple):
    function: Callable[[], Any]
    future: "asyncio.Future[Any]"
    last: bool


class GroupWriter:
    """Commits batches in call order, many at a time.

    With `inline` there is no thread: `save` commits before it returns, which
    makes a simulation deterministic.
    """

    def __init__(
        self,
        keeper: Keeper,
        *,
        path: str,
        clock: Clock,
        inline: bool = False,
        queue_bytes: int = 64 * 1024 * 1024,
        on_change: Callable[[WriterState, StateNotWritableError | None], None]
        | None = None,
    ) -> None:
        self.state: WriterState = "ok"
        self.failure: StateNotWritableError | None = None
        self.groups = self.batches = self.records = 0
        self.latencies_ns: deque[int] = deque(maxlen=_LATENCIES)
        self._keeper = keeper
        self._path = path
        self._clock = clock
        self._inline = inline
        self._limit = queue_bytes
        self._on_change = on_change
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._queue: queue.SimpleQueue[_Save | _Job] = queue.SimpleQueue()
        # Two counters, each written by one thread only, instead of one that both would change.
        self._bytes_in = 0
        self._bytes_taken = 0
        self._backlog: dict[tuple[str, str], Put | Delete] = {}
        self._backlog_bytes = 0
        self._more_rest = False

    @property
    def waiting_bytes(self) -> int:
        """Bytes that are not yet durable."""
        return self._bytes_in - self._bytes_taken + self._backlog_bytes

    # --- the loop's side ---------------------------------------------------------------------

    def start(self) -> None:
        if self._inline:
            return
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(
            target=self._work, name="nightdesk-store", daemon=True
        )
        self._thread.start()

    def save(self, batch: Batch, size: int) -> Awaitable[None]:
        """Queue `batch` of `size` bytes; the awaitable is done when it is durable.

        Raises:
            CapacityError: Too much waits already; nothing was taken.
        """
        if (
            self._bytes_in - self._bytes_taken + self._backlog_bytes + size
            > self._limit
        ):
            raise CapacityError(
                f"the queue of the state store ({self._path})",
                self._limit,
                "this batch was not taken. Await earlier saves, then save it again.",
            )
        self._bytes_in += size
        if self._loop is None:
            error = self._commit([(batch, size, None)])
            if error is not None:
                return Failed(error)
            self._rest(busy=False)
            return READY
        future = self._loop.create_future()
        self._queue.put((batch, size, future))
        return future

    async def run(self, function: Callable[[], T], *, last: bool = False) -> T:
        """Call `function` in the writer's thread after everything queued so far; return its result."""
        if self._loop is None:
            return function()
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Job(function, future, last))
        return await future

    async def stop(self, function: Callable[[], None]) -> None:
        """Write what waits, call `function`, end the thread."""
        if self._loop is None:
            function()
            return
        try:
            await self.run(function, last=True)
        finally:
            thread, self._thread, self._loop = self._thread, None, None
            if thread is not None:
                thread.join()

    # --- the writer's side ---------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            saves, job = self._take()
            if saves or self._backlog:
                self._commit(saves)
            if job is not None:
                self._run(job)
                if job.last:
                    return
            if self.state == "ok":
                self._rest(busy=bool(saves))

    def _take(self) -> tuple[list[_Save], _Job | None]:
        """Wait for work; return the saves that stand before the next job, and that job."""
        saves: list[_Save] = []
        size = 0
        timeout = _RETRY_S if self._backlog else _IDLE_S if self._more_rest else None
        try:
            item = self._queue.get(timeout=timeout)
            while True:
                if isinstance(item, _Job):
                    return saves, item
                saves.append(item)
                size += item[1]
                if size >= _GROUP_BYTES or len(saves) >= _GROUP_BATCHES:
                    return saves, None
                item = self._queue.get_nowait()
        except queue.Empty:
            return saves, None

    def _commit(self, saves: list[_Save]) -> StateNotWritableError | None:
        """Commit the backlog and `saves` as one group and tell all who wait; return what went wrong."""
        if self.state != "failed":
            self._line_up(saves)
        self._bytes_taken += sum(size for _, size, _ in saves)
        error = self.failure or self._try()
        if error is None:
            self.batches += len(saves)
        waiting = [future for _, _, future in saves if future is not None]
        if waiting:
            self._call(_resolve, waiting, error)
        return error

    def _line_up(self, saves: list[_Save]) -> None:
        """Append to the backlog. Of several writes to one record in one group only the last is kept:
        the group becomes visible as a whole, so the final state is the same."""
        backlog = self._backlog
        for batch, size, _ in saves:
            self._backlog_bytes += size
            for operation in batch:
                name = (operation.kind, operation.key)
                if name in backlog:
                    self._backlog_bytes -= _size(backlog.pop(name))
                backlog[name] = operation

    def _try(self) -> StateNotWritableError | None:
        operations = list(self._backlog.values())
        started = self._clock.monotonic_ns()
        try:
            self._keeper.commit(operations)
        except DiskFull as full:
            return self._is_full(full)
        except Exception as error:
            return self._has_failed(error)
        self.latencies_ns.append(self._clock.monotonic_ns() - started)
        self._backlog.clear()
        self._backlog_bytes = 0
        self.groups += 1
        self.records += len(operations)
        if self.state == "full":
            self._change("ok", None)
        return None

    def _is_full(self, full: DiskFull) -> StateNotWritableError:
        error = StateNotWritableError(
            self._path,
            f"the disk is full ({full}); {len(self._backlog)} records wait in line",
            "Free some space: what waits is then written in order, and saving goes on by itself.",
        )
        if self.state != "full":
            self._change("full", error)
        return error

    def _has_failed(self, cause: Exception) -> StateNotWritableError:
        if isinstance(cause, StateNotWritableError):
            error = cause
        else:
            error = StateNotWritableError(
                self._path,
                f"a commit failed ({type(cause).__name__}: {cause})",
                "Stop the desk, check the disk and its log, then start again: it recovers from what is durable.",
            )
            error.__cause__ = cause
        self.failure = error
        self._backlog.clear()
        self._backlog_bytes = 0
        self._change("failed", error)
        return error

    def _rest(self, *, busy: bool) -> None:
        try:
            self._more_rest = self._keeper.rest(busy=busy)
        except DiskFull:
            self._more_rest = (
                False  # housekeeping can wait for space; the next group tries again
            )
        except Exception as error:
            self._has_failed(error)

    def _run(self, job: _Job) -> None:
        try:
            result = job.function()
        except Exception as error:
            self._call(_settle, job.future, None, error)
        else:
            self._call(_settle, job.future, result, None)

    def _change(self, state: WriterState, error: StateNotWritableError | None) -> None:
        self.state = state
        if self._on_change is not None:
            self._call(self._on_change, state, error)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call on the loop's thread; drop it if the loop is gone, for nobody waits then."""
        if self._loop is None:
            function(*arguments)
            return
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return


def _size(operation: Put | Delete) -> int:
    return OVERHEAD + (len(operation.data) if isinstance(operation, Put) else 0)


def _resolve(futures: "list[asyncio.Future[None]]", error: Exception | None) -> None:
    for future in futures:
        if future.done():  # its waiter was cancelled
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
            future.exception()  # a save that nobody awaits is reported by `on_failure`, not by the collector


def _settle(
    future: "asyncio.Future[Any]", result: Any, error: Exception | None
) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
