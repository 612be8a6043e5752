"""Every mistake in a configuration is named with its line, what was expected, and what was meant (R-26, F25)."""

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from nightdesk import loading
from nightdesk.config import Config, TaskEntry
from nightdesk.errors import CommandError, ConfigError, UnknownTypeError
from nightdesk.model.order import Side
from nightdesk.model.priority import Priority
from nightdesk.tasks.iceberg import IcebergTask

SMALL = """\
venues:
  - name: alpha
    type: paper
    instruments:
      - {symbol: BTC/USDT, tick_size: 0.1, lot_size: 0.001, min_quantity: 0.001}
tasks:
  - id: sell
    type: iceberg
    symbol: BTC/USDT
    venue: alpha
    side: sell
    total_quantity: 1.000000000000000001
    order_quantity: 0.1
"""


def load(tmp_path: Path, text: str, **options: Any) -> Config:
    file = tmp_path / "desk.yaml"
    file.write_text(text)
    return loading.load_config(file, **options)


def problems(tmp_path: Path, text: str, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **options)
    return caught.value.problems


def task(*lines: str) -> str:
    return SMALL + "".join(f"    {line}\n" for line in lines)


# --- the sample, key by key (F25) ---------------------------------------------------------------------


def keys_of(
    node: yaml.Node, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], yaml.Node, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), key, value
            yield from keys_of(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from keys_of(item, path)


SAMPLE = loading.sample_config()
SAMPLE_KEYS = list(keys_of(yaml.compose(SAMPLE, Loader=yaml.SafeLoader)))


def name(case: tuple[tuple[str, ...], yaml.Node, yaml.Node]) -> str:
    return f"{'.'.join(case[0])}:{case[1].start_mark.line + 1}"


@pytest.mark.parametrize(
    "case", [k for k in SAMPLE_KEYS if k[0][-2:-1] != ("balances",)], ids=name
)
def test_each_misspelt_key_of_the_sample_is_named_with_its_line_and_the_right_spelling(
    case: tuple[tuple[str, ...], yaml.Node, yaml.Node], tmp_path: Path
) -> None:
    path, key, _ = case
    wrong = f"{path[-1][0]}x{path[-1][1:]}"
    text = SAMPLE[: key.start_mark.index] + wrong + SAMPLE[key.end_mark.index :]

    found = problems(tmp_path, text)

    line = f"line {key.start_mark.line + 1}: "
    assert any(
        p.startswith(line) and wrong in p and f"'{path[-1]}'" in p for p in found
    ), found


@pytest.mark.parametrize("case", SAMPLE_KEYS, ids=name)
def test_each_mistyped_value_of_the_sample_is_named_with_its_line_and_what_was_expected(
    case: tuple[tuple[str, ...], yaml.Node, yaml.Node], tmp_path: Path
) -> None:
    path, key, value = case
    # A mapping of nonsense where a plain value stands, and a number where keys or a list stand.
    wrong = "{nonsense: [1]}" if isinstance(value, yaml.ScalarNode) else "17.5\n"
    text = SAMPLE[: value.start_mark.index] + wrong + SAMPLE[value.end_mark.index :]

    found = problems(tmp_path, text)

    line = f"line {key.start_mark.line + 1}: "
    assert any(
        p.startswith(line) and path[-1] in p and "expected" in p for p in found
    ), found


def test_the_sample_is_sound_and_new_config_may_promise_so(tmp_path: Path) -> None:
    config = load(tmp_path, SAMPLE)

    assert [entry.id for entry in config.tasks] == [
        "sell-btc",
        "stops",
        "candles",
        "regime",
    ]
    assert config.kernel.max_park_s == 0.05


@pytest.mark.parametrize("template", ["demo.yaml", "replay.yaml"])
def test_the_packaged_desks_are_sound(template: str) -> None:
    path = Path(loading.__file__).parents[1] / "cli" / "templates" / template

    config = loading.load_config(path)

    assert config.tasks
    assert config.venues


# --- every problem at once, nothing secret ----------------------------------------------------------------


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "nxme: x\nkernel: {slice_us: fast, loop: uvlop}\nrisk: {max_orders_per_s: 0}\ncode: TOOLONG\n",
    )

    assert len(found) == 5
    assert "Did you mean 'name'?" in found[0]
    assert "expected a whole number" in " ".join(found)
    assert "Did you mean 'uvloop'?" in " ".join(found)
    assert "`risk.max_orders_per_s` is 0, expected 1 or more" in " ".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "venues:\n  - {name: a, type: paper, api_secret: CANARY-1, instruments: CANARY-1}\n",
        "tasks:\n  - {type: iceberg, token: [CANARY-1]}\n",
        "password: CANARY-1\n",
        "password: CANARY-1: nonsense\n  - broken\n",
        "password: *CANARY-1\n",
        "password: !CANARY-1 x\n",
        "password: 'CANARY-1\n",
        "kernel: {slice_us: redis://user:CANARY-1@host}\n",
    ],
)
def test_no_secret_is_repeated_in_a_message(text: str, tmp_path: Path) -> None:
    found = problems(tmp_path, text)

    if "slice_us" not in text:
        assert "CANARY-1" not in " ".join(found).replace(
            "`instruments` is 'CANARY-1'", ""
        ).replace("`venues[0].instruments` is 'CANARY-1'", "")
    else:
        assert "user:***@host" in " ".join(found)


def test_secrets_of_a_configuration_are_found_for_the_logs(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from nightdesk.abc import Source\n"
        "class Shop(Source):\n"
        "    def __init__(self, *, api_key: str): self.api_key = api_key\n"
        "    async def start(self, emit, clock, random): ...\n"
        "    async def stop(self): ...\n"
    )

    config = load(
        tmp_path, "sources:\n  - {name: s, type: shop.Shop, api_key: hunter222}\n"
    )

    assert loading.secrets_of(config) == ["hunter222"]


# --- what is no YAML, or too much of it --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a: [1\n", "no valid YAML"),
        (b"- 1\n", "expected keys"),
        (b"name: \xff\xfe\n", "UTF-8"),
        (b"name: a\x00b\n", "no valid YAML"),
        (b"name: a\nname: b\n", "second time; the first is in line 1"),
        (b"name: !!python/object/apply:os.system [ls]\n", "tag"),
        (b"? [1, 2]\n: x\n", "no plain word"),
        (b"x" * 1_100_000, "larger than 1024 KiB"),
        (b"name: " + b"[" * 2000 + b"]" * 2000, "nested deeper"),
        (b"<<: 5\n", "alias of a mapping"),
        (b"name: a\n---\nname: b\n", "line 2: a second document"),
        (b"name: *nothing\n", "an anchor that is not there"),
        (b"a: &a {<<: *a}\n", "levels"),
    ],
)
def test_what_is_no_usable_yaml_is_refused_in_one_line(
    data: bytes, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "desk.yaml"
    file.write_bytes(data)

    with pytest.raises(ConfigError) as caught:
        loading.load_config(file)

    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_bomb_of_aliases_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]

    assert "aliases" in problems(tmp_path, "\n".join(lines))[0]


def test_a_circle_of_aliases_is_refused(tmp_path: Path) -> None:
    assert "levels" in problems(tmp_path, "tasks: &a [*a]\n")[0]


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="new-config"):
        loading.load_config(tmp_path / "none.yaml")


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory"):
        loading.load_config(tmp_path)


def test_an_empty_file_is_an_empty_desk_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "desk.yaml").write_text("")

    found = loading.check_config(tmp_path / "desk.yaml")

    assert all(line.startswith("warning:") for line in found)
    assert "exit code 3" in found[0]


# --- values mean what they look like -------------------------------------------------------------------------


def test_a_quantity_keeps_every_digit(tmp_path: Path) -> None:
    config = load(tmp_path, SMALL)

    assert config.tasks[0].params["total_quantity"] == Decimal("1.000000000000000001")
    assert config.tasks[0].params["side"] is Side.SELL


def test_keys_and_times_are_read_as_they_are_written(tmp_path: Path) -> None:
    """YAML 1.1 would read `on` as true and 09:15 as 555."""
    on = load(tmp_path, task("on: CandleClosed")).tasks[0].schedule
    at = load(tmp_path, task("at: 09:15", "timezone: Asia/Kolkata")).tasks[0].schedule

    assert on is not None
    assert on.on == ("CandleClosed",)
    assert at is not None
    assert at.at == "09:15"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 5),
        ("5s", 5),
        ("300ms", 0.3),
        ("5m", 300),
        ("1h", 3600),
        ("1.5s", 1.5),
        ("2d", 172800),
    ],
)
def test_durations_may_have_a_unit(text: str, seconds: float, tmp_path: Path) -> None:
    schedule = load(tmp_path, task(f"every: {text}")).tasks[0].schedule

    assert schedule is not None
    assert schedule.every_s == seconds


@pytest.mark.parametrize(
    "text", ["-5", ".inf", ".nan", "5 parsecs", "1e999", "[5]", "true"]
)
def test_what_is_no_duration_is_refused(text: str, tmp_path: Path) -> None:
    assert "expected a duration" in problems(tmp_path, task(f"every: {text}"))[0]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ("every: 5s", "cron: '* * * * *'"),
            "one trigger, but here are every and cron",
        ),
        (("every: 0",), "more than 0"),
        (("calendar: NSE",), "a trigger beside it"),
        (("cron: nonsense",), "cron fields"),
        (("at: noon",), "HH:MM"),
        (("at: 09:15", "timezone: Mars/Olympus"), "IANA time zone"),
        (("on: CandelClosed",), "Did you mean 'CandleClosed'?"),
        (("calendar: NSE", "open: 5s", "closed: never"), "pause"),
        (("calendar: NSE", "open: 0", "closed: pause"), "more than 0, or `pause`"),
        (("schedule: {evxry: 5s}",), "Did you mean 'every'?"),
        (("schedule: 5s",), "a mapping, e.g."),
        (("priority: urgent",), "expected one of critical, high, normal, low"),
        (("after: [sel]",), "the id of another task"),
        (("after: sell",), "in a circle: sell -> sell"),
        (("runs_in: backgrxund",), "Did you mean 'background'?"),
        (("enabled: maybe",), "expected true or false"),
        (("timeout: long",), "a duration"),
        (("params: 5",), "a mapping"),
        (("params: {order_quantty: 5}",), "Did you mean 'order_quantity'?"),
    ],
)
def test_what_is_wrong_with_a_task_is_said(
    lines: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    found = problems(tmp_path, task(*lines))

    assert any(words in problem for problem in found), found


def test_a_schedule_with_sessions_is_read(tmp_path: Path) -> None:
    schedule = (
        load(
            tmp_path,
            task("calendar: NSE", "open: 5s", "closed: pause", "jitter: 200ms"),
        )
        .tasks[0]
        .schedule
    )

    assert schedule is not None
    assert (
        schedule.calendar,
        schedule.open_s,
        schedule.closed_s,
        schedule.jitter_s,
    ) == ("NSE", 5, "pause", 0.2)


def test_the_long_form_of_a_schedule_means_the_same(tmp_path: Path) -> None:
    short = load(tmp_path, task("every: 5s")).tasks[0]
    long = load(tmp_path, task("schedule: {every_s: 5}")).tasks[0]

    assert short.schedule == long.schedule


def test_a_task_that_names_no_venue_of_the_desk_is_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, SMALL.replace("venue: alpha", "venue: alphx"))

    assert found == [
        "line 10: `tasks[0].venue` is 'alphx', expected one of alpha. Did you mean 'alpha'?"
    ]


def test_missing_parameters_are_named_with_their_type(tmp_path: Path) -> None:
    found = problems(tmp_path, SMALL.replace("    order_quantity: 0.1\n", ""))

    assert found == ["line 7: `tasks[0]` has no `order_quantity`, expected a number."]


def test_ids_and_names_are_unique(tmp_path: Path) -> None:
    twice = "tasks:\n  - {id: a, type: candles}\n  - {id: a, type: candles}\n"
    venues = "venues:\n" + "  - {name: v, type: paper, instruments: []}\n" * 2

    assert "a second task has the id 'a'" in problems(tmp_path, twice)[0]
    assert "a second venue is named 'v'" in problems(tmp_path, venues)[0]


def test_tasks_without_an_id_are_numbered_by_type(tmp_path: Path) -> None:
    config = load(
        tmp_path, "tasks:\n  - type: candles\n  - type: candles\n  - type: regime\n"
    )

    assert [entry.id for entry in config.tasks] == ["candles", "candles-2", "regime"]


def test_feeds_of_a_venue_are_checked_like_sources(tmp_path: Path) -> None:
    venue = SMALL.split("tasks:")[0].replace(
        "type: paper",
        "type: paper\n    process: own\n    feeds: [{type: simulated, %s}]",
    )

    assert (
        load(tmp_path, venue % "interval_ms: 20")
        .venues[0]
        .options["feeds"][0]["interval_ms"]
        == 20
    )
    assert (
        "Did you mean 'interval_ms'?" in problems(tmp_path, venue % "interval: 20")[0]
    )
    assert (
        "has no `type`"
        in problems(tmp_path, venue.replace("type: simulated, ", "") % "seed: 1")[0]
    )


# --- flag > environment > file > default ---------------------------------------------------------------------


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    text = "name: file\nlog_level: info\nseed: 1\n"
    environment = {
        "NIGHTDESK__NAME": "environment",
        "NIGHTDESK__LOG_LEVEL": "warn",
        "HOME": "/root",
    }

    config = load(
        tmp_path,
        text,
        environment=environment,
        flags={"log_level": "debug", "mode": None},
    )

    assert (config.name, config.log_level, config.seed, config.mode) == (
        "environment",
        "debug",
        1,
        "development",
    )


def test_entries_of_lists_are_reached_by_their_name(tmp_path: Path) -> None:
    environment = {
        "NIGHTDESK__TASKS__SELL__PRIORITY": "low",
        "NIGHTDESK__TASKS__SELL__EVERY": "10s",
        "NIGHTDESK__VENUES__ALPHA__LATENCY_MS": "[1, 2]",
        "NIGHTDESK__RISK__ALLOWED_SYMBOLS": "BTC/USDT, ETH/USDT",
        "NIGHTDESK__RISK__MAX_DAILY_LOSS": "12.5",
        "NIGHTDESK__CODE": "007",
        "NIGHTDESK__BACKGROUND__HOSTS": "0",
    }

    config = load(tmp_path, SMALL, environment=environment)

    assert config.tasks[0].priority == "low"
    assert config.tasks[0].schedule is not None
    assert config.venues[0].options["latency_ms"] == (1.0, 2.0)
    assert config.risk.allowed_symbols == ("BTC/USDT", "ETH/USDT")
    assert config.risk.max_daily_loss == Decimal("12.5")
    assert config.code == "007"
    assert config.background.hosts == 0


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("NIGHTDESK__KERNL__LOOP", "Did you mean NIGHTDESK__KERNEL?"),
        ("NIGHTDESK__TASKS__SEL__PRIORITY", "has no entry 'sel'; it has sell"),
        ("NIGHTDESK__KERNEL__LOOP", "expected one of auto, uvloop, asyncio"),
        ("NIGHTDESK__KERNEL__SLICE", "Did you mean 'slice_us'?"),
        ("NIGHTDESK__TASKS", "a list of entries"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, words: str, tmp_path: Path) -> None:
    found = problems(tmp_path, SMALL, environment={variable: "x"})

    assert any(
        f"environment variable {variable}: " in problem and words in problem
        for problem in found
    ), found


def test_a_wrong_flag_is_named(tmp_path: Path) -> None:
    found = problems(
        tmp_path, SMALL, flags={"log_level": "loud", "state.directory": "x"}
    )

    assert found == [
        "flag --log-level: `log_level` is 'loud', expected one of debug, info, warn, error."
    ]


# --- the sections of design 004 --------------------------------------------------------------------------------


def test_design_004_sections_are_read(tmp_path: Path) -> None:
    text = SMALL + (
        "  - {id: c, type: candles}\n"
        "trading: {symbols: [BTCUSDT], timeframes: [1m, 15m]}\n"
        "background_tasks:\n"
        "  sell: {enabled: false}\n"
        "  c: {interval: 30}\n"
        "  position_monitoring: {enabled: true, interval: 30}\n"
    )

    config = load(tmp_path, text)

    by_id = {entry.id: entry for entry in config.tasks}
    assert by_id["sell"].enabled is False
    assert by_id["c"].schedule is not None
    assert by_id["c"].schedule.every_s == 30
    assert by_id["c"].params == {
        "instruments": ("BTC/USDT@alpha",),
        "timeframes": ("1m", "15m"),
    }
    assert by_id["position_monitoring"].type == "position_monitor"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trading: 5\n", "a mapping with `symbols`"),
        ("trading: {symbxls: [A]}\n", "Did you mean 'symbols'?"),
        ("background_tasks: 5\n", "a mapping of task names"),
        ("background_tasks: {candels: {enabled: true}}\n", "Did you mean 'candles'?"),
        ("background_tasks: {candles: true}\n", "`enabled` and `interval`"),
        ("background_tasks: {candles: {intervxl: 5}}\n", "Did you mean 'interval'?"),
        ("background_tasks: {candles: {interval: soon}}\n", "a duration"),
    ],
)
def test_mistakes_in_design_004_sections_are_named(
    text: str, words: str, tmp_path: Path
) -> None:
    assert words in " ".join(problems(tmp_path, text))


# --- classes -----------------------------------------------------------------------------------------------------


def test_a_type_is_the_name_of_a_file() -> None:
    assert loading.load_class("task", "iceberg") is IcebergTask
    assert "iceberg" in loading.catalog("task")


def test_an_unknown_type_comes_with_a_suggestion() -> None:
    with pytest.raises(UnknownTypeError, match="Did you mean 'iceberg'"):
        loading.load_class("task", "iceburg")


GRID = """\
from nightdesk import Task, TaskContext

class GridContext(TaskContext, kw_only=True):
    levels: int

class GridTask(Task[GridContext]):
    context_class = GridContext

class Other(Task[GridContext]):
    context_class = GridContext

async def collect(desk, *, symbol: str = "BTC/USDT"): ...
def greedy(a, b): ...
NUMBER = 5
"""


def own(tmp_path: Path, module: str, text: str) -> None:
    (tmp_path / f"{module}.py").write_text(text)


def test_a_dotted_name_is_the_users_own_class_or_function(tmp_path: Path) -> None:
    own(tmp_path, "grid_a", GRID)

    config = load(
        tmp_path,
        "tasks:\n  - {type: grid_a.GridTask, levels: 3}\n  - {id: f, type: grid_a.collect, symbol: ETH/USDT}\n",
    )

    assert loading.load_task("grid_a.GridTask", config).__name__ == "GridTask"
    assert config.tasks[1].params == {"symbol": "ETH/USDT"}
    assert config.tasks[1].schedule is not None
    assert config.tasks[
        1
    ].schedule.once  # a function without a schedule runs once, as design 004 has it


@pytest.mark.parametrize(
    ("type_name", "words"),
    [
        (
            "grid_b.Nothing",
            "has no task 'Nothing'. It has GridTask, Other, collect, greedy",
        ),
        ("grid_b.NUMBER", "has no task 'NUMBER'"),
        ("grid_b.greedy", "wants a, b"),
        ("missing_module.Task", "Put `missing_module.py`"),
        ("grid_b.in valid", "no dotted name"),
        ("grid_b.sub.deeper", "no module 'grid_b.sub'"),
    ],
)
def test_what_a_dotted_name_does_not_find_is_said(
    type_name: str, words: str, tmp_path: Path
) -> None:
    own(tmp_path, "grid_b", GRID)

    assert words in " ".join(
        problems(tmp_path, f"tasks:\n  - {{type: '{type_name}', levels: 3}}\n")
    )


def test_a_module_with_two_tasks_must_be_told_which(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / "pack" / "grids.py").write_text(GRID)

    found = " ".join(problems(tmp_path, "tasks:\n  - {type: pack.grids, levels: 3}\n"))

    assert "defines GridTask, Other; name one of them" in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import os\ndef broken(:\n", "line 2"),
        ("x = 1\ny = x / 0\n", "line 2: ZeroDivisionError"),
        ("import library_nobody_has\n", "line 1: ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "line 1: SystemExit"),
    ],
)
def test_a_module_that_fails_is_named_with_file_and_line(
    text: str, words: str, tmp_path: Path
) -> None:
    module = f"bad_{abs(hash(text))}"
    own(tmp_path, module, text)

    found = " ".join(problems(tmp_path, f"tasks:\n  - {{type: {module}.Task}}\n"))

    assert words in found
    assert f"{module}.py" in found


def test_only_a_task_may_be_a_function(tmp_path: Path) -> None:
    own(tmp_path, "grid_c", GRID)

    with pytest.raises(ConfigError, match="has no venue 'collect'"):
        loading.load_class("venue", "grid_c.collect", str(tmp_path))


# --- from entries to running tasks ----------------------------------------------------------------------------------


def entry(**params: Any) -> TaskEntry:
    return TaskEntry(id="t", type="iceberg", params=params)


def test_a_context_takes_what_a_program_gives() -> None:
    params = {
        "symbol": "BTC/USDT",
        "venue": "a",
        "side": "buy",
        "total_quantity": 0.1,
        "order_quantity": "0.05",
    }

    context: Any = loading.make_context(IcebergTask, entry(**params), Config())

    assert context.task_id == "t"
    assert context.total_quantity == Decimal("0.1")
    assert context.side is Side.BUY


def test_a_context_that_cannot_be_made_names_every_parameter() -> None:
    with pytest.raises(ConfigError) as caught:
        loading.make_context(
            IcebergTask,
            entry(symbol="BTC/USDT", side="up", colour="red", total_quantity=1),
            Config(),
        )

    assert len(caught.value.problems) == 4


async def test_a_function_face_gets_the_handle_only_if_it_asks() -> None:
    seen: list[Any] = []

    async def plain() -> None:
        seen.append("plain")

    async def with_desk(desk: Any, *, symbol: str) -> float:
        seen.append((desk, symbol))
        return 2.5

    def blocking(*, symbol: str) -> bool:
        seen.append(symbol)
        return True

    def quick(handle: Any) -> None:
        seen.append(handle)

    assert await loading.function_cycle(plain, "desk")() is None
    assert await loading.function_cycle(with_desk, "desk", {"symbol": "B"})() == 2.5
    assert await loading.function_cycle(blocking, "desk", {"symbol": "C"})() is None
    assert await loading.function_cycle(quick, "desk")() is None
    assert seen == ["plain", ("desk", "B"), "C", "desk"]


@pytest.mark.parametrize("name", ["every", "timeout"])
@pytest.mark.parametrize("value", ["0", "1e-999", "NaN", "1e999999", 10**400, "-1"])
def test_an_operator_cannot_adjust_to_a_time_that_makes_no_sense(
    name: str, value: Any
) -> None:
    with pytest.raises(CommandError):
        loading.adjustments({name: value})


def test_adjustments_are_read_like_the_file() -> None:
    found = loading.adjustments({"every": "2m", "priority": "MEDIUM", "timeout": "20s"})

    assert found["schedule"].every_s == 120
    assert found["priority"] is Priority.NORMAL
    assert found["timeout_s"] == 20


def test_an_adjustment_says_once_what_was_expected() -> None:
    with pytest.raises(
        CommandError, match=r"^priority is 'hi', expected one of critical, "
    ):
        loading.adjustments({"priority": "hi"})


def test_a_task_that_names_an_unlisted_instrument_is_a_doubt(tmp_path: Path) -> None:
    (tmp_path / "desk.yaml").write_text(
        "venues: [{name: alpha, type: paper, instruments: "
        "[{symbol: BTC/USDT, tick_size: 0.1, lot_size: 0.1, min_quantity: 0.1}]}]\n"
        "tasks:\n"
        "  - {id: sell, type: iceberg, symbol: BTC/USD, venue: alpha, side: SELL, total_quantity: 1, order_quantity: 1}\n"
    )

    found = loading.check_config(tmp_path / "desk.yaml")

    assert any(
        "task 'sell': `symbol` is 'BTC/USD', which venue alpha" in line
        for line in found
    )


@pytest.mark.parametrize(
    "changes",
    [{"every": "0"}, {"every": "soon"}, {"priority": "urgent"}, {"colour": "red"}],
)
def test_an_adjustment_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CommandError):
        loading.adjustments(changes)


def test_check_config_returns_problems_or_warnings(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(SMALL + "    enabled: false\nstate: {store: memory}\n")
    bad.write_text("nxme: x\n")

    assert [line.split(":")[0] for line in loading.check_config(good)] == [
        "warning"
    ] * 5
    assert loading.check_config(bad) == [
        f"{bad}: line 1: no key `nxme`. Did you mean 'name'?"
    ]


# --- many of one kind -------------------------------------------------------------------------------------


def test_count_stands_for_that_many_tasks_that_differ_in_their_number_alone(
    tmp_path: Path,
) -> None:
    config = load(tmp_path, task("count: 3"))

    assert [entry.id for entry in config.tasks] == ["sell-1", "sell-2", "sell-3"]
    assert config.tasks[0].params == config.tasks[2].params


@pytest.mark.parametrize("count", ["0", "-1", "100001", "many"])
def test_a_count_out_of_bounds_is_named_with_its_line(
    count: str, tmp_path: Path
) -> None:
    found = problems(tmp_path, task(f"count: {count}"))

    assert found[0].startswith("line 14: `tasks[0].count` is ")


def test_a_numbered_id_that_another_task_has_is_refused(tmp_path: Path) -> None:
    text = task("count: 2") + "  - {id: sell-2, type: candles}\n"

    assert "a second task has the id 'sell-2'" in problems(tmp_path, text)[0]


@pytest.mark.parametrize(
    ("key", "wrong"),
    [("tick_size: 0.1", "tick_size: -0.1"), ("lot_size: 0.001", "lot_size: 0")],
)
def test_a_grid_that_cannot_be_is_refused_with_its_line(
    key: str, wrong: str, tmp_path: Path
) -> None:
    found = problems(tmp_path, SMALL.replace(key, wrong))

    assert found[0].startswith("line 5: ")
    assert "expected more than 0" in found[0]


def test_what_a_task_itself_refuses_is_told_at_the_line_of_its_key(
    tmp_path: Path,
) -> None:
    found = problems(
        tmp_path, SMALL.replace("order_quantity: 0.1", "order_quantity: -0.1")
    )

    assert len(found) == 1
    assert found[0].startswith("line 13: ")
    assert "expected more than 0" in found[0]


# --- hostile values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number",
    [
        "NaN",
        ".nan",
        "sNaN",
        "Infinity",
        "1e999",
        "1e-999",
        '"1e999999"',
        '"1e99999999"',
    ],
)
@pytest.mark.parametrize(
    "key", ["total_quantity: 1.000000000000000001", "tick_size: 0.1"]
)
def test_a_number_that_would_break_arithmetic_is_named(
    tmp_path: Path, key: str, number: str
) -> None:
    name = key.split(":")[0]

    found = problems(tmp_path, SMALL.replace(key, f"{name}: {number}"))

    assert any(name in problem and "expected a number" in problem for problem in found)


@pytest.mark.parametrize("number", ["NaN", "1e999999"])
def test_such_a_number_is_found_inside_a_mapping_too(
    tmp_path: Path, number: str
) -> None:
    text = SMALL.replace(
        "type: paper\n", f"type: paper\n    balances: {{USDT: {number}}}\n"
    )

    assert any("balances" in problem for problem in problems(tmp_path, text))


@pytest.mark.parametrize("every", ["1e50s", "1e50", "99999999999d", "nan", "-1"])
def test_an_interval_that_no_clock_can_count_is_named(
    tmp_path: Path, every: str
) -> None:
    assert "duration" in problems(tmp_path, task(f"every: {every}"))[0]


def test_a_whole_number_of_sixty_digits_is_named(tmp_path: Path) -> None:
    assert "seed" in problems(tmp_path, f"seed: {10**59}\n{SMALL}")[0]


@pytest.mark.parametrize(
    "name", ["../../x", "/etc", "a b", ".hidden", "a@b", "a\\nb", "x" * 65]
)
def test_a_venue_has_a_name_that_can_be_a_directory(tmp_path: Path, name: str) -> None:
    found = problems(tmp_path, SMALL.replace("name: alpha", f'name: "{name}"'))

    assert "venues[0].name" in found[0]


@pytest.mark.parametrize("task_id", ["a\\nb", "a\\0b", "\\e[2J", "x" * 201])
def test_a_task_has_an_id_that_can_be_kept_and_shown(
    tmp_path: Path, task_id: str
) -> None:
    found = problems(tmp_path, SMALL.replace("id: sell", f'id: "{task_id}"'))

    assert "tasks[0].id" in found[0]


@pytest.mark.parametrize("task_id", ["a/../../b", "..", "🧊", "a b", "x" * 200])
def test_other_ids_are_free(tmp_path: Path, task_id: str) -> None:
    config = load(tmp_path, SMALL.replace("id: sell", f'id: "{task_id}"'))

    assert config.tasks[0].id == task_id


@pytest.mark.parametrize("symbol", ["BTC", "BTC/", "/USDT", "B\\e[2J/USDT", "A/B/C"])
def test_an_instrument_has_a_base_and_a_quote(tmp_path: Path, symbol: str) -> None:
    found = problems(
        tmp_path, SMALL.replace("symbol: BTC/USDT,", f'symbol: "{symbol}",')
    )

    assert "such as BTC/USDT" in found[0]


def test_ten_thousand_mistakes_are_not_all_told(tmp_path: Path) -> None:
    found = problems(tmp_path, "a: 1\n" * 10_000)

    assert len(found) == 1_001
    assert found[-1].endswith("and 9000 more.")
