"""Commands that only look. Each asks the running desk; `--json` prints its reply as it came.

Comes from: cli/app.py
Goes to: cli/connection.py
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from cyclopts import Parameter, validators

from nightdesk.cli.connection import Target, ask, state_directory
from nightdesk.cli.output import clock, instant, number, pairs, print_json, table, us
from nightdesk.telemetry.words import visible

__all__ = [
    "duration",
    "fills",
    "logs",
    "opportunities",
    "orders",
    "performance",
    "positions",
    "show",
    "status",
    "switch_count",
    "tasks",
    "trades",
    "why",
    "workers",
]

_Limit = Annotated[
    int, Parameter(name=["--limit", "-n"], validator=validators.Number(gte=1))
]
_HERE = Target()


def status(*, target: Target = _HERE) -> int:
    """Show how the desk is: trading, tasks, switches, orders, money, and who misbehaves."""
    reply = ask(target, "status")
    if target.json:
        print_json(reply)
        return 0
    from nightdesk.telemetry.health import judge

    health = judge(reply)
    pairs(_headline(reply, health.level))
    for reason in health.reasons:
        print(visible(f"  ! {reason}"))
    offenders = reply.get("offenders") or []
    if offenders:
        print("\nOffenders")
        rows = [
            (
                o["task_id"],
                o["kind"],
                o.get("detail"),
                o["count"],
                clock(o.get("last_at")),
            )
            for o in offenders[:10]
        ]
        table(rows, ("TASK", "WHAT", "DETAIL", "COUNT", "LAST"), "")
    return 0


def _headline(reply: Mapping[str, Any], level: str) -> dict[str, str]:
    trading, switch, orders = (
        reply.get(key) or {} for key in ("trading", "switch", "orders")
    )
    tasks = reply.get("tasks") or {}
    by_status = ", ".join(
        f"{count} {name}"
        for name, count in sorted((tasks.get("by_status") or {}).items())
    )
    return {
        "desk": f"{reply.get('name')} ({reply.get('mode')}, {'LIVE' if reply.get('live') else 'paper'}), process {reply.get('pid')}",
        "health": level,
        "trading": _trading(trading),
        "up": f"{duration(reply.get('uptime_s'))}, start {reply.get('epoch')}, since {clock(reply.get('started_at'))}",
        "tasks": f"{tasks.get('total', 0)} ({by_status})"
        if by_status
        else str(tasks.get("total", 0)),
        "switches": f"{switch_count(switch)}, p50 {us(switch.get('p50_us'))}, p99.9 {us(switch.get('p999_us'))}, "
        f"max {us(switch.get('max_us'))}",
        "orders": f"{orders.get('open', 0)} open, {orders.get('unknown', 0)} unknown",
        "equity": f"{number(reply.get('equity'), 2)}, realized {number(reply.get('realized_pnl'), 2)}, "
        f"unrealized {number(reply.get('unrealized_pnl'), 2)}, fees {number(reply.get('fees'), 4)}",
    }


def _trading(trading: Mapping[str, Any]) -> str:
    """Return the trading state, and who changed it, when and why."""
    words = [str(trading.get("state", "-"))]
    if trading.get("since_ns"):
        words.append(f"since {clock(instant(trading['since_ns']))}")
    if trading.get("actor"):
        words.append(f"by {trading['actor']}")
    reason = trading.get("reason")
    return " ".join(words) + (f": {reason}" if reason else "")


def switch_count(switch: Mapping[str, Any]) -> int:
    """Return how many switches there were."""
    return int(switch.get("count", switch.get("switches", 0)))


def why(task: Mapping[str, Any]) -> str:
    """Return why a task waits, unless its next run says the same."""
    text = str(task.get("why") or "")
    return "" if text == task.get("next_run_words") else text


def duration(seconds: Any) -> str:
    """Return seconds as `2 d 3:04:05`."""
    whole = int(seconds or 0)
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days} d {text}" if days else text


def tasks(*, status: str | None = None, target: Target = _HERE) -> int:
    """List the tasks: where each stands, when it runs next, and why it waits.

    Args:
        status: Only those in this status, e.g. quarantined.
    """
    reply = ask(target, "tasks")
    if status:
        reply["tasks"] = [
            line for line in reply["tasks"] if line.get("status") == status
        ]
    if target.json:
        print_json(reply)
        return 0
    rows = [
        (
            line["task_id"],
            line["status"],
            line.get("state"),
            line["priority"],
            line.get("next_run_words") or clock(line.get("next_run")),
            line["runs"],
            line["errors"],
            f"{line['lag_p99_s'] * 1000:.1f} ms",
            why(line),
        )
        for line in reply["tasks"]
    ]
    table(
        rows,
        (
            "TASK",
            "STATUS",
            "STATE",
            "PRIORITY",
            "NEXT RUN",
            "RUNS",
            "ERRORS",
            "LAG P99",
            "WHY",
        ),
        "No tasks.",
    )
    return 0


def show(task: str, *, target: Target = _HERE) -> int:
    """Show one task: its health, what it remembers, the states it went through, and where it waits.

    Args:
        task: Its id.
    """
    reply = ask(target, "task.show", {"task_id": task})
    if target.json:
        print_json(reply)
        return 0
    nested = ("context", "history", "orders", "waits_at", "version")
    pairs(
        {
            name: value
            for name, value in reply.items()
            if name not in nested
            and not name.endswith("_ns")
            and value not in (None, "")
        }
    )
    context = reply.get("context") or {}
    if context:
        print("\nContext")
        pairs({f"  {name}": value for name, value in context.items()})
    waits = reply.get("waits_at") or []
    steps = [
        f"{clock(step.get('at'))}  {step.get('state')}"
        for step in reply.get("history") or []
    ]
    _section("States", steps)
    _section("Waits at", waits.splitlines() if isinstance(waits, str) else waits)
    return 0


def _section(heading: str, lines: list[str]) -> None:
    if lines:
        print(f"\n{heading}")
    for line in lines:
        print(visible(f"  {line}"))


_ORDER_HEADINGS = (
    "ORDER",
    "TASK",
    "SYMBOL",
    "VENUE",
    "SIDE",
    "QUANTITY",
    "PRICE",
    "FILLED",
    "STATUS",
    "UPDATED",
    "REASON",
)


def orders(*, open: bool = False, limit: _Limit = 50, target: Target = _HERE) -> int:
    """List orders, oldest first.

    Args:
        open: Only those that may still be working; UNKNOWN counts.
        limit: At most so many, the newest.
    """
    reply = ask(target, "orders", {"open_only": open, "limit": limit})
    if target.json:
        print_json(reply)
        return 0
    rows = [
        (
            o["client_order_id"], o["task_id"], o["symbol"], o["venue"], o["side"], number(o["quantity"]),
            number(o["price"]), number(o["filled_quantity"]), o["status"], clock(o.get("updated_at")), o.get("reason"),
        )
        for o in reply["orders"]
    ]  # fmt: skip
    table(rows, _ORDER_HEADINGS, "No orders.")
    return 0


def fills(*, limit: _Limit = 50, target: Target = _HERE) -> int:
    """List fills, oldest first.

    Args:
        limit: At most so many, the newest.
    """
    return _fills(target, "fills", limit)


def trades(*, limit: _Limit = 50, target: Target = _HERE) -> int:
    """List trades, oldest first.

    Args:
        limit: At most so many, the newest.
    """
    return _fills(target, "trades", limit)


def _fills(target: Target, verb: str, limit: int) -> int:
    reply = ask(target, verb, {"limit": limit})
    if target.json:
        print_json(reply)
        return 0
    rows = [
        (
            clock(f.get("at")), f["symbol"], f["venue"], f["side"], number(f["quantity"]), number(f["price"]),
            f"{number(f['fee'])} {f.get('fee_asset', '')}".strip(), f.get("liquidity"), f["client_order_id"],
        )
        for f in reply[verb]
    ]  # fmt: skip
    table(
        rows,
        (
            "AT",
            "SYMBOL",
            "VENUE",
            "SIDE",
            "QUANTITY",
            "PRICE",
            "FEE",
            "LIQUIDITY",
            "ORDER",
        ),
        f"No {verb}.",
    )
    return 0


def positions(*, target: Target = _HERE) -> int:
    """List positions, marked at the price a close would meet."""
    reply = ask(target, "positions")
    if target.json:
        print_json(reply)
        return 0
    rows = [
        (
            p["symbol"], p["venue"], number(p["quantity"]), number(p["average_price"]), number(p.get("mark_price")),
            number(p.get("unrealized_pnl"), 4), number(p["realized_pnl"], 4),
        )
        for p in reply["positions"]
    ]  # fmt: skip
    table(
        rows,
        ("SYMBOL", "VENUE", "QUANTITY", "ENTRY", "MARK", "UNREALIZED", "REALIZED"),
        "No positions.",
    )
    return 0


def opportunities(*, limit: _Limit = 20, target: Target = _HERE) -> int:
    """List the last switches, oldest first, with what became of each and how long it took.

    Args:
        limit: At most so many, the newest.
    """
    reply = ask(target, "opportunities", {"limit": limit})
    if target.json:
        print_json(reply)
        return 0
    rows = [
        (
            clock(o.get("at")),
            o["handler"],
            o["key"],
            o["edge_ppm"],
            o["outcome"],
            us(o.get("switch_us")),
            o["parked"],
            o.get("reason"),
        )
        for o in reply["opportunities"]
    ]
    table(
        rows,
        ("AT", "HANDLER", "KEY", "EDGE PPM", "OUTCOME", "SWITCH", "PARKED", "REASON"),
        "No opportunities yet.",
    )
    return 0


def performance(*, target: Target = _HERE) -> int:
    """Show equity, result and fees in quote units."""
    reply = ask(target, "performance")
    if target.json:
        print_json(reply)
        return 0
    pairs(
        {
            name.replace("_", " "): number(value, 4)
            for name, value in reply.items()
            if name != "version"
        }
    )
    return 0


def workers(*, target: Target = _HERE) -> int:
    """Show the background hosts: processes in which tasks run that may wait."""
    reply = ask(target, "workers")
    if target.json:
        print_json(reply)
        return 0
    hosts = reply["hosts"]
    headings = list(hosts[0]) if hosts else []
    rows = [[_short(host.get(name)) for name in headings] for host in hosts]
    table(
        rows,
        [name.upper() for name in headings],
        "No background hosts: every task runs in the desk.",
    )
    return 0


def _short(value: Any) -> str:
    return f"{len(value)}" if isinstance(value, (list, dict)) else str(value)


Level = Literal["debug", "info", "warn", "error"]


def logs(
    task: str | None = None,
    *,
    level: Level | None = None,
    limit: _Limit = 100,
    target: Target = _HERE,
) -> int:
    """Show the newest log lines, oldest first. Of a desk that is down, those in its file.

    Args:
        task: Only of this task.
        level: Only of this level and above.
        limit: At most so many, the newest.
    """
    from nightdesk.errors import DeskNotRunningError

    try:
        reply = ask(target, "logs", {"task_id": task, "level": level, "limit": limit})
    except DeskNotRunningError:
        lines = _from_file(state_directory(target) / "log.jsonl", task, level, limit)
        if lines is None:
            raise
        reply = {"version": 1, "logs": lines}
    if target.json:
        print_json(reply)
        return 0
    for entry in reply["logs"]:
        head = f"{clock(entry.pop('at', ''))} {entry.pop('level', ''):<8} {entry.pop('event', '')}"
        trouble = entry.pop("exception", None) or entry.pop("traceback", None)
        rest = " ".join(f"{key}={value}" for key, value in entry.items())
        print(visible(f"{head}  {rest}".rstrip()))
        if trouble:
            print(visible(str(trouble), keep="\n\t"))
    return 0


_TAIL_BYTES = 8 * 1024 * 1024
_RANKS = {"debug": 0, "info": 1, "warn": 2, "warning": 2, "error": 3, "critical": 4}


def _from_file(
    path: Any, task: str | None, level: str | None, limit: int
) -> list[dict[str, Any]] | None:
    import json

    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        raw = file.read().splitlines()
    found = []
    for line in raw:
        try:
            entry = json.loads(line)
        except ValueError:  # cut off by the seek, or by a crash
            continue
        matches = task is None or task in (entry.get("task"), entry.get("source"))
        if matches and _RANKS.get(entry.get("level"), 1) >= _RANKS.get(
            level or "debug", 0
        ):
            found.append(entry)
    return found[-limit:]
