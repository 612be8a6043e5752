"""The paper venue: a real exchange in all but the money, between the desk and a matching engine.

It adds to the engine what a network and a server add: time, lost messages, look-ups that lag, and a
statement on disk that is the venue's own truth and outlives the desk.

Comes from: orders/, market/matching.py
Goes to: kernel/inbox.py
"""

import asyncio
import contextvars
import logging
import random
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from decimal import Decimal
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from nightdesk.abc import Clock, Emit, Venue
from nightdesk.errors import (
    OutcomeUnknownError,
    QueryFailedError,
    StateDamagedError,
    StateNotWritableError,
    VenueRejectedError,
)
from nightdesk.model.events import (
    BookChanged,
    Event,
    OrderCanceled,
    OrderEvent,
    OrderExpired,
    OrderFilled,
    QuoteChanged,
    TradePrinted,
)
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Fill, Order, OrderStatus, VenueOrder
from nightdesk.model.statement import (
    CancelRefused,
    Ended,
    Placed,
    Refused,
    StatementRow,
    Traded,
)
from nightdesk.venues._faults import FaultInjector, Faults
from nightdesk.venues._statement import (
    OrderSummary,
    StatementFile,
    read_rows,
    read_statement,
    summarise,
)

__all__ = [
    "Faults",
    "Matching",
    "OrderSummary",
    "PaperVenue",
    "read_rows",
    "read_statement",
    "summarise",
]

T = TypeVar("T")
_log = logging.getLogger(__name__)
_REMEMBERED_EVENTS = 100_000


class Matching(Protocol):
    """What the paper venue needs of a matching engine; every input returns the rows it caused."""

    def deposit(
        self, ts_ns: int, balances: Mapping[str, Decimal]
    ) -> list[StatementRow]: ...
    def submit(self, ts_ns: int, order: Order) -> list[StatementRow]: ...
    def cancel(self, ts_ns: int, client_order_id: str) -> list[StatementRow]: ...
    def on_quote(self, ts_ns: int, quote: QuoteChanged) -> list[StatementRow]: ...
    def on_trade(self, ts_ns: int, trade: TradePrinted) -> list[StatementRow]: ...
    def on_book(self, ts_ns: int, change: BookChanged) -> list[StatementRow]: ...
    def advance(self, ts_ns: int) -> list[StatementRow]: ...
    def restore(self, rows: Iterable[StatementRow]) -> None: ...
    def find(self, client_order_id: str) -> VenueOrder | None: ...
    def placed_ns(self, venue_order_id: str) -> int: ...
    def open_orders(self) -> list[VenueOrder]: ...
    def fills(self, since_ns: int) -> list[Fill]: ...
    def balances(self) -> dict[str, Decimal]: ...
    def stats(self) -> dict[str, Any]: ...
    @property
    def next_deadline_ns(self) -> int | None: ...


class PaperVenue(Venue):
    """Trades paper money against whatever market events it is given.

    The desk (or the venue's own process) hands it the market by `on_market`; it subscribes to
    nothing itself. A request that was sent goes on even if its caller is cancelled: its bytes have
    left.

    Args:
        name: As in `desk.yaml`.
        instruments: What it lists; mappings are read as `Instrument` fields.
        matching: A fresh engine for these instruments.
        balances: Deposited once, when the statement is empty.
        directory: Where `statement.jsonl` lies; None keeps nothing.
        seed: Of latency and faults; None takes the desk's.
        latency_ms: Least and most time that one way takes.
        faults: See `Faults`.
        expiry_s: A request that arrives later than this after it was sent is void (R-3).
        process, feeds, idle_exit_s: Where the venue runs, the sources that feed it there, and how
            long that process waits for a desk. Read by `exchange/`, which builds an `own` process;
            they stand here so that one signature says all that `desk.yaml` may say.
    """

    def __init__(
        self,
        name: str,
        *,
        instruments: Sequence[Instrument | Mapping[str, Any]],
        matching: Matching,
        balances: Mapping[str, Decimal] | None = None,
        directory: Path | None = None,
        seed: int | None = None,
        latency_ms: tuple[float, float] = (0.0, 0.0),
        faults: Faults | Mapping[str, Any] | None = None,
        expiry_s: float = 5.0,
        process: Literal["desk", "own"] = "desk",
        feeds: Sequence[Mapping[str, Any]] = (),
        idle_exit_s: float = 1800.0,
    ) -> None:
        if process != "desk" or feeds:
            raise ValueError(
                f"venue {name!r}: a paper venue in a process of its own (`process: own`, `feeds`) "
                "is built by nightdesk.exchange.build_paper_venue"
            )
        self.name = name
        self.expiry_s = expiry_s
        self._instruments = {i.symbol: i for i in map(self._instrument, instruments)}
        self._matching = matching
        self._initial = dict(balances or {})
        self._statement = (
            StatementFile(directory / "statement.jsonl") if directory else None
        )
        self._seed = seed
        self._latency_ms = latency_ms
        self._faults = (
            faults
            if isinstance(faults, Faults)
            else msgspec.convert(dict(faults or {}), Faults)
        )
        self.index_lag_s = max(self._faults.index_lag_s, 0.0)
        self._broken: str | None = None
        self._is_started = False
        self._outbox: list[tuple[int, int, OrderEvent]] = []
        self._outbox_number = 0
        self._last_due_ns = 0
        self._delivery: asyncio.Task[None] | None = None
        self._alarm: tuple[int, asyncio.Task[None]] | None = None
        self._requests: set[asyncio.Task[Any]] = set()
        self._recent: deque[OrderEvent] = deque(maxlen=_REMEMBERED_EVENTS)

    # Life ------------------------------------------------------------------------------------------

    async def start(self, emit: Emit, clock: Clock, random: random.Random) -> None:
        """Read the statement, rebuild, and open for business.

        Raises:
            StateLockedError: Another venue writes this statement.
            StateDamagedError: The statement cannot be trusted.
        """
        self._emit, self._clock = emit, clock
        dice = random if self._seed is None else type(random)(self._seed)
        self._trouble = FaultInjector(
            self._faults, self._latency_ms, dice, clock.now_ns()
        )
        # Requests may come from a background lane; what the venue does runs where the venue was started.
        self._context = contextvars.copy_context()
        self._loop = asyncio.get_running_loop()
        rows = self._statement.open() if self._statement else []
        self._restore(rows)
        self._is_started = True
        if not rows:
            self._publish(self._matching.deposit(clock.now_ns(), self._initial))
        self._publish(self._matching.advance(clock.now_ns()))

    async def stop(self) -> None:
        """Close the statement. Events not yet reported are in it, for the next start to find."""
        self._is_started = False
        tasks = [*self._requests, *([self._delivery] if self._delivery else [])]
        if self._alarm:
            tasks.append(self._alarm[1])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._delivery = self._alarm = None
        self._outbox.clear()
        if self._statement:
            self._statement.close()

    def instruments(self) -> Mapping[str, Instrument]:
        return self._instruments

    # The market ------------------------------------------------------------------------------------

    def on_market(self, event: Event) -> None:
        """Let one market event of this venue reach the engine; others are ignored."""
        if (
            not self._is_started
            or self._broken
            or getattr(event, "venue", None) != self.name
        ):
            return
        now = self._clock.now_ns()
        if isinstance(event, QuoteChanged):
            rows = self._matching.on_quote(now, event)
        elif isinstance(event, TradePrinted):
            rows = self._matching.on_trade(now, event)
        elif isinstance(event, BookChanged):
            rows = self._matching.on_book(now, event)
        else:
            return
        if rows:
            self._publish(rows)

    # Requests --------------------------------------------------------------------------------------

    async def submit(self, order: Order) -> str:
        return await self.submit_sent(order, self._clock.now_ns())

    async def submit_sent(self, order: Order, sent_ns: int) -> str:
        """Like `submit`, for a request whose bytes left at `sent_ns`."""

        def execute() -> list[StatementRow]:
            late_s = (self._clock.now_ns() - sent_ns) / 1e9
            if late_s > self.expiry_s:
                raise VenueRejectedError(
                    self.name,
                    "REQUEST_EXPIRED",
                    f"arrived {late_s:.3f} s after it was sent",
                )
            return self._matching.submit(self._clock.now_ns(), order)

        rows = await self._request(execute)
        for row in rows:
            if isinstance(row, Placed) and row.client_order_id == order.client_order_id:
                return row.venue_order_id
            if (
                isinstance(row, Refused)
                and row.client_order_id == order.client_order_id
            ):
                raise VenueRejectedError(self.name, row.code, row.reason)
        raise OutcomeUnknownError(self.name, "the engine did not answer the request")

    async def cancel(self, order: Order) -> None:
        rows = await self._request(
            lambda: self._matching.cancel(self._clock.now_ns(), order.client_order_id)
        )
        for row in rows:
            if isinstance(row, CancelRefused):
                raise VenueRejectedError(self.name, row.code, row.reason)

    # Questions -------------------------------------------------------------------------------------

    async def find_order(self, symbol: str, client_order_id: str) -> VenueOrder | None:
        found = await self._question(
            "find_order", lambda: self._matching.find(client_order_id)
        )
        if (
            found is None
            or found.symbol != symbol
            or not self._is_indexed(found.venue_order_id)
        ):
            return None
        if self._faults.lookup == "open_only" and found.status.is_terminal:
            return None
        return found

    async def open_orders(self) -> list[VenueOrder]:
        found = await self._question("open_orders", self._matching.open_orders)
        return [order for order in found if self._is_indexed(order.venue_order_id)]

    async def fills(self, since_ns: int) -> list[Fill]:
        found = await self._question("fills", lambda: self._matching.fills(since_ns))
        newest_ns = self._clock.now_ns() - round(self._faults.index_lag_s * 1e9)
        return [fill for fill in found if fill.ts_event_ns <= newest_ns]

    async def balances(self) -> dict[str, Decimal]:
        return await self._question("balances", self._matching.balances)

    async def venue_time_ns(self) -> int:
        skew_ns = self._faults.clock_skew_ms * 1_000_000
        return await self._question(
            "venue_time", lambda: self._clock.now_ns() + skew_ns
        )

    def order_events(self, since_ns: int) -> list[OrderEvent]:
        """Return fills and ends since `since_ns`, as they were or would have been reported, oldest first."""
        return [event for event in self._recent if event.ts_event_ns >= since_ns]

    def stats(self) -> dict[str, Any]:
        faults = dict(self._trouble.counts) if self._is_started else {}
        return {**self._matching.stats(), "faults": faults, "broken": self._broken}

    # The way there and back --------------------------------------------------------------------------

    async def _request(
        self, execute: Callable[[], list[StatementRow]]
    ) -> list[StatementRow]:
        if self._trouble.is_quiet:
            return self._execute(execute)
        return await asyncio.shield(self._spawn(self._travel(execute)))

    async def _travel(
        self, execute: Callable[[], list[StatementRow]]
    ) -> list[StatementRow]:
        trouble = self._trouble
        await self._pause(trouble.delay_ns())
        if trouble.is_out(self._clock.now_ns()) or trouble.hits("lost_requests"):
            await self._time_out()
        if trouble.hits("errors"):
            raise VenueRejectedError(
                self.name, "SERVICE_BUSY", "the venue refused to take the request"
            )
        rows = self._execute(execute)
        await self._pause(trouble.delay_ns())
        if trouble.is_out(self._clock.now_ns()) or trouble.hits("lost_replies"):
            await self._time_out()
        return rows

    async def _time_out(self) -> None:
        await self._pause(round(self._faults.timeout_s * 1e9))
        raise OutcomeUnknownError(
            self.name, f"no reply within {self._faults.timeout_s} s"
        )

    def _execute(self, execute: Callable[[], list[StatementRow]]) -> list[StatementRow]:
        if self._broken:
            raise OutcomeUnknownError(self.name, self._broken)
        rows = execute()
        self._publish(rows)
        if self._broken:
            raise OutcomeUnknownError(self.name, self._broken)
        return rows

    async def _question(self, question: str, answer: Callable[[], T]) -> T:
        trouble = self._trouble
        await self._pause(trouble.delay_ns())
        lost = trouble.hits("lost_requests") or trouble.hits("lost_replies")
        if (
            self._broken
            or lost
            or trouble.is_out(self._clock.now_ns())
            or trouble.hits("errors")
        ):
            raise QueryFailedError(
                self.name, question, self._broken or "no usable reply"
            )
        found = answer()
        await self._pause(trouble.delay_ns())
        return found

    async def _pause(self, delay_ns: int) -> None:
        if delay_ns > 0:
            await self._clock.sleep(delay_ns / 1e9)

    def _is_indexed(self, venue_order_id: str) -> bool:
        age_ns = self._clock.now_ns() - self._matching.placed_ns(venue_order_id)
        return age_ns >= self._faults.index_lag_s * 1e9

    # Rows become truth, then news --------------------------------------------------------------------

    def _restore(self, rows: list[StatementRow]) -> None:
        try:
            self._matching.restore(rows)
        except ValueError as error:
            assert self._statement is not None
            self._statement.close()
            raise StateDamagedError(
                str(self._statement.path),
                f"does not fit this venue: {error}",
                f"List its instruments under venue {self.name!r} again, or move the file away to start anew.",
            ) from error
        self._recent.extend(event for row in rows if (event := self._event(row)))

    def _publish(self, rows: list[StatementRow]) -> None:
        """Write first, report after: what nobody can find again must not be reported."""
        if rows and self._statement:
            try:
                self._statement.append(rows)
            except StateNotWritableError as error:
                self._broken = str(error)
                _log.error("paper venue %s stops: %s", self.name, error)
                return
        for row in rows:
            event = self._event(row)
            if event:
                self._recent.append(event)
                self._report(event)
        self._set_alarm()

    def _event(self, row: StatementRow) -> OrderEvent | None:
        if isinstance(row, Traded):
            return OrderFilled(
                venue=self.name,
                symbol=row.fill.symbol,
                client_order_id=row.fill.client_order_id,
                venue_order_id=row.fill.venue_order_id,
                fill=row.fill,
                ts_event_ns=row.ts_ns,
            )
        if isinstance(row, Ended):
            kind = OrderExpired if row.status is OrderStatus.EXPIRED else OrderCanceled
            return kind(
                venue=self.name,
                symbol=row.symbol,
                client_order_id=row.client_order_id,
                venue_order_id=row.venue_order_id,
                filled_quantity=row.filled_quantity,
                reason=row.reason,
                ts_event_ns=row.ts_ns,
            )
        return None

    def _report(self, event: OrderEvent) -> None:
        now = self._clock.now_ns()
        due = max(now + self._trouble.delay_ns(), self._last_due_ns)
        if self._trouble.hits("reordered_events"):
            self._post(due + round(self._latency_ms[1] * 2e6) + 5_000_000, event)
        else:
            self._last_due_ns = due
            self._post(due, event)
        if self._trouble.hits("duplicated_events"):
            self._post(due + self._trouble.delay_ns() + 1_000_000, event)

    def _post(self, due_ns: int, event: OrderEvent) -> None:
        self._outbox_number += 1
        heappush(self._outbox, (due_ns, self._outbox_number, event))
        if self._delivery is None:
            self._delivery = self._start_task(self._deliver())

    async def _deliver(self) -> None:
        """Emit what is due, in order, until nothing waits. Never from inside an input of the engine."""
        try:
            while self._outbox:
                wait_ns = self._outbox[0][0] - self._clock.now_ns()
                if wait_ns > 0:
                    await self._clock.sleep(wait_ns / 1e9)
                    continue
                event = heappop(self._outbox)[2]
                received_ns = self._clock.now_ns()
                self._emit(msgspec.structs.replace(event, ts_received_ns=received_ns))
        finally:
            self._delivery = None

    def _set_alarm(self) -> None:
        deadline = self._matching.next_deadline_ns
        if deadline is None or (self._alarm and self._alarm[0] <= deadline):
            return
        if self._alarm:
            self._alarm[1].cancel()
        self._alarm = (deadline, self._start_task(self._ring(deadline)))

    async def _ring(self, deadline_ns: int) -> None:
        while (wait_ns := deadline_ns - self._clock.now_ns()) > 0:
            await self._clock.sleep(wait_ns / 1e9)
        self._alarm = None
        self._publish(self._matching.advance(self._clock.now_ns()))

    def _spawn(self, travel: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._start_task(travel)
        self._requests.add(task)
        task.add_done_callback(self._arrived)
        return task

    def _arrived(self, task: asyncio.Task[Any]) -> None:
        self._requests.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may be gone; the request was carried out all the same

    def _start_task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        return self._loop.create_task(work, context=self._context.copy())

    def _instrument(self, instrument: Instrument | Mapping[str, Any]) -> Instrument:
        if isinstance(instrument, Instrument):
            return instrument
        return msgspec.convert(
            {"venue": self.name, **instrument}, Instrument, strict=False
        )
