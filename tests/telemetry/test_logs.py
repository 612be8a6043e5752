"""Logs are complete, private, bounded, and hold nobody up."""

import json
import logging
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nightdesk.config import Config, StateConfig
from nightdesk.telemetry import logs


class StillClock:
    ns = 1_700_000_000_000_000_000

    def now_ns(self) -> int:
        return self.ns

    def monotonic_ns(self) -> int:
        return self.ns

    async def sleep(self, seconds: float) -> None: ...


@pytest.fixture
def clock() -> Iterator[StillClock]:
    yield StillClock()
    logs.stop_logs()
    logs.set_console("quiet")
    logs._logs.hidden = ()
    logs._logs.newest.clear()


def configured(directory: Path, clock: StillClock, **options: Any) -> Any:
    store = options.pop("store", "sqlite")
    return logs.configure_logs(
        Config(state=StateConfig(store=store, directory=str(directory)), **options),
        clock,
    )


def lines(directory: Path) -> list[dict[str, Any]]:
    logs.flush_logs()
    return [
        json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()
    ]


def test_each_line_is_one_json_object_with_the_desks_own_time(
    tmp_path: Path, clock: StillClock
) -> None:
    log = configured(tmp_path / "state", clock)

    log.bind(task="sell").info("order sent", quantity=1, legs=[1, {"a": "b"}])

    assert lines(tmp_path / "state") == [
        {
            "at": "2023-11-14T22:13:20.000Z", "level": "info", "event": "order sent", "task": "sell", "quantity": 1,
            "legs": [1, {"a": "b"}],
        }
    ]  # fmt: skip
    assert stat.S_IMODE((tmp_path / "state" / "log.jsonl").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_a_desk_that_logs_nothing_leaves_no_trace(
    tmp_path: Path, clock: StillClock
) -> None:
    configured(tmp_path / "state", clock)
    logs.stop_logs()

    assert not (tmp_path / "state").exists()


def test_a_memory_store_writes_no_file(tmp_path: Path, clock: StillClock) -> None:
    configured(tmp_path / "state", clock, store="memory").info("hello")
    logs.flush_logs()

    assert not (tmp_path / "state").exists()
    assert logs.recent_logs()[0]["event"] == "hello"


def test_lines_of_libraries_and_exceptions_join_ours(
    tmp_path: Path, clock: StillClock
) -> None:
    log = configured(tmp_path, clock)

    with logs.log_scope(task="candles"):
        logging.getLogger("nightdesk.kernel").warning("late by %d ms", 5)
        try:
            raise ValueError("bad")
        except ValueError:
            log.exception("failed")
            logging.getLogger("nightdesk.kernel").exception("failed there")

    found = lines(tmp_path)
    assert found[0]["event"] == "late by 5 ms"
    assert [line["task"] for line in found] == ["candles"] * 3
    assert "ValueError: bad" in found[1]["exception"]
    assert "ValueError: bad" in found[2]["exception"]


def test_secrets_are_hidden_by_key_and_by_value_plain_and_encoded(
    tmp_path: Path, clock: StillClock
) -> None:
    log = configured(tmp_path, clock)
    logs.hide(["canary/77", "short"])

    log.info(
        "signed https://x/?k=canary%2F77",
        header={"x": "canary/77"},
        basic="Y2FuYXJ5Lzc3",
        api_key="anything",
    )

    text = (tmp_path / "log.jsonl").read_text() if lines(tmp_path) else ""
    assert "canary" not in text
    assert "Y2FuYXJ5Lzc3" not in text
    assert "anything" not in text


def test_the_newest_lines_can_be_asked_for(tmp_path: Path, clock: StillClock) -> None:
    log = configured(tmp_path, clock, log_level="debug")
    log.debug("a")
    log.info("b", task="sell")
    log.warning("c", task="sell")
    log.error("d", source="sell")

    assert [line["event"] for line in logs.recent_logs()] == ["a", "b", "c", "d"]
    assert [
        line["event"] for line in logs.recent_logs(task_id="sell", level="warn")
    ] == ["c", "d"]
    assert [line["event"] for line in logs.recent_logs(limit=1)] == ["d"]


def test_lines_below_the_level_are_dropped(tmp_path: Path, clock: StillClock) -> None:
    log = configured(tmp_path, clock, log_level="warn")

    log.info("a")
    log.warning("b")

    assert [line["event"] for line in lines(tmp_path)] == ["b"]


def test_a_storm_of_lines_is_told_by_its_count(
    tmp_path: Path, clock: StillClock
) -> None:
    """R-25: the first ones, then each 2^n-th, and all again in the next minute."""
    log = configured(tmp_path, clock)

    for _ in range(1000):
        log.warning("again", task="bad")
    clock.ns += 61_000_000_000
    log.warning("again", task="bad")

    found = lines(tmp_path)
    assert [line.get("repeated") for line in found[20:-1]] == [32, 64, 128, 256, 512]
    assert "repeated" not in found[-1]


def test_a_full_queue_drops_and_counts(tmp_path: Path, clock: StillClock) -> None:
    log = configured(tmp_path, clock, log_level="debug")
    logs._logs._listener.stop()  # type: ignore[union-attr]  # nobody takes lines out any more

    for number in range(logs._QUEUE + 5):
        log.info(f"line {number}")

    assert logs._logs.dropped >= 5
    logs._logs._listener = None


def test_odd_values_become_text(tmp_path: Path, clock: StillClock) -> None:
    circle: list[Any] = []
    circle.append(circle)

    configured(tmp_path, clock).info(
        "odd", value=object, circle=circle, long="x" * 20_000
    )

    found = lines(tmp_path)[0]
    assert "object" in found["value"]
    assert len(found["long"]) == 8000


def test_a_read_only_directory_costs_the_file_and_not_the_desk(
    tmp_path: Path, clock: StillClock, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").touch()  # a file where the directory should be

    log = configured(tmp_path / "state", clock)
    log.info("a")
    log.info("b")
    logs.flush_logs()

    assert capsys.readouterr().err.count("cannot be written") == 1
    assert len(logs.recent_logs()) == 2


@pytest.mark.parametrize(
    ("mode", "out", "err"),
    [("text", 2, 0), ("json", 2, 0), ("quiet", 0, 1), ("off", 0, 0)],
)
def test_the_console_shows_what_was_chosen(
    mode: Any,
    out: int,
    err: int,
    tmp_path: Path,
    clock: StillClock,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.set_console(mode)
    log = configured(tmp_path, clock)

    log.info("hello there", path="a b")
    log.warning("careful")
    logs.flush_logs()

    shown = capsys.readouterr()
    assert (len(shown.out.splitlines()), len(shown.err.splitlines())) == (out, err)
    if mode == "text":
        assert (
            shown.out.splitlines()[0] == "22:13:20.000 info     hello there  path='a b'"
        )


def test_an_exception_is_printed_below_its_line(
    tmp_path: Path, clock: StillClock, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.set_console("text")
    log = configured(tmp_path, clock)
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("failed")
    logs.flush_logs()

    assert capsys.readouterr().out.splitlines()[-1] == "ValueError: bad"


def test_warnings_before_any_desk_reach_standard_error(
    clock: StillClock, capsys: pytest.CaptureFixture[str]
) -> None:
    logs._logs.take({"level": "warning", "event": "early", "at": ""})

    assert "early" in capsys.readouterr().err


def test_colour_is_for_terminals_that_want_it() -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    record = logging.makeLogRecord(
        {
            "msg": {
                "at": "2023-11-14T22:13:20.000Z",
                "level": "error",
                "event": "x",
                "a": 1,
            }
        }
    )

    assert "\x1b[31m" in logs._as_text(record, colour=True)
    assert logs._wants_colour(object()) is False
    assert isinstance(logs._wants_colour(Terminal()), bool)


# --- hostile words ------------------------------------------------------------------------------------------

PAINT = "\x1b[2J\x1b]0;owned\x07\r\n2026-01-01 critical forged \x9b31m\u202e"


@pytest.mark.parametrize("mode", ["text", "json", "quiet"])
def test_no_line_ends_the_log(
    tmp_path: Path, clock: StillClock, mode: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    class Speechless:
        def __str__(self) -> str:
            raise RuntimeError("no words")

    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    log = configured(tmp_path, clock)
    logs.set_console(mode)

    log.error("bytes \udcff", path="\ud800", nested={"\udcff": ["\udcff"]})
    log.error("objects", odd=Speechless(), deep=deep, big=10**40, nan=float("nan"))
    log.error("after")

    assert [line["event"] for line in lines(tmp_path)] == [
        "bytes \\udcff",
        "objects",
        "after",
    ]
    out, err = capsys.readouterr()
    assert "after" in out + err
    assert "cannot be written" not in err


def test_a_terminal_shows_control_characters_and_does_not_obey_them(
    tmp_path: Path, clock: StillClock, capsys: pytest.CaptureFixture[str]
) -> None:
    log = configured(tmp_path, clock)
    logs.set_console("text")

    log.error(f"event {PAINT}", task=PAINT, exception=f"Traceback\n  {PAINT}")

    logs.flush_logs()
    out = capsys.readouterr().out
    assert not {*out} & {"\x1b", "\x07", "\r", "\x9b", "\u202e"}
    assert not [each for each in out.splitlines() if each.startswith("2026-01-01 c")][
        1:
    ]
    assert "event \\x1b[2J" in out.splitlines()[0]


def test_secrets_inside_of_large_and_nested_values_are_hidden(
    tmp_path: Path, clock: StillClock
) -> None:
    log = configured(tmp_path, clock)
    logs.hide(['cut"throat'])

    log.info(
        "request",
        headers={"api_key": "abcdef", "list": [{"Password": 1}]},
        large=['cut"throat', "x" * 9_000],
        short=['cut"throat'],
    )

    text = (logs.flush_logs(), (tmp_path / "log.jsonl").read_text())[1]
    assert "abcdef" not in text
    assert "throat" not in text
    assert lines(tmp_path)[0]["headers"] == {
        "api_key": "***",
        "list": [{"Password": "***"}],
    }
