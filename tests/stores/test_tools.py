"""inspect, export, backup, restore, migrate: they tell the truth, and a kill leaves one whole state."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import apsw
import pytest

from fakes.clock import ManualClock
from nightdesk.abc import Put
from nightdesk.errors import (
    CommandError,
    NewerSchemaError,
    StateDamagedError,
    StateLockedError,
)
from nightdesk.stores import _restore, _tools
from nightdesk.stores._directory import DirectoryStore
from nightdesk.stores._lock import DirectoryLock
from nightdesk.stores.files import FilesStore
from nightdesk.stores.sqlite import SqliteStore

StoreClass = type[SqliteStore | FilesStore]


@pytest.fixture(params=[SqliteStore, FilesStore])
def store_class(request: pytest.FixtureRequest) -> StoreClass:
    chosen: StoreClass = request.param
    return chosen


def build(store_class: StoreClass, directory: Path) -> DirectoryStore:
    return store_class(directory, clock=ManualClock(), inline=True)


async def filled(store_class: StoreClass, directory: Path, value: str = "1") -> Path:
    store = build(store_class, directory)
    await store.start()
    await store.save(
        [
            Put("context", "a", b'{"n": %s}' % value.encode()),
            Put("context", "b", b'{"n": 2}', "completed"),
            Put("order", "raw", b"\xff\x00"),
        ]
    )
    await store.stop()
    return directory


async def value_of(store_class: StoreClass, directory: Path) -> Any:
    store = build(store_class, directory)
    await store.start()
    record = await store.get("context", "a")
    await store.stop()
    return record and json.loads(record.data)["n"]


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


async def test_inspect_tells_what_is_there_and_changes_nothing(
    store_class: StoreClass, tmp_path: Path
) -> None:
    directory = await filled(store_class, tmp_path)
    before = tree(directory)

    facts = _tools.inspect(directory)

    assert facts["records"] == {
        "context": {"active": 1, "completed": 1},
        "order": {"active": 1},
    }
    assert (facts["store"], facts["schema_version"], facts["integrity"]) == (
        "sqlite" if store_class is SqliteStore else "files",
        1,
        "ok",
    )
    assert (facts["epoch"], facts["sequence"], facts["acknowledged_sequence"]) == (
        1,
        3,
        3,
    )
    assert (facts["locked"], facts["owner"]) == (False, None)
    json.dumps(facts)
    assert {
        name: data for name, data in tree(directory).items() if name in before
    } == before


async def test_inspect_names_the_owner_of_a_running_desk(
    store_class: StoreClass, tmp_path: Path
) -> None:
    store = build(store_class, tmp_path)
    await store.start()

    facts = _tools.inspect(tmp_path)

    assert facts["locked"] and facts["owner"]["epoch"] == store.epoch
    await store.stop()


async def test_inspect_tells_damage_instead_of_failing(
    store_class: StoreClass, tmp_path: Path
) -> None:
    directory = await filled(store_class, tmp_path)
    path = directory / store_class.file_name
    path.write_bytes(path.read_bytes().replace(b'{"n": 2}', b'{"n": 3}'))

    facts = _tools.inspect(directory)

    assert facts["integrity"] != "ok"
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 8000)
    assert _tools.inspect(directory)["integrity"] != "ok"


async def test_export_says_every_record_in_json(
    store_class: StoreClass, tmp_path: Path
) -> None:
    lines = list(_tools.export(await filled(store_class, tmp_path)))

    assert [json.loads(json.dumps(line)) for line in lines] == [
        {
            "kind": "context",
            "key": "a",
            "shelf": "active",
            "epoch": 1,
            "sequence": 1,
            "data": {"n": 1},
        },
        {
            "kind": "context",
            "key": "b",
            "shelf": "completed",
            "epoch": 1,
            "sequence": 2,
            "data": {"n": 2},
        },
        {
            "kind": "order",
            "key": "raw",
            "shelf": "active",
            "epoch": 1,
            "sequence": 3,
            "data_base64": "/wA=",
        },
    ]


async def test_export_names_a_damaged_record(tmp_path: Path) -> None:
    directory = await filled(SqliteStore, tmp_path)
    path = directory / "state.db"
    path.write_bytes(path.read_bytes().replace(b'{"n": 2}', b'{"n": 3}'))

    lines = list(_tools.export(directory))

    assert len(lines) == 3
    assert lines[-1] == {
        "kind": "context",
        "key": "b",
        "damaged": "its checksum does not fit its content",
    }


def test_a_directory_without_state_is_told(tmp_path: Path) -> None:
    for tool in (
        _tools.inspect,
        lambda path: list(_tools.export(path)),
        lambda path: _tools.backup(path, path / "x"),
    ):
        with pytest.raises(CommandError, match="holds no state"):
            tool(tmp_path)


async def test_a_backup_of_a_running_desk_is_whole_and_comes_back(
    store_class: StoreClass, tmp_path: Path
) -> None:
    store = build(store_class, tmp_path / "state")
    await store.start()
    await store.save([Put("context", "a", b'{"n": 1}')])

    facts = _tools.backup(tmp_path / "state", tmp_path / "backup")
    await store.save([Put("context", "a", b'{"n": 2}'), Put("context", "z", b"{}")])
    await store.stop()
    result = _tools.restore(tmp_path / "backup", tmp_path / "state", ManualClock())

    assert facts["integrity"] == "ok" and facts["records"] == {"context": {"active": 1}}
    assert len(facts["sha256"]) == 64
    assert (tmp_path / "backup").stat().st_mode & 0o077 == 0
    assert await value_of(store_class, tmp_path / "state") == 1
    kept = Path(result["kept"])
    assert kept.name.startswith("before-restore-2023")
    assert (kept / store_class.file_name).exists()


async def test_the_epoch_never_goes_back_by_a_restore(
    store_class: StoreClass, tmp_path: Path
) -> None:
    """A desk that still runs on the replaced state must not look newer than the one that follows."""
    directory = await filled(store_class, tmp_path / "state")
    _tools.backup(directory, tmp_path / "backup")
    for value in "234":
        await filled(store_class, directory, value)

    _tools.restore(tmp_path / "backup", directory, ManualClock())
    store = build(store_class, directory)
    await store.start()

    assert store.epoch == 5
    assert len(await store.load("context")) == 2
    await store.stop()


async def test_a_restore_into_an_empty_directory_is_a_move(
    store_class: StoreClass, tmp_path: Path
) -> None:
    _tools.backup(await filled(store_class, tmp_path / "state"), tmp_path / "backup")

    result = _tools.restore(tmp_path / "backup", tmp_path / "elsewhere", ManualClock())

    assert result["kept"] is None
    assert await value_of(store_class, tmp_path / "elsewhere") == 1


async def test_a_backup_never_replaces_another(
    store_class: StoreClass, tmp_path: Path
) -> None:
    directory = await filled(store_class, tmp_path / "state")
    (tmp_path / "backup").write_text("precious")

    with pytest.raises(CommandError, match="exists"):
        _tools.backup(directory, tmp_path / "backup")

    assert (tmp_path / "backup").read_text() == "precious"


async def test_damaged_state_is_not_called_a_backup(tmp_path: Path) -> None:
    directory = await filled(SqliteStore, tmp_path / "state")
    path = directory / "state.db"
    path.write_bytes(path.read_bytes().replace(b'{"n": 2}', b'{"n": 3}'))

    with pytest.raises(StateDamagedError, match="checksum"):
        _tools.backup(directory, tmp_path / "backup")

    assert not (tmp_path / "backup").exists()


@pytest.mark.parametrize(
    "content", [b"", b"something else", b"SQLite format 3\0" + b"\1" * 5000]
)
async def test_what_is_no_backup_is_refused_and_nothing_changes(
    store_class: StoreClass, tmp_path: Path, content: bytes
) -> None:
    directory = await filled(store_class, tmp_path / "state")
    (tmp_path / "backup").write_bytes(content)
    before = tree(directory)

    with pytest.raises(StateDamagedError):
        _tools.restore(tmp_path / "backup", directory, ManualClock())
    with pytest.raises(CommandError):
        _tools.restore(tmp_path / "missing", directory, ManualClock())

    assert tree(directory) == before


async def test_restore_and_migrate_refuse_a_running_desk(
    store_class: StoreClass, tmp_path: Path
) -> None:
    directory = await filled(store_class, tmp_path / "state")
    _tools.backup(directory, tmp_path / "backup")
    lock = DirectoryLock(directory, ManualClock())
    lock.acquire()

    with pytest.raises(StateLockedError):
        _tools.restore(tmp_path / "backup", directory, ManualClock())
    with pytest.raises(StateLockedError):
        await asyncio.to_thread(_tools.migrate, directory, ManualClock())

    lock.release()


async def test_migrate_says_that_nothing_had_to_change(
    store_class: StoreClass, tmp_path: Path
) -> None:
    directory = await filled(store_class, tmp_path)

    facts = await asyncio.to_thread(_tools.migrate, directory, ManualClock())

    assert (facts["from"], facts["to"], facts["changed"]) == (1, 1, False)


async def test_a_newer_state_is_inspected_but_not_migrated(tmp_path: Path) -> None:
    directory = await filled(SqliteStore, tmp_path)
    connection = apsw.Connection(str(directory / "state.db"))
    connection.pragma("user_version", 9)
    connection.close()

    assert "version 9 is newer" in _tools.inspect(directory)["integrity"]
    with pytest.raises(NewerSchemaError):
        await asyncio.to_thread(_tools.migrate, directory, ManualClock())


BUSY_DESK = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from nightdesk.abc import Put
    from nightdesk.kernel.clock import SystemClock
    from nightdesk.stores.files import FilesStore
    from nightdesk.stores.sqlite import SqliteStore

    async def main():
        store = {"SqliteStore": SqliteStore, "FilesStore": FilesStore}[sys.argv[2]](Path(sys.argv[1]), clock=SystemClock())
        await store.start()
        n = 0
        while True:
            n += 1
            await store.save([Put("context", f"{part}{n % 100}", b"%d" % n) for part in "ab"])
            print(n, flush=True)

    asyncio.run(main())
    """
)


@pytest.mark.process
def test_a_backup_beside_a_busy_desk_in_another_process_holds_whole_batches(
    store_class: StoreClass, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-c",
        BUSY_DESK,
        str(tmp_path / "state"),
        store_class.__name__,
    ]
    desk = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert desk.stdout is not None
    for _ in range(20):
        acknowledged = int(desk.stdout.readline())
    try:
        facts = [
            _tools.backup(tmp_path / "state", tmp_path / f"backup-{n}")
            for n in range(3)
        ]
        assert _tools.inspect(tmp_path / "state")["locked"]
        assert desk.poll() is None
    finally:
        desk.kill()
        desk.wait()
        desk.stdout.close()
    _tools.restore(tmp_path / "backup-2", tmp_path / "restored", ManualClock())

    assert [each["integrity"] for each in facts] == ["ok"] * 3
    values = {
        line["key"]: line["data"] for line in _tools.export(tmp_path / "restored")
    }
    assert max(values.values()) >= acknowledged
    assert all(values[f"a{key[1:]}"] == values[f"b{key[1:]}"] for key in values)


def restore_and_die(backup: Path, directory: Path, step: int) -> bool:
    """Restore in a child that is killed before its change number `step` of the file system; return whether it was."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            creates = event == "open" and arguments[2] & os.O_CREAT
            if creates or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        _tools.restore(backup, directory, ManualClock())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.process
def test_a_restore_killed_anywhere_leaves_the_old_or_the_new_state(
    store_class: StoreClass, tmp_path: Path
) -> None:
    backup = tmp_path / "backup"
    _tools.backup(asyncio.run(filled(store_class, tmp_path / "first", "1")), backup)
    outcomes = []
    step = 0
    killed = True
    while killed:
        directory = asyncio.run(filled(store_class, tmp_path / f"state-{step}", "7"))
        killed = restore_and_die(backup, directory, step)
        outcomes.append(asyncio.run(value_of(store_class, directory)))
        assert not (directory / _restore.PENDING).exists()
        step += 1

    assert set(outcomes) == {7, 1}
    assert outcomes == sorted(outcomes, reverse=True)
    assert len(outcomes) > 8
