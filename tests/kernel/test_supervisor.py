"""Failure: restarts, quarantine, escalation, and no flood of logs."""

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from fakes.scheduling import SECOND_NS, World
from nightdesk.abc import Observer
from nightdesk.kernel.supervisor import StormFilter, Supervisor, describe

Make = Callable[..., World]


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


async def poison() -> None:
    raise ValueError("bad record")


def test_a_task_that_always_raises_starts_at_most_eight_times_in_two_minutes(
    world: World,
) -> None:
    world.add("poison", poison, every_s=0.1)

    world.play(120)

    assert 5 <= world.count("poison") <= 8


def test_backoff_doubles(world: World) -> None:
    world.add("poison", poison, every_s=0.1)

    world.play(70)

    times = world.times("poison")
    gaps = [b - a for a, b in pairwise(times)]
    expected = [1, 2, 4, 8, 16, 32]
    assert all(
        want <= gap <= want * 1.1 + 0.01
        for gap, want in zip(gaps, expected, strict=False)
    )


def test_who_goes_on_failing_is_quarantined_until_somebody_resumes_it(
    world: World,
) -> None:
    world.add("poison", poison, every_s=0.1)
    world.play(600)

    health = world.scheduler.health("poison")
    assert health.status == "quarantined"
    assert "8 failures within" in health.why
    assert "ValueError: bad record" in health.why
    assert "nightdesk tasks resume poison" in health.why
    assert health.restarts == 7
    assert world.changes[-1][1].status == "quarantined"
    runs = world.count("poison")
    world.scheduler.wake("poison")
    world.play(600)
    assert world.count("poison") == runs

    world.scheduler.resume("poison")
    world.play(0.5)
    assert world.count("poison") == runs + 1
    assert world.scheduler.health("poison").status == "backoff"


def test_an_outage_is_survived(world: World) -> None:
    async def body() -> None:
        if 100 < world.now_s < 160:
            raise ConnectionError("venue down")

    world.add("a", body, every_s=5.0)
    world.play(400)

    health = world.scheduler.health("a")
    assert health.status == "waiting"
    assert health.runs - health.errors > 50


def test_rare_failures_among_good_runs_do_not_add_up_to_a_quarantine(
    world: World,
) -> None:
    async def body() -> None:
        if world.count("a") % 20 == 0:
            raise ConnectionError("hiccup")

    world.add("a", body, every_s=1.0)
    world.play(1200)

    health = world.scheduler.health("a")
    assert health.errors > 50
    assert health.status != "quarantined"


def test_a_task_that_fails_every_other_time_is_quarantined(world: World) -> None:
    async def body() -> None:
        if world.count("a") % 2 == 0:
            raise ValueError("flapping")

    world.add("a", body, every_s=1.0)
    world.play(120)

    assert world.scheduler.health("a").status == "quarantined"


def test_a_bad_task_harms_only_itself(world: World) -> None:
    async def blocks() -> None:
        world.loop._now_ns += 2 * SECOND_NS

    world.add("poison", poison, every_s=0.1)
    world.add("blocks", blocks, every_s=300.0)
    world.add("good", every_s=1.0)
    world.play(100.5)

    assert world.count("good") >= 98
    assert world.scheduler.health("blocks").overruns == 1


def test_a_group_is_paused_when_enough_of_it_is_quarantined(make: Make) -> None:
    world = make(escalate_after=2)
    world.add("p1", poison, every_s=1.0, group="data")
    world.add("p2", poison, every_s=1.0, group="data")
    world.add("good", every_s=1.0, group="data")
    world.add("elsewhere", every_s=1.0, group="other")
    world.play(300)

    assert world.scheduler.health("good").status == "paused"
    assert "group data: 2 of its tasks" in world.scheduler.health("good").why
    assert world.scheduler.health("elsewhere").status == "waiting"


def test_observers_hear_every_failure_and_what_follows(world: World) -> None:
    world.add("poison", poison, every_s=1.0)
    world.play(600)

    consequences = [text for _, text in world.observer.failures]
    assert len(consequences) == 8
    assert consequences[0].startswith("restart in 1.")
    assert consequences[-1].startswith("quarantined: ")
    assert len(world.observer.steps) == 8


def test_a_broken_observer_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Observer):
        def on_task_failed(self, *args: Any) -> None:
            raise RuntimeError("observer")

    supervisor = Supervisor(random=random.Random(1), observers=[Broken()])

    _, verdict = supervisor.answer("a", "t", None, ValueError("x"), now_ns=0, runs=1)

    assert not verdict.quarantined
    assert "observer Broken failed" in caplog.text


def test_a_storm_of_failures_does_not_flood_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    for number in range(200):
        world.add(f"p{number}", poison, every_s=1.0)

    world.play(60)

    lines = [r for r in caplog.records if "failed" in r.getMessage()]
    assert sum(world.count(f"p{n}") for n in range(200)) > 1000
    assert len(lines) <= 12
    assert "(1024 times by now)" in lines[-1].getMessage()


def test_the_filter_lets_powers_of_two_pass_and_forgets_after_quiet() -> None:
    storms = StormFilter(quiet_s=10)

    passed = [n for n in range(20) if storms.passes("x", n)]

    assert [n + 1 for n in passed] == [1, 2, 4, 8, 16]
    assert storms.passes("y", 20) == 1
    assert storms.passes("x", 20 + 11 * SECOND_NS) == 1


def test_the_filter_is_bounded() -> None:
    storms = StormFilter()

    for number in range(20_000):
        storms.passes(str(number), number)

    assert len(storms._seen) == 10_000


def test_an_error_becomes_one_bounded_line() -> None:
    assert describe(ValueError("a\n  b")) == "ValueError: a b"
    assert describe(ValueError()) == "ValueError"
    assert len(describe(ValueError("x" * 10_000))) == 500


def test_a_pause_during_a_failing_cycle_stays_a_pause(world: World) -> None:
    async def body() -> None:
        await asyncio.sleep(1)
        raise ValueError("x")

    world.add("a", body, every_s=5.0)
    world.play(0.5)
    world.scheduler.pause("a")
    world.play(10)

    assert world.scheduler.health("a").status == "paused"
    assert world.scheduler.health("a").errors == 1
    assert world.count("a") == 1


def test_failures_in_a_host_that_is_gone_count_towards_quarantine() -> None:
    supervisor = Supervisor(random=random.Random(1))
    failures = supervisor.remember(7, 0)

    _, verdict = supervisor.answer(
        "poison", "own", failures, ValueError("bad record"), now_ns=SECOND_NS, runs=1
    )

    assert verdict.quarantined


def test_a_task_that_never_failed_brings_nothing_with_it() -> None:
    assert Supervisor(random=random.Random(1)).remember(0, 0) is None
