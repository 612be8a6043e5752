"""One judgement of the desk's health, with reasons an operator can act on."""

from typing import Any

import pytest

from nightdesk.telemetry.health import judge

WELL: dict[str, Any] = {
    "ready": True,
    "trading": {"state": "ACTIVE"},
    "switch": {"p999_us": 300.0},
}


def test_a_desk_that_trades_is_well() -> None:
    assert judge(WELL).level == "well"
    assert judge({}).level == "well"


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        (
            {"trading": {"state": "HALTED", "reason": "smoke", "actor": "me"}},
            "halted",
            "trading is HALTED by me: smoke",
        ),
        ({"ready": False}, "starting", "does not trade yet"),
        ({"orders": {"unknown": 2}}, "degraded", "2 orders with an unknown outcome"),
        (
            {"quarantined": [{"key": "sell"}]},
            "degraded",
            "1 saved records cannot be read (sell)",
        ),
        (
            {"tasks": {"by_status": {"quarantined": 3}}},
            "degraded",
            "3 tasks in quarantined",
        ),
        ({"switch": {"p999_us": 5000.0}}, "degraded", "5.0 ms (p99.9)"),
        ({"degraded": True}, "degraded", "stood still"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], level: str, words: str) -> None:
    health = judge({**WELL, **change})

    assert health.level == level
    assert any(words in reason for reason in health.reasons)
