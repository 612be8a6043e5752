"""What only the SQLite store promises."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import apsw
import pytest

from fakes.clock import ManualClock
from fakes.disk import BadDisk
from nightdesk.abc import Delete, Put
from nightdesk.errors import (
    CapacityError,
    NewerSchemaError,
    StateDamagedError,
    StateNotWritableError,
)
from nightdesk.stores import _schema as schema
from nightdesk.stores.files import FilesStore
from nightdesk.stores.sqlite import SqliteStore

RECORDS = [Put("context", f"task-{n}", b'{"n": %d}' % n) for n in range(5)]


def build(directory: Path, **options: Any) -> SqliteStore:
    return SqliteStore(
        directory, clock=ManualClock(), inline=options.pop("inline", True), **options
    )


async def filled(directory: Path) -> Path:
    store = build(directory)
    await store.start()
    await store.save([*RECORDS, Put("order", "o1", b"\x00" * 100)])
    await store.stop()
    return store.path


def edit(path: Path, *statements: str) -> None:
    connection = apsw.Connection(str(path))
    for statement in statements:
        connection.execute(statement)
    connection.close()


async def test_each_commit_is_synced_in_a_write_ahead_log(tmp_path: Path) -> None:
    store = build(tmp_path)
    await store.start()

    modes = [store._db.pragma(name) for name in ("journal_mode", "synchronous")]

    assert modes == ["wal", 2]
    await store.stop()


def test_a_library_that_corrupts_write_ahead_logs_is_refused() -> None:
    schema.check_library("state.db", "3.51.3")

    with pytest.raises(
        StateNotWritableError, match=r"SQLite 3\.51\.2.*\n?.*"
    ) as caught:
        schema.check_library("state.db", "3.51.2")

    assert "pip install" in str(caught.value)


async def test_a_failed_fsync_stops_every_later_save_and_tells_the_desk(
    tmp_path: Path,
) -> None:
    """F3. The desk halts on `on_failure`; what was acknowledged before is there at the next start."""
    disk = BadDisk()
    told: list[StateNotWritableError] = []
    store = build(tmp_path, vfs=disk.name, on_failure=told.append)
    await store.start()
    await store.save([Put("a", "before", b"1")])

    disk.failing = "xSync"
    for key in ("bad", "later"):
        with pytest.raises(StateNotWritableError, match=r"state\.db"):
            await store.save([Put("a", key, b"1")])
        disk.failing = None
    await store.stop()

    assert len(told) == 1 and store.state == "failed"
    again = build(tmp_path)
    await again.start()
    assert "before" in [record.key for record in await again.load("a")]
    await again.stop()


@pytest.mark.parametrize("inline", [True, False])
async def test_a_full_disk_holds_saves_back_and_writes_them_in_order_later(
    tmp_path: Path, inline: bool
) -> None:
    disk = BadDisk()
    told: list[str] = []
    store = build(
        tmp_path,
        inline=inline,
        vfs=disk.name,
        on_failure=lambda error: told.append(str(error)),
        on_recovery=lambda: told.append("space"),
    )
    await store.start()

    disk.failing = "xWrite"
    with pytest.raises(StateNotWritableError, match="disk is full"):
        await store.save([Put("a", "1", b"held")])
    assert store.stats()["state"] == "full"
    assert await store.get("a", "1") is None
    assert store.release_reserve() == 1024 * 1024
    assert store.stats()["reserve_bytes"] == 0
    disk.failing = None
    await store.save([Put("a", "2", b"after")])

    assert [record.key for record in await store.load("a")] == ["1", "2"]
    assert told[0].endswith("goes on by itself.") and told[1:] == ["space"]
    assert store.stats()["reserve_bytes"] == 1024 * 1024
    await store.stop()


async def test_a_full_database_rolls_back_the_whole_batch(tmp_path: Path) -> None:
    store = build(tmp_path)
    await store.start()
    store._db.pragma("max_page_count", store._db.pragma("page_count") + 2)

    with pytest.raises(StateNotWritableError, match="disk is full"):
        await store.save([Put("a", str(n), b"x" * 4000) for n in range(20)])

    assert await store.load("a") == []
    await store.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)],
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.process
@pytest.mark.parametrize("store_class", [SqliteStore, FilesStore])
async def test_on_a_really_full_disk_the_reserve_lets_closing_records_through(
    small_disk: Path, store_class: type[SqliteStore | FilesStore]
) -> None:
    """F4 on a real file system: acknowledged stays, refused is told, the reserve helps, space heals."""
    store = store_class(small_disk / "state", clock=ManualClock())
    await store.start()
    await store.save([Put("order", "intent", b"1")])
    hog = small_disk / "hog"
    with hog.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)

    refused = 0
    for n in range(200):
        try:
            await store.save([Put("order", f"o{n}", b"x" * 8000)])
        except StateNotWritableError:
            refused += 1
            break
    assert refused and store.state == "full"
    assert store.release_reserve() > 0
    await store.save([Put("order", "cancel", b"1")])
    hog.unlink()
    await store.save([Put("order", "afterwards", b"1")])
    keys = [record.key for record in await store.load("order")]
    await store.stop()

    assert keys[0] == "intent" and keys[-2:] == ["cancel", "afterwards"]
    again = store_class(small_disk / "state", clock=ManualClock())
    await again.start()
    assert [record.key for record in await again.load("order")] == keys
    await again.stop()


async def test_a_desk_whose_state_was_taken_over_can_write_no_more(
    tmp_path: Path,
) -> None:
    """Somebody removed the lock file and started a second desk: the fencing epoch stops the first."""
    store = build(tmp_path)
    await store.start()
    await store.save([Put("a", "1", b"")])
    store._db.execute("UPDATE meta SET epoch = epoch + 1")

    with pytest.raises(StateNotWritableError, match="another desk has taken it over"):
        await store.save([Put("a", "2", b"")])

    assert [record.key for record in await store.load("a")] == ["1"]
    await store.stop()


async def test_the_log_is_moved_into_the_database_before_it_grows_for_ever(
    tmp_path: Path,
) -> None:
    store = build(tmp_path)
    await store.start()
    for n in range(12):
        await store.save([Put("a", str(n % 3), b"x" * 4_000_000)])

    wal = (tmp_path / "state.db-wal").stat().st_size

    assert wal < 30_000_000
    assert len(await store.load("a")) == 3
    await store.stop()


async def test_a_reader_that_stays_does_not_stop_the_desk(tmp_path: Path) -> None:
    """A backup keeps the log from starting anew; commits go on, and checkpoints are not tried at each."""
    store = build(tmp_path)
    await store.start()
    await store.save([Put("a", "0", b"x")])
    reader = apsw.Connection(str(store.path))
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM records").fetchall()
    for n in range(6):
        await store.save([Put("a", str(n), b"x" * 4_000_000)])

    assert store._checkpoint_at > 4000
    reader.close()
    await store.stop()


@pytest.mark.parametrize("data", [b"x" * (16 * 1024 * 1024 + 1)])
async def test_a_record_too_large_is_refused_at_once(
    tmp_path: Path, data: bytes
) -> None:
    store = build(tmp_path)
    await store.start()

    with pytest.raises(CapacityError, match="16777217 bytes"):
        store.save([Put("a", "1", b""), Put("a", "2", data)])

    assert await store.load("a") == []
    await store.stop()


@pytest.mark.parametrize(
    ("kind", "key"),
    [("", "1"), ("a", ""), ("a", "x" * 513), ("a", "\n"), ("a", "\ud800")],
)
async def test_names_that_cannot_be_stored_are_refused(
    tmp_path: Path, kind: str, key: str
) -> None:
    store = build(tmp_path)
    await store.start()

    with pytest.raises(ValueError, match="cannot name a record"):
        store.save([Put(kind, key, b"")])
    with pytest.raises(ValueError, match="cannot name a record"):
        store.save([Delete(kind, key)])

    await store.stop()


# --- damage ------------------------------------------------------------------------------------


async def test_a_damaged_record_is_put_aside_with_its_bytes_and_the_others_load(
    tmp_path: Path,
) -> None:
    path = await filled(tmp_path)
    content = path.read_bytes()
    assert content.count(b'{"n": 3}') == 1
    path.write_bytes(content.replace(b'{"n": 3}', b'{"n": 8}'))

    store = build(tmp_path)
    await store.start()

    assert [record.key for record in await store.load("context")] == [
        "task-0",
        "task-1",
        "task-2",
        "task-4",
    ]
    assert store.quarantined() == [
        ("context", "task-3", "its checksum does not fit its content")
    ]
    kept = store._db.execute("SELECT kind, key, data FROM quarantine").fetchall()
    assert kept == [("context", "task-3", b'{"n": 8}')]
    await store.save([Put("context", "task-3", b"new")])
    await store.stop()
    again = build(tmp_path)
    await again.start()
    assert len(await again.load("context")) == 5 and again.quarantined() == []
    await again.stop()


async def test_a_damaged_name_is_put_aside_and_the_index_is_made_anew(
    tmp_path: Path,
) -> None:
    path = await filled(tmp_path)
    connection = apsw.Connection(str(path))
    connection.execute("DROP TRIGGER tally_update")
    trigger = next(each for each in schema.STATEMENTS if "tally_update" in each)
    connection.execute(
        "UPDATE records SET key = CAST(x'ff3030' AS TEXT) WHERE key = 'task-1'"
    )
    connection.execute(trigger)
    connection.close()

    store = build(tmp_path)
    await store.start()

    assert await store.get("context", "task-1") is None
    assert len(await store.load("context")) == 4
    assert len(store.quarantined()) == 1
    await store.stop()


async def test_a_record_that_vanished_is_damage(tmp_path: Path) -> None:
    path = await filled(tmp_path)
    trigger = next(each for each in schema.STATEMENTS if "tally_delete" in each)
    edit(
        path,
        "DROP TRIGGER tally_delete",
        "DELETE FROM records WHERE key = 'task-2'",
        trigger,
    )
    before = path.read_bytes()

    with pytest.raises(StateDamagedError, match="1 records are missing") as caught:
        await build(tmp_path).start()

    assert "nightdesk state restore" in str(caught.value)
    assert path.read_bytes() == before


async def test_a_record_replaced_behind_our_back_is_damage(tmp_path: Path) -> None:
    path = await filled(tmp_path)
    edit(path, "UPDATE tally SET total = total + 1 WHERE kind = 'order'")

    with pytest.raises(StateDamagedError, match="kind 'order'"):
        await build(tmp_path).start()


async def test_a_record_too_many_is_damage(tmp_path: Path) -> None:
    path = await filled(tmp_path)
    edit(path, "DELETE FROM tally WHERE kind = 'order'")

    with pytest.raises(StateDamagedError):
        await build(tmp_path).start()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE meta SET sequence = 2",
        "UPDATE meta SET epoch = -1",
        "UPDATE meta SET epoch = 1 << 50",
        "DELETE FROM meta",
        "DROP TRIGGER tally_insert",
        "DROP TABLE records",
        "PRAGMA application_id = 7",
        "PRAGMA user_version = 0",
    ],
)
async def test_a_database_with_other_tables_or_counters_is_damage(
    tmp_path: Path, statement: str
) -> None:
    edit(await filled(tmp_path), statement)
    (tmp_path / "high_water").unlink()

    with pytest.raises(StateDamagedError, match="state restore"):
        await build(tmp_path).start()


async def test_a_lost_write_ahead_log_is_noticed(tmp_path: Path) -> None:
    """Copying or restoring `state.db` without `state.db-wal` loses what was acknowledged last."""
    store = build(tmp_path / "a")
    await store.start()
    await store.save(RECORDS)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    await store.stop()
    (tmp_path / "b" / "state.db-wal").unlink()

    with pytest.raises(StateDamagedError, match=r"state\.db-wal"):
        await build(tmp_path / "b").start()


async def test_a_lost_database_is_noticed(tmp_path: Path) -> None:
    (await filled(tmp_path)).unlink()

    with pytest.raises(
        StateDamagedError, match=r"the file is gone.*6 records were acknowledged"
    ):
        await build(tmp_path).start()

    (tmp_path / "high_water").unlink()
    store = build(tmp_path)
    await store.start()
    await store.stop()


async def test_the_state_of_another_type_of_store_is_refused(tmp_path: Path) -> None:
    await filled(tmp_path)

    with pytest.raises(StateDamagedError, match="store: sqlite"):
        await FilesStore(tmp_path, clock=ManualClock(), inline=True).start()


async def test_a_large_database_is_checked_as_it_is_loaded(tmp_path: Path) -> None:
    class Large(SqliteStore):
        full_check_bytes = 0

    path = await filled(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'{"n": 3}', b'{"n": 8}'))
    store = Large(tmp_path, clock=ManualClock(), inline=True)
    await store.start()
    assert store.quarantined() == []

    loaded = await store.load("context")

    assert len(loaded) == 4 and len(store.quarantined()) == 1
    await store.stop()


async def test_a_start_killed_before_the_tables_were_made_starts_again(
    tmp_path: Path,
) -> None:
    connection = apsw.Connection(str(tmp_path / "state.db"))
    connection.pragma("journal_mode", "wal")
    connection.close()

    store = build(tmp_path)
    await store.start()
    await store.save(RECORDS)
    await store.stop()


# --- versions ------------------------------------------------------------------------------------


def add_note(connection: apsw.Connection) -> None:
    connection.execute("ALTER TABLE meta ADD COLUMN note TEXT")


def fill_note(connection: apsw.Connection) -> None:
    connection.execute("UPDATE meta SET note = coalesce(note, '') || 'filled'")


_META_3 = schema.STATEMENTS[0].replace(") STRICT", ", note TEXT) STRICT")


class ThirdVersion(SqliteStore):
    """A later program: two migrations away."""

    schema_version = 3
    statements = (_META_3, *schema.STATEMENTS[1:])
    migrations: ClassVar = {1: add_note, 2: fill_note}


async def test_an_older_state_is_brought_forward_after_a_backup(tmp_path: Path) -> None:
    await filled(tmp_path)

    store = ThirdVersion(tmp_path, clock=ManualClock(), inline=True)
    await store.start()

    assert store._db.execute("SELECT note FROM meta").get == "filled"
    assert len(await store.load("context")) == 5
    assert store.migrated_from == 1
    await store.stop()
    backup = apsw.Connection(str(tmp_path / "before-schema-3-was-1.db"))
    assert backup.pragma("user_version") == 1
    assert backup.execute("SELECT count(*) FROM records").get == 6
    backup.close()


@pytest.mark.parametrize("step", [1, 2])
async def test_a_migration_that_dies_between_its_steps_is_completed_by_the_next_start(
    tmp_path: Path, step: int
) -> None:
    """F27: each step is one transaction, so a kill leaves a whole version, and no step is done twice."""
    await filled(tmp_path)

    def die(connection: apsw.Connection) -> None:
        ThirdVersion.migrations[step](connection)
        raise apsw.InterruptError("killed")

    class Dying(ThirdVersion):
        migrations: ClassVar = {**ThirdVersion.migrations, step: die}

    with pytest.raises(StateNotWritableError):
        await Dying(tmp_path, clock=ManualClock(), inline=True).start()
    store = ThirdVersion(tmp_path, clock=ManualClock(), inline=True)
    await store.start()

    assert store._db.execute("SELECT note FROM meta").get == "filled"
    assert len(await store.load("context")) == 5
    await store.stop()


async def test_a_newer_state_is_left_untouched(tmp_path: Path) -> None:
    await filled(tmp_path)
    newer = ThirdVersion(tmp_path, clock=ManualClock(), inline=True)
    await newer.start()
    await newer.stop()
    before = newer.path.read_bytes()

    with pytest.raises(NewerSchemaError, match="version 3 is newer"):
        await build(tmp_path).start()

    assert newer.path.read_bytes() == before


def test_the_store_is_the_only_one_that_opens_its_file() -> None:
    """Two SQLite libraries in one process must never open the same file."""
    source = Path(sys.modules[SqliteStore.__module__].__file__ or "").parent

    assert [
        path.name
        for path in source.rglob("*.py")
        if "import sqlite3" in path.read_text()
    ] == []
