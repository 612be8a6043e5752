"""Cycles: in their lane, within their time, one at a time, and nothing stays behind."""

import asyncio
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest

from fakes.scheduling import World
from nightdesk.kernel.loop import LANE, OWNER, Lane
from nightdesk.kernel.runner import DONE
from nightdesk.model.priority import Priority
from nightdesk.model.schedule import Schedule

Make = Callable[..., World]
ON_CALL = Schedule(on=("X",))


@pytest.fixture
def make() -> Iterator[Make]:
    worlds: list[World] = []

    def make(*args: Any, **options: Any) -> World:
        worlds.append(World(*args, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def world(make: Make) -> World:
    return make()


def test_a_cycle_runs_in_the_lane_of_its_priority_under_its_own_name(
    world: World,
) -> None:
    seen = []

    async def child() -> None:
        seen.append((LANE.get(), OWNER.get()))

    async def body() -> None:
        seen.append((LANE.get(), OWNER.get()))
        await asyncio.sleep(0.1)
        seen.append((LANE.get(), OWNER.get()))
        await asyncio.create_task(child())

    world.add("a", body, schedule=Schedule(once=True), priority=Priority.LOW)
    world.play(1)

    assert seen == [(Lane.LOW, "a")] * 3


def test_what_a_cycle_binds_is_not_seen_by_its_neighbours(world: World) -> None:
    """Log fields live in context variables, and the same worker runs both."""
    variable: ContextVar[str] = ContextVar("variable", default="nothing")
    seen = {}

    async def first() -> None:
        variable.set("first")

    async def second() -> None:
        seen["second"] = variable.get()

    world.add("first", first, schedule=Schedule(once=True))
    world.add("second", second, schedule=Schedule(once=True))
    world.play(1)

    assert seen == {"second": "nothing"}


def test_cycles_that_do_not_wait_share_one_worker(world: World) -> None:
    for number in range(500):
        world.add(f"t{number}", every_s=0.1)

    world.play(1)

    assert world.scheduler.stats()["workers"] == 1


def test_a_cycle_that_waits_holds_nobody_up(world: World) -> None:
    world.add("slow", lambda: asyncio.sleep(50), schedule=Schedule(once=True))
    world.add("quick", every_s=1.0)

    world.play(10.5)

    assert world.count("quick") == 11


def test_no_more_cycles_than_allowed_are_under_way(make: Make) -> None:
    world = make(max_concurrent=3)
    most = 0

    async def body() -> None:
        nonlocal most
        most = max(most, sum(world.under_way.values()))
        await asyncio.sleep(1)

    for number in range(10):
        world.add(f"t{number}", body, every_s=2.0)
    world.play(20)

    assert most == 3
    assert all(world.count(f"t{n}") >= 4 for n in range(10))


def test_the_most_urgent_task_gets_the_next_free_slot(make: Make) -> None:
    world = make(max_concurrent=1)
    for name, priority in (("low", "low"), ("high", "high"), ("critical", "critical")):
        world.add(
            name,
            lambda: asyncio.sleep(1),
            schedule=ON_CALL,
            priority=Priority.parse(priority),
        )
        world.add(
            f"{name}-2",
            lambda: asyncio.sleep(1),
            schedule=ON_CALL,
            priority=Priority.parse(priority),
        )
    world.play(1)

    world.scheduler.wake("low")
    world.play(0.5)
    for name in ("low-2", "high", "high-2", "critical", "critical-2"):
        world.scheduler.wake(name)
    world.play(10)

    order = [name for name, _ in world.runs]
    assert order == ["low", "critical", "critical-2", "high", "high-2", "low-2"]


def test_slow_low_tasks_leave_slots_for_critical_ones(make: Make) -> None:
    world = make(max_concurrent=32)
    for number in range(100):
        world.add(
            f"low{number}",
            lambda: asyncio.sleep(1000),
            schedule=Schedule(once=True),
            priority=Priority.LOW,
        )
    world.add("urgent", every_s=1.0, priority=Priority.CRITICAL)

    world.play(10.5)

    assert world.count("urgent") == 11


def test_a_group_may_be_limited(make: Make) -> None:
    world = make(group_limits={"api": 2})
    most = 0

    async def body() -> None:
        nonlocal most
        most = max(most, sum(world.under_way.values()))
        await asyncio.sleep(1)

    for number in range(6):
        world.add(f"t{number}", body, schedule=Schedule(once=True), group="api")
    world.play(0.5)
    words = {world.scheduler.next_run_in_words(f"t{n}") for n in range(2, 6)}
    world.play(5)

    assert most == 2
    assert words == {"waits for a slot of group api held by t0, t1"}
    assert len(world.runs) == 6


def test_cycles_with_a_common_key_take_turns_and_say_for_whom_they_wait(
    world: World,
) -> None:
    key = ("BTC/USDT@paper",)
    for name in ("sell-btc", "buy-btc"):
        world.add(name, lambda: asyncio.sleep(1), schedule=ON_CALL, keys=key)
    world.play(1)

    world.scheduler.wake("sell-btc")
    world.scheduler.wake("buy-btc")
    world.play(0.5)
    words = world.scheduler.next_run_in_words("buy-btc")
    world.play(5)

    assert words == "waits for BTC/USDT@paper held by sell-btc"
    assert world.runs == [("sell-btc", 1.0), ("buy-btc", 2.0)]


@pytest.mark.parametrize("how", ["raise", "cancel", "timeout", "remove", "pause-wait"])
def test_a_key_is_free_again_however_its_holder_ends(world: World, how: str) -> None:
    async def body() -> None:
        await asyncio.sleep(1)
        if how == "raise":
            raise ValueError
        await asyncio.sleep(1000)

    world.add(
        "a",
        body,
        schedule=ON_CALL,
        keys=("x",),
        timeout_s=2.0 if how == "timeout" else None,
    )
    world.add("b", schedule=ON_CALL, keys=("x",))
    world.add("c", schedule=ON_CALL, keys=("x",))
    world.play(1)
    for name in "abc":
        world.scheduler.wake(name)
    world.play(0.5)

    if how == "cancel":
        world.scheduler.stop_task("a")
    elif how == "remove":
        world.do(world.scheduler.remove("a"))
    elif how == "pause-wait":
        world.scheduler.pause("b")
        world.scheduler.stop_task("a")
    world.play(10)

    assert world.count("c") == 1
    assert world.count("b") == (0 if how == "pause-wait" else 1)


def test_a_timeout_cancels_the_cycle_and_counts_as_a_failure(world: World) -> None:
    world.add("a", lambda: asyncio.sleep(30), every_s=100.0, timeout_s=2.0)
    world.add("b", lambda: asyncio.sleep(1), every_s=5.0, timeout_s=2.0)

    world.play(2.5)

    health = world.scheduler.health("a")
    assert health.status == "backoff"
    assert "timeout of 2 s" in health.last_error
    assert "restart in" in health.why
    assert world.scheduler.health("b").errors == 0


def test_a_cycle_that_swallows_its_timeout_is_still_a_failure(world: World) -> None:
    async def body() -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            await asyncio.sleep(0.1)

    world.add("a", body, every_s=100.0, timeout_s=2.0)
    world.play(2.5)

    assert "timeout" in world.scheduler.health("a").last_error


class Deaf:
    """Goes on whatever is asked of it, until `ends`."""

    ends = False

    async def __call__(self) -> None:
        while not self.ends:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                continue


def test_a_cycle_that_ignores_cancellation_is_named_and_quarantined(
    make: Make,
) -> None:
    """Its slot comes back; its keys do not, because it may still act on them."""
    world, deaf = make(max_concurrent=1), Deaf()
    world.add("deaf", deaf, every_s=10.0, timeout_s=1.0, keys=("x",))
    world.add("other", every_s=1.0)
    world.add("same-key", schedule=ON_CALL, keys=("x",))
    world.play(5)

    health = world.scheduler.health("deaf")
    assert health.status == "quarantined"
    assert "goes on all the same" in health.why
    assert world.count("other") >= 2
    world.scheduler.wake("same-key")
    world.play(1)
    assert world.count("same-key") == 0
    with pytest.raises(Exception, match="its last cycle still runs"):
        world.scheduler.resume("deaf")

    assert world.do(world.scheduler.stop(2.0)) == ["deaf"]
    deaf.ends = True
    world.play(200)


def test_a_deaf_cycle_that_ends_after_all_gives_everything_back(make: Make) -> None:
    world = make(max_concurrent=1)

    async def body() -> None:
        end = world.now_s + 10
        while world.now_s < end:
            try:
                await asyncio.sleep(end - world.now_s)
            except asyncio.CancelledError:
                continue

    world.add("a", body, schedule=ON_CALL, timeout_s=1.0, keys=("x",))
    world.add("b", schedule=ON_CALL, keys=("x",))
    world.play(1)
    world.scheduler.wake("a")
    world.play(5)
    world.scheduler.wake("b")
    world.play(10)

    assert world.count("b") == 1
    assert world.scheduler.stats()["stuck"] == 0
    world.scheduler.resume("a")
    world.scheduler.wake("a")
    world.play(0.5)
    assert world.count("a") == 2


def test_stop_waits_for_what_runs_and_cancels_the_rest(world: World) -> None:
    ended = []

    async def quick() -> None:
        await asyncio.sleep(1)
        ended.append("quick")

    async def slow() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append("slow")

    world.add("quick", quick, schedule=Schedule(once=True))
    world.add("slow", slow, schedule=Schedule(once=True))
    world.play(0.5)

    stuck = world.do(world.scheduler.stop(4.0))

    assert stuck == []
    assert ended == ["quick", "slow"]
    assert world.now_s < 3


def test_nothing_runs_after_stop(world: World) -> None:
    world.add("a", every_s=1.0)
    world.play(2.5)

    world.do(world.scheduler.stop(1.0))
    world.scheduler.wake("a")
    world.play(5)

    assert world.count("a") == 3


def test_what_was_stopped_may_be_started_again(world: World) -> None:
    world.add("a", lambda: asyncio.sleep(0.1), every_s=1.0)
    world.add("waits", every_s=1.0, after=("a",))
    world.play(2.5)
    world.do(world.scheduler.stop(1.0))
    world.play(5)

    world.do(world.scheduler.start())
    world.play(2.5)

    assert world.count("a") == world.count("waits") == 6


def test_remove_names_a_cycle_that_will_not_end(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    deaf = Deaf()
    world.add("deaf", deaf, schedule=Schedule(once=True))
    world.play(1)

    assert not world.do(world.scheduler.remove("deaf", timeout_s=1.0))
    assert "deaf" in caplog.text
    deaf.ends = True
    world.play(200)


def test_a_task_may_stop_or_remove_itself(world: World) -> None:
    async def stops_itself() -> None:
        world.scheduler.stop_task("a")
        await asyncio.sleep(0.1)

    async def removes_itself() -> None:
        await world.scheduler.remove("b")

    world.add("a", stops_itself, every_s=1.0)
    world.add("b", removes_itself, every_s=1.0)
    world.play(5)

    assert (world.count("a"), world.count("b")) == (1, 1)
    assert world.scheduler.health("a").status == "stopped"
    assert not world.scheduler.knows("b")


def test_a_cancellation_that_leaks_out_of_a_cycle_is_a_failure_of_the_task(
    world: World,
) -> None:
    """The worker, and with it every neighbour, must survive it."""

    async def body() -> None:
        child = asyncio.ensure_future(asyncio.sleep(100))
        asyncio.get_running_loop().call_later(0.1, child.cancel)
        await child

    world.add("a", body, every_s=100.0)
    world.add("b", every_s=1.0)
    world.play(3.5)

    assert "was cancelled" in world.scheduler.health("a").last_error
    assert world.count("b") == 4


def test_a_cycle_that_raises_beyond_exception_passes_and_leaves_nothing_held(
    world: World,
) -> None:
    async def body() -> None:
        await asyncio.sleep(1)
        raise SystemExit(3)

    world.add("a", body, schedule=ON_CALL, keys=("x",))
    world.play(0.1)
    world.scheduler.wake("a")

    with pytest.raises(SystemExit):
        world.play(5)

    assert world.scheduler._runner.keys.held == 0
    assert world.scheduler._runner.running == 0


def test_timeouts_inside_a_cycle_work_as_usual(world: World) -> None:
    seen = []

    async def body() -> None:
        try:
            async with asyncio.timeout(0.5):
                await asyncio.sleep(10)
        except TimeoutError:
            seen.append("inner")
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0.1))

    world.add("a", body, schedule=Schedule(once=True))
    world.play(2)

    assert seen == ["inner"]
    assert world.scheduler.health("a").status == "completed"


def test_start_runs_once_before_the_first_cycle_and_again_if_it_failed(
    world: World,
) -> None:
    starts = []

    async def start() -> None:
        starts.append(world.now_s)
        if len(starts) < 3:
            raise ConnectionError("no venue yet")

    world.add("a", every_s=10.0, start=start)
    world.play(15)

    assert len(starts) == 3
    assert world.count("a") == 2
    assert world.scheduler.health("a").restarts == 2


def test_any_awaitable_may_be_a_cycle(world: World) -> None:
    from nightdesk.kernel.runner import Registration

    class Callable_:
        def __call__(self) -> Any:
            future = asyncio.get_running_loop().create_future()
            future.set_result(DONE)
            return future

    world.scheduler.add(Registration(task_id="a", type="t", cycle=Callable_()))
    world.play(1)

    assert world.scheduler.health("a").status == "completed"


def test_workers_that_nobody_needs_go_away(world: World) -> None:
    for number in range(100):
        world.add(f"t{number}", lambda: asyncio.sleep(1), schedule=Schedule(once=True))

    world.play(0.5)
    assert world.scheduler.stats()["workers"] >= 100
    world.play(2)

    assert world.scheduler.stats()["workers"] <= 16
    assert world.scheduler.stats()["running"] == 0


async def test_it_runs_on_a_plain_loop_and_dies_with_it_quietly() -> None:
    """Without lanes everything still works, only less evenly; and `asyncio.run` may cancel the workers."""
    import random

    from nightdesk.kernel.clock import SystemClock
    from nightdesk.kernel.runner import Registration
    from nightdesk.kernel.scheduler import Scheduler

    ran = asyncio.Event()

    async def cycle() -> None:
        ran.set()
        await asyncio.sleep(3600)

    scheduler = Scheduler(clock=SystemClock(), random=random.Random(1))
    scheduler.add(Registration(task_id="a", type="t", cycle=cycle))
    await scheduler.start()
    await asyncio.wait_for(ran.wait(), 5)
    workers = [w.task for w in scheduler._runner._workers]

    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)

    assert all(worker.cancelled() for worker in workers)
    assert scheduler.stats()["running"] == 0
    await scheduler.stop(0.1)
