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
_LEAST_BYTES = 256 * 1024


class StorageGuard:
    """Answers a store that cannot save: no durable intent, no order.

    A disk that is full, or is about to be, halts trading until there is space again; the space kept
    back is set free when it is needed, so that cancels and closing records are still written. A failed write or fsync ends the desk: nothing
    that this disk says is believed before a start has read all of it (R-17).
    """

    def __init__(self, desk: "TradingDesk") -> None:
        self._desk = desk

    def on_failure(self, text: str) -> None:
        """Called on the loop, once for each time that saving stops working."""
        desk, store = self._desk, self._desk.store
        is_full = isinstance(store, DirectoryStore) and store.state == "full"
        self._halt(f"state cannot be written: {text}", is_full=is_full)
        if isinstance(store, DirectoryStore) and is_full:
            store.release_reserve()
        else:
            desk.exit_code = StateDamagedError.exit_code
            desk.stopping.set()

    async def watch(self) -> None:
        """Look at the disk's space: the log that is written again and again may need none for a while (F4)."""
        store = self._desk.store
        while isinstance(store, DirectoryStore):
            await self._desk.clock.sleep(_LOOK_S)
            if store.state == "ok":
                self._look(store)

    def _look(self, store: DirectoryStore) -> None:
        gate, free = self._desk.gate, store.free_bytes()
        if gate.halted_by == _FULL_DISK:  # also from before a restart
            if store.take_reserve():
                gate.lift("the disk has space again", _FULL_DISK)
        elif free is not None and free < _LEAST_BYTES and not gate.halted_by:
            left = f"the disk is full, {free >> 10} KiB are left"
            self._halt(
                f"{store.directory}: {left}. Free some space; trading goes on by itself.",
                is_full=True,
            )

    def _halt(self, reason: str, *, is_full: bool) -> None:
        desk = self._desk
        desk.alert("critical", "store", f"{reason} Trading is halted.")
        if not desk.gate.halted_by:
            # Only what was ACTIVE may become so again by itself.
            lifts = is_full and desk.gate.state == "ACTIVE"
            desk.gate.halt_now(reason, _FULL_DISK if lifts else "store")
