"""Market hours: what a week of one exchange costs, by phase, with and without a calendar.

The real scheduler runs the tasks of a trading desk for one week of virtual time: market monitoring and
signal generation (critical), regime monitoring (high) and news (low), each with an interval for
open and one for closed hours. The baseline keeps the intervals of open hours round the clock, which
is what a desk without calendars does.

Comes from: cli/
Goes to: kernel/scheduler.py, kernel/hours.py, simulation/virtual.py
"""

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from nightdesk.bench._figures import table
from nightdesk.kernel.hours import Calendar, Calendars
from nightdesk.kernel.loop import in_lanes
from nightdesk.kernel.runner import Registration
from nightdesk.kernel.scheduler import Scheduler
from nightdesk.model.priority import Priority
from nightdesk.model.schedule import Pause, Schedule
from nightdesk.simulation.virtual import VirtualClock, VirtualLoop

__all__ = ["TASKS", "main", "report", "run"]

_SECOND_NS = 1_000_000_000
_DAYS = 7

TASKS: Mapping[str, tuple[Priority, float, float | Pause]] = {
    "market_monitoring": (Priority.CRITICAL, 5.0, 60.0),
    "signal_generation": (Priority.CRITICAL, 5.0, 60.0),
    "regime_monitoring": (Priority.HIGH, 30.0, 300.0),
    "news_integration": (Priority.LOW, 60.0, "pause"),
}


def run(
    calendar: str = "NSE", monday: str = "2026-11-23", cache_dir: str | None = None
) -> dict[str, Any]:
    """Play one week and count the runs of each task by phase.

    Args:
        calendar: The exchange.
        monday: First day, local to the exchange; the default week has a holiday on its Tuesday.
        cache_dir: Where compiled calendars are kept.
    """
    calendars = Calendars(Path(cache_dir) if cache_dir else None)
    market = calendars.get(calendar)
    zone = ZoneInfo(market.timezone)
    start = datetime.fromisoformat(monday).replace(tzinfo=zone)
    start_ns = int(start.timestamp()) * _SECOND_NS
    runs = _play(calendars, market, start_ns)
    open_s = _open_seconds(market, start_ns)
    closed_s = _DAYS * 86_400 - open_s
    tasks = {
        name: {
            "open": runs[name, "open"],
            "closed": runs[name, "closed"],
            "closed_without_calendar": round(closed_s / open_interval_s),
        }
        for name, (_, open_interval_s, _) in TASKS.items()
    }
    ours = sum(task["closed"] for task in tasks.values())
    baseline = sum(task["closed_without_calendar"] for task in tasks.values())
    return {
        "calendar": calendar,
        "week": f"{start:%a %Y-%m-%d} to {start + timedelta(days=_DAYS - 1):%a %Y-%m-%d}",
        "sessions": _sessions(market, start_ns, zone),
        "open_hours": round(open_s / 3600, 2),
        "closed_hours": round(closed_s / 3600, 2),
        "tasks": tasks,
        "closed_calls": ours,
        "closed_calls_without_calendar": baseline,
        "reduction_closed": round(1 - ours / baseline, 4),
    }


def report(result: dict[str, Any]) -> str:
    """Return the counts as text."""
    rows = [
        (
            name,
            counts["open"],
            counts["closed"],
            counts["closed_without_calendar"],
            round(100 - 100 * counts["closed"] / counts["closed_without_calendar"], 1),
        )
        for name, counts in result["tasks"].items()
    ]
    head = ("task", "open", "closed", "closed, no calendar", "less %")
    return "\n".join(
        (
            f"{result['calendar']}, {result['week']}: open {result['open_hours']} h, closed {result['closed_hours']} h",
            *(f"  {line}" for line in result["sessions"]),
            table(head, rows),
            f"calls in closed hours: {result['closed_calls']:,} instead of "
            f"{result['closed_calls_without_calendar']:,}, {result['reduction_closed']:.1%} less",
        )
    )


def _play(
    calendars: Calendars, market: Calendar, start_ns: int
) -> Counter[tuple[str, str]]:
    loop: Any = in_lanes(VirtualLoop)(1)
    clock = VirtualClock(loop, start_ns)
    scheduler = Scheduler(clock=clock, random=random.Random(1), calendars=calendars)
    runs: Counter[tuple[str, str]] = Counter()

    def cycle_of(name: str) -> Callable[[], Awaitable[None]]:
        async def cycle() -> None:
            runs[name, market.phase(clock.now_ns())] += 1

        return cycle

    for name, (priority, open_s, closed_s) in TASKS.items():
        schedule = Schedule(open_s=open_s, closed_s=closed_s, calendar=market.name)
        scheduler.add(
            Registration(
                task_id=name,
                type=name,
                cycle=cycle_of(name),
                schedule=schedule,
                priority=priority,
            )
        )

    async def week() -> None:
        await scheduler.start()
        await asyncio.sleep(_DAYS * 86_400 - 0.5)
        await scheduler.stop(1.0)

    try:
        loop.run_until_complete(week())
    finally:
        loop.close()
    return runs


def _open_seconds(market: Calendar, start_ns: int) -> int:
    total, now, end = 0, start_ns, start_ns + _DAYS * 86_400 * _SECOND_NS
    while now < end:
        change = min(market.next_change(now) or end, end)
        if market.is_open(now):
            total += change - now
        now = change
    return total // _SECOND_NS


def _sessions(market: Calendar, start_ns: int, zone: ZoneInfo) -> list[str]:
    lines = []
    for number in range(_DAYS):
        midnight = start_ns + number * 86_400 * _SECOND_NS
        noon = midnight + 43_200 * _SECOND_NS
        day = datetime.fromtimestamp(noon // _SECOND_NS, zone)
        opening = market.next_change(midnight)
        if opening is None or opening >= midnight + 86_400 * _SECOND_NS:
            lines.append(f"{day:%a %Y-%m-%d} closed")
        else:
            closing = market.next_change(opening) or opening
            begin, end = (
                datetime.fromtimestamp(ns // _SECOND_NS, zone)
                for ns in (opening, closing)
            )
            lines.append(f"{day:%a %Y-%m-%d} {begin:%H:%M} to {end:%H:%M %Z}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line."""
    parser = argparse.ArgumentParser(prog=Path(__file__).stem, description=__doc__)
    parser.add_argument("--calendar", default="NSE")
    parser.add_argument("--monday", default="2026-11-23")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    result = run(options.calendar, options.monday)
    print(json.dumps(result, indent=2) if options.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
