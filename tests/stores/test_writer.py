"""Group commit: order, waking, back-pressure, and what happens when a commit fails (F3, F4)."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from fakes.clock import ManualClock
from nightdesk.abc import Delete, Put
from nightdesk.errors import CapacityError, StateNotWritableError
from nightdesk.stores._writer import DiskFull, GroupWriter, Operations, WriterState


class ScriptedKeeper:
    """Commits into a list. `trouble` is raised while it is set; `gate` holds the next commit back."""

    def __init__(self) -> None:
        self.groups: list[Operations] = []
        self.trouble: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.rests: list[bool] = []
        self.more = 0

    def commit(self, operations: Operations) -> None:
        assert self.gate.wait(10)
        if self.trouble is not None:
            raise self.trouble
        self.groups.append(operations)

    def rest(self, *, busy: bool) -> bool:
        self.rests.append(busy)
        self.more -= 1
        return self.more >= 0


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came")


class Desk:
    """A writer with what it reported."""

    def __init__(self, *, inline: bool = False, queue_bytes: int = 1_000_000) -> None:
        self.keeper = ScriptedKeeper()
        self.changes: list[tuple[WriterState, str]] = []
        self.writer = GroupWriter(
            self.keeper,
            path="state.db",
            clock=ManualClock(),
            inline=inline,
            queue_bytes=queue_bytes,
            on_change=lambda state, error: self.changes.append((state, str(error))),
        )
        self.writer.start()

    def save(self, key: str, *, size: int = 200) -> "asyncio.Future[None]":
        return asyncio.ensure_future(self.writer.save((Put("a", key, b"x"),), size))

    def saved(self) -> list[list[str]]:
        return [[operation.key for operation in group] for group in self.keeper.groups]

    async def stop_from_another_loop(self) -> None:
        self.writer._loop = asyncio.get_running_loop()
        await self.stop()

    async def stop(self) -> None:
        self.keeper.gate.set()
        await self.writer.stop(lambda: None)


async def test_what_gathers_during_a_commit_is_committed_together() -> None:
    desk = Desk()
    desk.keeper.gate.clear()
    first = desk.save("first")
    await asyncio.to_thread(lambda: None)
    later = [desk.save(str(n)) for n in range(50)]

    desk.keeper.gate.set()
    await asyncio.gather(first, *later)

    assert sum(len(group) for group in desk.keeper.groups) == 51
    assert len(desk.keeper.groups) <= 3
    assert [key for group in desk.saved() for key in group] == [
        "first",
        *map(str, range(50)),
    ]
    await desk.stop()


async def test_of_several_writes_in_one_group_the_last_is_kept() -> None:
    desk = Desk()
    desk.keeper.gate.clear()
    desk.save("0")
    for operation in (
        Put("a", "1", b"old"),
        Put("a", "2", b""),
        Delete("a", "1"),
        Put("a", "1", b"new"),
    ):
        last = desk.writer.save((operation,), 200)

    desk.keeper.gate.set()
    await last

    assert [op for group in desk.keeper.groups for op in group][-2:] == [
        Put("a", "2", b""),
        Put("a", "1", b"new"),
    ]
    assert desk.writer.waiting_bytes == 0
    await desk.stop()


async def test_a_cancelled_waiter_does_not_disturb_the_others() -> None:
    desk = Desk()
    desk.keeper.gate.clear()
    first, second = desk.save("1"), desk.save("2")
    first.cancel()

    desk.keeper.gate.set()
    await second

    assert sorted(key for group in desk.saved() for key in group) == ["1", "2"]
    await desk.stop()


async def test_a_full_queue_refuses_at_once_and_keeps_what_it_has() -> None:
    desk = Desk(queue_bytes=1000)
    desk.keeper.gate.clear()
    taken = [desk.save(str(n), size=400) for n in range(2)]

    with pytest.raises(CapacityError, match="was not taken"):
        desk.save("too much", size=400)

    desk.keeper.gate.set()
    await asyncio.gather(*taken)
    await desk.save("again", size=400)
    assert [key for group in desk.saved() for key in group] == ["0", "1", "again"]
    await desk.stop()


@pytest.mark.parametrize("inline", [True, False])
async def test_after_a_failed_commit_every_save_fails_and_nothing_is_tried_again(
    inline: bool,
) -> None:
    """R-17: a second fsync that succeeds proves nothing."""
    desk = Desk(inline=inline)
    await desk.save("good")
    desk.keeper.trouble = OSError(5, "Input/output error")

    with pytest.raises(StateNotWritableError) as caught:
        await desk.save("bad")
    desk.keeper.trouble = None
    with pytest.raises(StateNotWritableError):
        await desk.save("later")

    assert "state.db" in str(caught.value) and "start again" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert desk.saved() == [["good"]]
    assert [state for state, _ in desk.changes] == ["failed"]
    assert desk.writer.waiting_bytes == 0
    await desk.stop()


async def test_a_failure_nobody_awaits_is_reported_once_and_not_by_the_collector() -> (
    None
):
    desk = Desk()
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: complaints.append(context)
    )
    desk.keeper.trouble = OSError(5, "Input/output error")
    for n in range(5):
        desk.writer.save((Put("a", str(n), b""),), 10)

    await desk.stop()

    assert len(desk.changes) == 1
    assert complaints == []


@pytest.mark.parametrize("inline", [True, False])
async def test_a_full_disk_fails_saves_but_keeps_them_in_line_until_there_is_space(
    inline: bool,
) -> None:
    """F4: no order without its intent, nothing dropped, and it resumes by itself."""
    desk = Desk(inline=inline)
    desk.keeper.trouble = DiskFull("no space")
    for key in ("1", "2"):
        with pytest.raises(StateNotWritableError, match="disk is full"):
            await desk.save(key)
    assert desk.writer.state == "full"
    assert desk.writer.waiting_bytes > 0

    desk.keeper.trouble = None
    await desk.save("3")

    assert [key for group in desk.saved() for key in group] == ["1", "2", "3"]
    assert [state for state, _ in desk.changes] == ["full", "ok"]
    assert desk.writer.waiting_bytes == 0
    await desk.stop()


async def test_with_space_again_what_waited_is_written_without_another_save() -> None:
    desk = Desk()
    desk.keeper.trouble = DiskFull("no space")
    with pytest.raises(StateNotWritableError):
        await desk.save("1")

    desk.keeper.trouble = None
    await until(lambda: desk.writer.state == "ok")

    assert desk.saved() == [["1"]]
    await desk.stop()


async def test_a_disk_that_stays_full_bounds_what_waits() -> None:
    desk = Desk(queue_bytes=2000)
    desk.keeper.trouble = DiskFull("no space")
    taken = 0
    with pytest.raises(CapacityError):
        for n in range(100):
            with pytest.raises(StateNotWritableError):
                await desk.save(str(n))
            taken += 1

    assert 5 <= taken <= 15
    await desk.stop()


async def test_jobs_run_in_line_with_the_saves() -> None:
    desk = Desk()
    desk.save("1")
    seen = await desk.writer.run(lambda: desk.saved())
    desk.save("2")

    assert seen == [["1"]]
    with pytest.raises(ZeroDivisionError):
        await desk.writer.run(lambda: 1 // 0)
    await desk.stop()
    assert desk.saved() == [["1"], ["2"]]


async def test_housekeeping_goes_on_while_nothing_comes() -> None:
    desk = Desk()
    desk.keeper.more = 3

    await desk.save("1")
    await until(lambda: len(desk.keeper.rests) >= 4)

    assert desk.keeper.rests[:2] == [True, False]
    await desk.stop()


async def test_housekeeping_that_fails_is_a_failed_write() -> None:
    desk = Desk()

    def rest(*, busy: bool) -> bool:
        raise OSError(5, "Input/output error")

    desk.keeper.rest = rest  # type: ignore[method-assign]
    await desk.save("1")
    with pytest.raises(StateNotWritableError):
        while True:
            await desk.save("2")
    await desk.stop()


def test_a_loop_that_is_gone_does_not_stop_the_writer() -> None:
    async def leave() -> Desk:
        desk = Desk()
        desk.keeper.gate.clear()
        desk.save("1")
        await asyncio.sleep(0)
        return desk

    desk = asyncio.run(leave())
    desk.keeper.gate.set()
    asyncio.run(desk.stop_from_another_loop())

    assert desk.saved() == [["1"]]
