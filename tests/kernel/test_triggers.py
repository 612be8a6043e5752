"""Schedules: what is refused and why, and the arithmetic of the calendar."""

import pytest

from fakes.scheduling import SECOND_NS, instant_ns
from nightdesk.errors import ConfigError
from nightdesk.kernel.hours import Calendars
from nightdesk.kernel.triggers import compile_trigger
from nightdesk.model.schedule import Schedule


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [
        (Schedule(), "names no trigger"),
        (Schedule(every_s=5, cron="* * * * *"), "names 2 triggers"),
        (Schedule(open_s=5, continuous=True), "names 2 triggers"),
        (Schedule(once=True, at="09:15"), "names 2 triggers"),
        (Schedule(every_s=0), "`every_s` is 0"),
        (Schedule(every_s=-1), "`every_s` is -1"),
        (Schedule(every_s=float("nan")), "`every_s` is nan"),
        (Schedule(every_s=float("inf")), "`every_s` is inf"),
        (Schedule(open_s=0.0001), "`open_s`"),
        (Schedule(every_s=1, closed_s=-4), "`closed_s`"),
        (Schedule(every_s=1, jitter_s=-1), "`jitter_s`"),
        (Schedule(every_s=1, jitter_s=float("nan")), "`jitter_s`"),
        (Schedule(every_s=1, timezone="Mars/Olympus"), "IANA"),
        (Schedule(every_s=1, timezone="../etc/passwd"), "IANA"),
        (Schedule(cron="61 * * * *"), "`cron`"),
        (Schedule(cron="* *"), "`cron`"),
        (Schedule(cron="0 0 30 2 *"), "`cron`"),
        (Schedule(at="25:00"), "`at`"),
        (Schedule(at="9"), "`at`"),
        (Schedule(at="09:15:61"), "`at`"),
        (Schedule(at="soon"), "`at`"),
        (Schedule(at="2026-13-01T09:15"), "`at`"),
        (Schedule(at="1900-01-01T09:15"), "`at`"),
    ],
)
def test_a_schedule_that_cannot_be_used_is_refused_with_the_reason(
    schedule: Schedule, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        compile_trigger(schedule, Calendars(), "task 'a'")

    assert str(error.value).startswith("task 'a': ")


def test_every_problem_is_listed_at_once() -> None:
    schedule = Schedule(every_s=-1, jitter_s=-1, cron="x", timezone="y")

    with pytest.raises(ConfigError) as error:
        compile_trigger(schedule, Calendars(), "task 'a'")

    assert len(error.value.problems) == 4


def test_a_phase_without_its_own_interval_takes_the_common_one() -> None:
    trigger = compile_trigger(Schedule(every_s=30, closed_s="pause"), Calendars(), "a")

    assert trigger.interval_ns("open") == 30 * SECOND_NS
    assert trigger.interval_ns("closed") == 0
    assert trigger.pauses == {"closed"}


def test_an_interval_for_one_phase_alone_means_rest_in_the_other() -> None:
    trigger = compile_trigger(Schedule(open_s=5), Calendars(), "a")

    assert trigger.kind == "every"
    assert trigger.pauses == {"closed"}


def test_a_cron_expression_of_six_fields_has_seconds() -> None:
    trigger = compile_trigger(Schedule(cron="*/10 * * * * *"), Calendars(), "a")
    start = instant_ns("2026-11-23T00:00:00+00:00")

    assert trigger.next_wall(start) == start + 10 * SECOND_NS
    assert trigger.following(start, start + 35 * SECOND_NS) == (
        start + 40 * SECOND_NS,
        3,
    )


def test_an_instant_without_zone_is_in_the_zone_of_the_schedule() -> None:
    trigger = compile_trigger(
        Schedule(at="2026-11-23T09:15:00", timezone="Asia/Kolkata"), Calendars(), "a"
    )

    assert trigger.next_wall(0) == instant_ns("2026-11-23T09:15:00+05:30")
    assert trigger.next_wall(instant_ns("2026-11-23T09:15:00+05:30")) is None
    assert trigger.following(0, 1) == (0, 0)


def test_too_many_missed_instants_are_not_counted_for_ever() -> None:
    trigger = compile_trigger(Schedule(cron="* * * * * *"), Calendars(), "a")
    now = instant_ns("2026-11-23T00:00:00+00:00")

    following, passed = trigger.following(now - 86_400 * SECOND_NS, now)

    assert passed == 1000
    assert following == now + 1
