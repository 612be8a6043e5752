"""Promise 1: from the last byte of an event to the first line of its handler, whatever the background does.

A sender process writes webhook-like messages over loopback TCP at random intervals of 1 to 3 ms, each with
the monotonic stamp taken just before it is sent. A receiver process stamps `data_received` and the
first line of the opportunity handler. Ours runs the kernel's loop, inbox and switch, with a store
that fsyncs in its thread; the baselines are plain uvloop and plain asyncio, which do
nothing but `create_task`. Contenders take turns in every round, so that both see the same machine.

Comes from: cli/
Goes to: kernel/loop.py, kernel/inbox.py, kernel/switch.py
"""

import argparse
import asyncio
import gc
import json
import os
import queue
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack, nullcontext
from decimal import Decimal
from typing import Any

import msgspec

from nightdesk.abc import Batch, Put
from nightdesk.bench._figures import figures, machine, stillness, table
from nightdesk.errors import CommandError
from nightdesk.kernel.clock import SystemClock
from nightdesk.kernel.inbox import Inbox
from nightdesk.kernel.loop import Lane, LaneLoop, lane, new_event_loop
from nightdesk.kernel.memory import Collector
from nightdesk.kernel.switch import Switch
from nightdesk.model.events import Opportunity, PoolSwap

__all__ = ["LOADS", "main", "run"]

LOADS = ("idle", "coroutines", "timers", "pure", "native")
CONTENDERS = ("nightdesk", "uvloop", "asyncio")
_WARM_UP = 200
_COROUTINES = 1_000
_BUSY_S = 50e-6
_TIMERS = 10_000
_SPACING_S = (0.001, 0.003)
_CHANGED_CONTEXTS = 10
_HOGS = ("pure", "native")


class Message(msgspec.Struct):
    """What the sender writes, one JSON object a line."""

    sent_ns: int
    pair: str
    transaction_hash: str
    log_index: int
    price_impact_ppm: int
    value_usd: Decimal
    price: Decimal


# --- The sender ------------------------------------------------------------------------------------


def send(port: int, events: int, seed: int) -> None:
    """Write `events` messages to `port` of this machine."""
    rng = random.Random(seed)
    encode = msgspec.json.Encoder().encode
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(events):
            time.sleep(rng.uniform(*_SPACING_S))
            message = Message(
                0,
                "ARB/USDC",
                f"0x{number:064x}",
                3,
                7_000,
                Decimal("52000.50"),
                Decimal("1.0213"),
            )
            message.sent_ns = time.monotonic_ns()
            connection.sendall(encode(message) + b"\n")
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


# --- The receiver ----------------------------------------------------------------------------------


class Receiver(asyncio.Protocol):
    """Cuts lines, decodes, hands on; the same for every contender."""

    def __init__(
        self, react: Callable[[Message, int], None], ended: asyncio.Event
    ) -> None:
        self._react = react
        self._ended = ended
        self._rest = b""
        self._decode = msgspec.json.Decoder(Message).decode

    def data_received(self, data: bytes) -> None:
        received_ns = time.monotonic_ns()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._react(self._decode(line), received_ns)

    def connection_lost(self, error: Exception | None) -> None:
        self._ended.set()


class Samples:
    """`(sent, received, handled)` of every event, in monotonic nanoseconds."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        self.stamps: list[tuple[int, int, int]] = []

    def add(self, sent_ns: int, received_ns: int) -> None:
        self.stamps.append((sent_ns, received_ns, time.monotonic_ns()))
        if len(self.stamps) == _WARM_UP // 2:
            self._settle()

    def microseconds(self) -> dict[str, list[float]]:
        kept = self.stamps[_WARM_UP:]
        return {
            "sent_to_handler": [(handled - sent) / 1000 for sent, _, handled in kept],
            "received_to_handler": [
                (handled - received) / 1000 for _, received, handled in kept
            ],
        }


class Journal:
    """A store as the desk's: batches go to a thread, which writes and fsyncs them as they come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._batches: queue.SimpleQueue[tuple[Batch, asyncio.Future[None]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def save(self, batch: Batch) -> asyncio.Future[None]:
        saved: asyncio.Future[None] = self._loop.create_future()
        self._batches.put((batch, saved))
        return saved

    def close(self) -> None:
        self._batches.put(None)
        self._thread.join()

    def _write(self) -> None:
        with tempfile.TemporaryFile() as file:
            while (item := self._batches.get()) is not None:
                batch, saved = item
                file.write(b"".join(put.data for put in batch if isinstance(put, Put)))
                file.flush()
                os.fsync(file.fileno())
                self._loop.call_soon_threadsafe(saved.set_result, None)


def desk_reaction(
    loop: LaneLoop, samples: Samples, journal: Journal
) -> Callable[[Message, int], None]:
    """Return what the desk does with a message: inbox, switch, handler."""
    clock = SystemClock()
    contexts = [
        Put("context", f"task-{i}", bytes(1024)) for i in range(_CHANGED_CONTEXTS)
    ]
    inbox = Inbox(clock)
    switch = Switch(loop, clock, snapshot=lambda: contexts, save=journal.save)
    stamps: dict[str, tuple[int, int]] = {}

    def assess(event: PoolSwap) -> int | None:
        return event.price_impact_ppm - 5_000 if event.value_usd > 10_000 else None

    async def handle(opportunity: Opportunity) -> None:
        cause = opportunity.cause
        assert isinstance(cause, PoolSwap)
        samples.add(*stamps.pop(cause.transaction_hash))
        await asyncio.sleep(0)

    inbox.add_handler("arbitrage", (PoolSwap,), assess)
    inbox.on_opportunity = switch.on_opportunity
    switch.set_handler("arbitrage", handle)

    def react(message: Message, received_ns: int) -> None:
        stamps[message.transaction_hash] = (message.sent_ns, received_ns)
        inbox.emit(
            PoolSwap(
                chain="arbitrum",
                pool="0xb0f6ca40411360c03d41c5ffc5f179b8403cdcf8",
                pair=message.pair,
                transaction_hash=message.transaction_hash,
                log_index=message.log_index,
                price_impact_ppm=message.price_impact_ppm,
                value_usd=message.value_usd,
                price=message.price,
            )
        )

    return react


def plain_reaction(
    loop: asyncio.AbstractEventLoop, samples: Samples
) -> Callable[[Message, int], None]:
    """Return what an asyncio program does with a message: a task."""
    running: set[asyncio.Task[None]] = set()

    async def handle(message: Message, received_ns: int) -> None:
        samples.add(message.sent_ns, received_ns)
        await asyncio.sleep(0)

    def react(message: Message, received_ns: int) -> None:
        task = loop.create_task(handle(message, received_ns))
        running.add(task)
        task.add_done_callback(running.discard)

    return react


async def receive(contender: str, load: str) -> dict[str, list[float]]:
    """Listen, print the port, take messages until the sender hangs up."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    journal: Journal | None = None
    if contender == "nightdesk":
        assert isinstance(loop, LaneLoop)
        samples = Samples(Collector(loop).start)
        journal = Journal(loop)
        react = desk_reaction(loop, samples, journal)
    else:
        samples = Samples(_collect_once)
        react = plain_reaction(loop, samples)
    with lane(Lane.NORMAL) if contender == "nightdesk" else nullcontext():
        tasks = [loop.create_task(work) for work in load_inside(contender, load)]
    server = await loop.create_server(lambda: Receiver(react, ended), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await ended.wait()
    for task in tasks:
        task.cancel()
    if journal is not None:
        journal.close()
    return samples.microseconds()


def _collect_once() -> None:
    """Spare the baselines the garbage of their start, too."""
    gc.collect()
    gc.freeze()


def load_inside(contender: str, load: str) -> list[Coroutine[Any, Any, None]]:
    """Return the background work that runs in the receiver's own process."""
    if load == "coroutines":
        return [_busy() for _ in range(_COROUTINES)]
    if load == "timers":
        return [_periodic() for _ in range(_TIMERS)]
    if load in _HOGS and contender != "nightdesk":
        return [asyncio.to_thread(hog, load)]  # what asyncio offers for blocking work
    return []


async def _busy() -> None:
    while True:
        until = time.perf_counter() + _BUSY_S
        while time.perf_counter() < until:
            pass
        await asyncio.sleep(0)


async def _periodic() -> None:
    ticks = 0
    while True:
        await asyncio.sleep(1.0)
        ticks += 1


def hog(load: str) -> None:
    """Never yield: in Python, or in native code that keeps the interpreter for about 100 ms at a time."""
    numbers = range(5_000_000)
    turns = 0
    while True:
        if load == "native":
            sum(numbers)
        turns += 1


def background_host(load: str) -> None:
    """A hog as the desk runs it: in a process that only gets what the desk leaves."""
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)
    hog(load)


# --- One run ----------------------------------------------------------------------------------------


def measure(
    contender: str, load: str, events: int, seed: int
) -> dict[str, list[float]]:
    """Run one contender under one load; return its samples in microseconds."""
    with ExitStack() as processes:

        def spawn(*arguments: object) -> "subprocess.Popen[bytes]":
            command = [
                sys.executable,
                "-m",
                "nightdesk.bench.switch",
                "--role",
                *map(str, arguments),
            ]
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            processes.callback(_end, process)
            return process

        if contender == "nightdesk" and load in _HOGS:
            spawn("host", load)
        receiver = spawn("receive", contender, load)
        assert receiver.stdout is not None
        port = receiver.stdout.readline().decode().strip()
        if not port:
            raise CommandError(
                f"the benchmark's receiver ({contender}, {load}) ended at its start; see its message above"
            )
        spawn("send", port, events + _WARM_UP, seed)
        samples: dict[str, list[float]] = json.loads(receiver.stdout.read() or "null")
        return samples


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def run(
    events: int = 5_000,
    loads: Sequence[str] = LOADS,
    *,
    contenders: Sequence[str] = CONTENDERS,
    rounds: int = 2,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure every contender under every load.

    Args:
        events: Per contender and load, over all rounds; 200 more per round warm up.
        progress: Told what is measured next.

    Returns:
        `machine`; `stillness` of the machine, measured before each load; `loads[load][contender]` with
        figures in microseconds; and `bars`: what was promised and what was reached.
    """
    collected: dict[str, dict[str, dict[str, list[float]]]] = {
        load: {contender: {} for contender in contenders} for load in loads
    }
    quiet: list[dict[str, float]] = []
    for turn in range(rounds):
        for load in loads:
            quiet.append(stillness())
            for contender in contenders:
                if progress is not None:
                    progress(f"round {turn + 1} of {rounds}: {load}, {contender}")
                for name, samples in measure(
                    contender, load, events // rounds, turn
                ).items():
                    collected[load][contender].setdefault(name, []).extend(samples)
    results = {
        load: {
            contender: {
                f"{name}_us": figures(samples) for name, samples in by_name.items()
            }
            for contender, by_name in by_contender.items()
        }
        for load, by_contender in collected.items()
    }
    return {
        "benchmark": "switch",
        "machine": machine(),
        "stillness": quiet,
        "unit": "us",
        "loads": results,
        "bars": _bars(results),
    }


def _bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    def figure(load: str, contender: str, key: str) -> float | None:
        found = (
            results.get(load, {})
            .get(contender, {})
            .get("sent_to_handler_us", {})
            .get(key)
        )
        return None if found is None else float(found)

    bars: list[dict[str, Any]] = []

    def bar(name: str, value: float | None, limit: float, at_most: bool = True) -> None:
        if value is not None:
            reached = value <= limit if at_most else value >= limit
            bars.append(
                {
                    "bar": name,
                    "value": round(value, 2),
                    "limit": limit,
                    "reached": reached,
                }
            )

    idle = figure("idle", "nightdesk", "p50")
    for load in results:
        p50 = figure(load, "nightdesk", "p50")
        bar(f"{load}: p50 at most, us", p50, 100)
        bar(f"{load}: p99.9 at most, us", figure(load, "nightdesk", "p99.9"), 1_400)
        if idle and p50 and load != "idle":
            bar(f"{load}: p50 over idle p50 at most", p50 / idle, 2)
    ours, plain = (
        figure("coroutines", "nightdesk", "p50"),
        figure("coroutines", "uvloop", "p50"),
    )
    if ours and plain:
        bar(
            "coroutines: times better than uvloop at p50, at least",
            plain / ours,
            100,
            at_most=False,
        )
    return bars


def report(result: dict[str, Any]) -> str:
    """Return `result` of `run` as text for a terminal."""
    rows = [
        (
            load,
            contender,
            what.removesuffix("_us").replace("_", " "),
            f["n"],
            f["p50"],
            f["p99"],
            f["p99.9"],
            f["max"],
        )
        for load, by_contender in result["loads"].items()
        for contender, kinds in by_contender.items()
        for what, f in kinds.items()
    ]
    bars = [
        (b["bar"], b["value"], float(b["limit"]), "yes" if b["reached"] else "NO")
        for b in result["bars"]
    ]
    host = result["machine"]
    worst = max((q["worst_gap_us"] for q in result["stillness"]), default=0.0)
    lost = max((q["lost_share"] for q in result["stillness"]), default=0.0)
    versions = ", ".join(
        f"{name} {version}" for name, version in host["versions"].items()
    )
    return "\n".join(
        [
            f"{host['processor']}, {host['cpus']} cores, {host['system']}; {versions}; load {host['load_average']}",
            f"a process that only looks at the clock lost up to {lost:.1%} of its time here, {worst:,.0f} us at a stretch",
            "",
            table(
                (
                    "load",
                    "contender",
                    "microseconds",
                    "n",
                    "p50",
                    "p99",
                    "p99.9",
                    "max",
                ),
                rows,
            ),
            "",
            table(("promise", "measured", "limit", "kept"), bars),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line."""
    parser = argparse.ArgumentParser(prog="switch_latency", description=__doc__)
    parser.add_argument("--events", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--load", choices=(*LOADS, "all"), default="all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    loads = (
        LOADS if options.load == "all" else tuple(dict.fromkeys(("idle", options.load)))
    )

    def progress(text: str) -> None:
        print(text, file=sys.stderr)

    result = run(options.events, loads, rounds=options.rounds, progress=progress)
    print(json.dumps(result, indent=2) if options.json else report(result))
    return 0


def _play(role: str, *arguments: str) -> None:
    """Be one of the processes of a measurement."""
    if role == "send":
        port, events, seed = map(int, arguments)
        send(port, events, seed)
    elif role == "host":
        background_host(*arguments)
    else:
        contender, load = arguments
        kinds: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
            "nightdesk": new_event_loop,
            "uvloop": _plain_uvloop,
            "asyncio": asyncio.SelectorEventLoop,
        }
        with asyncio.Runner(loop_factory=kinds[contender]) as runner:
            samples = runner.run(receive(contender, load))
            print(json.dumps(samples), flush=True)
            # A hog in a thread of this process never ends, and Runner would wait for it.
            os._exit(0)


def _plain_uvloop() -> asyncio.AbstractEventLoop:
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        _play(*sys.argv[2:])
    else:
        sys.exit(main())
