"""Execute a large order in slices of which only one shows at a time.

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
    ZERO,
    Progress,
    Refusal,
    check,
    is_behind,
    least_tradable,
    pegged_price,
    refusal_of,
    seconds,
    touch,
    worst_first_step,
)
from nightdesk.tasks._parent import ParentOrderContext, ParentOrderTask

__all__ = ["IcebergContext", "IcebergTask"]


class IcebergContext(ParentOrderContext, kw_only=True):
    """An iceberg order.

    Attributes:
        order_quantity: Size of one slice, base units.
        offset_ticks: Distance from the best price of the own side; 0 joins the queue, negative crosses.
        tick_tolerance: The child is replaced when it is off by more than this many ticks.
        post_only: Never take liquidity.
        size_variance: Each slice differs by up to this ratio, so that its size tells nothing.
        urgency_timeout_s: After so long without a fill, take the other side's best price.
        on_tail: `merge` adds a tail that is too small to trade to the last slice, `leave` reports it.
    """

    order_quantity: Decimal
    offset_ticks: int = 0
    tick_tolerance: int = 1
    post_only: bool = True
    size_variance: Decimal = ZERO
    urgency_timeout_s: float | None = None
    on_tail: Literal["merge", "leave"] = "merge"


class IcebergTask(ParentOrderTask[IcebergContext]):
    """Sell or buy a total in slices: one child at a time, pegged to the best price of its side.

    A child is replaced when the market moved away by more than the tolerance: one cancel, its proof,
    then one new child for the rest of the same slice (T-4, T-5).
    """

    context_class: ClassVar[type[TaskContext]] = IcebergContext

    async def _tend(self, order: Order) -> None:
        quote = self._quote()
        price = order.request.price
        if (
            quote is None
            or price is None
            or order.request.time_in_force is TimeInForce.IOC
        ):
            return
        if not self._instrument.is_tradable(self._left(), price):
            return  # a crumb: this child can still sell it, a new one would be illegal
        if self._crosses_now(quote):
            await self._cancel(order)
            return
        desired = self._desired_price(quote)
        allowed = self.context.tick_tolerance * self._instrument.tick_size
        if abs(desired - price) > allowed:
            await self._cancel(order)

    async def _advance(self, orders: list[Order], progress: Progress) -> None:
        quote = self._quote()
        if quote is None:
            return
        crossing = self._crosses_now(quote)
        price = (
            touch(self.context.side, quote) if crossing else self._desired_price(quote)
        )
        if not orders and (
            refusal := worst_first_step(self._instrument, self._least_slice(), price)
        ):
            self._refuse(OrderDeniedError(*refusal))
            return
        parent, quantity = self._next_child(orders, progress, price)
        if not self._instrument.is_tradable(quantity, price):
            self._finish("COMPLETED")
            return
        await self._send(
            OrderRequest(
                symbol=self.context.symbol,
                venue=self.context.venue,
                side=self.context.side,
                quantity=quantity,
                type=OrderType.LIMIT,
                price=price,
                time_in_force=TimeInForce.IOC if crossing else TimeInForce.GTC,
                post_only=self.context.post_only and not crossing,
                parent=parent,
            )
        )

    def _next_child(
        self, orders: list[Order], progress: Progress, price: Decimal
    ) -> tuple[str | None, Decimal]:
        """Return the slice that is being completed (its first order, or None) and the child's quantity."""
        remaining = self._target - progress.filled
        parent, quantity = _open_slice(orders)
        if parent is None or not self._instrument.is_tradable(
            min(quantity, remaining), price
        ):
            parent, quantity = None, self._slice()
        least = least_tradable(self._instrument, price)
        quantity = max(quantity, min(least, remaining))
        if self.context.on_tail == "merge":
            return parent, self._merge_tail(quantity, remaining, price)
        quantity = min(quantity, remaining, self._instrument.max_quantity)
        return parent, self._instrument.floor_quantity(quantity)

    def _slice(self) -> Decimal:
        variance = self.context.size_variance
        if not variance:
            return self._least_slice()
        share = Decimal(str(round(self.desk.random.uniform(-1.0, 1.0), 6)))
        varied = self.context.order_quantity * (1 + variance * share)
        return self._instrument.floor_quantity(varied)

    def _least_slice(self) -> Decimal:
        return min(
            self._instrument.floor_quantity(self.context.order_quantity), self._target
        )

    def _desired_price(self, quote: QuoteChanged) -> Decimal:
        """The pegged price; each post-only refusal in a row stands one tick further back."""
        refused = self.context.rejects if self._last_was_post_only() else 0
        return pegged_price(
            self._instrument,
            self.context.side,
            quote,
            self.context.offset_ticks + refused,
            limit=self.context.limit_price,
            post_only=self.context.post_only,
        )

    def _last_was_post_only(self) -> bool:
        last = self._seen[1]
        return last is not None and refusal_of(last) is Refusal.POST_ONLY

    def _crosses_now(self, quote: QuoteChanged) -> bool:
        timeout_s = self.context.urgency_timeout_s
        if timeout_s is None:
            return False
        since_ns = max(self.context.progress_ns, self.context.started_ns)
        if self._now() < since_ns + seconds(timeout_s):
            return False
        price = touch(self.context.side, quote)
        return not is_behind(self.context.side, price, self.context.limit_price)

    def _validate(self) -> None:
        super()._validate()
        c = self.context
        check(
            f"IcebergTask {c.task_id!r}",
            {
                "order_quantity": (
                    c.order_quantity > 0,
                    c.order_quantity,
                    "more than 0",
                ),
                "tick_tolerance": (
                    c.tick_tolerance >= 0,
                    c.tick_tolerance,
                    "0 or more",
                ),
                "size_variance": (
                    0 <= c.size_variance < 1,
                    c.size_variance,
                    "a ratio from 0 to below 1",
                ),
                "offset_ticks": (
                    c.offset_ticks >= 0 or not c.post_only,
                    c.offset_ticks,
                    "0 or more while `post_only` is true (a negative offset crosses)",
                ),
                "urgency_timeout_s": (
                    c.urgency_timeout_s is None or c.urgency_timeout_s > 0,
                    c.urgency_timeout_s,
                    "more than 0",
                ),
            },
        )


def _open_slice(orders: list[Order]) -> tuple[str | None, Decimal]:
    """Return the first order of the newest slice and what that slice still lacks; (None, 0) if it is complete.

    A replaced child names the first of its slice as its parent, so the ledger alone tells it.
    """
    if not orders:
        return None, ZERO
    root = orders[-1].request.parent or orders[-1].client_order_id
    filled, size = ZERO, None
    for order in reversed(orders):
        if order.client_order_id == root:
            filled += order.filled_quantity
            size = order.request.quantity
            break
        if order.request.parent == root:
            filled += order.filled_quantity
    if size is None or filled >= size:
        return None, ZERO
    return root, size - filled
