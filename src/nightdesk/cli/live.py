"""The live view: a process of its own that asks the desk four times a second and draws the answer.

It asks by the control socket like any other client, at low priority, and never more than a twentieth
of the desk's time; a desk that is busy is asked less often. It ends when the desk does.

Comes from: cli/start.py
Goes to: control.py
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nightdesk.cli.looking import duration, switch_count, why
from nightdesk.cli.output import clock, note, number, say_anything, us
from nightdesk.control import ControlClient, RemoteError
from nightdesk.errors import DeskNotRunningError, DeskSilentError
from nightdesk.telemetry.health import judge
from nightdesk.telemetry.words import visible

__all__ = ["Picture", "frame", "main"]

_PERIOD_S = 0.25
_SHARE = 20  # the view waits this many times as long as the desk worked for it
_SLOW_EVERY = 4
_MANY_TASKS = 500
_LEVEL_STYLES = {
    "well": "green",
    "degraded": "yellow",
    "halted": "bold red",
    "starting": "cyan",
}
_STATUS_STYLES = {
    "running": "green", "waiting": "", "parked": "magenta", "paused": "yellow", "backoff": "yellow",
    "quarantined": "bold red", "completed": "dim", "stopped": "dim",
}  # fmt: skip
_STATUS_ORDER = (
    "quarantined",
    "backoff",
    "running",
    "parked",
    "paused",
    "waiting",
    "stopped",
    "completed",
)

Reply = dict[str, Any]


class Picture:
    """What is known of the desk, and how old it is."""

    def __init__(self, ask: Callable[[str, Mapping[str, Any]], Reply]) -> None:
        self._ask = ask
        self._round = 0
        self.replies: dict[str, Reply] = {}
        self.trouble = ""
        self.took_s = 0.0

    def refresh(self) -> None:
        """Ask again; money and tasks each second, the headline each time."""
        started = time.monotonic()
        self._get("status", {})
        many = (self.replies.get("status", {}).get("tasks") or {}).get(
            "total", 0
        ) > _MANY_TASKS
        if self._round % (_SLOW_EVERY * (10 if many else 1)) == 0:
            self._get("tasks", {})
        if self._round % _SLOW_EVERY == 0:
            self._get("orders", {"open_only": True, "limit": 50})
            self._get("positions", {})
            self._get("logs", {"limit": 20, "level": "info"})
        self._round += 1
        self.took_s = time.monotonic() - started

    def _get(self, verb: str, arguments: Mapping[str, Any]) -> None:
        try:
            self.replies[verb] = self._ask(verb, arguments)
            self.trouble = ""
        except (DeskSilentError, RemoteError) as error:
            self.trouble = str(error)

    @property
    def pause_s(self) -> float:
        """How long to leave the desk alone now."""
        return max(_PERIOD_S, self.took_s * _SHARE)


# --- one frame ------------------------------------------------------------------------------------------


def frame(picture: Picture, width: int, height: int) -> RenderableType:
    """Return everything that fits into the terminal, the most important first."""
    status = picture.replies.get("status")
    if status is None:
        return Text(visible(picture.trouble) or "waiting for the desk ...", style="dim")
    head = _head(status, picture.trouble, width)
    room = max(4, height - len(head) - 1)
    sections = [section for section in _sections(picture, width) if section[1]]
    shares = _share_out(room, [len(rows) for _, rows, _ in sections])
    parts: list[RenderableType] = [*head]
    for (headings, rows, styles), lines in zip(sections, shares, strict=True):
        if lines > 1:
            parts.append(_grid(headings, rows, styles, lines, width))
    return Group(*parts)


Section = tuple[Sequence[str], list[list[str]], list[str]]


def _head(status: Reply, trouble: str, width: int) -> list[Text]:
    health = judge(status)
    trading = status.get("trading") or {}
    switch, orders, tasks = (
        status.get(key) or {} for key in ("switch", "orders", "tasks")
    )
    money = "LIVE MONEY" if status.get("live") else "paper"
    first = Text.assemble(
        (visible(f" {status.get('name')} "), "bold reverse"),
        f" {money}  ",
        (f"{health.level}  ", _LEVEL_STYLES[health.level]),
        (
            f"{trading.get('state', '-')}  ",
            "green" if trading.get("state") == "ACTIVE" else "bold red",
        ),
        f"up {duration(status.get('uptime_s'))}  tasks {tasks.get('total', 0)}  orders {orders.get('open', 0)}",
    )
    second = Text.assemble(
        (" equity ", "dim"), number(status.get("equity"), 2),
        ("  realized ", "dim"), _signed(status.get("realized_pnl")),
        ("  unrealized ", "dim"), _signed(status.get("unrealized_pnl")),
        ("  switches ", "dim"), str(switch_count(switch)),
        ("  p50 ", "dim"), us(switch.get("p50_us")),
        ("  p99.9 ", "dim"), us(switch.get("p999_us")),
    )  # fmt: skip
    lines = [first, second]
    lines += [
        Text(visible(f" ! {reason}"), style="yellow") for reason in health.reasons[:3]
    ]
    if trouble:
        lines.append(Text(visible(f" ! {trouble}"), style="bold red"))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def _signed(value: Any) -> Text:
    text = number(value, 2)
    return Text(text, style="red" if text.startswith("-") and text != "-" else "green")


def _sections(picture: Picture, width: int) -> list[Section]:
    replies = picture.replies
    return [
        _tasks(replies.get("tasks", {}).get("tasks") or [], width),
        _switches((replies["status"].get("switch") or {}).get("last") or []),
        _offenders(replies["status"].get("offenders") or []),
        _orders(replies.get("orders", {}).get("orders") or []),
        _positions(replies.get("positions", {}).get("positions") or []),
        _logs(replies.get("logs", {}).get("logs") or []),
    ]


def _tasks(lines: list[Reply], width: int) -> Section:
    lines = sorted(lines, key=lambda t: (_rank(t.get("status")), t.get("task_id", "")))
    wide = width >= 100
    headings = (
        ["TASK", "STATUS", "STATE", "NEXT RUN"]
        + (["LAG P99", "RUNS", "ERRORS"] if wide else [])
        + ["WHY"]
    )
    rows = []
    for task in lines:
        row = [
            task.get("task_id", ""),
            task.get("status", ""),
            task.get("state", ""),
            task.get("next_run_words") or clock(task.get("next_run")),
        ]
        if wide:
            row += [
                f"{task.get('lag_p99_s', 0) * 1000:.1f} ms",
                str(task.get("runs", 0)),
                str(task.get("errors", 0)),
            ]
        rows.append([*row, why(task)])
    return (
        headings,
        rows,
        [_STATUS_STYLES.get(task.get("status", ""), "") for task in lines],
    )


def _rank(status: Any) -> int:
    return (
        _STATUS_ORDER.index(status) if status in _STATUS_ORDER else len(_STATUS_ORDER)
    )


def _switches(lines: list[Reply]) -> Section:
    rows = [
        [clock(t.get("at")), str(t.get("handler", "")), str(t.get("key", "")), f"{t.get('edge_ppm', 0)} ppm",
         str(t.get("outcome", "")), us(t.get("switch_us")), f"{t.get('parked', 0)} parked"]
        for t in reversed(lines)
    ]  # fmt: skip
    styles = [
        "" if t.get("outcome") == "handled" else "yellow" for t in reversed(lines)
    ]
    return (
        ["SWITCHES", "HANDLER", "KEY", "EDGE", "OUTCOME", "LATENCY", "BACKGROUND"],
        rows,
        styles,
    )


def _offenders(lines: list[Reply]) -> Section:
    rows = [
        [str(o.get(k, "")) for k in ("task_id", "kind", "detail", "count")]
        for o in lines
    ]
    return ["OFFENDERS", "WHAT", "DETAIL", "COUNT"], rows, ["red"] * len(rows)


def _orders(lines: list[Reply]) -> Section:
    rows = [
        [o["task_id"], o["side"], f"{number(o['filled_quantity'])}/{number(o['quantity'])}", f"{o['symbol']}@{o['venue']}",
         number(o.get("price")), o["status"]]
        for o in reversed(lines)
    ]  # fmt: skip
    return (
        ["OPEN ORDERS", "SIDE", "FILLED", "INSTRUMENT", "PRICE", "STATUS"],
        rows,
        [""] * len(rows),
    )


def _positions(lines: list[Reply]) -> Section:
    rows = [
        [f"{p['symbol']}@{p['venue']}", number(p["quantity"]), number(p["average_price"], 4), number(p.get("mark_price"), 4),
         number(p.get("unrealized_pnl"), 2), number(p["realized_pnl"], 2)]
        for p in lines
    ]  # fmt: skip
    return (
        ["POSITIONS", "QUANTITY", "ENTRY", "MARK", "UNREALIZED", "REALIZED"],
        rows,
        [""] * len(rows),
    )


def _logs(lines: list[Reply]) -> Section:
    rows, styles = [], []
    for entry in reversed(lines):
        fields = " ".join(
            f"{k}={v}" for k, v in entry.items() if k not in ("at", "level", "event")
        )
        rows.append(
            [
                clock(entry.get("at")),
                str(entry.get("level", "")),
                f"{entry.get('event', '')}  {fields}".strip(),
            ]
        )
        styles.append(
            {"warning": "yellow", "error": "red", "critical": "bold red"}.get(
                str(entry.get("level")), "dim"
            )
        )
    return ["LOG", "", ""], rows, styles


def _share_out(room: int, wanted: Sequence[int]) -> list[int]:
    """Divide the lines among the sections (a heading and its rows), so that each shows something."""
    shares = [0] * len(wanted)
    left = room
    while left > 0:
        hungry = [i for i, want in enumerate(wanted) if shares[i] < want + 1]
        if not hungry:
            break
        for i in hungry:
            if left > 0:
                shares[i] += 1
                left -= 1
    return shares


def _grid(
    headings: Sequence[str],
    rows: list[list[str]],
    styles: Sequence[str],
    lines: int,
    width: int,
) -> Table:
    shown = Table(
        box=None,
        pad_edge=False,
        header_style="bold",
        expand=False,
        width=None,
        padding=(0, 1),
    )
    for index, heading in enumerate(headings):
        last = index == len(headings) - 1
        shown.add_column(
            heading,
            no_wrap=True,
            overflow="ellipsis",
            ratio=None,
            max_width=max(8, width // 2 if last else width // 4),
        )
    room = lines - 1
    hidden = len(rows) - room
    if hidden > 0:
        room -= 1
        hidden += 1
    for row, style in list(zip(rows, styles, strict=True))[: max(room, 0)]:
        shown.add_row(*(Text(visible(cell)) for cell in row), style=style)
    if hidden > 0:
        shown.add_row(Text(f"... {hidden} more"), style="dim")
    return shown


# --- the process ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw until the desk ends or SIGTERM arrives."""
    directory = Path((sys.argv[1:] if arguments is None else arguments)[0])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    with contextlib.suppress(OSError):
        os.nice(10)
    parent = os.getppid()
    with ControlClient(directory, 5.0) as client:
        picture = Picture(
            lambda verb, arguments: client.ask(verb, arguments, actor="live view")
        )
        say_anything()
        console = Console(highlight=False)
        with (
            contextlib.suppress(OSError),
            Live(
                console=console, screen=True, auto_refresh=False, redirect_stdout=False
            ) as live,
        ):
            while os.getppid() == parent:
                try:
                    picture.refresh()
                except DeskNotRunningError:
                    break
                live.update(frame(picture, console.width, console.height), refresh=True)
                time.sleep(picture.pause_s)
    if os.getppid() != parent:
        note(
            "the desk's process is gone without a word. Start it again: it goes on where it stood."
        )
    return 0


def _leave(*_: object) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
