"""The processes of `bench path`: the desk's source, venue and tasks, the plain program, and the far venue.

Everything here speaks HTTP as far as the measurement needs it: a head with a length, and a JSON body.

Comes from: bench/path.py
Goes to: desk.py, stores/sqlite.py
"""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from decimal import Decimal
from pathlib import Path
from typing import ClassVar, cast

import msgspec

from nightdesk.abc import Clock, Emit, OpportunityHandler, Source, Task, Venue
from nightdesk.model.context import TaskContext
from nightdesk.model.events import (
    Event,
    Opportunity,
    OrderFilled,
    PoolSwap,
    QuoteChanged,
)
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import (
    Fill,
    Order,
    OrderRequest,
    Side,
    TimeInForce,
    VenueOrder,
)

__all__ = [
    "ChoreTask",
    "FarVenue",
    "PostSource",
    "Row",
    "Swap",
    "TakeTask",
    "WireVenue",
    "encode",
    "message",
    "plain_program",
]

VENUE, SYMBOL = "wire", "ARB/USDC"
CHORE_S = 0.1
_PRICE = Decimal("1.02")
_HEAD = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
_stamp = time.monotonic_ns


class Swap(msgspec.Struct):
    """What the sender posts."""

    number: int
    transaction_hash: str
    price_impact_ppm: int
    value_usd: Decimal
    price: Decimal


class Row(msgspec.Struct):
    """One order request: which event caused it, and the monotonic stamps of its way.

    Attributes:
        sender: 0 is the desk, 1 the plain program.
        durable_ns: The intent was on disk; next the request is made.
        arrived_ns: The far end had the last byte.
    """

    sender: int
    number: int
    received_ns: int
    handler_ns: int
    durable_ns: int
    id: str
    side: Side
    quantity: Decimal
    price: Decimal
    arrived_ns: int = 0


class Reply(msgspec.Struct):
    id: str
    venue_order_id: str


encode = msgspec.json.Encoder().encode
_decode_swap = msgspec.json.Decoder(Swap).decode
_decode_row = msgspec.json.Decoder(Row).decode
_decode_reply = msgspec.json.Decoder(Reply).decode


def message(path: bytes, body: bytes) -> bytes:
    """Return one request, or a reply in the form of one."""
    return _HEAD % (path, len(body)) + body


class Messages(asyncio.Protocol):
    """Cuts a connection into bodies and hands each on with the instant at which its last byte was here."""

    def __init__(self, react: Callable[[bytes, int, asyncio.Transport], None]) -> None:
        self._react = react
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        received_ns = _stamp()
        rest = self._rest + data
        while (end := rest.find(b"\r\n\r\n")) >= 0:
            at = rest.find(b"Content-Length: ", 0, end)
            length = int(rest[at + 16 : rest.find(b"\r\n", at)]) if at >= 0 else 0
            if len(rest) < end + 4 + length:
                break
            body, rest = rest[end + 4 : end + 4 + length], rest[end + 4 + length :]
            self._react(body, received_ns, self._transport)
        self._rest = rest


# --- The desk -------------------------------------------------------------------------------------------

_CAUSE: ContextVar[tuple[int, int, int]] = ContextVar("_CAUSE", default=(0, 0, 0))
"""Number of the event, when it was received, and when its handler began."""


class PostSource(Source):
    """Takes swaps by POST and shows a quote twice a second, as a feed would."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = 0

    async def start(self, emit: Emit, clock: Clock, random: random.Random) -> None:
        self._emit = emit
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Messages(self._on_post), "127.0.0.1", 0
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self._show_quote()

    async def stop(self) -> None:
        self._timer.cancel()
        self._server.close()

    def _show_quote(self) -> None:
        size, half = Decimal(100_000), Decimal("0.001")
        self._emit(
            QuoteChanged(
                symbol=SYMBOL,
                venue=VENUE,
                bid=_PRICE - half,
                bid_quantity=size,
                ask=_PRICE + half,
                ask_quantity=size,
            )
        )
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(0.5, self._show_quote)

    def _on_post(
        self, body: bytes, received_ns: int, transport: asyncio.Transport
    ) -> None:
        swap = _decode_swap(body)
        RECEIVED[swap.number] = received_ns
        self._emit(
            PoolSwap(
                chain="arbitrum",
                pool="0xb0f6ca40411360c03d41c5ffc5f179b8403cdcf8",
                pair=SYMBOL,
                transaction_hash=swap.transaction_hash,
                log_index=swap.number,
                price_impact_ppm=swap.price_impact_ppm,
                value_usd=swap.value_usd,
                price=swap.price,
            )
        )
        transport.write(_NO_CONTENT)


RECEIVED: dict[int, int] = {}
"""When each event was received: source and handler live in one process."""


class TakeContext(TaskContext, kw_only=True):
    taken: int = 0


class TakeTask(OpportunityHandler[TakeContext]):
    """Follows each swap by one order: buys and sells in turn, so that nothing piles up."""

    context_class: ClassVar[type[TaskContext]] = TakeContext
    handles: ClassVar[tuple[type[Event], ...]] = (PoolSwap,)

    async def _handle_executing(self) -> None:
        self.wait(1.0)

    def assess(self, event: Event) -> int | None:
        assert isinstance(event, PoolSwap)
        return event.price_impact_ppm - 5_000 if event.value_usd > 10_000 else None

    async def handle(self, opportunity: Opportunity) -> None:
        handler_ns = _stamp()
        cause = opportunity.cause
        assert isinstance(cause, PoolSwap)
        number = cause.log_index
        _CAUSE.set((number, RECEIVED.pop(number, 0), handler_ns))
        self.evolve_context(taken=self.context.taken + 1)
        await self.desk.submit(
            OrderRequest(
                symbol=SYMBOL,
                venue=VENUE,
                side=Side.SELL if number % 2 else Side.BUY,
                quantity=Decimal(100),
                price=_PRICE,
                time_in_force=TimeInForce.IOC,
            )
        )


class ChoreContext(TaskContext, kw_only=True):
    count: int = 0
    note: str = "x" * 800


class ChoreTask(Task[ChoreContext]):
    """Background work: remembers something ten times a second."""

    context_class: ClassVar[type[TaskContext]] = ChoreContext

    async def _handle_executing(self) -> None:
        self.evolve_context(count=self.context.count + 1)
        self.wait(CHORE_S)


class WireVenue(Venue):
    """The desk's end of the line to `FarVenue`."""

    def __init__(self, name: str, *, port: int) -> None:
        self.name = name
        self._port = port
        self._replies: dict[str, asyncio.Future[str]] = {}
        self._held = Decimal(0)
        self._listing = Instrument(
            symbol=SYMBOL,
            venue=name,
            tick_size=Decimal("0.001"),
            lot_size=Decimal("0.1"),
            min_quantity=Decimal(1),
        )

    async def start(self, emit: Emit, clock: Clock, random: random.Random) -> None:
        self._emit, self._clock = emit, clock
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_connection(
            lambda: Messages(self._on_reply), "127.0.0.1", self._port
        )

    async def stop(self) -> None:
        self._transport.close()

    def instruments(self) -> Mapping[str, Instrument]:
        return {SYMBOL: self._listing}

    async def submit(self, order: Order) -> str:
        number, received_ns, handler_ns = _CAUSE.get()
        request = order.request
        assert request.price is not None
        row = Row(
            sender=0,
            number=number,
            received_ns=received_ns,
            handler_ns=handler_ns,
            durable_ns=_stamp(),
            id=order.client_order_id,
            side=request.side,
            quantity=request.quantity,
            price=request.price,
        )
        reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._replies[row.id] = reply
        self._transport.write(message(b"/api/v3/order", encode(row)))
        venue_order_id = await reply
        self._held += request.side.sign * request.quantity
        fill = Fill(
            venue=self.name,
            symbol=SYMBOL,
            trade_id=venue_order_id,
            venue_order_id=venue_order_id,
            client_order_id=row.id,
            side=request.side,
            quantity=request.quantity,
            price=request.price,
            ts_event_ns=self._clock.now_ns(),
        )
        self._emit(
            OrderFilled(
                venue=self.name,
                symbol=SYMBOL,
                client_order_id=row.id,
                venue_order_id=venue_order_id,
                fill=fill,
            )
        )
        return venue_order_id

    def _on_reply(self, body: bytes, received_ns: int, _: asyncio.Transport) -> None:
        reply = _decode_reply(body)
        self._replies.pop(reply.id).set_result(reply.venue_order_id)

    async def cancel(self, order: Order) -> None:
        return None

    async def find_order(self, symbol: str, client_order_id: str) -> VenueOrder | None:
        return None

    async def open_orders(self) -> list[VenueOrder]:
        return []

    async def fills(self, since_ns: int) -> list[Fill]:
        return []

    async def balances(self) -> dict[str, Decimal]:
        return {"ARB": self._held, "USDC": Decimal(1_000_000)}


# --- The plain program ------------------------------------------------------------------------------------


class _Commits:
    """One SQLite transaction per order, in a thread: what programs do that want their intent on disk."""

    def __init__(self, path: Path) -> None:
        import apsw

        self._lock = threading.Lock()
        self._connection = apsw.Connection(str(path))
        self._connection.pragma("journal_mode", "wal")
        self._connection.pragma("synchronous", "full")
        self._connection.execute(
            "CREATE TABLE records (key TEXT PRIMARY KEY, data BLOB)"
        )

    async def save(self, key: str, data: bytes) -> None:
        await asyncio.to_thread(self._write, key, data)

    def _write(self, key: str, data: bytes) -> None:
        with self._lock:
            self._connection.execute(
                "INSERT OR REPLACE INTO records VALUES (?, ?)", (key, data)
            )


async def plain_program(
    directory: Path, venue_port: int, chores: int, announce: Callable[[int], None]
) -> None:
    """The same work without a desk: post, commit, send. No gate, no ledger, no switch, and chores that forget."""
    loop = asyncio.get_running_loop()
    commits = _Commits(directory / "plain.db")
    replies: dict[str, asyncio.Future[str]] = {}
    running: set[asyncio.Task[None]] = set()

    def on_reply(body: bytes, _: int, __: asyncio.Transport) -> None:
        reply = _decode_reply(body)
        replies.pop(reply.id).set_result(reply.venue_order_id)

    line, _ = await loop.create_connection(
        lambda: Messages(on_reply), "127.0.0.1", venue_port
    )

    async def handle(swap: Swap, received_ns: int) -> None:
        handler_ns = _stamp()
        row = Row(
            sender=1,
            number=swap.number,
            received_ns=received_ns,
            handler_ns=handler_ns,
            durable_ns=0,
            id=f"plain-{swap.number:012d}",
            side=Side.SELL if swap.number % 2 else Side.BUY,
            quantity=Decimal(100),
            price=_PRICE,
        )
        await commits.save(row.id, encode(row))
        row.durable_ns = _stamp()
        reply: asyncio.Future[str] = loop.create_future()
        replies[row.id] = reply
        line.write(message(b"/api/v3/order", encode(row)))
        row.id = await reply

    def on_post(body: bytes, received_ns: int, transport: asyncio.Transport) -> None:
        swap = _decode_swap(body)
        if swap.price_impact_ppm > 5_000 and swap.value_usd > 10_000:
            task = loop.create_task(handle(swap, received_ns))
            running.add(task)
            task.add_done_callback(running.discard)
        transport.write(_NO_CONTENT)

    async def chore(number: int) -> None:
        # Not made durable: a commit for each would hold up the desk, too, since both share the disk.
        context = ChoreContext(task_id=f"chore-{number}")
        while True:
            context = context.evolve(count=context.count + 1)
            await asyncio.sleep(CHORE_S)

    running |= {loop.create_task(chore(number)) for number in range(chores)}
    server = await loop.create_server(lambda: Messages(on_post), "127.0.0.1", 0)
    announce(server.sockets[0].getsockname()[1])
    await server.serve_forever()


# --- The far end --------------------------------------------------------------------------------------------


class FarVenue:
    """Stamps each request when its last byte is here, and answers at once. An empty body asks for all rows."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    async def serve(self, announce: Callable[[int], None]) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: Messages(self._on_request), "127.0.0.1", 0
        )
        announce(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    def _on_request(
        self, body: bytes, arrived_ns: int, transport: asyncio.Transport
    ) -> None:
        if not body:
            transport.write(encode(self.rows))
            transport.close()
            return
        row = _decode_row(body)
        row.arrived_ns = arrived_ns
        self.rows.append(row)
        reply = Reply(row.id, f"v{len(self.rows)}")
        transport.write(message(b"/reply", encode(reply)))
