"""Orders, fills, positions and cursors as records of the store.

Comes from: orders/protocol.py
Goes to: stores/
"""

from collections.abc import Callable
from typing import Any

import msgspec

from nightdesk.abc import Delete, Put, Store
from nightdesk.errors import RecordCorruptError
from nightdesk.model.order import Fill, Order

__all__ = [
    "Records",
    "archive_batch",
    "cursor_put",
    "fill_put",
    "load_records",
    "order_put",
    "position_put",
]

_KINDS = ("order", "fill", "position", "cursor")
_TRADES = "trades"

_encode = msgspec.json.Encoder().encode
_decode_order = msgspec.json.Decoder(Order).decode
_decode_fill = msgspec.json.Decoder(Fill).decode


class Records(msgspec.Struct):
    """What earlier runs left.

    Attributes:
        cursors: Venue to the time of its newest booked fill.
        damaged: Money records that are lost: totals may be too small.
        quarantined: Everything that could not be read, in words.
    """

    orders: list[Order] = []
    fills: list[Fill] = []
    cursors: dict[str, int] = {}
    damaged: list[str] = []
    quarantined: list[str] = []

    def note(self, kind: str, key: str, reason: str) -> None:
        text = str(RecordCorruptError(kind, key, reason))
        self.quarantined.append(text)
        if kind in _KINDS:
            self.damaged.append(text)


def order_put(order: Order) -> Put:
    """An order stands on the active shelf until it has ended."""
    return Put(
        "order",
        order.client_order_id,
        _encode(order),
        "active" if order.status.is_open else "completed",
    )


def fill_put(fill: Fill) -> Put:
    return Put("fill", fill.key, _encode(fill), "completed")


def position_put(symbol: str, venue: str, data: bytes) -> Put:
    return Put("position", f"{symbol}@{venue}", data)


def cursor_put(venue: str, ts_ns: int) -> Put:
    return Put("cursor", f"{_TRADES}|{venue}", b"%d" % ts_ns)


async def load_records(
    store: Store, restore_position: Callable[[bytes], Any]
) -> Records:
    """Read all that concerns orders; a record that cannot be read is noted, and the others are taken."""
    found = Records()

    async def read(kind: str, take: Callable[[bytes], Any]) -> list[Any]:
        taken = []
        for record in await store.load(kind):
            try:
                taken.append(take(record.data))
            except msgspec.MsgspecError as error:
                found.note(kind, record.key, str(error))
        return taken

    found.orders = await read("order", _decode_order)
    found.fills = await read("fill", _decode_fill)
    await read("position", restore_position)
    for record in await store.load("cursor"):
        kind, _, venue = record.key.partition("|")
        if kind == _TRADES and record.data.isdigit():
            found.cursors[venue] = int(record.data)
    for kind, key, reason in store.quarantined():
        found.note(kind, key, reason)
    return found


def archive_batch(orders: list[Order]) -> list[Put | Delete]:
    """Return what moves finished orders out of the way of the next start."""
    batch: list[Put | Delete] = []
    for order in orders:
        cid = order.client_order_id
        batch += [
            Delete("order", cid),
            Put("archived_order", cid, _encode(order), "completed"),
        ]
    return batch
