"""Execute a quantity evenly over time.

Comes from: kernel/runner.py
Goes to: orders/protocol.py
"""

from decimal import Decimal
from typing import ClassVar, Literal

from nightdesk.errors import OrderDeniedError
from nightdesk.model.context import TaskContext
from nightdesk.model.events import QuoteChanged
from nightdesk.model.order import Order, OrderRequest, OrderType, TimeInForce
from nightdesk.tasks._execution import (
    Progress,
    check,
    is_behind,
    pegged_price,
    seconds,
    touch,
    worst_first_step,
)
from nightdesk.tasks._parent import IDLE_S, ParentOrderContext, ParentOrderTask

__all__ = ["TwapContext", "TwapTask"]

DEFAULT_SLICES = 10


class TwapContext(ParentOrderContext, kw_only=True):
    """A time-weighted order.

    Attributes:
        duration_s: From the first slice's start to the last slice's end.
        slices: How many; or give `interval_s`, the time between two.
        order_type: `market` takes at once; `limit` waits at the best price of the own side first.
        fallback_s: After so long a waiting slice is taken at market; half of the interval by default.
        max_catch_up: A late child is at most this many slices large.
        executed_slices: How many slices' worth is filled.
    """

    duration_s: float
    slices: int | None = None
    interval_s: float | None = None
    order_type: Literal["market", "limit"] = "market"
    fallback_s: float | None = None
    max_catch_up: int = 2
    executed_slices: int = 0


class TwapTask(ParentOrderTask[TwapContext]):
    """Spread a total over a duration in equal slices.

    The schedule is a function of `started_ns`, and what is missing one of the ledger: a slice that
    failed, or that fell into a restart, is still owed and follows (H5).
    """

    context_class: ClassVar[type[TaskContext]] = TwapContext

    async def start(self) -> None:
        await super().start()
        context = self.context
        self._count = _count(context)
        self._interval_s = context.duration_s / self._count
        fallback_s = context.fallback_s
        self._fallback_s = self._interval_s / 2 if fallback_s is None else fallback_s
        self._slice = self._target / self._count

    async def _tend(self, order: Order) -> None:
        """A waiting slice is given up when the market has left it, or when it must be taken."""
        quote = self._quote()
        price = order.request.price
        if (
            quote is None
            or price is None
            or order.request.time_in_force is TimeInForce.IOC
        ):
            return
        if not self._instrument.is_tradable(self._left(), price):
            return  # a crumb: this child can still be filled, a new one would be illegal
        moved = abs(self._waiting_price(quote) - price) > self._instrument.tick_size
        if moved or self._must_take(quote):
            await self._cancel(order)

    async def _advance(self, orders: list[Order], progress: Progress) -> None:
        quote = self._quote()
        if quote is None:
            return
        taking = self._must_take(quote)
        price = (
            touch(self.context.side, quote) if taking else self._waiting_price(quote)
        )
        if not orders and (
            refusal := worst_first_step(
                self._instrument, self._instrument.floor_quantity(self._slice), price
            )
        ):
            self._refuse(OrderDeniedError(*refusal))
            return
        quantity = self._owed(progress, price)
        if self._instrument.is_tradable(quantity, price):
            if taking and is_behind(self.context.side, price, self.context.limit_price):
                return  # the price is worse than the limit: the slice stays owed
            await self._send(self._child(quantity, price, taking))
        elif self._due() == self._count:
            self._finish("COMPLETED")
        else:
            self.wait(min(IDLE_S, self._until_next_s()))

    def _child(self, quantity: Decimal, price: Decimal, taking: bool) -> OrderRequest:
        limit = self.context.limit_price
        market = taking and limit is None
        return OrderRequest(
            symbol=self.context.symbol,
            venue=self.context.venue,
            side=self.context.side,
            quantity=quantity,
            type=OrderType.MARKET if market else OrderType.LIMIT,
            price=None if market else (limit if taking else price),
            time_in_force=TimeInForce.IOC if taking else TimeInForce.GTC,
            post_only=not taking,
        )

    def _owed(self, progress: Progress, price: Decimal) -> Decimal:
        """Return what the schedule asks for by now and is not filled, as one legal child."""
        due = self._due()
        owed = min(
            self._goal(due) - progress.filled, self.context.max_catch_up * self._slice
        )
        quantity = self._instrument.floor_quantity(
            min(owed, self._instrument.max_quantity)
        )
        if due == self._count and self._instrument.is_tradable(quantity, price):
            return self._merge_tail(quantity, self._target - progress.filled, price)
        return quantity

    def _goal(self, slices: int) -> Decimal:
        """Return how much is to be filled after `slices` slices; all of it after the last."""
        return self._instrument.floor_quantity(self._target * slices / self._count)

    def _due(self) -> int:
        elapsed_ns = self._now() - self.context.started_ns
        return min(self._count, elapsed_ns // seconds(self._interval_s) + 1)

    def _until_next_s(self) -> float:
        next_ns = self.context.started_ns + self._due() * seconds(self._interval_s)
        return max(0.0, (next_ns - self._now()) / 1e9)

    def _must_take(self, quote: QuoteChanged) -> bool:
        """Return whether to pay the spread now: by order type, or because the slice has waited long enough."""
        if self.context.order_type == "market":
            return True
        if is_behind(
            self.context.side,
            touch(self.context.side, quote),
            self.context.limit_price,
        ):
            return False
        interval_ns = seconds(self._interval_s)
        into_slice_ns = (
            self._now() - self.context.started_ns - (self._due() - 1) * interval_ns
        )
        return into_slice_ns >= seconds(self._fallback_s)

    def _waiting_price(self, quote: QuoteChanged) -> Decimal:
        return pegged_price(
            self._instrument,
            self.context.side,
            quote,
            self.context.rejects,
            limit=self.context.limit_price,
            post_only=True,
        )

    def _note(self, progress: Progress, last: Order | None) -> None:
        super()._note(progress, last)
        done = sum(progress.filled >= self._goal(k) for k in range(1, self._count + 1))
        if done != self.context.executed_slices:
            self.evolve_context(executed_slices=done)

    def _validate(self) -> None:
        super()._validate()
        c = self.context
        check(
            f"TwapTask {c.task_id!r}",
            {
                "duration_s": (c.duration_s > 0, c.duration_s, "more than 0"),
                "slices": (
                    c.slices is None or 1 <= c.slices <= 100_000,
                    c.slices,
                    "from 1 to 100,000",
                ),
                "interval_s": (
                    c.interval_s is None
                    or (c.slices is None and 0 < c.interval_s <= c.duration_s),
                    c.interval_s,
                    "more than 0, at most `duration_s`, and not together with `slices`",
                ),
                "fallback_s": (
                    c.fallback_s is None or c.fallback_s >= 0,
                    c.fallback_s,
                    "0 or more",
                ),
                "max_catch_up": (c.max_catch_up >= 1, c.max_catch_up, "at least 1"),
            },
        )


def _count(context: TwapContext) -> int:
    if context.slices is not None:
        return context.slices
    if context.interval_s is not None:
        return max(1, round(context.duration_s / context.interval_s))
    return DEFAULT_SLICES
