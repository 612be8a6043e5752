"""A store that cannot save: trading halts, and goes on by itself only where that is safe (F3, F4)."""

import asyncio
from pathlib import Path
from typing import Any

from fakes.clock import ManualClock
from nightdesk.storage import StorageGuard
from nightdesk.stores.sqlite import SqliteStore


class Gate:
    def __init__(self, state: str = "ACTIVE", halted_by: str = "") -> None:
        self.state = state
        self.halted_by = halted_by

    def halt_now(self, reason: str, actor: str) -> None:
        self.state, self.halted_by, self.reason = "HALTED", actor, reason

    def lift(self, reason: str, actor: str) -> bool:
        if self.halted_by != actor:
            return False
        self.state, self.halted_by = "ACTIVE", ""
        return True


class TroubledStore(SqliteStore):
    """In the state that it is told, on a disk that has room or not."""

    state: Any = "full"
    has_room = False
    free: int | None = None
    released = False

    def release_reserve(self) -> int:
        self.released = True
        return 1

    def take_reserve(self) -> bool:
        return self.has_room

    def free_bytes(self) -> int | None:
        return self.free


class House:
    def __init__(self, folder: Path, gate: Gate | None = None) -> None:
        self.clock = ManualClock()
        self.gate = gate or Gate()
        self.store = TroubledStore(folder, clock=self.clock, inline=True)
        self.stopping = asyncio.Event()
        self.exit_code = 0
        self.alerts: list[str] = []
        self.guard = StorageGuard(self)  # type: ignore[arg-type]

    def alert(self, level: str, source: str, text: str) -> None:
        self.alerts.append(text)

    async def look(self) -> None:
        """Let half a second go by for the watch."""
        watch = asyncio.ensure_future(self.guard.watch())
        await asyncio.sleep(0)
        await self.clock.advance(0.6)
        watch.cancel()


async def test_a_full_disk_halts_trading_and_frees_the_space_kept_back(
    tmp_path: Path,
) -> None:
    house = House(tmp_path)

    house.guard.on_failure("the disk is full")

    assert house.gate.halted_by == "full disk"
    assert "the disk is full" in house.gate.reason
    assert house.store.released
    assert not house.stopping.is_set()
    assert house.alerts


async def test_with_space_again_trading_goes_on_by_itself(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.guard.on_failure("the disk is full")
    house.store.state, house.store.has_room = "ok", True

    await house.look()

    assert house.gate.state == "ACTIVE"


async def test_little_space_is_not_enough_to_go_on(tmp_path: Path) -> None:
    """Or trading would halt and resume with every order."""
    house = House(tmp_path)
    house.guard.on_failure("the disk is full")
    house.store.state = "ok"

    await house.look()

    assert house.gate.halted_by == "full disk"


async def test_a_halt_by_an_operator_never_lifts_itself(tmp_path: Path) -> None:
    house = House(tmp_path, Gate("HALTED", "alice"))
    house.guard.on_failure("the disk is full")
    house.store.state, house.store.has_room = "ok", True

    await house.look()

    assert house.gate.halted_by == "alice"


async def test_a_desk_that_was_reducing_does_not_become_active_by_itself(
    tmp_path: Path,
) -> None:
    house = House(tmp_path, Gate("REDUCING"))
    house.guard.on_failure("the disk is full")
    house.store.state, house.store.has_room = "ok", True

    await house.look()

    assert house.gate.halted_by == "store"


async def test_after_a_failed_write_the_desk_ends_with_code_5(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.store.state = "failed"

    house.guard.on_failure("fsync failed")

    assert house.gate.halted_by == "store"
    assert house.exit_code == 5
    assert house.stopping.is_set()


async def test_a_disk_that_is_nearly_full_halts_before_a_write_fails(
    tmp_path: Path,
) -> None:
    house = House(tmp_path)
    house.store.state, house.store.free = "ok", 4096

    await house.look()

    assert house.gate.halted_by == "full disk"
    assert "4 KiB are left" in house.gate.reason
    assert not house.store.released
