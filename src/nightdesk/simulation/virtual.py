"""An asyncio loop whose time jumps to the next timer, so that a week passes in seconds and the same way twice.

The loop has no lanes of its own; `kernel.loop.in_lanes(VirtualLoop)(seed)` gives the desk's loop under
this clock, with parking and priorities unchanged.

Comes from: running.py
Goes to: kernel/loop.py
"""

import asyncio
import random
import selectors
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import Context
from typing import Any, TypeVarTuple

from nightdesk.errors import SimulationStuckError

__all__ = ["VirtualClock", "VirtualLoop"]

Ts = TypeVarTuple("Ts")
_SECOND_NS = 1_000_000_000
# Timers closer together than this fall due together: what a float of seconds still tells apart
# after three virtual years.
_RESOLUTION_S = 1e-7
# How long an idle loop waits for a thread that it was not told about, in real seconds.
_GRACE_S = 1.0


class _ShuffledQueue(deque[Any]):
    """A ready queue that serves in seeded random order: every interleaving becomes possible."""

    def __init__(self, random: random.Random) -> None:
        super().__init__()
        self._random = random

    def popleft(self) -> Any:
        if len(self) > 1:
            self.rotate(-self._random.randrange(len(self)))
        return super().popleft()


class _JumpingSelector(selectors.BaseSelector):
    """Polls like the real one, but lets the loop's time jump where that would wait."""

    def __init__(self, loop: "VirtualLoop") -> None:
        self._loop = loop
        self._real = selectors.DefaultSelector()

    def select(
        self, timeout: float | None = None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        loop = self._loop
        if timeout is not None and timeout <= 0:
            return self._real.select(0) if loop._may_be_woken() else []
        if loop.held:
            return self._real.select(None)
        if timeout is not None:
            ready = self._real.select(0) if loop._may_be_woken() else []
            if not ready:
                loop._jump()
            return ready
        return self._wait_outside()

    def _wait_outside(self) -> list[tuple[selectors.SelectorKey, int]]:
        if self._loop.wait_when_idle or self._loop._watches_sockets():
            return self._real.select(None)
        ready = self._real.select(_GRACE_S if threading.active_count() > 1 else 0)
        if not ready:
            raise SimulationStuckError(
                self._loop.time(), self._loop._names_of_waiting_tasks()
            )
        return ready

    def register(
        self, fileobj: Any, events: int, data: Any = None
    ) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(
        self, fileobj: Any, events: int, data: Any = None
    ) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.get_key(fileobj)

    def close(self) -> None:
        self._real.close()


class VirtualLoop(asyncio.SelectorEventLoop):
    """A deterministic loop: time stands still while anything is ready, then jumps to the next timer.

    Work outside the loop (`run_in_executor`, or whatever calls `hold` and `release`) is waited for
    in real time while virtual time stands still, so that its result arrives at the instant it was
    asked for. A thread that the loop was not told of still wakes it, at an instant that is not the
    same in every run.

    Args:
        seed: Decides the order of ready callbacks when `shuffle` is set, and nothing else.
        shuffle: Serve ready callbacks in seeded random order instead of first come, first served.
            Finds races between tasks; asyncio's own transports count on their order, so use it without sockets.

    Attributes:
        wait_when_idle: An idle loop without timers waits for a signal or a thread instead of failing.
        held: Pieces of outside work under way.
    """

    wait_when_idle = False
    # Lanes (`kernel.loop.LaneLoop`): this clock does not move during a slice, so slices are counted.
    slice_callbacks = 16
    timer_resolution_s = _RESOLUTION_S

    def __init__(self, seed: int = 0, *, shuffle: bool = False) -> None:
        self.seed = seed
        self.held = 0
        self._now_ns = 0
        self._woken = False
        self._random = random.Random(seed)
        self._shuffle = shuffle
        self._watched = _JumpingSelector(self)
        super().__init__(self._watched)
        self._clock_resolution = _RESOLUTION_S
        if shuffle:
            self._ready: deque[Any] = _ShuffledQueue(self._random)

    def new_ready_queue(self) -> deque[Any]:
        return _ShuffledQueue(self._random) if self._shuffle else deque()

    def time(self) -> float:
        """Return virtual seconds since the loop was made."""
        return self._now_ns / _SECOND_NS

    @property
    def time_ns(self) -> int:
        return self._now_ns

    def hold(self) -> None:
        """Say that work outside the loop is under way: time does not jump until `release`."""
        self.held += 1

    def release(self) -> None:
        """End a `hold`. From another thread: `loop.call_soon_threadsafe(loop.release)`."""
        if not self.held:
            raise RuntimeError("VirtualLoop.release() without a hold() before it")
        self.held -= 1

    def run_in_executor(
        self,
        executor: Any,
        func: Callable[[*Ts], Any],
        *args: *Ts,
    ) -> asyncio.Future[Any]:
        future = super().run_in_executor(executor, func, *args)
        self.hold()
        future.add_done_callback(lambda _: self.release())
        return future

    def call_soon_threadsafe(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        self._woken = True
        return super().call_soon_threadsafe(callback, *args, context=context)

    def _watches_sockets(self) -> bool:
        return len(self._watched.get_map()) > 1  # one is the loop's own wake-up pipe

    def _may_be_woken(self) -> bool:
        # Without sockets and threads a poll is a wasted system call, and there is one per iteration.
        woken, self._woken = self._woken, False
        return woken or self._watches_sockets()

    def _jump(self) -> None:
        first: asyncio.TimerHandle = self._scheduled[0]  # type: ignore[attr-defined]
        when_ns = round(first.when() * _SECOND_NS)
        self._now_ns = max(self._now_ns, when_ns)

    def _names_of_waiting_tasks(self) -> list[str]:
        return sorted(task.get_name() for task in asyncio.all_tasks(self))


class VirtualClock:
    """The desk's clock under a `VirtualLoop`.

    Args:
        start_ns: The UTC instant at which the loop's time is 0.
    """

    def __init__(self, loop: VirtualLoop, start_ns: int = 0) -> None:
        self._loop = loop
        self.start_ns = start_ns

    def now_ns(self) -> int:
        return self.start_ns + self._loop.time_ns

    def monotonic_ns(self) -> int:
        return self._loop.time_ns

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
