"""The shared page: who runs, since when, whose memory grows, and whether to hold back."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightdesk.kernel._process import HostProcess
from nightdesk.kernel._pulse import (
    HostLoop,
    Page,
    Pulse,
    new_host_loop,
    new_shared_file,
)
from nightdesk.kernel.loop import OWNER, Lane, lane


@pytest.fixture
def descriptor() -> Iterator[int]:
    descriptor = new_shared_file("test")
    yield descriptor
    os.close(descriptor)


def test_the_desk_sees_what_the_host_writes(descriptor: int) -> None:
    pulse, page = Pulse(descriptor, {}), Page(descriptor)

    pulse.beat()
    with pulse.owned(7, grace_s=30):
        assert (page.owner, page.grace_s) == (7, 30)
    pulse.enter(8)

    assert page.beat_ns > 0
    assert page.since_ns >= page.beat_ns
    assert (page.owner, page.grace_s) == (8, 0)
    page.close()
    pulse.close()


def test_growth_is_booked_to_the_task_that_keeps_it_not_to_the_one_that_returns_it(
    descriptor: int,
) -> None:
    pulse = Pulse(descriptor, {})
    kept = []

    for _ in range(400):
        pulse.enter(1)
        os.urandom(100_000)
        pulse.enter(2)
        kept.append(os.urandom(60_000))
        pulse.enter(0)

    leader, grown = pulse.leader
    assert leader == 2
    assert grown >= 20_000
    pulse.forget(2)
    assert pulse.leader[0] != 2
    pulse.close()


def test_a_parked_host_is_told_between_two_callbacks(descriptor: int) -> None:
    told: list[int] = []
    pulse, page = Pulse(descriptor, {}, lambda: told.append(1)), Page(descriptor)

    page.park(1 << 62)
    pulse.enter(1)
    page.park(0)
    pulse.enter(0)

    assert told == [1]
    page.close()
    pulse.close()


def test_the_loop_of_a_host_names_the_owner_of_each_callback(descriptor: int) -> None:
    """Also of a subtask and of a timer that a task started and forgot."""
    loop = new_host_loop()
    assert isinstance(loop, HostLoop)
    pulse = loop.pulse = Pulse(descriptor, {"a": 5})
    seen: list[tuple[str, int]] = []

    def note(what: str) -> None:
        seen.append((what, pulse.owner))

    async def child() -> None:
        note("subtask")
        loop.call_later(0.001, note, "timer")

    async def work() -> None:
        OWNER.set("a")
        subtask = asyncio.ensure_future(child())
        await asyncio.sleep(0)
        note("after a step")
        await subtask
        await asyncio.sleep(0.02)

    async def main() -> None:
        with lane(Lane.LOW):
            task = asyncio.ensure_future(work())
            OWNER.set("stranger")
            stranger = asyncio.ensure_future(asyncio.to_thread(int))
        await asyncio.gather(task, stranger)
        note("the desk's lane")

    loop.run_until_complete(main())
    loop.close()

    assert ("subtask", 5) in seen
    assert ("timer", 5) in seen
    assert seen[-1] == ("the desk's lane", 0)
    pulse.close()


# --- a host's vital signs ------------------------------------------------------------------------


class FakeClock:
    def __init__(self) -> None:
        self.ns = 10**9

    def now_ns(self) -> int:
        return self.ns

    def monotonic_ns(self) -> int:
        return self.ns

    async def sleep(self, seconds: float) -> None:
        self.ns += int(seconds * 1e9)
        await asyncio.sleep(0)


class NoProcess:
    """A process that never was: nothing of it is in /proc."""

    pid = 2**22 + 1
    stdout = None

    def poll(self) -> int | None:
        return None

    def kill(self) -> None:
        raise ProcessLookupError


def vital(descriptor: int, tmp_path: Path) -> tuple[HostProcess, Pulse, FakeClock]:
    clock = FakeClock()
    stack = os.open(tmp_path / "stack", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    process = HostProcess(NoProcess(), Page(descriptor), stack, clock)  # type: ignore[arg-type]
    return process, Pulse(descriptor, {}), clock


def test_a_host_stands_still_only_while_no_beat_comes(
    descriptor: int, tmp_path: Path
) -> None:
    process, pulse, clock = vital(descriptor, tmp_path)
    for _ in range(5):
        clock.ns += 100_000_000
        process.look()
    assert process.still_s == pytest.approx(0.5)

    pulse.beat()
    clock.ns += 100_000_000
    process.look()

    assert process.still_s == 0.0
    process.close()
    process.close()
    pulse.close()


def test_a_desk_that_was_suspended_itself_does_not_blame_its_hosts(
    descriptor: int, tmp_path: Path
) -> None:
    process, pulse, clock = vital(descriptor, tmp_path)
    clock.ns += 3600 * 10**9

    process.look()

    assert process.still_s <= 0.25
    process.close()
    pulse.close()


async def test_a_process_that_is_gone_has_no_memory_no_stack_and_no_last_words(
    descriptor: int, tmp_path: Path
) -> None:
    process, pulse, _ = vital(descriptor, tmp_path)

    assert process.resident_bytes() == 0
    assert process.cpu_s() == 0.0
    assert process.read_output() == []
    assert process.last_words() == ""
    assert await process.stack() == ""
    process.kill()
    assert not await process.gone(0.1)
    process.close()
    pulse.close()


class Scheduled(HostProcess):
    """Reads its figures from a list instead of /proc."""

    figures: list[tuple[int, int, str]]

    def _read_schedule(self) -> tuple[int, int, str]:
        return self.figures.pop(0)


def test_the_time_a_host_waited_for_a_core_is_not_its_fault(
    descriptor: int, tmp_path: Path
) -> None:
    clock = FakeClock()
    stack = os.open(tmp_path / "stack", os.O_RDWR | os.O_CREAT)
    process = Scheduled(NoProcess(), Page(descriptor), stack, clock)  # type: ignore[arg-type]
    tick = 100_000_000
    # Runnable, and in three of four ticks it got no core; then it ran.
    process.figures = [(0, 0, "R"), (0, 0, "R"), (0, 0, "R"), (tick, 2 * tick, "R")]

    for _ in range(4):
        clock.ns += tick
        process.look()

    assert process.still_s == pytest.approx(0.1, abs=0.01)
    process.close()
