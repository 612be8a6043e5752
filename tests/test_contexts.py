"""Contexts on their way to the store: what is not durable yet is never forgotten."""

import asyncio

import pytest

from fakes.clock import ManualClock
from nightdesk.abc import Batch, Put, Task
from nightdesk.contexts import Checkpoints
from nightdesk.errors import CapacityError, StateNotWritableError
from nightdesk.model.context import TaskContext
from nightdesk.model.serializer import decode_context, encode_context


class NoteContext(TaskContext):
    note: str = ""
    best: float = 0.0


class Note(Task[NoteContext]):
    context_class = NoteContext


class Disk:
    """Takes batches in order; while it is full, nothing is written."""

    def __init__(self) -> None:
        self.is_full = False
        self.written: dict[str, bytes] = {}

    async def save(self, batch: Batch) -> None:
        if self.is_full:
            raise StateNotWritableError("state", "full", "make space")
        for record in batch:
            if isinstance(record, Put):
                self.written[record.key] = record.data


async def flushed(checkpoints: Checkpoints) -> None:
    """Let the flush timer and the write behind it happen."""
    for _ in range(20):
        await asyncio.sleep(0.001)


def build(disk: Disk) -> Checkpoints:
    return Checkpoints(ManualClock(), disk.save, flush_s=0.0)


async def test_what_a_full_disk_refused_is_written_when_there_is_space_again() -> None:
    disk = Disk()
    checkpoints = build(disk)
    disk.is_full = True
    checkpoints.put(Put("health", "paused-task", b"paused"))
    await flushed(checkpoints)
    disk.is_full = False

    await checkpoints.drain()

    assert disk.written == {"paused-task": b"paused"}


async def test_what_a_switch_handed_over_in_vain_is_kept_too() -> None:
    disk = Disk()
    checkpoints = build(disk)
    disk.is_full = True
    checkpoints.put(Put("context", "t", b"1"))
    await asyncio.gather(checkpoints.write(checkpoints.swap()), return_exceptions=True)
    disk.is_full = False

    await checkpoints.drain()

    assert disk.written == {"t": b"1"}


async def test_an_older_context_never_replaces_a_newer_one() -> None:
    disk = Disk()
    checkpoints = build(disk)
    disk.is_full = True
    checkpoints.put(Put("context", "t", b"old"))
    late = checkpoints.write(checkpoints.swap())
    checkpoints.put(Put("context", "t", b"new"))
    await asyncio.gather(late, return_exceptions=True)
    disk.is_full = False

    await checkpoints.drain()

    assert disk.written == {"t": b"new"}


async def test_a_removed_task_leaves_nothing_to_write() -> None:
    disk = Disk()
    checkpoints = build(disk)
    disk.is_full = True
    checkpoints.put(Put("context", "t", b"1"))
    await flushed(checkpoints)
    checkpoints.forget("t")
    disk.is_full = False

    await checkpoints.drain()

    assert disk.written == {}


async def test_a_context_too_large_to_keep_fails_its_own_task_and_no_other() -> None:
    disk = Disk()
    checkpoints = build(disk)
    small, giant = (
        Note(NoteContext(task_id="small")),
        Note(NoteContext(task_id="giant", note="x" * 7_000_000)),
    )

    with pytest.raises(CapacityError, match="giant"):
        checkpoints.mark(giant, "note", 1)
    checkpoints.mark(small, "note", 1)
    await checkpoints.drain()

    assert list(disk.written) == ["small"]


async def test_what_cannot_be_written_is_tried_again_at_the_next_checkpoint() -> None:
    disk = Disk()
    checkpoints = build(disk)
    note = Note(NoteContext(task_id="n", note="caf\udce9"))
    for _ in range(2):
        with pytest.raises(UnicodeEncodeError):
            checkpoints.mark(note, "note", 1)
    note.context = note.context.evolve(note="café")

    checkpoints.mark(note, "note", 1)
    await checkpoints.drain()

    assert list(disk.written) == ["n"]


@pytest.mark.parametrize("best", [float("inf"), float("-inf"), float("nan"), 0.5])
def test_a_context_with_an_infinity_can_be_read_again(best: float) -> None:
    data = encode_context(
        NoteContext(task_id="n", best=best), type="note", schema=1, saved_ns=1
    )

    assert repr(decode_context(data, NoteContext).best) == repr(best)
