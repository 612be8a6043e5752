"""The desk's side of background hosts, as a recording, and pools of real processes around it."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from nightdesk.abc import Observer, Shelf
from nightdesk.config import BackgroundConfig
from nightdesk.errors import OrderDeniedError
from nightdesk.kernel.clock import SystemClock
from nightdesk.kernel.hosts import HostedTask, HostPool
from nightdesk.model.events import Event, QuoteChanged
from nightdesk.model.health import TaskHealth
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Order, OrderRequest, OrderStatus
from nightdesk.model.position import Position

TESTS = Path(__file__).parents[1]
BTC = Instrument(
    symbol="BTC/USDT",
    venue="paper",
    tick_size=Decimal("0.01"),
    lot_size=Decimal("0.001"),
    min_quantity=Decimal("0.001"),
)


def quote(bid: str = "100", symbol: str = "BTC/USDT") -> QuoteChanged:
    price = Decimal(bid)
    one = Decimal(1)
    return QuoteChanged(
        symbol=symbol,
        venue="paper",
        bid=price,
        bid_quantity=one,
        ask=price + 1,
        ask_quantity=one,
    )


class RecordingCallbacks(Observer):
    """`HostCallbacks` that writes everything down. `gate` holds submits back while it is not set."""

    def __init__(self) -> None:
        self.contexts: dict[str, list[dict[str, Any]]] = {}
        self.shelves: dict[str, Shelf] = {}
        self.offenders: list[tuple[str, str, str, str]] = []
        self.refused: list[tuple[str, str, bool]] = []
        self.changes: list[TaskHealth] = []
        self.finished: list[str] = []
        self.emitted: list[Event] = []
        self.alerts: list[tuple[str, str, str]] = []
        self.lines: list[tuple[str, str, str, dict[str, Any]]] = []
        self.failures: list[tuple[str, str]] = []
        self.private: dict[tuple[str, str], bytes] = {}
        self.booked: dict[str, list[Order]] = {}
        self.held: list[Position] = []
        self.denied = ""
        self.gate = asyncio.Event()
        self.gate.set()

    async def submit(self, task_id: str, request: OrderRequest) -> Order:
        if self.denied:
            raise OrderDeniedError(self.denied, "too much")
        await self.gate.wait()
        number = len(self.booked.setdefault(task_id, []))
        order = Order(
            client_order_id=f"{task_id}-{number}",
            task_id=task_id,
            request=request,
            status=OrderStatus.ACCEPTED,
        )
        self.booked[task_id].append(order)
        return order

    async def cancel(self, task_id: str, client_order_id: str) -> Order:
        order = msgspec.structs.replace(
            self.booked[task_id][-1], status=OrderStatus.CANCELED
        )
        self.booked[task_id][-1] = order
        return order

    async def save_private(self, task_id: str, key: str, data: bytes) -> None:
        self.private[task_id, key] = data

    async def load_private(self, task_id: str, key: str) -> bytes | None:
        return self.private.get((task_id, key))

    def save_context(self, task_id: str, data: bytes, shelf: Shelf) -> None:
        self.contexts.setdefault(task_id, []).append(msgspec.json.decode(data))
        self.shelves[task_id] = shelf

    def orders(self, task_id: str) -> list[Order]:
        return self.booked.get(task_id, [])

    def positions(self) -> list[Position]:
        return self.held

    def instruments(self) -> list[Instrument]:
        return [BTC]

    def emit(self, task_id: str, event: Event) -> None:
        self.emitted.append(event)

    def alert(self, task_id: str, level: str, text: str) -> None:
        self.alerts.append((task_id, level, text))

    def log(self, task_id: str, level: str, text: str, fields: dict[str, Any]) -> None:
        self.lines.append((task_id, level, text, fields))

    def on_offender(self, task_id: str, kind: str, detail: str, stack: str) -> None:
        self.offenders.append((task_id, kind, detail, stack))

    def on_refused(self, task_id: str, text: str, is_context: bool) -> None:
        self.refused.append((task_id, text, is_context))

    def on_health_changed(self, task_id: str, health: TaskHealth) -> None:
        self.changes.append(health)

    def on_finished(self, task_id: str) -> None:
        self.finished.append(task_id)

    def on_task_failed(
        self, task_id: str, error: BaseException, consequence: str
    ) -> None:
        self.failures.append((task_id, str(error)))

    # what tests ask

    def counts(self, task_id: str) -> list[int]:
        """Every count that was saved, in order."""
        return [context["count"] for context in self.contexts.get(task_id, [])]

    def named(self, *kinds: str) -> set[str]:
        """The tasks that were named, for one of `kinds` if some are given."""
        return {who for who, kind, *_ in self.offenders if not kinds or kind in kinds}


def hosted(task_id: str, kind: str = "Ticker", **spec: Any) -> HostedTask:
    """A task of `fakes.hosted`; what is no field of `HostedTask` becomes a parameter."""
    fields = {
        name: spec.pop(name)
        for name in list(spec)
        if name in HostedTask.__struct_fields__
    }
    return HostedTask(
        task_id=task_id, type=f"fakes.hosted.{kind}", params=spec, **fields
    )


@asynccontextmanager
async def running_pool(
    directory: Path, desk: RecordingCallbacks, *, timeout_s: float = 2.0, **limits: Any
) -> AsyncIterator[HostPool]:
    """A pool of real hosts; afterwards none of its processes is left."""
    settings = {"hosts": 1, "stall_s": 0.6, "memory_mb": 400, **limits}
    settings.setdefault("idle_priority", False)  # the test machine may be busy
    options = {
        name: settings.pop(name)
        for name in ("successes", "log_level", "idle_priority")
        if name in settings
    }
    pool = HostPool(
        config=BackgroundConfig(**settings),
        clock=SystemClock(),
        search_path=str(TESTS),
        directory=directory,
        callbacks=desk,
        observers=(desk,),
        **options,
    )
    await pool.start()
    try:
        yield pool
    finally:
        await pool.stop(timeout_s)
        assert pool.describe() == []


async def until(
    condition: Callable[[], Any], what: str = "", timeout_s: float = 60.0
) -> None:
    """Wait until `condition` holds; fail, saying `what` was waited for."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(
            f"waited {timeout_s} s in vain for: {what or condition}"
        ) from None


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    if sys.platform != "linux":
        import psutil

        return bool(psutil.pid_exists(pid))
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
