"""The state directories of every released version start in this one (R-22). The files are never changed."""

import shutil
from pathlib import Path

import pytest

from fakes.clock import ManualClock
from nightdesk.abc import Record
from nightdesk.stores.files import FilesStore
from nightdesk.stores.sqlite import SqliteStore

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = [
    Record(
        "context",
        "iceberg-1",
        b'{"task_id":"iceberg-1","state":"EXECUTING"}',
        "active",
        1,
        1,
    ),
    Record(
        "context", "old", b'{"task_id":"old","state":"COMPLETED"}', "completed", 1, 4
    ),
]


@pytest.mark.parametrize(
    ("golden", "store_class"),
    [("state-schema-1.db", SqliteStore), ("journal-schema-1.log", FilesStore)],
)
async def test_a_state_of_schema_1_starts(
    tmp_path: Path, golden: str, store_class: type[SqliteStore | FilesStore]
) -> None:
    shutil.copy(GOLDEN / golden, tmp_path / store_class.file_name)
    store = store_class(tmp_path, clock=ManualClock(), inline=True)

    await store.start()

    assert await store.load("context") == EXPECTED
    order = await store.get("order", "nd1-1")
    assert order is not None and order.data == bytes(range(256))
    assert await store.get("order", "gone") is None
    assert (store.epoch, store.migrated_from, store.quarantined()) == (2, None, [])
    await store.stop()
