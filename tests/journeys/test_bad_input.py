"""The quick parts of `bad_input.py`: what real processes say when they are given something unusable."""

import os
from pathlib import Path

import pytest

from fakes.damage import Judge, damages
from fakes.running import RunningDesk, nightdesk
from nightdesk import loading

STILL = """
name: still
state: {store: files}
background: {hosts: 0}
venues:
  - name: alpha
    type: paper
    instruments: [{symbol: BTC/USDT, tick_size: 0.1, lot_size: 0.001, min_quantity: 0.001}]
tasks:
  - {id: stops, type: position_monitor, stop_loss: 0.05}
"""


@pytest.mark.process
@pytest.mark.parametrize("text", ["", "tasks: [{type: candles, enabled: false}]\n"])
def test_a_desk_with_nothing_to_do_ends_with_code_3_and_says_what_to_add(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "desk.yaml").write_text(text)

    ran = nightdesk("run", "--no-console", cwd=tmp_path)

    assert ran.returncode == 3
    assert "Add one" in ran.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.process
def test_a_second_desk_ends_with_code_4_and_names_the_first(tmp_path: Path) -> None:
    (tmp_path / "desk.yaml").write_text(STILL)
    with RunningDesk(tmp_path) as first:
        assert first.until_up(), first.said()

        second = nightdesk("run", "--no-console", cwd=tmp_path)

        assert second.returncode == 4
        assert f"process {first.process.pid} on {os.uname().nodename}" in second.stderr
        assert first.ask("status")["up"]


@pytest.mark.process
def test_damaged_state_is_quarantined_or_refused_and_never_wrong(
    tmp_path: Path,
) -> None:
    (tmp_path / "desk.yaml").write_text(STILL)
    with RunningDesk(tmp_path) as desk:
        assert desk.until_up(), desk.said()
        desk.stop()
    (tmp_path / "state" / "reserve").unlink()
    original = (tmp_path / "state").rename(tmp_path / "original")
    judge = Judge(tmp_path, original, loading.load_config(tmp_path / "desk.yaml"))

    for name in ("journal.log", "active/stops.json", "high_water"):
        for number, damage in enumerate(damages((original / name).read_bytes(), 12)):
            judge.judge(name, damage, whole_desk=not number % 6)

    assert judge.expected
    assert judge.wrong == []
