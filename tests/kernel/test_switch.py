"""The switch: the background stands still, the handler runs first, and everything goes on again, whatever happens."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from fakes.clock import ManualClock
from nightdesk.abc import Batch, Observer, Put
from nightdesk.kernel.loop import LANE, OWNER, Lane, LaneLoop, lane, new_event_loop
from nightdesk.kernel.switch import Switch
from nightdesk.model.events import Event, FeedStalled, Opportunity, QuoteChanged
from nightdesk.model.health import SwitchTrace

BATCH = [Put("context", "grid", b"changed")]


class RecordingObserver(Observer):
    def __init__(self) -> None:
        self.traces: list[SwitchTrace] = []
        self.failures: list[tuple[str, str, str]] = []

    def on_switch(self, trace: SwitchTrace) -> None:
        self.traces.append(trace)

    def on_task_failed(
        self, task_id: str, error: BaseException, consequence: str
    ) -> None:
        self.failures.append((task_id, repr(error), consequence))


class SlowStore:
    """Takes batches; they are durable when the test says so."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.pending: list[asyncio.Future[None]] = []

    def save(self, batch: Batch) -> Awaitable[None]:
        self.batches.append(batch)
        self.pending.append(asyncio.get_running_loop().create_future())
        return self.pending[-1]


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request: pytest.FixtureRequest) -> Iterator[LaneLoop]:
    loop = new_event_loop(request.param)
    yield loop
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def opportunity(
    clock: ManualClock, edge_ppm: int = 100, deadline_s: float = 1.0, **changes: Any
) -> Opportunity:
    fields: dict[str, Any] = {
        "handler": "arbitrage",
        "edge_ppm": edge_ppm,
        "deadline_ns": clock.now_ns() + round(deadline_s * 1e9),
        "cause": FeedStalled(source="x", silent_s=1.0),
        "ts_received_ns": clock.now_ns(),
    }
    return Opportunity(**(fields | changes))


async def settle() -> None:
    """Let everything that is ready run, and what it makes ready: by count, not by time."""
    for _ in range(30):
        await asyncio.sleep(0)


async def ready(
    switch: Switch,
    handle: Callable[[Opportunity], Awaitable[None]],
    name: str = "arbitrage",
) -> None:
    switch.set_handler(name, handle)
    await asyncio.sleep(0)  # its standby reaches its wait


def test_the_first_line_of_the_handler_runs_before_on_opportunity_returns(
    loop: LaneLoop, clock: ManualClock
) -> None:
    ran: list[Any] = []

    async def handle(found: Opportunity) -> None:
        task = asyncio.current_task()
        ran.append(
            (
                found.edge_ppm,
                LANE.get(),
                OWNER.get(),
                task and task.get_name(),
                loop.lanes_closed,
            )
        )
        async with asyncio.timeout(1):  # needs a current task of its own
            await asyncio.sleep(0)
        ran.append("second step")

    async def main() -> None:
        switch = Switch(loop, clock)
        await ready(switch, handle)
        switch.on_opportunity(opportunity(clock))
        assert ran == [(100, Lane.DESK, "arbitrage", "arbitrage", True)]
        assert asyncio.current_task() is not None
        await settle()

    loop.run_until_complete(main())

    assert ran[1:] == ["second step"]
    assert not loop.lanes_closed


def test_it_starts_at_once_also_from_a_callback_outside_any_task(
    loop: LaneLoop, clock: ManualClock
) -> None:
    ran: list[int] = []

    async def handle(found: Opportunity) -> None:
        ran.append(found.edge_ppm)

    async def main() -> None:
        switch = Switch(loop, clock)
        await ready(switch, handle)
        after: list[list[int]] = []
        loop.call_soon(
            lambda: (switch.on_opportunity(opportunity(clock)), after.append(list(ran)))
        )
        await settle()
        assert after == [[100]]

    loop.run_until_complete(main())


def test_a_handler_set_in_this_very_iteration_runs_in_the_next(
    loop: LaneLoop, clock: ManualClock
) -> None:
    ran: list[int] = []

    async def handle(found: Opportunity) -> None:
        ran.append(found.edge_ppm)

    async def main() -> None:
        switch = Switch(loop, clock)
        switch.set_handler("arbitrage", handle)
        switch.on_opportunity(opportunity(clock))
        await settle()
        assert switch.stats()["outcomes"] == {"handled": 1}

    loop.run_until_complete(main())

    assert ran == [100]


def test_the_background_stands_still_until_the_handler_ends(
    loop: LaneLoop, clock: ManualClock
) -> None:
    steps: list[int] = [0]
    hooks: list[str] = []

    async def background() -> None:
        while True:
            steps[0] += 1
            await asyncio.sleep(0)

    async def main() -> None:
        go_on = loop.create_future()
        switch = Switch(
            loop,
            clock,
            max_park_s=60,
            park=lambda: hooks.append("park"),
            resume=lambda: hooks.append("resume"),
        )

        async def handle(found: Opportunity) -> None:
            hooks.append("first line")
            await go_on

        with lane(Lane.NORMAL):
            task = loop.create_task(background())
        await ready(switch, handle)
        await settle()
        before = steps[0]
        assert before > 0
        switch.on_opportunity(opportunity(clock))
        await settle()
        assert steps[0] == before
        assert switch.stats()["active"] == ["arbitrage"]
        go_on.set_result(None)
        await settle()
        assert steps[0] > before
        assert switch.traces[-1].parked == 1
        task.cancel()

    loop.run_until_complete(main())

    assert hooks == ["first line", "park", "resume"]


def test_an_opportunity_found_by_a_background_task_does_not_park_its_own_handler(
    loop: LaneLoop, clock: ManualClock
) -> None:
    async def main() -> None:
        store = SlowStore()
        switch = Switch(
            loop,
            clock,
            snapshot=lambda: BATCH,
            save=store.save,
            durability="sync",
            max_park_s=60,
        )
        ran: list[int] = []

        async def handle(found: Opportunity) -> None:
            await asyncio.sleep(0)
            ran.append(found.edge_ppm)

        async def background() -> None:
            switch.on_opportunity(opportunity(clock))

        await ready(switch, handle)
        with lane(Lane.LOW):
            task = loop.create_task(background())
        await task
        assert ran == []
        store.pending[0].set_result(None)
        await settle()
        assert ran == [100]
        assert not loop.lanes_closed

    loop.run_until_complete(main())


def test_every_step_is_stamped(loop: LaneLoop, clock: ManualClock) -> None:
    observer = RecordingObserver()
    quote = (
        QuoteChanged.__struct_fields__
    )  # the key of a trace names symbol and venue where the cause has them
    assert {"symbol", "venue"} <= set(quote)

    async def handle(found: Opportunity) -> None:
        clock.jump(0.002)

    def snapshot() -> Batch:
        clock.jump(0.001)
        return ()

    async def main() -> None:
        switch = Switch(loop, clock, snapshot=snapshot, observers=[observer])
        await ready(switch, handle)
        clock.jump(1.0)
        found = opportunity(clock, ts_event_ns=7)
        clock.jump(0.003)
        switch.on_opportunity(found)

    loop.run_until_complete(main())

    (trace,) = observer.traces
    ms = 1_000_000
    assert (trace.received_ns, trace.decided_ns, trace.closed_ns) == (
        1000 * ms,
        1003 * ms,
        1003 * ms,
    )
    assert (trace.snapshot_ns, trace.handler_ns, trace.done_ns, trace.reopened_ns) == (
        1004 * ms, 1004 * ms, 1006 * ms, 1006 * ms,
    )  # fmt: skip
    assert (trace.switch_us, trace.outcome, trace.ts_event_ns, trace.key) == (
        4000.0,
        "handled",
        7,
        "FeedStalled",
    )


def test_a_receipt_stamp_that_makes_no_sense_is_not_believed(
    loop: LaneLoop, clock: ManualClock
) -> None:
    async def handle(found: Opportunity) -> None:
        pass

    async def main() -> None:
        switch = Switch(loop, clock)
        await ready(switch, handle)
        for received_ns in (0, clock.now_ns() + 10**12):
            switch.on_opportunity(opportunity(clock, ts_received_ns=received_ns))
            await asyncio.sleep(0)
        assert [t.switch_us for t in switch.traces] == [0.0, 0.0]

    loop.run_until_complete(main())


def test_the_trace_names_what_the_opportunity_is_about(
    loop: LaneLoop, clock: ManualClock
) -> None:
    class Cause(Event, frozen=True, kw_only=True):
        pair: str = "ARB/USDC"
        chain: str = "arbitrum"

    async def handle(found: Opportunity) -> None:
        pass

    async def main() -> None:
        switch = Switch(loop, clock)
        await ready(switch, handle)
        switch.on_opportunity(opportunity(clock, cause=Cause()))
        assert switch.traces[-1].key == "ARB/USDC@arbitrum"

    loop.run_until_complete(main())


def test_a_late_opportunity_is_counted_and_not_run(
    loop: LaneLoop, clock: ManualClock
) -> None:
    ran: list[int] = []
    observer = RecordingObserver()

    async def handle(found: Opportunity) -> None:
        ran.append(1)

    async def main() -> None:
        switch = Switch(loop, clock, observers=[observer])
        await ready(switch, handle)
        found = opportunity(clock, deadline_s=0.5)
        clock.jump(0.6)
        switch.on_opportunity(found)
        assert switch.stats()["outcomes"] == {"late": 1}
        assert switch.stats()["max_us"] == 0.0

    loop.run_until_complete(main())

    assert ran == []
    assert [t.outcome for t in observer.traces] == ["late"]
    assert not loop.lanes_closed


def test_waiting_opportunities_run_one_at_a_time_best_edge_first(
    loop: LaneLoop, clock: ManualClock
) -> None:
    order: list[int] = []
    parked: list[bool] = []

    async def main() -> None:
        gates: list[asyncio.Future[None]] = []
        switch = Switch(loop, clock, queue_limit=3, max_park_s=60)

        async def handle(found: Opportunity) -> None:
            order.append(found.edge_ppm)
            parked.append(loop.lanes_closed)
            gates.append(loop.create_future())
            await gates[-1]

        await ready(switch, handle)
        for edge in (1, 50, 20, 10, 30):
            switch.on_opportunity(opportunity(clock, edge))
        assert order == [1]
        assert (switch.stats()["waiting"], switch.stats()["dropped"]) == (3, 1)
        for number in range(4):
            gates[number].set_result(None)
            await settle()

    loop.run_until_complete(main())

    assert order == [1, 50, 30, 20]
    assert all(parked)
    assert not loop.lanes_closed


def test_a_long_queue_of_handlers_that_never_wait_is_served_without_recursion(
    loop: LaneLoop, clock: ManualClock
) -> None:
    async def main() -> None:
        switch = Switch(loop, clock, queue_limit=5_000)
        gate, finished = loop.create_future(), loop.create_future()
        done: list[int] = []

        async def handle(found: Opportunity) -> None:
            if found.edge_ppm == 0:
                await gate
            done.append(found.edge_ppm)
            if len(done) == 3_000:
                finished.set_result(None)

        await ready(switch, handle)
        for edge in range(3_000):
            switch.on_opportunity(opportunity(clock, edge))
        gate.set_result(None)
        await finished
        await asyncio.sleep(0)
        assert done == [0, *range(2_999, 0, -1)]
        assert len(switch.traces) == 1024

    loop.run_until_complete(main())


def test_an_opportunity_that_grows_late_while_it_waits_is_not_run(
    loop: LaneLoop, clock: ManualClock
) -> None:
    async def main() -> None:
        switch = Switch(loop, clock)
        gate = loop.create_future()

        async def handle(found: Opportunity) -> None:
            await gate

        await ready(switch, handle)
        switch.on_opportunity(opportunity(clock))
        switch.on_opportunity(opportunity(clock, deadline_s=0.1))
        clock.jump(0.2)
        gate.set_result(None)
        await settle()
        assert switch.stats()["outcomes"] == {"handled": 1, "late": 1}

    loop.run_until_complete(main())


def test_several_handlers_may_be_under_way_when_asked_for(
    loop: LaneLoop, clock: ManualClock
) -> None:
    async def main() -> None:
        switch = Switch(loop, clock, max_handlers=2, max_park_s=60)
        gates = {edge: loop.create_future() for edge in (1, 2)}

        async def handle(found: Opportunity) -> None:
            await gates[found.edge_ppm]

        await ready(switch, handle)
        switch.on_opportunity(opportunity(clock, 1))
        await asyncio.sleep(0)
        switch.on_opportunity(opportunity(clock, 2))
        await asyncio.sleep(0)
        assert len(switch.stats()["active"]) == 2
        gates[1].set_result(None)
        await settle()
        assert loop.lanes_closed
        gates[2].set_result(None)
        await settle()
        assert not loop.lanes_closed

    loop.run_until_complete(main())


def test_a_handler_that_waits_too_long_lets_the_background_run_in_the_gaps(
    loop: LaneLoop, clock: ManualClock
) -> None:
    hooks: list[str] = []

    async def main() -> None:
        switch = Switch(
            loop,
            clock,
            max_park_s=0.002,
            park=lambda: hooks.append("park"),
            resume=lambda: hooks.append("resume"),
        )
        gate = loop.create_future()

        async def handle(found: Opportunity) -> None:
            await gate

        await ready(switch, handle)
        switch.on_opportunity(opportunity(clock))
        assert loop.lanes_closed
        await asyncio.sleep(0.01)
        await settle()
        assert not loop.lanes_closed
        assert switch.stats()["active"] == ["arbitrage"]
        gate.set_result(None)
        await settle()
        assert switch.traces[-1].outcome == "handled"

    loop.run_until_complete(main())

    assert hooks == ["park", "resume"]


def test_a_handler_without_end_is_cancelled_and_the_next_one_served(
    loop: LaneLoop, clock: ManualClock
) -> None:
    async def main() -> None:
        switch = Switch(loop, clock, timeout_s=0.002)
        ran: list[int] = []
        release = loop.create_future()

        async def handle(found: Opportunity) -> None:
            ran.append(found.edge_ppm)
            if found.edge_ppm == 1:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    await release  # swallows the cancellation

        await ready(switch, handle)
        switch.on_opportunity(opportunity(clock, 1))
        switch.on_opportunity(opportunity(clock, 2))
        await asyncio.sleep(0.02)
        await settle()
        assert ran == [1, 2]
        assert [t.outcome for t in switch.traces] == ["timeout", "handled"]
        assert not loop.lanes_closed
        release.set_result(None)
        await settle()
        assert len(switch.traces) == 2

    loop.run_until_complete(main())


@pytest.mark.parametrize("waits", [False, True])
def test_a_failing_handler_is_reported_and_the_background_goes_on(
    loop: LaneLoop, clock: ManualClock, waits: bool
) -> None:
    observer = RecordingObserver()

    async def handle(found: Opportunity) -> None:
        if waits:
            await asyncio.sleep(0)
        raise ValueError("no route")

    async def main() -> None:
        switch = Switch(loop, clock, observers=[observer])
        await ready(switch, handle)
        switch.on_opportunity(opportunity(clock))
        await settle()
        assert switch.stats()["outcomes"] == {"failed": 1}

    loop.run_until_complete(main())

    assert observer.failures[0][:2] == ("arbitrage", "ValueError('no route')")
    assert not loop.lanes_closed


def test_a_cancelled_handler_opens_the_lanes(
    loop: LaneLoop, clock: ManualClock
) -> None:
    async def main() -> None:
        switch = Switch(loop, clock, max_park_s=60)
        task: list[asyncio.Task[None]] = []

        async def handle(found: Opportunity) -> None:
            current = asyncio.current_task()
            assert current is not None
            task.append(current)
            await asyncio.sleep(60)

        await ready(switch, handle)
        switch.on_opportunity(opportunity(clock))
        task[0].cancel()
        await settle()
        assert switch.stats()["outcomes"] == {"failed": 1}
        assert not loop.lanes_closed

    loop.run_until_complete(main())


def test_contexts_reach_the_store_after_the_first_step_unless_it_must_be_durable_before(
    loop: LaneLoop, clock: ManualClock
) -> None:
    async def main() -> None:
        order: list[str] = []

        async def save(batch: Batch) -> None:
            order.append("saved")

        def kept(batch: Batch) -> Awaitable[None]:
            order.append("handed over")
            return save(batch)

        async def handle(found: Opportunity) -> None:
            order.append("handler")

        for durability in ("async", "sync"):
            switch = Switch(
                loop, clock, snapshot=lambda: BATCH, save=kept, durability=durability
            )  # type: ignore[arg-type]
            await ready(switch, handle)
            switch.on_opportunity(opportunity(clock))
            await settle()

        assert order == [
            "handler",
            "handed over",
            "saved",
            "handed over",
            "saved",
            "handler",
        ]

    loop.run_until_complete(main())


def test_a_deadline_that_passes_during_the_fsync_makes_it_late(
    loop: LaneLoop, clock: ManualClock
) -> None:
    async def main() -> None:
        store, ran = SlowStore(), []

        async def handle(found: Opportunity) -> None:
            ran.append(1)

        switch = Switch(
            loop, clock, snapshot=lambda: BATCH, save=store.save, durability="sync"
        )
        await ready(switch, handle)
        switch.on_opportunity(opportunity(clock, deadline_s=0.1))
        clock.jump(0.2)
        store.pending[0].set_result(None)
        await settle()
        assert ran == []
        assert switch.stats()["outcomes"] == {"late": 1}

    loop.run_until_complete(main())


@pytest.mark.parametrize("durability", ["async", "sync"])
def test_a_store_that_fails_is_reported_and_stops_only_a_handler_that_counts_on_it(
    loop: LaneLoop, clock: ManualClock, durability: Any
) -> None:
    observer = RecordingObserver()

    async def main() -> tuple[list[int], Any]:
        store, ran = SlowStore(), []

        async def handle(found: Opportunity) -> None:
            ran.append(1)

        switch = Switch(
            loop,
            clock,
            snapshot=lambda: BATCH,
            save=store.save,
            durability=durability,
            observers=[observer],
        )
        await ready(switch, handle)
        switch.on_opportunity(opportunity(clock))
        store.pending[0].set_exception(OSError("disk full"))
        await settle()
        return ran, switch.stats()["outcomes"]

    ran, outcomes = loop.run_until_complete(main())

    assert (ran, outcomes) == (
        ([1], {"handled": 1}) if durability == "async" else ([], {"failed": 1})
    )
    assert ("switch", "OSError('disk full')") in [f[:2] for f in observer.failures]
    assert not loop.lanes_closed


def test_a_snapshot_or_hook_or_observer_that_raises_does_not_cost_the_opportunity(
    loop: LaneLoop, clock: ManualClock
) -> None:
    reports: list[dict[str, Any]] = []

    class Broken(RecordingObserver):
        def on_switch(self, trace: SwitchTrace) -> None:
            raise ValueError("broken observer")

    def fail() -> Any:
        raise ValueError("broken hook")

    def refuse(batch: Batch) -> Awaitable[None]:
        raise OSError("store is closed")

    async def main() -> list[int]:
        loop.set_exception_handler(lambda _, context: reports.append(context))
        ran: list[int] = []
        observer = Broken()

        async def handle(found: Opportunity) -> None:
            ran.append(found.edge_ppm)
            await asyncio.sleep(0)

        for options in (
            {"snapshot": fail, "park": fail, "resume": fail},
            {"snapshot": lambda: BATCH, "save": refuse},
            {"snapshot": lambda: BATCH},
        ):
            switch = Switch(loop, clock, observers=[observer], **options)
            await ready(switch, handle)
            switch.on_opportunity(opportunity(clock))
            await settle()
        assert [f[0] for f in observer.failures] == ["switch", "switch"]
        return ran

    assert loop.run_until_complete(main()) == [100, 100, 100]
    assert len(reports) == 5
    assert not loop.lanes_closed


def test_a_handler_nobody_set_or_that_was_removed_is_dropped_and_counted(
    loop: LaneLoop, clock: ManualClock
) -> None:
    async def main() -> None:
        switch = Switch(loop, clock)
        gate = loop.create_future()

        async def handle(found: Opportunity) -> None:
            await gate

        await ready(switch, handle)
        switch.on_opportunity(opportunity(clock, handler="unknown"))
        switch.on_opportunity(opportunity(clock))
        switch.on_opportunity(opportunity(clock))
        switch.remove_handler("arbitrage")
        switch.remove_handler("nobody")
        switch.on_opportunity(opportunity(clock))
        gate.set_result(None)
        await settle()
        assert switch.stats()["dropped"] == 3
        assert switch.stats()["outcomes"] == {"handled": 1}
        assert asyncio.all_tasks() == {asyncio.current_task()}

    loop.run_until_complete(main())


def test_a_handler_set_again_replaces_the_first(
    loop: LaneLoop, clock: ManualClock
) -> None:
    async def main() -> list[str]:
        switch, ran = Switch(loop, clock), []

        async def first(found: Opportunity) -> None:
            ran.append("first")

        async def second(found: Opportunity) -> None:
            ran.append("second")

        await ready(switch, first)
        await ready(switch, second)
        switch.on_opportunity(opportunity(clock))
        return ran

    assert loop.run_until_complete(main()) == ["second"]


def test_stopping_waits_for_the_handler_then_cancels_it_and_leaves_no_task(
    loop: LaneLoop, clock: ManualClock
) -> None:
    async def main() -> None:
        switch = Switch(loop, clock, max_park_s=60)
        ended: list[str] = []

        async def handle(found: Opportunity) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append("cancelled")

        await ready(switch, handle)
        switch.on_opportunity(opportunity(clock))
        switch.on_opportunity(opportunity(clock))
        await switch.stop(timeout_s=0.001)
        switch.on_opportunity(opportunity(clock))
        await settle()
        assert ended == ["cancelled"]
        assert switch.stats()["dropped"] == 2
        assert not loop.lanes_closed
        assert asyncio.all_tasks() == {asyncio.current_task()}

    loop.run_until_complete(main())


def test_percentiles_are_of_the_switches_that_reached_their_handler(
    loop: LaneLoop, clock: ManualClock
) -> None:
    async def handle(found: Opportunity) -> None:
        pass

    async def main() -> dict[str, Any]:
        switch = Switch(loop, clock)
        await ready(switch, handle)
        clock.jump(1)
        for us in range(1, 101):
            found = opportunity(clock)
            clock.jump(us / 1e6)
            switch.on_opportunity(found)
            await asyncio.sleep(0)
        return switch.stats()

    stats = loop.run_until_complete(main())

    assert (stats["switches"], stats["p50_us"], stats["p99_us"], stats["max_us"]) == (
        100,
        51.0,
        100.0,
        100.0,
    )
