"""A store to look into: contexts as JSON files on the shelves of design 001, behind an append-only journal.

Comes from: desk.py
Goes to: stores/_journal.py (the truth), stores/_mirror.py (the readable files)

    state/
      journal.log              every record, one synced frame per group commit
      active/ completed/ errored/   one readable file per task
      metadata.json            versions and counts

All records are kept in memory; for desks with millions of fills take `sqlite`.
"""

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from nightdesk.abc import Record, Shelf
from nightdesk.errors import StateNotWritableError
from nightdesk.stores import _journal as log
from nightdesk.stores._directory import DirectoryStore
from nightdesk.stores._lock import (
    create_private,
    not_writable,
    sync_directory,
    write_durably,
)
from nightdesk.stores._mirror import Mirror
from nightdesk.stores._writer import DiskFull, Operations

__all__ = ["FilesStore"]

_COMPACT_BYTES = 8 * 1024 * 1024
_FILES_PER_REST = 16
_MIRROR_LAG_NS = 1_000_000_000


class FilesStore(DirectoryStore):
    """Keeps records in `journal.log`, and shows contexts as files."""

    file_name: ClassVar[str] = "journal.log"
    schema_version: ClassVar[int] = log.FORMAT_VERSION
    migrations: ClassVar[Mapping[int, Callable[[list[Record]], list[Record]]]] = {}
    compact_bytes: ClassVar[int] = _COMPACT_BYTES

    def __init__(self, directory: Path, **options: Any) -> None:
        super().__init__(directory, **options)
        self.migrated_from: int | None = None
        self._records: dict[tuple[str, str], Record] = {}
        self._journal: log.Journal | None = None
        self._mirror = Mirror(self.directory)
        self._mirrored_ns = 0
        self._deleted: set[str] = set()
        self._compact_at = self.compact_bytes

    # --- opening -----------------------------------------------------------------------------

    def open(self) -> int:
        with not_writable(self.path):
            os.close(create_private(self.path))
            self._mirror.prepare()
            data = self.path.read_bytes()
        found = log.replay(data, str(self.path), version=self.schema_version)
        self.sequence, self._records = found.sequence, found.records
        self._deleted = {key for kind, key in found.deleted if kind == "context"}
        self.refuse_loss()
        with not_writable(self.path):
            if found.torn_bytes:
                self._cut_off(data, found)
            if found.version < self.schema_version:
                self._migrate(data, found)
            else:
                self._open_journal(found.frames, found.good_bytes)
        return found.epoch

    def _cut_off(self, data: bytes, found: log.Replay) -> None:
        """Remove what a crash left unfinished; it was never acknowledged. The bytes are kept."""
        name = f"journal-tail-{found.sequence}"
        write_durably(self.directory / "errored" / name, data[found.good_bytes :])
        with self.path.open("r+b") as file:
            file.truncate(found.good_bytes)
            os.fsync(file.fileno())
        reason = f"an unfinished commit of {found.torn_bytes} bytes was cut off; kept in errored/{name}"
        self._quarantined.append(("journal", str(found.sequence), reason))

    def _migrate(self, data: bytes, found: log.Replay) -> None:
        """Rewrite the journal in the newer version; a kill leaves the old one, to be migrated again."""
        write_durably(
            self.path.with_name(
                f"before-schema-{self.schema_version}-was-{found.version}.log"
            ),
            data,
        )
        records = list(found.records.values())
        for step in range(found.version, self.schema_version):
            records = self.migrations[step](records)
        self._records = {(record.kind, record.key): record for record in records}
        self.migrated_from = found.version
        self._compact(found.epoch)

    def _open_journal(self, frames: int, size: int) -> None:
        self._journal = log.Journal(
            create_private(self.path), self.path, frames=frames, size=size
        )

    def begin(self) -> None:
        with not_writable(self.path):
            self._remark("start")
            sync_directory(self.directory)
            foreign, findings = self._mirror.compare(self._contexts(), self._deleted)
            self._quarantined += [("context", key, reason) for key, reason in findings]
            if foreign:
                self.commit(list(foreign))
            self._show(None)

    def close(self) -> None:
        journal, self._journal = self._journal, None
        if journal is None:
            return
        try:
            if self.state == "ok":
                # With a remark behind the last commit, later damage to that commit cannot pass for a torn write.
                journal.append(self._frame(remark="stop"))
                self._show(None)
        except (OSError, DiskFull):
            return  # everything acknowledged is in the journal
        finally:
            journal.close()

    # --- writing -----------------------------------------------------------------------------

    def commit(self, operations: Operations) -> None:
        entries = log.entries_of(operations, self.epoch, self.sequence)
        sequence = self.sequence + len(entries)
        self._log.append(self._frame(entries, sequence))
        self.sequence = sequence
        self.acknowledge()
        for entry in entries:
            log.apply(self._records, entry)
            if entry.kind == "context":
                self._mirror.note(entry.key, self._records.get((entry.kind, entry.key)))

    def rest(self, *, busy: bool) -> bool:
        """Bring the readable files up to date while nothing else waits, and some of them each second."""
        if self._journal is None:
            return False  # a start that was refused
        late = self._clock.monotonic_ns() - self._mirrored_ns >= _MIRROR_LAG_NS
        if self._mirror.waiting and (late or not busy):
            with _full():
                self._show(None if self._inline else _FILES_PER_REST)
        if self._log.size > self._compact_at and (late or not busy):
            with _full():
                # The compacted journal no longer knows what was deleted: first remove those files.
                self._show(None)
                self._compact(self.epoch)
        return self._mirror.waiting > 0

    def _show(self, limit: int | None) -> None:
        self._mirror.write(limit)
        self._mirrored_ns = self._clock.monotonic_ns()
        if not self._mirror.waiting:
            self._mirror.write_metadata(self._facts())

    def _facts(self) -> dict[str, Any]:
        shelves = Counter(
            record.shelf
            for record in self._records.values()
            if record.kind == "context"
        )
        kinds = Counter(record.kind for record in self._records.values())
        return {
            "schema_version": self.schema_version,
            "epoch": self.epoch,
            "sequence": self.sequence,
            "saved_ns": self._clock.now_ns(),
            "tasks": {
                shelf: shelves[shelf] for shelf in ("active", "completed", "errored")
            },
            "records": dict(sorted(kinds.items())),
        }

    def _compact(self, epoch: int) -> None:
        log.write_compacted(
            self.path,
            self._records.values(),
            epoch=epoch,
            sequence=self.sequence,
            version=self.schema_version,
        )
        if self._journal is not None:
            self._journal.close()
        data = self.path.read_bytes()
        self._open_journal(
            log.replay(data, str(self.path), version=self.schema_version).frames,
            len(data),
        )
        self._compact_at = max(self.compact_bytes, 4 * len(data))

    def _remark(self, remark: str) -> None:
        self._log.append(self._frame(remark=remark))

    def _frame(
        self,
        entries: tuple[log.Entry, ...] = (),
        sequence: int | None = None,
        remark: str = "",
    ) -> log.Frame:
        return log.Frame(
            self.schema_version,
            self.epoch,
            self.sequence if sequence is None else sequence,
            entries,
            remark,
        )

    # --- reading -----------------------------------------------------------------------------

    def read(self, kind: str, shelf: Shelf | None) -> list[Record]:
        return [
            record
            for record in self._records.values()
            if record.kind == kind and shelf in (None, record.shelf)
        ]

    def read_one(self, kind: str, key: str) -> Record | None:
        return self._records.get((kind, key))

    def _contexts(self) -> dict[str, Record]:
        return {
            record.key: record
            for record in self._records.values()
            if record.kind == "context"
        }

    @property
    def _log(self) -> log.Journal:
        if self._journal is None:
            raise StateNotWritableError(
                str(self.path), "the store is not started", "Call `start` first."
            )
        return self._journal


@contextlib.contextmanager
def _full() -> Iterator[None]:
    """Tell a full disk from other failures while the files that only mirror the journal are written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(str(error.filename)) from error
        raise
