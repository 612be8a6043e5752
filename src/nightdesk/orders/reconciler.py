"""Compares the ledger with the venues: wholly at every start (R-9), and again and again while running (R-10).

Comes from: orders/protocol.py
Goes to: venues/ (questions only), kernel/inbox.py (what was missed, as events), risk/gate.py (halts)
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import msgspec

from nightdesk.abc import Clock, Emit, Venue
from nightdesk.errors import NightdeskError
from nightdesk.model.events import OrderEvent
from nightdesk.model.order import Fill, Order, OrderStatus, VenueOrder
from nightdesk.model.recovery import RecoveryReport, RecoveryStep
from nightdesk.orders.balances import BalanceCheck, Mismatch
from nightdesk.orders.ledger import Ledger
from nightdesk.orders.resolver import Case, Look, Resolver, fill_event

__all__ = ["Halts", "Reconciler", "SweepReport"]

_SECOND_NS = 1_000_000_000
_HOUR_NS = 3_600 * _SECOND_NS
_OVERLAP_NS = 60 * _SECOND_NS
_SETTLED_NS = 5 * _SECOND_NS
_AT_ONCE = 16
_BUDGET_S = 1.0
_TRIES = 3
_SETTLE_S = 0.2
_MOST_ORPHAN_LOOKS = 10


class Halts(Protocol):
    """How a difference stops trading, and how orders of others count against the limits."""

    async def halt(self, reason: str, actor: str) -> None: ...
    async def halt_symbol(
        self, symbol: str, venue: str, reason: str, actor: str = ...
    ) -> None: ...
    def set_external(self, venue: str, orders: list[VenueOrder]) -> None: ...


class SweepReport(msgspec.Struct, kw_only=True):
    """What one sweep found. `questioned` orders are being looked up; `differences` have halted their instruments."""

    open_orders: int = 0
    booked_fills: int = 0
    questioned: list[str] = []
    adopted: list[str] = []
    external: list[str] = []
    differences: list[str] = []
    failures: list[str] = []


class Reconciler:
    """Asks, compares, and lets the desk hear by events what it missed.

    Args:
        adopt: Takes an order of ours that the ledger does not know into it.
        cursors: Venue to the time of its newest booked fill; kept by the protocol.
    """

    def __init__(
        self,
        ledger: Ledger,
        venues: Mapping[str, Venue],
        clock: Clock,
        emit: Emit,
        *,
        resolver: Resolver,
        balances: BalanceCheck,
        gate: Halts,
        adopt: Callable[[VenueOrder], Awaitable[Order]],
        cursors: Mapping[str, int],
    ) -> None:
        self._ledger = ledger
        self._venues = venues
        self._clock = clock
        self._emit = emit
        self._resolver = resolver
        self._balances = balances
        self._gate = gate
        self._adopt = adopt
        self._cursors = cursors
        self._since_ns: dict[str, int] = {}
        self._unbooked: dict[str, list[Fill]] = {}
        self._suspects: set[str] = set()
        self._suspicions: set[str] = set()
        self._contradictions: set[str] = set()
        self._orphans: dict[tuple[str, str, str], int] = {}

    def note_orphan(self, fill: Fill) -> None:
        """Remember a fill whose order is ours by its id and unknown; the order is looked up with the next sweep."""
        self._orphans.setdefault((fill.venue, fill.symbol, fill.client_order_id), 0)

    # --- the start ------------------------------------------------------------------------------------

    async def recover(self, report: RecoveryReport) -> None:
        """Go through R-9 from the clocks on; the ledger is loaded.

        A venue that does not answer is noted and keeps its orders as they are: silence proves nothing.
        """
        dry = report.dry_run
        with self._step(report, "venue clocks") as step:
            for venue in self._venues.values():
                await self._attempt(step, venue, self._measure_clock(venue, step))
        listings: dict[str, list[VenueOrder]] = {}
        with self._step(report, "open intents") as step:
            for venue in self._venues.values():
                await self._attempt(step, venue, self._list(venue, listings))
            await self._resolve_all(listings, step, report)
        with self._step(report, "open orders at the venues") as step:
            for name, listed in listings.items():
                step.count += len(listed)
                await self._sort_out(name, listed, report.adopted, report.external, dry)
        with self._step(report, "missed fills") as step:
            for venue in self._venues.values():
                await self._attempt(
                    step,
                    venue,
                    self._book_missed(venue, self._start_of(venue), step, dry),
                )
            report.booked_fills = step.count
            if not dry:
                await self._look_for_orphans(report.adopted)
        with self._step(report, "balances") as step:
            mismatches: list[Mismatch] = []
            for venue in self._venues.values():
                await self._attempt(
                    step, venue, self._compare_at_start(venue, step, mismatches, dry)
                )
            report.differences += map(str, mismatches)
        report.unresolved = [
            o.client_order_id
            for o in self._ledger.open_orders()
            if o.status is OrderStatus.UNKNOWN
        ]
        if report.differences and not dry:
            # The halt is durable before the difference becomes the new baseline: it is told exactly once, for sure.
            await self._gate.halt(
                "reconciliation at start: " + "; ".join(report.differences), "recovery"
            )
            await self._balances.accept(mismatches)

    @contextmanager
    def _step(self, report: RecoveryReport, name: str) -> Iterator[RecoveryStep]:
        step = RecoveryStep(name=name)
        report.steps.append(step)
        started_ns = self._clock.monotonic_ns()
        yield step
        step.duration_ms = (self._clock.monotonic_ns() - started_ns) / 1e6

    async def _attempt(
        self, step: RecoveryStep, venue: Venue, work: Awaitable[object]
    ) -> None:
        try:
            await work
        except NightdeskError as error:
            step.notes.append(str(error))
        except (
            Exception
        ) as error:  # an adapter that stumbles must not keep the desk from starting
            step.notes.append(f"{venue.name}: {type(error).__name__}: {error}")

    async def _measure_clock(self, venue: Venue, step: RecoveryStep) -> None:
        before_ns = self._clock.now_ns()
        try:
            venue_ns = await venue.venue_time_ns()
        except NotImplementedError:
            return
        step.count += 1
        offset_ms = (venue_ns - (before_ns + self._clock.now_ns()) // 2) / 1e6
        if abs(offset_ms) >= 500:
            step.notes.append(
                f"the clock of {venue.name} is {offset_ms:+.0f} ms from ours"
            )

    async def _list(self, venue: Venue, listings: dict[str, list[VenueOrder]]) -> None:
        listings[venue.name] = await venue.open_orders()

    async def _resolve_all(
        self,
        listings: dict[str, list[VenueOrder]],
        step: RecoveryStep,
        report: RecoveryReport,
    ) -> None:
        listed = {
            (name, o.client_order_id): o
            for name, orders in listings.items()
            for o in orders
        }
        orders = self._ledger.open_orders()
        step.count = len(orders)
        turns = asyncio.Semaphore(_AT_ONCE)
        deadline_ns = self._clock.monotonic_ns() + round(_BUDGET_S * _SECOND_NS)

        async def resolve(order: Order) -> None:
            async with turns:
                await self._resolve(order, deadline_ns, step, report.dry_run)

        waiting = []
        for order in orders:
            found = listed.get((order.request.venue, order.client_order_id))
            if found is not None and found.filled_quantity <= order.filled_quantity:
                # One listing answers for all of these: no question per order, which rate limits would not like.
                look = self._resolver.read(order, found, (), Case(self._clock.now_ns()))
                self._carry_out(order, look, step, report.dry_run)
            else:
                waiting.append(asyncio.ensure_future(resolve(order)))
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=_BUDGET_S)
            for task in (
                late
            ):  # the resolver goes on with it; tasks see it as unknown meanwhile
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _resolve(
        self, order: Order, deadline_ns: int, step: RecoveryStep, dry: bool
    ) -> None:
        """Ask until it is settled or the time is up; what is not settled stays with the resolver."""
        case = Case(self._clock.now_ns())
        if not dry:
            self._resolver.watch(order.client_order_id)
        while True:
            look = await self._resolver.look(order, case)
            self._carry_out(order, look, step, dry)
            if look.settled:
                if not dry:
                    self._resolver.close(order.client_order_id)
                return
            left_s = (deadline_ns - self._clock.monotonic_ns()) / _SECOND_NS
            if dry or look.next_s is None or look.next_s > left_s:
                return
            await self._clock.sleep(look.next_s)
            order = self._ledger.order(order.client_order_id) or order

    def _carry_out(
        self, order: Order, look: Look, step: RecoveryStep, dry: bool
    ) -> None:
        if dry:
            step.notes += [_describe(event) for event in look.events]
        else:
            self._resolver.carry_out(order.client_order_id, look)

    def _start_of(self, venue: Venue) -> int:
        """Since when fills must be read again: an hour before the newest one booked (R-9)."""
        cursor = self._cursors.get(venue.name)
        return self._clock.now_ns() if cursor is None else max(cursor - _HOUR_NS, 0)

    async def _book_missed(
        self, venue: Venue, since_ns: int, step: RecoveryStep | None, dry: bool
    ) -> int:
        asked_ns = self._clock.now_ns()
        missed = [
            fill
            for fill in await venue.fills(since_ns)
            if not self._ledger.has_fill(fill.key)
        ]
        for fill in missed:
            known = self._ledger.client_id_of(venue.name, fill.venue_order_id)
            event = fill_event(fill, known)
            if not dry:
                self._emit(event)
            elif step is not None:
                step.notes.append(_describe(event))
        if step is not None:
            step.count += len(missed)
        self._unbooked[venue.name] = missed if dry else []
        self._since_ns[venue.name] = asked_ns
        return len(missed)

    async def _compare_at_start(
        self, venue: Venue, step: RecoveryStep, mismatches: list[Mismatch], dry: bool
    ) -> None:
        """A fill between the two questions looks like a difference: ask again before believing it."""
        for attempt in range(_TRIES):
            found = await self._balances.compare(
                venue, dry_run=dry, unbooked=self._unbooked.get(venue.name, ())
            )
            step.count += 1
            if not found:
                return
            if attempt < _TRIES - 1:
                await self._clock.sleep(max(_SETTLE_S, venue.index_lag_s))
                await self._book_missed(venue, self._start_of(venue), None, dry)
        mismatches += found

    # --- what stands at the venues ------------------------------------------------------------------------

    async def _sort_out(
        self,
        venue: str,
        listed: list[VenueOrder],
        adopted: list[str],
        external: list[str],
        dry: bool,
    ) -> None:
        """Adopt what is ours and unknown; count what is of others, and never touch it (T-23)."""
        others = []
        for found in listed:
            if not self._ledger.is_ours(found.client_order_id):
                others.append(found)
            elif self._ledger.order(found.client_order_id) is None:
                adopted.append(found.client_order_id)
                if not dry:
                    await self._adopt(found)
        external += [f"{venue}:{found.venue_order_id}" for found in others]
        if not dry:
            self._gate.set_external(venue, others)

    async def _look_for_orphans(self, adopted: list[str]) -> None:
        for (name, symbol, cid), looks in list(self._orphans.items()):
            venue = self._venues.get(name)
            if (
                venue is None
                or looks >= _MOST_ORPHAN_LOOKS
                or self._ledger.order(cid) is not None
            ):
                del self._orphans[(name, symbol, cid)]
                continue
            self._orphans[(name, symbol, cid)] = looks + 1
            try:
                found = await venue.find_order(symbol, cid)
            except NightdeskError:
                continue
            if found is not None:
                await self._adopt(found)
                adopted.append(cid)
                del self._orphans[(name, symbol, cid)]

    # --- while running (R-10) ---------------------------------------------------------------------------

    async def sweep(self) -> SweepReport:
        """Compare once. A mismatch is acted upon when the sweep before saw it too, and nothing moved for 5 s."""
        report = SweepReport()
        suspects: set[str] = set()
        suspicions: set[str] = set()
        for venue in list(self._venues.values()):
            try:
                await self._sweep_orders(venue, report, suspects)
                await self._sweep_balances(venue, report, suspicions)
            except NightdeskError as error:
                report.failures.append(str(error))
            except Exception as error:  # see `_attempt`
                report.failures.append(f"{venue.name}: {type(error).__name__}: {error}")
        await self._look_for_orphans(report.adopted)
        self._suspects, self._suspicions = suspects, suspicions
        return report

    async def _sweep_orders(
        self, venue: Venue, report: SweepReport, suspects: set[str]
    ) -> None:
        listed = await venue.open_orders()
        report.open_orders += len(listed)
        since_ns = (
            self._since_ns.get(venue.name, self._start_of(venue))
            - _OVERLAP_NS
            - round(venue.index_lag_s * _SECOND_NS)
        )
        report.booked_fills += await self._book_missed(venue, since_ns, None, False)
        by_id = {found.client_order_id: found for found in listed}
        for order in self._ledger.open_orders():
            if order.request.venue == venue.name and self._disagree(
                order, by_id.get(order.client_order_id)
            ):
                self._question(order.client_order_id, order, report, suspects)
        for cid in by_id:
            known = self._ledger.order(cid)
            if known is not None and not known.status.is_open:
                await self._question_end(by_id[cid], known, report, suspects)
        await self._sort_out(venue.name, listed, report.adopted, report.external, False)

    def _disagree(self, order: Order, found: VenueOrder | None) -> bool:
        if order.status in (OrderStatus.INITIALIZED, OrderStatus.SUBMITTED):
            return False  # its reply is awaited
        return (
            found is None
            or found.filled_quantity != order.filled_quantity
            or order.status is OrderStatus.PENDING_CANCEL
        )

    def _question(
        self, cid: str, order: Order, report: SweepReport, suspects: set[str]
    ) -> None:
        suspects.add(cid)
        if (
            cid in self._suspects
            and self._clock.now_ns() - order.updated_ns > _SETTLED_NS
        ):
            report.questioned.append(cid)
            self._resolver.watch(cid, after_s=0.0)

    async def _question_end(
        self, found: VenueOrder, order: Order, report: SweepReport, suspects: set[str]
    ) -> None:
        """An order that ended here works at the venue: believe the venue, and stop its instrument."""
        cid = order.client_order_id
        suspects.add(cid)
        if (
            cid not in self._suspects
            or self._clock.now_ns() - order.updated_ns <= _SETTLED_NS
        ):
            return
        if order.status is OrderStatus.REJECTED:
            look = self._resolver.read(order, found, (), Case(self._clock.now_ns()))
            self._resolver.carry_out(
                cid, look
            )  # the ledger revives it, and halts the instrument
        elif cid not in self._contradictions:
            text = f"order {cid} is {order.status} in the ledger and works at {found.venue} as {found.venue_order_id}"
            self._contradictions.add(cid)
            report.differences.append(text)
            await self._gate.halt_symbol(
                order.request.symbol, found.venue, text, "reconciliation"
            )

    async def _sweep_balances(
        self, venue: Venue, report: SweepReport, suspicions: set[str]
    ) -> None:
        for mismatch in await self._balances.compare(venue):
            text = str(mismatch)
            suspicions.add(text)
            quiet = self._clock.now_ns() - self._ledger.last_change_ns > _SETTLED_NS
            if (
                text not in self._suspicions
                or not quiet
                or self._balances.is_told(mismatch)
            ):
                continue
            self._balances.note_told(mismatch)
            report.differences.append(text)
            for symbol in mismatch.symbols:
                await self._gate.halt_symbol(symbol, venue.name, text, "reconciliation")


def _describe(event: OrderEvent) -> str:
    quantity = getattr(event, "fill", None)
    more = f" {quantity.quantity} at {quantity.price}" if quantity is not None else ""
    return f"would record {type(event).__name__} of {event.client_order_id or event.venue_order_id}{more}"
