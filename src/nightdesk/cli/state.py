"""Commands on the state directory. They read beside a running desk; only `restore` and `migrate` need it stopped.

Comes from: cli/app.py
Goes to: stores/_tools.py
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nightdesk.cli.connection import Target, state_directory
from nightdesk.cli.output import note, pairs, print_json
from nightdesk.kernel.clock import SystemClock
from nightdesk.stores import _tools as tools

__all__ = ["backup", "export", "inspect", "migrate", "pending_work", "restore"]

_HERE = Target()
_FINISHED = frozenset({"DENIED", "REJECTED", "FILLED", "CANCELED", "EXPIRED"})


def _tell(target: Target, facts: Mapping[str, Any]) -> int:
    if target.json:
        print_json({"version": 1, **facts})
        return 0
    pairs({name.replace("_", " "): _words(value) for name, value in facts.items()})
    return 0


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = (
            f"{name} ({_words(item)})"
            if isinstance(item, Mapping)
            else f"{name} {item}"
            for name, item in value.items()
        )
        return ", ".join(inner) or "none"
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value)) or "none"
    return str(value)


def inspect(*, target: Target = _HERE) -> int:
    """Show what the state directory holds, and whether it is sound."""
    return _tell(target, tools.inspect(state_directory(target)))


def export(*, kind: str | None = None, target: Target = _HERE) -> int:
    """Write every record as one JSON line, oldest first.

    Args:
        kind: Only records of this kind: context, order, fill, audit ...
    """
    kinds: set[str] = set()
    for record in tools.export(state_directory(target)):
        kinds.add(str(record.get("kind")))
        if kind is None or record.get("kind") == kind:
            sys.stdout.write(json.dumps(record, default=str, ensure_ascii=False) + "\n")
    if kind is not None and kind not in kinds:
        note(
            f"no record is of kind {kind!r}; there are {', '.join(sorted(kinds)) or 'none at all'}."
        )
    return 0


def backup(file: Path, *, target: Target = _HERE) -> int:
    """Copy the state into one file, also while a desk runs; the copy is read and checked.

    Args:
        file: Where to; must not exist.
    """
    return _tell(target, tools.backup(state_directory(target), file))


def restore(file: Path, *, target: Target = _HERE) -> int:
    """Put a backup in the place of the state, which is kept aside. The desk must be stopped.

    Args:
        file: A backup made by `state backup`.
    """
    return _tell(target, tools.restore(file, state_directory(target), SystemClock()))


def migrate(*, target: Target = _HERE) -> int:
    """Bring old state to this version, as every start does; a backup is made first."""
    return _tell(target, tools.migrate(state_directory(target), SystemClock()))


def pending_work(directory: Path) -> dict[str, Any]:
    """Return what a start would take up: `{orders, tasks, trading, unreadable}`."""
    orders: dict[str, dict[str, Any]] = {}
    tasks, unreadable, trading = [], 0, "ACTIVE"
    for record in tools.export(directory):
        data = record.get("data")
        if not isinstance(data, Mapping):
            unreadable += record.get("kind") in ("order", "context")
        elif record["kind"] == "order":
            orders[str(record["key"])] = dict(data)
        elif record["kind"] == "context" and record.get("shelf") == "active":
            tasks.append(_task_line(str(record["key"]), data))
        elif record["kind"] == "halt":
            trading = str(data.get("state", "HALTED"))
    if (directory / "HALT").exists():
        trading = "HALTED (flag file)"
    open_orders = [
        _order_line(order)
        for order in orders.values()
        if order.get("status") not in _FINISHED
    ]
    return {
        "version": 1,
        "orders": open_orders,
        "tasks": tasks,
        "trading": trading,
        "unreadable": unreadable,
    }


def _task_line(key: str, data: Mapping[str, Any]) -> dict[str, Any]:
    meta = data.get("_meta") or {}
    return {
        "task_id": key,
        "type": meta.get("type", "?"),
        "state": data.get("state", "?"),
    }


def _order_line(order: Mapping[str, Any]) -> dict[str, Any]:
    request = order.get("request") or {}
    never_sent = order.get("status") == "INITIALIZED"
    return {
        "client_order_id": order.get("client_order_id"),
        "task_id": order.get("task_id"),
        "symbol": request.get("symbol"),
        "venue": request.get("venue"),
        "side": request.get("side"),
        "quantity": request.get("quantity"),
        "status": order.get("status"),
        "step": "ask the venue; nothing is sent again"
        if not never_sent
        else "ask the venue whether it was sent",
    }
