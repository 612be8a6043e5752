"""A clock that is moved by the test."""

import asyncio
from heapq import heappop, heappush
from itertools import count

__all__ = ["ManualClock"]


class ManualClock:
    """Stands still until `advance`; sleepers wake in the order of their instants."""

    def __init__(self, start_ns: int = 1_700_000_000_000_000_000) -> None:
        self._start_ns = start_ns
        self._elapsed_ns = 0
        self._number = count()
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []

    def now_ns(self) -> int:
        return self._start_ns + self._elapsed_ns

    def monotonic_ns(self) -> int:
        return self._elapsed_ns

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        due_ns = self._elapsed_ns + round(seconds * 1e9)
        heappush(self._sleepers, (due_ns, next(self._number), woken))
        await woken

    async def advance(self, seconds: float) -> None:
        """Move on, stopping at each sleeper's instant so that it sees its own time."""
        end_ns = self._elapsed_ns + round(seconds * 1e9)
        while self._sleepers and self._sleepers[0][0] <= end_ns:
            due_ns, _, woken = heappop(self._sleepers)
            self._elapsed_ns = max(self._elapsed_ns, due_ns)
            if not woken.done():
                woken.set_result(None)
            for _ in range(3):
                await asyncio.sleep(0)
        self._elapsed_ns = end_ns

    def jump(self, seconds: float) -> None:
        """Move on at once, waking nobody."""
        self._elapsed_ns += round(seconds * 1e9)
