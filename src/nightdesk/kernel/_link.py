"""The desk's line to one host: what waits to be sent, what is asked and answered.

Comes from: kernel/hosts.py
Goes to: kernel/_wire.py
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import Context, copy_context
from typing import Any

import msgspec

from nightdesk.abc import Clock
from nightdesk.errors import NightdeskError
from nightdesk.kernel._process import HostProcess
from nightdesk.kernel._wire import (
    AddTasks,
    Answer,
    Ask,
    Channel,
    Frame,
    Happened,
    OrdersChanged,
    Placement,
    Positions,
    Quotes,
    decode,
    encode,
)
from nightdesk.kernel.loop import LANE, Lane
from nightdesk.model.events import Event, QuoteChanged
from nightdesk.model.order import Order
from nightdesk.model.position import Position

__all__ = ["HostLink"]

_QUOTES_EVERY_S = 0.05
_EVENTS_EVERY_S = 0.005
_MAX_EVENTS = 1024
_BUSY_BYTES = 1024 * 1024
_TASKS_PER_FRAME = 50


class HostLink:
    """One host: its process and its socket, with the queues between.

    Market data is conflated while it waits; of events that cannot be conflated at most 1,024 wait, then
    the oldest is dropped and counted. Tasks, orders, questions and answers are never dropped.
    """

    def __init__(
        self,
        number: int,
        process: HostProcess,
        sock: socket.socket,
        clock: Clock,
        on_frame: Callable[["HostLink", Frame], None],
        *,
        is_isolated: bool = False,
        failures: int = 0,
    ) -> None:
        self.number = number
        self.process = process
        self.clock = clock
        self.started_ns = clock.monotonic_ns()
        self.is_isolated = is_isolated
        self.failures = failures
        self.is_ready = False
        self.is_doomed = False
        self.named_since_ns = 0
        self.stuck: list[str] | None = None
        self.closed = asyncio.Event()
        self.tasks: dict[str, None] = {}
        self.follows: dict[str, int] = {}
        self.in_flight: dict[str, set[asyncio.Task[None]]] = {}
        self.keys: set[str] = set()
        self.events: set[str] = set()
        self.dropped = 0
        self.resident = 0
        self._loop = asyncio.get_running_loop()
        self._context: Context = copy_context()
        self._context.run(LANE.set, Lane.NORMAL)
        self._placements: deque[Callable[[], Placement]] = deque()
        self._quotes: dict[str, QuoteChanged] = {}
        self._positions: dict[tuple[str, str], Position] = {}
        self._conflated: dict[str, Event] = {}
        self._happened: deque[Event] = deque()
        self._quotes_sent_ns = 0
        self._flush_due = False
        self._place_due = False
        self._asks: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._asked = 0
        self._channel = Channel(
            self._loop,
            sock,
            lambda frame: on_frame(self, frame),
            self._on_closed,
            lane=Lane.NORMAL,
            on_drained=self._on_drained,
        )

    @property
    def is_open(self) -> bool:
        """Whether the process and its page are still held."""
        return not self.process.is_closed

    @property
    def backlog(self) -> int:
        """Bytes that the host has not read yet."""
        return self._channel.backlog

    def blocked_s(self) -> float:
        """Return for how long it has read nothing although something waits."""
        return self._channel.blocked_s()

    def send(self, frame: Frame) -> None:
        self._channel.send(frame)

    # tasks

    def place(self, placement: Callable[[], Placement]) -> None:
        """Send a task to the host, soon, together with others; `placement` is called just then."""
        self._placements.append(placement)
        self._place_soon()

    def _place_soon(self) -> None:
        if self._placements and not self._place_due and self.backlog < _BUSY_BYTES:
            self._place_due = True
            self._loop.call_soon(self._place_some, context=self._context)

    def _place_some(self) -> None:
        """Send one batch and come back for the next: 10,000 tasks in one go would hold up the desk."""
        self._place_due = False
        batch: list[Placement] = []
        size = 0
        while self._placements and len(batch) < _TASKS_PER_FRAME and size < _BUSY_BYTES:
            placement = self._placements.popleft()()
            size += len(placement.task.context or b"")
            batch.append(placement)
        if batch:
            self.send(AddTasks(batch))
        self._place_soon()

    # what the host should know

    def push_quote(self, key: str, quote: QuoteChanged) -> None:
        self._quotes[key] = quote
        self._flush_in(_QUOTES_EVERY_S)

    def push_positions(self, positions: Iterable[Position]) -> None:
        for position in positions:
            self._positions[position.symbol, position.venue] = position
        self._flush_in(_EVENTS_EVERY_S)

    def push_order(self, order: Order) -> None:
        self.send(OrdersChanged([order]))

    def push_event(self, event: Event) -> None:
        key = event.conflation_key
        if key is not None:
            self._conflated.pop(key, None)
            self._conflated[key] = event
        else:
            if len(self._happened) >= _MAX_EVENTS:
                self._happened.popleft()
                self.dropped += 1
            self._happened.append(event)
        self._flush_in(_EVENTS_EVERY_S)

    def _flush_in(self, seconds: float) -> None:
        if not self._flush_due and self.backlog < _BUSY_BYTES:
            self._flush_due = True
            self._loop.call_later(seconds, self._flush, context=self._context)

    def _flush(self) -> None:
        self._flush_due = False
        if self._conflated or self._happened:
            events = [*self._conflated.values(), *self._happened]
            self._conflated.clear()
            self._happened.clear()
            self.send(Happened([msgspec.Raw(encode(event)) for event in events]))
        if self._positions:
            self.send(Positions(list(self._positions.values())))
            self._positions.clear()
        if self._quotes:
            self._flush_quotes()

    def _flush_quotes(self) -> None:
        now = self.clock.monotonic_ns()
        if now - self._quotes_sent_ns < int(_QUOTES_EVERY_S * 0.9e9):
            self._flush_in(_QUOTES_EVERY_S)
            return
        self._quotes_sent_ns = now
        self.send(Quotes(list(self._quotes.values())))
        self._quotes.clear()

    def _on_drained(self) -> None:
        self._place_soon()
        if self._quotes or self._positions or self._conflated or self._happened:
            self._flush_in(_EVENTS_EVERY_S)

    # questions

    async def ask(
        self, verb: str, task_id: str, body: Any = None, timeout_s: float = 5.0
    ) -> Any:
        """Ask the host and return its answer.

        Raises:
            NightdeskError: What the host raised, or that it did not answer.
        """
        if self.closed.is_set():
            raise self._ended()
        self._asked += 1
        number = self._asked
        answer: asyncio.Future[msgspec.Raw] = self._loop.create_future()
        self._asks[number] = answer
        try:
            self.send(Ask(number, verb, task_id, msgspec.Raw(encode(body))))
            async with asyncio.timeout(timeout_s):
                return decode(await answer)
        except TimeoutError:
            raise NightdeskError(
                f"background host {self.number} (process {self.process.pid}) did not answer `{verb}` of task "
                f"{task_id!r} within {timeout_s:g} s; if it stays silent it is replaced. Try again in a moment."
            ) from None
        finally:
            del self._asks[number]

    def on_answer(self, answer: Answer) -> None:
        """Give an answer to whoever asked."""
        waiting = self._asks.get(answer.number)
        if waiting is None or waiting.done():
            return
        if answer.failure is not None:
            waiting.set_exception(answer.failure.raised())
        else:
            waiting.set_result(answer.body)

    # its end

    def _on_closed(self) -> None:
        for waiting in self._asks.values():
            if not waiting.done():
                waiting.set_exception(self._ended())
        self.closed.set()

    def _ended(self) -> NightdeskError:
        return NightdeskError(
            f"background host {self.number} has ended; try again in a moment"
        )

    async def end(self) -> None:
        """Kill the process, take in what it had still sent, give everything back."""
        self.process.kill()
        await self.process.gone(5.0)
        try:
            async with asyncio.timeout(2.0):
                await self.closed.wait()
        except TimeoutError:
            pass  # a grandchild holds the socket open; what it has to say is nobody's
        self._channel.close()
        self.process.close()
