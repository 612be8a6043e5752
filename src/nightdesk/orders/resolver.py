"""What became of an order: asks the venue until there is proof (R-5).

Comes from: orders/protocol.py, orders/reconciler.py
Goes to: venues/ (questions only), kernel/inbox.py (what the answers prove, as events)

A positive from any source wins. A negative needs all of them, twice. A question that failed proves nothing.
Answers come back as the same events that a venue's stream would have brought, so there is one way in.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from nightdesk.abc import Clock, Emit, Venue
from nightdesk.errors import NightdeskError, QueryFailedError
from nightdesk.model.events import (
    OrderAccepted,
    OrderCanceled,
    OrderEvent,
    OrderExpired,
    OrderFilled,
    OrderRejected,
)
from nightdesk.model.order import Fill, Order, OrderStatus, VenueOrder
from nightdesk.orders.ledger import Ledger

__all__ = ["Case", "Look", "Resolver", "fill_event"]

NEVER_ARRIVED = "NEVER_ARRIVED"
_SECOND_NS = 1_000_000_000
_FIRST_DELAY_S = 0.25
_MOST_DELAY_S = 5.0
_LOOK_BACK_NS = 60 * _SECOND_NS
_MISSES = 5
_MISSING_FOR_S = 5.0
_AT_ONCE = 8
_TELL_AFTER = 10
_UNPROVEN = frozenset(
    {OrderStatus.INITIALIZED, OrderStatus.SUBMITTED, OrderStatus.UNKNOWN}
)


class Case(msgspec.Struct):
    """The evidence about one order so far.

    Attributes:
        sent_by_ns: The request had left by then, if it ever did. Later than the truth is safe.
        reopen_ns: From then on a working order proves that the cancel did not reach the venue.
        only_unknown: Close the case as soon as anything positive is known.
        absent_ns: When every source first answered that there is no such order.
        misses: How often an order that the venue once took was not found.
    """

    sent_by_ns: int
    reopen_ns: int = 0
    only_unknown: bool = False
    looks: int = 0
    failures: int = 0
    last_failure: str = ""
    absent_ns: int | None = None
    absent_words: str = ""
    misses: int = 0
    first_miss_ns: int = 0


class Look(msgspec.Struct, frozen=True):
    """What one round of questions brought.

    Attributes:
        events: What the answers prove; they still have to be emitted.
        settled: Venue and ledger agree once the events are in.
        reopen: The order works, so the cancel that was asked for did not happen.
        next_s: When it is worth to ask again; None leaves it to the growing delay.
    """

    events: list[OrderEvent] = []
    settled: bool = False
    reopen: bool = False
    next_s: float | None = None


class Resolver:
    """One watcher per order that needs proof.

    Args:
        on_reopen: Called with the id of an order whose cancel did not reach the venue.
        alert: `(level, text)`.
    """

    def __init__(
        self,
        ledger: Ledger,
        venues: Mapping[str, Venue],
        clock: Clock,
        random: random.Random,
        emit: Emit,
        *,
        on_reopen: Callable[[str], None],
        alert: Callable[[str, str], None],
    ) -> None:
        self._ledger = ledger
        self._venues = venues
        self._clock = clock
        self._random = random
        self._emit = emit
        self._on_reopen = on_reopen
        self._alert = alert
        self._cases: dict[str, Case] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._is_started = False

    def __len__(self) -> int:
        return len(self._cases)

    # --- watching -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Go on with every open case."""
        self._is_started = True
        for client_order_id in list(self._cases):
            self._spawn(client_order_id, 0.0)

    async def stop(self) -> None:
        """Stop asking. Nothing is lost: the next start asks again."""
        self._is_started = False
        watchers = list(self._watchers.values())
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        self._watchers.clear()

    def watch(
        self,
        client_order_id: str,
        *,
        after_s: float = _FIRST_DELAY_S,
        reopen_ns: int = 0,
        only_unknown: bool = False,
    ) -> None:
        """Ask about an order until venue and ledger agree; the first time `after_s` from now."""
        case = self._cases.get(client_order_id)
        if case is None:
            case = self._cases[client_order_id] = Case(
                self._clock.now_ns(), only_unknown=only_unknown
            )
        case.reopen_ns = max(case.reopen_ns, reopen_ns)
        case.only_unknown = case.only_unknown and only_unknown
        if self._is_started and client_order_id not in self._watchers:
            self._spawn(client_order_id, after_s)

    def close(self, client_order_id: str) -> None:
        """Drop a case that has no watcher yet."""
        if client_order_id not in self._watchers:
            self._cases.pop(client_order_id, None)

    def _spawn(self, client_order_id: str, after_s: float) -> None:
        work: Coroutine[Any, Any, None] = self._watch(client_order_id, after_s)
        self._watchers[client_order_id] = asyncio.get_running_loop().create_task(work)

    async def _watch(self, client_order_id: str, delay_s: float) -> None:
        case = self._cases[client_order_id]
        growing_s = _FIRST_DELAY_S
        try:
            while True:
                await self._clock.sleep(delay_s)
                order = self._ledger.order(client_order_id)
                if order is None or self._is_closed(order, case):
                    return
                async with self._turns:
                    look = await self.look(order, case)
                self.carry_out(order.client_order_id, look)
                if look.settled:
                    return
                if case.looks == _TELL_AFTER:
                    self._alert("critical", self._describe(client_order_id, case))
                delay_s = growing_s * self._random.uniform(0.9, 1.1)
                if look.next_s is not None:
                    delay_s = min(look.next_s, _MOST_DELAY_S)
                growing_s = min(growing_s * 2, _MOST_DELAY_S)
        finally:
            self._watchers.pop(client_order_id, None)
            if self._is_started:
                self._cases.pop(client_order_id, None)

    def _is_closed(self, order: Order, case: Case) -> bool:
        if not order.status.is_open:
            return True
        waits = order.status is OrderStatus.UNKNOWN or self._ledger.missing(
            order.client_order_id
        )
        return case.only_unknown and not waits

    def carry_out(self, client_order_id: str, look: Look) -> None:
        """Let the desk hear what a look proved."""
        for event in look.events:
            self._emit(event)
        if look.reopen:
            self._on_reopen(client_order_id)

    def _describe(self, client_order_id: str, case: Case) -> str:
        seconds = (self._clock.now_ns() - case.sent_by_ns) / _SECOND_NS
        failure = (
            f", {case.failures} of them failed, the last: {case.last_failure}"
            if case.failures
            else ""
        )
        return (
            f"order {client_order_id} is unresolved after {case.looks} look-ups in {seconds:.1f} s{failure}; "
            "it counts as working until the venue proves what became of it"
        )

    # --- looking --------------------------------------------------------------------------------------

    async def look(self, order: Order, case: Case) -> Look:
        """Ask once, by all the ways there are. Never raises: a failure is noted in the case and proves nothing."""
        case.looks += 1
        venue = self._venues.get(order.request.venue)
        try:
            if venue is None:
                raise QueryFailedError(
                    order.request.venue, "find_order", "no such venue is configured"
                )
            return await self._ask(venue, order, case)
        except NightdeskError as error:
            case.last_failure = str(error)
        except Exception as error:
            # An adapter that stumbles over a garbled reply must not end the watch over money (F12).
            case.last_failure = f"{type(error).__name__}: {error}"
        case.failures += 1
        return Look()

    async def _ask(self, venue: Venue, order: Order, case: Case) -> Look:
        cid, symbol = order.client_order_id, order.request.symbol
        found = await venue.find_order(symbol, cid)
        listed: list[VenueOrder] = []
        if found is None:
            listed = await venue.open_orders()
            found = next((o for o in listed if _is_same(o, order)), None)
        fills: list[Fill] = []
        if found is None or found.filled_quantity > self._ledger.booked(cid):
            recent = await venue.fills(max(order.created_ns - _LOOK_BACK_NS, 0))
            fills = [fill for fill in recent if _belongs(fill, order, found)]
        now = self._ledger.order(cid) or order  # events may have come while we asked
        if not now.status.is_open:
            return Look(settled=True)
        if found is not None:
            return self.read(now, found, fills, case)
        fresh = [fill for fill in fills if not self._ledger.has_fill(fill.key)]
        if fresh:
            return Look([fill_event(fill, cid) for fill in fresh])
        if now.status in _UNPROVEN and not now.filled_quantity:
            words = f"not found by its id, not among {len(listed)} open orders, in no fill since 60 s before the intent"
            return await self._never_arrived(venue, now, case, words)
        return self._vanished(venue, now, case)

    def read(
        self, order: Order, found: VenueOrder, fills: Iterable[Fill], case: Case
    ) -> Look:
        """Return what the venue's own word about `order`, and its fills, prove."""
        cid = order.client_order_id
        events: list[OrderEvent] = []
        booked = self._ledger.booked(cid)
        common: dict[str, Any] = {
            "venue": order.request.venue,
            "symbol": order.request.symbol,
            "client_order_id": cid,
            "venue_order_id": found.venue_order_id,
            "ts_event_ns": found.ts_event_ns,
        }
        if found.status is OrderStatus.REJECTED:
            reason = found.reason or "the venue lists it as rejected"
            return Look(
                [OrderRejected(**common, code="REJECTED", reason=reason)], settled=True
            )
        if (
            order.status in _UNPROVEN
            or order.status is OrderStatus.REJECTED
            or order.venue_order_id is None
        ):
            events.append(OrderAccepted(**common))
        for fill in fills:
            if not self._ledger.has_fill(fill.key):
                booked += fill.quantity
                events.append(fill_event(fill, cid))
        is_complete = booked >= found.filled_quantity
        end = _end_of(order, found)
        if end is not None:
            events.append(
                end(
                    **common,
                    filled_quantity=found.filled_quantity,
                    reason=found.reason or "",
                )
            )
            return Look(events, settled=is_complete)
        if (
            found.status is OrderStatus.FILLED
            or not is_complete
            or self._ledger.missing(cid)
        ):
            return Look(events, settled=booked >= order.request.quantity)
        if order.status is OrderStatus.PENDING_CANCEL:
            wait_s = (case.reopen_ns - self._clock.now_ns()) / _SECOND_NS
            if wait_s > 0:
                return Look(events, next_s=max(wait_s, _FIRST_DELAY_S))
            return Look(events, settled=True, reopen=True)
        return Look(events, settled=True)

    async def _never_arrived(
        self, venue: Venue, order: Order, case: Case, words: str
    ) -> Look:
        """Return a rejection only if every condition of R-5 holds, twice, the index lag apart."""
        lag_ns = round(venue.index_lag_s * _SECOND_NS)
        void_ns = case.sent_by_ns + round(venue.expiry_s * _SECOND_NS) + lag_ns
        try:
            venue_ns = await venue.venue_time_ns()
        except NotImplementedError:
            venue_ns = self._clock.now_ns()
        # Both clocks must be past it: a venue's clock that runs ahead proves nothing about the way there.
        wait_ns = void_ns - min(venue_ns, self._clock.now_ns())
        if wait_ns > 0:
            return Look(next_s=wait_ns / _SECOND_NS)
        seen = f"{_iso(venue_ns)} by the venue's clock: {words}"
        if case.absent_ns is None:
            case.absent_ns, case.absent_words = self._clock.now_ns(), seen
            return Look(next_s=venue.index_lag_s)
        wait_ns = case.absent_ns + lag_ns - self._clock.now_ns()
        if wait_ns > 0:
            return Look(next_s=wait_ns / _SECOND_NS)
        event = OrderRejected(
            venue=order.request.venue,
            symbol=order.request.symbol,
            client_order_id=order.client_order_id,
            code=NEVER_ARRIVED,
            reason=f"void since {_iso(void_ns)}; {case.absent_words}; again {seen}",
            ts_event_ns=self._clock.now_ns(),
        )
        return Look([event], settled=True)

    def _vanished(self, venue: Venue, order: Order, case: Case) -> Look:
        """An order that the venue once took is nowhere: ended with the fills we have, after enough misses (T-22)."""
        now = self._clock.now_ns()
        case.misses += 1
        case.first_miss_ns = case.first_miss_ns or now
        missing_s = (now - case.first_miss_ns) / _SECOND_NS
        enough = case.misses >= _MISSES and missing_s >= max(
            _MISSING_FOR_S, venue.index_lag_s
        )
        if not enough or self._ledger.missing(order.client_order_id):
            return Look()
        event = OrderCanceled(
            venue=order.request.venue,
            symbol=order.request.symbol,
            client_order_id=order.client_order_id,
            venue_order_id=order.venue_order_id,
            filled_quantity=self._ledger.booked(order.client_order_id),
            reason=f"no longer known at the venue: {case.misses} look-ups in {missing_s:.1f} s",
            ts_event_ns=now,
        )
        return Look([event], settled=True)


def fill_event(fill: Fill, client_order_id: str | None = None) -> OrderFilled:
    """Return the event that the venue's stream would have brought for `fill`."""
    cid = client_order_id or fill.client_order_id
    if fill.client_order_id != cid:
        fill = msgspec.structs.replace(fill, client_order_id=cid)
    return OrderFilled(
        venue=fill.venue,
        symbol=fill.symbol,
        client_order_id=cid,
        venue_order_id=fill.venue_order_id,
        fill=fill,
        ts_event_ns=fill.ts_event_ns,
    )


def _end_of(
    order: Order, found: VenueOrder
) -> type[OrderCanceled] | type[OrderExpired] | None:
    if found.status is OrderStatus.CANCELED:
        return OrderCanceled
    short = (
        found.status is OrderStatus.FILLED
        and found.filled_quantity < order.request.quantity
    )
    if found.status is OrderStatus.EXPIRED or short:
        return OrderExpired
    return None


def _is_same(found: VenueOrder, order: Order) -> bool:
    return found.client_order_id == order.client_order_id or (
        order.venue_order_id is not None
        and found.venue_order_id == order.venue_order_id
    )


def _belongs(fill: Fill, order: Order, found: VenueOrder | None) -> bool:
    known = {order.venue_order_id, found.venue_order_id if found else None} - {None}
    return fill.client_order_id == order.client_order_id or (
        fill.symbol == order.request.symbol and fill.venue_order_id in known
    )


def _iso(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat(timespec="milliseconds")
