"""What a venue knows for ever: orders, fills, balances, numbers. Statement rows are all that changes it.

Comes from: market/matching.py
Goes to: market/matching.py
"""

from collections import deque
from collections.abc import Iterable, Mapping
from decimal import Decimal

from nightdesk.market.accounts import Accounts
from nightdesk.market.resting import Working
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Fill, OrderStatus, Side
from nightdesk.model.statement import (
    Deposited,
    Ended,
    Placed,
    StatementRow,
    Traded,
    Triggered,
    TriggerMoved,
)

__all__ = ["VenueState"]


class VenueState:
    """The same rows always build the same state, which is why a restart cannot differ from a long run.

    Attributes:
        history: Finished orders and fills that stay known to look-ups; older ones are in the statement.
    """

    def __init__(self, instruments: Mapping[str, Instrument], history: int) -> None:
        self.accounts = Accounts()
        self.sequence = 0
        self.order_number = 0
        self.trade_number = 0
        self.orders: dict[str, Working] = {}
        self.open: dict[str, Working] = {}
        self.fills: deque[Fill] = deque(maxlen=history)
        self.by_client: dict[str, str] = {}  # client order id to its newest order
        self.history = history
        self._instruments = instruments
        self._finished: deque[str] = deque()

    def restore(self, rows: Iterable[StatementRow]) -> None:
        """Apply a whole statement.

        Raises:
            ValueError: It speaks of an instrument or an order that does not exist here, or skips a row.
        """
        for row in rows:
            if row.sequence != self.sequence + 1:
                raise ValueError(f"row {row.sequence} follows row {self.sequence}")
            try:
                self.apply(row)
            except KeyError as error:
                raise ValueError(
                    f"row {row.sequence} speaks of {error}, which is not known here"
                ) from error

    def apply(self, row: StatementRow) -> None:
        """Change the state by one row."""
        if isinstance(row, Traded):
            self._trade(row)
        elif isinstance(row, Placed):
            self._place(row)
        elif isinstance(row, Ended):
            self._end(row)
        elif isinstance(row, Deposited):
            self.accounts.deposit(row.account, row.asset, row.quantity)
        elif isinstance(row, Triggered):
            order = self.orders[row.venue_order_id]
            order.awake = True
            order.updated_ns = row.ts_ns
        elif isinstance(row, TriggerMoved):
            self.orders[row.venue_order_id].trigger_price = row.trigger_price
        self.sequence = row.sequence

    def of_client(self, client_order_id: str) -> Working | None:
        """Return the newest order of this client id that is still remembered."""
        return self.orders.get(self.by_client.get(client_order_id, ""))

    def _place(self, row: Placed) -> None:
        order = Working(
            venue_order_id=row.venue_order_id,
            client_order_id=row.client_order_id,
            account=row.account,
            instrument=self._instruments[row.symbol],
            side=row.side,
            type=row.type,
            quantity=row.quantity,
            price=row.price,
            trigger_price=row.trigger_price,
            trail=row.trail,
            time_in_force=row.time_in_force,
            post_only=row.post_only,
            reduce_only=row.reduce_only,
            expire_ns=row.expire_ns,
            lock_rate=row.lock_rate,
            placed_ns=row.ts_ns,
            updated_ns=row.ts_ns,
            awake=row.trigger_price is None,
        )
        self.order_number = int(row.venue_order_id)
        self.orders[row.venue_order_id] = self.open[row.venue_order_id] = order
        self.by_client[row.client_order_id] = row.venue_order_id
        self._lock(order, order.quantity)

    def _trade(self, row: Traded) -> None:
        fill = row.fill
        order = self.orders[fill.venue_order_id]
        self.trade_number = int(fill.trade_id)
        self.fills.append(fill)
        self._lock(order, -fill.quantity)
        self.accounts.book(row.account, order.instrument, fill)
        order.filled += fill.quantity
        order.cost += fill.quantity * fill.price
        order.updated_ns = row.ts_ns
        if order.filled >= order.quantity:
            self._close(order, OrderStatus.FILLED)
        else:
            order.status = OrderStatus.PARTIALLY_FILLED

    def _end(self, row: Ended) -> None:
        order = self.orders[row.venue_order_id]
        self._lock(order, -order.remaining)
        order.reason = row.reason
        order.updated_ns = row.ts_ns
        self._close(order, row.status)

    def _lock(self, order: Working, quantity: Decimal) -> None:
        if order.lock_rate:
            asset = (
                order.instrument.quote
                if order.side is Side.BUY
                else order.instrument.base
            )
            self.accounts.lock(order.account, asset, order.lock_rate * quantity)

    def _close(self, order: Working, status: OrderStatus) -> None:
        order.status = status
        del self.open[order.venue_order_id]
        self._finished.append(order.venue_order_id)
        if len(self._finished) > self.history:
            del self.orders[self._finished.popleft()]
