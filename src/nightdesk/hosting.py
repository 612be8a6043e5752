"""What a background host may ask of its desk: the other end of every hosted task's handle.

Comes from: kernel/hosts.py
Goes to: orders/protocol.py, contexts.py
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from nightdesk.abc import Put, Shelf
from nightdesk.errors import NightdeskError
from nightdesk.model.events import Event
from nightdesk.model.health import TaskHealth
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Order, OrderRequest
from nightdesk.model.position import Position

if TYPE_CHECKING:
    from nightdesk.desk import TradingDesk

__all__ = ["HostService"]


class HostService:
    """`kernel.hosts.HostCallbacks` over one desk."""

    def __init__(self, desk: "TradingDesk") -> None:
        self._desk = desk

    async def submit(self, task_id: str, request: OrderRequest) -> Order:
        return await self._desk.orders.submit(task_id, request)

    async def cancel(self, task_id: str, client_order_id: str) -> Order:
        order = self._desk.orders.order(client_order_id)
        if order is None or order.task_id != task_id:
            raise NightdeskError(
                f"order {client_order_id!r} is not one of task {task_id!r}; it can only cancel its own"
            )
        return await self._desk.orders.cancel(client_order_id)

    async def save_private(self, task_id: str, key: str, data: bytes) -> None:
        await self._desk.store.save([Put("private", f"{task_id}/{key}", data)])

    async def load_private(self, task_id: str, key: str) -> bytes | None:
        record = await self._desk.store.get("private", f"{task_id}/{key}")
        return record.data if record else None

    def save_context(self, task_id: str, data: bytes, shelf: Shelf) -> None:
        self._desk.checkpoints.put(Put("context", task_id, data, shelf))

    def orders(self, task_id: str) -> list[Order]:
        return self._desk.orders.orders_of(task_id)

    def positions(self) -> list[Position]:
        return self._desk.positions.all()

    def instruments(self) -> Iterable[Instrument]:
        return [
            instrument
            for venue in self._desk.venues.values()
            for instrument in venue.instruments().values()
        ]

    def emit(self, task_id: str, event: Event) -> None:
        self._desk.inbox.emit(event)

    def alert(self, task_id: str, level: str, text: str) -> None:
        self._desk.alert(level, task_id or "background hosts", text)

    def log(self, task_id: str, level: str, text: str, fields: dict[str, Any]) -> None:
        write = getattr(self._desk.log, level, self._desk.log.info)
        write(text, task=task_id, **fields)

    def on_offender(self, task_id: str, kind: str, detail: str, stack: str) -> None:
        self._desk.note_offender(task_id, kind, detail, stack)

    def on_refused(self, task_id: str, text: str, is_context: bool) -> None:
        self._desk.alert("critical", task_id, f"cannot run in its host: {text}")

    def on_health_changed(self, task_id: str, health: TaskHealth) -> None:
        self._desk.checkpoints.put(Put("health", task_id, msgspec.json.encode(health)))

    def on_finished(self, task_id: str) -> None:
        self._desk.log.info("task finished", task=task_id, runs_in="background")
