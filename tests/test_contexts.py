"""Contexts on their way to the store: what is not durable yet is never forgotten."""

import asyncio

from fakes.clock import ManualClock
from nightdesk.abc import Batch, Put
from nightdesk.contexts import Checkpoints
from nightdesk.errors import StateNotWritableError


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
