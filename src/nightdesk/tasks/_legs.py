"""Two legs that belong together: what they are worth, how far they are apart, what they came to.

Comes from: tasks/arbitrage.py, tasks/delta_neutral.py
Goes to: tasks/_execution.py
"""

from collections.abc import Iterable
from decimal import Decimal

from nightdesk.abc import Desk
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Order, Side
from nightdesk.tasks._execution import ZERO

__all__ = [
    "coarser_lot",
    "money_of",
    "net_edge",
    "net_quantity",
    "only_reduces",
    "to_ppm",
]


def net_edge(
    ask: Decimal, buy_fee: Decimal, bid: Decimal, sell_fee: Decimal
) -> Decimal:
    """Return what buying at `ask` and selling at `bid` earns after fees, as a ratio of what is paid."""
    paid = ask * (1 + buy_fee)
    return (bid * (1 - sell_fee) - paid) / paid


def to_ppm(ratio: Decimal) -> int:
    """Return `ratio` in parts per million, rounded towards zero."""
    return int(ratio * 1_000_000)


def net_quantity(orders: Iterable[Order]) -> Decimal:
    """Return bought minus sold base units, less the fees that were taken in the base asset."""
    total = ZERO
    for order in orders:
        if order.filled_quantity:
            base = order.request.symbol.split("/")[0]
            total += order.request.side.sign * order.filled_quantity
            total -= order.fees.get(base, ZERO)
    return total


def money_of(orders: Iterable[Order]) -> tuple[Decimal, Decimal]:
    """Return the flow of quote money before fees (received minus paid), and the fees in quote units.

    Once bought and sold quantities are equal, the flow is the gross profit. Fees in the base asset
    are no money here: they are missing from `net_quantity`.
    """
    flow = fees = ZERO
    for order in orders:
        if order.filled_quantity:
            quote = order.request.symbol.split("/")[1].split(":")[0]
            value = order.filled_quantity * (order.average_price or ZERO)
            flow -= order.request.side.sign * value
            fees += order.fees.get(quote, ZERO)
    return flow, fees


def only_reduces(
    desk: Desk, symbol: str, venue: str, side: Side, quantity: Decimal
) -> bool:
    """Return whether an order could do nothing but shrink what the desk holds there.

    Marked so, it passes a halted gate: a halt must not keep the desk on one leg.
    """
    return quantity <= -side.sign * desk.position(symbol, venue).quantity


def coarser_lot(quantity: Decimal, *instruments: Instrument) -> Decimal:
    """Return `quantity` rounded down to the coarsest lot of `instruments`."""
    return max(instruments, key=lambda i: i.lot_size).floor_quantity(quantity)
