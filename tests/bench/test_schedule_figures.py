"""The scheduling benchmark runs every contender and counts what it says it counts."""

import pytest

from nightdesk.bench import schedule
from nightdesk.errors import CommandError


@pytest.mark.process
@pytest.mark.slow
def test_every_contender_is_measured_at_each_scale() -> None:
    pytest.importorskip("apscheduler")

    result = schedule.run(tasks=50, seconds=1.0, ladder=(20,), rounds=1)

    measured = [(r["contender"], r["tasks"]) for r in result["results"]]
    assert measured == [
        ("nightdesk", 50),
        ("sleep loops", 50),
        ("nightdesk", 20),
        ("apscheduler", 20),
    ]
    # How many depends on what else the machine does; that each was driven at all does not.
    assert all(r["runs"] > 0 for r in result["results"])
    assert "APScheduler" in schedule.report(result)


def test_the_capacity_is_the_largest_scale_that_kept_the_limit() -> None:
    def found(p99: float, share: float) -> dict[str, object]:
        return {"lag_ms": {"p99": p99}, "on_time_share": share}

    best = {
        ("a", 10): found(1.0, 1.0),
        ("a", 20): found(9.0, 0.999),
        ("a", 30): found(9.0, 0.9),
        ("a", 40): found(11.0, 1.0),
        ("b", 50): found(1.0, 1.0),
    }

    assert schedule._capacity(best, "a") == 20
    assert schedule._capacity(best, "c") == 0


@pytest.mark.process
def test_a_contender_that_fails_says_why() -> None:
    with pytest.raises(CommandError, match="KeyError: 'nobody'"):
        schedule._measure("nobody", 1, 0.1)
