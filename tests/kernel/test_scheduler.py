"""When tasks run, and that nothing bends the rules of it."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.scheduling import SECOND_NS, World, instant_ns
from nightdesk.errors import (
    CommandError,
    ConfigError,
    DuplicateTaskError,
    TaskCycleError,
    UnknownTaskError,
)
from nightdesk.kernel.hours import Calendar, Calendars
from nightdesk.kernel.runner import DONE
from nightdesk.model.priority import Priority
from nightdesk.model.schedule import Schedule

Make = Callable[..., World]


class FixedHours(Calendars):
    """A market that opens at 03:45 and closes at 10:00 UTC on Monday and Tuesday (NSE, in fact)."""

    def get(self, name: str) -> Calendar:
        if name == "24/7":
            return super().get(name)
        sessions = [
            ("2026-11-20T03:45", "2026-11-20T10:00"),
            ("2026-11-23T03:45", "2026-11-23T10:00"),
            ("2026-11-25T03:45", "2026-11-25T10:00"),
        ]
        changes = [
            instant_ns(f"{t}:00+00:00") // SECOND_NS for s in sessions for t in s
        ]
        return Calendar("NSE", "Asia/Kolkata", changes)


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


# --- Intervals --------------------------------------------------------------------------------------


def test_an_interval_runs_at_once_and_then_on_its_grid(world: World) -> None:
    world.add("a", every_s=5.0)

    world.play(21)

    assert world.times("a") == pytest.approx([0, 5, 10, 15, 20], abs=0.002)


def test_the_grid_does_not_drift_however_long_a_cycle_takes(world: World) -> None:
    world.add("a", lambda: asyncio.sleep(0.3), every_s=1.0)

    world.play(1000.5)

    assert world.times("a")[-1] == pytest.approx(1000, abs=0.002)
    assert world.count("a") == 1001


def test_ticks_that_pass_during_a_long_cycle_become_one_run_and_are_counted(
    world: World,
) -> None:
    world.add("a", lambda: asyncio.sleep(2.5), every_s=1.0)

    world.play(10)

    assert world.times("a") == pytest.approx([0, 3, 6, 9], abs=0.002)
    health = world.scheduler.health("a")
    assert (health.missed, health.overruns) == (6, 3)


def test_a_stall_of_the_loop_causes_no_burst(world: World) -> None:
    """SIGSTOP, a suspend, a blocking neighbour: the ticks of that time become one."""
    world.add("a", every_s=1.0)
    world.play(2.5)

    world.loop._now_ns += 60 * SECOND_NS
    world.play(2)

    assert world.count("a") == 3 + 1 + 2
    assert world.scheduler.health("a").missed == 59


def test_equal_intervals_are_spread_over_the_interval(world: World) -> None:
    for number in range(3200):
        world.add(f"t{number}", every_s=0.1)

    world.play(0.0995)

    together = Counter(round(seconds, 3) for _, seconds in world.runs)
    assert len(world.runs) == 3200
    assert set(together.values()) == {32}


def test_a_few_tasks_start_together(world: World) -> None:
    for number in range(16):
        world.add(f"t{number}", every_s=60.0)

    world.play(0.001)

    assert len(world.runs) == 16


def test_jitter_delays_each_run_but_not_the_grid(world: World) -> None:
    world.add("a", schedule=Schedule(every_s=10.0, jitter_s=2.0))

    world.play(1000)

    phases = [seconds % 10 for seconds in world.times("a")]
    assert world.count("a") == 100
    assert 0 <= min(phases) < 0.5 < 1.5 < max(phases) < 2.01


def test_the_delay_that_a_cycle_returns_goes_before_the_schedule(world: World) -> None:
    delays = iter([12.0, 0.5, None, None, None])

    async def body() -> float | None:
        return next(delays)

    world.add("a", body, every_s=5.0)

    world.play(21)

    assert world.times("a") == pytest.approx([0, 12, 12.5, 15, 20], abs=0.002)
    assert world.scheduler.health("a").missed == 0


def test_a_task_without_schedule_runs_again_after_the_delay_it_names(
    world: World,
) -> None:
    delays = iter([0.0, 0.25, None, 1.0, 100])

    async def body() -> float | None:
        return next(delays)

    world.add("a", body)

    world.play(10)

    assert world.times("a") == pytest.approx([0, 0, 0.25, 0.35, 1.35], abs=0.003)


def test_a_task_that_never_rests_does_not_stop_time(world: World) -> None:
    async def body() -> float:
        return 0.0

    world.add("spins", body)
    world.add("other", every_s=0.5)

    world.play(1.1)

    assert world.count("other") == 3
    assert world.count("spins") > 1000


@pytest.mark.parametrize("delay", [-1.0, math.nan, 1e30])
def test_a_nonsensical_delay_means_at_once(world: World, delay: float) -> None:
    delays = iter([delay])

    async def body() -> Any:
        return next(delays, DONE)

    world.add("a", body)

    world.play(1)

    assert world.count("a") == 2


@pytest.mark.parametrize("value", ["text", True, {"rows": 3}])
def test_a_result_that_is_no_delay_is_ignored(world: World, value: Any) -> None:
    """Plain functions return what they like."""

    async def body() -> Any:
        return value

    world.add("a", body, every_s=1.0)
    world.add("once", body, schedule=Schedule(once=True))

    world.play(2.5)

    assert world.count("a") == 3
    assert world.scheduler.health("once").status == "completed"


def test_continuous_tasks_use_spare_time_and_starve_nobody(world: World) -> None:
    async def one_ms() -> None:
        world.loop._now_ns += 1_000_000

    world.add("spare", one_ms, schedule=Schedule(continuous=True))
    world.add("empty", schedule=Schedule(continuous=True))
    world.add("normal", every_s=0.1)

    world.play(1.05)

    assert world.count("normal") == 11
    assert world.count("spare") > 300
    assert world.count("empty") > 300


# --- Once, at, cron, events ------------------------------------------------------------------------


def test_once_runs_once_and_is_completed(world: World) -> None:
    world.add("a", schedule=Schedule(once=True))

    world.play(100)

    assert world.count("a") == 1
    assert world.scheduler.health("a").status == "completed"
    assert [task_id for task_id, _ in world.changes] == ["a"]


def test_done_ends_a_task_and_tells_whoever_waits_for_it(world: World) -> None:
    finals = []

    async def body() -> Any:
        return DONE if world.count("a") == 3 else None

    world.add("a", body, every_s=1.0, on_final=finals.append)

    world.play(10)

    assert world.count("a") == 3
    assert [health.status for health in finals] == ["completed"]


def test_cron_follows_the_wall_clock_of_its_timezone(make: Make) -> None:
    world = make("2026-11-23T03:40:00+00:00")
    world.add("a", schedule=Schedule(cron="15 9 * * 1-5", timezone="Asia/Kolkata"))

    world.play(25 * 3600)

    assert world.times("a") == pytest.approx([300, 300 + 86400], abs=0.002)


@pytest.mark.parametrize(
    ("start", "expected_hours"),
    [
        ("2026-03-28T12:00:00+00:00", [13.0, 36.5]),  # 02:30 does not exist: 03:00
        ("2026-10-24T12:00:00+00:00", [12.5, 37.5]),  # 02:30 comes twice: once
    ],
)
def test_a_daily_job_runs_once_when_clocks_change(
    make: Make, start: str, expected_hours: list[float]
) -> None:
    world = make(start)
    world.add("a", schedule=Schedule(at="02:30", timezone="Europe/Berlin"))

    world.play(40 * 3600)

    assert [round(s / 3600, 3) for s in world.times("a")] == expected_hours


def test_at_with_seconds_is_kept_to_the_second(make: Make) -> None:
    world = make("2026-11-23T09:00:00+00:00")
    world.add("a", schedule=Schedule(at="09:00:07"))

    world.play(86_400 + 8)

    assert world.times("a") == pytest.approx([7, 86_407], abs=0.002)


def test_an_instant_runs_once(make: Make) -> None:
    world = make("2026-11-23T00:00:00+00:00")
    world.add("a", schedule=Schedule(at="2026-11-23T09:15:00+05:30"))
    world.add("late", schedule=Schedule(at="2026-11-22T09:15:00"))

    world.play(86_400)

    assert world.times("a") == pytest.approx([3.75 * 3600], abs=0.002)
    assert world.scheduler.health("a").status == "completed"
    assert world.count("late") == 0
    assert "had passed" in world.scheduler.next_run_in_words("late")


def test_an_event_type_wakes_the_tasks_that_name_it(world: World) -> None:
    world.add("candles", schedule=Schedule(on=("CandleClosed",)))
    world.add("both", schedule=Schedule(on=("CandleClosed",), every_s=100))
    world.add("fills", schedule=Schedule(on=("OrderFilled",)))
    world.play(1)

    reached = world.scheduler.on_event_type("CandleClosed")
    world.play(1)

    assert reached == 2
    assert (world.count("candles"), world.count("both"), world.count("fills")) == (
        1,
        2,
        0,
    )
    assert world.scheduler.on_event_type("Nothing") == 0
    assert world.scheduler.next_run_in_words("candles") == "on CandleClosed"


def test_wakes_during_a_run_become_one_more_run(world: World) -> None:
    world.add("a", lambda: asyncio.sleep(1), schedule=Schedule(on=("X",)))
    world.play(0.5)

    for _ in range(10):
        world.scheduler.wake("a")
    world.play(0.5)
    for _ in range(10):
        world.scheduler.wake("a")
    world.play(5)

    assert world.times("a") == pytest.approx([0.5, 1.5])
    assert world.overlaps == []


# --- The wall clock is set ----------------------------------------------------------------------------


@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_setting_the_clock_causes_no_burst_and_no_silence(
    make: Make, jump_s: float
) -> None:
    world = make("2026-11-23T09:30:00+00:00")
    world.add("minutely", schedule=Schedule(cron="* * * * *"))
    world.add("interval", every_s=60.0)
    world.play(1800)

    world.clock.jump(jump_s)
    world.play(1800)

    assert abs(world.count("minutely") - 60) <= 2
    assert world.count("interval") in (60, 61)
    gaps = [b - a for a, b in pairwise(world.times("minutely"))]
    assert max(gaps) <= 125


def test_a_daily_job_is_not_run_twice_when_the_clock_is_set_back(make: Make) -> None:
    world = make("2026-11-23T09:30:00+00:00")
    world.add("daily", schedule=Schedule(at="10:00"))
    world.play(2400)

    world.clock.jump(-3600)
    world.play(90_000)

    assert world.count("daily") == 2
    first, second = world.times("daily")
    assert second - first == pytest.approx(
        90_000, abs=10
    )  # 10:00 of the next day, as it is now


def test_a_daily_job_that_a_jump_passed_over_runs_at_once_and_once(make: Make) -> None:
    world = make("2026-11-23T09:30:00+00:00")
    world.add("daily", schedule=Schedule(at="10:00"))
    world.play(60)

    world.clock.jump(3600)
    world.play(60)
    world.clock.jump(-3600)
    world.play(7200)

    assert world.count("daily") == 1
    assert world.times("daily")[0] <= 66


# --- Sessions -------------------------------------------------------------------------------------------


def test_the_interval_changes_with_the_session_at_once(make: Make) -> None:
    world = make("2026-11-23T03:44:00+00:00", calendars=FixedHours())
    hours = {"calendar": "NSE"}
    world.add("watch", schedule=Schedule(open_s=5.0, closed_s=60.0, **hours))
    world.add("news", schedule=Schedule(open_s=60.0, closed_s="pause", **hours))

    world.play(59)
    assert (world.count("watch"), world.count("news")) == (1, 0)
    assert world.scheduler.health("news").status == "paused"
    assert world.scheduler.next_run_in_words("news") == "paused until Mon 09:15 IST"
    world.play(2)
    assert world.times("watch")[-1] == pytest.approx(60, abs=0.002)
    assert world.times("news") == pytest.approx([60], abs=0.01)
    world.play(5)
    assert world.times("watch")[-1] == pytest.approx(65, abs=0.002)

    world.play(6.25 * 3600)

    closing = 60 + 6.25 * 3600
    assert world.times("news")[-1] == pytest.approx(closing - 60, abs=0.01)
    assert [t for t in world.times("watch") if t > closing - 1] == pytest.approx(
        [closing], abs=0.01
    )
    assert world.scheduler.next_run_in_words("news") == "paused until Wed 09:15 IST"


def test_a_closed_market_silences_event_types_but_not_a_wake(make: Make) -> None:
    world = make("2026-11-23T02:00:00+00:00", calendars=FixedHours())
    schedule = Schedule(on=("X",), calendar="NSE", closed_s="pause")
    world.add("a", schedule=schedule)
    world.play(1)

    world.scheduler.on_event_type("X")
    world.play(1)
    assert world.count("a") == 0

    world.scheduler.wake("a")
    world.play(1)
    assert world.count("a") == 1


def test_continuous_and_cron_tasks_rest_while_their_market_is_closed(
    make: Make,
) -> None:
    world = make("2026-11-23T03:44:59+00:00", calendars=FixedHours())
    rest = {"calendar": "NSE", "closed_s": "pause"}
    world.add("spare", schedule=Schedule(continuous=True, **rest))
    world.add("minutely", schedule=Schedule(cron="* * * * *", **rest))

    world.play(0.9)
    assert world.count("spare") == 0
    world.play(3)

    assert world.count("spare") > 1000
    assert world.times("minutely") == pytest.approx([1], abs=0.002)


def test_the_end_of_the_known_holidays_is_told_in_time(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    class Ending(FixedHours):
        def get(self, name: str) -> Calendar:
            horizon_s = instant_ns("2026-12-26T00:00:00+05:30") // SECOND_NS
            return Calendar("NSE", "Asia/Kolkata", [], horizon_s)

    world = make("2026-11-23T09:00:00+00:00", calendars=Ending())
    world.add("a", schedule=Schedule(open_s=1.0, calendar="NSE"))
    world.add("b", schedule=Schedule(open_s=1.0, calendar="NSE"))

    world.play(1)

    assert caplog.text.count("no holiday is known after 2026-12-25") == 1


def test_a_restart_waits_for_the_market_to_open(make: Make) -> None:
    world = make("2026-11-23T09:59:57+00:00", calendars=FixedHours())

    async def body() -> None:
        raise ValueError("x")

    schedule = Schedule(open_s=1.0, closed_s="pause", calendar="NSE")
    world.add("a", body, schedule=schedule)
    world.play(3600)

    assert world.count("a") == 2
    assert "paused until Wed" in world.scheduler.next_run_in_words("a")


def test_a_market_that_opens_no_more_is_said_so(make: Make) -> None:
    world = make("2026-11-28T00:00:00+00:00", calendars=FixedHours())
    world.add("a", schedule=Schedule(open_s=5.0, calendar="NSE"))

    world.play(1)

    assert world.scheduler.next_run_in_words("a") == "paused: its market opens no more"


# --- Dependencies ------------------------------------------------------------------------------------------


def test_a_task_waits_for_a_run_of_each_task_it_comes_after(world: World) -> None:
    world.add("candles", lambda: asyncio.sleep(0.5), every_s=10.0)
    world.add("regime", lambda: asyncio.sleep(2), every_s=20.0)
    world.add("signals", every_s=1.0, after=("candles", "regime"))

    world.play(1)
    assert world.scheduler.next_run_in_words("signals") == "waits for a run of regime"
    world.play(60)

    assert world.times("signals") == pytest.approx([2, 22, 42], abs=0.01)


def test_a_failed_run_is_not_waited_for_with_success(world: World) -> None:
    async def body() -> None:
        if world.count("first") < 3:
            raise RuntimeError("not yet")

    world.add("first", body, every_s=100.0)
    world.add("second", every_s=1.0, after=("first",))

    world.play(10)

    assert len(world.times("second")) == 1
    assert world.times("second")[0] >= world.times("first")[2]


def test_a_completed_or_removed_task_holds_nobody_up(world: World) -> None:
    world.add("load", schedule=Schedule(once=True))
    world.add("gone", schedule=Schedule(on=("X",)))
    world.add("a", every_s=1.0, after=("load",))
    world.add("b", every_s=1.0, after=("gone",))
    world.play(5.5)
    assert (world.count("a"), world.count("b")) == (6, 0)

    world.do(world.scheduler.remove("gone"))
    world.play(1)

    assert world.count("b") >= 1


def test_a_circle_is_refused_by_name(world: World) -> None:
    world.add("a", every_s=1.0, after=("c",))
    world.add("b", every_s=1.0, after=("a",))

    with pytest.raises(TaskCycleError, match="c -> b -> a -> c"):
        world.add("c", every_s=1.0, after=("b",))


def test_waiting_for_an_unknown_task_is_refused_at_the_start(world: World) -> None:
    world.add("a", every_s=1.0, after=("candels",))
    world.add("candles", every_s=1.0)

    with pytest.raises(UnknownTaskError, match="Did you mean 'candles'"):
        world.play(1)


# --- Commands ------------------------------------------------------------------------------------------------


def test_pause_lets_the_cycle_end_and_resume_goes_on(world: World) -> None:
    ended = []

    async def body() -> None:
        await asyncio.sleep(0.5)
        ended.append(world.now_s)

    world.add("a", body, every_s=1.0)
    world.play(2.2)

    world.scheduler.pause("a", "the venue is down")
    world.play(10)
    assert ended == pytest.approx([0.5, 1.5, 2.5], abs=0.01)
    assert world.scheduler.next_run_in_words("a") == "paused: the venue is down"

    world.scheduler.resume("a")
    world.play(1.1)
    assert world.times("a")[3:] == pytest.approx([12.2, 13.2], abs=0.01)
    assert [health.status for _, health in world.changes] == ["paused", "waiting"]


def test_stop_cancels_the_cycle_and_start_begins_anew(world: World) -> None:
    world.add("a", lambda: asyncio.sleep(100), group="g")
    world.play(1)

    world.scheduler.stop_task("a")
    world.play(1)
    assert world.under_way["a"] == 0
    assert world.scheduler.health("a").status == "stopped"
    assert world.scheduler.health("a").errors == 0

    assert world.scheduler.start_all("g") == ["a"]
    world.play(1)
    assert world.count("a") == 2
    assert world.scheduler.stop_all() == ["a"]


def test_trigger_runs_a_task_now_and_leaves_its_grid_alone(world: World) -> None:
    world.add("a", every_s=10.0)
    world.play(3)

    world.scheduler.trigger("a")
    world.play(8)

    assert world.times("a") == pytest.approx([0, 3, 10], abs=0.01)


def test_trigger_cuts_a_backoff_short(world: World) -> None:
    async def body() -> None:
        if world.count("a") < 5:
            raise ValueError("x")

    world.add("a", body, schedule=Schedule(cron="0 0 1 1 *"))
    world.play(1)
    for _ in range(5):
        world.scheduler.trigger("a")
        world.play(0.1)

    assert world.count("a") == 5
    assert world.scheduler.health("a").status == "waiting"


def test_trigger_refuses_what_is_set_aside(world: World) -> None:
    world.add("a", every_s=10.0)
    world.play(1)
    world.scheduler.pause("a")

    with pytest.raises(CommandError, match="is paused"):
        world.scheduler.trigger("a")


def test_what_was_quarantined_or_paused_stays_so_after_a_restart(world: World) -> None:
    world.add("bad", every_s=1.0, status="quarantined")
    world.add("held", every_s=1.0, status="paused")
    world.add("good", every_s=1.0, status="waiting")

    world.play(2.5)
    assert (world.count("bad"), world.count("held"), world.count("good")) == (0, 0, 3)

    world.scheduler.resume("bad")
    world.play(1)
    assert world.count("bad") == 1 or world.count("bad") == 2


def test_a_restored_health_keeps_its_reason(make: Make) -> None:
    first = make()
    first.add("a", every_s=1.0)
    first.play(1)
    first.scheduler.pause("a", "waiting for Bob")

    second = make()
    second.add("a", every_s=1.0, status=first.changes[-1][1])
    second.play(1)

    assert second.scheduler.next_run_in_words("a") == "paused: waiting for Bob"


def test_an_event_that_comes_while_a_task_is_paused_is_not_lost(world: World) -> None:
    world.add("a", schedule=Schedule(on=("X",)))
    world.play(1)
    world.scheduler.pause("a")

    world.scheduler.wake("a")
    world.play(1)
    assert world.count("a") == 0

    world.scheduler.resume("a")
    world.play(1)
    assert world.count("a") == 1


def test_adjust_changes_the_interval_at_once(world: World) -> None:
    world.add("a", every_s=100.0)
    world.play(10)

    world.scheduler.adjust(
        "a", schedule=Schedule(every_s=1.0), priority="critical", timeout_s=3.0
    )
    world.play(2.5)

    assert world.times("a") == pytest.approx([0, 10, 11, 12], abs=0.01)
    assert world.scheduler.health("a").priority == "critical"


def test_a_bad_adjustment_leaves_the_old_schedule(world: World) -> None:
    world.add("a", every_s=1.0)
    world.play(1.5)

    with pytest.raises(ConfigError, match="every_s"):
        world.scheduler.adjust("a", schedule=Schedule(every_s=-1))
    with pytest.raises(ValueError, match="no priority"):
        world.scheduler.adjust("a", priority="urgent")
    world.play(2)

    assert world.count("a") == 4


def test_tasks_may_come_and_go_while_others_run(world: World) -> None:
    world.add("a", lambda: asyncio.sleep(0.7), every_s=1.0)
    world.play(1.2)

    world.add("b", every_s=1.0)
    removed = world.do(world.scheduler.remove("a"))
    world.play(2)

    assert removed
    assert (world.count("a"), world.count("b")) == (2, 3)
    assert not world.scheduler.knows("a")
    assert world.scheduler.task_count == 1


def test_a_task_added_later_must_come_after_tasks_that_exist(world: World) -> None:
    world.add("a", every_s=1.0)
    world.play(1)

    with pytest.raises(UnknownTaskError, match="no task 'b'"):
        world.add("c", every_s=1.0, after=("b",))
    world.add("d", every_s=1.0, after=("a",))
    world.play(2)
    world.do(world.scheduler.remove("d"))

    assert not world.scheduler.knows("c")
    assert world.scheduler._entries["a"].dependents == []


def test_adjusting_a_task_that_waits_for_its_turn_loses_nothing(make: Make) -> None:
    world = make(max_concurrent=1)
    world.add("slow", lambda: asyncio.sleep(5), schedule=Schedule(once=True))
    world.add("a", schedule=Schedule(on=("X",)))
    world.play(1)
    world.scheduler.wake("a")
    assert world.scheduler.next_run_in_words("a") == "waits for its turn"

    world.scheduler.adjust("a", priority="critical")
    world.play(10)

    assert world.count("a") == 1


def test_unknown_and_duplicate_ids_are_refused(world: World) -> None:
    world.add("candles", every_s=1.0)

    with pytest.raises(DuplicateTaskError):
        world.add("candles", every_s=1.0)
    with pytest.raises(UnknownTaskError, match="Did you mean 'candles'"):
        world.scheduler.pause("candle")
    with pytest.raises(UnknownTaskError):
        world.scheduler.wake("x")
    with pytest.raises(UnknownTaskError):
        world.scheduler.health("x")


# --- Health -----------------------------------------------------------------------------------------------------


def test_health_says_what_happened_and_what_comes(make: Make) -> None:
    world = make("2026-11-23T09:00:00+00:00")
    world.add("a", lambda: asyncio.sleep(0.25), every_s=10.0, priority=Priority.HIGH)
    world.add("daily", schedule=Schedule(at="22:00"))
    world.add("hour", schedule=Schedule(at="10:00"))
    world.play(15)

    health = world.scheduler.health("a")
    assert (health.runs, health.errors, health.status) == (2, 0, "waiting")
    assert health.duration_p50_s == pytest.approx(0.25, abs=0.01)
    assert health.last_run_ns == instant_ns("2026-11-23T09:00:10+00:00")
    assert health.next_run_ns == instant_ns("2026-11-23T09:00:20+00:00")
    assert health.why == "in 5.0 s"
    assert world.scheduler.next_run_in_words("daily") == "Mon 22:00 UTC"
    assert world.scheduler.next_run_in_words("hour") == "in 60 min"
    assert [h.task_id for h in world.scheduler.health_all()] == ["a", "daily", "hour"]
    assert world.scheduler.stats()["runs"] == 2


def test_the_figures_of_a_task_are_those_of_its_last_runs(world: World) -> None:
    world.add(
        "a", lambda: asyncio.sleep(0.5 if world.count("a") < 100 else 0.1), every_s=1.0
    )

    world.play(200)

    assert world.scheduler.health("a").duration_p99_s == pytest.approx(0.1, abs=0.01)


# --- Properties ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    interval_ms=st.integers(1, 3000),
    durations_ms=st.lists(st.integers(0, 5000), min_size=1, max_size=20),
    wakes_ms=st.lists(st.integers(0, 20_000), max_size=20),
    seed=st.integers(0, 1000),
)
def test_every_tick_runs_or_is_counted_as_coalesced(
    interval_ms: int, durations_ms: list[int], wakes_ms: list[int], seed: int
) -> None:
    """No tick is lost beyond coalescing, no two cycles of one task overlap, and the grid does not drift."""
    world = World(seed=seed)
    ticks = []

    async def body() -> None:
        ticks.append(world.now_s)
        await asyncio.sleep(durations_ms[len(ticks) % len(durations_ms)] / 1000)

    world.add("a", body, every_s=interval_ms / 1000)

    async def script() -> None:
        for wake in wakes_ms:
            world.loop.call_later(wake / 1000, world.scheduler.wake, "a")
        await asyncio.sleep(20)
        world.scheduler.pause("a")
        await asyncio.sleep(6)

    world.do(script())
    entry = world.scheduler._entries["a"]
    world.close()

    assert world.overlaps == []
    if not wakes_ms:
        on_grid = [
            abs(t * 1000 / interval_ms - round(t * 1000 / interval_ms)) for t in ticks
        ]
        assert max(on_grid) * interval_ms <= 1.1
        passed = entry.grid_ns // (interval_ms * 1_000_000)
        assert abs(entry.runs + entry.missed - passed) <= 1
    # A task is never left behind: from any moment, the next run starts within interval + its duration.
    gaps = [b - a for a, b in pairwise(ticks)]
    assert all(gap <= 5 + interval_ms / 1000 + 0.01 for gap in gaps)


@settings(max_examples=30, deadline=None)
@given(
    tasks=st.lists(
        st.tuples(
            st.integers(20, 400),  # interval in ms
            st.integers(0, 300),  # duration in ms
            st.sets(st.sampled_from("wxyz"), max_size=3),
            st.sampled_from(list(Priority)),
            st.sampled_from(["good", "raises", "slow"]),
        ),
        min_size=1,
        max_size=12,
    ),
    slots=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_keys_never_overlap_and_nothing_deadlocks(
    tasks: list[tuple[int, int, set[str], Priority, str]], slots: int, seed: int
) -> None:
    """Whatever raises, is cancelled or times out: keys are free afterwards and everybody gets on."""
    world = World(seed=seed, max_concurrent=slots)
    holders: dict[str, str] = {}
    clashes: list[str] = []
    most = 0

    def body_of(name: str, duration: int, keys: set[str], kind: str) -> Any:
        async def body() -> None:
            nonlocal most
            clashes.extend(key for key in keys if key in holders)
            holders.update(dict.fromkeys(keys, name))
            most = max(most, sum(world.under_way.values()))
            try:
                await asyncio.sleep(60 if kind == "slow" else duration / 1000)
                if kind == "raises":
                    raise ValueError(name)
            finally:
                for key in keys:
                    holders.pop(key, None)

        return body

    for number, (interval, duration, keys, priority, kind) in enumerate(tasks):
        world.add(
            f"t{number}",
            body_of(f"t{number}", duration, keys, kind),
            every_s=interval / 1000,
            keys=tuple(keys),
            priority=priority,
            timeout_s=0.4 if kind == "slow" else None,
        )

    world.play(10)
    # Quiet the others down and see that each can still run.
    for number in range(len(tasks)):
        world.scheduler.stop_task(f"t{number}")
    world.play(5)
    before = dict(world.under_way)
    counts = {n: world.count(f"t{n}") for n in range(len(tasks))}
    for number in range(len(tasks)):
        world.scheduler.start_task(f"t{number}")
    world.play(20)
    after = {n: world.count(f"t{n}") for n in range(len(tasks))}
    keys_left = world.scheduler._runner.keys
    for number in range(len(tasks)):
        world.scheduler.stop_task(f"t{number}")
    world.play(1)
    held = keys_left.held
    world.close()

    assert clashes == []
    assert world.overlaps == []
    assert most <= slots
    assert not any(before.values())
    assert held == 0
    top = min(priority.rank for _, _, _, priority, _ in tasks)
    assert all(
        after[n] > counts[n]
        for n, (_, _, _, priority, _) in enumerate(tasks)
        if priority.rank == top
    )
