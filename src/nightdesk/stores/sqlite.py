"""The default store: SQLite in WAL mode with synchronous=FULL, through APSW, one writer with group commit.

Comes from: desk.py
Goes to: stores/_writer.py, stores/_schema.py

APSW brings its own SQLite. The library inside Python is older and has a bug that corrupts
write-ahead logs (R-20), and two SQLite libraries in one process must never open the same
file, so nothing else may open `state.db` from within the desk.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import apsw

from nightdesk.abc import Put, Record, Shelf
from nightdesk.errors import StateDamagedError, StateNotWritableError
from nightdesk.stores import _schema as schema
from nightdesk.stores._directory import DirectoryStore
from nightdesk.stores._lock import create_private, not_writable
from nightdesk.stores._seal import seal
from nightdesk.stores._writer import DiskFull, Operations

__all__ = ["SqliteStore"]

_CHUNK = 32
_CHECKPOINT_PAGES = 4000
_MOST_EPOCHS = 2**40


def _upsert(rows: int) -> str:
    """One statement for many rows: SQLite releases the interpreter's lock once, not once per row,
    so that a busy loop does not stretch a commit by its switch interval for each row."""
    values = ", ".join(["(?, ?, ?, ?, ?, ?, ?)"] * rows)
    return (
        f"INSERT INTO records (kind, key, shelf, epoch, sequence, checksum, data) VALUES {values} "
        "ON CONFLICT (kind, key) DO UPDATE SET shelf = excluded.shelf, data = excluded.data, "
        "epoch = excluded.epoch, sequence = excluded.sequence, checksum = excluded.checksum"
    )


_UPSERT_MANY = _upsert(_CHUNK)
_UPSERT_ONE = _upsert(1)


class SqliteStore(DirectoryStore):
    """Keeps records in `state.db`.

    At start every record is read and checked, up to a file of `full_check_bytes`; a larger
    one is checked as it is loaded, so that the desk is ready in seconds.
    """

    file_name: ClassVar[str] = "state.db"
    schema_version: ClassVar[int] = schema.SCHEMA_VERSION
    statements: ClassVar[tuple[str, ...]] = schema.STATEMENTS
    migrations: ClassVar[Mapping[int, Callable[[apsw.Connection], None]]] = (
        schema.MIGRATIONS
    )
    full_check_bytes: ClassVar[int] = 256 * 1024 * 1024

    def __init__(
        self, directory: Path, *, vfs: str | None = None, **options: Any
    ) -> None:
        super().__init__(directory, **options)
        self._vfs = vfs
        self._connection: apsw.Connection | None = None
        self._wal_pages = 0
        self._checkpoint_at = _CHECKPOINT_PAGES
        self._sound = False
        self.migrated_from: int | None = None

    # --- opening -----------------------------------------------------------------------------

    def open(self) -> int:
        schema.check_library(str(self.path))
        with not_writable(self.path):
            os.close(
                create_private(self.path)
            )  # SQLite would create it readable for everyone
        try:
            return self._open()
        except (apsw.Error, OSError, TypeError, ValueError) as error:
            raise schema.translate(str(self.path), error) from error

    def _open(self) -> int:
        connection = apsw.Connection(str(self.path), vfs=self._vfs)
        self._connection = connection
        # A backup in another process may hold it for a moment.
        connection.set_busy_timeout(5000)
        version = schema.check_schema(
            connection,
            str(self.path),
            version=self.schema_version,
            statements=self.statements,
        )
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", "full")
        connection.pragma("wal_autocheckpoint", 0)
        connection.set_wal_hook(self._on_wal)
        if version == 0:
            schema.create(connection, self.schema_version, self.statements)
        elif version < self.schema_version:
            self._migrate(connection, version)
        epoch, self.sequence = map(
            int, connection.execute("SELECT epoch, sequence FROM meta").get
        )
        if not (0 <= epoch < _MOST_EPOCHS and self.sequence >= 0):
            raise StateDamagedError(
                str(self.path),
                f"its epoch {epoch} or sequence cannot be right",
                schema.RESTORE,
            )
        self.refuse_loss()
        self._check(connection)
        return epoch

    def _check(self, connection: apsw.Connection) -> None:
        pages = int(connection.pragma("page_count"))
        size = int(connection.pragma("page_size"))
        if pages * size > self.full_check_bytes:
            return
        bad = schema.verify(connection, str(self.path))
        if bad or schema.integrity(connection):
            schema.repair(connection, str(self.path), bad)
            self._note(bad)

    def _migrate(self, connection: apsw.Connection, version: int) -> None:
        """Go forward one version at a time, each step in one transaction; the first is preceded by a backup."""
        target = self.path.with_name(
            f"before-schema-{self.schema_version}-was-{version}.db"
        )
        schema.copy_verified(connection, target)
        self.migrated_from = version
        for step in range(version, self.schema_version):
            with connection:
                self.migrations[step](connection)
                connection.pragma("user_version", step + 1)

    def begin(self) -> None:
        try:
            self._db.execute("UPDATE meta SET epoch = ?", (self.epoch,))
            self._sound = True
        except apsw.Error as error:
            raise schema.translate(str(self.path), error) from error

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self.state == "failed" or not self._sound:
            # What the kernel still shows after a failed fsync may not be believed, and what
            # was found damaged is left as it is: without this, closing would tidy up the log.
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        with contextlib.suppress(apsw.Error):
            connection.close()

    # --- writing -----------------------------------------------------------------------------

    def commit(self, operations: Operations) -> None:
        connection = self._db
        sequence = self.sequence
        puts: list[Any] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for operation in operations:
                sequence += 1
                if type(operation) is Put:
                    puts += self._row(operation, sequence)
                else:
                    connection.execute(
                        "DELETE FROM records WHERE kind = ? AND key = ?",
                        (operation.kind, operation.key),
                    )
            self._write(connection, puts)
            connection.execute(
                "UPDATE meta SET sequence = ? WHERE epoch = ?", (sequence, self.epoch)
            )
            if connection.changes() != 1:
                raise self._fenced(connection)
            connection.execute("COMMIT")
        except BaseException as error:
            self._roll_back(connection)
            if isinstance(error, apsw.FullError):
                raise DiskFull(str(self.path)) from error
            raise
        self.sequence = sequence
        self.acknowledge()

    def _row(self, put: Put, sequence: int) -> tuple[Any, ...]:
        checksum = seal(put.kind, put.key, put.shelf, put.data, self.epoch, sequence)
        return (put.kind, put.key, put.shelf, self.epoch, sequence, checksum, put.data)

    def _write(self, connection: apsw.Connection, values: list[Any]) -> None:
        width = 7 * _CHUNK
        whole = len(values) - len(values) % width
        for start in range(0, whole, width):
            connection.execute(_UPSERT_MANY, values[start : start + width])
        for start in range(whole, len(values), 7):
            connection.execute(_UPSERT_ONE, values[start : start + 7])

    def _fenced(self, connection: apsw.Connection) -> StateNotWritableError:
        newer = connection.execute("SELECT epoch FROM meta").get
        return StateNotWritableError(
            str(self.path),
            f"another desk has taken it over (its epoch is {newer}, this desk's is {self.epoch})",
            "Stop this desk: two must not trade from one state.",
        )

    def _roll_back(self, connection: apsw.Connection) -> None:
        if connection.in_transaction:
            with contextlib.suppress(apsw.Error):
                connection.execute("ROLLBACK")

    def _on_wal(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK

    def rest(self, *, busy: bool) -> bool:
        """Move the log into the database when it has grown: after the waiters were woken, never before."""
        if self._wal_pages < self._checkpoint_at:
            return False
        try:
            in_log, moved = self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.FullError as error:
            raise DiskFull(str(self.path)) from error
        # A reader, such as a backup, keeps the log from starting anew: then not again for each commit.
        self._checkpoint_at = _CHECKPOINT_PAGES + (0 if moved == in_log else in_log)
        self._wal_pages = 0
        return False

    # --- reading -----------------------------------------------------------------------------

    def read(self, kind: str, shelf: Shelf | None) -> list[Record]:
        if shelf is None:
            found = self._read("WHERE kind = ?", (kind,))
        else:
            found = self._read("WHERE kind = ? AND shelf = ?", (kind, shelf))
        return sorted(found, key=lambda record: record.sequence)

    def read_one(self, kind: str, key: str) -> Record | None:
        found = self._read("WHERE kind = ? AND key = ?", (kind, key))
        return found[0] if found else None

    def _read(self, where: str, values: tuple[Any, ...]) -> list[Record]:
        good: list[Record] = []
        bad: list[schema.BadRow] = []
        try:
            for row in schema.read_rows(self._db, where, values):
                if isinstance(row, Record):
                    good.append(row)
                else:
                    bad.append(row)
            if bad and self.state == "ok":
                schema.repair(self._db, str(self.path), bad)
        except (apsw.Error, UnicodeDecodeError) as error:
            raise schema.translate(str(self.path), error) from error
        self._note(bad)
        return good

    def _note(self, bad: list[schema.BadRow]) -> None:
        self._quarantined += [(str(row.kind), str(row.key), row.reason) for row in bad]

    @property
    def _db(self) -> apsw.Connection:
        if self._connection is None:
            raise StateDamagedError(
                str(self.path), "the store is not started", "Call `start` first."
            )
        return self._connection
