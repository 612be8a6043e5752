"""Garbage collection when it suits the desk.

Python collects cycles whenever enough objects were made, in the midst of anything. With 10,000 timers such
a collection took 17 ms about once a second: more than the whole budget of a switch. Reference
counts free nearly everything without it, so the desk collects rarely, in its lowest lane, and never while
an opportunity is handled.

Comes from: desk.py
Goes to: kernel/loop.py
"""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from nightdesk.kernel.loop import OWNER, Lane, lane

__all__ = ["Collector", "uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Make what lives on without looking for garbage: a desk that starts only grows.

    With 10,000 tasks the collector walked over what was just made so often that it took 40 % of a start.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Timers(Protocol):
    def time(self) -> float: ...

    def call_later(self, delay: float, callback: Any) -> asyncio.TimerHandle: ...


class Collector:
    """Takes the place of automatic collection from `start` to `stop`.

    Args:
        share: Of all time that collecting may take: a collection of 5 ms is followed by 10 s without one.
        look_s: How often it looks whether one is due, and the shortest pause between two.
        max_young: Objects made and not freed since the last one, beyond which it does not wait for its share.
    """

    def __init__(
        self,
        loop: _Timers,
        *,
        share: float = 0.0005,
        look_s: float = 1.0,
        max_young: int = 500_000,
    ) -> None:
        self._loop = loop
        self._share = share
        self._look_s = look_s
        self._max_young = max_young
        self._due_s = 0.0
        self._rounds = 0
        self._worst_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Put all that exists now out of the collector's sight, and collect by plan from here on.

        Nothing is collected before: with 10,000 tasks that would hold up a desk for 0.3 s that is about to
        trade, and the garbage of a start is small and stays so.
        """
        gc.freeze()
        gc.disable()
        token = OWNER.set("memory")
        try:
            self._set_timer()
        finally:
            OWNER.reset(token)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            gc.unfreeze()
            gc.enable()

    def _set_timer(self) -> None:
        with lane(Lane.LOW):
            self._timer = self._loop.call_later(self._look_s, self._look)

    def _look(self) -> None:
        if self._loop.time() >= self._due_s or gc.get_count()[0] > self._max_young:
            self._collect()
        self._set_timer()

    def _collect(self) -> None:
        began_s = self._loop.time()
        self._rounds += 1
        # Every sixteenth looks at the old generation too, where finished tasks end up.
        gc.collect(2 if self._rounds % 16 == 0 else 1)
        self._worst_s = max(self._worst_s, self._plan_next(began_s))

    def _plan_next(self, began_s: float) -> float:
        ended_s = self._loop.time()
        took_s = ended_s - began_s
        self._due_s = ended_s + max(self._look_s, took_s / self._share)
        return took_s

    def stats(self) -> dict[str, Any]:
        """Return how often it collected, and the longest stretch that took."""
        return {
            "collections": self._rounds,
            "worst_ms": round(self._worst_s * 1000, 3),
            "young": gc.get_count()[0],
        }
