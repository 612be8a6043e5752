"""Guard positions by stop loss, trailing stop, take profit and time limit.

Comes from: kernel/runner.py
Goes to: orders/protocol.py
"""

from decimal import Decimal
from typing import ClassVar, Literal

import msgspec

from nightdesk.abc import Task
from nightdesk.errors import OrderDeniedError
from nightdesk.model.context import TaskContext, TradingStrategyState
from nightdesk.model.events import Event, OrderFilled, QuoteChanged
from nightdesk.model.instrument import Instrument, instrument_key
from nightdesk.model.order import Order, OrderRequest, OrderType, Side
from nightdesk.model.position import Position
from nightdesk.model.priority import Priority
from nightdesk.tasks._barriers import (
    Barriers,
    Guard,
    PositionSide,
    barrier_due,
    exit_price,
    follow,
)
from nightdesk.tasks._execution import (
    LIVE,
    ZERO,
    Freshness,
    check,
    growing_delay_s,
    progress_of,
    reached_venue,
    seconds,
    trailing_refusals,
)
from nightdesk.tasks._legs import money_of, net_quantity

__all__ = ["ClosedPosition", "PositionMonitorContext", "PositionMonitorTask"]

IDLE_S = 1.0
CANCEL_PATIENCE_S = 2.0
MAX_CLOSED = 100


class ClosedPosition(msgspec.Struct, frozen=True, kw_only=True):
    """One closed position: which barrier, at which price, and what was left."""

    key: str
    side: PositionSide
    reason: str
    entry_price: Decimal
    exit_price: Decimal
    quantity: Decimal
    residual: Decimal = ZERO
    ts_ns: int = 0


class PositionMonitorContext(TaskContext, kw_only=True):
    """What to guard, by which barriers, and what came of it.

    Three uses. With `entry` the task opens the position itself. With `side`, `quantity` and
    `entry_price` it takes over one that is held. With neither it guards whatever the desk
    holds: of one instrument, or of all if `symbol` is empty; then it never ends.

    Attributes:
        entry: `none`, `market`, or `limit` at `entry_price`.
        entry_timeout_s: The rest of an entry is cancelled after this long.
        stop_loss, take_profit, trailing_activation, trailing_delta, break_even: Ratios of the entry price, positive.
        time_limit_s: Close after this long.
        max_age_s: An older price triggers nothing, and alerts.
        reduce_only: Off where several tasks share one net position at the venue.
        entry_fees: Quote units already paid for a position that is taken over.
        platform_fee: Quote units per position.
        profit_share: Ratio of a profit after fees; never of a loss.
        guards: The positions under guard, by instrument key.
        closed: The newest closed positions.
    """

    symbol: str = ""
    venue: str = ""
    side: PositionSide | None = None
    quantity: Decimal | None = None
    entry_price: Decimal | None = None
    entry: Literal["none", "market", "limit"] = "none"
    entry_timeout_s: float | None = None
    stop_loss: Decimal | None = None
    take_profit: Decimal | None = None
    trailing_activation: Decimal | None = None
    trailing_delta: Decimal | None = None
    break_even: Decimal | None = None
    time_limit_s: float | None = None
    max_age_s: float = 10.0
    reduce_only: bool = True
    entry_fees: Decimal = ZERO
    platform_fee: Decimal = ZERO
    profit_share: Decimal = ZERO
    guards: dict[str, Guard] = msgspec.field(default_factory=dict)
    closed: list[ClosedPosition] = msgspec.field(default_factory=list)
    held_quantity: Decimal = ZERO
    started_ns: int = 0
    close_reason: str | None = None
    exit_price: Decimal = ZERO
    gross_pnl: Decimal = ZERO
    fees_paid: Decimal = ZERO
    net_pnl: Decimal = ZERO
    profit_share_due: Decimal = ZERO
    user_pnl: Decimal = ZERO

    @property
    def is_single(self) -> bool:
        """One position of its own, rather than whatever the desk holds."""
        return self.quantity is not None


class PositionMonitorTask(Task[PositionMonitorContext]):
    """Close a position by one reduce-only market order as soon as a barrier is hit (T-16 to T-20).

    Triggers compare the price at which the position could really be closed, the bid of a long and
    the ask of a short, with <= and >=; never the last trade, never a profit after fees.
    """

    context_class: ClassVar[type[TaskContext]] = PositionMonitorContext
    priority: ClassVar[Priority] = Priority.CRITICAL
    listens: ClassVar[tuple[type[Event], ...]] = (QuoteChanged, OrderFilled)

    def __init__(self, context: PositionMonitorContext) -> None:
        super().__init__(context)
        self._validate()
        c = context
        self._barriers = Barriers(
            stop_loss=c.stop_loss,
            take_profit=c.take_profit,
            trailing_activation=c.trailing_activation,
            trailing_delta=c.trailing_delta,
            break_even=c.break_even,
            time_limit_s=c.time_limit_s,
        )
        self._denied: dict[str, tuple[int, int]] = {}
        self._asked: dict[str, int] = {}
        self._warned: set[str] = set()

    def keys(self) -> tuple[str, ...]:
        return (self._key,) if self.context.symbol else ()

    def wants(self, event: Event) -> bool:
        """Quotes of what is guarded, and fills that may open something to guard."""
        if isinstance(event, QuoteChanged):
            key = instrument_key(event.symbol, event.venue)
            return key in self.context.guards or (
                key == self._key and self.context.is_single
            )
        return not self.context.is_single

    async def start(self) -> None:
        self._freshness = Freshness(self.desk, self.context.max_age_s)
        if self.context.symbol:
            self.desk.instrument(self.context.symbol, self.context.venue)
        if not self.context.started_ns:
            self.evolve_context(started_ns=self._now())

    async def _handle_executing(self) -> None:
        self.wait(IDLE_S)
        if self.context.is_single:
            await self._guard_own()
        else:
            await self._guard_the_desk()

    # One position of its own ----------------------------------------------------------

    async def _guard_own(self) -> None:
        orders = reached_venue(self.desk.orders())
        entry_side = Side.BUY if self.context.side == "LONG" else Side.SELL
        entries = [o for o in orders if o.request.side is entry_side]
        exits = [o for o in orders if o.request.side is not entry_side]
        if self.context.entry != "none" and not entries:
            await self._enter(entry_side)
            return
        held = self._held(entries, exits)
        if held != self.context.held_quantity:
            self.evolve_context(held_quantity=held)
        guard = self._own_guard(entries, exits)
        entry = progress_of(entries).open
        if guard is None or (held <= 0 and not exits):
            await self._await_entry(entries, entry)
            return
        guard = self._watch(self._key, guard)
        if guard.reason is None:
            if entry and self._entry_is_late():
                await self._cancel(entry[-1])
            return
        if entry and not self._out_of_patience(guard):
            await self._cancel(entry[-1])
            return
        if await self._close(self._key, guard, held, exits) and not entry:
            self._finish_own(guard, held, entries, exits)

    async def _enter(self, side: Side) -> None:
        """Send the one entry; whatever becomes of it, there is no second (H6b)."""
        c = self.context
        quantity = self._instrument(self._key).floor_quantity(c.quantity or ZERO)
        if c.entry == "market" and self._freshness.quote(c.symbol, c.venue) is None:
            return
        await self._send(
            OrderRequest(
                symbol=c.symbol,
                venue=c.venue,
                side=side,
                quantity=quantity,
                type=OrderType.MARKET if c.entry == "market" else OrderType.LIMIT,
                price=None if c.entry == "market" else c.entry_price,
            )
        )

    async def _await_entry(
        self, entries: list[Order], entry: tuple[Order, ...]
    ) -> None:
        if entry:
            if self._entry_is_late():
                await self._cancel(entry[-1])
            return
        reason = entries[-1].status.value if entries else "NOTHING_HELD"
        self.evolve_context(close_reason=f"ENTRY_{reason}" if entries else reason)
        self.desk.alert(
            "warning",
            f"{self._key}: the entry ended as {reason} without a fill; nothing is held, nothing is guarded",
        )
        self._transition(TradingStrategyState.COMPLETED)

    def _held(self, entries: list[Order], exits: list[Order]) -> Decimal:
        """Return what is held, as a positive quantity, from the ledger."""
        given = self.context.quantity if self.context.entry == "none" else ZERO
        sign = 1 if self.context.side == "LONG" else -1
        return (given or ZERO) + sign * net_quantity([*entries, *exits])

    def _own_guard(self, entries: list[Order], exits: list[Order]) -> Guard | None:
        """Return the guard, made anew from the ledger where the context has none or an older entry price."""
        c = self.context
        guard = c.guards.get(self._key)
        price = (
            c.entry_price if c.entry == "none" else progress_of(entries).average_price
        )
        if not price:
            return guard
        if guard is None:
            assert c.side is not None
            # A closing order without a remembered reason: the crash came between the two.
            reason = "RECOVERED" if exits else None
            opened = c.started_ns if c.entry == "none" else entries[0].created_ns
            guard = Guard(
                side=c.side,
                entry_price=price,
                opened_ns=opened,
                reason=reason,
                since_ns=self._now() if reason else 0,
            )
        elif guard.entry_price != price:
            guard = msgspec.structs.replace(guard, entry_price=price)
        self._keep(self._key, guard)
        return guard

    def _finish_own(
        self, guard: Guard, held: Decimal, entries: list[Order], exits: list[Order]
    ) -> None:
        c = self.context
        flow, fees = money_of([*entries, *exits])
        if c.entry == "none":
            flow -= guard.sign * (c.quantity or ZERO) * guard.entry_price
            fees += c.entry_fees
        # What is left over is valued at cost: neither won nor lost yet.
        gross = flow + guard.sign * held * guard.entry_price
        net = gross - fees - c.platform_fee
        share = max(ZERO, net) * c.profit_share
        self._record(self._key, guard, exits, held)
        self.evolve_context(
            close_reason=guard.reason,
            exit_price=progress_of(exits).average_price,
            gross_pnl=gross,
            fees_paid=fees,
            net_pnl=net,
            profit_share_due=share,
            user_pnl=net - share,
        )
        self._transition(TradingStrategyState.COMPLETED)

    def _entry_is_late(self) -> bool:
        limit_s = self.context.entry_timeout_s
        return limit_s is not None and self._now() >= self.context.started_ns + seconds(
            limit_s
        )

    def _out_of_patience(self, guard: Guard) -> bool:
        """Whether the entry's cancel takes so long that what is held must be closed without its proof."""
        return self._now() >= guard.since_ns + seconds(CANCEL_PATIENCE_S)

    # Whatever the desk holds ----------------------------------------------------------

    async def _guard_the_desk(self) -> None:
        held = {
            instrument_key(p.symbol, p.venue): p
            for p in self.desk.positions()
            if p.quantity
        }
        if self.context.symbol:
            held = {key: p for key, p in held.items() if key == self._key}
        orders = reached_venue(self.desk.orders())
        for key in sorted({*held, *self.context.guards}):
            exits = [
                o
                for o in orders
                if instrument_key(o.request.symbol, o.request.venue) == key
            ]
            await self._guard_position(key, held.get(key), exits)

    async def _guard_position(
        self, key: str, position: Position | None, exits: list[Order]
    ) -> None:
        guard = self.context.guards.get(key)
        side: PositionSide = "LONG" if position and position.quantity > 0 else "SHORT"
        if guard is not None and (position is None or guard.side != side):
            mine = [o for o in exits if o.created_ns >= guard.opened_ns]
            self._record(key, guard, mine, ZERO)
            guard = None
        if position is None:
            return
        if guard is None:
            guard = Guard(
                side=side, entry_price=position.average_price, opened_ns=self._now()
            )
        elif guard.entry_price != position.average_price:
            guard = msgspec.structs.replace(guard, entry_price=position.average_price)
        guard = self._watch(key, guard)
        if guard.reason is not None:
            await self._close(key, guard, abs(position.quantity), exits)

    # Both -----------------------------------------------------------------------------

    def _watch(self, key: str, guard: Guard) -> Guard:
        """Move the levels by the newest price, and note the barrier it has hit."""
        symbol, _, venue = key.rpartition("@")
        quote = self._freshness.quote(symbol, venue)
        if quote is not None and guard.reason is None:
            price = exit_price(guard, quote)
            guard = follow(guard, self._barriers, price)
            reason = barrier_due(guard, self._barriers, price, self._now())
            if reason is not None:
                guard = msgspec.structs.replace(
                    guard, reason=reason, since_ns=self._now()
                )
                self.desk.alert(
                    "info", f"{key}: {reason} at {price}, entry {guard.entry_price}"
                )
        self._keep(key, guard)
        return guard

    async def _close(
        self, key: str, guard: Guard, held: Decimal, exits: list[Order]
    ) -> bool:
        """Send the one closing order; return True when nothing is left that could be closed."""
        if progress_of(exits).open:
            return False  # its end is awaited, however many prices pass
        instrument = self._instrument(key)
        quote = self.desk.price(instrument.symbol, instrument.venue)
        price = exit_price(guard, quote) if quote is not None else guard.entry_price
        quantity = instrument.floor_quantity(min(held, instrument.max_quantity))
        if not instrument.is_tradable(quantity, price):
            if held > 0:
                self._warn_once(key, f"{key}: {held} left are too little to close")
            return True
        if self._rested(key, exits):
            await self.desk.checkpoint()
            await self._send(
                OrderRequest(
                    symbol=instrument.symbol,
                    venue=instrument.venue,
                    side=guard.entry_side.opposite,
                    quantity=quantity,
                    type=OrderType.MARKET,
                    reduce_only=self.context.reduce_only,
                )
            )
        return False

    def _rested(self, key: str, exits: list[Order]) -> bool:
        """Return whether the last refusal is long enough ago; a position that cannot be closed is critical."""
        refused = len(trailing_refusals(exits))
        denied, due_ns = self._denied.get(key, (0, 0))
        if refused:
            delay_s = growing_delay_s(refused, most=5.0)
            due_ns = max(due_ns, exits[-1].updated_ns + seconds(delay_s))
        if refused or denied:
            text = f"{key}: the closing order was refused {refused + denied} times; it is tried again"
            self._warn_once(f"close|{key}", text, "critical")
        if self._now() < due_ns:
            self.wait(min(IDLE_S, (due_ns - self._now()) / 1e9))
            return False
        return True

    async def _send(self, request: OrderRequest) -> None:
        key = instrument_key(request.symbol, request.venue)
        try:
            order = await self.desk.submit(request)
        except OrderDeniedError as denied:
            count = self._denied.get(key, (0, 0))[0] + 1
            delay_ns = seconds(growing_delay_s(count, most=5.0))
            self._denied[key] = (count, self._now() + delay_ns)
            self._warn_once(f"denied|{key}|{denied.code}", str(denied))
            self.wait(0.0)
            return
        self._denied.pop(key, None)
        if order.status.is_terminal:
            self.wait(0.0)

    async def _cancel(self, order: Order) -> None:
        if order.status not in LIVE or self._now() < self._asked.get(
            order.client_order_id, 0
        ):
            return
        self._asked[order.client_order_id] = self._now() + seconds(1.0)
        order = await self.desk.cancel(order.client_order_id)
        if order.status.is_terminal:
            self.wait(0.0)

    def _keep(self, key: str, guard: Guard) -> None:
        if self.context.guards.get(key) != guard:
            self.evolve_context(guards={**self.context.guards, key: guard})

    def _record(
        self, key: str, guard: Guard, exits: list[Order], residual: Decimal
    ) -> None:
        done = progress_of(exits)
        closed = ClosedPosition(
            key=key,
            side=guard.side,
            reason=guard.reason or "CLOSED_ELSEWHERE",
            entry_price=guard.entry_price,
            exit_price=done.average_price,
            quantity=done.filled,
            residual=residual,
            ts_ns=self._now(),
        )
        left = {k: g for k, g in self.context.guards.items() if k != key}
        self.evolve_context(
            guards=left, closed=[*self.context.closed, closed][-MAX_CLOSED:]
        )

    def _warn_once(self, about: str, text: str, level: str = "warning") -> None:
        if about not in self._warned:
            self._warned.add(about)
            self.desk.alert(level, text)

    def _instrument(self, key: str) -> Instrument:
        symbol, _, venue = key.rpartition("@")
        return self.desk.instrument(symbol, venue)

    @property
    def _key(self) -> str:
        return instrument_key(self.context.symbol, self.context.venue)

    def _now(self) -> int:
        return self.desk.clock.now_ns()

    def _validate(self) -> None:
        c = self.context
        single = c.quantity is not None or c.side is not None or c.entry != "none"
        priced = c.entry == "market" or c.entry_price is not None
        claims = {
            "symbol": (
                bool(c.symbol) == bool(c.venue) and (bool(c.symbol) or not single),
                c.symbol,
                "a pair together with `venue`, or neither",
            ),
            "side": (not single or c.side is not None, c.side, "LONG or SHORT"),
            "quantity": (
                not single or (c.quantity is not None and c.quantity > 0),
                c.quantity,
                "more than 0",
            ),
            "entry_price": (
                (not single or priced) and (c.entry_price is None or c.entry_price > 0),
                c.entry_price,
                "a price more than 0, unless the entry is at market",
            ),
            "trailing_delta": (
                (c.trailing_delta is None) == (c.trailing_activation is None),
                c.trailing_delta,
                "to stand together with `trailing_activation`",
            ),
            "profit_share": (
                0 <= c.profit_share < 1,
                c.profit_share,
                "a ratio from 0 to below 1",
            ),
            "max_age_s": (c.max_age_s > 0, c.max_age_s, "more than 0"),
        }
        for name in (
            "stop_loss",
            "take_profit",
            "trailing_activation",
            "trailing_delta",
            "break_even",
        ):
            value = getattr(c, name)
            if value is not None and not 0 < value < 100:
                claims[name] = (False, value, "a positive ratio such as 0.05 for 5 %")
        check(f"PositionMonitorTask {c.task_id!r}", claims)
