"""Commands that change something. Each is audited by the desk with who, when and why.

Comes from: cli/app.py
Goes to: cli/connection.py, control.py
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from nightdesk.cli.connection import Target, actor, ask, state_directory
from nightdesk.cli.output import note, pairs, print_json, table
from nightdesk.errors import CommandError

__all__ = [
    "adjust",
    "halt",
    "pause",
    "reconcile",
    "recover",
    "resume",
    "resume_trading",
    "start",
    "stop",
    "stop_task",
    "trigger",
]

_Reason = Annotated[str, Parameter(name="--reason")]
_Flag = Annotated[bool, Parameter(negative="")]
_HERE = Target()
_SLOW_S = 40.0


def _act(
    target: Target, verb: str, arguments: dict[str, Any], reason: str, said: str
) -> int:
    reply = ask(target, verb, arguments, reason=reason, timeout_s=_SLOW_S)
    if target.json:
        print_json(reply)
    else:
        print(said)
    return 0


def start(task: str, *, reason: _Reason = "", target: Target = _HERE) -> int:
    """Start a stopped task.

    Args:
        task: Its id.
        reason: Why, for the audit trail.
    """
    return _act(target, "task.start", {"task_id": task}, reason, f"{task} started.")


def stop_task(task: str, *, reason: _Reason = "", target: Target = _HERE) -> int:
    """Stop a task until it is started again; its orders stay.

    Args:
        task: Its id.
        reason: Why, for the audit trail.
    """
    return _act(target, "task.stop", {"task_id": task}, reason, f"{task} stopped.")


def pause(task: str, *, reason: _Reason = "", target: Target = _HERE) -> int:
    """Pause a task; it stays paused over a restart.

    Args:
        task: Its id.
        reason: Why, for the audit trail.
    """
    return _act(target, "task.pause", {"task_id": task}, reason, f"{task} paused.")


def resume(task: str, *, reason: _Reason = "", target: Target = _HERE) -> int:
    """Resume a paused or quarantined task.

    Args:
        task: Its id.
        reason: Why, for the audit trail.
    """
    return _act(target, "task.resume", {"task_id": task}, reason, f"{task} resumed.")


def trigger(task: str, *, reason: _Reason = "", target: Target = _HERE) -> int:
    """Run a task now, whatever its schedule says.

    Args:
        task: Its id.
        reason: Why, for the audit trail.
    """
    return _act(target, "task.trigger", {"task_id": task}, reason, f"{task} triggered.")


def adjust(
    task: str,
    *,
    every: str | None = None,
    priority: str | None = None,
    timeout: str | None = None,
    reason: _Reason = "",
    target: Target = _HERE,
) -> int:
    """Change a running task; what is not given stays.

    Args:
        task: Its id.
        every: New interval, e.g. 5s or 2m.
        priority: critical, high, normal or low.
        timeout: Longest run, e.g. 20s; 0 for none.
        reason: Why, for the audit trail.
    """
    changes = {"every": every, "priority": priority, "timeout": timeout}
    given = {name: value for name, value in changes.items() if value is not None}
    if not given:
        raise CommandError("nothing to adjust: pass --every, --priority or --timeout.")
    said = ", ".join(f"{name} {value}" for name, value in given.items())
    return _act(
        target, "task.adjust", {"task_id": task, **given}, reason, f"{task}: {said}."
    )


def halt(
    *,
    cancel: _Flag = False,
    flatten: _Flag = False,
    reason: _Reason = "",
    target: Target = _HERE,
) -> int:
    """Stop trading at once: nothing opens until `resume-trading`. Works with a desk that does not answer, or is down.

    Args:
        cancel: Also cancel every open order.
        flatten: Also cancel every open order and close every position at market.
        reason: Why, for the audit trail.
    """
    from nightdesk import control

    mode: Literal["pause", "cancel", "flatten"] = (
        "flatten" if flatten else "cancel" if cancel else "pause"
    )
    directory = state_directory(target)
    was_there = directory.is_dir()
    found = control.halt(
        directory, mode, actor=actor(), reason=reason or "no reason given"
    )
    if target.json:
        print_json(found)
    elif found["by"] == "desk":
        print(
            f"HALTED. Cancelled {len(found.get('cancelled', ()))} orders, closed {len(found.get('flattened', ()))} positions."
        )
        if found.get("still_open") and mode != "pause":
            print(
                f"{len(found['still_open'])} orders are still open, see `nightdesk orders --open`; "
                f"give `halt --{mode}` again."
            )
    elif found["running"]:
        print(
            f"The desk does not answer. The flag file {found['path']} is written and the process signalled: it halts"
        )
        print(
            "at its next breath, and stays halted over a restart. If it is stuck for good, end it and start it again."
        )
        if mode != "pause":
            print(
                f"The flag only stops trading: ask for `halt --{mode}` again once the desk answers."
            )
    else:
        print(
            f"No desk is running. The flag file {found['path']} keeps the next one halted."
        )
    if not was_there:
        note(
            f"{directory} did not exist: if a desk runs elsewhere, it trades on. Name its directory with `--state DIR`."
        )
    return 0


def resume_trading(*, reason: _Reason, target: Target = _HERE) -> int:
    """Allow trading again after a halt.

    Args:
        reason: What was checked, for the audit trail.
    """
    if not reason.strip():
        raise CommandError(
            "--reason is empty. Say what was checked, e.g. --reason 'positions compared, all equal'."
        )
    from nightdesk.control import FLAG_NAME

    ask(target, "status")  # only a desk that answers may lose its flag file
    (state_directory(target) / FLAG_NAME).unlink(missing_ok=True)
    return _act(target, "resume_trading", {}, reason, "Trading is ACTIVE again.")


def reconcile(*, reason: _Reason = "", target: Target = _HERE) -> int:
    """Compare every open order with its venue now.

    Args:
        reason: Why, for the audit trail.
    """
    reply = ask(target, "reconcile", reason=reason, timeout_s=_SLOW_S)
    if target.json:
        print_json(reply)
        return 0
    report = reply.get("report")
    if isinstance(report, dict):
        pairs(
            {name.replace("_", " "): _in_words(value) for name, value in report.items()}
        )
    else:
        lines = report if isinstance(report, list) else [report]
        print("\n".join(str(line) for line in lines if line) or "Nothing differs.")
    return 0


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return str(value)


def stop(
    *,
    reason: _Reason = "",
    wait: Annotated[float, Parameter(name="--wait")] = 20.0,
    target: Target = _HERE,
) -> int:
    """Stop the desk: tasks reach a checkpoint, everything is saved, open orders stay at their venues.

    Args:
        reason: Why, for the audit trail.
        wait: Seconds to wait for its end; 0 returns at once.
    """
    import time

    reply = ask(target, "stop", reason=reason)
    directory = state_directory(target)
    until = time.monotonic() + wait
    stopped = False
    while not stopped and time.monotonic() < until:
        time.sleep(0.05)
        stopped = not _is_running(directory)
    if target.json:
        print_json({**reply, "stopped": stopped})
    else:
        print("Stopped." if stopped else "Stopping.")
    return 0 if stopped or not wait else 1


def _is_running(directory: Path) -> bool:
    from nightdesk.stores._lock import is_locked

    return is_locked(directory)


def recover(
    *, dry_run: Annotated[bool, Parameter(negative="")] = False, target: Target = _HERE
) -> int:
    """Show what the next start would take up: orders whose end is not proven, and tasks that were at work.

    Recovery is the normal start, so there is nothing to run by hand: `nightdesk run` does it.

    Args:
        dry_run: Only look. Required.
    """
    if not dry_run:
        raise CommandError(
            "every start recovers by itself: `nightdesk run`. `recover --dry-run` shows what it would do."
        )
    from nightdesk.cli.state import pending_work

    found = pending_work(state_directory(target))
    if target.json:
        print_json(found)
        return 0
    rows = [
        (
            o["client_order_id"],
            o["task_id"],
            o["symbol"],
            o["venue"],
            o["side"],
            o["quantity"],
            o["status"],
            o["step"],
        )
        for o in found["orders"]
    ]
    table(
        rows,
        ("ORDER", "TASK", "SYMBOL", "VENUE", "SIDE", "QUANTITY", "STATUS", "NEXT STEP"),
        "No order is open.",
    )
    print()
    table(
        [(t["task_id"], t["type"], t["state"]) for t in found["tasks"]],
        ("TASK", "TYPE", "STATE"),
        "No task was at work.",
    )
    print()
    pairs({"trading": found["trading"], "unreadable records": found["unreadable"]})
    return 0
