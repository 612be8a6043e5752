"""The live view fits any terminal, asks little, and ends with the desk."""

import os
import pty
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fakes.control import REPLIES, running
from nightdesk.cli.live import Picture, frame
from nightdesk.errors import DeskSilentError


def drawn(picture: Picture, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, force_terminal=False)
    with console.capture() as capture:
        console.print(frame(picture, width, height))
    return capture.get().splitlines()


def picture_of(replies: Mapping[str, Any]) -> Picture:
    picture = Picture(lambda verb, _: replies[verb])
    picture.refresh()
    return picture


@pytest.mark.parametrize(
    ("width", "height"), [(200, 60), (120, 40), (80, 24), (40, 12), (20, 6)]
)
def test_a_frame_fits_its_terminal(width: int, height: int) -> None:
    tasks = [
        {**REPLIES["tasks"]["tasks"][0], "task_id": f"task-{n}"} for n in range(100)
    ]

    lines = drawn(picture_of({**REPLIES, "tasks": {"tasks": tasks}}), width, height)

    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert "demo" in lines[0]


def test_a_frame_shows_what_matters() -> None:
    text = "\n".join(drawn(picture_of(REPLIES), 140, 50))

    for part in (
        "paper",
        "well",
        "ACTIVE",
        "10012.12",
        "sell-btc",
        "in 2 s",
        "handled",
        "88 us",
        "bad",
        "60000.1",
        "-0.4",
        "hello",
    ):
        assert part in text


def test_a_halt_and_its_reason_are_at_the_top() -> None:
    status = {
        **REPLIES["status"],
        "trading": {"state": "HALTED", "reason": "smoke", "actor": "me"},
    }

    lines = drawn(picture_of({**REPLIES, "status": status}), 100, 20)

    assert "halted" in lines[0]
    assert "trading is HALTED by me: smoke" in lines[2]


def test_silence_is_shown_over_the_last_picture() -> None:
    picture = picture_of(REPLIES)

    def silent(verb: str, arguments: Mapping[str, Any]) -> Any:
        raise DeskSilentError("state", verb, 5.0, 1)

    picture._ask = silent
    picture.refresh()

    assert any("did not answer" in line for line in drawn(picture, 120, 20))
    assert drawn(Picture(silent), 80, 20) == ["waiting for the desk ..."]


def test_a_desk_with_many_tasks_is_asked_for_them_seldom() -> None:
    asked: list[str] = []
    replies = {**REPLIES, "status": {**REPLIES["status"], "tasks": {"total": 10_000}}}

    def ask(verb: str, _: Mapping[str, Any]) -> Any:
        asked.append(verb)
        return replies[verb]

    picture = Picture(ask)
    for _ in range(40):
        picture.refresh()

    assert (asked.count("status"), asked.count("tasks"), asked.count("orders")) == (
        40,
        1,
        10,
    )
    picture.took_s = 1.0
    assert picture.pause_s == 20.0  # at most a twentieth of the desk's time


@pytest.mark.process
def test_the_process_draws_and_ends_with_the_desk(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    with running(tmp_path):
        process = subprocess.Popen(
            [sys.executable, "-m", "nightdesk.cli.live", str(tmp_path)],
            stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"}, close_fds=True,
        )  # fmt: skip
        os.close(slave)
        seen = b""
        while b"sell-btc" not in seen and select.select([master], [], [], 20)[0]:
            seen += os.read(master, 65536)
    while select.select([master], [], [], 10)[0]:
        try:
            if not os.read(master, 65536):
                break
        except OSError:  # the other end is closed
            break

    assert process.wait(10) == 0
    assert b"sell-btc" in seen
    os.close(master)


def test_what_a_terminal_would_obey_is_shown_instead() -> None:
    paint = "\x1b[2J\x1b]0;owned\x07\x9b31m"
    task = {**REPLIES["tasks"]["tasks"][0], "task_id": paint, "why": paint}
    log = {"at": "", "level": "info", "event": paint, "field": f"a\n{paint}"}
    replies = {**REPLIES, "tasks": {"tasks": [task]}, "logs": {"logs": [log]}}
    replies["status"] = {**REPLIES["status"], "name": paint}
    console = Console(width=200, height=50, force_terminal=True, color_system=None)

    with console.capture() as capture:
        console.print(frame(picture_of(replies), 200, 50))

    text = capture.get()
    assert "\\x1b[2J" in text
    assert not {*text} & {"\x07", "\x9b"}
    assert "\x1b[2J" not in text
    assert "\x1b]0" not in text
