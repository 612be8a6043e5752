"""The handle a task in the desk's own process gets; `host.py` has its twin for background hosts.

Comes from: desk.py
Goes to: orders/protocol.py (orders), kernel/inbox.py (events)
"""

import asyncio
import random
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nightdesk.abc import Clock, Put
from nightdesk.errors import CapacityError, NightdeskError
from nightdesk.model.events import Event, QuoteChanged
from nightdesk.model.instrument import Instrument, instrument_key
from nightdesk.model.order import Order, OrderRequest
from nightdesk.model.position import Position

if TYPE_CHECKING:
    from nightdesk.desk import TradingDesk

__all__ = ["MAX_PRIVATE_BYTES", "LocalDesk"]

MAX_PRIVATE_BYTES = 1024 * 1024


class LocalDesk:
    """`abc.Desk` for one task. Reads are plain look-ups; writes go through the gate and the store."""

    def __init__(
        self, desk: "TradingDesk", task_id: str, checkpoint: Callable[[], None]
    ) -> None:
        self._desk = desk
        self._checkpoint = checkpoint
        self.task_id = task_id
        self.clock: Clock = desk.clock
        self.cache: Any = desk.cache

    # The next two are made when first asked for: most tasks never do, and of a start with 10,000 tasks
    # they were a third, and 25 MB.

    @cached_property
    def random(self) -> random.Random:
        """A source of its own: the order in which other tasks run must not change this task's numbers."""
        return random.Random(f"{self._desk.config.seed}:{self.task_id}")

    @cached_property
    def log(self) -> Any:
        return self._desk.log.bind(task=self.task_id)

    async def submit(self, request: OrderRequest) -> Order:
        return await self._desk.orders.submit(self.task_id, request)

    async def cancel(self, client_order_id: str) -> Order:
        order = self._desk.orders.order(client_order_id)
        if order is None or order.task_id != self.task_id:
            raise NightdeskError(
                f"order {client_order_id!r} is not one of task {self.task_id!r}; it can only cancel its own"
            )
        return await self._desk.orders.cancel(client_order_id)

    def orders(self) -> list[Order]:
        return self._desk.orders.orders_of(self.task_id)

    def order(self, client_order_id: str) -> Order | None:
        return self._desk.orders.order(client_order_id)

    def price(self, symbol: str, venue: str) -> QuoteChanged | None:
        return self._desk.quotes.get(instrument_key(symbol, venue))

    def instrument(self, symbol: str, venue: str) -> Instrument:
        found = self._desk.instrument(symbol, venue)
        if found is None:
            raise NightdeskError(
                f"no instrument {symbol!r} at venue {venue!r}; it has "
                f"{', '.join(sorted(self._desk.symbols_of(venue))) or 'none (no such venue)'}"
            )
        return found

    def position(self, symbol: str, venue: str) -> Position:
        return self._desk.positions.of(symbol, venue)

    def positions(self) -> list[Position]:
        return self._desk.positions.all()

    async def checkpoint(self) -> None:
        self._checkpoint()
        await asyncio.sleep(0)

    def emit(self, event: Event) -> None:
        self._desk.inbox.emit(event)

    def alert(self, level: str, text: str) -> None:
        self._desk.alert(level, self.task_id, text)

    async def save(self, key: str, data: bytes) -> None:
        if len(data) > MAX_PRIVATE_BYTES:
            raise CapacityError(
                f"private data {key!r} of task {self.task_id!r}",
                MAX_PRIVATE_BYTES,
                "nothing was saved",
            )
        await self._desk.store.save([Put("private", f"{self.task_id}/{key}", data)])

    async def load(self, key: str) -> bytes | None:
        record = await self._desk.store.get("private", f"{self.task_id}/{key}")
        return record.data if record else None
