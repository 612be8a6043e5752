"""Tasks as users write them, good and bad neighbours alike, for tests of background hosts."""

import asyncio
import ctypes
import itertools
import os
import sys
import time
from decimal import Decimal
from typing import Any, ClassVar

from nightdesk.abc import Task
from nightdesk.model.context import TaskContext
from nightdesk.model.events import CandleClosed, Event, FeedStalled
from nightdesk.model.order import OrderRequest, Side
from nightdesk.model.priority import Priority


class CountContext(TaskContext, kw_only=True):
    count: int = 0
    started_at: int = -1
    limit: int = 1_000_000_000
    every_s: float = 0.02
    after_s: float = 0.0
    note: str = ""
    total: Decimal = Decimal(0)


class Ticker(Task[CountContext]):
    """A harmless neighbour: counts, and remembers at which count this life of it began."""

    context_class = CountContext
    runs_in = "background"
    priority = Priority.LOW

    async def start(self) -> None:
        self.evolve_context(started_at=self.context.count)

    async def _handle_executing(self) -> None:
        self.evolve_context(count=self.context.count + 1)
        if self.context.count >= self.context.limit:
            self._transition("COMPLETED")
        self.wait(self.context.every_s)


class _Harmful(Ticker):
    async def _handle_executing(self) -> None:
        if self.context.after_s:
            self.wait(self.context.after_s)
            self.evolve_context(after_s=0.0)
            return
        await self.harm()
        self.evolve_context(count=self.context.count + 1)

    async def harm(self) -> None:
        raise NotImplementedError


class Sleeper(_Harmful):
    """Blocks its loop."""

    async def harm(self) -> None:
        time.sleep(5)  # noqa: ASYNC251


class Spinner(_Harmful):
    """Never awaits."""

    async def harm(self) -> None:
        spin_for_ever()


class SpinnerInSubtask(_Harmful):
    """Never awaits, in a task of its own that no cycle waits for."""

    async def harm(self) -> None:
        self.child = asyncio.create_task(self.spin())
        await asyncio.sleep(60)

    async def spin(self) -> None:
        spin_for_ever()


class Gripper(_Harmful):
    """Holds the interpreter's lock in native code."""

    async def harm(self) -> None:
        sum(itertools.repeat(0, 10**12))


class Leaker(_Harmful):
    """Keeps 100 MB more each second."""

    kept: ClassVar[list[bytes]] = []

    async def harm(self) -> None:
        self.kept.append(os.urandom(1 << 20))
        self.wait(0.01)


class Crasher(_Harmful):
    """Takes the process down with it."""

    async def harm(self) -> None:
        ctypes.string_at(0)


class Quitter(_Harmful):
    async def harm(self) -> None:
        os._exit(3)


class Exiter(_Harmful):
    async def harm(self) -> None:
        sys.exit("enough")


class Raiser(_Harmful):
    async def harm(self) -> None:
        raise ValueError("always")


class Swallower(_Harmful):
    """Ignores that it is cancelled."""

    async def harm(self) -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue


class Buyer(Ticker):
    """Submits one order, and writes down what it saw of the desk."""

    def keys(self) -> tuple[str, ...]:
        return ("BTC/USDT@paper",)

    async def _handle_executing(self) -> None:
        desk: Any = self.desk
        quote = desk.price("BTC/USDT", "paper")
        instrument = desk.instrument("BTC/USDT", "paper")
        assert quote is not None
        request = OrderRequest(
            symbol="BTC/USDT",
            venue="paper",
            side=Side.BUY,
            quantity=instrument.lot_size,
            price=quote.bid,
        )
        order = await desk.submit(request)
        assert desk.orders() == [order] == [desk.order(order.client_order_id)]
        canceled = await desk.cancel(order.client_order_id)
        await desk.save("memo", b"kept")
        memo = await desk.load("memo")
        desk.emit(FeedStalled(source="buyer", silent_s=1.5))
        desk.alert("warning", "bought")
        desk.log.bind(side="BUY").info("bought", price=quote.bid)
        await desk.checkpoint()
        note = f"{order.status} {canceled.status} {memo!r} {desk.position('BTC/USDT', 'paper').quantity} {len(desk.positions())}"
        self.evolve_context(note=note, total=order.request.price)
        self._transition("COMPLETED")


class Listener(Ticker):
    """Wakes by candles of one symbol; by itself it would sleep for an hour."""

    listens = (CandleClosed,)

    def wants(self, event: Event) -> bool:
        assert isinstance(event, CandleClosed)
        return event.symbol == "BTC/USDT"

    async def _handle_executing(self) -> None:
        self.evolve_context(count=self.context.count + 1)
        self.wait(3600)


class Chooser(Listener):
    def wants(self, event: Event) -> bool:
        raise KeyError(event)


class Churner(Ticker):
    """Takes and gives back a lot of memory each time: suspicious, and innocent."""

    async def _handle_executing(self) -> None:
        self.evolve_context(count=self.context.count + len(os.urandom(1 << 20)) * 0 + 1)
        self.wait(0.01)


class Printer(Ticker):
    async def _handle_executing(self) -> None:
        print("hello from a task")
        self.wait(3600)


class Broken(Ticker):
    def __init__(self, context: CountContext) -> None:
        raise ValueError("no such model file")


async def count_up(desk: Any) -> None:
    """A function for a task; what it does shows in the log."""
    desk.log.info("counted")


def spin_for_ever() -> None:
    number = 0
    while True:
        number += 1
