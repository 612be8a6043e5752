"""Recovery: 10,000 active tasks, a desk that was killed, and the time until the next one acts.

A process writes the state as a desk does (contexts by the real serializer, and for each task a filled
order with its fill, in the default store), and ends without closing anything. Then
`nightdesk run` is started on a copy of it, again and again, and its own log says when it was ready and when
the first task took a step. The baseline is the loop that design 001 describes: one JSON file per task, read,
parsed and made into an object. It checks no byte, asks no venue and knows no orders.

Comes from: cli/
Goes to: desk.py, roster.py, stores/sqlite.py
"""

import argparse
import asyncio
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from nightdesk.abc import Put
from nightdesk.bench._figures import figures, machine, stillness, table
from nightdesk.errors import CommandError
from nightdesk.kernel.clock import SystemClock

__all__ = ["BAR_S", "main", "render", "run"]

BAR_S = 2.0
OURS, BASELINE = "nightdesk", "json file per task"
_VENUE = "paper"
_SYMBOLS = 100
_BATCH = 1_000
_TIMEOUT_S = 120.0
_STEP = re.compile(r"(?P<name>.+): (?P<count>\d+) in (?P<ms>[\d.]+) ms")


def run(
    tasks: int = 10_000,
    samples: int = 5,
    *,
    orders_per_task: int = 1,
    directory: str | None = None,
) -> dict[str, Any]:
    """Start a desk on the same crashed state, `samples` times, in turn with the baseline.

    Args:
        tasks: Active icebergs, each partly executed.
        samples: Starts of each contender, each in a process of its own.
        orders_per_task: Filled children of each iceberg in the ledger, each with one fill.
        directory: On the disk to measure; by default the working directory.

    Returns:
        Per contender the figures, in seconds, of `ready_s`, `first_action_s` (both from the start of the
        process), `start_s` (from `TradingDesk.start`) and `cpu_s`; `steps_ms` of the median start; the bar.
    """
    with tempfile.TemporaryDirectory(
        prefix=".bench-recover-", dir=directory or Path.cwd()
    ) as place:
        home = Path(place)
        _leave_crashed_state(home, tasks, orders_per_task)
        quiet = [stillness()]
        found: dict[str, list[dict[str, Any]]] = {OURS: [], BASELINE: []}
        for number in range(samples):
            found[OURS].append(_start_desk(home, number))
            found[BASELINE].append(_start_naive(home))
        quiet.append(stillness())
        size = sum(p.stat().st_size for p in (home / "crashed").iterdir())
    return _result(tasks, orders_per_task, size, found, quiet)


def _result(
    tasks: int,
    orders_per_task: int,
    size: int,
    found: dict[str, list[dict[str, Any]]],
    quiet: list[dict[str, float]],
) -> dict[str, Any]:
    kinds = ("ready_s", "first_action_s", "start_s", "cpu_s")
    contenders = {
        name: {
            kind: figures(each[kind] for each in starts if kind in each)
            for kind in kinds
        }
        for name, starts in found.items()
    }
    median = sorted(found[OURS], key=lambda each: each["ready_s"])[
        len(found[OURS]) // 2
    ]
    ready = contenders[OURS]["ready_s"]["p50"]
    return {
        "benchmark": "recover",
        "tasks": tasks,
        "orders_per_task": orders_per_task,
        "state_bytes": size,
        "contenders": contenders,
        "steps_ms": median["steps_ms"],
        "times_baseline": round(ready / contenders[BASELINE]["ready_s"]["p50"], 2),
        "bar_s": BAR_S,
        "of_bar": round(ready / BAR_S, 2),
        "passed": ready <= BAR_S,
        "stillness": quiet,
        "machine": machine(),
    }


def render(result: dict[str, Any]) -> str:
    """Return `result` of `run` as text for a terminal."""
    rows = [
        (
            name,
            kind.removesuffix("_s").replace("_", " "),
            f["n"],
            *(f"{f[share]:.3f}" for share in ("p50", "p99", "p99.9", "max")),
        )
        for name, kinds in result["contenders"].items()
        for kind, f in kinds.items()
        if f["n"]
    ]
    steps = [(name, float(ms)) for name, ms in result["steps_ms"].items()]
    host = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in host["versions"].items())
    lost = max(each["lost_share"] for each in result["stillness"])
    verdict = "passed" if result["passed"] else "missed"
    return "\n".join(
        (
            f"{host['processor']}, {host['cpus']} cores, {host['system']}; {versions}; load {host['load_average']}",
            f"a process that only looks at the clock lost up to {lost:.1%} of its time here",
            f"{result['tasks']:,} active tasks, {result['orders_per_task']} filled order(s) each, "
            f"{result['state_bytes'] / 1e6:.1f} MB of state left by a crash",
            "",
            table(
                ("contender", "seconds until", "n", "p50", "p99", "p99.9", "max"), rows
            ),
            "",
            table(("where the median start spent its time", "ms"), steps),
            "",
            f"ready after {result['contenders'][OURS]['ready_s']['p50']:.2f} s, bar {result['bar_s']:g} s: {verdict}; "
            f"{result['times_baseline']} times the baseline, which checks nothing and asks nobody",
        )
    )


# --- One start, in a process of its own ------------------------------------------------------------


def _start_desk(home: Path, number: int) -> dict[str, Any]:
    """Start the desk on a copy of the crashed state, kill it after its first action, return what its log said."""
    state = home / f"state-{number}"
    shutil.copytree(home / "crashed", state)
    command = [sys.executable, "-m", "nightdesk", "run", "-c", str(home / "desk.yaml")]
    command += ["--state", str(state), "--no-console"]
    before_s = _children_cpu_s()
    began_ns = SystemClock().now_ns()
    found: dict[str, Any] = {}
    steps: dict[str, float] = {}
    last = ""
    with _process(command) as process:
        for line in _lines(process):
            last = line
            entry = json.loads(line)
            event, at_s = entry["event"], _since_s(entry, began_ns)
            if event == "recovery" and (step := _STEP.match(entry["step"])):
                steps[f"orders: {step['name']}"] = float(step["ms"])
            elif event == "desk ready":
                found |= {"ready_s": at_s, "start_s": entry["start_s"]}
                found["steps_ms"] = {
                    "process, imports, configuration": round(
                        (at_s - entry["start_s"]) * 1000, 1
                    ),
                    **entry["took_ms"],
                    **steps,
                }
            elif event == "first action":
                found["first_action_s"] = at_s
                break
    if "first_action_s" not in found:
        raise CommandError(
            f"the desk of the benchmark did not act; its last line: {last}"
        )
    found["cpu_s"] = _children_cpu_s() - before_s
    shutil.rmtree(state)
    return found


def _start_naive(home: Path) -> dict[str, Any]:
    before_s = _children_cpu_s()
    began_ns = SystemClock().now_ns()
    script = Path(__file__).with_name("_naive_recovery.py")
    command = [sys.executable, str(script), str(home / "files")]
    with _process(command) as process:
        stamps = [(int(line) - began_ns) / 1e9 for line in _lines(process)]
    ready_s, first_action_s = stamps
    return {
        "ready_s": ready_s,
        "first_action_s": first_action_s,
        "cpu_s": _children_cpu_s() - before_s,
    }


class _process:
    """A child whose standard output is read, and that is killed in the end, or when its time is up."""

    def __init__(self, command: list[str]) -> None:
        self._command = command

    def __enter__(self) -> "subprocess.Popen[str]":
        self._child = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        self._timer = threading.Timer(_TIMEOUT_S, self._child.kill)
        self._timer.start()
        return self._child

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._child.kill()
        if self._child.stdout is not None:
            self._child.stdout.close()
        self._child.wait()


def _lines(process: "subprocess.Popen[str]") -> Iterator[str]:
    stream: IO[str] | None = process.stdout
    assert stream is not None
    return iter(stream.readline, "")


def _since_s(entry: dict[str, Any], began_ns: int) -> float:
    from datetime import datetime

    return datetime.fromisoformat(entry["at"]).timestamp() - began_ns / 1e9


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- The state a crash leaves ------------------------------------------------------------------------


def _leave_crashed_state(home: Path, tasks: int, orders_per_task: int) -> None:
    command = [sys.executable, "-m", "nightdesk.bench.recover", "--prepare"]
    done = subprocess.run(
        [*command, str(home), str(tasks), str(orders_per_task)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise CommandError(
            f"the benchmark's state could not be made:\n{done.stderr[-2000:]}"
        )


async def _prepare(home: Path, tasks: int, orders_per_task: int) -> None:
    from nightdesk.stores.sqlite import SqliteStore

    (home / "desk.yaml").write_text(_config(), encoding="utf-8")
    (home / "files").mkdir()
    store = SqliteStore(home / "crashed", clock=SystemClock())
    await store.start()
    batch: list[Put] = []
    for put in _records(tasks, orders_per_task, store.epoch):
        if put.kind == "context":
            (home / "files" / f"{put.key}.json").write_bytes(put.data)
        batch.append(put)
        if len(batch) >= _BATCH:
            await store.save(batch)
            batch = []
    await store.save(batch)


def _records(tasks: int, orders_per_task: int, epoch: int) -> Iterator[Put]:
    """Yield what `tasks` icebergs, each with some filled children, leave in the store."""
    from nightdesk.model.order import Fill, Order, OrderRequest, OrderStatus, Side
    from nightdesk.model.serializer import encode_context
    from nightdesk.orders.ids import ClientOrderIds
    from nightdesk.orders.records import cursor_put, fill_put, order_put, position_put
    from nightdesk.portfolio.positions import Positions
    from nightdesk.tasks.iceberg import IcebergContext, IcebergTask

    now = SystemClock().now_ns()
    ids = ClientOrderIds("nd1", epoch, now // 1_000_000)
    positions = Positions()
    child, price = Decimal("0.05"), Decimal("100.5")
    for number in range(tasks):
        name, symbol = f"iceberg-{number:06d}", f"C{number % _SYMBOLS:03d}/USDT"
        newest = ""
        for _ in range(orders_per_task):
            newest = ids.next()
            request = OrderRequest(
                symbol=symbol, venue=_VENUE, side=Side.SELL, quantity=child, price=price
            )
            order = Order(
                client_order_id=newest,
                task_id=name,
                request=request,
                status=OrderStatus.FILLED,
                venue_order_id=f"v-{newest}",
                filled_quantity=child,
                average_price=price,
                created_ns=now,
                updated_ns=now,
            )
            fill = Fill(
                venue=_VENUE,
                symbol=symbol,
                trade_id=newest,
                venue_order_id=f"v-{newest}",
                client_order_id=newest,
                side=Side.SELL,
                quantity=child,
                price=price,
                ts_event_ns=now,
            )
            positions.apply(fill)
            yield order_put(order)
            yield fill_put(fill)
        context = IcebergContext(
            task_id=name,
            state="EXECUTING",
            symbol=symbol,
            venue=_VENUE,
            side=Side.SELL,
            total_quantity=Decimal(5),
            order_quantity=child,
            filled_quantity=child * orders_per_task,
            avg_price=price if orders_per_task else Decimal(0),
            order_id=newest or None,
            started_ns=now,
            progress_ns=now,
        )
        data = encode_context(
            context,
            type="iceberg",
            schema=IcebergTask.schema_version,
            saved_ns=now,
            epoch=epoch,
        )
        yield Put("context", name, data)
    for position in positions.all():
        symbol = position.symbol
        yield position_put(symbol, _VENUE, positions.record(symbol, _VENUE))
    yield cursor_put(_VENUE, now)


def _config() -> str:
    """A desk that lists no task: all that it runs was added while an earlier one ran."""
    instruments = [
        {"symbol": f"C{number:03d}/USDT", "tick_size": "0.1", "lot_size": "0.01"}
        | {"min_quantity": "0.01", "min_notional": "1"}
        for number in range(_SYMBOLS)
    ]
    venue = {"name": _VENUE, "type": "paper", "instruments": instruments}
    desk = {"name": "recover", "allow_empty": True, "background": {"hosts": 0}}
    # JSON is YAML as well.
    return json.dumps({**desk, "venues": [venue]}, indent=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line."""
    parser = argparse.ArgumentParser(prog="recovery", description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--orders-per-task", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--prepare", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.prepare:
        home, tasks, orders_per_task = options.prepare
        asyncio.run(_prepare(Path(home), int(tasks), int(orders_per_task)))
        os._exit(0)  # as a crash ends it: nothing is closed
    result = run(
        options.tasks, options.samples, orders_per_task=options.orders_per_task
    )
    print(json.dumps(result, indent=2) if options.json else render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
