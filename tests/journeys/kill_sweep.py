"""Kill the desk by SIGKILL at many points of an iceberg, start it again, and ask the venue what happened.

Run as a program: `python tests/journeys/kill_sweep.py --points 300`. Each *story* is one iceberg that is
killed several times and then left to complete. Points are random instants, or the Nth durable or network
system call (through strace, where it is installed). The venue runs in a process of its own and is never
killed; its statement is the judge. In a part of the stories the venue lives in the desk and dies with it.

Prints `N passed, N failed` and exits 1 if anything failed.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

PYTHON = sys.executable
TOTAL = Decimal("3.000")
CHILD = Decimal("0.050")
SYSCALLS = ("fdatasync", "sendto", "sendmsg", "write", "pwrite64")
KILLS_PER_STORY = 6
PATIENCE_S = 60.0


def desk_yaml(state: Path, process: str, seed: int) -> str:
    """Return the configuration of one story. Quotes move fast, so that children are replaced often."""
    feed = f"name: market, type: simulated, seed: {seed}, interval_ms: 10, markets: {{BTC/USDT: {{price: 60000, tick_size: 0.1}}}}"
    own = f"feeds: [{{{feed}}}]" if process == "own" else "feeds: []"
    sources = (
        "sources: []" if process == "own" else f"sources: [{{{feed}, venues: [alpha]}}]"
    )
    return f"""
name: sweep
code: swp
seed: {seed}
state: {{store: sqlite, directory: {state}}}
background: {{hosts: 0}}
venues:
  - name: alpha
    type: paper
    process: {process}
    {own}
    seed: {seed}
    latency_ms: [1, 15]
    instruments:
      - {{symbol: BTC/USDT, tick_size: 0.1, lot_size: 0.001, min_quantity: 0.001, min_notional: 5,
         maker_fee: 0.0002, taker_fee: 0.0005}}
    balances: {{USDT: 1000000, BTC: 100}}
{sources}
tasks:
  - id: sweep
    type: iceberg
    symbol: BTC/USDT
    venue: alpha
    side: {"SELL" if seed % 2 else "BUY"}
    total_quantity: {TOTAL}
    order_quantity: {CHILD}
    offset_ticks: {-3 if seed % 3 == 0 else 0}
    tick_tolerance: 2
    post_only: {"false" if seed % 3 == 0 else "true"}
"""


class Desk:
    """One run of the desk's process."""

    def __init__(
        self, config: Path, state: Path, log: Path, strace: list[str] | None = None
    ) -> None:
        self.state = state
        self.started = time.monotonic()
        command = [
            *(strace or []),
            PYTHON,
            "-m",
            "nightdesk",
            "run",
            "-c",
            str(config),
            "--no-console",
        ]
        self._log = log.open("ab")
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any] | None:
        """Ask over the control socket; None while the desk does not answer."""
        from nightdesk.control import ControlClient
        from nightdesk.errors import NightdeskError

        try:
            with ControlClient(self.state, timeout_s=1.0) as client:
                return dict(client.ask(verb, arguments))
        except (NightdeskError, OSError, ValueError):
            return None

    def until_ready(self, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.alive and time.monotonic() < deadline and self.ask("status") is None:
            time.sleep(0.02)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


def first_actions(state: Path) -> list[float]:
    """Return, of each start that got so far, the seconds from the process's start to its first cycle."""
    seconds = []
    path = state / "log.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("event") == "first action":
            seconds.append(float(entry["since_process_start_s"]))
    return seconds


def judge(state: Path, statement: Path) -> list[str]:
    """Compare the desk's ledger and the task's context with the venue's own statement."""
    from nightdesk.stores._tools import export
    from nightdesk.venues._statement import read_statement

    wrong: list[str] = []
    rows = read_statement(statement)
    placed = [row["client_order_id"] for row in rows if row["row"] == "placed"]
    fills = {
        row["fill"]["trade_id"]: row["fill"] for row in rows if row["row"] == "traded"
    }
    filled: dict[str, Decimal] = {}
    for fill in fills.values():
        cid = fill["client_order_id"]
        filled[cid] = filled.get(cid, Decimal(0)) + Decimal(fill["quantity"])
    sizes = {
        row["client_order_id"]: Decimal(row["quantity"])
        for row in rows
        if row["row"] == "placed"
    }
    ended = {row["client_order_id"] for row in rows if row["row"] == "ended"}
    executed = sum(filled.values(), Decimal(0))
    if executed != TOTAL:
        wrong.append(f"venue executed {executed}, asked {TOTAL}")
    if len(placed) != len(set(placed)):
        wrong.append("a client order id was used twice")
    still_open = [
        cid for cid in placed if cid not in ended and filled.get(cid) != sizes[cid]
    ]
    if still_open:
        wrong.append(f"orders still open at the venue: {still_open}")
    records = list(export(state))
    booked = {r["data"]["trade_id"] for r in records if r["kind"] == "fill"}
    if booked != set(fills):
        wrong.append(
            f"{len(booked)} fills booked, {len(fills)} at the venue; "
            f"missing {sorted(set(fills) - booked)[:5]}, invented {sorted(booked - set(fills))[:5]}"
        )
    contexts = [r for r in records if r["kind"] == "context" and r["key"] == "sweep"]
    if len(contexts) != 1:
        return [*wrong, f"{len(contexts)} contexts of the task"]
    context = contexts[0]["data"]
    if context["state"] != "COMPLETED" or Decimal(context["filled_quantity"]) != TOTAL:
        wrong.append(
            f"context says {context['state']}, filled {context['filled_quantity']}"
        )
    notional = sum(
        (Decimal(f["price"]) * Decimal(f["quantity"]) for f in fills.values()),
        Decimal(0),
    )
    if executed and abs(Decimal(context["avg_price"]) - notional / executed) > Decimal(
        "1e-9"
    ):
        wrong.append(
            f"average price {context['avg_price']}, the venue's is {notional / executed}"
        )
    return wrong


def tell_story(number: int, folder: Path, by_syscall: bool) -> dict[str, Any]:
    """Play one story; return its kills, the time each restart took, and what was wrong."""
    rng = random.Random(number)
    state = folder / "state"
    config = folder / "desk.yaml"
    process = "desk" if number % 4 in (0, 3) else "own"
    config.write_text(desk_yaml(state, process, number))
    log = folder / "out.log"
    kills = 0
    starts: list[float] = []
    try:
        if (
            by_syscall and process == "own"
        ):  # the venue must not be traced: a first, untraced start brings it up
            first = Desk(config, state, log)
            first.until_ready()
            first.kill()
            kills += 1
        while kills < KILLS_PER_STORY:
            strace = None
            if by_syscall:
                strace = [
                    "strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={rng.choice(SYSCALLS)}",
                ]  # fmt: skip
                name = strace[-1].removeprefix("trace=")
                strace += [
                    "-e",
                    f"inject={name}:signal=SIGKILL:when={rng.randint(1, 120)}",
                ]
            before = len(first_actions(state))
            desk = Desk(config, state, log, strace)
            if by_syscall:
                deadline = time.monotonic() + 8.0
            elif rng.random() < 0.3:  # while it starts and recovers
                deadline = time.monotonic() + rng.uniform(0.5, 2.5)
            else:
                desk.until_ready()
                deadline = time.monotonic() + rng.uniform(0.0, 0.8)
            while desk.alive and time.monotonic() < deadline:
                time.sleep(0.01)
            desk.kill()
            kills += 1
            if strace is None:  # a traced start is several times slower
                starts += first_actions(state)[before:]
            if _is_complete(state):
                break
        before = len(first_actions(state))
        wrong = _finish(config, state, log, folder, process)
        starts += first_actions(state)[before:]
        return {"kills": kills, "wrong": wrong, "starts": starts}
    finally:
        _end_venue(state)


def _is_complete(state: Path) -> bool:
    from nightdesk.errors import NightdeskError
    from nightdesk.stores._tools import export

    try:
        return any(
            r["kind"] == "context" and r["data"].get("state") == "COMPLETED"
            for r in export(state)
        )
    except (NightdeskError, OSError):
        return False


def _finish(
    config: Path, state: Path, log: Path, folder: Path, process: str
) -> list[str]:
    desk = Desk(config, state, log)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and desk.alive:
            shown = desk.ask("task.show", task_id="sweep")
            if shown is not None and shown.get("state") == "COMPLETED":
                break
            time.sleep(0.1)
        else:
            return [
                f"not completed within {PATIENCE_S:.0f} s; log: {log.read_text(errors='replace')[-1500:]}"
            ]
        desk.process.send_signal(signal.SIGTERM)
        desk.process.wait(timeout=15)
    finally:
        desk.kill()
    statements = list(folder.rglob("statement.jsonl"))
    if len(statements) != 1:
        return [f"{len(statements)} statements found"]
    return judge(state, statements[0])


def _end_venue(state: Path) -> None:
    for path in state.rglob("exchange.pid"):
        try:
            os.kill(int(path.read_text().split()[0]), signal.SIGTERM)
        except (ValueError, ProcessLookupError, IndexError):
            continue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=300, help="kill points to reach")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--first", type=int, default=1, help="number (and seed) of the first story"
    )
    options = parser.parse_args()
    can_trace = shutil.which("strace") is not None
    root = Path(tempfile.mkdtemp(prefix="nightdesk-sweep-"))
    killed = stories = failed = 0
    starts: list[float] = []
    number = options.first
    begun = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        running: dict[concurrent.futures.Future[dict[str, Any]], int] = {}
        while killed < options.points or running:
            while (
                killed + len(running) * KILLS_PER_STORY < options.points
                and len(running) < options.workers
            ):
                folder = root / str(number)
                folder.mkdir()
                running[
                    pool.submit(
                        tell_story, number, folder, can_trace and number % 2 == 0
                    )
                ] = number
                number += 1
            if not running:
                break
            done, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                story = running.pop(future)
                outcome = future.result()
                killed += outcome["kills"]
                stories += 1
                starts += outcome["starts"]
                if outcome["wrong"]:
                    failed += 1
                    print(
                        f"story {story} FAILED ({root / str(story)}): {'; '.join(outcome['wrong'])}",
                        flush=True,
                    )
                else:
                    shutil.rmtree(root / str(story), ignore_errors=True)
                print(
                    f"{killed} kill points, {stories} stories, {failed} failed",
                    end="\r",
                    flush=True,
                )
    print()
    starts.sort()
    if starts:
        p50, p99 = (
            starts[len(starts) // 2],
            starts[min(len(starts) - 1, int(len(starts) * 0.99))],
        )
        print(
            f"start to first action, {len(starts)} starts: p50 {p50:.2f} s, p99 {p99:.2f} s, max {starts[-1]:.2f} s"
        )
    print(
        f"kill points {killed} in {time.monotonic() - begun:.0f} s, strace {'used in every second story' if can_trace else 'not installed'}"
    )
    print(f"{stories - failed} passed, {failed} failed")
    return 1 if failed or not stories else 0


if __name__ == "__main__":
    sys.exit(main())
