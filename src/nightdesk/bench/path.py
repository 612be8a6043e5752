"""From an event to the order it causes: last byte of a POST sent, to last byte of the request at the venue.

A sender posts swaps over loopback TCP at random intervals. The desk is a whole one, in a process of its
own, as `nightdesk run` builds it: source, inbox, switch, handler, gate, an intent that is on disk, the
request. The baseline is a plain uvloop program that commits each order to SQLite in a thread and then
sends it, without gate, ledger or switch. Both get every event in turn, at the same far venue,
which stamps what arrives.

Comes from: cli/
Goes to: desk.py, bench/_path_parts.py
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from nightdesk.bench._figures import figures, machine, stillness, table
from nightdesk.bench._path_parts import Row, Swap, encode, message
from nightdesk.errors import CommandError

__all__ = ["BARS_US", "LOADS", "main", "render", "run"]

BARS_US = {"p50": 1_500, "p99": 5_000}
LOADS = {"quiet": 0, "working": 20}
"""Load to the number of background tasks, each of which saves what it remembers ten times a second."""
CONTENDERS = ("nightdesk", "uvloop")
_WARM_UP = 200
_SPACING_S = (0.001, 0.004)
_SETTLE_S = 1.0
_DISK_EVERY = 10
_PARTS = "nightdesk.bench._path_parts"


def run(
    events: int = 2_000,
    loads: Sequence[str] = tuple(LOADS),
    *,
    warm_up: int = _WARM_UP,
    directory: str | None = None,
    seed: int = 1,
) -> dict[str, Any]:
    """Measure desk and plain program under each load, event by event in turn.

    Args:
        events: Per contender and load; `warm_up` more go before.
        loads: Of `LOADS`.
        directory: On the disk to measure; by default the working directory.

    Returns:
        `loads[load][contender]` with figures in microseconds from the send of the event: `left_us` until the
        request was handed to the socket, `arrived_us` until the venue had it, `lost`; `stages_us`, the
        medians of the desk's stages; `disk_us`, what one append of 4 KiB and its fdatasync took in between,
        which is the part of the way that no program can shorten; `bars`.
    """
    quiet: list[dict[str, float]] = []
    results: dict[str, Any] = {}
    stages: dict[str, Any] = {}
    disk: dict[str, Any] = {}
    for load in loads:
        quiet.append(stillness())
        with tempfile.TemporaryDirectory(
            prefix=".bench-path-", dir=directory or Path.cwd()
        ) as place:
            sent, rows, syncs = _measure(
                Path(place), LOADS[load], events + warm_up, seed
            )
            on_disk = _orders_on_disk(Path(place))
        results[load] = {
            name: _figures(sent[number], rows[number], warm_up)
            for number, name in enumerate(CONTENDERS)
        }
        results[load]["nightdesk"]["orders_on_disk"] = on_disk
        disk[load] = figures(syncs)
        stages[load] = _stages(sent[0], rows[0], warm_up)
    return {
        "benchmark": "path",
        "events": events,
        "unit": "us",
        "loads": results,
        "stages_us": stages,
        "disk_us": disk,
        "bars": _bars(results),
        "stillness": quiet,
        "machine": machine(),
    }


def _figures(
    sent: dict[int, int], rows: dict[int, Row], warm_up: int
) -> dict[str, Any]:
    kept = [(at, rows[n]) for n, at in sent.items() if n >= warm_up and n in rows]
    return {
        "left_us": figures((row.durable_ns - at) / 1000 for at, row in kept),
        "arrived_us": figures((row.arrived_ns - at) / 1000 for at, row in kept),
        "lost": len(sent) - len(rows),
    }


def _stages(
    sent: dict[int, int], rows: dict[int, Row], warm_up: int
) -> dict[str, float]:
    kept = [(at, rows[n]) for n, at in sent.items() if n >= warm_up and n in rows]
    spans = {
        "sent to received": [row.received_ns - at for at, row in kept],
        "received to handler": [row.handler_ns - row.received_ns for _, row in kept],
        "handler to durable intent": [
            row.durable_ns - row.handler_ns for _, row in kept
        ],
        "durable intent to venue": [row.arrived_ns - row.durable_ns for _, row in kept],
    }
    return {name: round(median(each) / 1000, 1) for name, each in spans.items() if each}


def _bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "bar": f"{load}: {share} at most, us",
            "value": (value := each["nightdesk"]["arrived_us"][share]),
            "limit": limit,
            "of_limit": round(value / limit, 2),
            "of_baseline": round(value / each["uvloop"]["arrived_us"][share], 2),
            "reached": value <= limit,
        }
        for load, each in results.items()
        for share, limit in BARS_US.items()
        if all(each[name]["arrived_us"]["n"] for name in CONTENDERS)
    ]


def render(result: dict[str, Any]) -> str:
    """Return `result` of `run` as text for a terminal."""
    rows = [
        (load, contender, what, f["n"], f["p50"], f["p99"], f["p99.9"], f["max"])
        for load, by_contender in result["loads"].items()
        for contender, each in by_contender.items()
        for what, f in (("left", each["left_us"]), ("at venue", each["arrived_us"]))
        if f["n"]
    ]
    rows += [
        (
            load,
            "disk alone",
            "fdatasync",
            f["n"],
            f["p50"],
            f["p99"],
            f["p99.9"],
            f["max"],
        )
        for load, f in result["disk_us"].items()
        if f["n"]
    ]
    stages = [
        (load, name, value)
        for load, spans in result["stages_us"].items()
        for name, value in spans.items()
    ]
    bars = [
        (b["bar"], b["value"], float(b["limit"]), b["of_baseline"], _verdict(b))
        for b in result["bars"]
    ]
    host = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in host["versions"].items())
    lost = max((each["lost_share"] for each in result["stillness"]), default=0.0)
    head = ("load", "contender", "event to order", "n", "p50", "p99", "p99.9", "max")
    return "\n".join(
        (
            f"{host['processor']}, {host['cpus']} cores, {host['system']}; {versions}; load {host['load_average']}",
            f"a process that only looks at the clock lost up to {lost:.1%} of its time here",
            "microseconds from the send of the event; the intent is on disk before the order leaves",
            "",
            table(head, rows),
            "",
            table(("load", "stage of the desk, median", "us"), stages),
            "",
            table(("promise", "measured", "limit", "of baseline", "kept"), bars),
        )
    )


def _verdict(bar: dict[str, Any]) -> str:
    return "yes" if bar["reached"] else "NO"


# --- One run ------------------------------------------------------------------------------------------


def _measure(
    place: Path, chores: int, events: int, seed: int
) -> tuple[list[dict[int, int]], list[dict[int, Row]], list[float]]:
    """Return, per contender, when each event was sent and the row of its order; and what the disk took alone."""
    with ExitStack() as processes:

        def spawn(*arguments: object) -> int:
            command = [sys.executable, "-m", "nightdesk.bench.path", "--role"]
            process = subprocess.Popen(
                [*command, *map(str, arguments)], stdout=subprocess.PIPE
            )
            processes.callback(_end, process)
            assert process.stdout is not None
            port = process.stdout.readline()
            if not port:
                raise CommandError(
                    f"the benchmark's process {arguments[0]!r} ended at its start; see its message above"
                )
            return int(port)

        venue = spawn("venue")
        ports = [spawn(name, place, venue, chores) for name in CONTENDERS]
        sent, syncs = _send(ports, events, seed, place / "disk")
        time.sleep(_SETTLE_S)
        rows: list[dict[int, Row]] = [{} for _ in CONTENDERS]
        for row in _fetch(venue):
            rows[row.sender][row.number] = row
    return sent, rows, syncs


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _send(
    ports: list[int], events: int, seed: int, path: Path
) -> tuple[list[dict[int, int]], list[float]]:
    """Post every event to each of `ports` in turn; return when, and the microseconds of syncs in between."""
    rng = random.Random(seed)
    syncs: list[float] = []
    sent: list[dict[int, int]] = [{} for _ in ports]
    with ExitStack() as stack:
        lines = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            for port in ports
        ]
        file = stack.enter_context(path.open("wb", buffering=0))
        for line in lines:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        time.sleep(_SETTLE_S)
        for number in range(events):
            swap = Swap(
                number, f"0x{number:064x}", 7_000, Decimal(52_000), Decimal("1.0213")
            )
            post = message(b"/webhooks/swaps", encode(swap))
            for line, stamps in zip(lines, sent, strict=True):
                time.sleep(rng.uniform(*_SPACING_S))
                _drain(line)
                stamps[number] = time.monotonic_ns()
                line.sendall(post)
            if number % _DISK_EVERY == 0:
                time.sleep(_SPACING_S[1])
                before = time.perf_counter()
                file.write(bytes(4096))
                os.fdatasync(file.fileno())
                syncs.append((time.perf_counter() - before) * 1e6)
    return sent, syncs


def _drain(line: socket.socket) -> None:
    try:
        line.recv(65_536, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return


def _fetch(port: int) -> list[Row]:
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(message(b"/rows", b""))
        parts = iter(lambda: line.recv(1 << 20), b"")
        return msgspec.json.decode(b"".join(parts), type=list[Row])


def _orders_on_disk(place: Path) -> int:
    """Count what the desk, killed without warning, had made durable."""
    import apsw

    connection = apsw.Connection(str(place / "state" / "state.db"))
    try:
        count = connection.execute(
            "SELECT count(*) FROM records WHERE kind = 'order'"
        ).get
        return int(count)
    finally:
        connection.close()


# --- The processes ----------------------------------------------------------------------------------------


def _announce(port: int) -> None:
    print(port, flush=True)


def _play(role: str, *arguments: str) -> None:
    from nightdesk.bench._path_parts import FarVenue, plain_program

    if role == "nightdesk":
        place, venue, chores = arguments
        _play_desk(Path(place), int(venue), int(chores))
        return
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if role == "venue":
            runner.run(FarVenue().serve(_announce))
        else:
            place, venue, chores = arguments
            runner.run(plain_program(Path(place), int(venue), int(chores), _announce))


def _play_desk(place: Path, venue_port: int, chores: int) -> None:
    from nightdesk.bench import _path_parts as parts
    from nightdesk.config import (
        BackgroundConfig,
        Config,
        RiskConfig,
        SourceConfig,
        StateConfig,
        TaskEntry,
        VenueConfig,
    )
    from nightdesk.desk import TradingDesk
    from nightdesk.running import run as run_desk

    async def announce(desk: TradingDesk) -> None:
        source = desk.sources["posts"]
        assert source.__class__.__name__ == parts.PostSource.__name__
        _announce(source.port)  # type: ignore[attr-defined]

    run_desk(
        Config(
            name="path",
            state=StateConfig(directory=str(place / "state")),
            background=BackgroundConfig(hosts=0),
            risk=RiskConfig(
                max_orders_per_s=100_000, max_gross_notional=Decimal(10_000_000)
            ),
            venues=(
                VenueConfig(
                    name=parts.VENUE,
                    type=f"{_PARTS}.WireVenue",
                    options={"port": venue_port},
                ),
            ),
            sources=(SourceConfig(name="posts", type=f"{_PARTS}.PostSource"),),
            tasks=(
                TaskEntry(id="take", type=f"{_PARTS}.TakeTask", priority="critical"),
                *(
                    TaskEntry(id=f"chore-{number}", type=f"{_PARTS}.ChoreTask")
                    for number in range(chores)
                ),
            ),
        ),
        view=announce,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line."""
    parser = argparse.ArgumentParser(prog="event_to_order", description=__doc__)
    parser.add_argument("--events", type=int, default=2_000)
    parser.add_argument("--load", choices=(*LOADS, "all"), default="all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    loads = tuple(LOADS) if options.load == "all" else (options.load,)
    result = run(options.events, loads)
    print(json.dumps(result, indent=2) if options.json else render(result))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        _play(*sys.argv[2:])
        os._exit(0)
    sys.exit(main())
