"""The clock: wall time for calendars, the loop's own time for intervals."""

import asyncio

from fakes.clock import ManualClock
from nightdesk.kernel.clock import SystemClock
from nightdesk.kernel.loop import new_event_loop


def test_monotonic_time_is_the_time_the_loop_counts_by() -> None:
    clock = SystemClock()
    loop = new_event_loop()

    before, during, after = (
        clock.monotonic_ns(),
        loop.time() * 1e9,
        clock.monotonic_ns(),
    )
    loop.close()

    assert before - 1_000 <= during <= after + 1_000


def test_wall_time_is_utc_nanoseconds_since_1970() -> None:
    assert SystemClock().now_ns() > 1_700_000_000_000_000_000


async def test_sleeping_for_nothing_lets_others_run() -> None:
    ran: list[int] = []
    asyncio.get_running_loop().call_soon(ran.append, 1)

    await SystemClock().sleep(0)

    assert ran == [1]


async def test_sleepers_of_the_manual_clock_wake_in_order_and_see_their_own_instant() -> (
    None
):
    clock = ManualClock()
    seen: list[tuple[str, int]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        seen.append((name, clock.monotonic_ns()))

    tasks = [
        asyncio.create_task(sleeper(n, s))
        for n, s in (("late", 2.0), ("early", 1.0), ("never", 9.0))
    ]
    await asyncio.sleep(0)
    await clock.advance(3.0)

    assert seen == [("early", 1_000_000_000), ("late", 2_000_000_000)]
    tasks[2].cancel()
