"""The desk in figures: what `status`, the live view and the console show.

Comes from: desk.py
Goes to: operations.py, cli/
"""

import os
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec

from nightdesk.model.health import TaskHealth

if TYPE_CHECKING:
    from nightdesk.desk import TradingDesk

__all__ = ["health", "iso", "money", "next_run_words", "snapshot"]


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
    lines = desk.scheduler.health_all()
    for line in lines:
        local = desk.roster.local.get(line.task_id)
        if local is not None:
            line.state = local.task.context.state
    if desk.roster.hosts is not None:
        lines += desk.roster.hosts.health()
    seen = {line.task_id for line in lines}
    for task_id, local in desk.roster.local.items():
        if task_id not in seen:
            state = local.task.context.state
            lines.append(
                TaskHealth(
                    task_id=task_id,
                    type=local.type,
                    priority=str(local.entry.priority or local.task.priority),
                    group=local.entry.group,
                    status="completed" if state == "COMPLETED" else "stopped",
                    why=f"finished in state {state}",
                    state=state,
                )
            )
    return lines


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
    for position in desk.positions.all():
        quote = desk.quotes.get(f"{position.symbol}@{position.venue}")
        if quote is not None and position.quantity:
            unrealized += position.unrealized_pnl(
                quote.bid if position.quantity > 0 else quote.ask
            )
    realized = desk.positions.realized_pnl()
    fees = desk.positions.fees_in_quote()
    return {
        "starting_equity": desk.config.risk.starting_equity,
        "realized_pnl": realized,
        "unrealized_pnl": unrealized,
        "fees": fees,
        "equity": desk.config.risk.starting_equity + realized + unrealized - fees,
    }


def snapshot(desk: "TradingDesk") -> dict[str, Any]:
    """Return the whole desk at this instant."""
    now = desk.clock.now_ns()
    lines = health(desk)
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
            "total": len(lines),
            "by_status": dict(Counter(line.status for line in lines)),
        },
        "offenders": [
            {**offender, "last_at": iso(offender["last_ns"])}
            for offender in sorted(desk.offenders.values(), key=lambda o: -o["last_ns"])
        ],
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


def _trace(trace: Any) -> dict[str, Any]:
    return {**msgspec.to_builtins(trace), "switch_us": round(trace.switch_us, 1)}
