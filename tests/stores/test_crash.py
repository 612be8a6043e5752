"""F1 and F2: after a kill or a power cut every awaited save is there, and every batch is whole or absent."""

import asyncio
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fakes.clock import ManualClock
from fakes.disk import Event, MemoryOfDisk, crash_state
from nightdesk.abc import Batch, Delete, Put
from nightdesk.errors import StateDamagedError
from nightdesk.stores import _journal as log
from nightdesk.stores._directory import DirectoryStore
from nightdesk.stores.files import FilesStore
from nightdesk.stores.sqlite import SqliteStore

State = dict[tuple[str, str], bytes]


def history(seed: int, length: int) -> list[Batch]:
    """Batches that write some keys again and again, now and then delete one, and differ in size."""
    chance = random.Random(seed)
    batches: list[Batch] = []
    for number in range(length):
        batch: list[Put | Delete] = [Put("counter", "n", str(number).encode())]
        for _ in range(chance.randrange(4)):
            key = f"k{chance.randrange(6)}"
            if chance.random() < 0.2:
                batch.append(Delete("order", key))
            else:
                batch.append(
                    Put(
                        "order",
                        key,
                        bytes([number % 256]) * chance.choice((3, 700, 5000)),
                    )
                )
        batches.append(batch)
    return batches


def states(batches: list[Batch]) -> list[State]:
    """What the records are after none, one, two ... of `batches`."""
    current: State = {}
    found = [dict(current)]
    for batch in batches:
        for operation in batch:
            if isinstance(operation, Put):
                current[operation.kind, operation.key] = operation.data
            else:
                current.pop((operation.kind, operation.key), None)
        found.append(dict(current))
    return found


async def read(store: DirectoryStore) -> State:
    await store.start()
    try:
        return {
            (record.kind, record.key): record.data
            for kind in ("counter", "order")
            for record in await store.load(kind)
        }
    finally:
        await store.stop()


def number_of(state: State) -> int:
    return int(state.get(("counter", "n"), b"-1")) + 1


# --- power cuts ----------------------------------------------------------------------------------


async def _recorded(
    directory: Path, batches: list[Batch]
) -> tuple[list[Event], list[bytes]]:
    disk = MemoryOfDisk()
    marks: list[bytes] = []
    store = SqliteStore(directory, clock=ManualClock(), inline=True, vfs=disk.name)
    await store.start()
    disk.events.append(Event("ack"))
    for number, batch in enumerate(batches):
        await store.save(batch)
        disk.events.append(Event("ack"))
        marks.append((directory / "high_water").read_bytes())
        if number % 7 == 3:
            store._db.wal_checkpoint()
    events = list(disk.events)
    await store.stop()
    return events, marks


@pytest.mark.parametrize(
    "points",
    [250, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_sqlite_after_a_power_cut_holds_what_was_acknowledged(
    tmp_path: Path, points: int
) -> None:
    if points > 1000 and "NIGHTDESK_EVERY_BYTE" not in os.environ:
        pytest.skip("set NIGHTDESK_EVERY_BYTE=1: takes minutes")
    batches = history(1, 25)
    expected = states(batches)
    events, marks = asyncio.run(_recorded(tmp_path / "recorded", batches))
    first = next(number for number, event in enumerate(events) if event.what == "ack")
    chance = random.Random(2)

    for point in range(points):
        cut = chance.randrange(first + 1, len(events) + 1)
        acknowledged = sum(event.what == "ack" for event in events[:cut]) - 1
        directory = tmp_path / str(point)
        directory.mkdir(mode=0o700)
        for name, content in crash_state(events[:cut], chance).items():
            (directory / name).write_bytes(content)
        if (
            acknowledged and chance.random() < 0.7
        ):  # the mark is not synced: an old one, or none, may be left
            (directory / "high_water").write_bytes(
                marks[chance.randrange(acknowledged)]
            )

        found = asyncio.run(
            read(SqliteStore(directory, clock=ManualClock(), inline=True))
        )

        number = number_of(found)
        assert number in (acknowledged, acknowledged + 1)
        assert found == expected[number]
        for path in directory.iterdir():
            path.unlink()


def test_the_journal_after_a_power_cut_holds_what_was_acknowledged() -> None:
    """The last frame is the only one that may be unsynced: any sectors of it may be missing or torn."""
    batches = history(3, 40)
    expected = states(batches)
    chance = random.Random(4)
    data, sequence = b"", 0
    for number, batch in enumerate(batches):
        frame = log.Frame(
            1, 1, sequence + len(batch), log.entries_of(list(batch), 1, sequence)
        )
        sequence += len(batch)
        written = log.encode_frame(number, frame)
        for _ in range(20):
            torn = bytearray(written[: chance.randrange(len(written) + 1)])
            for start in range(0, len(torn), 512):
                if chance.random() < 0.3:
                    torn[start : start + 512] = bytes(len(torn[start : start + 512]))

            found = log.replay(data + torn, "journal.log")

            state = {name: record.data for name, record in found.records.items()}
            assert state == expected[number + (bytes(torn) == written)]
        data += written


def test_a_journal_of_64_kilobytes_cut_or_changed_anywhere_is_a_beginning_or_refused() -> (
    None
):
    batches = history(5, 40)
    expected = states(batches)
    data, sequence = b"", 0
    for number, batch in enumerate(batches):
        frame = log.Frame(
            1, 1, sequence + len(batch), log.entries_of(list(batch), 1, sequence)
        )
        data += log.encode_frame(number, frame)
        sequence += len(batch)
    last = data.rindex(b"NDJ\x01")
    assert len(data) >= 65_536
    step = 1 if "NIGHTDESK_EVERY_BYTE" in os.environ else 97

    for position in range(0, len(data), step):
        cut = log.replay(data[:position], "journal.log")
        assert {name: record.data for name, record in cut.records.items()} == expected[
            cut.frames
        ]

        changed = data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :]
        try:
            after = log.replay(changed, "journal.log")
        except StateDamagedError:
            assert position < last
        else:
            assert position >= last and after.frames == len(batches) - 1


# --- kills ---------------------------------------------------------------------------------------

WRITER = textwrap.dedent(
    """
    import asyncio, importlib, sys
    from pathlib import Path
    from nightdesk.abc import Put
    from nightdesk.kernel.clock import SystemClock

    async def main():
        module, name = sys.argv[2].split(":")
        store = getattr(importlib.import_module(module), name)(Path(sys.argv[1]), clock=SystemClock())
        await store.start()

        async def task(key):
            n = 0
            while True:
                n += 1
                data = b"%d" % n
                await store.save([Put("context", f"{key}-{part}", data) for part in "ab"])
                sys.stdout.write(f"{key} {n}\\n")
                sys.stdout.flush()

        await asyncio.gather(*(task(str(n)) for n in range(8)))

    asyncio.run(main())
    """
)


@pytest.mark.process
@pytest.mark.parametrize("store_class", [SqliteStore, FilesStore])
def test_a_killed_process_leaves_every_awaited_save_and_only_whole_batches(
    tmp_path: Path, store_class: type[SqliteStore | FilesStore]
) -> None:
    chance = random.Random(6)
    name = f"{store_class.__module__}:{store_class.__name__}"
    for round_number in range(4):
        directory = tmp_path / str(round_number)
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(directory), name],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(chance.randrange(1, 400))]
        process.kill()
        lines += process.stdout.read().splitlines()
        process.wait()
        process.stdout.close()
        acknowledged: dict[str, int] = {}
        for line in lines:
            if len(line.split()) == 2:
                key, number = line.split()
                acknowledged[key] = int(number)

        found = asyncio.run(
            contexts(store_class(directory, clock=ManualClock(), inline=True))
        )

        for key, least in acknowledged.items():
            assert found[f"{key}-a"] == found[f"{key}-b"]
            assert found[f"{key}-a"] >= least


async def contexts(store: DirectoryStore) -> dict[str, int]:
    await store.start()
    try:
        return {record.key: int(record.data) for record in await store.load("context")}
    finally:
        await store.stop()
