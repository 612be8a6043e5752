"""Somebody else's loop: a desk used as a library runs on the loop that is there, without preemption inside it.

Comes from: desk.py
Goes to: kernel/switch.py, kernel/watchdog.py
"""

import asyncio
from typing import Any

__all__ = ["PlainLanes", "lanes_of"]


class PlainLanes:
    """A loop with one lane, as the switch and the watchdog see it: there is nothing to close.

    Everything else is the loop's own.
    """

    queued = 0
    lanes_closed = False

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def close_lanes(self) -> None:
        """Nothing to close."""

    def open_lanes(self) -> None:
        """Nothing to open."""

    def current_owner(self) -> str:
        """Return "": a plain loop does not know for whom it works."""
        return ""

    def lane_stats(self) -> dict[str, Any]:
        return {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


def lanes_of(loop: asyncio.AbstractEventLoop) -> Any:
    """Return `loop` itself if it has lanes, else a `PlainLanes` around it."""
    return loop if hasattr(loop, "close_lanes") else PlainLanes(loop)
