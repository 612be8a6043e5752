"""Durable commits: group commit against one fsync per save.

Comes from: cli/
Goes to: stores/sqlite.py, stores/files.py

A hundred tasks each save a context of 1 KiB, wait until it is durable, and save the next. The baselines
do what programs usually do: a temporary file, fsync, rename and directory fsync in a worker
thread, and one SQLite transaction per save. All contenders take turns within one run, in
directories side by side, so that they share the same disk and the same weather.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import apsw

from nightdesk.abc import Put
from nightdesk.bench._figures import figures, machine, table
from nightdesk.kernel.clock import SystemClock
from nightdesk.kernel.loop import new_event_loop
from nightdesk.stores._directory import DirectoryStore
from nightdesk.stores.files import FilesStore
from nightdesk.stores.sqlite import SqliteStore

__all__ = ["CONTENDERS", "main", "report", "run"]

Save = Callable[[str, bytes], Awaitable[None]]

OURS = ("sqlite", "files")
BASELINES = ("fsync per file", "commit per save")
CONTENDERS = (*OURS, *BASELINES)
BAR_RATIO = 25
BAR_PER_S = 25_000


def run(
    tasks: int = 100,
    seconds: float = 12.0,
    *,
    rounds: int = 10,
    directory: Path | None = None,
) -> dict[str, Any]:
    """Measure every contender in turn, `rounds` times.

    Args:
        tasks: How many save at once.
        seconds: Of measuring in all.
        directory: On the disk to measure; by default beside the working directory,
            because the usual place for temporary files may be memory.

    Returns:
        Per contender `per_s` and latencies in us; the ratio of `sqlite` to `fsync per file`; the stream of
        checkpoints that nobody awaits; the machine.
    """
    with (
        tempfile.TemporaryDirectory(
            prefix=".bench-commit-", dir=directory or Path.cwd()
        ) as place,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        return runner.run(_measure(Path(place), tasks, seconds, rounds))


async def _measure(
    place: Path, tasks: int, seconds: float, rounds: int
) -> dict[str, Any]:
    stores: dict[str, DirectoryStore] = {
        "sqlite": SqliteStore(place / "sqlite", clock=SystemClock()),
        "files": FilesStore(place / "files", clock=SystemClock()),
    }
    for store in stores.values():
        await store.start()
    single = _SingleCommits(place / "single.db")
    (place / "plain").mkdir()
    saves: dict[str, Save] = {
        "sqlite": _saver(stores["sqlite"]),
        "files": _saver(stores["files"]),
        "fsync per file": _file_saver(place / "plain"),
        "commit per save": single.save,
    }
    share = seconds * 0.9 / (rounds * len(saves))
    samples: dict[str, list[int]] = {name: [] for name in saves}
    spent: dict[str, float] = dict.fromkeys(saves, 0.0)
    for _ in range(rounds):
        for name, save in saves.items():
            taken, duration = await _saving(save, tasks, share)
            samples[name] += taken
            spent[name] += duration
    stream = await _stream(stores["sqlite"], tasks, seconds * 0.1)
    statistics = {name: store.stats() for name, store in stores.items()}
    for store in stores.values():
        await store.stop()
    single.close()
    return _result(tasks, samples, spent, stream, statistics)


def _result(
    tasks: int,
    samples: dict[str, list[int]],
    spent: dict[str, float],
    stream: float,
    statistics: dict[str, Any],
) -> dict[str, Any]:
    per_s = {name: len(taken) / spent[name] for name, taken in samples.items()}
    ratio = per_s["sqlite"] / per_s["fsync per file"]
    return {
        "benchmark": "commit",
        "tasks": tasks,
        "context_bytes": len(_context(0)),
        "contenders": {
            name: {
                "per_s": round(per_s[name]),
                "latency_us": figures(each / 1000 for each in taken),
            }
            for name, taken in samples.items()
        },
        "ratio": round(ratio, 1),
        "stream_per_s": round(stream),
        "bars": {"ratio": BAR_RATIO, "per_s": BAR_PER_S},
        "passed": ratio >= BAR_RATIO and per_s["sqlite"] >= BAR_PER_S,
        "stores": statistics,
        "machine": machine(),
    }


async def _saving(save: Save, tasks: int, seconds: float) -> tuple[list[int], float]:
    """Let `tasks` save one context after the other for `seconds`; return latencies in ns and the time taken."""
    latencies: list[int] = []
    started = time.perf_counter()
    end = started + seconds

    async def task(number: int) -> None:
        key, data = f"task-{number}", _context(number)
        while time.perf_counter() < end:
            before = time.perf_counter_ns()
            await save(key, data)
            latencies.append(time.perf_counter_ns() - before)

    await asyncio.gather(*(task(number) for number in range(tasks)))
    return latencies, time.perf_counter() - started


async def _stream(store: DirectoryStore, tasks: int, seconds: float) -> float:
    """Save checkpoints without waiting, as the desk does between switches; return how many per second became durable."""
    contexts = [_context(number) for number in range(tasks)]
    count = 0
    started = time.perf_counter()
    last: Awaitable[None] | None = None
    while time.perf_counter() < started + seconds:
        for number, data in enumerate(contexts):
            last = store.save([Put("context", f"task-{number}", data)])
        count += tasks
        await asyncio.sleep(0)
        if count % (tasks * 50) == 0 and last is not None:
            await last
    if last is not None:
        await last
    return count / (time.perf_counter() - started)


def _context(number: int) -> bytes:
    body = {"task_id": f"task-{number}", "state": "EXECUTING", "note": "x" * 964}
    return json.dumps(body).encode().ljust(1024)


def _saver(store: DirectoryStore) -> Save:
    def save(key: str, data: bytes) -> Awaitable[None]:
        return store.save([Put("context", key, data)])

    return save


def _file_saver(directory: Path) -> Save:
    """One file per save, as safe as ours: file and directory are synced (R-19)."""
    folder = os.open(directory, os.O_RDONLY)

    def write(key: str, data: bytes) -> None:
        temporary = directory / f"{key}.tmp"
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(directory / f"{key}.json")
        os.fsync(folder)

    async def save(key: str, data: bytes) -> None:
        await asyncio.to_thread(write, key, data)

    return save


class _SingleCommits:
    """One SQLite transaction per save, in the one worker thread that its connection needs."""

    def __init__(self, path: Path) -> None:
        self._connection = apsw.Connection(str(path))
        self._connection.pragma("journal_mode", "wal")
        self._connection.pragma("synchronous", "full")
        self._connection.execute("CREATE TABLE t (key TEXT PRIMARY KEY, data BLOB)")
        self._executor = ThreadPoolExecutor(1)

    async def save(self, key: str, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._write, key, data)

    def _write(self, key: str, data: bytes) -> None:
        self._connection.execute("INSERT OR REPLACE INTO t VALUES (?, ?)", (key, data))

    def close(self) -> None:
        self._executor.shutdown()
        self._connection.close()


def report(result: dict[str, Any]) -> str:
    """Return `result` as text for a terminal."""
    rows = []
    for name, each in result["contenders"].items():
        latency = each["latency_us"]
        rows.append(
            (
                name,
                each["per_s"],
                *(latency[share] for share in ("p50", "p99", "p99.9", "max")),
                latency["n"],
            )
        )
    head = ("contender", "saves/s", "p50 us", "p99 us", "p99.9 us", "max us", "n")
    verdict = "passed" if result["passed"] else "missed"
    return (
        f"{result['tasks']} tasks, each awaiting its save of {result['context_bytes']} bytes\n"
        f"{table(head, rows)}\n"
        f"sqlite / fsync per file: {result['ratio']}x (bar {BAR_RATIO}x and {BAR_PER_S:,}/s: {verdict})\n"
        f"checkpoints nobody awaits: {result['stream_per_s']:,}/s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line."""
    parser = argparse.ArgumentParser(prog="durable_commits", description=__doc__)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    result = run(options.tasks, options.seconds)
    print(json.dumps(result, indent=2) if options.json else report(result))
    return 0
