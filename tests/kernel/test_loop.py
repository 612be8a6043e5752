"""The loop in lanes: what is background waits in slices, and never starves."""

import asyncio
import contextvars
import gc
import logging
import socket
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nightdesk.errors import CommandError
from nightdesk.kernel import loop as loop_module
from nightdesk.kernel.loop import (
    LANE,
    OWNER,
    Lane,
    LaneLoop,
    lane,
    new_event_loop,
    run_in_desk_lane,
)

BACKGROUND = (Lane.CRITICAL, Lane.HIGH, Lane.NORMAL, Lane.LOW)


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request: pytest.FixtureRequest) -> Iterator[LaneLoop]:
    loop = new_event_loop(request.param)
    yield loop
    if not loop.is_closed():
        loop.close()


def in_lane(
    name: Lane, loop: LaneLoop, callback: Callable[..., object], *args: Any
) -> asyncio.Handle:
    with lane(name):
        return loop.call_soon(callback, *args)


async def rounds(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_what_a_background_task_starts_inherits_its_lane_also_in_a_library(
    loop: LaneLoop,
) -> None:
    seen: list[Lane] = []

    async def leaf() -> None:
        await asyncio.sleep(0)
        seen.append(LANE.get())

    async def branch() -> None:
        await asyncio.gather(leaf(), asyncio.wait_for(leaf(), 1.0))
        asyncio.get_running_loop().call_later(0, lambda: seen.append(LANE.get()))
        await asyncio.sleep(0.002)
        await rounds(30)

    async def main() -> None:
        with lane(Lane.LOW):
            task = loop.create_task(branch())
        await task

    loop.run_until_complete(main())

    assert seen == [Lane.LOW] * 3


def test_the_desk_passes_background_callbacks_that_were_there_before_it(
    loop: LaneLoop,
) -> None:
    order: list[str] = []

    async def main() -> None:
        in_lane(
            Lane.CRITICAL, loop, lambda: order.append("pumped with the loop's queue")
        )
        loop.slice_callbacks = 1
        for _ in range(5):
            in_lane(Lane.CRITICAL, loop, order.append, "background")
        loop.call_soon(order.append, "desk")
        await rounds(10)

    loop.run_until_complete(main())

    assert order.index("desk") <= 1
    assert order.count("background") == 5


def test_a_slice_ends_after_its_time_and_the_rest_waits_for_the_next_iteration() -> (
    None
):
    now = [0.0]
    loop = new_event_loop("asyncio", slice_us=100)
    loop.time = lambda: now[0]  # type: ignore[method-assign]
    per_iteration: list[int] = []

    def work() -> None:
        now[0] += 30e-6
        per_iteration[-1] += 1

    async def main() -> None:
        with lane(Lane.NORMAL):
            for _ in range(9):
                loop.call_soon(work)
        for _ in range(6):
            per_iteration.append(0)
            await asyncio.sleep(0)

    loop.run_until_complete(main())
    loop.close()

    assert max(per_iteration) <= 100 // 30
    assert sum(per_iteration) == 9


def test_a_slice_stops_before_the_callback_that_would_probably_exceed_it() -> None:
    now = [0.0]
    loop = new_event_loop("asyncio", slice_us=100)
    loop.time = lambda: now[0]  # type: ignore[method-assign]
    stretches: list[float] = []

    def work() -> None:
        now[0] += 60e-6

    async def main() -> None:
        with lane(Lane.NORMAL):
            for _ in range(40):
                loop.call_soon(work)
        for _ in range(40):
            before = now[0]
            await asyncio.sleep(0)
            stretches.append(now[0] - before)

    loop.run_until_complete(main())
    loop.close()

    assert stretches[-1] == pytest.approx(60e-6)


def test_busy_lanes_share_by_weight_and_low_is_never_starved(loop: LaneLoop) -> None:
    done: Counter[Lane] = Counter()
    loop.slice_callbacks = 15

    async def worker(own: Lane) -> None:
        while True:
            done[own] += 1
            await asyncio.sleep(0)

    async def main() -> None:
        tasks = []
        for own in BACKGROUND:
            with lane(own):
                tasks += [loop.create_task(worker(own)) for _ in range(20)]
        loop.slice_s = 1.0  # only the count ends a slice, so that the shares are exact
        await rounds(100)
        for task in tasks:
            task.cancel()

    loop.run_until_complete(main())

    assert done[Lane.LOW] > 0
    assert done[Lane.CRITICAL] == pytest.approx(8 * done[Lane.LOW], rel=0.1)
    assert done[Lane.HIGH] == pytest.approx(4 * done[Lane.LOW], rel=0.1)
    assert done[Lane.NORMAL] == pytest.approx(2 * done[Lane.LOW], rel=0.1)


def test_an_empty_lane_gives_its_turns_away(loop: LaneLoop) -> None:
    ran: list[int] = []

    async def main() -> None:
        loop.slice_s = 1.0
        for number in range(30):
            in_lane(Lane.LOW, loop, ran.append, number)
        await rounds(2)

    loop.run_until_complete(main())

    assert ran == list(range(30))


def test_closed_lanes_run_nothing_and_lose_nothing(loop: LaneLoop) -> None:
    ran: list[str] = []

    async def sleeper() -> None:
        await asyncio.sleep(0.001)
        ran.append("timer")

    async def main() -> None:
        loop.close_lanes()
        with lane(Lane.HIGH):
            loop.create_task(sleeper())
            loop.call_soon(ran.append, "callback")
        loop.call_soon_threadsafe(ran.append, "desk")
        await asyncio.sleep(0.01)
        await rounds(30)
        assert ran == ["desk"]
        assert loop.lane_stats()["closed"]
        assert loop.queued == 2
        loop.open_lanes()
        loop.open_lanes()
        await asyncio.sleep(0.01)
        await rounds(30)

    loop.run_until_complete(main())

    assert ran == ["desk", "callback", "timer"]


def test_a_callback_that_closes_the_lanes_is_the_last_of_its_slice(
    loop: LaneLoop,
) -> None:
    ran: list[int] = []

    async def main() -> None:
        in_lane(Lane.NORMAL, loop, loop.close_lanes)
        in_lane(Lane.NORMAL, loop, ran.append, 1)
        await rounds(5)
        assert ran == []
        loop.open_lanes()
        await rounds(3)

    loop.run_until_complete(main())

    assert ran == [1]


def test_timers_that_fall_due_while_the_lanes_are_closed_ring_when_they_open(
    loop: LaneLoop,
) -> None:
    ran: list[str] = []

    async def main() -> None:
        with lane(Lane.LOW):
            loop.call_later(0.001, ran.append, "due")
        await asyncio.sleep(0)
        loop.close_lanes()
        await asyncio.sleep(0.005)
        await rounds(30)
        assert ran == []
        loop.open_lanes()
        await asyncio.sleep(0.005)
        await rounds(30)

    loop.run_until_complete(main())

    assert ran == ["due"]


def test_background_timers_ring_in_order_and_cancelled_ones_do_not(
    loop: LaneLoop,
) -> None:
    ran: list[int] = []

    async def main() -> None:
        with lane(Lane.NORMAL):
            timers = [
                loop.call_later(0.001 * n, ran.append, n) for n in (5, 3, 1, 4, 2)
            ]
            at = loop.call_at(loop.time() + 0.006, ran.append, 6)
        timers[1].cancel()
        timers[1].cancel()
        assert at.when() > loop.time()
        await asyncio.sleep(0.02)
        await rounds(30)

    loop.run_until_complete(main())

    assert ran == [1, 2, 4, 5, 6]


def test_many_cancelled_timers_do_not_stay_in_memory(loop: LaneLoop) -> None:
    async def main() -> None:
        with lane(Lane.NORMAL):
            for _ in range(1000):
                loop.call_later(60, print).cancel()
            kept = loop.call_later(0.001, print)
        assert loop.lane_stats()["timers"] == 1
        assert len(loop._timers) < 200
        kept.cancel()
        await asyncio.sleep(0.005)
        await rounds(30)
        assert loop.lane_stats()["timers"] == 0

    loop.run_until_complete(main())


def test_timers_that_have_rung_do_not_count_as_cancelled_ones(loop: LaneLoop) -> None:
    """`asyncio.sleep` cancels its timer when it ends; rebuilding the heap for that took 5 ms of 10,000 sleepers."""

    async def sleeper() -> None:
        for _ in range(3):
            await asyncio.sleep(0.001)

    async def main() -> None:
        with lane(Lane.NORMAL):
            later = loop.call_later(60, print)
            await asyncio.gather(*(loop.create_task(sleeper()) for _ in range(100)))
        assert loop._timers_cancelled == 0
        assert loop.lane_stats()["timers"] == 1
        later.cancel()

    loop.run_until_complete(main())


def test_an_earlier_timer_moves_the_alarm(loop: LaneLoop) -> None:
    ran: list[str] = []

    async def main() -> None:
        with lane(Lane.NORMAL):
            loop.call_later(60, ran.append, "late")
            loop.call_later(0.001, ran.append, "early")
        await asyncio.sleep(0.01)
        await rounds(30)

    loop.run_until_complete(main())

    assert ran == ["early"]


def test_a_cancelled_callback_is_skipped(loop: LaneLoop) -> None:
    ran: list[int] = []

    async def main() -> None:
        in_lane(Lane.HIGH, loop, ran.append, 1).cancel()
        in_lane(Lane.HIGH, loop, ran.append, 2)
        await rounds(3)

    loop.run_until_complete(main())

    assert ran == [2]


def test_an_exception_in_a_background_callback_goes_to_the_exception_handler(
    loop: LaneLoop,
) -> None:
    reports: list[dict[str, Any]] = []
    ran: list[int] = []

    async def main() -> None:
        loop.set_exception_handler(lambda _, context: reports.append(context))
        in_lane(Lane.HIGH, loop, lambda: 1 / 0)
        in_lane(Lane.HIGH, loop, ran.append, 1)
        await rounds(3)

    loop.run_until_complete(main())

    assert isinstance(reports[0]["exception"], ZeroDivisionError)
    assert ran == [1]


def test_a_keyboard_interrupt_in_the_background_ends_the_loop_and_loses_nothing(
    loop: LaneLoop,
) -> None:
    ran: list[int] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        in_lane(Lane.HIGH, loop, interrupt)
        in_lane(Lane.HIGH, loop, ran.append, 1)
        await asyncio.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(main())
    loop.run_until_complete(rounds(3))

    assert ran == [1]
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(rounds(3))


def test_threads_may_call_into_a_lane(loop: LaneLoop) -> None:
    seen: list[Lane] = []
    context = contextvars.copy_context()
    context.run(LANE.set, Lane.LOW)

    async def main() -> None:
        done = loop.create_future()

        def answer() -> None:
            seen.append(LANE.get())
            done.set_result(None)

        thread = threading.Thread(
            target=lambda: loop.call_soon_threadsafe(answer, context=context)
        )
        thread.start()
        await done
        thread.join()

    loop.run_until_complete(main())

    assert seen == [Lane.LOW]


def test_results_of_an_executor_come_back_to_a_background_task(loop: LaneLoop) -> None:
    async def work() -> tuple[int, Lane]:
        return await asyncio.to_thread(lambda: 42), LANE.get()

    async def main() -> tuple[int, Lane]:
        with lane(Lane.NORMAL):
            return await loop.create_task(work())

    assert loop.run_until_complete(main()) == (42, Lane.NORMAL)


def test_sockets_are_served_between_slices_of_a_busy_background(loop: LaneLoop) -> None:
    """Without lanes, the echo below would wait for all 200 busy tasks on each of its legs."""
    steps = [0]

    async def busy() -> None:
        while True:
            steps[0] += 1
            await asyncio.sleep(0)

    async def main() -> int:
        loop.slice_callbacks = 10
        with lane(Lane.NORMAL):
            tasks = [loop.create_task(busy()) for _ in range(200)]
        left, right = socket.socketpair()
        left.setblocking(False)
        right.setblocking(False)
        await rounds(3)
        before = steps[0]
        await loop.sock_sendall(left, b"x")
        assert await loop.sock_recv(right, 1) == b"x"
        left.close()
        right.close()
        passed = steps[0] - before
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return passed

    assert loop.run_until_complete(main()) < 200


def test_overruns_are_counted_with_their_owner(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    loop = new_event_loop("asyncio", slice_us=100)
    loop.time = lambda: now[0]  # type: ignore[method-assign]

    def slow() -> None:
        now[0] += 0.2

    async def main() -> None:
        loop.set_debug(True)
        token = OWNER.set("candles")
        for _ in range(2):
            in_lane(Lane.NORMAL, loop, slow)
        OWNER.reset(token)
        await rounds(5)

    with caplog.at_level(logging.WARNING, logger="nightdesk.kernel.loop"):
        loop.run_until_complete(main())
    loop.close()

    stats = loop.lane_stats()
    assert stats["overruns"] == 2
    assert stats["offenders"] == {"candles": {"count": 2, "worst_us": 200_000}}
    assert "took 0.200 seconds" in caplog.text


def test_the_list_of_offenders_is_bounded() -> None:
    loop = new_event_loop("asyncio")
    context = contextvars.copy_context()
    for number in range(loop_module._MAX_OFFENDERS + 50):
        context.run(OWNER.set, f"task-{number}")
        loop._note_overrun(asyncio.Handle(print, (), loop, context.copy()), 1.0)
    loop.close()

    assert len(loop.lane_stats()["offenders"]) == loop_module._MAX_OFFENDERS
    assert loop.lane_stats()["overruns"] == loop_module._MAX_OFFENDERS + 50


def test_the_owner_of_a_running_callback_is_known_in_every_lane(loop: LaneLoop) -> None:
    owners: list[str] = []

    async def note() -> None:
        owners.append(loop.current_owner())

    async def worker() -> None:
        """One task that steps one owner after the other, as the runner's workers do."""
        OWNER.set("iceberg")
        await note()

    async def main() -> None:
        await loop.create_task(note(), name="nobody's")
        await loop.create_task(worker(), name="worker 1")
        OWNER.set("grid")
        await loop.create_task(note(), name="grid, child")
        OWNER.set("")
        with lane(Lane.LOW):
            OWNER.set("signals")
            task = loop.create_task(note())
            handle = loop.call_soon(lambda: owners.append(loop.current_owner()))
        OWNER.set("")
        await task
        assert not handle.cancelled()
        await rounds(3)
        loop.set_owner("runner's word")
        owners.append(loop.current_owner())
        loop.set_owner("")

    loop.run_until_complete(main())

    assert owners == [
        "nobody's",
        "iceberg",
        "grid",
        "signals",
        "signals",
        "runner's word",
    ]
    assert loop.current_owner() == ""


def test_what_the_desk_does_for_a_background_task_stays_in_the_desks_lane(
    loop: LaneLoop,
) -> None:
    async def main() -> tuple[Lane, Lane, Lane]:
        with lane(Lane.LOW):
            inside = run_in_desk_lane(LANE.get)
            after = LANE.get()
        return inside, after, run_in_desk_lane(LANE.get)

    assert loop.run_until_complete(main()) == (Lane.DESK, Lane.LOW, Lane.DESK)


@pytest.mark.parametrize("kind", ["uvloop", "asyncio"])
@pytest.mark.parametrize("debug", [False, True])
def test_asyncio_run_cleans_up_also_when_the_lanes_are_closed(
    kind: Any, debug: bool
) -> None:
    ended: list[str] = []

    async def background() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append("task")

    async def numbers() -> Any:
        try:
            yield 1
        finally:
            ended.append("generator")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, LaneLoop)
        with lane(Lane.LOW):
            generator = numbers()
            await anext(generator)
            loop.create_task(background())
        await asyncio.sleep(0.002)
        await rounds(30)
        loop.close_lanes()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with asyncio.Runner(
            loop_factory=lambda: new_event_loop(kind), debug=debug
        ) as runner:
            runner.run(main())
        gc.collect()

    assert sorted(ended) == ["generator", "task"]


def test_a_closed_loop_refuses_callbacks_and_has_dropped_those_it_held(
    loop: LaneLoop,
) -> None:
    handle = in_lane(Lane.LOW, loop, print)
    with lane(Lane.LOW):
        timer = loop.call_later(60, print)
    loop.close()
    loop.close()

    assert handle.cancelled()
    assert timer is not None
    for late in (
        lambda: in_lane(Lane.LOW, loop, print),
        lambda: in_lane(Lane.DESK, loop, print),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            late()
    with lane(Lane.LOW), pytest.raises(RuntimeError, match="closed"):
        loop.call_later(1, print)


def test_a_running_loop_cannot_be_closed(loop: LaneLoop) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="running"):
            loop.close()
        await in_background()

    async def in_background() -> None:
        with lane(Lane.LOW):
            await loop.create_task(asyncio.sleep(0))

    loop.run_until_complete(main())


def test_debug_mode_refuses_a_call_from_another_thread(loop: LaneLoop) -> None:
    errors: list[BaseException] = []

    def intrude() -> None:
        try:
            in_lane(Lane.LOW, loop, print)
        except RuntimeError as error:
            errors.append(error)

    async def main() -> None:
        loop.set_debug(True)
        await asyncio.to_thread(intrude)
        in_lane(Lane.LOW, loop, lambda: None)
        await rounds(3)

    loop.run_until_complete(main())

    assert "Non-thread-safe" in str(errors[0])


def test_auto_takes_uvloop_and_falls_back_to_asyncio_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> type[LaneLoop]:
        raise ImportError("no uvloop")

    with_it = new_event_loop()
    monkeypatch.setattr(loop_module, "_uvloop_in_lanes", missing)
    without_it = new_event_loop()

    assert type(with_it).__name__ == "LoopInLanes"
    assert isinstance(without_it, asyncio.SelectorEventLoop)
    with pytest.raises(CommandError, match="pip install uvloop"):
        new_event_loop("uvloop")
    with_it.close()
    without_it.close()
