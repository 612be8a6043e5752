"""What a task in a background host sees of the desk: copies that are kept fresh, and questions.

Comes from: host.py
Goes to: kernel/_wire.py, tasks/
"""

import asyncio
import logging
import random
import socket
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from typing import Any

import msgspec

from nightdesk.abc import Clock
from nightdesk.errors import CapacityError, NightdeskError
from nightdesk.kernel._wire import (
    Alerted,
    Answer,
    Ask,
    Channel,
    Emitted,
    Failed,
    Frame,
    Instruments,
    Logged,
    OrdersChanged,
    Positions,
    Quotes,
    decode,
    encode,
)
from nightdesk.kernel.cache import Cache
from nightdesk.model.events import Event, QuoteChanged
from nightdesk.model.instrument import Instrument, instrument_key
from nightdesk.model.order import Order, OrderRequest
from nightdesk.model.position import Position

__all__ = ["DeskLine", "ForwardingHandler", "RemoteDesk", "RemoteLog"]

_BUSY_BYTES = 1024 * 1024
_LINES_PER_S = 200
_MAX_TEXT = 4000
_MAX_PRIVATE_BYTES = 1024 * 1024
_SECOND_NS = 1_000_000_000


class DeskLine:
    """A host's line to its desk, and what came through it: quotes, instruments, positions, orders.

    Args:
        on_frame: Called with every frame that is not kept or answered here.
        on_order: Called with the id of a task whose order changed.
        on_closed: The desk is gone.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        clock: Clock,
        *,
        on_frame: Callable[[Frame], None],
        on_order: Callable[[str], None],
        on_closed: Callable[[], None],
        on_drained: Callable[[], None],
    ) -> None:
        self.clock = clock
        self.cache = Cache()
        self.seed = 0
        self.wants_debug = False
        self.quotes: dict[str, QuoteChanged] = {}
        self.instruments: dict[str, Instrument] = {}
        self.positions: dict[str, Position] = {}
        self.orders: dict[str, dict[str, Order]] = {}
        self.keys: set[str] = set()
        self._loop = loop
        self._on_frame = on_frame
        self._on_order = on_order
        self._chores: set[asyncio.Task[Any]] = set()
        self._asks: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._asked = 0
        self._lines = self._lines_dropped = self._lines_until_ns = 0
        self._keepers: dict[type[Frame], Callable[[Any], None]] = {
            Answer: self._on_answer,
            Quotes: lambda frame: self.take_quotes(frame.quotes),
            Instruments: self._on_instruments,
            Positions: self._on_positions,
            OrdersChanged: self._on_orders,
        }
        self._channel = Channel(
            loop, sock, self._take, on_closed, on_drained=on_drained
        )

    # sending

    @property
    def backlog(self) -> int:
        """Bytes that the desk has not read yet."""
        return self._channel.backlog

    def send(self, frame: Frame) -> None:
        self._channel.send(frame)

    def close(self) -> None:
        self._channel.close()

    async def drained(self) -> None:
        """Wait until the desk has read everything."""
        while self._channel.backlog:  # noqa: ASYNC110 (happens once, at the end)
            await asyncio.sleep(0.005)

    async def ask(self, verb: str, task_id: str, body: Any, kind: Any) -> Any:
        """Ask the desk and return its answer as `kind`; without a timeout, the desk has its own.

        Raises:
            NightdeskError: What the desk raised; an `OrderDeniedError` arrives as one.
        """
        self._asked += 1
        number = self._asked
        answer: asyncio.Future[msgspec.Raw] = self._loop.create_future()
        self._asks[number] = answer
        try:
            self.send(Ask(number, verb, task_id, msgspec.Raw(encode(body))))
            return decode(await answer, type=kind)
        finally:
            del self._asks[number]

    async def subscribe(self, keys: Sequence[str]) -> None:
        """Have the quotes of `keys` sent from now on, and the newest ones at once."""
        new = [key for key in keys if key not in self.keys]
        if new:
            self.keys.update(new)
            self.take_quotes(await self.ask("subscribe", "", new, list[QuoteChanged]))

    def emit(self, task_id: str, event: Event) -> None:
        """Send an event into the desk's inbox; dropped, and logged, while the desk is too far behind."""
        if self.backlog > _BUSY_BYTES:
            text = f"an event {type(event).__name__} was dropped: the desk is behind"
            self.say("warning", task_id, text)
            return
        self.send(Emitted(task_id, msgspec.Raw(encode(event))))

    def say(
        self, level: str, task_id: str, text: str, fields: dict[str, Any] | None = None
    ) -> None:
        """Write a line into the desk's log."""
        if self._may_speak():
            plain = {name: _plain(value) for name, value in (fields or {}).items()}
            self.send(Logged(task_id, level, text[:_MAX_TEXT], plain))

    def alert(self, task_id: str, level: str, text: str) -> None:
        """Tell the operator."""
        if self._may_speak():
            self.send(Alerted(task_id, level, text[:_MAX_TEXT]))

    def report_failure(
        self, task_id: str, error: BaseException, consequence: str
    ) -> None:
        """Tell the desk's observers that a task failed."""
        if self._may_speak():
            text = str(error)[:_MAX_TEXT]
            self.send(Failed(task_id, type(error).__name__, text, consequence))

    def _may_speak(self) -> bool:
        """At most 200 lines a second of a whole host: a task that logs in a loop is its own affair (R-25)."""
        now = self.clock.monotonic_ns()
        if now > self._lines_until_ns:
            self._lines_until_ns = now + _SECOND_NS
            dropped, self._lines, self._lines_dropped = self._lines_dropped, 0, 0
            if dropped:
                text = f"{dropped} log lines of background tasks were dropped"
                self.send(Logged("", "warning", text))
        self._lines += 1
        if self._lines > _LINES_PER_S:
            self._lines_dropped += 1
            return False
        return True

    def chore(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run work of the host itself: before that of its tasks, and nobody's."""
        chore = self._loop.create_task(work, context=Context())
        self._chores.add(chore)
        chore.add_done_callback(self._on_chore_done)
        return chore

    def _on_chore_done(self, chore: asyncio.Task[Any]) -> None:
        self._chores.discard(chore)
        if not chore.cancelled() and chore.exception() is not None:
            self.say("error", "", f"background host: {chore.exception()!r}")

    # receiving

    def _take(self, frame: Frame) -> None:
        keep = self._keepers.get(type(frame), self._on_frame)
        try:
            keep(frame)
        except Exception as error:
            # One frame that cannot be used must not end the conversation.
            name = type(frame).__name__
            self.say("error", "", f"a {name} message could not be used: {error!r}")

    def _on_answer(self, frame: Answer) -> None:
        waiting = self._asks.get(frame.number)
        if waiting is None or waiting.done():
            return
        if frame.failure is not None:
            waiting.set_exception(frame.failure.raised())
        else:
            waiting.set_result(frame.body)

    def take_quotes(self, quotes: Sequence[QuoteChanged]) -> None:
        for quote in quotes:
            self.quotes[instrument_key(quote.symbol, quote.venue)] = quote

    def _on_instruments(self, frame: Instruments) -> None:
        self.instruments.update({i.key: i for i in frame.instruments})

    def _on_positions(self, frame: Positions) -> None:
        for position in frame.positions:
            key = instrument_key(position.symbol, position.venue)
            self.positions[key] = position

    def _on_orders(self, frame: OrdersChanged) -> None:
        for order in frame.orders:
            self.take_order(order)
            self._on_order(order.task_id)

    def take_order(self, order: Order) -> None:
        """Keep the newest value of one order."""
        self.orders.setdefault(order.task_id, {})[order.client_order_id] = order


class RemoteDesk:
    """`abc.Desk` for one hosted task: reads are copies that the desk keeps fresh, writes are questions.

    Quotes come at most 20 times a second. The first look at an instrument that is not among the
    task's `keys()` finds none, and has it sent from then on.
    """

    def __init__(self, line: DeskLine, task_id: str, save: Callable[[], None]) -> None:
        self._line = line
        self._save = save
        self.task_id = task_id
        self.clock: Clock = line.clock
        self.random = random.Random(f"{line.seed}:{task_id}")
        self.cache: Any = line.cache
        self.log: Any = RemoteLog(line, task_id)

    async def submit(self, request: OrderRequest) -> Order:
        order: Order = await self._line.ask("submit", self.task_id, request, Order)
        self._line.take_order(order)
        return order

    async def cancel(self, client_order_id: str) -> Order:
        if self.order(client_order_id) is None:
            raise NightdeskError(
                f"order {client_order_id!r} is not one of task {self.task_id!r}; it can only cancel its own"
            )
        order: Order = await self._line.ask(
            "cancel", self.task_id, client_order_id, Order
        )
        self._line.take_order(order)
        return order

    def orders(self) -> list[Order]:
        return list(self._line.orders.get(self.task_id, {}).values())

    def order(self, client_order_id: str) -> Order | None:
        return self._line.orders.get(self.task_id, {}).get(client_order_id)

    def price(self, symbol: str, venue: str) -> QuoteChanged | None:
        key = instrument_key(symbol, venue)
        if key not in self._line.keys:
            self._line.chore(self._line.subscribe([key]))
        return self._line.quotes.get(key)

    def instrument(self, symbol: str, venue: str) -> Instrument:
        found = self._line.instruments.get(instrument_key(symbol, venue))
        if found is None:
            known = sorted(
                i.symbol for i in self._line.instruments.values() if i.venue == venue
            )
            raise NightdeskError(
                f"no instrument {symbol!r} at venue {venue!r}; it has {', '.join(known) or 'none (no such venue)'}"
            )
        return found

    def position(self, symbol: str, venue: str) -> Position:
        known = self._line.positions.get(instrument_key(symbol, venue))
        return known or Position(symbol=symbol, venue=venue)

    def positions(self) -> list[Position]:
        return list(self._line.positions.values())

    async def checkpoint(self) -> None:
        self._save()
        await asyncio.sleep(0)

    def emit(self, event: Event) -> None:
        self._line.emit(self.task_id, event)

    def alert(self, level: str, text: str) -> None:
        self._line.alert(self.task_id, level, text)

    async def save(self, key: str, data: bytes) -> None:
        if len(data) > _MAX_PRIVATE_BYTES:
            what = f"private data {key!r} of task {self.task_id!r}"
            raise CapacityError(what, _MAX_PRIVATE_BYTES, "nothing was saved")
        await self._line.ask("save", self.task_id, (key, data), None)

    async def load(self, key: str) -> bytes | None:
        found: bytes | None = await self._line.ask(
            "load", self.task_id, key, bytes | None
        )
        return found


class RemoteLog:
    """A log whose lines appear in the desk's own, under the task's name."""

    def __init__(
        self, line: DeskLine, task_id: str, fields: dict[str, Any] | None = None
    ) -> None:
        self._line, self._task_id, self._fields = line, task_id, fields or {}

    def bind(self, **fields: Any) -> "RemoteLog":
        """Return a log that adds `fields` to each line."""
        return RemoteLog(self._line, self._task_id, {**self._fields, **fields})

    def debug(self, text: str, **fields: Any) -> None:
        if self._line.wants_debug:
            self._say("debug", text, fields)

    def info(self, text: str, **fields: Any) -> None:
        self._say("info", text, fields)

    def warning(self, text: str, **fields: Any) -> None:
        self._say("warning", text, fields)

    def error(self, text: str, **fields: Any) -> None:
        self._say("error", text, fields)

    exception = critical = error

    def _say(self, level: str, text: str, fields: dict[str, Any]) -> None:
        self._line.say(level, self._task_id, text, {**self._fields, **fields})


class ForwardingHandler(logging.Handler):
    """Sends what libraries log, from whatever thread, to the desk's log."""

    def __init__(self, line: DeskLine, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(logging.WARNING)
        self._line, self._loop = line, loop
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            text = logging.Formatter().formatException(record.exc_info)
            fields["traceback"] = text[-2000:]
        level = "error" if record.levelno >= logging.ERROR else "warning"
        say, words = self._line.say, record.getMessage()
        if threading.get_ident() == self._thread:
            say(level, "", words, fields)
        else:
            self._loop.call_soon_threadsafe(
                say, level, "", words, fields, context=Context()
            )


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | None):
        return value[:_MAX_TEXT] if isinstance(value, str) else value
    return str(value)[:_MAX_TEXT]
