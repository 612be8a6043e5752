"""The barriers around a position, as pure functions of a guard and a price.

Comes from: tasks/position_monitor.py
Goes to: model/order.py
"""

from decimal import Decimal
from typing import Literal

import msgspec

from nightdesk.model.events import QuoteChanged
from nightdesk.model.order import Side
from nightdesk.tasks._execution import seconds

__all__ = ["Barriers", "Guard", "PositionSide", "barrier_due", "exit_price", "follow"]

PositionSide = Literal["LONG", "SHORT"]


class Barriers(msgspec.Struct, frozen=True, kw_only=True):
    """Distances as positive ratios of the entry price; None switches a barrier off.

    Attributes:
        trailing_activation: Favourable move that arms the trailing stop.
        trailing_delta: Distance of the trailing stop from the best price since then.
        break_even: Favourable move that lifts the stop to the entry price.
    """

    stop_loss: Decimal | None = None
    take_profit: Decimal | None = None
    trailing_activation: Decimal | None = None
    trailing_delta: Decimal | None = None
    break_even: Decimal | None = None
    time_limit_s: float | None = None


class Guard(msgspec.Struct, frozen=True, kw_only=True):
    """What must be remembered of one guarded position; the levels survive a restart (T-18).

    Attributes:
        trailing_stop: Its level once it is armed; it only ever moves in favour of the position.
        broke_even: The stop stands at the entry price.
        reason: The barrier that was hit; from then on the position is being closed.
        since_ns: When it was hit.
    """

    side: PositionSide
    entry_price: Decimal
    opened_ns: int
    trailing_stop: Decimal | None = None
    broke_even: bool = False
    reason: str | None = None
    since_ns: int = 0

    @property
    def sign(self) -> int:
        return 1 if self.side == "LONG" else -1

    @property
    def entry_side(self) -> Side:
        return Side.BUY if self.side == "LONG" else Side.SELL


def exit_price(guard: Guard, quote: QuoteChanged) -> Decimal:
    """Return the price at which the position could be closed: the bid of a long, the ask of a short."""
    return quote.bid if guard.side == "LONG" else quote.ask


def follow(guard: Guard, barriers: Barriers, price: Decimal) -> Guard:
    """Return `guard` with its trailing stop and break-even moved by `price`."""
    move = (price - guard.entry_price) * guard.sign
    broke_even = guard.broke_even or _reached(move, barriers.break_even, guard)
    stop = guard.trailing_stop
    if barriers.trailing_delta is not None and (
        stop is not None or _reached(move, barriers.trailing_activation, guard)
    ):
        level = price - guard.sign * barriers.trailing_delta * guard.entry_price
        if stop is None or (level - stop) * guard.sign > 0:
            stop = level
    if stop == guard.trailing_stop and broke_even == guard.broke_even:
        return guard
    return msgspec.structs.replace(guard, trailing_stop=stop, broke_even=broke_even)


def barrier_due(
    guard: Guard, barriers: Barriers, price: Decimal, now_ns: int
) -> str | None:
    """Return the barrier that `price` or the time has hit: stop loss before trailing before profit before time."""
    move = (price - guard.entry_price) * guard.sign
    if (
        barriers.stop_loss is not None
        and move <= -barriers.stop_loss * guard.entry_price
    ):
        return "STOP_LOSS"
    if guard.broke_even and move <= 0:
        return "BREAK_EVEN"
    stop = guard.trailing_stop
    if stop is not None and (price - stop) * guard.sign <= 0:
        return "TRAILING_STOP"
    if _reached(move, barriers.take_profit, guard):
        return "TAKE_PROFIT"
    limit_s = barriers.time_limit_s
    if limit_s is not None and now_ns >= guard.opened_ns + seconds(limit_s):
        return "TIME_LIMIT"
    return None


def _reached(move: Decimal, ratio: Decimal | None, guard: Guard) -> bool:
    return ratio is not None and move >= ratio * guard.entry_price
