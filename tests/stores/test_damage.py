"""F28: no byte of a state file can change or vanish and give a wrong value in silence."""

import asyncio
import operator
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from fakes.clock import ManualClock
from nightdesk.abc import Put, Record
from nightdesk.errors import NightdeskError
from nightdesk.stores._directory import DirectoryStore
from nightdesk.stores.files import FilesStore
from nightdesk.stores.sqlite import SqliteStore

BATCHES = [
    [
        Put("context", "iceberg-1", b'{"state": "EXECUTING", "filled": "0.10"}'),
        Put("order", "o1", b"NEW"),
    ],
    [Put("order", "o1", b"FILLED"), Put("fill", "f1", b"\x01\x02\x03" * 9)],
    [
        Put(
            "context",
            "iceberg-1",
            b'{"state": "COMPLETED", "filled": "0.50"}',
            "completed",
        )
    ],
]
EXPECTED = {
    ("context", "iceberg-1"): b'{"state": "COMPLETED", "filled": "0.50"}',
    ("order", "o1"): b"FILLED",
    ("fill", "f1"): b"\x01\x02\x03" * 9,
}

StoreClass = type[SqliteStore | FilesStore]


async def _write(directory: Path, store_class: StoreClass, copy: Path | None) -> None:
    store = store_class(directory, clock=ManualClock(), inline=True)
    await store.start()
    for batch in BATCHES:
        await store.save(batch)
    if copy is not None:  # as a kill -9 leaves it
        shutil.copytree(directory, copy)
    await store.stop()


def stopped(directory: Path, store_class: StoreClass) -> Path:
    asyncio.run(_write(directory, store_class, None))
    return directory


def killed(directory: Path, store_class: StoreClass) -> Path:
    copy = directory.with_name("killed")
    asyncio.run(_write(directory, store_class, copy))
    return copy


async def _read(
    store: DirectoryStore,
) -> tuple[dict[tuple[str, str], Record], list[tuple[str, str, str]]]:
    await store.start()
    try:
        found = [
            record
            for kind in ("context", "order", "fill")
            for record in await store.load(kind)
        ]
        return {
            (record.kind, record.key): record for record in found
        }, store.quarantined()
    finally:
        await store.stop()


def verdict(directory: Path, store_class: StoreClass) -> str:
    """Return how a start on `directory` ends: refused, quarantined or whole. A wrong value fails the test."""
    store = store_class(directory, clock=ManualClock(), inline=True)
    try:
        found, quarantined = asyncio.run(_read(store))
    except NightdeskError as error:
        assert "\n" not in str(error)
        return "refused"
    for name, record in found.items():
        assert EXPECTED.get(name) == record.data, name
    missing = EXPECTED.keys() - found.keys()
    assert len(missing) <= len(quarantined), missing
    return "quarantined" if missing else "whole"


def damaged_copies(
    original: Path, work: Path, name: str, damage: Callable[[bytes], bytes]
) -> Path:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(original, work)
    target = work / name
    target.write_bytes(damage(target.read_bytes()))
    return work


Damage = Callable[[bytes], bytes]


def flips(content: bytes, step: int) -> Iterator[Damage]:
    """One bit."""
    chance = random.Random(len(content))
    for position in range(step // 2, len(content), step):
        changed = bytes([content[position] ^ 1 << chance.randrange(8)])
        yield partial(replaced, start=position, by=changed)


def cuts(content: bytes, step: int) -> Iterator[Damage]:
    """Everything behind some byte is gone."""
    for length in range(0, len(content), step):
        yield operator.itemgetter(slice(length))


def holes(content: bytes, step: int) -> Iterator[Damage]:
    """A sector that reads as zeros."""
    for start in range(0, len(content), step):
        yield partial(
            replaced, start=start, by=bytes(len(content[start : start + 512]))
        )


def replaced(data: bytes, start: int, by: bytes) -> bytes:
    return data[:start] + by + data[start + len(by) :]


CASES = [
    (stopped, SqliteStore, "state.db"),
    (killed, SqliteStore, "state.db"),
    (killed, SqliteStore, "state.db-wal"),
    (stopped, FilesStore, "journal.log"),
    (killed, FilesStore, "journal.log"),
    (stopped, FilesStore, "completed/iceberg-1.json"),
    (stopped, FilesStore, "metadata.json"),
    (stopped, SqliteStore, "high_water"),
    (stopped, FilesStore, "high_water"),
]
# On memory where there is some: these tests open thousands of small states.
MEMORY = Path("/dev/shm")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    chosen = MEMORY / f"nightdesk-damage-{os.getpid()}"
    chosen.mkdir()
    yield chosen
    shutil.rmtree(chosen)


def sweep(
    place: Path,
    case: tuple[Callable[[Path, StoreClass], Path], StoreClass, str],
    most: int,
) -> dict[str, int]:
    make, store_class, name = case
    original = make(place / "original", store_class)
    content = (original / name).read_bytes()
    assert (
        verdict(damaged_copies(original, place / "work", name, bytes), store_class)
        == "whole"
    )
    results = {"whole": 0, "quarantined": 0, "refused": 0}
    step = max(1, len(content) // most)
    for way, width in ((flips, step), (cuts, step), (holes, max(step, 256))):
        for damage in way(content, width):
            results[
                verdict(
                    damaged_copies(original, place / "work", name, damage), store_class
                )
            ] += 1
    return results


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0].__name__}-{case[2]}"
)
def test_a_changed_or_missing_byte_never_gives_a_wrong_value(
    place: Path, case: tuple[Callable[[Path, StoreClass], Path], StoreClass, str]
) -> None:
    results = sweep(place, case, 60)

    if case[2] in ("state.db-wal", "journal.log"):
        assert results["refused"] > 0


@pytest.mark.slow
@pytest.mark.skipif(
    "NIGHTDESK_EVERY_BYTE" not in os.environ,
    reason="set NIGHTDESK_EVERY_BYTE=1: takes minutes",
)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0].__name__}-{case[2]}"
)
def test_every_single_byte_changed_or_missing_never_gives_a_wrong_value(
    place: Path, case: tuple[Callable[[Path, StoreClass], Path], StoreClass, str]
) -> None:
    results = sweep(place, case, 10**9)

    print(case[0].__name__, case[2], results)


def test_a_damaged_write_ahead_log_is_left_as_it_was_found(tmp_path: Path) -> None:
    """An expert may still save what lies behind the damage; closing the database must not tidy it away."""
    directory = killed(tmp_path / "original", SqliteStore)
    wal = directory / "state.db-wal"
    content = bytearray(wal.read_bytes())
    content[len(content) // 2] ^= 4
    wal.write_bytes(content)
    before = (directory / "state.db").read_bytes()

    assert verdict(directory, SqliteStore) == "refused"

    assert wal.read_bytes() == bytes(content)
    assert (directory / "state.db").read_bytes() == before
