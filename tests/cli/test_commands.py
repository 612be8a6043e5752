"""The command line is an interface that others script against: names, JSON, exit codes."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.control import REPLIES, FakeDesk, running
from nightdesk.cli import main
from nightdesk.cli.commands import COMMANDS, LATER, overview

HEAVY = (
    "ccxt",
    "nicegui",
    "web3",
    "ray",
    "pandas",
    "numpy",
    "sqlalchemy",
    "cyclopts",
    "rich",
    "yaml",
    "uvloop",
    "asyncio",
)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    with contextlib.chdir(tmp_path):
        yield tmp_path


@pytest.fixture
def desk(here: Path) -> Iterator[FakeDesk]:
    (here / "state").mkdir()
    with running(here / "state") as desk:
        yield desk


def call(*words: str) -> tuple[int, str, str]:
    """Return exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


# --- help -----------------------------------------------------------------------------------------------


def test_help_lists_every_command() -> None:
    code, out, _ = call("--help")

    assert code == 0
    for command in COMMANDS:
        assert f"  {command.name} " in out
        assert command.summary in out
    assert call()[1] == call("-h")[1] == out == overview() + "\n"


def test_help_imports_nothing_heavy() -> None:
    """Measured: 50 ms; importing the parser alone takes four times as long."""
    program = (
        "import sys; from nightdesk.cli import main; main(['--help']);"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_explains_itself(command: Any) -> None:
    code, out, _ = call(*command.name.split(), "--help")

    assert code == 0
    assert f"Usage: nightdesk {command.name}" in out
    assert command.summary.split(";")[0].rstrip(".") in " ".join(out.split())


def test_the_version_is_told() -> None:
    assert call("--version") == (0, "nightdesk 0.1.0\n", "")


# --- usage errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tasqs"], 'Did you mean "tasks"?'),
        (["status", "--jsn"], "Did you mean --json?"),
        (["tasks", "show"], "requires an argument"),
        (["logs", "--level", "loud"], "Choose from"),
        (["orders", "--limit", "many"], "many"),
        (["orders", "--limit", "0"], "Must be >= 1"),
        (["run", "-c", "none.yaml"], "no such file"),
        (["run", "my.yaml"], "Did you mean `-c my.yaml`?"),
        (
            ["status", "now"],
            "'now' is one word too many. See `nightdesk status --help`.",
        ),
        (["run", "-c", "arbitrum"], "--chain arbitrum"),
        (["run"], "nightdesk new-config"),
        (["recover"], "every start recovers by itself"),
        (["replay"], "which recording?"),
        (["replay", "none.gz"], "no such file: none.gz"),
        (["tasks", "adjust", "sell"], "nothing to adjust"),
        (["resume-trading"], "--reason"),
        (["state", "inspect"], "holds no state"),
        (["bench", "nothing"], "Choose from"),
        *(([name], "later release") for name in LATER),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_ends_with_exit_code_2_and_one_line(
    words: list[str], said: str, here: Path
) -> None:
    code, out, err = call(*words)

    assert code == 2
    assert said in err
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["tasks"],
        ["orders"],
        ["logs"],
        ["stop"],
        ["tasks", "pause", "sell"],
        ["resume-trading", "--reason", "x"],
    ],
)
def test_a_command_without_a_desk_ends_with_exit_code_3(
    words: list[str], here: Path
) -> None:
    code, _, err = call(*words)

    assert code == 3
    assert "no desk is running in state" in err


# --- looking ----------------------------------------------------------------------------------------------

LOOKING = [
    (["status"], "status"),
    (["tasks"], "tasks"),
    (["tasks", "list"], "tasks"),
    (["tasks", "show", "sell-btc"], "task.show"),
    (["orders"], "orders"),
    (["fills"], "fills"),
    (["trades"], "trades"),
    (["positions"], "positions"),
    (["opportunities"], "opportunities"),
    (["performance"], "performance"),
    (["logs"], "logs"),
    (["workers"], "workers"),
]


@pytest.mark.parametrize(
    ("words", "verb"),
    LOOKING,
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_json_is_the_desks_reply_with_its_version(
    words: list[str], verb: str, desk: FakeDesk
) -> None:
    code, out, err = call(*words, "--json")

    assert (code, err) == (0, "")
    assert json.loads(out) == REPLIES[verb]
    assert json.loads(out)["version"] == 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["status"],
            [
                "demo (development, paper)",
                "1 d 2:03:04",
                "p99.9 300 us",
                "2.90 s",
                "10012.12",
                "blocks the loop",
            ],
        ),
        (["tasks"], ["sell-btc", "running", "in 2 s", "1.0 ms", "working a child"]),
        (["tasks", "--status", "waiting"], ["candles"]),
        (["tasks", "show", "sell-btc"], ["EXECUTING", "IDLE", "iceberg.py:80"]),
        (["orders", "--open"], ["nd1x", "0.05 ", "60000.1", "ACCEPTED"]),
        (["fills"], ["0.3 USDT", "MAKER"]),
        (["trades"], ["BTC/USDT"]),
        (["positions"], ["-0.4", "60010"]),
        (["opportunities"], ["handled", "1.89 ms"]),
        (["performance"], ["equity  10012.123"]),
        (["logs"], ["hello  task=a"]),
        (["workers"], ["HOST", "99"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_people_get_words(words: list[str], parts: list[str], desk: FakeDesk) -> None:
    code, out, _ = call(*words)

    assert code == 0
    for part in parts:
        assert part in out


def test_empty_lists_say_so(desk: FakeDesk) -> None:
    for verb, key in (
        ("orders", "orders"),
        ("positions", "positions"),
        ("workers", "hosts"),
        ("tasks", "tasks"),
    ):
        desk.replies[verb] = {"version": 1, key: []}

    assert call("orders")[1] == "No orders.\n"
    assert call("positions")[1] == "No positions.\n"
    assert "every task runs in the desk" in call("workers")[1]
    assert call("tasks")[1] == "No tasks.\n"


def test_logs_of_a_desk_that_is_down_come_from_its_file(here: Path) -> None:
    (here / "state").mkdir()
    entries = [
        {"level": "info", "event": "a"},
        {"level": "error", "event": "b", "task": "sell"},
    ]
    (here / "state" / "log.jsonl").write_text(
        "cut off\n" + "".join(json.dumps(e) + "\n" for e in entries)
    )

    code, out, _ = call("logs", "sell", "--level", "warn", "--json")

    assert code == 0
    assert [entry["event"] for entry in json.loads(out)["logs"]] == ["b"]


# --- steering -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["start", "stop", "pause", "resume", "trigger"])
def test_a_task_is_steered_with_actor_and_reason(verb: str, desk: FakeDesk) -> None:
    code, out, _ = call("tasks", verb, "sell-btc", "--reason", "lunch")

    assert code == 0
    assert out.startswith("sell-btc ")
    asked, arguments, actor, reason = desk.asked[0]
    assert (asked, arguments, reason) == (
        f"task.{verb}",
        {"task_id": "sell-btc"},
        "lunch",
    )
    assert "@" in actor


def test_adjust_sends_only_what_was_given(desk: FakeDesk) -> None:
    assert (
        call(
            "tasks",
            "adjust",
            "sell-btc",
            "--every",
            "5s",
            "--priority",
            "low",
            "--json",
        )[0]
        == 0
    )
    assert desk.asked[0][1] == {"task_id": "sell-btc", "every": "5s", "priority": "low"}


def test_an_error_of_the_desk_keeps_its_exit_code(desk: FakeDesk) -> None:
    del desk.replies["orders"]

    code, _, err = call("orders")

    assert (code, err) == (2, "nightdesk: no command 'orders'\n")


@pytest.mark.parametrize(
    ("flags", "mode"),
    [([], "pause"), (["--cancel"], "cancel"), (["--flatten"], "flatten")],
)
def test_halt_says_how_far_to_go(flags: list[str], mode: str, desk: FakeDesk) -> None:
    code, out, _ = call("halt", *flags)

    assert (code, desk.asked[0][1]) == (0, {"mode": mode})
    assert out == "HALTED. Cancelled 1 orders, closed 0 positions.\n"


def test_halt_without_a_desk_holds_for_the_next_one(here: Path) -> None:
    code, out, err = call("halt", "--reason", "storm")

    assert code == 0
    assert "keeps the next one halted" in out
    assert "state did not exist: if a desk runs elsewhere, it trades on" in err
    assert "storm" in (here / "state" / "HALT").read_text()
    assert call("halt")[2] == "", "only a directory that is new may be a slip"
    assert json.loads(call("halt", "--json")[1])["by"] == "flag file"


def test_resume_trading_takes_the_flag_away_and_needs_a_reason(
    desk: FakeDesk, here: Path
) -> None:
    (here / "state" / "HALT").touch()

    assert call("resume-trading", "--reason", " ")[0] == 2
    assert (here / "state" / "HALT").exists()
    assert call("resume-trading", "--reason", "all equal")[0] == 0
    assert not (here / "state" / "HALT").exists()
    assert desk.asked[-1][0::3] == ("resume_trading", "all equal")


def test_status_says_who_halted_when_and_why(desk: FakeDesk) -> None:
    trading = {
        "state": "HALTED",
        "reason": "storm",
        "actor": "me@host",
        "since_ns": 1_700_000_000_000_000_000,
    }
    desk.replies["status"] = {**desk.replies["status"], "trading": trading}

    said = "trading   HALTED since 2023-11-14 22:13:20 by me@host: storm\n"
    assert said in call("status")[1]


def test_reconcile_prints_what_was_found(desk: FakeDesk) -> None:
    assert call("reconcile")[1] == "order nd1x: as the venue says\n"
    desk.replies["reconcile"] = {"version": 1, "report": {"checked": 3}}
    assert call("reconcile")[1] == "checked  3\n"
    desk.replies["reconcile"] = {"version": 1, "report": None}
    assert call("reconcile")[1] == "Nothing differs.\n"
    assert json.loads(call("reconcile", "--json")[1])["version"] == 1


def test_stop_waits_for_the_end(desk: FakeDesk) -> None:
    code, out, _ = call("stop", "--json")

    assert code == 0
    assert json.loads(out)["stopped"] is True


# --- which desk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["flag", "environment", "file", "demo"])
def test_the_desk_is_found_where_it_is(where: str, here: Path) -> None:
    directory = here / ("state/demo" if where == "demo" else "elsewhere")
    directory.mkdir(parents=True)
    (here / "other.yaml").write_text(
        "state: {directory: elsewhere}\nbroken: [1\n"
        if False
        else "state: {directory: elsewhere}\n"
    )
    words = {"flag": ["--state", "elsewhere"], "file": ["-c", "other.yaml"]}.get(
        where, []
    )
    if where == "environment":
        os.environ["NIGHTDESK__STATE__DIRECTORY"] = "elsewhere"
    try:
        with running(directory):
            assert call("status", *words)[0] == 0
    finally:
        os.environ.pop("NIGHTDESK__STATE__DIRECTORY", None)


def test_a_broken_configuration_does_not_keep_one_from_its_desk(
    desk: FakeDesk, here: Path
) -> None:
    (here / "desk.yaml").write_text("a: [1\n")

    assert call("status")[0] == 0


# --- preparing ----------------------------------------------------------------------------------------------------


def test_new_config_writes_a_desk_that_is_sound_and_replaces_nothing(
    here: Path,
) -> None:
    assert call("new-config")[0] == 0
    assert call("check-config") == (0, "desk.yaml: sound.\n", "")
    assert call("new-config")[0] == 2
    assert call("new-config", "--force")[0] == 0
    assert call("new-config", "--print")[1] == (here / "desk.yaml").read_text()
    assert call("new-config", "none/such/x.yaml")[0] == 0
    assert call("new-config", "desk.yaml/x.yaml")[0] == 2


def test_init_makes_a_desk_with_a_task_of_ones_own(here: Path) -> None:
    assert call("init", "mine")[0] == 0
    assert call("check-config", "mine/desk.yaml")[0] == 0
    assert "already" in call("init", "mine")[2]

    with contextlib.chdir(here / "mine"):
        from nightdesk import loading

        config = loading.load_config()
    assert config.tasks[-1].type == "my_desk.hello"


def test_check_config_tells_everything_as_json_too(here: Path) -> None:
    (here / "desk.yaml").write_text("nxme: x\nseed: y\n")

    code, out, _ = call("check-config", "--json")

    found = json.loads(out)
    assert (code, found["version"], found["ok"], len(found["problems"])) == (
        2,
        1,
        False,
        2,
    )
    assert call("check-config")[1].splitlines()[-1] == "desk.yaml: 2 problems."


def test_run_lists_every_problem_once(here: Path) -> None:
    (here / "desk.yaml").write_text("nxme: x\nseed: y\n")

    code, _, err = call("run")

    assert code == 2
    assert len(err.splitlines()) == 2


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_looks_at_machine_state_and_desk(desk: FakeDesk) -> None:
    code, out, _ = call("doctor", "--json")

    findings = {finding["check"]: finding for finding in json.loads(out)["findings"]}
    assert code == 0
    assert {
        "Python",
        "libraries",
        "SQLite",
        "state directory",
        "disk space",
        "clock",
        "desk",
    } <= set(findings)
    assert findings["desk"]["found"] == "running and well"
    assert "ok   Python" in call("doctor")[1]


def test_doctor_says_what_to_do(here: Path) -> None:
    (here / "state").mkdir(mode=0o755)
    (here / "state").chmod(0o755)

    assert "-> chmod 700 state" in call("doctor")[1]


def test_doctor_sees_a_halted_desk(desk: FakeDesk) -> None:
    desk.replies["status"] = {
        **REPLIES["status"],
        "trading": {"state": "HALTED", "reason": "smoke"},
    }

    assert "halted: trading is HALTED: smoke" in call("doctor")[1]


# --- ends that are no errors, and those that are ------------------------------------------------------------------------


def test_a_reader_that_leaves_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m nightdesk new-config --print | head -1; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stdout.splitlines()[1] == "0"
    assert done.stderr == ""


def test_an_unexpected_error_is_one_line_and_a_report_without_values(
    desk: FakeDesk, here: Path
) -> None:
    desk.replies["orders"] = {"version": 1, "orders": [{"unexpected": 1}]}

    code, _, err = call("orders", "--state=state")

    assert code == 1
    assert len(err.splitlines()) == 1
    report = next((here / "state").glob("nightdesk-crash-*.txt")).read_text()
    assert "KeyError" in report
    assert "command: orders --state\n" in report


def test_a_traceback_is_for_those_who_ask(desk: FakeDesk) -> None:
    desk.replies["orders"] = {"version": 1, "orders": [{"unexpected": 1}]}
    os.environ["NIGHTDESK__LOG_LEVEL"] = "debug"
    try:
        assert "Traceback" in call("orders")[2]
        assert (
            "Traceback" in call("tasks", "nothing", "debug")[2]
            or call("status", "--state", "none")[0] == 3
        )
    finally:
        del os.environ["NIGHTDESK__LOG_LEVEL"]


def test_ctrl_c_ends_quietly(desk: FakeDesk) -> None:
    from nightdesk.cli import app, looking

    original = looking.ask
    looking.ask = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[assignment]
    try:
        assert app.run(["status"]) == 130
    finally:
        looking.ask = original


# --- hostile words ------------------------------------------------------------------------------------

PAINT = "\x1b[2J\x1b]0;owned\x07\r\x9b31m"


@pytest.mark.parametrize(
    "words", [("tasks",), ("tasks", "show", "x"), ("orders",), ("logs",), ("status",)]
)
def test_a_terminal_shows_control_characters_and_does_not_obey_them(
    desk: FakeDesk, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nightdesk.cli.looking.ask", lambda *_, **__: painted(words[0]))

    _, out, err = call(*words)

    assert "\\x1b[2J" in out
    assert not {*out, *err} & {"\x1b", "\x07", "\r", "\x9b"}


def painted(name: str) -> Any:
    """Return a reply whose every text tries to take over the terminal."""

    def paint(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: paint(each) for key, each in value.items()}
        if isinstance(value, list):
            return [paint(each) for each in value]
        return PAINT if isinstance(value, str) else value

    reply = paint(json.loads(json.dumps(REPLIES[name])))
    if name == "tasks":
        reply |= {"task_id": PAINT, "context": {"note": PAINT}, "waits_at": [PAINT]}
    return reply


def test_words_that_a_terminal_does_not_know_are_escaped_and_end_nothing(
    here: Path,
) -> None:
    (here / "desk.yaml").write_text("näme: x\n")

    found = subprocess.run(
        [sys.executable, "-m", "nightdesk", "check-config"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )

    assert found.returncode == 2
    assert b"n\\xe4me" in found.stdout + found.stderr
