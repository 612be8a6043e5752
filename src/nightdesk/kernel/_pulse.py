"""The page of memory in which a host writes how it is: read by the desk without asking the host.

A host that is stuck cannot answer, and one that holds the interpreter's lock in native code cannot
even take a signal handler's word for it. So it leaves its heartbeat, and the number of the task whose
code it is about to run, in memory that both processes see, before every callback of its loop.

Comes from: host.py, kernel/loop.py
Goes to: kernel/hosts.py
"""

import asyncio
import ctypes
import mmap
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from nightdesk.kernel.clock import SystemClock
from nightdesk.kernel.loop import OWNER, LaneLoop, LoopKind, new_event_loop

__all__ = ["HostLoop", "Page", "Pulse", "new_host_loop", "new_shared_file"]

_PAGE_BYTES = 4096
# The cells of the page, signed 64-bit each. The desk writes PARKED_UNTIL, the host the others.
_BEAT, _OWNER, _SINCE, _LEADER, _LEADER_BYTES, _GRACE, _PARKED_UNTIL = range(7)

# Of its time a host spends at most one part in fifty on finding out whose memory grows.
_SAMPLE_SHARE = 50
_MAX_SKIPPED = 64
_SMALL_BLOCK_BYTES = 80  # a block of Python's own allocator, on average

_monotonic_ns = SystemClock.monotonic_ns


def new_shared_file(name: str) -> int:
    """Return a descriptor of a nameless file in memory that a child may inherit."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Page:
    """The page as the desk sees it."""

    def __init__(self, descriptor: int) -> None:
        if os.fstat(descriptor).st_size < _PAGE_BYTES:
            os.ftruncate(descriptor, _PAGE_BYTES)
        self._map = mmap.mmap(descriptor, _PAGE_BYTES)
        self._view = memoryview(self._map)
        self._cells = self._view.cast("q")

    @property
    def beat_ns(self) -> int:
        """When the host's loop last went round; 0 before its first time."""
        return self._cells[_BEAT]

    @property
    def owner(self) -> int:
        """Number of the task whose code the host runs; 0 is its own, -1 code that no task owns."""
        return self._cells[_OWNER]

    @property
    def since_ns(self) -> int:
        """Since when `owner` runs."""
        return self._cells[_SINCE]

    @property
    def leader(self) -> tuple[int, int]:
        """The task whose samples show the largest growth of memory in use, and by how many bytes."""
        return self._cells[_LEADER], self._cells[_LEADER_BYTES]

    @property
    def grace_s(self) -> int:
        """How long the host may stand still because it imports a task's module."""
        return self._cells[_GRACE]

    def park(self, until_ns: int) -> None:
        """Hold the host's tasks back until `until_ns` (monotonic); 0 lets them go on."""
        self._cells[_PARKED_UNTIL] = until_ns

    @property
    def parked_until_ns(self) -> int:
        return self._cells[_PARKED_UNTIL]

    def close(self) -> None:
        self._cells.release()
        self._view.release()
        self._map.close()


class Pulse(Page):
    """The page as its host writes it.

    Args:
        number_of: Task id to number; fewer than the owners that turn up, see `owner`.
        on_parked: The desk asked for the machine; called between two callbacks.
    """

    def __init__(
        self,
        descriptor: int,
        number_of: dict[str, int],
        on_parked: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(descriptor)
        self._number_of = number_of
        self._on_parked = on_parked
        self._growth: dict[int, int] = {}
        self._held_bytes = _held_bytes_reader()
        self._random = random.Random(descriptor)
        self._skip = 0
        self._sample_ns = 0
        self._passed = 0
        self._before = -1

    def beat(self) -> None:
        self._cells[_BEAT] = _monotonic_ns()

    def enter(self, owner: int) -> None:
        """Note that the code of task `owner` runs from now on, and settle what ran until now."""
        cells = self._cells
        if self._before >= 0:
            self._charge(cells[_OWNER])
        now = _monotonic_ns()
        if owner > 0:
            self._passed += 1
            if now > self._sample_ns:
                if self._skip:
                    self._skip -= 1
                else:
                    self._before = self._held_bytes()
        cells[_SINCE] = now
        cells[_OWNER] = owner
        if cells[_PARKED_UNTIL] > now:
            self._on_parked()

    def enter_handle(self, handle: asyncio.Handle | None) -> None:
        """The same for a callback of the loop; None when a slice of the background is over."""
        if handle is None:
            self.enter(0)
            return
        owner = handle._context.get(OWNER)  # type: ignore[attr-defined]
        self.enter(self._number_of.get(owner, -1) if owner else 0)

    @contextmanager
    def owned(self, owner: int, grace_s: int = 0) -> Iterator[None]:
        """Run code of a task outside its own cycle: its module, its `wants`."""
        self._cells[_GRACE] = grace_s
        self.enter(owner)
        try:
            yield
        finally:
            self.enter(0)
            self._cells[_GRACE] = 0

    def forget(self, owner: int) -> None:
        """Drop what is remembered of a removed task."""
        self._growth.pop(owner, None)
        if self._cells[_LEADER] == owner:
            leader = max(
                self._growth, key=lambda number: self._growth[number], default=0
            )
            self._cells[_LEADER], self._cells[_LEADER_BYTES] = (
                leader,
                self._growth.get(leader, 0),
            )

    def _charge(self, owner: int) -> None:
        """Book what the callback that just ended took and gave back."""
        asked_ns = _monotonic_ns()
        held = self._held_bytes()
        now = _monotonic_ns()
        # One sample stands for all the callbacks since the last one.
        grown = (held - self._before) * self._passed
        self._before = -1
        self._sample_ns = now + 2 * _SAMPLE_SHARE * (now - asked_ns)
        # Tasks often run one after the other in the same order: a sample that always came first
        # after a pause would always meet the same one.
        self._skip = self._random.randrange(min(self._passed, _MAX_SKIPPED))
        self._passed = 0
        if grown:
            total = self._growth.get(owner, 0) + grown
            self._growth[owner] = total
            cells = self._cells
            if total > cells[_LEADER_BYTES] or owner == cells[_LEADER]:
                cells[_LEADER], cells[_LEADER_BYTES] = owner, total


class _MallocInfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks"),
            *("fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _held_bytes_reader() -> Callable[[], int]:
    """Return a function that says how much memory is in use.

    What the allocators handed out, not what the process holds of the system: a task that frees what
    it took leaves pages behind that the next one fills, and would be taken for the one that leaks.
    """
    try:
        mallinfo: Any = ctypes.PyDLL(None).mallinfo2
    except (AttributeError, OSError):  # not the GNU library
        process = psutil.Process()
        return lambda: process.memory_info().rss
    mallinfo.restype, mallinfo.argtypes = _MallocInfo, ()

    def held_bytes() -> int:
        info = mallinfo()
        large: int = info.uordblks + info.hblkhd
        return large + _SMALL_BLOCK_BYTES * sys.getallocatedblocks()

    return held_bytes


class HostLoop(LaneLoop):
    """A loop in lanes that tells the page whose callback it runs. Mixed in by `new_host_loop`."""

    pulse: Pulse | None = None
    _held: asyncio.Handle | None = None

    # `LaneLoop` keeps here the callback that its pump has in hand: the one place that every callback
    # of every task passes, subtasks and timers included, and that is true before the callback runs.
    @property
    def _in_hand(self) -> asyncio.Handle | None:
        return self._held

    @_in_hand.setter
    def _in_hand(self, handle: asyncio.Handle | None) -> None:
        self._held = handle
        if self.pulse is not None:
            self.pulse.enter_handle(handle)


def new_host_loop(kind: LoopKind = "auto") -> HostLoop:
    """Return a new loop for a host; set its `pulse` before the first task starts."""
    plain = new_event_loop(kind)
    plain.close()
    loop_class: Any = type("HostLoop", (HostLoop, type(plain)), {})
    loop: HostLoop = loop_class()
    loop.slice_s = plain.slice_s
    return loop
