"""What `nightdesk state inspect | export | backup | restore | migrate` does, as plain functions.

Comes from: cli/
Goes to: stores/_schema.py, stores/_journal.py

`inspect`, `export` and `backup` only read and work beside a running desk; call them in a
process of their own (two handles on one database in one process are safe only within APSW).
`restore` and `migrate` take the lock.
"""

import asyncio
import base64
import contextlib
import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import apsw
import msgspec

from nightdesk.abc import Clock, Record
from nightdesk.errors import CommandError, NightdeskError, StateDamagedError
from nightdesk.stores import _journal as log
from nightdesk.stores import _schema as schema
from nightdesk.stores._directory import DirectoryStore
from nightdesk.stores._lock import (
    DirectoryLock,
    create_private,
    is_locked,
    not_writable,
    read_high_water,
    read_owner,
    sync_directory,
    write_all,
    write_durably,
)
from nightdesk.stores._restore import ASIDE, PENDING, finish_restore
from nightdesk.stores.files import FilesStore
from nightdesk.stores.sqlite import SqliteStore

__all__ = ["backup", "export", "inspect", "migrate", "restore"]

_SQLITE_HEAD = b"SQLite format 3\0"


def inspect(directory: Path) -> dict[str, Any]:
    """Return what a state directory holds, without changing it; damage is told, not raised.

    Raises:
        CommandError: There is no state.
    """
    path = _state_file(directory)
    owner = read_owner(directory)
    locked = is_locked(directory)
    mark = read_high_water(directory)
    facts: dict[str, Any] = {
        "directory": str(directory),
        "store": "sqlite" if path.suffix == ".db" else "files",
        "path": str(path),
        "size_bytes": sum(
            each.stat().st_size for each in directory.glob(f"{path.name}*")
        ),
        "locked": locked,
        "owner": msgspec.structs.asdict(owner) if locked else None,
        "acknowledged_sequence": mark.sequence,
    }
    try:
        return {**facts, **_content(path)}
    except NightdeskError as error:
        return {**facts, "integrity": str(error), "records": {}, "quarantined": []}


def export(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield every record, oldest first, as something JSON can say: `data` if it is JSON, else `data_base64`.

    A damaged record is one line too, with the reason under `damaged`.

    Raises:
        CommandError: There is no state.
        StateDamagedError: It cannot be read.
    """
    for record in _records(_state_file(directory)):
        if isinstance(record, schema.BadRow):
            yield {
                "kind": str(record.kind),
                "key": str(record.key),
                "damaged": record.reason,
            }
            continue
        line: dict[str, Any] = {
            "kind": record.kind,
            "key": record.key,
            "shelf": record.shelf,
            "epoch": record.epoch,
            "sequence": record.sequence,
        }
        try:
            line["data"] = msgspec.json.decode(record.data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            line["data_base64"] = base64.b64encode(record.data).decode()
        yield line


def backup(directory: Path, target: Path) -> dict[str, Any]:
    """Copy the state to the file `target`, also while a desk is running; return what was checked.

    Every record of the copy is read and compared with its checksum before this returns.

    Raises:
        CommandError: There is no state, or `target` exists.
        StateDamagedError: The copy is not sound; it is removed.
    """
    path = _state_file(directory)
    if target.exists():
        raise CommandError(
            f"{target} exists; a backup never replaces another. Choose a new name."
        )
    if path.suffix == ".db":
        with _reading(path) as connection:
            schema.copy_verified(connection, target)
    else:
        data = path.read_bytes()
        found = log.replay(data, str(path))
        with not_writable(target):
            write_durably(target, data[: found.good_bytes])
    try:
        facts = check_backup(target)
    except StateDamagedError:
        target.unlink()
        raise
    return {"path": str(target), **facts}


def check_backup(path: Path) -> dict[str, Any]:
    """Read a whole backup; return its store, counts, sequence, epoch and SHA-256.

    Raises:
        StateDamagedError: It is no backup, or a damaged one.
        CommandError: There is no such file.
    """
    if not path.is_file():
        raise CommandError(f"there is no backup {path}")
    facts = _content(path)
    if facts["integrity"] != "ok":
        raise StateDamagedError(
            str(path), str(facts["integrity"]), "Choose another backup."
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {**facts, "size_bytes": path.stat().st_size, "sha256": digest}


def restore(backup_file: Path, directory: Path, clock: Clock) -> dict[str, Any]:
    """Put a backup in the place of the state of `directory`, which is kept aside; a kill leaves one of them.

    Raises:
        StateLockedError: A desk is running on it.
        StateDamagedError: The backup is damaged; nothing was changed.
    """
    facts = check_backup(backup_file)
    lock = DirectoryLock(directory, clock)
    lock.acquire()
    try:
        finish_restore(lock)
        stamp = datetime.fromtimestamp(clock.now_ns() // 10**9, UTC).strftime(
            "%Y%m%dT%H%M%S"
        )
        aside = _free_name(directory, f"before-restore-{stamp}")
        name = (
            SqliteStore.file_name
            if facts["store"] == "sqlite"
            else FilesStore.file_name
        )
        with not_writable(directory):
            _bring_in(backup_file, directory, name, aside)
        finish_restore(lock)
    finally:
        lock.release()
    kept: Path | None = directory / aside
    if kept is not None and not any(kept.iterdir()):
        kept.rmdir()
        kept = None
    return {
        **facts,
        "restored": str(directory / name),
        "kept": kept and str(kept),
    }


def migrate(directory: Path, clock: Clock) -> dict[str, Any]:
    """Bring the state to this version's schema (as every start does); a backup is made first.

    Raises:
        StateLockedError: A desk is running on it.
        NewerSchemaError: It is newer; nothing was changed.
    """
    path = _state_file(directory)
    store_class: type[SqliteStore | FilesStore] = (
        SqliteStore if path.suffix == ".db" else FilesStore
    )
    store = store_class(directory, clock=clock, inline=True)
    asyncio.run(_start_and_stop(store))
    return {
        "path": str(path),
        "from": store.migrated_from or store.schema_version,
        "to": store.schema_version,
        "changed": store.migrated_from is not None,
    }


async def _start_and_stop(store: DirectoryStore) -> None:
    await store.start()
    await store.stop()


def _state_file(directory: Path) -> Path:
    for store_class in (SqliteStore, FilesStore):
        path = directory / store_class.file_name
        if path.exists():
            return path
    raise CommandError(
        f"{directory} holds no state. Name the directory of a desk with `--state DIR`."
    )


def _is_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".db" or file.read(16) == _SQLITE_HEAD


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[apsw.Connection]:
    """A connection that cannot change the database, not even by tidying up when it closes."""
    schema.check_library(str(path))
    try:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        connection.set_busy_timeout(5000)
        try:
            yield connection
        finally:
            connection.close()
    except (apsw.Error, UnicodeDecodeError) as error:
        raise schema.translate(str(path), error) from error


def _content(path: Path) -> dict[str, Any]:
    """Return versions, counts and the state of health of a state file or a backup."""
    if _is_sqlite(path):
        return _sqlite_content(path)
    found = log.replay(path.read_bytes(), str(path))
    if not found.frames:
        raise StateDamagedError(
            str(path),
            "is neither a database nor a journal of Nightdesk",
            "Name another file.",
        )
    return {
        "store": "files",
        "schema_version": found.version,
        "epoch": found.epoch,
        "sequence": found.sequence,
        "records": _counts(
            (record.kind, record.shelf) for record in found.records.values()
        ),
        "quarantined": [],
        "integrity": "ok",
    }


def _sqlite_content(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"store": "sqlite"}
    with _reading(path) as connection:
        # One view of a database that a running desk keeps writing.
        connection.execute("BEGIN")
        version = schema.check_schema(connection, str(path))
        bad: list[schema.BadRow] = []
        if version == schema.SCHEMA_VERSION:
            bad = schema.verify(connection, str(path))
        epoch, sequence = connection.execute("SELECT epoch, sequence FROM meta").get
        quarantined = connection.execute(
            "SELECT kind, key, reason FROM quarantine ORDER BY id"
        )
        facts |= {
            "schema_version": version,
            "epoch": epoch,
            "sequence": sequence,
            "records": _counts(connection.execute("SELECT kind, shelf FROM records")),
            "quarantined": [[str(value) for value in row] for row in quarantined],
            "integrity": schema.integrity(connection) or _list(bad) or "ok",
        }
    return facts


def _list(bad: list[schema.BadRow]) -> str:
    return "; ".join(f"{row.kind} {row.key!r}: {row.reason}" for row in bad)


def _counts(pairs: Any) -> dict[str, dict[str, int]]:
    counts = Counter(tuple(pair) for pair in pairs)
    shelves: dict[str, dict[str, int]] = {}
    for (kind, shelf), count in sorted(counts.items()):
        shelves.setdefault(kind, {})[shelf] = count
    return shelves


def _records(path: Path) -> list[Record | schema.BadRow]:
    """Every record in order of sequence, the damaged ones last."""
    if not _is_sqlite(path):
        return list(log.replay(path.read_bytes(), str(path)).records.values())
    with _reading(path) as connection:
        schema.check_schema(connection, str(path))
        found = list(schema.read_rows(connection))
    return sorted(
        found,
        key=lambda row: row.sequence if isinstance(row, Record) else sys.maxsize,
    )


def _bring_in(source: Path, directory: Path, name: str, aside: str) -> None:
    """Make `restore.pending` appear, complete and durable, by one rename."""
    arriving = directory / f"{PENDING}.tmp"
    shutil.rmtree(arriving, ignore_errors=True)
    arriving.mkdir(mode=0o700)
    write_durably(arriving / ASIDE, aside.encode())
    fd = create_private(arriving / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with source.open("rb") as file:
            while chunk := file.read(1 << 20):
                write_all(fd, chunk)
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_directory(arriving)
    arriving.replace(directory / PENDING)
    sync_directory(directory)


def _free_name(directory: Path, wish: str) -> str:
    name, number = wish, 1
    while (directory / name).exists():
        number += 1
        name = f"{wish}-{number}"
    return name
