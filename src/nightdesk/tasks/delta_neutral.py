"""Buy on one venue and sell on another, and never stand on one leg.

Comes from: kernel/runner.py
Goes to: orders/protocol.py
"""

import asyncio
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, ClassVar, Literal

import msgspec

from nightdesk.abc import Task
from nightdesk.errors import OrderDeniedError
from nightdesk.model.context import TaskContext, TradingStrategyState
from nightdesk.model.events import Event, QuoteChanged
from nightdesk.model.instrument import Instrument, instrument_key
from nightdesk.model.order import Order, OrderRequest, OrderType, Side
from nightdesk.model.priority import Priority
from nightdesk.tasks._execution import (
    LIVE,
    ZERO,
    Freshness,
    Progress,
    Refusal,
    as_side,
    check,
    growing_delay_s,
    pegged_price,
    progress_of,
    reached_venue,
    seconds,
    trailing_refusals,
)
from nightdesk.tasks._legs import (
    coarser_lot,
    money_of,
    net_edge,
    net_quantity,
    only_reduces,
)

__all__ = ["DeltaNeutralContext", "DeltaNeutralTask"]

SYNCING = "SYNCING"
ANALYZING = "ANALYZING"
REBALANCING = "REBALANCING"
MANAGING_ORDERS = "MANAGING_ORDERS"
COMPLETING = "COMPLETING"
IDLE_S = 1.0
SLOWEST_RETRY_S = 5.0


class DeltaNeutralContext(TaskContext, kw_only=True):
    """Two legs and how far each came.

    Attributes:
        symbol: Traded on both venues.
        venues: Where to BUY and where to SELL.
        total_quantity, order_quantity: Of each leg, base units; children of the second size.
        offset_ticks, tick_tolerance: Per side, as for an iceberg.
        maker_side: Work only this leg by limit orders; the other one only hedges.
        max_imbalance: Base units by which the legs may differ before the lagging one is completed at market.
        max_naked_s: A tradable imbalance older than this means that the lagging leg is dead.
        max_leg_retries: So many refusals in a row mean the same.
        on_leg_failure: `unwind` reverses the filled leg, `hedge` keeps trying, `hold` keeps it and reports.
        min_profitability: Net edge after taker fees below which nothing new is opened; None: no condition.
        direction: LONG, SHORT or NONE: the side on which the desk stands at the moment.
        delta: Bought minus sold, less base fees.
        residual_delta: The delta that could not be traded away at the end.
        failed_leg: The side that was given up.
        close_reason: COMPLETED, UNWOUND, HELD, LEG_REJECTED or TIME_LIMIT.
    """

    symbol: str
    venues: dict[Side, str]
    total_quantity: Decimal
    order_quantity: Decimal
    offset_ticks: dict[Side, int] = msgspec.field(
        default_factory=lambda: dict.fromkeys(Side, 0)
    )
    tick_tolerance: dict[Side, int] = msgspec.field(
        default_factory=lambda: dict.fromkeys(Side, 1)
    )
    maker_side: Side | None = None
    max_imbalance: Decimal = ZERO
    max_naked_s: float = 5.0
    max_leg_retries: int = 3
    on_leg_failure: Literal["unwind", "hedge", "hold"] = "unwind"
    min_profitability: Decimal | None = None
    max_age_s: float = 10.0
    time_limit_s: float | None = None
    filled_quantity: dict[Side, Decimal] = msgspec.field(
        default_factory=lambda: dict.fromkeys(Side, ZERO)
    )
    avg_price: dict[Side, Decimal] = msgspec.field(
        default_factory=lambda: dict.fromkeys(Side, ZERO)
    )
    order_id: dict[Side, str | None] = msgspec.field(
        default_factory=lambda: dict.fromkeys(Side)
    )
    direction: str = "NONE"
    delta: Decimal = ZERO
    residual_delta: Decimal = ZERO
    gross_pnl: Decimal = ZERO
    fees_paid: Decimal = ZERO
    net_pnl: Decimal = ZERO
    failed_leg: Side | None = None
    naked_since_ns: int = 0
    started_ns: int = 0
    close_reason: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("venues", "offset_ticks", "tick_tolerance"):
            mapping = getattr(self, name)
            setattr(self, name, {as_side(k): v for k, v in mapping.items()})


class DeltaNeutralTask(Task[DeltaNeutralContext]):
    """Work both legs by limit orders and complete the lagging one at market (T-9 to T-15).

    SYNCING takes stock of the ledger and rests while there is nothing to do; ANALYZING decides;
    REBALANCING, MANAGING_ORDERS and COMPLETING act. What an open order may still execute is never
    hedged a second time: its end is awaited first.
    """

    context_class: ClassVar[type[TaskContext]] = DeltaNeutralContext
    priority: ClassVar[Priority] = Priority.HIGH
    listens: ClassVar[tuple[type[Event], ...]] = (QuoteChanged,)

    def __init__(self, context: DeltaNeutralContext) -> None:
        super().__init__(context)
        self._validate()
        self._asked: dict[str, int] = {}
        self._denied: dict[str, tuple[int, int]] = {}
        self._alerted: set[str] = set()

    def keys(self) -> tuple[str, ...]:
        return tuple(
            instrument_key(self.context.symbol, self.context.venues[side])
            for side in Side
        )

    def watches(self) -> tuple[str, ...]:
        return self.keys()

    def wants(self, event: Event) -> bool:
        """Only quotes of the two legs concern this task."""
        return (
            isinstance(event, QuoteChanged)
            and event.symbol == self.context.symbol
            and event.venue in self.context.venues.values()
        )

    def get_extended_state_handlers(self) -> Mapping[Any, str]:
        return {
            SYNCING: "_handle_syncing",
            ANALYZING: "_handle_analyzing",
            REBALANCING: "_handle_rebalancing",
            MANAGING_ORDERS: "_handle_managing_orders",
            COMPLETING: "_handle_completing",
        }

    async def start(self) -> None:
        c = self.context
        self._instruments: dict[Side, Instrument] = {
            side: self.desk.instrument(c.symbol, c.venues[side]) for side in Side
        }
        self._target = coarser_lot(c.total_quantity, *self._instruments.values())
        self._freshness = Freshness(self.desk, c.max_age_s)
        self._take_stock()

    # States -------------------------------------------------------------------------

    async def _handle_idle(self) -> None:
        if not self.context.started_ns:
            self.evolve_context(started_ns=self._now())
        self._transition(SYNCING)

    async def _handle_executing(self) -> None:
        self._transition(SYNCING)

    async def _handle_adjusting(self) -> None:
        self._transition(SYNCING)

    async def _handle_syncing(self) -> None:
        self._take_stock()
        if self._plan() is None:
            self.wait(IDLE_S)
        else:
            self._transition(ANALYZING)

    async def _handle_analyzing(self) -> None:
        self._take_stock()
        self._transition(self._plan() or SYNCING)

    async def _handle_rebalancing(self) -> None:
        self._take_stock()
        lagging = self._lagging()
        if lagging is not None:
            if self.context.failed_leg is None and self._leg_is_dead(lagging):
                self._give_up(lagging)
            if self.context.failed_leg is None:
                await self._complete_leg(lagging)
            elif self.context.on_leg_failure == "unwind":
                await self._unwind(lagging)
        self._rest()

    async def _handle_managing_orders(self) -> None:
        self._take_stock()
        closing = self._is_closing() or not self._may_open()
        acts = [
            act
            for side in Side
            if (act := self._act_on(side, closing=closing)) is not None
        ]
        await asyncio.gather(*acts)
        self._rest()

    async def _handle_completing(self) -> None:
        self._take_stock()
        if self._plan() != COMPLETING:  # a late fill
            self._rest()
            return
        c = self.context
        reason = c.close_reason or "COMPLETED"
        if c.delta:
            self.desk.alert(
                "warning",
                f"{c.symbol}: ended ({reason}) with a residual delta of {c.delta:+f}, too little to trade"
                if reason != "HELD"
                else f"{c.symbol}: ended with a delta of {c.delta:+f}, held by policy",
            )
        self.evolve_context(residual_delta=c.delta, close_reason=reason)
        self._transition(TradingStrategyState.COMPLETED)

    def _rest(self) -> None:
        """Back to SYNCING: at once if the act already has a result, else when something happens."""
        self._take_stock()
        again = self._plan() is not None and not self._blocked()
        self._transition(SYNCING)
        self.wait(0.0 if again else min(IDLE_S, self._shortest_wait_s()))

    # Stock --------------------------------------------------------------------------

    def _take_stock(self) -> None:
        """Derive both legs from the ledger; the context is only their copy."""
        orders = reached_venue(self.desk.orders())
        c = self.context
        self._orders = {
            s: [o for o in orders if o.request.venue == c.venues[s]] for s in Side
        }
        self._legs: dict[Side, Progress] = {
            side: progress_of(o for o in self._orders[side] if o.request.side is side)
            for side in Side
        }
        delta = net_quantity(orders)
        flow, fees = money_of(orders)
        last = {
            s: self._orders[s][-1].client_order_id if self._orders[s] else None
            for s in Side
        }
        changes: dict[str, Any] = {
            "filled_quantity": {s: self._legs[s].filled for s in Side},
            "avg_price": {s: self._legs[s].average_price for s in Side},
            "order_id": last,
            "delta": delta,
            "direction": "NONE" if not delta else "LONG" if delta > 0 else "SHORT",
            "gross_pnl": flow,
            "fees_paid": fees,
            "net_pnl": flow - fees,
            "naked_since_ns": self._naked_since(delta),
            **self._given_up(),
        }
        changed = {k: v for k, v in changes.items() if getattr(c, k) != v}
        if changed:
            self.evolve_context(**changed)
        self._watch_time()

    def _given_up(self) -> dict[str, Any]:
        """Return the decision to unwind, if the ledger shows that it was made: the context may be older."""
        if self.context.failed_leg is not None:
            return {}
        for side in Side:
            if any(o.request.side is not side for o in self._orders[side]):
                return {"failed_leg": side.opposite, "close_reason": "UNWOUND"}
        return {}

    def _naked_since(self, delta: Decimal) -> int:
        lagging = self._lagging_side(delta)
        if lagging is None or not self._tradable(lagging, abs(delta)):
            return 0
        if abs(delta) <= self.context.max_imbalance:
            return 0
        return self.context.naked_since_ns or self._now()

    def _watch_time(self) -> None:
        limit_s = self.context.time_limit_s
        if limit_s is None or self.context.close_reason or not self.context.started_ns:
            return
        if self._now() >= self.context.started_ns + seconds(limit_s):
            self.evolve_context(close_reason="TIME_LIMIT")

    # Decisions ----------------------------------------------------------------------

    def _plan(self) -> str | None:
        """Return the state that has work to do, or None."""
        if self._must_rebalance():
            return REBALANCING
        closing = self._is_closing() or not self._may_open()
        if any(self._wish(side, closing=closing) for side in Side):
            return MANAGING_ORDERS
        if self._open_orders():
            return None
        if self._is_closing() or all(self._next_quantity(s) == 0 for s in Side):
            return COMPLETING
        return None

    def _must_rebalance(self) -> bool:
        lagging = self._lagging()
        if lagging is None or self.context.close_reason == "HELD":
            return False
        if abs(self.context.delta) > self.context.max_imbalance:
            return True
        # Within the tolerance nothing is forced, until no limit order is left that could settle it.
        nothing_comes = self._is_closing() or all(
            self._next_quantity(s) == 0 for s in Side
        )
        return nothing_comes and not self._open_orders()

    def _is_closing(self) -> bool:
        return self.context.close_reason is not None

    def _lagging_side(self, delta: Decimal) -> Side | None:
        if not delta:
            return None
        return Side.SELL if delta > 0 else Side.BUY

    def _lagging(self) -> Side | None:
        """Return the side that must still trade, if the difference is tradable at all there."""
        side = self._lagging_side(self.context.delta)
        if side is None:
            return None
        venue_side = side.opposite if self.context.failed_leg is not None else side
        return side if self._tradable(venue_side, abs(self.context.delta)) else None

    def _tradable(self, side: Side, quantity: Decimal) -> bool:
        instrument = self._instruments[side]
        quote = self.desk.price(self.context.symbol, self.context.venues[side])
        price = (
            (quote.bid if side is Side.SELL else quote.ask)
            if quote is not None
            else max(self._legs[s].average_price for s in Side)
        )
        return instrument.is_tradable(instrument.floor_quantity(quantity), price)

    def _leg_is_dead(self, side: Side) -> bool:
        if self.context.on_leg_failure == "hedge":
            return False
        refusals = trailing_refusals(self._orders[side])
        refused = (
            len(refusals) if refusals and refusals[0] is not Refusal.POST_ONLY else 0
        )
        denied = self._denied.get(self.context.venues[side], (0, 0))[0]
        since = self.context.naked_since_ns
        too_long = since and self._now() >= since + seconds(self.context.max_naked_s)
        return max(refused, denied) >= self.context.max_leg_retries or bool(too_long)

    def _give_up(self, side: Side) -> None:
        c = self.context
        reason = "UNWOUND" if c.on_leg_failure == "unwind" else "HELD"
        self.evolve_context(failed_leg=side, close_reason=reason)
        self.desk.alert(
            "critical",
            f"{c.symbol}: the {side} leg on {c.venues[side]} does not come; a delta of {c.delta:+f} is "
            + ("unwound" if reason == "UNWOUND" else "held"),
        )

    def _may_open(self) -> bool:
        """Return whether both prices are fresh and the edge suffices."""
        quotes = {
            s: self._freshness.quote(self.context.symbol, self.context.venues[s])
            for s in Side
        }
        buy, sell = quotes[Side.BUY], quotes[Side.SELL]
        if buy is None or sell is None:
            return False
        least = self.context.min_profitability
        if least is None:
            return True
        edge = net_edge(
            buy.ask,
            self._instruments[Side.BUY].taker_fee,
            sell.bid,
            self._instruments[Side.SELL].taker_fee,
        )
        return edge >= least

    # Limit orders -------------------------------------------------------------------

    def _wish(self, side: Side, *, closing: bool) -> str | None:
        """Return `cancel`, `send` or None for the limit order of `side`."""
        child = self._legs[side].open
        if child:
            return (
                "cancel"
                if self._must_cancel(side, child[-1], closing=closing)
                else None
            )
        if closing or (
            self._legs[side.opposite].open and self._other_side_unsure(side)
        ):
            return None
        if self._next_quantity(side) and self._rested(side):
            return "send"
        if self._refused_too_often(side) and not self.context.delta:
            return "send"  # `_act_on` ends the task instead
        return None

    def _must_cancel(self, side: Side, order: Order, *, closing: bool) -> bool:
        if order.status not in LIVE or self._now() < self._asked.get(
            order.client_order_id, 0
        ):
            return False
        if order.request.price is None:
            return False
        fresh = self._freshness.quote(self.context.symbol, self.context.venues[side])
        if closing:
            # An old price is no reason to cancel; a poor edge or the end of the task is.
            return self._is_closing() or fresh is not None
        if fresh is None:
            return False
        tolerance = self.context.tick_tolerance.get(side, 1)
        allowed = tolerance * self._instruments[side].tick_size
        return abs(self._price(side, fresh) - order.request.price) > allowed

    def _other_side_unsure(self, side: Side) -> bool:
        """Whether an order of the other leg has an unknown fate: nothing new is opened meanwhile (T-13)."""
        return any(o.status.value == "UNKNOWN" for o in self._legs[side.opposite].open)

    def _act_on(self, side: Side, *, closing: bool) -> Any:
        wish = self._wish(side, closing=closing)
        if wish == "cancel":
            return self._cancel(self._legs[side].open[-1])
        if wish != "send":
            return None
        if self._refused_too_often(side):
            return self._end_before_it_began(side)
        return self._send_child(side)

    async def _send_child(self, side: Side) -> None:
        quote = self._freshness.quote(self.context.symbol, self.context.venues[side])
        if quote is None:
            return
        quantity = self._next_quantity(side)
        request = OrderRequest(
            symbol=self.context.symbol,
            venue=self.context.venues[side],
            side=side,
            quantity=quantity,
            price=self._price(side, quote),
            post_only=self.context.offset_ticks.get(side, 0) >= 0,
        )
        await self._send(request)

    async def _end_before_it_began(self, side: Side) -> None:
        """A leg that is refused again and again while the desk stands on none: stop quoting the other."""
        venue = self.context.venues[side]
        self.evolve_context(failed_leg=side, close_reason="LEG_REJECTED")
        self.desk.alert(
            "critical",
            f"{venue} refuses the {side} leg; nothing is open, the task ends",
        )

    def _refused_too_often(self, side: Side) -> bool:
        refusals = trailing_refusals(self._orders[side])
        return (
            len(refusals) >= self.context.max_leg_retries
            and refusals[0] is not Refusal.POST_ONLY
        )

    def _next_quantity(self, side: Side) -> Decimal:
        """Return the next child of `side`: at most one child ahead of the other leg, 0 if none is due."""
        if self.context.maker_side not in (None, side):
            return ZERO
        instrument = self._instruments[side]
        filled = self._legs[side].filled
        left = self._leg_target(side) - filled
        ahead = self.context.order_quantity
        if self.context.maker_side is None:
            other = self._legs[side.opposite].filled
            ahead -= max(ZERO, filled - other)
        quantity = instrument.floor_quantity(min(left, ahead))
        if quantity <= 0 or not self._tradable(side, quantity):
            return ZERO
        tail = left - quantity
        return (
            instrument.floor_quantity(left)
            if tail > 0 and not self._tradable(side, tail)
            else quantity
        )

    def _leg_target(self, side: Side) -> Decimal:
        """Return how much the leg is to trade: the SELL leg only what arrives after fees in the base asset."""
        if side is Side.BUY:
            return self._target
        bought = self._legs[Side.BUY]
        instrument = self._instruments[Side.BUY]
        rate = instrument.maker_fee if instrument.fee_in == "base" else ZERO
        arrived = net_quantity(
            o for o in self._orders[Side.BUY] if o.request.side is Side.BUY
        )
        to_come = max(ZERO, self._target - bought.filled) * (1 - rate)
        return min(
            self._target, self._instruments[side].floor_quantity(arrived + to_come)
        )

    def _price(self, side: Side, quote: QuoteChanged) -> Decimal:
        offset = self.context.offset_ticks.get(side, 0)
        refused = len(trailing_refusals(self._orders[side]))
        return pegged_price(
            self._instruments[side],
            side,
            quote,
            offset + refused,
            post_only=offset >= 0,
        )

    # Market orders ------------------------------------------------------------------

    async def _complete_leg(self, side: Side) -> None:
        """Cancel what still works on the lagging side, await its end, then send the difference at market."""
        if self._legs[side].open:
            await self._clear(self._legs[side].open)
        elif self._rested(side):
            await self._send(self._market(side, side))

    async def _unwind(self, lagging: Side) -> None:
        """Reverse the filled leg where it was filled. An open order of the dead leg may still hedge: it comes first."""
        if self._open_orders():
            await self._clear(self._open_orders())
        elif self._rested(lagging.opposite):
            await self._send(self._market(lagging, lagging.opposite))

    def _market(self, side: Side, where: Side) -> OrderRequest:
        symbol, venue = self.context.symbol, self.context.venues[where]
        quantity = self._instruments[where].floor_quantity(abs(self.context.delta))
        return OrderRequest(
            symbol=symbol,
            venue=venue,
            side=side,
            quantity=quantity,
            type=OrderType.MARKET,
            reduce_only=only_reduces(self.desk, symbol, venue, side, quantity),
        )

    async def _clear(self, orders: tuple[Order, ...]) -> None:
        for order in orders:
            if order.status in LIVE and self._now() >= self._asked.get(
                order.client_order_id, 0
            ):
                await self._cancel(order)
        self._alert_if_stuck()

    def _alert_if_stuck(self) -> None:
        since = self.context.naked_since_ns
        if not since or self._now() < since + seconds(self.context.max_naked_s):
            return
        if "stuck" not in self._alerted:
            self._alerted.add("stuck")
            self.desk.alert(
                "critical",
                f"{self.context.symbol}: a delta of {self.context.delta:+f} waits for the proof of "
                f"{', '.join(o.client_order_id for o in self._open_orders())}",
            )

    # Acts ---------------------------------------------------------------------------

    async def _send(self, request: OrderRequest) -> None:
        count, _ = self._denied.get(request.venue, (0, 0))
        try:
            order = await self.desk.submit(request)
        except OrderDeniedError as denied:
            delay_ns = seconds(growing_delay_s(count + 1, most=SLOWEST_RETRY_S))
            self._denied[request.venue] = (count + 1, self._now() + delay_ns)
            if not count:
                self.desk.alert("warning", str(denied))
            return
        self._denied.pop(request.venue, None)
        self._ended_unfilled(order)

    def _ended_unfilled(self, order: Order) -> None:
        """A market order that ended without a fill is not repeated at once."""
        if order.status.is_terminal and not order.filled_quantity:
            due = self._now() + seconds(0.25)
            self._denied.setdefault(order.request.venue, (0, due))

    async def _cancel(self, order: Order) -> None:
        self._asked[order.client_order_id] = self._now() + seconds(1.0)
        await self.desk.cancel(order.client_order_id)

    def _rested(self, side: Side) -> bool:
        """Return whether the last refusal on the venue of `side` is long enough ago."""
        return self._due_ns(side) <= self._now()

    def _due_ns(self, side: Side) -> int:
        refusals = trailing_refusals(self._orders[side])
        due = self._denied.get(self.context.venues[side], (0, 0))[1]
        if refusals:
            delay_s = growing_delay_s(len(refusals), most=SLOWEST_RETRY_S)
            due = max(due, self._orders[side][-1].updated_ns + seconds(delay_s))
        return due

    def _blocked(self) -> bool:
        """Whether what is planned has to wait: for a venue's word, or for a delay."""
        if any(o.status not in LIVE for o in self._open_orders()):
            return True
        if any(
            self._now() < self._asked.get(o.client_order_id, 0)
            for o in self._open_orders()
        ):
            return True
        return any(not self._rested(side) for side in Side)

    def _shortest_wait_s(self) -> float:
        waits = [self._due_ns(side) - self._now() for side in Side]
        return min([w / 1e9 for w in waits if w > 0], default=IDLE_S)

    def _open_orders(self) -> tuple[Order, ...]:
        return tuple(o for side in Side for o in self._orders[side] if o.status.is_open)

    def _now(self) -> int:
        return self.desk.clock.now_ns()

    def _validate(self) -> None:
        c = self.context
        venues = set(c.venues.values())
        check(
            f"DeltaNeutralTask {c.task_id!r}",
            {
                "symbol": ("/" in c.symbol, c.symbol, "a pair such as BTC/USDT"),
                "venues": (
                    set(c.venues) == set(Side) and len(venues) == 2,
                    dict(c.venues),
                    "one venue for BUY and another for SELL",
                ),
                "total_quantity": (
                    c.total_quantity > 0,
                    c.total_quantity,
                    "more than 0",
                ),
                "order_quantity": (
                    c.order_quantity > 0,
                    c.order_quantity,
                    "more than 0",
                ),
                "max_imbalance": (c.max_imbalance >= 0, c.max_imbalance, "0 or more"),
                "max_naked_s": (c.max_naked_s > 0, c.max_naked_s, "more than 0"),
                "max_leg_retries": (
                    c.max_leg_retries >= 1,
                    c.max_leg_retries,
                    "at least 1",
                ),
                "max_age_s": (c.max_age_s > 0, c.max_age_s, "more than 0"),
                "time_limit_s": (
                    c.time_limit_s is None or c.time_limit_s > 0,
                    c.time_limit_s,
                    "more than 0",
                ),
            },
        )
