"""The switch benchmark: its arithmetic, and one short run of each contender with real processes."""

import json

import pytest

from nightdesk.bench import switch
from nightdesk.bench._figures import figures, machine, stillness, table


def test_figures_are_nearest_ranks_with_their_sample_count() -> None:
    assert figures(range(1, 1001)) == {
        "n": 1000,
        "p50": 501,
        "p99": 991,
        "p99.9": 1000,
        "max": 1000,
    }
    assert figures([]) == {"n": 0}


def test_a_reader_learns_what_machine_it_was_and_how_still() -> None:
    assert {"cpus", "processor", "system", "versions", "load_average"} <= set(machine())
    assert set(stillness(0.001)) == {"lost_share", "worst_gap_us"}


def test_a_table_aligns_words_left_and_numbers_right() -> None:
    assert (
        table(("what", "us"), [("idle", 5.0), ("timers", 1234.5)])
        == "what    us\nidle        5.0\ntimers  1,234.5"
    )


def test_bars_compare_loads_with_idle_and_ours_with_plain_uvloop() -> None:
    def of(p50: float, tail: float) -> dict[str, dict[str, float]]:
        return {"sent_to_handler_us": {"p50": p50, "p99.9": tail}}

    bars = switch._bars(
        {
            "idle": {"nightdesk": of(50, 500)},
            "coroutines": {"nightdesk": of(90, 2_000), "uvloop": of(30_000, 60_000)},
        }
    )

    assert {b["bar"].split(",")[0]: b["reached"] for b in bars} == {
        "idle: p50 at most": True,
        "idle: p99.9 at most": True,
        "coroutines: p50 at most": True,
        "coroutines: p99.9 at most": False,
        "coroutines: p50 over idle p50 at most": True,
        "coroutines: times better than uvloop at p50": True,
    }


@pytest.mark.process
def test_a_short_run_measures_every_contender_and_prints_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        switch.main(["--events", "20", "--rounds", "1", "--load", "idle", "--json"])
        == 0
    )

    result = json.loads(capsys.readouterr().out)
    assert {
        name: r["sent_to_handler_us"]["n"]
        for name, r in result["loads"]["idle"].items()
    } == {
        "nightdesk": 20,
        "uvloop": 20,
        "asyncio": 20,
    }
    assert "times better" not in switch.report(result)
    assert "idle: p50 at most" in switch.report(result)


@pytest.mark.process
@pytest.mark.parametrize("load", ["pure", "timers"])
def test_a_hog_of_ours_runs_in_a_process_of_its_own_and_ends_with_the_run(
    load: str,
) -> None:
    result = switch.run(20, (load,), contenders=("nightdesk",), rounds=1)

    assert result["loads"][load]["nightdesk"]["received_to_handler_us"]["n"] == 20
