"""What the stores that own a directory have in common: lock, epoch, group commit, failure, reserve.

Comes from: stores/sqlite.py, stores/files.py
Goes to: stores/_writer.py, stores/_lock.py
"""

import contextlib
import os
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

from nightdesk.abc import Batch, Clock, Put, Record, Shelf, Store
from nightdesk.errors import CapacityError, StateDamagedError, StateNotWritableError
from nightdesk.stores._lock import (
    HIGH_WATER,
    DirectoryLock,
    create_private,
    not_writable,
)
from nightdesk.stores._restore import finish_restore
from nightdesk.stores._writer import (
    OVERHEAD,
    DiskFull,
    GroupWriter,
    Operations,
    WriterState,
)

__all__ = ["MAX_RECORD_BYTES", "DirectoryStore", "Quarantined"]

MAX_RECORD_BYTES = 16 * 1024 * 1024
_MAX_NAME = 512
_RESERVE = "reserve"
_RESERVE_BYTES = 1024 * 1024
_PLENTY_BYTES = 16 * _RESERVE_BYTES

Quarantined = tuple[str, str, str]


class DirectoryStore(Store):
    """A store in one directory.

    Beside the file that holds the truth stand `lock` (who owns the directory), `high_water` (the epoch, and how
    far saves were acknowledged), and `reserve` (space for the worst day).

    Args:
        directory: Made if missing, readable for this user only.
        clock: Wall time for the lock, monotonic time for `stats`.
        inline: Commit inside `save`, on the caller's thread (simulation).
        on_failure: Called on the loop when saving stops working: for good (`error` of a failed write or
            fsync: end the desk), or until there is space (`state` is then "full": halt entries, and
            call `release_reserve` so that cancels and closing records can still be written).
        on_recovery: Called when a full disk has space again and what waited is durable.
        queue_bytes: Above this much waiting data `save` raises `CapacityError`.
    """

    file_name: ClassVar[str]
    """The file that holds the truth; its presence says which type of store a directory has."""

    foreign_files: ClassVar[dict[str, str]] = {
        "state.db": "sqlite",
        "journal.log": "files",
    }

    def __init__(
        self,
        directory: Path,
        *,
        clock: Clock,
        inline: bool = False,
        on_failure: Callable[[StateNotWritableError], None] | None = None,
        on_recovery: Callable[[], None] | None = None,
        queue_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self.directory = Path(directory)
        self.path = self.directory / self.file_name
        self.sequence = 0
        self.on_failure = on_failure
        self.on_recovery = on_recovery
        self._clock = clock
        self._lock = DirectoryLock(self.directory, clock)
        self._quarantined: list[Quarantined] = []
        self._writer = GroupWriter(
            self,
            path=str(self.path),
            clock=clock,
            inline=inline,
            queue_bytes=queue_bytes,
            on_change=self._on_change,
        )
        self._inline = inline
        self._running = False

    @property
    def state(self) -> WriterState:
        """`ok`; `full` while a full disk keeps batches waiting; `failed` until the next start."""
        return self._writer.state

    async def start(self) -> None:
        self._writer.start()
        try:
            await self._writer.run(self._start)
        except BaseException:
            await self._writer.stop(self._abandon)
            raise
        self._running = True

    async def stop(self) -> None:
        if not self._running:
            return
        self._running = False
        await self._writer.stop(self._end)

    def save(self, batch: Batch) -> Awaitable[None]:
        """See `Store.save`. What failing means is told in `stores/_writer.py`.

        Raises:
            CapacityError: At once, and nothing is taken: the queue is full, or a record is too large.
            ValueError: A kind or a key is empty, too long, or has unprintable characters.
        """
        if not self._running:
            raise StateNotWritableError(
                str(self.path), "the store is not started", "Call `start` first."
            )
        size = 0
        operations = tuple(batch)
        for operation in operations:
            kind, key = operation.kind, operation.key
            if not (
                0 < len(kind) <= _MAX_NAME >= len(key) > 0
                and kind.isprintable()
                and key.isprintable()
            ):
                raise ValueError(
                    f"{kind!r} {key!r} cannot name a record: expected 1 to {_MAX_NAME} printable characters"
                )
            size += OVERHEAD
            if type(operation) is Put:
                if len(operation.data) > MAX_RECORD_BYTES:
                    raise _too_large(operation)
                size += len(operation.data)
        return self._writer.save(operations, size)

    async def load(self, kind: str, shelf: Shelf | None = None) -> list[Record]:
        return await self._writer.run(lambda: self.read(kind, shelf))

    async def get(self, kind: str, key: str) -> Record | None:
        return await self._writer.run(lambda: self.read_one(kind, key))

    def quarantined(self) -> list[Quarantined]:
        return list(self._quarantined)

    def stats(self) -> dict[str, Any]:
        writer = self._writer
        taken = sorted(writer.latencies_ns.copy())
        return {
            "path": str(self.path),
            "state": writer.state,
            "epoch": self.epoch,
            "sequence": self.sequence,
            "commits": writer.groups,
            "batches": writer.batches,
            "records": writer.records,
            "waiting_bytes": writer.waiting_bytes,
            "quarantined": len(self._quarantined),
            "reserve_bytes": self._reserve_bytes(),
            **{
                f"commit_{name}_us": _at(taken, share) // 1000
                for name, share in _SHARES.items()
            },
        }

    def release_reserve(self) -> int:
        """Give the space kept back to the disk, for cancels and closing records; return its bytes.

        It is taken again when the disk has plenty of space, at the latest at the next start.
        """
        size = self._reserve_bytes()
        with contextlib.suppress(FileNotFoundError):
            (self.directory / _RESERVE).unlink()
        return size

    def take_reserve(self) -> bool:
        """Keep the space back again; return whether the disk has plenty beside it.

        Taken too early it would fill the disk again.
        """
        free = self.free_bytes()
        if free is not None and free <= _PLENTY_BYTES:
            return False
        self._fill_reserve()
        return self._reserve_bytes() > 0

    def free_bytes(self) -> int | None:
        """Return the space that is left on the disk; None where the file system does not say."""
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize if found.f_blocks else None

    # --- what a store adds; all of it runs in the writer's thread ---------------------------------

    @abstractmethod
    def open(self) -> int:
        """Open or create, set `sequence`, call `refuse_loss`, check everything; return the stored epoch."""

    @abstractmethod
    def begin(self) -> None:
        """Write the new `epoch` durably."""

    @abstractmethod
    def commit(self, operations: Operations) -> None:
        """See `Keeper.commit`; must also advance `sequence` by one per operation."""

    @abstractmethod
    def rest(self, *, busy: bool) -> bool: ...

    @abstractmethod
    def read(self, kind: str, shelf: Shelf | None) -> list[Record]: ...

    @abstractmethod
    def read_one(self, kind: str, key: str) -> Record | None: ...

    @abstractmethod
    def close(self) -> None:
        """Close files. Must not write any more when `state` is `failed`."""

    # --- inside ------------------------------------------------------------------------------

    def _start(self) -> None:
        self._lock.acquire()
        finish_restore(self._lock)
        self._refuse_another_type()
        is_new = not self.path.exists()
        if is_new and self._lock.high_water.sequence:
            raise self._lost("the file is gone")
        try:
            stored = self.open()
            with not_writable(self.path):
                self.epoch = self._lock.take_epoch(stored, self.sequence)
            self.begin()
        except DiskFull as full:
            raise StateNotWritableError(
                str(self.path),
                f"the disk is full ({full})",
                "Free some space and start again.",
            ) from full
        self._fill_reserve()

    def refuse_loss(self) -> None:
        """Compare `sequence` with what was acknowledged; called by `open` before it changes anything.

        Raises:
            StateDamagedError: Acknowledged records are gone.
        """
        if self.sequence < self._lock.high_water.sequence:
            raise self._lost(f"it ends at record {self.sequence}")

    def _lost(self, found: str) -> StateDamagedError:
        return StateDamagedError(
            str(self.path),
            f"{found}, but {self._lock.high_water.sequence} records were acknowledged",
            "Put the missing files back (with SQLite, `state.db-wal` belongs to `state.db`), or restore a backup with "
            f"`nightdesk state restore`. To go on without them, remove {self.directory / HIGH_WATER}.",
        )

    def _refuse_another_type(self) -> None:
        for name, store in self.foreign_files.items():
            if name != self.file_name and (self.directory / name).exists():
                raise StateDamagedError(
                    str(self.directory),
                    f"holds the state of a desk with `store: {store}`",
                    f"Set `state.store: {store}`, or give this desk another directory with `--state DIR`.",
                )

    def _end(self) -> None:
        try:
            self.close()
        finally:
            self._lock.release()

    def _abandon(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
        self._lock.release()

    def acknowledge(self) -> None:
        """Note that everything up to `sequence` is durable."""
        self._lock.mark(self.epoch, self.sequence)

    def _on_change(
        self, state: WriterState, error: StateNotWritableError | None
    ) -> None:
        if error is not None:
            if self.on_failure is not None:
                self.on_failure(error)
            return
        self.take_reserve()
        if self.on_recovery is not None:
            self.on_recovery()

    def _fill_reserve(self) -> None:
        """Keep some space back for a full disk (F4). Without space the desk starts without a reserve."""
        with contextlib.suppress(OSError):
            fd = create_private(self.directory / _RESERVE)
            try:
                if os.fstat(fd).st_size < _RESERVE_BYTES:
                    os.posix_fallocate(fd, 0, _RESERVE_BYTES)
            except OSError:
                (self.directory / _RESERVE).unlink()
            finally:
                os.close(fd)

    def _reserve_bytes(self) -> int:
        with contextlib.suppress(OSError):
            return (self.directory / _RESERVE).stat().st_size
        return 0


_SHARES = {"p50": 0.5, "p99": 0.99, "max": 1.0}


def _at(ordered: list[int], share: float) -> int:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0


def _too_large(put: Put) -> CapacityError:
    return CapacityError(
        f"record {put.kind} {put.key!r} of {len(put.data)} bytes",
        MAX_RECORD_BYTES,
        "the batch was not taken. Keep large data in a file of its own.",
    )
