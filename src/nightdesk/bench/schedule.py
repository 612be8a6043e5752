"""Promise of the scheduler: 100,000 periodic tasks at 1 Hz on one core, each on time.

Three contenders run the same empty coroutine once a second, sixteen starts per millisecond: our scheduler
on the lane loop, APScheduler's AsyncIOScheduler, and one `while True: sleep` coroutine per task, the
latter two on plain uvloop. Each measurement has a process of its own, one after the other. Lag is
counted from the instant a run was due. APScheduler climbs a ladder of scales until its lag is too great.

Comes from: cli/
Goes to: kernel/scheduler.py
"""

import argparse
import asyncio
import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from nightdesk.bench._figures import machine, table
from nightdesk.errors import CommandError
from nightdesk.kernel.clock import SystemClock
from nightdesk.kernel.figures import Histogram
from nightdesk.kernel.loop import new_event_loop
from nightdesk.kernel.runner import Registration
from nightdesk.kernel.scheduler import Scheduler
from nightdesk.model.schedule import Schedule

__all__ = ["main", "report", "run"]

_WARM_UP_S = 2.0
_INTERVAL_S = 1.0
_SECOND_NS = 1_000_000_000
_EARLY_NS = 5_000_000
_LIMIT_MS = 10.0
_KEPT_SHARE = 0.995
_HEAD = (
    "contender",
    "tasks",
    "runs",
    "on time %",
    "lag p50 ms",
    "p99",
    "p99.9",
    "max",
    "cpu us/run",
    "cpu %",
    "KiB/task",
)


class Tally:
    """Counts runs and, for contenders that do not measure it themselves, lags."""

    def __init__(self) -> None:
        self.runs = 0
        self.lags = Histogram()
        self.begin_ns = 0

    async def empty(self) -> None:
        """What each of our tasks does."""
        self.runs += 1

    def note(self, number: int) -> None:
        """Count a run of task `number` and its distance from the grid; timers may ring a little early."""
        self.runs += 1
        since = time.monotonic_ns() - self.begin_ns - _phase_ns(number)
        self.lags.add((since + _EARLY_NS) % _SECOND_NS - _EARLY_NS)


def _phase_ns(number: int) -> int:
    """All contenders start sixteen tasks per millisecond, as our scheduler does."""
    return number // 16 * 1_000_000 % _SECOND_NS


def run(
    tasks: int = 100_000,
    seconds: float = 10.0,
    ladder: Sequence[int] = (1_000, 2_000, 5_000, 10_000, 20_000),
    rounds: int = 2,
) -> dict[str, Any]:
    """Measure every contender and return the figures.

    Args:
        tasks: The full scale, for ours and for the sleep loops.
        seconds: How long these are measured, after a warm-up of two seconds.
        ladder: Scales at which APScheduler and ours are measured side by side, each for three seconds.
        rounds: How often all take their turn; the best round of each counts, since other work on the
            machine only ever makes one worse.
    """
    plan = [("nightdesk", tasks, seconds), ("sleep loops", tasks, seconds)]
    plan += [
        (name, scale, min(seconds, 3.0))
        for scale in ladder
        for name in ("nightdesk", "apscheduler")
    ]
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for _ in range(rounds):
        for contender, scale, took in plan:
            found = _measure(contender, scale, took)
            known = best.get((contender, scale))
            if known is None or _rank(found) < _rank(known):
                best[contender, scale] = found
    ours, theirs = (_capacity(best, name) for name in ("nightdesk", "apscheduler"))
    return {
        "results": list(best.values()),
        "capacity": {"nightdesk": ours, "apscheduler": theirs},
        "times_apscheduler": round(ours / theirs, 1) if theirs else None,
        "lag_limit_ms": _LIMIT_MS,
        "machine": machine(),
    }


def _rank(found: dict[str, Any]) -> tuple[float, float]:
    return -found["on_time_share"], found["lag_ms"]["p99"]


def _capacity(best: dict[tuple[str, int], dict[str, Any]], contender: str) -> int:
    """Return the largest scale at which a contender kept every run and the limit of lag."""
    kept = [
        scale
        for (name, scale), found in best.items()
        if name == contender
        and found["lag_ms"]["p99"] <= _LIMIT_MS
        and found["on_time_share"] >= _KEPT_SHARE
    ]
    return max(kept, default=0)


def report(result: dict[str, Any]) -> str:
    """Return the figures as text."""
    rows = []
    for found in result["results"]:
        lag = found["lag_ms"]
        rows.append(
            (
                found["contender"],
                found["tasks"],
                found["runs"],
                round(found["on_time_share"] * 100, 2),
                *(lag[name] for name in ("p50", "p99", "p99.9", "max")),
                found["cpu_us_per_run"],
                round(found["cpu_share"] * 100, 1),
                found["kib_per_task"],
            )
        )
    capacity = result["capacity"]
    versions = ", ".join(f"{k} {v}" for k, v in result["machine"]["versions"].items())
    return "\n".join(
        (
            table(_HEAD, rows),
            f"Tasks at 1 Hz with lag p99 <= {_LIMIT_MS:g} ms: nightdesk {capacity['nightdesk']:,}, "
            f"APScheduler {capacity['apscheduler']:,} ({result['times_apscheduler']} times). {versions}",
        )
    )


# --- One measurement, in a process of its own -----------------------------------------------------------


def _measure(contender: str, tasks: int, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "nightdesk.bench.schedule", "--play", contender]
    done = subprocess.run(
        [*command, str(tasks), str(seconds)],
        capture_output=True,
        text=True,
        timeout=seconds + 120,
        check=False,
    )
    if done.returncode:
        raise CommandError(f"the contender {contender} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


async def _play(contender: str, tasks: int, seconds: float) -> dict[str, Any]:
    tally = Tally()
    before_kib = _resident_kib()
    lags = await _CONTENDERS[contender](tally, tasks)
    # As the desk does once it is built: what lives for ever need not be looked at by the collector.
    gc.collect()
    gc.freeze()
    await asyncio.sleep(min(_WARM_UP_S, seconds))
    lags.clear()
    runs, cpu, wall = tally.runs, time.process_time(), time.monotonic()
    await asyncio.sleep(seconds)
    runs = tally.runs - runs
    cpu = time.process_time() - cpu
    wall = time.monotonic() - wall
    return {
        "contender": contender,
        "tasks": tasks,
        "runs": runs,
        "on_time_share": round(min(1.0, runs / (tasks * wall / _INTERVAL_S)), 4),
        "lag_ms": {
            name.replace("p999", "p99.9"): round(value / 1e6, 3)
            for name, value in lags.summary().items()
        },
        "cpu_us_per_run": round(cpu / max(1, runs) * 1e6, 2),
        "cpu_share": round(cpu / wall, 3),
        "kib_per_task": round((_resident_kib() - before_kib) / tasks, 2),
    }


def _resident_kib() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss) // 1024


async def _nightdesk(tally: Tally, tasks: int) -> Histogram:
    scheduler = Scheduler(clock=SystemClock(), random=random.Random(1))
    schedule = Schedule(every_s=_INTERVAL_S)
    for number in range(tasks):
        scheduler.add(
            Registration(
                task_id=f"task-{number}",
                type="empty",
                cycle=tally.empty,
                schedule=schedule,
            )
        )
    await scheduler.start()
    return scheduler.lags


async def _sleep_loops(tally: Tally, tasks: int) -> Histogram:
    tally.begin_ns = time.monotonic_ns()

    async def loop(number: int) -> None:
        due = tally.begin_ns + _phase_ns(number)
        while True:
            # What people write, with the drift taken out of it.
            due += _SECOND_NS
            await asyncio.sleep(max(0.0, (due - time.monotonic_ns()) / 1e9))
            tally.note(number)

    for number in range(tasks):
        _KEPT.append(asyncio.ensure_future(loop(number)))
    return tally.lags


async def _apscheduler(tally: Tally, tasks: int) -> Histogram:
    from datetime import UTC, datetime, timedelta

    from apscheduler.schedulers.asyncio import AsyncIOScheduler

    async def job(number: int) -> None:
        tally.note(number)

    scheduler = AsyncIOScheduler(timezone=UTC)
    scheduler.start(paused=True)
    now, tally.begin_ns = datetime.now(UTC), time.monotonic_ns()
    for number in range(tasks):
        phase_s = _phase_ns(number) / _SECOND_NS
        scheduler.add_job(
            job,
            "interval",
            (number,),
            seconds=_INTERVAL_S,
            next_run_time=now + timedelta(seconds=phase_s + _INTERVAL_S),
            coalesce=True,
            max_instances=1,
            misfire_grace_time=60,
        )
    scheduler.resume()
    _KEPT.append(scheduler)
    return tally.lags


_KEPT: list[Any] = []  # what must not be collected while the process lasts
_CONTENDERS: dict[str, Callable[[Tally, int], Coroutine[Any, Any, Histogram]]] = {
    "nightdesk": _nightdesk,
    "apscheduler": _apscheduler,
    "sleep loops": _sleep_loops,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line."""
    parser = argparse.ArgumentParser(prog=Path(__file__).stem, description=__doc__)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--play", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.play:
        contender, tasks, seconds = options.play
        loop = new_event_loop() if contender == "nightdesk" else _plain_loop()
        found = loop.run_until_complete(_play(contender, int(tasks), float(seconds)))
        print(json.dumps(found), flush=True)
        return 0
    result = run(options.tasks, options.seconds, rounds=options.rounds)
    print(json.dumps(result, indent=2) if options.json else report(result))
    return 0


def _plain_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


if __name__ == "__main__":
    sys.exit(main())
