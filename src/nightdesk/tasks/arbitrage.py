"""Take price gaps between two venues, and follow swaps that moved a pool.

Comes from: kernel/switch.py
Goes to: orders/protocol.py
"""

import asyncio
from collections import Counter
from decimal import Decimal
from typing import Any, ClassVar, Literal

import msgspec

from nightdesk.abc import OpportunityHandler
from nightdesk.errors import OrderDeniedError
from nightdesk.model.context import TaskContext, TradingStrategyState
from nightdesk.model.events import Event, Opportunity, PoolSwap, QuoteChanged
from nightdesk.model.instrument import Instrument, instrument_key
from nightdesk.model.order import Order, OrderRequest, OrderType, Side, TimeInForce
from nightdesk.model.priority import Priority
from nightdesk.tasks._execution import (
    LIVE,
    ZERO,
    check,
    crossing_price,
    growing_delay_s,
    progress_of,
    reached_venue,
    seconds,
)
from nightdesk.tasks._following import PoolFollower
from nightdesk.tasks._gaps import Gap, PoolRules, RecentlySeen, best_gap
from nightdesk.tasks._legs import money_of, net_quantity, only_reduces, to_ppm

__all__ = ["ArbitrageContext", "ArbitrageTask", "Decision", "Leg"]

IDLE_S = 1.0
MAX_DECISIONS = 50
MAX_REASONS = 64


class Leg(msgspec.Struct, frozen=True, kw_only=True):
    """One leg of the newest trade, as the ledger has it."""

    venue: str
    side: Side
    quantity: Decimal
    filled: Decimal
    average_price: Decimal | None
    status: str


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One opportunity that reached the handler, and what was made of it."""

    ts_ns: int
    about: str
    edge_ppm: int
    outcome: str


class ArbitrageContext(TaskContext, kw_only=True):
    """Which gaps to take, and what came of them.

    Attributes:
        symbol, venues: One instrument at two venues.
        quantity: Most base units of one trade; the books must show as much as is traded.
        min_profitability: Least net edge after taker fees, as a ratio.
        slippage_buffer: How much worse than seen each leg may be executed.
        cooldown_s: One gap is one opportunity: the next one counts after this long.
        on_leg_failure: `unwind` reverses the leg that filled, `hedge` completes the other one, `hold` keeps it.
        max_leg_retries: Attempts per venue to repair a difference; after both, the task pauses.
        max_naked_s: An order without proof for longer is a critical alert.
        pools, pairs: Verified pools as `chain:address`, and allowed pairs.
        pool_fee, fixed_cost_usd, trade_usd: Cost of acting on a swap of `trade_usd`.
        hedge_symbol, hedge_venue, hedge_quantity: Where a swap is followed; without them it is only recorded.
        hedge_hold_s: A followed swap is closed again after this long.
        taken, observed: Trades, and opportunities for which there was no venue.
        refused: Reason to count.
        carried: Difference that was kept by policy.
        residual_delta: Difference too small to trade.
        realized_pnl: After fees, in quote units; includes the followed swaps.
    """

    symbol: str
    venues: tuple[str, str]
    quantity: Decimal
    min_profitability: Decimal = Decimal("0.001")
    slippage_buffer: Decimal = Decimal("0.0005")
    cooldown_s: float = 5.0
    max_age_s: float = 2.0
    on_leg_failure: Literal["unwind", "hedge", "hold"] = "unwind"
    max_leg_retries: int = 3
    max_naked_s: float = 5.0
    pools: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    min_impact_ppm: int = 5_000
    min_liquidity_usd: Decimal = Decimal("100000")
    min_value_usd: Decimal = Decimal("1000")
    pool_fee: Decimal = Decimal("0.003")
    fixed_cost_usd: Decimal = Decimal("0.2")
    trade_usd: Decimal = Decimal("1000")
    hedge_symbol: str | None = None
    hedge_venue: str | None = None
    hedge_quantity: Decimal | None = None
    hedge_hold_s: float = 30.0
    taken: int = 0
    observed: int = 0
    refused: dict[str, int] = msgspec.field(default_factory=dict)
    decisions: list[Decision] = msgspec.field(default_factory=list)
    last_legs: list[Leg] = msgspec.field(default_factory=list)
    last_edge_ppm: int = 0
    carried: Decimal = ZERO
    residual_delta: Decimal = ZERO
    realized_pnl: Decimal = ZERO
    repairs: int = 0
    forgiven_order: str | None = None
    pause_reason: str | None = None


class ArbitrageTask(OpportunityHandler[ArbitrageContext]):
    """Buy where it is cheap and sell where it is dear, both legs at once, and never keep one of them unseen.

    `assess` finds the gap, `handle` sends both legs, and `step` repairs: it derives the difference of
    all own orders from the ledger, so a crash between two legs is found and closed after the start.
    """

    context_class: ClassVar[type[TaskContext]] = ArbitrageContext
    priority: ClassVar[Priority] = Priority.CRITICAL
    handles: ClassVar[tuple[type[Event], ...]] = (QuoteChanged, PoolSwap)
    deadline_s: float = 1.0

    def __init__(self, context: ArbitrageContext) -> None:
        super().__init__(context)
        self._validate()
        self._instruments: dict[str, Instrument] = {}
        self._quotes: dict[str, QuoteChanged] = {}
        self._refused: Counter[str] = Counter()
        self._seen = RecentlySeen()
        self._ready_ns: dict[str, int] = {}
        self._busy = False
        self._denials = 0
        self._retry_ns = 0
        self._asked: set[str] = set()
        self._rules: PoolRules | None = None

    def keys(self) -> tuple[str, ...]:
        c = self.context
        own = [instrument_key(c.symbol, venue) for venue in c.venues]
        if c.hedge_symbol and c.hedge_venue:
            own.append(instrument_key(c.hedge_symbol, c.hedge_venue))
        return tuple(own)

    async def start(self) -> None:
        c = self.context
        self._follower = PoolFollower(
            self.desk,
            symbol=c.hedge_symbol,
            venue=c.hedge_venue,
            quantity=c.hedge_quantity,
            hold_s=c.hedge_hold_s,
            slippage_buffer=c.slippage_buffer,
            max_age_s=c.max_age_s,
        )
        self._rules = PoolRules(
            pools=frozenset(pool.lower() for pool in c.pools),
            pairs=frozenset(c.pairs),
            min_impact_ppm=c.min_impact_ppm,
            min_liquidity_usd=c.min_liquidity_usd,
            min_value_usd=c.min_value_usd,
            # A followed swap is entered and left again at the hedge venue.
            costs_ppm=PoolRules.costs(
                c.pool_fee,
                2 * self._follower.taker_fee,
                c.slippage_buffer,
                fixed_usd=c.fixed_cost_usd,
                trade_usd=c.trade_usd,
            ),
            least_edge_ppm=to_ppm(c.min_profitability),
        )
        self._instruments = {v: self.desk.instrument(c.symbol, v) for v in c.venues}

    # Finding --------------------------------------------------------------------------

    def assess(self, event: Event) -> int | None:
        if not self._instruments:
            return None
        if isinstance(event, QuoteChanged):
            return self._assess_quote(event)
        if isinstance(event, PoolSwap):
            return self._assess_swap(event)
        return None

    def _assess_quote(self, quote: QuoteChanged) -> int | None:
        if quote.symbol != self.context.symbol or quote.venue not in self._instruments:
            return None
        self._quotes[quote.venue] = quote
        gap = self._gap()
        if gap is None or not self._is_ready("gap"):
            return None
        return to_ppm(gap.edge)

    def _assess_swap(self, swap: PoolSwap) -> int | None:
        assert self._rules is not None
        # The same swap is told twice, unconfirmed and confirmed; it is one opportunity.
        if not self._seen.add(f"{swap.chain}|{swap.transaction_hash}|{swap.log_index}"):
            return None
        edge, reason = self._rules.judge(swap)
        if reason is None and not self._is_ready(f"{swap.chain}:{swap.pool}"):
            reason = "cooling_down"
        if reason is not None:
            self._refuse(reason)
            return None
        return edge

    def _gap(self) -> Gap | None:
        c = self.context
        return best_gap(
            self._quotes,
            self._instruments,
            c.quantity,
            c.min_profitability,
            c.max_age_s,
            self._now(),
        )

    def _is_ready(self, what: str) -> bool:
        """Return whether the cooldown of `what` is over, and begin it anew if so."""
        now = self._now()
        if now < self._ready_ns.get(what, 0):
            return False
        if len(self._ready_ns) > MAX_REASONS:
            self._ready_ns = {k: v for k, v in self._ready_ns.items() if v > now}
        self._ready_ns[what] = now + seconds(self.context.cooldown_s)
        return True

    # Acting ---------------------------------------------------------------------------

    async def handle(self, opportunity: Opportunity) -> None:
        self._busy = True
        try:
            outcome = await self._take(opportunity)
            self._decide(opportunity, outcome)
        finally:
            self._busy = False

    async def _take(self, opportunity: Opportunity) -> str:
        """Act on it; return `taken`, `observed`, or the reason of a refusal."""
        if self.context.state == TradingStrategyState.PAUSED:
            return "paused"
        if isinstance(opportunity.cause, PoolSwap):
            return await self._follower.follow(opportunity.cause)
        gap = self._gap()
        if gap is None:
            return "gap_closed"
        if not self._is_settled():
            return "busy"
        self.evolve_context(last_edge_ppm=to_ppm(gap.edge))
        failure = await self._shoot(gap)
        await self._settle()
        if failure is not None:
            raise failure
        return "taken"

    async def _shoot(self, gap: Gap) -> BaseException | None:
        """Send both legs at once; return an unexpected failure, which must not keep the legs from being compared."""
        results = await asyncio.gather(
            self.desk.submit(self._leg(Side.BUY, gap.buy.venue, gap.buy.ask, gap)),
            self.desk.submit(self._leg(Side.SELL, gap.sell.venue, gap.sell.bid, gap)),
            return_exceptions=True,
        )
        failure = None
        for result in results:
            if isinstance(result, OrderDeniedError):
                self._refuse(f"denied_{result.code.lower()}")
            elif isinstance(result, BaseException):
                failure = result
        return failure

    def _leg(self, side: Side, venue: str, price: Decimal, gap: Gap) -> OrderRequest:
        return OrderRequest(
            symbol=self.context.symbol,
            venue=venue,
            side=side,
            quantity=gap.quantity,
            price=crossing_price(
                self._instruments[venue], side, price, self.context.slippage_buffer
            ),
            time_in_force=TimeInForce.IOC,
        )

    def _decide(self, opportunity: Opportunity, outcome: str) -> None:
        c = self.context
        cause = opportunity.cause
        about = (
            f"{cause.pair} {cause.chain}:{cause.pool}"
            if isinstance(cause, PoolSwap)
            else c.symbol
        )
        decision = Decision(
            ts_ns=self._now(),
            about=about,
            edge_ppm=opportunity.edge_ppm,
            outcome=outcome,
        )
        self.evolve_context(
            decisions=[*c.decisions, decision][-MAX_DECISIONS:],
            taken=c.taken + (outcome == "taken"),
            observed=c.observed + (outcome == "observed"),
        )
        if outcome not in ("taken", "observed"):
            self._refuse(outcome)
        self._flush_refused()

    # Settling ---------------------------------------------------------------------------

    async def _handle_executing(self) -> None:
        self.wait(IDLE_S)
        self._flush_refused()
        if self._busy:
            return  # `handle` is between two sends: what looks like a naked leg may be under way
        await self._settle()
        refusal = await self._follower.leave_when_due()
        if refusal is not None:
            self._refuse(refusal)

    def resume(self) -> None:
        orders = self._own_orders()
        last = orders[-1].client_order_id if orders else None
        self._denials = 0
        self.evolve_context(forgiven_order=last, pause_reason=None)
        super().resume()

    def _own_orders(self) -> list[Order]:
        c = self.context
        return [
            o
            for o in reached_venue(self.desk.orders())
            if o.request.symbol == c.symbol and o.request.venue in c.venues
        ]

    def _is_settled(self) -> bool:
        orders = self._own_orders()
        return not progress_of(orders).open and self._difference(orders) == 0

    def _difference(self, orders: list[Order]) -> Decimal:
        """Return the tradable part of bought minus sold, without what policy keeps; 0 if there is none."""
        delta = net_quantity(orders) - self.context.carried
        if not delta:
            return ZERO
        price = next(
            (o.average_price for o in reversed(orders) if o.average_price), ZERO
        )
        tradable = any(
            i.is_tradable(i.floor_quantity(abs(delta)), price)
            for i in self._instruments.values()
        )
        return delta if tradable else ZERO

    async def _settle(self) -> None:
        """Compare the legs, and repair a difference by at most one order at a time."""
        for _ in range(2 * self.context.max_leg_retries + 1):
            orders = self._own_orders()
            self._note(orders)
            still_open = progress_of(orders).open
            if still_open:
                await self._hurry(still_open)
                return
            delta = self._difference(orders)
            if not delta:
                self._denials = 0
                return
            if self.context.on_leg_failure == "hold":
                self._hold(delta)
                return
            if not await self._repair(orders, delta):
                return

    async def _repair(self, orders: list[Order], delta: Decimal) -> bool:
        """Send one order against `delta`; return False if it has to wait."""
        failed = self._failed_repairs(orders) + self._denials
        retries = self.context.max_leg_retries
        if failed >= 2 * retries:
            self._give_up(delta)
            return False
        if failed and self._now() < self._retry_at(orders, failed):
            self.wait((self._retry_at(orders, failed) - self._now()) / 1e9)
            return False
        side = Side.SELL if delta > 0 else Side.BUY
        venue = self._repair_venue(orders, side, first_choice=failed < retries)
        instrument = self._instruments[venue]
        quantity = instrument.floor_quantity(min(abs(delta), instrument.max_quantity))
        self.evolve_context(repairs=self.context.repairs + 1)
        try:
            order = await self.desk.submit(
                OrderRequest(
                    symbol=self.context.symbol,
                    venue=venue,
                    side=side,
                    quantity=quantity,
                    type=OrderType.MARKET,
                    reduce_only=only_reduces(
                        self.desk, self.context.symbol, venue, side, quantity
                    ),
                    parent=orders[-1].client_order_id,
                )
            )
        except OrderDeniedError as denied:
            self._denials += 1
            self._refuse(f"denied_{denied.code.lower()}")
            self._retry_ns = self._now() + seconds(growing_delay_s(self._denials))
            return True
        return order.status.is_terminal

    def _repair_venue(
        self, orders: list[Order], side: Side, *, first_choice: bool
    ) -> str:
        """Unwind trades where the surplus was filled, hedge trades on the other venue; the second choice swaps them."""
        surplus = next(
            o.request.venue
            for o in reversed(orders)
            if o.filled_quantity and o.request.side is side.opposite
        )
        at_surplus = (self.context.on_leg_failure == "unwind") == first_choice
        one, other = self.context.venues
        elsewhere = other if surplus == one else one
        return surplus if at_surplus else elsewhere

    def _failed_repairs(self, orders: list[Order]) -> int:
        count = 0
        for order in reversed(orders):
            repair = order.request.type is OrderType.MARKET
            if (
                not repair
                or order.filled_quantity
                or order.client_order_id == self.context.forgiven_order
            ):
                break
            count += 1
        return count

    def _retry_at(self, orders: list[Order], failed: int) -> int:
        last = orders[-1]
        return max(self._retry_ns, last.updated_ns + seconds(growing_delay_s(failed)))

    async def _hurry(self, still_open: tuple[Order, ...]) -> None:
        """No leg may hang (H4): what still works after a second is cancelled, what has no proof is told."""
        for order in still_open:
            age_ns = self._now() - order.created_ns
            name = order.client_order_id
            if (
                order.status in LIVE
                and age_ns > seconds(1.0)
                and name not in self._asked
            ):
                self._asked.add(name)
                await self.desk.cancel(name)
            elif (
                age_ns > seconds(self.context.max_naked_s)
                and f"old|{name}" not in self._asked
            ):
                self._asked.add(f"old|{name}")
                self.desk.alert(
                    "critical",
                    f"{self.context.symbol}: order {name} at {order.request.venue} is {order.status} for "
                    f"{age_ns / 1e9:.1f} s; its leg stays unbalanced until the venue proves its fate",
                )

    def _hold(self, delta: Decimal) -> None:
        self.evolve_context(carried=self.context.carried + delta)
        self.desk.alert(
            "critical",
            f"{self.context.symbol}: a difference of {delta:+f} is held by policy",
        )

    def _give_up(self, delta: Decimal) -> None:
        self.evolve_context(pause_reason="LEG_NOT_REPAIRED")
        self._transition(TradingStrategyState.PAUSED)
        self.desk.alert(
            "critical",
            f"{self.context.symbol}: a difference of {delta:+f} could be repaired on neither venue; paused. "
            "Settle it by hand or resume the task",
        )

    def _note(self, orders: list[Order]) -> None:
        """Copy into the context what the ledger says."""
        delta = net_quantity(orders) - self.context.carried
        residual = delta if not self._difference(orders) else ZERO
        flow, fees = money_of(reached_venue(self.desk.orders()))
        legs = [
            Leg(
                venue=o.request.venue,
                side=o.request.side,
                quantity=o.request.quantity,
                filled=o.filled_quantity,
                average_price=o.average_price,
                status=o.status.value,
            )
            for o in orders[-4:]
        ]
        changes: dict[str, Any] = {
            "residual_delta": residual,
            "realized_pnl": flow - fees,
            "last_legs": legs,
        }
        changed = {k: v for k, v in changes.items() if getattr(self.context, k) != v}
        if changed:
            self.evolve_context(**changed)

    # Small things -----------------------------------------------------------------------

    def _refuse(self, reason: str) -> None:
        self._refused[reason if len(self._refused) < MAX_REASONS else "other"] += 1

    def _flush_refused(self) -> None:
        """Counting happens on the way of every event; the context hears of it once per cycle."""
        if self._refused:
            counts = Counter(self.context.refused) + self._refused
            self.evolve_context(refused=dict(counts))
            self._refused.clear()

    def _now(self) -> int:
        return self.desk.clock.now_ns()

    def _validate(self) -> None:
        c = self.context
        hedge = (c.hedge_symbol, c.hedge_venue, c.hedge_quantity)
        check(
            f"ArbitrageTask {c.task_id!r}",
            {
                "symbol": ("/" in c.symbol, c.symbol, "a pair such as BTC/USDT"),
                "venues": (len(set(c.venues)) == 2, c.venues, "two different venues"),
                "quantity": (c.quantity > 0, c.quantity, "more than 0"),
                "slippage_buffer": (
                    0 <= c.slippage_buffer < 1,
                    c.slippage_buffer,
                    "a ratio from 0 to below 1",
                ),
                "cooldown_s": (c.cooldown_s >= 0, c.cooldown_s, "0 or more"),
                "max_age_s": (c.max_age_s > 0, c.max_age_s, "more than 0"),
                "max_leg_retries": (
                    c.max_leg_retries >= 1,
                    c.max_leg_retries,
                    "at least 1",
                ),
                "trade_usd": (c.trade_usd > 0, c.trade_usd, "more than 0"),
                "hedge_symbol": (
                    all(hedge) or not any(hedge),
                    hedge,
                    "`hedge_symbol`, `hedge_venue` and `hedge_quantity` together, or none",
                ),
                "hedge_venue": (
                    c.hedge_symbol != c.symbol or c.hedge_venue not in c.venues,
                    c.hedge_venue,
                    "another instrument than the two legs, whose difference must stay zero",
                ),
            },
        )
