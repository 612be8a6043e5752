"""The quick part of `bad_neighbours.py`: offenders are named by `status`, and the others do not suffer."""

from pathlib import Path

import pytest

from fakes.running import RunningDesk, until

TASKS = """
import asyncio


async def harmless():
    pass


async def raises():
    raise RuntimeError("as always")


async def swallows():
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass
"""
DESK = """
name: neighbours
background: {hosts: 0}
tasks:
  - {id: harmless, type: neighbours.harmless, every: 100ms, count: 200}
  - {id: raises, type: neighbours.raises, every: 100ms}
  - {id: swallows, type: neighbours.swallows, every: 1s, timeout: 200ms}
"""


@pytest.mark.process
def test_offenders_are_named_and_neither_hurt_the_others_nor_keep_the_desk_from_stopping(
    tmp_path: Path,
) -> None:
    (tmp_path / "neighbours.py").write_text(TASKS)
    (tmp_path / "desk.yaml").write_text(DESK)
    with RunningDesk(tmp_path) as desk:
        assert desk.until_up(), desk.said()

        def named() -> bool:
            found = {each["task_id"] for each in desk.ask("status")["offenders"]}
            return found >= {"raises", "swallows"}

        assert until(named, 20)
        lines = {line["task_id"]: line for line in desk.ask("tasks")["tasks"]}
        assert lines["swallows"]["status"] == "quarantined"
        assert lines["raises"]["status"] == "backoff"
        assert all(lines[f"harmless-{n}"]["runs"] for n in range(1, 201))
        assert desk.stop() < 15
        assert desk.process.returncode == 0
