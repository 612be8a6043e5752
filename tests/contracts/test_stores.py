"""One suite for every store: a file of `stores/` is found here by its name, and must keep what it is given."""

import asyncio
import importlib
import inspect
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nightdesk.stores
from fakes.clock import ManualClock
from nightdesk.abc import Batch, Delete, Put, Record, Store

FOLDER = Path(nightdesk.stores.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def store_class(name: str) -> type[Store]:
    module = importlib.import_module(f"nightdesk.stores.{name}")
    (found,) = (
        each
        for each in vars(module).values()
        if inspect.isclass(each)
        and issubclass(each, Store)
        and each.__module__ == module.__name__
    )
    return found


def build(name: str, directory: Path, *, inline: bool = True) -> Store:
    made = store_class(name)
    if "directory" in inspect.signature(made).parameters:
        return made(directory, clock=ManualClock(), inline=inline)  # type: ignore[call-arg]
    return made()


@pytest.fixture(
    params=[(name, inline) for name in NAMES for inline in (True, False)], ids=str
)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    name, inline = request.param
    made = build(name, tmp_path, inline=inline)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture(params=[name for name in NAMES if name != "memory"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    return lambda: build(request.param, tmp_path)


async def test_what_is_saved_comes_back_byte_for_byte(store: Store) -> None:
    data = bytes(range(256)) * 5

    await store.save([Put("order", "a/b c|ä", data)])

    record = await store.get("order", "a/b c|ä")
    assert record is not None
    assert (record.kind, record.key, record.data, record.shelf) == (
        "order",
        "a/b c|ä",
        data,
        "active",
    )
    assert record.epoch == store.epoch >= 1


async def test_a_key_that_was_never_saved_is_none(store: Store) -> None:
    assert await store.get("order", "1") is None
    assert await store.load("order") == []


async def test_an_empty_batch_is_saved_at_once(store: Store) -> None:
    await store.save([])

    assert await store.load("order") == []


async def test_records_of_one_kind_come_in_the_order_they_were_last_written(
    store: Store,
) -> None:
    for key in ("a", "b", "c", "a"):
        await store.save([Put("fill", key, b"1"), Put("order", key, b"2")])

    found = await store.load("fill")

    assert [record.key for record in found] == ["b", "c", "a"]
    assert sorted({record.sequence for record in found}) == [
        record.sequence for record in found
    ]


async def test_a_shelf_holds_what_was_put_there_last(store: Store) -> None:
    await store.save([Put("context", "1", b"{}"), Put("context", "2", b"{}")])
    await store.save(
        [
            Put("context", "1", b'{"a":1}', "completed"),
            Put("context", "3", b"{}", "errored"),
        ]
    )

    assert [record.key for record in await store.load("context", "active")] == ["2"]
    assert [record.data for record in await store.load("context", "completed")] == [
        b'{"a":1}'
    ]
    assert [record.key for record in await store.load("context", "errored")] == ["3"]
    assert len(await store.load("context")) == 3


async def test_a_batch_may_write_and_delete_one_record_and_the_last_word_counts(
    store: Store,
) -> None:
    await store.save(
        [
            Put("a", "1", b"x"),
            Delete("a", "1"),
            Put("a", "2", b"x"),
            Delete("a", "3"),
            Put("a", "2", b"y"),
        ]
    )

    assert [(record.key, record.data) for record in await store.load("a")] == [
        ("2", b"y")
    ]


async def test_a_read_sees_the_saves_that_nobody_awaited(store: Store) -> None:
    store.save([Put("a", "1", b"x")])
    store.save([Put("a", "1", b"y")])

    record = await store.get("a", "1")

    assert record is not None and record.data == b"y"


async def test_many_saves_at_once_are_all_there(store: Store) -> None:
    await asyncio.gather(
        *(store.save([Put("a", str(n), b"x" * n)]) for n in range(300))
    )

    assert [len(record.data) for record in await store.load("a")] == list(range(300))


async def test_stats_tell_epoch_and_state(store: Store) -> None:
    await store.save([Put("a", "1", b"x")])

    assert store.stats()["state"] == "ok"
    assert store.stats()["epoch"] == store.epoch
    assert store.quarantined() == []


async def test_a_restart_finds_everything_and_takes_a_higher_epoch(
    reopen: Callable[[], Store],
) -> None:
    first = reopen()
    await first.start()
    await first.save(
        [
            Put("context", "1", b'{"n":1}'),
            Put("order", "x", b"\x00\xff"),
            Put("order", "y", b""),
        ]
    )
    await first.save([Delete("order", "y")])
    before = [await first.load(kind) for kind in ("context", "order")]
    await first.stop()

    second = reopen()
    await second.start()

    assert [await second.load(kind) for kind in ("context", "order")] == before
    assert second.epoch == first.epoch + 1
    await second.save([Put("order", "z", b"1")])
    newest = await second.get("order", "z")
    assert newest is not None and newest.epoch == second.epoch
    assert newest.sequence > max(record.sequence for kind in before for record in kind)
    await second.stop()


async def test_stopping_twice_or_without_a_start_is_harmless(
    reopen: Callable[[], Store],
) -> None:
    store = reopen()
    await store.stop()
    await store.start()
    await store.stop()
    await store.stop()


names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12)
puts = st.builds(
    Put,
    kind=st.sampled_from(["context", "order", "fill"]),
    key=names,
    data=st.binary(max_size=40),
    shelf=st.sampled_from(["active", "completed", "errored"]),
)
deletes = st.builds(
    Delete, kind=st.sampled_from(["context", "order", "fill"]), key=names
)
batches = st.lists(st.lists(puts | deletes, max_size=5), max_size=12)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "memory"])
@given(batches=batches, restarts=st.sets(st.integers(0, 11), max_size=2))
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_history_reads_like_that_of_the_memory_store(
    name: str,
    batches: list[Batch],
    restarts: set[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp(name)

    async def play() -> None:
        store, model = build(name, directory), build("memory", directory)
        await store.start()
        await model.start()
        for number, batch in enumerate(batches):
            await store.save(batch)
            await model.save(batch)
            if number in restarts:
                await store.stop()
                store = build(name, directory)
                await store.start()
                assert store.quarantined() == []
        for kind in ("context", "order", "fill"):
            assert [_plain(record) for record in await store.load(kind)] == [
                _plain(record) for record in await model.load(kind)
            ]
        await store.stop()

    asyncio.run(play())


def _plain(record: Record) -> tuple[str, str, bytes, str]:
    return record.kind, record.key, record.data, record.shelf
