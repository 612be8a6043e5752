"""A parent order: one quantity, executed by children of which at most one works at any time.

Comes from: tasks/iceberg.py, tasks/twap.py
Goes to: tasks/_execution.py
"""

from decimal import Decimal
from typing import ClassVar, TypeVar

from nightdesk.abc import Task
from nightdesk.errors import OrderDeniedError
from nightdesk.model.context import TaskContext, TradingStrategyState
from nightdesk.model.events import Event, QuoteChanged
from nightdesk.model.instrument import Instrument, instrument_key
from nightdesk.model.order import Order, OrderRequest, Side
from nightdesk.model.priority import Priority
from nightdesk.tasks._execution import (
    LIVE,
    PERMANENT_DENIALS,
    ZERO,
    Freshness,
    Progress,
    Refusal,
    as_side,
    check,
    growing_delay_s,
    progress_of,
    reached_venue,
    seconds,
    trailing_refusals,
)

__all__ = ["ParentOrderContext", "ParentOrderTask"]

MAX_REJECTS = 5
IDLE_S = 1.0


class ParentOrderContext(TaskContext, kw_only=True):
    """What every parent order asks for, and how far it came.

    Attributes:
        symbol, venue: What to trade and where.
        total_quantity: Base units to execute; what is no multiple of the lot is reported, not traded.
        limit_price: Worst price of any child.
        time_limit_s: After this long the rest is given up and reported.
        max_age_s: A quote older than this triggers nothing.
        max_post_only_rejects: So many in a row pause the task.
        filled_quantity, avg_price: Copied from the ledger.
        order_id: The newest child.
        residual_quantity: What was asked and not executed, once the task has ended.
        rejects: Refusals in a row.
        close_reason: COMPLETED, TIME_LIMIT, OVERFILLED, or the code of a refusal.
        pause_reason: Why the task is PAUSED.
        resume_ns: When a pause ends by itself; 0 waits for an operator.
        forgiven_order: Refusals up to this child no longer count: an operator has seen them.
    """

    symbol: str
    venue: str
    side: Side
    total_quantity: Decimal
    limit_price: Decimal | None = None
    time_limit_s: float | None = None
    max_age_s: float = 10.0
    max_post_only_rejects: int = 5
    filled_quantity: Decimal = ZERO
    avg_price: Decimal = ZERO
    order_id: str | None = None
    residual_quantity: Decimal = ZERO
    rejects: int = 0
    close_reason: str | None = None
    pause_reason: str | None = None
    resume_ns: int = 0
    forgiven_order: str | None = None
    started_ns: int = 0
    progress_ns: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.side = as_side(self.side)


ContextT = TypeVar("ContextT", bound=ParentOrderContext)


class ParentOrderTask(Task[ContextT]):
    """The cycle of a parent order: take stock of the ledger, then tend the one child or send the next.

    Every cycle begins from `desk.orders()`, so it is right after any crash, and nothing is ever
    sent while a child of ours may still be executed.
    """

    priority: ClassVar[Priority] = Priority.HIGH
    listens: ClassVar[tuple[type[Event], ...]] = (QuoteChanged,)

    def __init__(self, context: ContextT) -> None:
        super().__init__(context)
        self._validate()
        self._asked: dict[str, tuple[int, int]] = {}
        self._seen: tuple[int, Order | None] = (-1, None)
        self._progress = Progress()
        self._denials = 0

    def keys(self) -> tuple[str, ...]:
        return (instrument_key(self.context.symbol, self.context.venue),)

    def watches(self) -> tuple[str, ...]:
        return self.keys()

    def wants(self, event: Event) -> bool:
        """Only quotes of the own instrument concern a parent order."""
        return (
            isinstance(event, QuoteChanged)
            and event.symbol == self.context.symbol
            and event.venue == self.context.venue
        )

    async def start(self) -> None:
        context = self.context
        self._instrument: Instrument = self.desk.instrument(
            context.symbol, context.venue
        )
        self._target = self._instrument.floor_quantity(context.total_quantity)
        self._freshness = Freshness(self.desk, context.max_age_s)
        # Children that ended before this start are not held against the venue.
        self._ended_before = {
            o.client_order_id for o in self.desk.orders() if o.status.is_terminal
        }

    def resume(self) -> None:
        self.evolve_context(resume_ns=0, pause_reason=None)
        super().resume()

    # What a kind of parent order decides ------------------------------------------

    async def _tend(self, order: Order) -> None:
        """Look after the one working child."""
        raise NotImplementedError

    async def _advance(self, orders: list[Order], progress: Progress) -> None:
        """Send the next child: none is working, and something is left."""
        raise NotImplementedError

    # The cycle --------------------------------------------------------------------

    async def _handle_executing(self) -> None:
        self.wait(IDLE_S)
        if not self.context.started_ns:
            self.evolve_context(started_ns=self._now())
        orders = reached_venue(self.desk.orders())
        progress = self._take_stock(orders)
        if progress.open:
            await self._look_after(progress.open[-1])
        elif self._target - progress.filled <= 0:
            self._finish("COMPLETED")
        elif self._time_is_up():
            self._finish("TIME_LIMIT")
        elif self._may_send(orders):
            await self._advance(orders, progress)

    async def _handle_paused(self) -> None:
        left_ns = self.context.resume_ns - self._now()
        if self.context.resume_ns and left_ns <= 0:
            self.evolve_context(resume_ns=0, pause_reason=None)
            self._transition(TradingStrategyState.EXECUTING)
        else:
            self.wait(min(IDLE_S, left_ns / 1e9) if self.context.resume_ns else IDLE_S)

    async def _look_after(self, order: Order) -> None:
        if order.status not in LIVE:
            return  # in flight, unknown, or being cancelled: the venue has the word
        if self._time_is_up():
            await self._cancel(order)
        else:
            await self._tend(order)

    def _take_stock(self, orders: list[Order]) -> Progress:
        """Derive progress from the ledger, and note in the context what changed.

        With an unchanged working child at the end nothing can have moved but a late fill of an older
        one, and that is counted before anything is sent; so a quote costs no walk over all children.
        """
        last = orders[-1] if orders else None
        seen = (len(orders), last)
        unchanged = seen[0] == self._seen[0] and last is self._seen[1]
        if not (unchanged and last is not None and last.status.is_open):
            self._progress = progress_of(orders)
            self._seen = seen
            self._note(self._progress, last)
        return self._progress

    def _note(self, progress: Progress, last: Order | None) -> None:
        context = self.context
        if progress.filled != context.filled_quantity:
            self.evolve_context(
                filled_quantity=progress.filled,
                avg_price=progress.average_price,
                progress_ns=self._now(),
            )
        if last is not None and last.client_order_id != context.order_id:
            self.evolve_context(order_id=last.client_order_id)

    def _may_send(self, orders: list[Order]) -> bool:
        """Return whether the refusals at the end of the ledger allow another child now."""
        refusals = trailing_refusals(orders, self.context.forgiven_order)
        if len(refusals) != self.context.rejects:
            self.evolve_context(rejects=len(refusals))
        if not refusals:
            return self._rested(orders)
        kind, count, last = refusals[0], len(refusals), orders[-1]
        if kind is not Refusal.BALANCE and count >= self._most_rejects(kind):
            self._pause_for_operator(kind, count, last)
            return False
        first_s = 1.0 if kind is Refusal.BALANCE else 0.25
        due_ns = last.updated_ns + seconds(growing_delay_s(count, first_s))
        if self._now() >= due_ns:
            return True
        if kind is Refusal.BALANCE:
            self._pause(kind.value, due_ns, last.reason or "", alert=count == 1)
        else:
            self.wait((due_ns - self._now()) / 1e9)
        return False

    def _rested(self, orders: list[Order]) -> bool:
        """Hold back after a child that ended unasked and unfilled, so that no venue is stormed."""
        count = 0
        for order in reversed(orders):
            unasked = order.client_order_id not in self._asked
            if (
                not unasked
                or order.filled_quantity
                or order.client_order_id in self._ended_before
            ):
                break
            count += 1
        if not count:
            return True
        left_ns = (
            orders[-1].updated_ns
            + seconds(growing_delay_s(count, most=5.0))
            - self._now()
        )
        if left_ns > 0:
            self.wait(left_ns / 1e9)
        return left_ns <= 0

    def _most_rejects(self, kind: Refusal) -> int:
        return (
            self.context.max_post_only_rejects
            if kind is Refusal.POST_ONLY
            else MAX_REJECTS
        )

    # Acts -------------------------------------------------------------------------

    async def _send(self, request: OrderRequest) -> None:
        try:
            order = await self.desk.submit(request)
        except OrderDeniedError as denied:
            self._answer_denial(denied)
            return
        self._denials = 0
        self.evolve_context(order_id=order.client_order_id)
        self.wait(0.0 if order.status.is_terminal else IDLE_S)

    async def _cancel(self, order: Order) -> None:
        """Ask once; ask again only after a growing delay, should the venue have refused."""
        count, due_ns = self._asked.get(order.client_order_id, (0, 0))
        if self._now() < due_ns:
            return
        delay_ns = seconds(growing_delay_s(count + 1, first=1.0, most=30.0))
        self._asked[order.client_order_id] = (count + 1, self._now() + delay_ns)
        order = await self.desk.cancel(order.client_order_id)
        self.wait(0.0 if order.status.is_terminal else IDLE_S)

    def _answer_denial(self, denied: OrderDeniedError) -> None:
        if denied.code in PERMANENT_DENIALS:
            self._refuse(denied)
            return
        self._denials += 1
        resume_ns = self._now() + seconds(growing_delay_s(self._denials, first=1.0))
        self._pause(denied.code, resume_ns, denied.reason, alert=self._denials == 1)

    def _refuse(self, denied: OrderDeniedError) -> None:
        """End in ERROR: the same request would be refused for ever."""
        self.evolve_context(
            close_reason=denied.code,
            residual_quantity=self.context.total_quantity
            - self.context.filled_quantity,
        )
        self.fail(denied, self._now())
        self.desk.alert("warning", str(denied))

    def _pause(self, reason: str, resume_ns: int, text: str, *, alert: bool) -> None:
        self.evolve_context(pause_reason=reason, resume_ns=resume_ns)
        self._transition(TradingStrategyState.PAUSED)
        if alert:
            again = (
                "tries again with a growing delay"
                if resume_ns
                else "waits for an operator"
            )
            self.desk.alert(
                "warning", f"paused ({reason}): {text or 'no reason given'}; {again}"
            )

    def _pause_for_operator(self, kind: Refusal, count: int, last: Order) -> None:
        self.evolve_context(forgiven_order=last.client_order_id)
        self._pause(
            kind.value,
            0,
            f"{count} children in a row were refused, the last with {last.reason!r}",
            alert=True,
        )

    def _finish(self, reason: str) -> None:
        context = self.context
        residual = context.total_quantity - context.filled_quantity
        if residual < 0:
            reason = "OVERFILLED"
            self.desk.alert(
                "critical",
                f"{context.filled_quantity} executed of {context.total_quantity}",
            )
        elif residual > 0:
            self.desk.alert(
                "info" if reason == "COMPLETED" else "warning",
                f"ended ({reason}) with {context.filled_quantity} of {context.total_quantity} {context.symbol} executed; "
                f"residual {residual}",
            )
        self.evolve_context(residual_quantity=residual, close_reason=reason)
        self._transition(TradingStrategyState.COMPLETED)

    # Small questions ----------------------------------------------------------------

    def _validate(self) -> None:
        c = self.context
        check(
            f"{type(self).__name__} {c.task_id!r}",
            {
                "symbol": ("/" in c.symbol, c.symbol, "a pair such as BTC/USDT"),
                "venue": (bool(c.venue), c.venue, "the name of a venue"),
                "total_quantity": (
                    c.total_quantity > 0,
                    c.total_quantity,
                    "more than 0",
                ),
                "limit_price": (
                    c.limit_price is None or c.limit_price > 0,
                    c.limit_price,
                    "more than 0",
                ),
                "time_limit_s": (
                    c.time_limit_s is None or c.time_limit_s > 0,
                    c.time_limit_s,
                    "more than 0",
                ),
                "max_age_s": (c.max_age_s > 0, c.max_age_s, "more than 0"),
                "max_post_only_rejects": (
                    c.max_post_only_rejects >= 1,
                    c.max_post_only_rejects,
                    "at least 1",
                ),
            },
        )

    def _now(self) -> int:
        return self.desk.clock.now_ns()

    def _left(self) -> Decimal:
        """What is asked for and not yet filled, as the last stock-taking found it."""
        return self._target - self._progress.filled

    def _quote(self) -> QuoteChanged | None:
        return self._freshness.quote(self.context.symbol, self.context.venue)

    def _time_is_up(self) -> bool:
        limit_s = self.context.time_limit_s
        return limit_s is not None and self._now() >= self.context.started_ns + seconds(
            limit_s
        )

    def _merge_tail(
        self, quantity: Decimal, remaining: Decimal, price: Decimal
    ) -> Decimal:
        """Return `quantity` on the lot grid, or all that remains if what would be left could never be traded."""
        quantity = self._instrument.floor_quantity(
            min(quantity, remaining, self._instrument.max_quantity)
        )
        tail = remaining - quantity
        if tail > 0 and not self._instrument.is_tradable(tail, price):
            return min(
                remaining,
                self._instrument.floor_quantity(self._instrument.max_quantity),
            )
        return quantity
