"""The tables of the SQLite store, how they are checked, and how they come to a newer version.

Comes from: stores/sqlite.py, stores/_tools.py

Three guards stand beside SQLite's own: each row carries a checksum over all of it; `tally`
holds the count and the sum of these checksums per kind, kept by triggers in the same
transaction, so that a row which vanished is noticed; and the text of the schema must be
exactly what this version writes.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from nightdesk.abc import Record
from nightdesk.errors import NewerSchemaError, StateDamagedError, StateNotWritableError
from nightdesk.stores._lock import create_private, not_writable, sync_directory
from nightdesk.stores._seal import SEAL_MASK, seal

__all__ = [
    "MIGRATIONS",
    "RESTORE",
    "SCHEMA_VERSION",
    "STATEMENTS",
    "BadRow",
    "check_library",
    "check_schema",
    "copy_verified",
    "create",
    "integrity",
    "read_rows",
    "repair",
    "translate",
    "verify",
]

SCHEMA_VERSION = 1
RESTORE = "Nothing was changed. Restore a backup: `nightdesk state restore BACKUP`."

_LEAST_LIBRARY = (3, 51, 3)
_APPLICATION = 0x4E444B31  # "NDK1"
_INDEX = "CREATE UNIQUE INDEX records_name ON records(kind, key)"
STATEMENTS = (
    "CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 1), epoch INTEGER NOT NULL, sequence INTEGER NOT NULL) STRICT",
    "CREATE TABLE records (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, key TEXT NOT NULL, shelf TEXT NOT NULL, "
    "epoch INTEGER NOT NULL, sequence INTEGER NOT NULL, checksum INTEGER NOT NULL, data BLOB NOT NULL) STRICT",
    _INDEX,
    "CREATE TABLE tally (kind TEXT PRIMARY KEY, count INTEGER NOT NULL, total INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    "CREATE TABLE quarantine (id INTEGER PRIMARY KEY, kind ANY, key ANY, shelf ANY, data ANY, epoch ANY, "
    "sequence ANY, checksum ANY, reason TEXT NOT NULL) STRICT",
    "CREATE TRIGGER tally_insert AFTER INSERT ON records BEGIN INSERT INTO tally VALUES (new.kind, 1, new.checksum) "
    f"ON CONFLICT DO UPDATE SET count = count + 1, total = (total + new.checksum) & {SEAL_MASK}; END",
    "CREATE TRIGGER tally_update AFTER UPDATE ON records BEGIN UPDATE tally "
    f"SET total = (total + new.checksum - old.checksum) & {SEAL_MASK} WHERE kind = new.kind; END",
    "CREATE TRIGGER tally_delete AFTER DELETE ON records BEGIN UPDATE tally "
    f"SET count = count - 1, total = (total - old.checksum) & {SEAL_MASK} WHERE kind = old.kind; END",
)
_COLUMNS = "kind, key, shelf, epoch, sequence, checksum, data"

MIGRATIONS: Mapping[int, Callable[[apsw.Connection], None]] = {}
"""From old schema version to the function that brings a database to the next one."""


class BadRow(NamedTuple):
    """A row whose checksum does not fit, by its rowid."""

    id: int
    kind: Any
    key: Any
    reason: str


def check_library(path: str, version: str | None = None) -> None:
    """Refuse SQLite libraries that can corrupt a write-ahead log (R-20)."""
    found = version or apsw.sqlite_lib_version()
    if tuple(int(part) for part in found.split(".")[:3]) < _LEAST_LIBRARY:
        raise StateNotWritableError(
            path,
            f"SQLite {found} can corrupt it (its write-ahead log may be reset too early)",
            "Install apsw >= 3.51.3: `pip install --upgrade apsw`.",
        )


def create(
    connection: apsw.Connection, version: int, statements: Iterable[str]
) -> None:
    """Make the tables, in one transaction."""
    with connection:
        for statement in statements:
            connection.execute(statement)
        connection.execute("INSERT INTO meta VALUES (1, 0, 0)")
        connection.pragma("application_id", _APPLICATION)
        connection.pragma("user_version", version)


def check_schema(
    connection: apsw.Connection,
    path: str,
    *,
    version: int = SCHEMA_VERSION,
    statements: Iterable[str] = STATEMENTS,
) -> int:
    """Return the version of the schema found, 0 for an empty database.

    Raises:
        NewerSchemaError: It is newer than `version`.
        StateDamagedError: It is not what that version writes.
    """
    found = int(connection.pragma("user_version"))
    written = [
        row[0]
        for row in connection.execute(
            "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY rowid"
        )
    ]
    if not written and int(connection.pragma("page_count")) <= 1:
        return 0
    if int(connection.pragma("application_id")) != _APPLICATION:
        raise StateDamagedError(
            path, "is no state database of Nightdesk, or its header is damaged", RESTORE
        )
    if found > version:
        raise NewerSchemaError(path, found, version)
    if found < 1 or (found == version and sorted(written) != sorted(statements)):
        raise StateDamagedError(
            path, "the description of its tables is damaged", RESTORE
        )
    return found


def read_rows(
    connection: apsw.Connection, where: str = "", values: tuple[Any, ...] = ()
) -> Iterator[Record | BadRow]:
    """Yield the matching rows, each checked."""
    for row in connection.execute(
        f"SELECT id, {_COLUMNS} FROM records {where}", values
    ):
        yield _checked(row)


def _checked(row: tuple[Any, ...]) -> Record | BadRow:
    number, kind, key, shelf, epoch, sequence, checksum, data = row
    if not (
        isinstance(kind, str)
        and isinstance(key, str)
        and isinstance(shelf, str)
        and isinstance(data, bytes)
    ):
        return BadRow(number, kind, key, "a column has the wrong type")
    if seal(kind, key, shelf, data, epoch, sequence) != checksum:
        return BadRow(number, kind, key, "its checksum does not fit its content")
    return Record(kind, key, data, shelf, epoch, sequence)  # type: ignore[arg-type]


def verify(connection: apsw.Connection, path: str) -> list[BadRow]:
    """Read everything; return the rows that are damaged, if it is certain that no other is missing.

    Raises:
        StateDamagedError: More is wrong than single rows.
    """
    counts: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    bad: list[BadRow] = []
    newest = 0
    for row in _all_rows(connection):
        checked = _checked(row)
        if isinstance(checked, BadRow):
            bad.append(checked)
            continue
        counts[checked.kind] += 1
        totals[checked.kind] += row[6]
        newest = max(newest, checked.sequence)
    _compare_with_tally(connection, path, counts, totals, bad)
    if newest > int(connection.execute("SELECT sequence FROM meta").get or 0):
        raise StateDamagedError(
            path, "its newest record is newer than its own counter", RESTORE
        )
    return bad


def _all_rows(connection: apsw.Connection) -> Iterator[tuple[Any, ...]]:
    try:
        yield from connection.execute(
            f"SELECT id, {_COLUMNS} FROM records NOT INDEXED ORDER BY id"
        ).fetchall()
        return
    except (
        UnicodeDecodeError
    ):  # some name is no text any more: read names as bytes, which are then refused
        names = ", ".join(f"CAST({name} AS BLOB)" for name in ("kind", "key", "shelf"))
    rest = _COLUMNS.partition("shelf, ")[2]
    for number, kind, key, shelf, *others in connection.execute(
        f"SELECT id, {names}, {rest} FROM records NOT INDEXED ORDER BY id"
    ):
        yield (number, *(_text_or_bytes(name) for name in (kind, key, shelf)), *others)


def _text_or_bytes(name: bytes) -> Any:
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name


def _compare_with_tally(
    connection: apsw.Connection,
    path: str,
    counts: Counter[str],
    totals: Counter[str],
    bad: list[BadRow],
) -> None:
    tally = {
        kind: (count, total)
        for kind, count, total in connection.execute(
            "SELECT kind, count, total FROM tally"
        )
    }
    missing = sum(count - counts[kind] for kind, (count, _) in tally.items())
    unlisted = sorted(
        kind for kind in counts if counts[kind] > tally.get(kind, (0, 0))[0]
    )
    if unlisted or missing != len(bad):
        raise StateDamagedError(
            path,
            f"{missing} records are missing, and {len(bad)} damaged ones were found in their place",
            RESTORE,
        )
    for kind, (count, total) in tally.items():
        if counts[kind] == count and totals[kind] & SEAL_MASK != total:
            raise StateDamagedError(
                path,
                f"the records of kind {kind!r} are not those that were written",
                RESTORE,
            )


def repair(connection: apsw.Connection, path: str, bad: list[BadRow]) -> None:
    """Move damaged rows to the quarantine and rebuild the index, in one transaction.

    The index is derived from rows that were just checked, so making it anew loses nothing.

    Raises:
        StateDamagedError: The database stays inconsistent; nothing was changed.
    """
    with connection:
        connection.execute("DROP INDEX records_name")
        for row in bad:
            connection.execute(
                f"INSERT INTO quarantine ({_COLUMNS}, reason) SELECT {_COLUMNS}, ? FROM records WHERE id = ?",
                (row.reason, row.id),
            )
            connection.execute("DELETE FROM records WHERE id = ?", (row.id,))
        connection.execute(_INDEX)
        connection.execute("DELETE FROM tally")
        connection.execute(
            f"INSERT INTO tally SELECT kind, count(*), sum(checksum) & {SEAL_MASK} FROM records GROUP BY kind"
        )
        found = integrity(connection)
        if found:
            raise StateDamagedError(path, found, RESTORE)


def integrity(connection: apsw.Connection) -> str:
    """Return SQLite's own complaints about the structure, or an empty string."""
    rows = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(3)")]
    return "" if rows == ["ok"] else "; ".join(rows).replace("\n", " ")


def translate(path: str, error: Exception) -> Exception:
    """Return the error of the store that stands for one of SQLite."""
    if isinstance(
        error,
        apsw.NotADBError
        | apsw.CorruptError
        | apsw.SQLError
        | apsw.FormatError
        | TypeError
        | ValueError,
    ):
        return StateDamagedError(
            path, f"SQLite cannot read it ({_describe(error)})", RESTORE
        )
    if isinstance(error, apsw.Error | OSError):
        return StateNotWritableError(
            path,
            f"SQLite cannot open it ({_describe(error)})",
            "Check that the directory is writable and has space.",
        )
    return error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__.removesuffix('Error')}: {error}"


def copy_verified(source: apsw.Connection, target: Path) -> int:
    """Copy a database, also one that is being written, to `target`; return how many records it holds.

    The copy is complete, checked and durable before it gets its name.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    with not_writable(target):
        temporary.unlink(missing_ok=True)
        os.close(create_private(temporary))
    try:
        count = _copy(source, temporary)
        with not_writable(target):
            temporary.replace(target)
            sync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _copy(source: apsw.Connection, target: Path) -> int:
    copy = apsw.Connection(str(target))
    try:
        with copy.backup("main", source, "main") as backup:
            backup.step(
                -1
            )  # in one go: in steps it would start anew at each commit of a busy desk
        copy.pragma("journal_mode", "delete")
        found = integrity(copy)
        if found:
            raise StateDamagedError(
                str(target), f"the copy is not sound: {found}", RESTORE
            )
        return int(copy.execute("SELECT count(*) FROM records").get)
    except apsw.Error as error:
        raise translate(str(target), error) from error
    finally:
        copy.close()
