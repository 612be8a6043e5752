"""When the state cannot be written: trading halts at once, and what happens next depends on why.

Comes from: stores/
Goes to: desk.py, risk/gate.py
"""

from typing import TYPE_CHECKING

from nightdesk.errors import StateDamagedError
from nightdesk.stores._directory import DirectoryStore

if TYPE_CHECKING:
    from nightdesk.desk import TradingDesk

__all__ = ["StorageGuard"]

_FULL_DISK = "full disk"
_LOOK_S = 0.5


class StorageGuard:
    """Answers a store that cannot save: no durable intent, no order.

    A full disk halts trading until there is space again; the space kept back is set free meanwhile, so
    that cancels and closing records are still written. A failed write or fsync ends the desk: nothing
    that this disk says is believed before a start has read all of it (R-17).
    """

    def __init__(self, desk: "TradingDesk") -> None:
        self._desk = desk

    def on_failure(self, text: str) -> None:
        """Called on the loop, once for each time that saving stops working."""
        desk, store = self._desk, self._desk.store
        words = f"state cannot be written, trading halted: {text}"
        desk.alert("critical", "store", words)
        is_full = isinstance(store, DirectoryStore) and store.state == "full"
        if not desk.gate.halted_by:
            # Only what was ACTIVE may become so again by itself.
            lifts = is_full and desk.gate.state == "ACTIVE"
            actor = _FULL_DISK if lifts else "store"
            desk.gate.halt_now(f"state cannot be written: {text}", actor)
        if isinstance(store, DirectoryStore) and is_full:
            store.release_reserve()
        else:
            desk.exit_code = StateDamagedError.exit_code
            desk.stopping.set()

    async def watch(self) -> None:
        """Lift the halt for want of space when there is enough to last, also one from before a restart (F4)."""
        desk, store = self._desk, self._desk.store
        while isinstance(store, DirectoryStore):
            await desk.clock.sleep(_LOOK_S)
            waits = desk.gate.halted_by == _FULL_DISK and store.state == "ok"
            if waits and store.take_reserve():
                desk.gate.lift("the disk has space again", _FULL_DISK)
