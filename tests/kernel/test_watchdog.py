"""The watchdog: names who holds the loop, once per stall, and blames nobody for a paused process."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from fakes.clock import ManualClock
from nightdesk.kernel import watchdog as watchdog_module
from nightdesk.kernel.loop import OWNER, Lane, LaneLoop, lane, new_event_loop
from nightdesk.kernel.watchdog import Watchdog


class StillLoop:
    """A loop whose heartbeat is rung by the test."""

    def __init__(self) -> None:
        self.owner = "grid"
        self.beat: Callable[[], None] | None = None

    def call_later(self, delay: float, callback: Callable[[], None]) -> "StillLoop":
        self.beat = callback
        return self

    def cancel(self) -> None:
        self.beat = None

    def current_owner(self) -> str:
        return self.owner


class Rig:
    """A watchdog whose time, processor time and heartbeat are moved by hand."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.loop = StillLoop()
        self.cpu_ns = 0
        self.stalls: list[tuple[str, float, str]] = []
        self.watchdog = Watchdog(
            self.loop,
            lag_ms=250,
            on_stall=lambda owner, lag_s, stack: self.stalls.append(
                (owner, round(lag_s, 3), stack)
            ),
            clock=self.clock,
            cpu_ns=lambda: self.cpu_ns,
        )
        self.watchdog.attach()

    def run(self, seconds: float, *, beating: bool) -> None:
        for _ in range(round(seconds / 0.05)):
            self.clock.jump(0.05)
            if beating and self.loop.beat is not None:
                self.loop.beat()
            self.watchdog.look()

    def oversleep(self, seconds: float, cpu_s: float) -> None:
        self.clock.jump(seconds)
        self.cpu_ns += round(cpu_s * 1e9)
        self.watchdog.look()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.watchdog.stop()


def test_a_loop_that_beats_is_left_alone(rig: Rig) -> None:
    rig.run(10, beating=True)

    assert rig.stalls == []
    assert not rig.watchdog.degraded


def test_a_stall_is_reported_once_with_owner_and_stack_and_its_length_is_remembered(
    rig: Rig,
) -> None:
    rig.run(1, beating=True)
    rig.run(0.8, beating=False)
    rig.run(1, beating=True)

    ((owner, lag_s, stack),) = rig.stalls
    assert (owner, rig.watchdog.stalls) == ("grid", 1)
    assert 0.25 < lag_s <= 0.35
    assert "test_watchdog.py" in stack
    assert rig.watchdog.offenders["grid"].worst_s == pytest.approx(0.75, abs=0.06)
    assert not rig.watchdog.degraded


def test_the_next_stall_is_reported_anew_and_counted_to_its_owner(rig: Rig) -> None:
    for owner in ("grid", "candles", "grid"):
        rig.loop.owner = owner
        rig.run(0.5, beating=False)
        rig.run(0.5, beating=True)

    assert [owner for owner, _, _ in rig.stalls] == ["grid", "candles", "grid"]
    assert rig.watchdog.offenders["grid"].count == 2


def test_a_stall_of_more_than_a_second_marks_the_desk_degraded_for_a_while(
    rig: Rig,
) -> None:
    rig.run(1.2, beating=False)
    assert not rig.watchdog.degraded or rig.stalls
    rig.run(0.3, beating=False)
    assert rig.watchdog.degraded
    rig.run(30, beating=True)
    assert rig.watchdog.degraded
    rig.run(31, beating=True)
    assert not rig.watchdog.degraded


def test_a_paused_process_blames_nobody(rig: Rig) -> None:
    """SIGSTOP stops the watchdog as well: it overslept, and no processor time went by."""
    rig.run(1, beating=True)
    rig.oversleep(30, cpu_s=0.01)
    rig.run(0.2, beating=False)
    rig.run(1, beating=True)

    assert rig.stalls == []
    assert rig.watchdog.pauses == 1
    assert not rig.watchdog.degraded


def test_a_task_that_holds_the_loop_after_a_pause_is_still_found(rig: Rig) -> None:
    rig.oversleep(30, cpu_s=0.0)
    rig.run(0.5, beating=False)

    assert [owner for owner, _, _ in rig.stalls] == ["grid"]
    assert rig.stalls[0][1] < 1


def test_native_code_that_holds_the_interpreter_is_told_from_a_pause_by_processor_time(
    rig: Rig,
) -> None:
    rig.oversleep(2, cpu_s=1.9)
    rig.run(1, beating=True)

    ((owner, lag_s, stack),) = rig.stalls
    assert (owner, lag_s) == ("grid", 1.95)
    assert stack.startswith("(native code held the interpreter")
    assert rig.watchdog.degraded


def test_the_list_of_offenders_is_bounded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog_module, "_MAX_OFFENDERS", 2)
    for number in range(4):
        rig.loop.owner = f"task-{number}"
        rig.run(0.5, beating=False)
        rig.run(0.2, beating=True)

    assert list(rig.watchdog.offenders) == ["task-0", "task-1", "(others)"]
    assert rig.watchdog.offenders["(others)"].count == 2


def test_after_stopping_the_heart_beats_no_more(rig: Rig) -> None:
    rig.watchdog.stop()

    assert rig.loop.beat is None


@pytest.mark.parametrize("where", [Lane.DESK, Lane.LOW])
def test_the_thread_names_the_task_that_blocks_a_real_loop(where: Lane) -> None:
    """F20: a task that blocks is named while it blocks, in whichever lane it runs."""
    reported = threading.Event()
    reports: list[tuple[str, str]] = []

    def on_stall(owner: str, lag_s: float, stack: str) -> None:
        reports.append((owner, stack))
        reported.set()

    async def blocking() -> None:
        await asyncio.sleep(0)
        assert reported.wait(20)  # as long as it takes to be noticed

    async def main(loop: LaneLoop) -> None:
        watchdog = Watchdog(loop, lag_ms=20, interval_s=0.005, on_stall=on_stall)
        with lane(Lane.LOW):
            watchdog.start()  # even from a background task, the heartbeat is the desk's
        loop.close_lanes()
        await asyncio.sleep(0.05)
        assert reports == [] or reported.clear() is None
        reports.clear()
        loop.open_lanes()
        token = OWNER.set("bad-neighbour")
        with lane(where):
            task = loop.create_task(blocking())
        OWNER.reset(token)
        await task
        watchdog.stop()

    loop = new_event_loop()
    loop.run_until_complete(main(loop))
    loop.close()

    owner, stack = reports[0]
    assert owner == "bad-neighbour"
    assert "blocking" in stack


def test_a_loop_thread_that_has_ended_has_no_stack() -> None:
    rig = Rig()
    rig.watchdog._loop_thread = -1
    rig.run(0.5, beating=False)

    assert rig.stalls[0][2] == "(the loop's thread has ended)\n"
    rig.watchdog.stop()
