"""The desk in figures: what `status`, the live view and the console show.

Comes from: desk.py
Goes to: operations.py, cli/
"""

import os
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec

from nightdesk.model.health import TaskHealth

if TYPE_CHECKING:
    from nightdesk.desk import TradingDesk
    from nightdesk.roster import LocalTask

_MANY_FAILURES = 2
_MOST_OFFENDERS = 100

__all__ = ["each_health", "health", "iso", "money", "next_run_words", "snapshot"]


def iso(ns: int) -> str | None:
    """Return UTC nanoseconds as ISO-8601 with milliseconds; None for 0."""
    if not ns:
        return None
    return (
        datetime.fromtimestamp(ns / 1e9, UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )


def health(desk: "TradingDesk") -> list[TaskHealth]:
    """Return every task's health: in the desk, in its hosts, and finished ones that are kept."""
    return list(each_health(desk))


def each_health(desk: "TradingDesk") -> Iterator[TaskHealth]:
    """Yield what `health` returns one by one, so that a caller may let others work in between."""
    scheduler, hosts, roster = desk.scheduler, desk.roster.hosts, desk.roster
    for task_id in scheduler.task_ids():
        if scheduler.knows(task_id):
            line = scheduler.health(task_id)
            local = roster.local.get(task_id)
            if local is not None:
                line.state = local.task.context.state
            yield line
    for task_id in hosts.task_ids() if hosts is not None else ():
        if hosts is not None and hosts.knows(task_id):
            yield hosts.health_of_one(task_id)
    for task_id, local in list(roster.local.items()):
        if not scheduler.knows(task_id):
            yield _finished(local)


def _finished(local: "LocalTask") -> TaskHealth:
    state = local.task.context.state
    return TaskHealth(
        task_id=local.id,
        type=local.type,
        priority=str(local.entry.priority or local.task.priority),
        group=local.entry.group,
        status=_final_status(state),
        why=f"finished in state {state}",
        state=state,
    )


def _final_status(state: str) -> str:
    return "completed" if state == "COMPLETED" else "stopped"


def next_run_words(desk: "TradingDesk", task_id: str) -> str:
    """Return the next run in words, e.g. `paused until Mon 09:15 IST`."""
    return (
        desk.scheduler.next_run_in_words(task_id)
        if desk.scheduler.knows(task_id)
        else ""
    )


def money(desk: "TradingDesk") -> dict[str, Any]:
    """Return equity and its parts in quote units, marked at the side a close would meet."""
    unrealized = Decimal(0)
    unmarked = []
    for position in desk.positions.all():
        key = f"{position.symbol}@{position.venue}"
        quote = desk.quotes.get(key)
        if quote is not None and position.quantity:
            unrealized += position.unrealized_pnl(
                quote.bid if position.quantity > 0 else quote.ask
            )
        elif position.quantity:
            unmarked.append(key)
    realized = desk.positions.realized_pnl()
    fees = desk.positions.fees_in_quote()
    return {
        "starting_equity": desk.config.risk.starting_equity,
        "realized_pnl": realized,
        "unrealized_pnl": unrealized,
        "fees": fees,
        "equity": desk.config.risk.starting_equity + realized + unrealized - fees,
        # What the figures above leave out: positions counted at cost for want of a quote, fees in third assets.
        "unmarked": unmarked,
        "unpriced_fees": desk.positions.unpriced_fees(),
    }


def snapshot(desk: "TradingDesk") -> dict[str, Any]:
    """Return the whole desk at this instant."""
    now = desk.clock.now_ns()
    by_status = _count_by_status(desk)
    open_orders = desk.orders.open_orders()
    return {
        "name": desk.config.name,
        "mode": desk.config.mode,
        "live": desk.config.live,
        "up": True,
        "ready": desk.ready and str(desk.gate.state) == "ACTIVE",
        "trading": desk.gate.describe(),
        "started_at": iso(desk.started_ns),
        "now": iso(now),
        "uptime_s": round((now - desk.started_ns) / 1e9, 1),
        "pid": os.getpid(),
        "epoch": desk.store.epoch,
        "loop": type(desk.loop).__name__,
        "lanes": desk.lane_stats(),
        "degraded": bool(desk.watchdog and desk.watchdog.degraded),
        "tasks": {
            "total": by_status.total(),
            "by_status": dict(by_status),
        },
        "scheduler": desk.scheduler.stats(),
        "offenders": _offenders(desk),
        "switch": {
            **desk.switch.stats(),
            "last": [_trace(t) for t in list(desk.switch.traces)[-8:]],
        },
        "orders": {
            "open": len(open_orders),
            "unknown": sum(order.status == "UNKNOWN" for order in open_orders),
            "booked_fills": desk.orders.fill_count,
        },
        **money(desk),
        "recovery": desk.recovery.lines() if desk.recovery else [],
        "cache": desk.cache.stats(),
        "inbox": desk.inbox.stats(),
        "store": desk.store.stats(),
        "hosts": desk.roster.hosts.describe() if desk.roster.hosts else [],
        "sources": [
            {"name": name, "finished": source.finished}
            for name, source in desk.sources.items()
        ],
        "venues": [
            {"name": name, **venue.stats()} for name, venue in desk.venues.items()
        ],
        "quarantined": [
            {"kind": k, "key": key, "reason": why}
            for k, key, why in desk.store.quarantined()
        ],
        "alerts": list(desk.alerts)[-20:],
    }


def _count_by_status(desk: "TradingDesk") -> Counter[str]:
    """Count without building 10,000 reports: `status` is asked every second, and the loop waits for it."""
    counts = desk.scheduler.count_by_status()
    if desk.roster.hosts is not None:
        counts += desk.roster.hosts.count_by_status()
    for task_id, local in desk.roster.local.items():
        if not desk.scheduler.knows(task_id):
            counts[_final_status(local.task.context.state)] += 1
    return counts


def _offenders(desk: "TradingDesk") -> list[dict[str, Any]]:
    """Return who harmed its neighbours, and who fails for ever, the latest first."""
    found = list(desk.offenders.values())
    for place in (desk.scheduler, desk.roster.hosts):
        for line in place.health_of(("backoff", "quarantined")) if place else ():
            if line.status == "quarantined" or line.streak >= _MANY_FAILURES:
                found.append(_failing(line))
    found.sort(key=lambda offender: -offender["last_ns"])
    return [
        {**offender, "last_at": iso(offender["last_ns"])}
        for offender in found[:_MOST_OFFENDERS]
    ]


def _failing(line: TaskHealth) -> dict[str, Any]:
    is_out = line.status == "quarantined"
    return {
        "task_id": line.task_id,
        "kind": "quarantined" if is_out else "fails",
        "count": line.errors,
        "detail": line.why if is_out else f"{line.streak} times in a row: {line.why}",
        "stack": "",
        "last_ns": line.last_run_ns,
    }


def _trace(trace: Any) -> dict[str, Any]:
    return {**msgspec.to_builtins(trace), "switch_us": round(trace.switch_us, 1)}
