"""The virtual loop: time jumps, the same seed gives the same run, and nothing hangs."""

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from nightdesk.errors import SimulationStuckError
from nightdesk.kernel.inbox import Inbox
from nightdesk.kernel.loop import LANE, Lane, LaneLoop, in_lanes, lane
from nightdesk.kernel.switch import Switch
from nightdesk.model.events import FeedStalled, Opportunity
from nightdesk.simulation import virtual as virtual_module
from nightdesk.simulation.virtual import VirtualClock, VirtualLoop

YEAR_S = 365 * 86_400


@pytest.fixture(params=[VirtualLoop, in_lanes(VirtualLoop)], ids=["bare", "in lanes"])
def loop(request: pytest.FixtureRequest) -> Iterator[VirtualLoop]:
    loop = request.param(1)
    yield loop
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def trace_of(
    seed: int, *, shuffle: bool = False, lanes: bool = True
) -> list[tuple[int, int, float]]:
    """Run 25 tasks in all lanes that sleep and step; return who ran when, in order."""
    loop = (in_lanes(VirtualLoop) if lanes else VirtualLoop)(seed, shuffle=shuffle)
    trace: list[tuple[int, int, float]] = []

    async def worker(number: int) -> None:
        for step in range(10):
            await asyncio.sleep(0 if step % 3 else 0.1 * (number % 4))
            trace.append((number, step, loop.time()))

    async def main() -> None:
        tasks = []
        for number in range(25):
            with lane(Lane(number % 5)):
                tasks.append(loop.create_task(worker(number)))
        await asyncio.gather(*tasks)

    loop.run_until_complete(main())
    loop.close()
    return trace


def test_a_year_passes_at_once_and_timers_ring_at_their_instant(
    loop: VirtualLoop,
) -> None:
    async def main() -> list[float]:
        seen = []
        for seconds in (0.1, 3600.0, YEAR_S):
            await asyncio.sleep(seconds)
            seen.append(loop.time())
        return seen

    assert loop.run_until_complete(main()) == pytest.approx(
        [0.1, 3600.1, YEAR_S + 3600.1], abs=1e-6
    )


def test_time_stands_still_while_anything_is_ready(loop: VirtualLoop) -> None:
    async def main() -> float:
        loop.call_later(0.001, lambda: None)
        for _ in range(1000):
            await asyncio.sleep(0)
        return loop.time()

    assert loop.run_until_complete(main()) == 0.0


@pytest.mark.parametrize("lanes", [False, True])
def test_the_same_seed_gives_the_same_order(lanes: bool) -> None:
    assert trace_of(1, lanes=lanes) == trace_of(1, lanes=lanes)
    assert trace_of(1, lanes=lanes) == trace_of(
        2, lanes=lanes
    )  # without `shuffle` the seed decides nothing
    assert trace_of(1, lanes=lanes, shuffle=True) == trace_of(
        1, lanes=lanes, shuffle=True
    )


@pytest.mark.parametrize("lanes", [False, True])
def test_shuffling_explores_other_orders_and_loses_nothing(lanes: bool) -> None:
    plain, first, second = (trace_of(s, lanes=lanes, shuffle=s > 0) for s in (0, 1, 2))

    assert first != plain != second != first
    assert sorted(first) == sorted(second) == sorted(plain)


def test_parking_works_under_the_virtual_clock() -> None:
    loop = in_lanes(VirtualLoop)(1)
    ticks: list[float] = []

    async def background() -> None:
        while True:
            await asyncio.sleep(1)
            ticks.append(round(loop.time(), 6))

    async def main() -> None:
        with lane(Lane.LOW):
            loop.create_task(background())
        await asyncio.sleep(2.5)
        loop.close_lanes()
        await asyncio.sleep(5)
        loop.open_lanes()
        await asyncio.sleep(1.5)

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())

    assert ticks == [1, 2, 7.5, 8.5]


def test_the_switch_and_the_inbox_run_on_it_unchanged() -> None:
    loop = in_lanes(VirtualLoop)(1)
    clock = VirtualClock(loop, 1_000)
    assert isinstance(loop, LaneLoop)

    async def main() -> Switch:
        inbox, switch = Inbox(clock), Switch(loop, clock, max_park_s=0.5)
        lanes: list[Lane] = []

        async def handle(found: Opportunity) -> None:
            lanes.append(LANE.get())
            await clock.sleep(2)

        inbox.add_handler("h", (FeedStalled,), lambda event: 1)
        inbox.on_opportunity = switch.on_opportunity
        switch.set_handler("h", handle)
        await clock.sleep(1)
        inbox.emit(FeedStalled(source="x", silent_s=1.0))
        await clock.sleep(3)
        assert lanes == [Lane.DESK]
        return switch

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        trace = runner.run(main()).traces[0]

    assert (
        trace.switch_us,
        trace.reopened_ns - trace.handler_ns,
        trace.done_ns - trace.handler_ns,
    ) == (0, 500_000_000, 2_000_000_000)


def test_the_clock_counts_from_its_start_in_virtual_time(loop: VirtualLoop) -> None:
    clock = VirtualClock(loop, 1_700_000_000_000_000_000)

    loop.run_until_complete(clock.sleep(90.5))

    assert clock.now_ns() == 1_700_000_090_500_000_000
    assert clock.monotonic_ns() == loop.time_ns == 90_500_000_000


def test_work_in_a_thread_takes_no_virtual_time_although_timers_wait(
    loop: VirtualLoop,
) -> None:
    go = threading.Event()

    async def main() -> tuple[int, float]:
        loop.call_later(5, lambda: None)
        result = asyncio.ensure_future(asyncio.to_thread(lambda: go.wait(20) and 42))
        await asyncio.sleep(0)
        go.set()
        return await result, loop.time()

    assert loop.run_until_complete(main()) == (42, 0.0)
    assert loop.held == 0


def test_a_thread_that_was_announced_is_waited_for(loop: VirtualLoop) -> None:
    async def main() -> float:
        done = loop.create_future()
        loop.hold()

        def finish() -> None:
            loop.release()
            done.set_result("saved")

        thread = threading.Thread(target=lambda: loop.call_soon_threadsafe(finish))
        thread.start()
        loop.call_later(60, lambda: None)
        assert await done == "saved"
        thread.join()
        return loop.time()

    assert loop.run_until_complete(main()) == 0.0


def test_a_thread_that_was_not_announced_still_wakes_an_idle_loop(
    loop: VirtualLoop,
) -> None:
    async def main() -> str:
        done: asyncio.Future[str] = loop.create_future()
        thread = threading.Thread(
            target=lambda: loop.call_soon_threadsafe(done.set_result, "woken")
        )
        thread.start()
        answer = await done
        thread.join()
        return answer

    assert loop.run_until_complete(main()) == "woken"


def test_releasing_what_was_not_held_is_an_error(loop: VirtualLoop) -> None:
    with pytest.raises(RuntimeError, match="without a hold"):
        loop.release()


def test_a_deadlock_is_an_error_that_names_who_waits(
    loop: VirtualLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        virtual_module, "_GRACE_S", 0.0
    )  # other tests may have left threads behind

    async def main() -> None:
        await asyncio.sleep(3)
        waiting = [asyncio.ensure_future(asyncio.Event().wait()) for _ in range(12)]
        waiting[0].set_name("the one that forgot")
        await asyncio.gather(*waiting)

    with pytest.raises(
        SimulationStuckError, match=r"stands still at 3\.0.*and 3 more"
    ) as caught:
        loop.run_until_complete(main())

    assert "the one that forgot" in caught.value.waiting
    assert caught.value.exit_code == 1


def test_asyncio_run_ends_cleanly_after_a_deadlock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(virtual_module, "_GRACE_S", 0.0)
    ended: list[str] = []

    async def main() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")

    with (
        pytest.raises(SimulationStuckError),
        asyncio.Runner(loop_factory=lambda: in_lanes(VirtualLoop)(1)) as runner,
    ):
        runner.run(main())

    assert ended == ["cleaned up"]


def test_a_wait_for_a_signal_may_be_asked_for(loop: VirtualLoop) -> None:
    async def main() -> None:
        loop.wait_when_idle = True
        told = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, told.set)
        timer = threading.Timer(0.01, signal.raise_signal, [signal.SIGUSR1])
        timer.start()
        await told.wait()
        timer.join()
        loop.remove_signal_handler(signal.SIGUSR1)

    loop.run_until_complete(main())


def test_sockets_are_served_in_real_time_between_jumps(loop: VirtualLoop) -> None:
    async def main() -> Any:
        async def echo(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            writer.write(await reader.readline())
            writer.close()

        left, right = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=left)
        other_reader, other_writer = await asyncio.open_connection(sock=right)
        served = asyncio.ensure_future(echo(other_reader, other_writer))
        writer.write(b"ping\n")
        answer = await reader.readline()
        await served
        await asyncio.sleep(1)
        writer.close()
        other_writer.close()
        await asyncio.sleep(0)
        return answer, loop.time()

    assert loop.run_until_complete(main()) == (b"ping\n", 1.0)


def test_debug_mode_works(loop: VirtualLoop) -> None:
    loop.set_debug(True)

    loop.run_until_complete(asyncio.sleep(10))

    assert loop.time() == 10.0
