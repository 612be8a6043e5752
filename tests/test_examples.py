"""The examples run as they are; those in the form of the designs differ from them in their import lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.process


def run(tmp_path: Path, script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_design_001_custom_task_with_its_own_states(tmp_path: Path) -> None:
    assert "filled 0.5" in run(tmp_path, "custom_task.py")


def test_design_001_executes_recovers_and_counts(tmp_path: Path) -> None:
    """A few seconds only: what is not finished stays active, and the last part finds it."""
    output = run(tmp_path, "execution_tasks.py", "4")

    assert "IcebergTask_BTCUSDT" in output
    assert "DeltaNeutralTask_ETHUSDT" in output
    kept = output[output.index("kept:") :]
    assert "'errored': 0" in kept


def test_design_003_market_hours_and_cache(tmp_path: Path) -> None:
    pytest.importorskip(
        "pandas_market_calendars", reason="market hours need the extra 'markets'"
    )

    output = run(tmp_path, "market_hours.py", "2")

    assert "started 4 tasks" in output
    assert "market_monitoring: waiting, 1 runs" in output
    assert "requests for quotes 1" in output, "two tasks asked, one request went out"


def test_design_004_refuses_an_empty_manager_and_runs_a_full_one(
    tmp_path: Path,
) -> None:
    output = run(tmp_path, "registration.py", "1.5")

    assert "refused: BackgroundTaskManager: `tasks` lists 0 entries" in output
    assert "started 3 tasks" in output
    assert "signal_generation: backoff" in output


def test_a_task_of_ones_own_runs_from_one_file_and_remembers(tmp_path: Path) -> None:
    desk = tmp_path / "desk"
    desk.mkdir()
    for file in (ROOT / "examples" / "own_task").iterdir():
        if file.is_file():
            (desk / file.name).write_text(file.read_text())
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "nightdesk",
            "run",
            "-c",
            str(desk / "desk.yaml"),
            "--no-console",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=7)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0, output
    exported = subprocess.run(
        [
            sys.executable,
            "-m",
            "nightdesk",
            "state",
            "export",
            "--state",
            "state/own-task",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert '"prices":["' in exported.stdout.replace(" ", ""), (
        exported.stdout + exported.stderr + output
    )
