"""The commit benchmark measures what it says, and every contender really saves."""

import json
from pathlib import Path

import pytest

from nightdesk.bench.commit import CONTENDERS, report, run


@pytest.mark.slow
def test_a_short_run_measures_every_contender(tmp_path: Path) -> None:
    result = run(5, 0.8, rounds=1, directory=tmp_path)

    assert set(result["contenders"]) == set(CONTENDERS)
    assert all(
        each["per_s"] > 0 and each["latency_us"]["n"] > 0
        for each in result["contenders"].values()
    )
    assert result["context_bytes"] == 1024
    assert result["stream_per_s"] > 0 and result["ratio"] > 0
    assert "apsw" in result["machine"]["versions"]
    assert list(tmp_path.iterdir()) == []
    json.dumps(result)
    assert "sqlite / fsync per file" in report(result)
