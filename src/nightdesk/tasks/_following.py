"""Follow a pool's move at a venue that the desk can trade on, and leave again after a while.

Comes from: tasks/arbitrage.py
Goes to: tasks/_legs.py
"""

from decimal import Decimal

from nightdesk.abc import Desk
from nightdesk.errors import OrderDeniedError
from nightdesk.model.events import PoolSwap
from nightdesk.model.order import Order, OrderRequest, OrderType, Side, TimeInForce
from nightdesk.tasks._execution import (
    ZERO,
    crossing_price,
    progress_of,
    reached_venue,
    seconds,
)
from nightdesk.tasks._legs import net_quantity, only_reduces

__all__ = ["PoolFollower"]


class PoolFollower:
    """One position at most, in the direction of the newest swap; when it ends follows from the ledger alone.

    The pool itself is not traded, so this is no arbitrage but a bet that the venue follows the pool;
    it is bounded by `quantity` and by `hold_s`.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        symbol: str | None,
        venue: str | None,
        quantity: Decimal | None,
        hold_s: float,
        slippage_buffer: Decimal,
        max_age_s: float,
    ) -> None:
        self._desk = desk
        self._symbol, self._venue = symbol or "", venue or ""
        self._quantity = quantity or ZERO
        self._hold_s, self._max_age_s = hold_s, max_age_s
        self._slippage_buffer = slippage_buffer
        self._retry_ns = 0
        self._instrument = desk.instrument(symbol, venue) if symbol and venue else None

    @property
    def taker_fee(self) -> Decimal:
        return self._instrument.taker_fee if self._instrument is not None else ZERO

    async def follow(self, swap: PoolSwap) -> str:
        """Trade with the move; return `taken`, `observed` where no venue is configured, or why not."""
        if self._instrument is None:
            return "observed"
        orders = self._orders()
        if progress_of(orders).open or self._left(orders):
            return "busy"
        quote = self._desk.price(self._symbol, self._venue)
        if quote is None or self._now() - quote.ts_received_ns > seconds(
            self._max_age_s
        ):
            return "price_too_old"
        side = Side.BUY if swap.price_impact_ppm > 0 else Side.SELL
        price = quote.ask if side is Side.BUY else quote.bid
        quantity = self._instrument.floor_quantity(self._quantity)
        if not self._instrument.is_tradable(quantity, price):
            return "quantity_below_minimum"
        limit = crossing_price(self._instrument, side, price, self._slippage_buffer)
        return await self._submit(side, quantity, limit) or "taken"

    async def leave_when_due(self) -> str | None:
        """Close the position once it was held long enough; return why that was denied, or None."""
        orders = self._orders()
        delta = self._left(orders)
        if not delta or progress_of(orders).open:
            return None
        entered_ns = max(
            o.created_ns for o in orders if o.filled_quantity and o.request.price
        )
        last = orders[-1]
        retry_ns = last.updated_ns + seconds(1.0) if last.request.price is None else 0
        due_ns = max(entered_ns + seconds(self._hold_s), retry_ns, self._retry_ns)
        if self._now() < due_ns:
            return None
        refusal = await self._submit(
            Side.SELL if delta > 0 else Side.BUY, abs(delta), None
        )
        if refusal is not None:
            self._retry_ns = self._now() + seconds(1.0)
        return refusal

    async def _submit(
        self, side: Side, quantity: Decimal, limit: Decimal | None
    ) -> str | None:
        try:
            await self._desk.submit(
                OrderRequest(
                    symbol=self._symbol,
                    venue=self._venue,
                    side=side,
                    quantity=quantity,
                    type=OrderType.MARKET if limit is None else OrderType.LIMIT,
                    price=limit,
                    time_in_force=TimeInForce.IOC,
                    reduce_only=limit is None
                    and only_reduces(
                        self._desk, self._symbol, self._venue, side, quantity
                    ),
                )
            )
        except OrderDeniedError as denied:
            return f"denied_{denied.code.lower()}"
        return None

    def _orders(self) -> list[Order]:
        return [
            o
            for o in reached_venue(self._desk.orders())
            if (o.request.symbol, o.request.venue) == (self._symbol, self._venue)
        ]

    def _left(self, orders: list[Order]) -> Decimal:
        """Return the signed quantity that is held and can be traded; a crumb is left to the positions' report."""
        delta = net_quantity(orders)
        if not delta or self._instrument is None:
            return ZERO
        price = next(
            (o.average_price for o in reversed(orders) if o.average_price), ZERO
        )
        quantity = self._instrument.floor_quantity(abs(delta))
        if not self._instrument.is_tradable(quantity, price):
            return ZERO
        return quantity if delta > 0 else -quantity

    def _now(self) -> int:
        return self._desk.clock.now_ns()
