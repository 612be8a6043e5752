"""A paper venue that lives in a process of its own, and so outlives a killed desk.

Whether an order left is never guessed: without a connection nothing was sent, and that is proof;
once its bytes were handed to the socket, only a reply ends the doubt.

Comes from: orders/, venues/_wire.py
Goes to: kernel/inbox.py
"""

import asyncio
import contextvars
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from nightdesk.abc import Clock, Emit, Venue
from nightdesk.errors import (
    NightdeskError,
    OutcomeUnknownError,
    QueryFailedError,
    VenueRejectedError,
)
from nightdesk.model.events import Event, FeedStalled, OrderEvent
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Fill, Order, VenueOrder
from nightdesk.venues._wire import (
    PAGE,
    AnyEvent,
    Call,
    Push,
    Reply,
    decode,
    encode,
    pack,
    read_frame,
)

__all__ = ["PaperRemoteVenue"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
_OVERLAP_NS = (
    10_000_000_000  # events may have been delayed or reordered when the line broke
)


class PaperRemoteVenue(Venue):
    """The desk's end of a paper venue in another process.

    Market data and order events come by `emit` as they happen. After a broken connection the venue
    is called again, with growing pauses, and everything about our orders since then is emitted
    anew; fills that the desk knows already are its to recognise.

    Args:
        name: As in `desk.yaml`, and the same in the other process.
        instruments: What it lists.
        socket: Where the other process listens.
        ensure: Called before each attempt to connect: starts the process if it does not run.
        timeout_s: No reply after this long is no reply.
        connect_timeout_s: How long `start` waits for the first connection before it goes on without.
        expiry_s: A request that arrives later than this after it was sent is void (R-3).
        index_lag_s: As the other process was told.
    """

    def __init__(
        self,
        name: str,
        *,
        instruments: Sequence[Instrument | Mapping[str, Any]],
        socket: Path | str,
        ensure: Callable[[], Awaitable[Any]] | None = None,
        timeout_s: float = 5.0,
        connect_timeout_s: float = 5.0,
        expiry_s: float = 5.0,
        index_lag_s: float = 0.0,
    ) -> None:
        self.name = name
        self.expiry_s = expiry_s
        self.index_lag_s = index_lag_s
        self.reconnects = 0
        self.lost_market_events = 0
        self._instruments = {
            i.symbol: i for i in (_instrument(name, each) for each in instruments)
        }
        self._socket = Path(socket)
        self._ensure = ensure
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._line: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()
        self._newest_ns = 0
        self._is_started = False

    # Life ------------------------------------------------------------------------------------------

    async def start(self, emit: Emit, clock: Clock, random: random.Random) -> None:
        """Connect, or keep trying in the background if that takes longer than `connect_timeout_s`."""
        self._emit, self._clock, self._random = emit, clock, random
        self._newest_ns = clock.now_ns()
        self._is_started = False
        context = contextvars.copy_context()
        self._line = asyncio.get_running_loop().create_task(
            self._stay_connected(), context=context
        )
        connected = asyncio.create_task(self._connected.wait())
        await asyncio.wait(
            {connected, self._line},
            timeout=self._connect_timeout_s,
            return_when="FIRST_COMPLETED",
        )
        connected.cancel()
        self._is_started = True
        if self._line.done():
            await self._line

    async def stop(self) -> None:
        """Hang up; the venue goes on without us."""
        if self._line:
            self._line.cancel()
            await asyncio.gather(self._line, return_exceptions=True)
            self._line = None
        self._hang_up("the desk stops")

    def instruments(self) -> Mapping[str, Instrument]:
        return self._instruments

    @property
    def is_connected(self) -> bool:
        return self._connected.is_set()

    # Requests --------------------------------------------------------------------------------------

    async def submit(self, order: Order) -> str:
        venue_order_id: str = await self._request("submit", order, str)
        return venue_order_id

    async def cancel(self, order: Order) -> None:
        await self._request("cancel", order, type(None))

    async def find_order(self, symbol: str, client_order_id: str) -> VenueOrder | None:
        found: VenueOrder | None = await self._ask(
            "find_order", (symbol, client_order_id), VenueOrder | None
        )
        return found

    async def open_orders(self) -> list[VenueOrder]:
        return await self._ask_all("open_orders", (), VenueOrder)

    async def fills(self, since_ns: int) -> list[Fill]:
        return await self._ask_all("fills", (since_ns,), Fill)

    async def balances(self) -> dict[str, Decimal]:
        found: dict[str, Decimal] = await self._ask(
            "balances", None, dict[str, Decimal]
        )
        return found

    async def venue_time_ns(self) -> int:
        now_ns: int = await self._ask("venue_time", None, int)
        return now_ns

    async def shut_down(self) -> None:
        """End the venue's process; its statement is kept.

        Raises:
            QueryFailedError: It did not say that it does.
        """
        await self._ask("shutdown", None, type(None))

    def stats(self) -> dict[str, Any]:
        return {
            "connected": self.is_connected,
            "reconnects": self.reconnects,
            "lost_market_events": self.lost_market_events,
            "waiting": len(self._waiting),
        }

    # Calls -----------------------------------------------------------------------------------------

    async def _request(self, verb: str, body: Any, kind: Any) -> Any:
        if self._writer is None:
            raise VenueRejectedError(
                self.name, "NOT_SENT", f"{verb}: no connection to {self._socket}"
            )
        try:
            reply = await self._call(self._writer, verb, body)
        except (TimeoutError, ConnectionError) as error:
            raise OutcomeUnknownError(
                self.name, f"{verb}: {_words(error, self._timeout_s)}"
            ) from error
        failure = reply.failure
        if failure is None:
            return self._read(
                reply,
                kind,
                lambda why: OutcomeUnknownError(self.name, f"{verb}: {why}"),
            )
        if failure.kind == "rejected":
            raise VenueRejectedError(self.name, failure.code, failure.reason)
        raise OutcomeUnknownError(self.name, failure.reason)

    async def _ask(self, question: str, body: Any, kind: Any) -> Any:
        if self._writer is None:
            raise QueryFailedError(
                self.name, question, f"no connection to {self._socket}"
            )
        try:
            reply = await self._call(self._writer, question, body)
        except (TimeoutError, ConnectionError) as error:
            raise QueryFailedError(
                self.name, question, _words(error, self._timeout_s)
            ) from error
        if reply.failure:
            raise QueryFailedError(self.name, question, reply.failure.reason)
        return self._read(
            reply, kind, lambda why: QueryFailedError(self.name, question, why)
        )

    async def _ask_all(
        self, question: str, body: tuple[Any, ...], kind: type[T]
    ) -> list[T]:
        found: list[T] = []
        while True:
            page: list[T] = await self._ask(question, (*body, len(found)), list[kind])  # type: ignore[valid-type]
            found += page
            if len(page) < PAGE:
                return found

    async def _call(self, writer: asyncio.StreamWriter, verb: str, body: Any) -> Reply:
        number = next(self._numbers)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            writer.write(
                encode(
                    Call(
                        id=number,
                        verb=verb,
                        sent_ns=self._clock.now_ns(),
                        body=pack(body),
                    )
                )
            )
            async with asyncio.timeout(self._timeout_s):
                await writer.drain()
                return await future
        finally:
            self._waiting.pop(number, None)

    @staticmethod
    def _read(reply: Reply, kind: Any, error: Callable[[str], NightdeskError]) -> Any:
        try:
            return msgspec.msgpack.decode(reply.body, type=kind)
        except msgspec.MsgspecError as found:
            raise error(f"the reply cannot be read: {found}") from found

    # The line --------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        pause_s = 0.05
        first = True
        while True:
            try:
                reader = await self._connect()
                pause_s = 0.05
                if first:
                    self._connected.set()
                    await self._listen(reader)
                else:
                    await self._listen_again(reader)
                why = "the other side hung up"
            except (OSError, EOFError, ValueError, msgspec.MsgspecError) as error:
                why = str(error) or type(error).__name__
            except NightdeskError as error:  # it could not be started
                if first and not self._is_started:
                    raise  # to `start`, which still waits
                why = str(error)
            first = first and not self._connected.is_set()
            self._hang_up(why)
            await self._clock.sleep(pause_s * (0.5 + self._random.random()))
            pause_s = min(pause_s * 2, 2.0)

    async def _connect(self) -> asyncio.StreamReader:
        if self._ensure:
            await self._ensure()
        reader, self._writer = await asyncio.open_unix_connection(str(self._socket))
        return reader

    async def _listen_again(self, reader: asyncio.StreamReader) -> None:
        """Listen, and ask meanwhile what became of our orders since the last word."""
        self.reconnects += 1
        resync = asyncio.create_task(self._resync())
        try:
            await self._listen(reader)
        finally:
            resync.cancel()
            await asyncio.gather(resync, return_exceptions=True)

    async def _resync(self) -> None:
        try:
            missed: list[OrderEvent] = await self._ask_all(
                "order_events",
                (self._newest_ns - _OVERLAP_NS,),
                AnyEvent,  # type: ignore[arg-type]
            )
        except QueryFailedError as error:
            _log.warning("%s: not resynchronised: %s", self.name, error)
            self._hang_up(str(error))  # and the next connection tries again
            return
        for event in missed:
            self._pass_on(event)
        self._connected.set()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while True:
            message = decode(await read_frame(reader))
            if isinstance(message, Reply):
                future = self._waiting.get(message.id)
                if future and not future.done():
                    future.set_result(message)
            elif isinstance(message, Push):
                self.lost_market_events += message.lost
                for event in message.events:
                    self._pass_on(event)

    def _pass_on(self, event: Event) -> None:
        if isinstance(event, OrderEvent):
            self._newest_ns = max(self._newest_ns, event.ts_event_ns)
        self._emit(event)

    def _hang_up(self, why: str) -> None:
        writer, self._writer = self._writer, None
        if writer:
            writer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError(why))
        was_connected = self._connected.is_set()
        self._connected.clear()
        if was_connected and self._line:
            _log.warning("%s: connection lost: %s", self.name, why)
            now = self._clock.now_ns()
            self._emit(FeedStalled(source=self.name, silent_s=0.0, ts_received_ns=now))


def _instrument(venue: str, instrument: Instrument | Mapping[str, Any]) -> Instrument:
    if isinstance(instrument, Instrument):
        return instrument
    return msgspec.convert({"venue": venue, **instrument}, Instrument, strict=False)


def _words(error: Exception, timeout_s: float) -> str:
    return (
        f"no reply within {timeout_s} s"
        if isinstance(error, TimeoutError)
        else f"connection lost: {error}"
    )
