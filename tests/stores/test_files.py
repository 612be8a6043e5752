"""What only the files store promises: shelves a person can read, behind a journal that is the truth."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from fakes.clock import ManualClock
from nightdesk.abc import Delete, Put, Record
from nightdesk.errors import NewerSchemaError, StateDamagedError, StateNotWritableError
from nightdesk.stores import _journal as log
from nightdesk.stores.files import FilesStore


def build(directory: Path, **options: Any) -> FilesStore:
    return FilesStore(
        directory, clock=ManualClock(), inline=options.pop("inline", True), **options
    )


def context(key: str, text: str = '{"n": 1}', shelf: Any = "active") -> Put:
    return Put("context", key, text.encode(), shelf)


async def restarted(store: FilesStore) -> FilesStore:
    await store.stop()
    again = build(store.directory)
    await again.start()
    return again


def shelves(directory: Path) -> dict[str, list[str]]:
    return {
        shelf: sorted(path.name for path in (directory / shelf).iterdir())
        for shelf in ("active", "completed", "errored")
    }


async def test_contexts_stand_on_the_shelf_of_their_state(tmp_path: Path) -> None:
    store = build(tmp_path)
    await store.start()
    await store.save(
        [
            context("iceberg-1"),
            context("iceberg-2"),
            context("old", '{"n": 9}', "errored"),
        ]
    )
    await store.save(
        [context("iceberg-1", '{"n": 2}', "completed"), Delete("context", "iceberg-2")]
    )

    assert shelves(tmp_path) == {
        "active": [],
        "completed": ["iceberg-1.json"],
        "errored": ["old.json"],
    }
    assert json.loads((tmp_path / "completed" / "iceberg-1.json").read_bytes()) == {
        "n": 2
    }
    metadata = json.loads((tmp_path / "metadata.json").read_bytes())
    assert metadata["tasks"] == {"active": 0, "completed": 1, "errored": 1}
    assert metadata["schema_version"] == 1 and metadata["epoch"] == store.epoch
    await store.stop()


async def test_the_readable_files_follow_within_moments_and_nobody_waits_for_them(
    tmp_path: Path,
) -> None:
    store = build(tmp_path, inline=False)
    await store.start()
    await asyncio.gather(*(store.save([context(f"t{n}")]) for n in range(40)))

    for _ in range(1000):
        if len(list((tmp_path / "active").glob("t*.json"))) == 40:
            break
        await asyncio.sleep(0.01)

    await store.stop()
    assert (
        json.loads((tmp_path / "metadata.json").read_bytes())["tasks"]["active"] == 40
    )


@pytest.mark.parametrize(
    "key", ["a/b", "..", ".hidden", "ä ö", "x" * 400, "CON|?*", "a%2Fb"]
)
async def test_any_task_id_makes_a_file_name_and_comes_back(
    tmp_path: Path, key: str
) -> None:
    store = build(tmp_path)
    await store.start()
    await store.save([context(key)])

    assert len(shelves(tmp_path)["active"]) == 1
    store = await restarted(store)
    assert [record.key for record in await store.load("context")] == [key]
    assert store.quarantined() == []
    await store.stop()


async def test_a_damaged_file_is_moved_to_errored_with_its_bytes_and_every_context_loads(
    tmp_path: Path,
) -> None:
    store = build(tmp_path)
    await store.start()
    await store.save([context("1"), context("2")])
    await store.stop()
    (tmp_path / "active" / "1.json").write_bytes(b'{"n": 1')

    store = build(tmp_path)
    await store.start()

    assert [record.data for record in await store.load("context")] == [
        b'{"n": 1}',
        b'{"n": 1}',
    ]
    assert store.quarantined() == [
        ("context", "1", "its file was damaged; the bytes are in errored/1.damaged-1")
    ]
    assert (tmp_path / "errored" / "1.damaged-1").read_bytes() == b'{"n": 1'
    assert (tmp_path / "active" / "1.json").read_bytes() == b'{"n": 1}'
    await store.stop()
    (tmp_path / "active" / "1.json").write_bytes(b"\xff")
    store = build(tmp_path)
    await store.start()
    assert (tmp_path / "errored" / "1.damaged-2").exists()
    await store.stop()


async def test_an_edited_file_is_written_again_from_the_journal(tmp_path: Path) -> None:
    """A task's memory is changed by commands, not by an editor: the journal cannot see half an edit."""
    store = build(tmp_path)
    await store.start()
    await store.save([context("1")])
    (tmp_path / "active" / "1.json").write_bytes(b'{"n": 777}')
    (tmp_path / "completed" / "1.json").write_bytes(b'{"n": 778}')

    store = await restarted(store)

    assert [record.data for record in await store.load("context")] == [b'{"n": 1}']
    assert (tmp_path / "active" / "1.json").read_bytes() == b'{"n": 1}'
    assert shelves(tmp_path)["completed"] == []
    await store.stop()


async def test_files_brought_over_from_another_program_are_taken_in(
    tmp_path: Path,
) -> None:
    """Design 001's folder becomes a state directory by being one."""
    (tmp_path / "active").mkdir()
    (tmp_path / "completed").mkdir()
    (tmp_path / "active" / "iceberg_1.json").write_text(
        '{"task_id": "iceberg_1", "state": 2}'
    )
    (tmp_path / "completed" / "iceberg_0.json").write_text(
        '{"task_id": "iceberg_0", "state": 100}'
    )
    (tmp_path / "active" / "broken.json").write_text("{")
    (tmp_path / "metadata.json").write_text("{}")

    store = build(tmp_path)
    await store.start()

    assert [(record.key, record.shelf) for record in await store.load("context")] == [
        ("iceberg_1", "active"),
        ("iceberg_0", "completed"),
    ]
    assert [key for _, key, _ in store.quarantined()] == ["broken"]
    store = await restarted(store)
    assert len(await store.load("context")) == 2 and store.quarantined() == []
    await store.stop()


async def test_a_task_deleted_just_before_a_crash_does_not_rise_again(
    tmp_path: Path,
) -> None:
    store = build(tmp_path)
    await store.start()
    await store.save([context("1"), context("2")])
    await store.save([Delete("context", "1")])
    await store.stop()
    (tmp_path / "active" / "1.json").write_bytes(
        b'{"n": 1}'
    )  # the file was not yet removed

    store = build(tmp_path)
    await store.start()

    assert [record.key for record in await store.load("context")] == ["2"]
    assert shelves(tmp_path)["active"] == ["2.json"]
    await store.stop()


async def test_an_unfinished_commit_is_cut_off_kept_and_told(tmp_path: Path) -> None:
    store = build(tmp_path)
    await store.start()
    await store.save([context("1")])
    await store.stop()
    whole = store.path.read_bytes()
    torn = log.encode_frame(99, log.Frame(1, 1, 9, remark="x" * 50))[:-7]
    store.path.write_bytes(whole + torn)

    store = build(tmp_path)
    await store.start()

    assert [record.key for record in await store.load("context")] == ["1"]
    ((kind, _, reason),) = store.quarantined()
    assert kind == "journal" and str(len(torn)) in reason
    assert (tmp_path / "errored" / "journal-tail-1").read_bytes() == torn
    assert store.path.read_bytes().startswith(whole)
    await store.stop()


async def test_a_damaged_commit_with_acknowledged_ones_behind_it_is_refused(
    tmp_path: Path,
) -> None:
    """R-16: skipping it in silence would be a guess."""
    store = build(tmp_path)
    await store.start()
    for n in range(5):
        await store.save([Put("order", str(n), b"x" * 50)])
    await store.stop()
    content = bytearray(store.path.read_bytes())
    content[len(content) // 2] ^= 1
    store.path.write_bytes(bytes(content))

    with pytest.raises(StateDamagedError, match="acknowledged ones follow"):
        await build(tmp_path).start()

    assert store.path.read_bytes() == bytes(content)


async def test_a_journal_cut_at_the_end_of_a_commit_is_refused(tmp_path: Path) -> None:
    store = build(tmp_path)
    await store.start()
    await store.save([Put("order", "1", b"x")])
    size = store._log.size
    await store.save([Put("order", "2", b"x")])
    await store.stop()
    store.path.write_bytes(store.path.read_bytes()[:size])

    with pytest.raises(
        StateDamagedError, match="ends at record 1, but 2 records were acknowledged"
    ):
        await build(tmp_path).start()


async def test_a_journal_that_grew_is_written_anew_without_what_is_gone(
    tmp_path: Path,
) -> None:
    class Small(FilesStore):
        compact_bytes = 20_000

    store = Small(tmp_path, clock=ManualClock(), inline=True)
    await store.start()
    for n in range(100):
        await store.save(
            [
                Put("order", str(n % 3), b"x" * 1000),
                context(f"t{n % 2}", f'{{"n": {n}}}'),
            ]
        )
    await store.save([Delete("order", "0")])
    assert store.path.stat().st_size < 60_000

    again = await restarted(store)

    assert [record.key for record in await again.load("order")] == ["1", "2"] or len(
        await again.load("order")
    ) == 2
    assert [record.data for record in await again.load("context")] == [
        b'{"n": 98}',
        b'{"n": 99}',
    ]
    assert (await again.load("order"))[-1].sequence < again.sequence
    await again.stop()


async def test_a_write_that_fails_for_another_reason_than_space_is_final(
    tmp_path: Path,
) -> None:
    store = build(tmp_path)
    await store.start()
    await store.save([Put("order", "1", b"x")])
    os.close(store._log._fd)

    with pytest.raises(StateNotWritableError, match="a commit failed"):
        await store.save([Put("order", "2", b"x")])
    assert store.state == "failed"

    store._log._fd = os.open(store.path, os.O_RDWR)
    await store.stop()


def prefix_orders(records: list[Record]) -> list[Record]:
    return [
        msgspec.structs.replace(record, data=b"v2:" + record.data)
        if record.kind == "order"
        else record
        for record in records
    ]


class NextVersion(FilesStore):
    """A later program, in which every order has a prefix."""

    schema_version = 2
    migrations: ClassVar = {1: prefix_orders}


async def test_an_older_journal_is_brought_forward_after_a_backup_and_a_newer_one_is_refused(
    tmp_path: Path,
) -> None:
    store = build(tmp_path)
    await store.start()
    await store.save([Put("order", "1", b"x"), context("c")])
    await store.stop()
    before = store.path.read_bytes()

    newer = NextVersion(tmp_path, clock=ManualClock(), inline=True)
    await newer.start()

    assert [record.data for record in await newer.load("order")] == [b"v2:x"]
    assert newer.migrated_from == 1
    assert (tmp_path / "before-schema-2-was-1.log").read_bytes() == before
    await newer.stop()
    with pytest.raises(NewerSchemaError):
        await build(tmp_path).start()
    newer = NextVersion(tmp_path, clock=ManualClock(), inline=True)
    await newer.start()
    assert [record.data for record in await newer.load("order")] == [b"v2:x"]
    assert newer.migrated_from is None
    await newer.stop()


def test_a_frame_that_lies_about_its_body_is_bad() -> None:
    body = b"\x93\x01\x02"
    head = log._HEAD.pack(b"NDJ\x01", len(body), 0, log._checksum(0, body))

    assert log.replay(head + body, "journal.log").torn_bytes == len(head + body)


async def test_a_refused_start_reports_nothing_but_its_reason(tmp_path: Path) -> None:
    """A failure told beside it would read as if the disk could not be written."""
    store = build(tmp_path, inline=False)
    await store.start()
    await store.save([context("iceberg-1")])
    await store.stop()
    path = tmp_path / "journal.log"
    path.write_bytes(path.read_bytes()[:40])
    told: list[Exception] = []
    again = build(tmp_path, inline=False, on_failure=told.append)

    with pytest.raises(StateDamagedError):
        await again.start()
    await asyncio.sleep(0)

    assert told == []
