"""The paper venue's own process, from inside: a venue, its feeds, and the desks that listen.

Replies and order events are never dropped: a client that cannot take them is disconnected and asks
again. Market data is: a slow client gets the newest quote of each instrument, and the newest trades.

Comes from: exchange/paper_process.py
Goes to: venues/paper.py, venues/_wire.py
"""

import asyncio
import logging
import os
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from nightdesk.abc import Clock, Source
from nightdesk.errors import OutcomeUnknownError, VenueRejectedError
from nightdesk.model.events import Event, OrderEvent, QuoteChanged
from nightdesk.model.order import Order
from nightdesk.venues._wire import (
    MAX_FRAME,
    PAGE,
    AnyEvent,
    Call,
    Failure,
    Push,
    Reply,
    decode,
    encode,
    is_news,
    pack,
    read_frame,
)
from nightdesk.venues.paper import PaperVenue

__all__ = ["PaperServer"]

_log = logging.getLogger(__name__)
_MAX_CLIENTS = 16
_MAX_CALLS = 1_000
_MAX_URGENT = 20_000
_MAX_MARKET = 5_000
_IDLE_POLL_S = 0.5

Answer = Callable[["PaperServer", Call], Awaitable[Any]]


class PaperServer:
    """Serves one paper venue on a Unix socket until told to stop, or alone for too long.

    Args:
        venue: Not yet started.
        feeds: Sources of its market, not yet started.
        socket: Where to listen; readable for this user only.
        clock: The machine's.
        dice: Seeded random numbers for a part of this name.
        idle_exit_s: Ends after so long without any client; 0 never does.
    """

    def __init__(
        self,
        venue: PaperVenue,
        feeds: Sequence[Source],
        socket: Path,
        clock: Clock,
        dice: Callable[[str], random.Random],
        idle_exit_s: float = 1800.0,
    ) -> None:
        self._venue = venue
        self._feeds = feeds
        self._socket = socket
        self._clock = clock
        self._dice = dice
        self._idle_exit_s = idle_exit_s
        self._clients: set[_Client] = set()
        self._server: asyncio.Server | None = None
        self._ended = asyncio.Event()

    async def start(self) -> None:
        """Open the venue, then the door, then the feeds."""
        await self._venue.start(self._emit, self._clock, self._dice(self._venue.name))
        self._socket.unlink(
            missing_ok=True
        )  # left behind by a killed process; the lock says that it is gone
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(
                self._serve, str(self._socket)
            )
        finally:
            os.umask(before)
        for feed in self._feeds:
            await feed.start(self._emit, self._clock, self._dice(feed.name))

    async def run(self) -> None:
        """Stay until `end`, or until nobody has been here for `idle_exit_s`."""
        alone_since_ns = self._clock.monotonic_ns()
        while not self._ended.is_set():
            try:
                async with asyncio.timeout(_IDLE_POLL_S):
                    await self._ended.wait()
            except TimeoutError:
                pass
            now = self._clock.monotonic_ns()
            if self._clients:
                alone_since_ns = now
            elif 0 < self._idle_exit_s <= (now - alone_since_ns) / 1e9:
                _log.info("no desk for %s s: closing", self._idle_exit_s)
                return

    def end(self) -> None:
        self._ended.set()

    async def stop(self) -> None:
        """Close feeds, door and venue; the statement is complete."""
        for feed in self._feeds:
            await feed.stop()
        if self._server:
            self._server.close()
        for client in list(self._clients):
            client.close()
        await asyncio.gather(*(client.ended.wait() for client in self._clients))
        await self._venue.stop()
        self._socket.unlink(missing_ok=True)

    def _emit(self, event: Event) -> None:
        if not isinstance(event, OrderEvent):
            self._venue.on_market(event)
        if is_news(event):
            for client in self._clients:
                client.tell(event)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        client = _Client(reader, writer)
        if len(self._clients) >= _MAX_CLIENTS:
            _log.warning("refused a client: %d are connected already", _MAX_CLIENTS)
            writer.close()
            return
        self._clients.add(client)
        try:
            await client.serve(self._answer)
        finally:
            self._clients.discard(client)
            client.ended.set()

    async def _answer(self, call: Call) -> Reply:
        answer = _ANSWERS.get(call.verb)
        try:
            if answer is None:
                raise ValueError(f"no verb {call.verb!r}")
            return Reply(id=call.id, body=pack(await answer(self, call)))
        except VenueRejectedError as error:
            return Reply(
                id=call.id, failure=Failure("rejected", error.code, error.reason)
            )
        except OutcomeUnknownError as error:
            return Reply(id=call.id, failure=Failure("unknown", "", error.reason))
        except Exception as error:  # silence would cost the client its whole patience
            reason = str(error) or type(error).__name__
            return Reply(id=call.id, failure=Failure("failed", "", reason))

    # Verbs -----------------------------------------------------------------------------------------

    async def _submit(self, call: Call) -> str:
        return await self._venue.submit_sent(_body(call, Order), call.sent_ns)

    async def _cancel(self, call: Call) -> None:
        await self._venue.cancel(_body(call, Order))

    async def _find_order(self, call: Call) -> Any:
        symbol, client_order_id = _body(call, tuple[str, str])
        return await self._venue.find_order(symbol, client_order_id)

    async def _open_orders(self, call: Call) -> Any:
        (offset,) = _body(call, tuple[int])
        return (await self._venue.open_orders())[offset : offset + PAGE]

    async def _fills(self, call: Call) -> Any:
        since_ns, offset = _body(call, tuple[int, int])
        return (await self._venue.fills(since_ns))[offset : offset + PAGE]

    async def _order_events(self, call: Call) -> Any:
        since_ns, offset = _body(call, tuple[int, int])
        return self._venue.order_events(since_ns)[offset : offset + PAGE]

    async def _balances(self, _: Call) -> Any:
        return await self._venue.balances()

    async def _venue_time(self, _: Call) -> int:
        return await self._venue.venue_time_ns()

    async def _stats(self, _: Call) -> Any:
        return {
            **self._venue.stats(),
            "clients": len(self._clients),
            "pid": os.getpid(),
        }

    async def _shutdown(self, _: Call) -> None:
        asyncio.get_running_loop().call_later(
            0.02, self.end
        )  # after the reply has left


_ANSWERS: dict[str, Answer] = {
    "submit": PaperServer._submit,
    "cancel": PaperServer._cancel,
    "find_order": PaperServer._find_order,
    "open_orders": PaperServer._open_orders,
    "fills": PaperServer._fills,
    "order_events": PaperServer._order_events,
    "balances": PaperServer._balances,
    "venue_time": PaperServer._venue_time,
    "stats": PaperServer._stats,
    "shutdown": PaperServer._shutdown,
}


class _Client:
    """One desk on the line: a reader of its calls, and a writer with two queues."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.ended = asyncio.Event()
        self._reader = reader
        self._writer = writer
        self._urgent: deque[Reply | OrderEvent] = deque()
        self._quotes: dict[str, QuoteChanged] = {}
        self._market: deque[Event] = deque()
        self._lost = 0
        self._news = asyncio.Event()
        self._calls: set[asyncio.Task[None]] = set()

    def tell(self, event: Event) -> None:
        """Queue one event; replace or drop market data that this client is too slow for."""
        if isinstance(event, OrderEvent):
            self._say(event)
        elif isinstance(event, QuoteChanged):
            self._quotes[event.conflation_key or ""] = event
        else:
            if len(self._market) >= _MAX_MARKET:
                self._drop_market()
            self._market.append(event)
        self._news.set()

    async def serve(self, answer: Callable[[Call], Awaitable[Reply]]) -> None:
        """Read calls until the client hangs up; each is answered by a task of its own."""
        writing = asyncio.create_task(self._write())
        try:
            while True:
                message = decode(await read_frame(self._reader))
                if not isinstance(message, Call):
                    raise ValueError("only calls are expected from a client")
                if len(self._calls) >= _MAX_CALLS:
                    self._say(
                        Reply(
                            id=message.id,
                            failure=Failure(
                                "rejected", "TOO_MANY_REQUESTS", "slow down"
                            ),
                        )
                    )
                    continue
                task = asyncio.create_task(self._reply(answer, message))
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)
        except (EOFError, OSError):
            pass
        except (ValueError, msgspec.MsgspecError) as error:
            _log.warning("a client spoke nonsense and was disconnected: %s", error)
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            self.close()

    def close(self) -> None:
        self._writer.close()

    async def _reply(
        self, answer: Callable[[Call], Awaitable[Reply]], call: Call
    ) -> None:
        self._say(await answer(call))

    def _say(self, message: Reply | OrderEvent) -> None:
        self._urgent.append(message)
        self._news.set()
        if len(self._urgent) > _MAX_URGENT:
            _log.warning("a client takes nothing any more and was disconnected")
            self._writer.transport.abort()
            self._urgent.clear()

    def _drop_market(self) -> None:
        """Drop the older half. Changes of books go too: their sequence shows the receiver the gap."""
        for _ in range(_MAX_MARKET // 2):
            self._market.popleft()
        self._lost += _MAX_MARKET // 2

    async def _write(self) -> None:
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                self._writer.write(self._frames())
                await self._writer.drain()
        except OSError:
            self._writer.close()

    def _frames(self) -> bytes:
        """Return everything that waits, order events and replies in their order before market data."""
        frames = []
        events: list[Event] = []
        while self._urgent:
            message = self._urgent.popleft()
            if isinstance(message, Reply):
                frames += [self._push(events), encode(message)]
                events = []
            else:
                events.append(message)
        # A trade tells why a quote changed: quotes come last.
        events += [*self._market, *self._quotes.values()]
        self._market.clear()
        self._quotes.clear()
        frames.append(self._push(events))
        return b"".join(frames)

    def _push(self, events: list[Event]) -> bytes:
        if not events:
            return b""
        frame = encode(Push(events=cast(list[AnyEvent], events), lost=self._lost))
        if len(frame) > MAX_FRAME and len(events) > 1:  # whole books, and many
            half = len(events) // 2
            return self._push(events[:half]) + self._push(events[half:])
        self._lost = 0
        return frame


def _body(call: Call, kind: Any) -> Any:
    return msgspec.msgpack.decode(call.body, type=kind)
