"""A desk's control socket without a desk: replies are what a test says, in a thread of their own."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nightdesk.control import ControlServer
from nightdesk.errors import CommandError


class FakeClock:
    """Moves by a millisecond at each look."""

    def __init__(self) -> None:
        self.ns = 0

    def now_ns(self) -> int:
        return self.monotonic_ns()

    def monotonic_ns(self) -> int:
        self.ns += 1_000_000
        return self.ns

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


STATUS = {
    "version": 1,
    "name": "demo",
    "mode": "development",
    "live": False,
    "up": True,
    "ready": True,
    "trading": {"state": "ACTIVE", "reason": "", "actor": ""},
    "started_at": "2026-11-23T01:00:00.000Z",
    "uptime_s": 93784.0,
    "pid": 4711,
    "epoch": 3,
    "tasks": {"total": 2, "by_status": {"running": 1, "waiting": 1}},
    "offenders": [
        {
            "task_id": "bad",
            "kind": "blocks the loop",
            "detail": "5 s",
            "count": 3,
            "last_at": "2026-11-23T01:00:00.000Z",
        }
    ],
    "switch": {
        "count": 12,
        "p50_us": 80.2,
        "p99_us": 200.0,
        "p999_us": 300.0,
        "max_us": 2_900_000.0,
        "last": [
            {
                "handler": "arb",
                "key": "k",
                "edge_ppm": 2000,
                "outcome": "handled",
                "switch_us": 88.1,
                "parked": 12,
            },
            {
                "handler": "arb",
                "key": "k",
                "edge_ppm": 2000,
                "outcome": "late",
                "switch_us": 1888.1,
                "parked": 12,
            },
        ],
    },
    "orders": {"open": 1, "unknown": 0},
    "equity": "10012.123",
    "realized_pnl": "12.1",
    "unrealized_pnl": "-3.2",
    "fees": "0.2",
    "hosts": [],
    "quarantined": [],
}
TASK = {
    "task_id": "sell-btc",
    "type": "iceberg",
    "priority": "high",
    "status": "running",
    "why": "working a child",
    "state": "EXECUTING",
    "runs": 5,
    "errors": 0,
    "lag_p99_s": 0.001,
    "next_run_words": "in 2 s",
    "next_run": None,
}
ORDER = {
    "client_order_id": "nd1x",
    "task_id": "sell-btc",
    "symbol": "BTC/USDT",
    "venue": "alpha",
    "side": "SELL",
    "quantity": "0.05000",
    "price": "60000.10",
    "status": "ACCEPTED",
    "filled_quantity": "0.01",
    "updated_at": "2026-11-23T01:00:00.000Z",
    "reason": None,
}
FILL = {
    "at": "2026-11-23T01:00:00.000Z",
    "symbol": "BTC/USDT",
    "venue": "alpha",
    "side": "SELL",
    "quantity": "0.05",
    "price": "60000.10",
    "fee": "0.3",
    "fee_asset": "USDT",
    "liquidity": "MAKER",
    "client_order_id": "nd1x",
}
POSITION = {
    "symbol": "BTC/USDT",
    "venue": "alpha",
    "quantity": "-0.4",
    "average_price": "60000",
    "mark_price": "60010",
    "unrealized_pnl": "-4",
    "realized_pnl": "1",
}
REPLIES: dict[str, dict[str, Any]] = {
    "status": STATUS,
    "tasks": {
        "version": 1,
        "tasks": [TASK, {**TASK, "task_id": "candles", "status": "waiting"}],
    },
    "task.show": {
        "version": 1,
        **TASK,
        "context": {"state": "EXECUTING"},
        "history": [{"at": "2026-11-23T01:00:00.000Z", "state": "IDLE"}],
        "waits_at": ["iceberg.py:80 in _tend"],
    },
    "orders": {"version": 1, "orders": [ORDER]},
    "fills": {"version": 1, "fills": [FILL]},
    "trades": {"version": 1, "trades": [FILL]},
    "positions": {"version": 1, "positions": [POSITION]},
    "opportunities": {"version": 1, "opportunities": STATUS["switch"]["last"]},  # type: ignore[index]
    "performance": {"version": 1, "equity": "10012.123", "fees": "0.2000"},
    "logs": {
        "version": 1,
        "logs": [
            {
                "at": "2026-11-23T01:00:00.000Z",
                "level": "info",
                "event": "hello",
                "task": "a",
            }
        ],
    },
    "workers": {"version": 1, "hosts": [{"host": 0, "pid": 99, "tasks": ["a", "b"]}]},
    "halt": {"version": 1, "state": "HALTED", "cancelled": ["a"], "flattened": []},
    "resume_trading": {"version": 1, "state": "ACTIVE"},
    "reconcile": {"version": 1, "report": ["order nd1x: as the venue says"]},
    "stop": {"version": 1, "stopping": True},
}


class FakeDesk:
    """What was asked of it: `(verb, arguments, actor, reason)`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], str, str]] = []
        self.replies = dict(REPLIES)
        self.on_ask: Callable[[str], None] = lambda verb: None

    async def command(
        self, verb: str, arguments: dict[str, Any], actor: str, reason: str
    ) -> Any:
        self.asked.append((verb, arguments, actor, reason))
        self.on_ask(verb)
        if verb.startswith("task.") and verb not in self.replies:
            return {"version": 1, "task_id": arguments["task_id"], "done": verb}
        if verb not in self.replies:
            raise CommandError(f"no command {verb!r}")
        return self.replies[verb]

    @property
    def verbs(self) -> list[str]:
        return [verb for verb, *_ in self.asked]


@contextmanager
def running(directory: Path) -> Iterator[FakeDesk]:
    """A desk that answers in `directory` until the block ends."""
    desk, ready, ends = FakeDesk(), threading.Event(), threading.Event()

    async def serve() -> None:
        server = ControlServer(directory / "control.sock", desk.command, FakeClock())
        await server.start()
        ready.set()
        await asyncio.to_thread(ends.wait)
        await server.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield desk
    finally:
        ends.set()
        thread.join(10)
