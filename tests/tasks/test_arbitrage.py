"""Taking gaps: the edge of T-15, both legs at once, and H3/H4: no leg is ever left behind unseen."""

import random
from decimal import Decimal
from typing import Any

import pytest

from fakes.desk import (
    Crash,
    FakeDesk,
    attach,
    instrument,
    pass_time,
    reborn,
    settle,
    sides,
)
from nightdesk.errors import OrderDeniedError
from nightdesk.model.events import Opportunity, PoolSwap, TradePrinted
from nightdesk.model.order import (
    Order,
    OrderRequest,
    OrderStatus,
    OrderType,
    Side,
    TimeInForce,
)
from nightdesk.tasks.arbitrage import ArbitrageContext, ArbitrageTask

D = Decimal


def task_of(**changes: Any) -> ArbitrageTask:
    facts: dict[str, Any] = {
        "task_id": "arb",
        "symbol": "BTC/USDT",
        "venues": ("A", "B"),
        "quantity": "1.000",
        "min_profitability": "0.0015",
    }
    return ArbitrageTask(ArbitrageContext(**(facts | changes)))


def desk_of(**b: Any) -> FakeDesk:
    return FakeDesk(
        instrument(venue="A"), instrument(venue="B", **b), instrument("ETH/USDT", "A")
    )


async def ready(desk: FakeDesk, **changes: Any) -> ArbitrageTask:
    task: ArbitrageTask = await attach(task_of(**changes), desk)
    await settle(task)
    return task


def see_gap(
    task: ArbitrageTask, desk: FakeDesk, b_bid: str = "100.5", quantity: str = "1000"
) -> int | None:
    """Ask 100.2 on A, bid `b_bid` on B."""
    first = task.assess(desk.quote("100.0", "100.2", "A", quantity=quantity))
    second = task.assess(
        desk.quote(b_bid, str(D(b_bid) + D("0.2")), "B", quantity=quantity)
    )
    return first if first is not None else second


async def act(task: ArbitrageTask, cause: Any, edge: int = 1991) -> None:
    await task.handle(
        Opportunity(handler="arb", edge_ppm=edge, deadline_ns=0, cause=cause)
    )


async def shoot(task: ArbitrageTask, desk: FakeDesk, **gap: Any) -> None:
    edge = see_gap(task, desk, **gap)
    assert edge is not None
    await act(task, desk.quotes["BTC/USDT@B"], edge)


def swap(**changes: Any) -> PoolSwap:
    facts: dict[str, Any] = {
        "chain": "base",
        "pool": "0xAB",
        "pair": "WETH/USDC",
        "transaction_hash": "0x1",
        "log_index": 1,
        "price_impact_ppm": 9_000,
        "value_usd": D("5000"),
        "price": D("3000"),
        "liquidity_usd": D("1000000"),
    }
    return PoolSwap(**(facts | changes))


POOLS: dict[str, Any] = {"pools": ("base:0xab",), "pairs": ("WETH/USDC",)}


@pytest.mark.parametrize(("least", "edge"), [("0.0015", 1991), ("0.0025", None)])
async def test_t15_the_edge_at_ask_100_2_and_bid_100_5_is_1991_ppm(
    least: str, edge: int | None
) -> None:
    desk = desk_of()
    task = await ready(desk, min_profitability=least)

    assert see_gap(task, desk) == edge


async def test_one_gap_is_one_opportunity_until_the_cooldown_is_over() -> None:
    desk = desk_of()
    task = await ready(desk, cooldown_s=5.0)
    edges = []
    for _ in range(7):
        edges.append(see_gap(task, desk))
        desk.clock.advance(1.0)

    assert edges == [1991, None, None, None, None, 1991, None]


async def test_a_gap_between_an_old_and_a_new_price_is_none() -> None:
    desk = desk_of()
    task = await ready(desk, max_age_s=2.0)
    task.assess(desk.quote("100.0", "100.2", "A"))
    desk.clock.advance(2.1)

    assert task.assess(desk.quote("100.5", "100.7", "B")) is None


async def test_a_gap_that_shows_too_little_to_trade_is_none() -> None:
    desk = desk_of()
    task = await ready(desk)

    assert see_gap(task, desk, quantity="0.04") is None


async def test_what_concerns_others_is_no_opportunity() -> None:
    desk = desk_of()
    early = task_of()
    assert early.assess(desk.quote("1", "2", "A")) is None  # not started yet
    task = await ready(desk)
    trade = TradePrinted(
        symbol="BTC/USDT",
        venue="A",
        price=D(1),
        quantity=D(1),
        side=Side.BUY,
        trade_id="1",
    )

    assert task.assess(desk.quote("1", "2", "A", symbol="ETH/USDT")) is None
    assert task.assess(trade) is None
    assert task.keys() == ("BTC/USDT@A", "BTC/USDT@B")


async def test_both_legs_go_out_together_and_the_result_is_remembered() -> None:
    desk = desk_of()
    task = await ready(desk, slippage_buffer="0.001")
    await shoot(task, desk)

    assert sides(desk.sent) == [("A", "BUY", "1.000"), ("B", "SELL", "1.000")]
    assert [o.request.price for o in desk.sent] == [D("100.3"), D("100.4")]
    assert {o.request.time_in_force for o in desk.sent} == {TimeInForce.IOC}
    c = task.context
    assert c.realized_pnl == D("0.3") - D("200.7") * D("0.0005")
    assert (c.taken, c.last_edge_ppm, c.residual_delta) == (1, 1991, 0)
    assert [(leg.venue, leg.status) for leg in c.last_legs] == [
        ("A", "FILLED"),
        ("B", "FILLED"),
    ]
    assert c.decisions[0].outcome == "taken"


async def test_the_quantity_is_what_both_books_show_in_the_coarser_lot() -> None:
    desk = desk_of(lot_size=D("0.01"), min_quantity=D("0.01"))
    task = await ready(desk)
    await shoot(task, desk, quantity="0.567")

    assert sides(desk.sent) == [("A", "BUY", "0.560"), ("B", "SELL", "0.560")]


async def test_a_gap_that_has_closed_meanwhile_is_not_taken() -> None:
    desk = desk_of()
    task = await ready(desk)
    see_gap(task, desk)
    task.assess(desk.quote("100.0", "100.2", "B"))
    await act(task, desk.quotes["BTC/USDT@B"])

    assert desk.sent == []
    assert task.context.refused == {"gap_closed": 1}


@pytest.mark.parametrize(
    ("policy", "last"),
    [("unwind", ("A", "SELL", "1.000")), ("hedge", ("B", "SELL", "1.000"))],
)
async def test_h3_a_leg_that_fails_is_repaired_by_policy_at_once(
    policy: Any, last: tuple[str, str, str]
) -> None:
    desk = desk_of()
    desk.answer("reject:NOT_NOW", venue="B")
    task = await ready(desk, on_leg_failure=policy)
    await shoot(task, desk)

    assert sides(desk.sent)[2:] == [last]
    assert desk.sent[2].request.type is OrderType.MARKET
    assert task.context.repairs == 1
    if policy == "unwind":
        assert task.context.realized_pnl == D("-0.2") - D("200.2") * D("0.0005")


async def test_h3_a_partly_filled_leg_is_balanced_to_the_lot() -> None:
    desk = desk_of()
    task = await ready(desk)
    see_gap(task, desk)
    desk.quote("100.5", "100.7", "B", quantity="0.4")
    await act(task, None or desk.quotes["BTC/USDT@B"])

    assert sides(desk.sent)[2:] == [("A", "SELL", "0.600")]
    assert task.context.residual_delta == 0


async def test_hold_keeps_the_difference_with_a_critical_alert_and_goes_on() -> None:
    desk = desk_of()
    desk.answer("reject:X", venue="B")
    task = await ready(desk, on_leg_failure="hold")
    await shoot(task, desk)
    desk.clock.advance(6.0)
    await shoot(task, desk)

    assert task.context.carried == D("1.000")
    assert [level for level, _ in desk.alerts] == ["critical"]
    assert (task.context.taken, len(desk.sent)) == (2, 4)


async def test_h4_a_leg_that_hangs_is_cancelled_after_a_second_and_balanced() -> None:
    desk = desk_of()
    desk.answer("rest", venue="B")
    task = await ready(desk)
    await shoot(task, desk)
    assert len(desk.sent) == 2
    await pass_time(task, desk, 1.0)
    desk.clock.advance(0.5)
    await settle(task)
    assert len(desk.cancels) == 1

    desk.acknowledge_cancel(desk.only_open())
    await settle(task)
    assert sides(desk.sent)[2:] == [("A", "SELL", "1.000")]


async def test_a_leg_without_proof_is_never_repaired_before_its_fate_is_known() -> None:
    desk = desk_of()
    desk.answer("lost", venue="B")
    task = await ready(desk)
    await shoot(task, desk)
    await pass_time(task, desk, 7.0)
    assert len(desk.sent) == 2
    assert [level for level, _ in desk.alerts] == ["critical"]

    desk.resolve(desk.only_open(), accepted=True)
    desk.fill(desk.only_open(), price="100.5")
    await settle(task)
    assert len(desk.sent) == 2
    assert task.context.residual_delta == 0


async def test_a_difference_too_small_to_trade_is_reported() -> None:
    desk = desk_of()
    task = await ready(desk)
    see_gap(task, desk)
    desk.quote("100.5", "100.7", "B", quantity="0.970")
    await act(task, desk.quotes["BTC/USDT@B"])

    assert len(desk.sent) == 2
    assert task.context.residual_delta == D("0.030")


async def test_repairs_that_fail_everywhere_pause_with_a_critical_alert() -> None:
    desk = desk_of()
    desk.answer("accept", *["reject:X"] * 9, venue="A")
    desk.answer(*["reject:X"] * 9, venue="B")
    task = await ready(desk, max_leg_retries=2)
    await shoot(task, desk)
    await pass_time(task, desk, 30.0)

    assert task.context.state == "PAUSED"
    assert task.context.pause_reason == "LEG_NOT_REPAIRED"
    assert [s[0] for s in sides(desk.sent)[2:]] == ["A", "A", "B", "B"]
    assert [level for level, _ in desk.alerts] == ["critical"]
    see_gap(task, desk)
    await act(task, desk.quotes["BTC/USDT@B"])
    assert task.context.refused["paused"] == 1

    desk.script.clear()
    task.resume()
    await settle(task)
    assert sides(desk.sent)[-1] == ("A", "SELL", "1.000")


async def test_a_denied_repair_is_tried_again_later() -> None:
    desk = desk_of()
    desk.answer("reject:X", venue="B")
    task = await ready(desk)
    see_gap(task, desk)
    desk.denials.clear()
    original = desk.submit

    async def deny_market(request: Any) -> Any:
        if request.type is OrderType.MARKET and desk.clock.now < limit:
            desk.denials.append("RATE_LIMIT_EXCEEDED")
        return await original(request)

    limit = desk.clock.now + 10**8
    desk.submit = deny_market  # type: ignore[method-assign]
    await act(task, desk.quotes["BTC/USDT@B"])
    await pass_time(task, desk, 2.0)

    assert sides(desk.sent)[-1] == ("A", "SELL", "1.000")
    assert task.context.refused == {"denied_rate_limit_exceeded": 1}


async def test_a_denied_leg_is_counted_and_the_other_unwound() -> None:
    desk = desk_of()
    desk.denials.append("NOTIONAL_EXCEEDS_MAX_PER_ORDER")
    task = await ready(desk)
    await shoot(task, desk)

    assert sides(desk.sent) == [("B", "SELL", "1.000"), ("B", "BUY", "1.000")]
    assert task.context.refused == {"denied_notional_exceeds_max_per_order": 1}


async def test_an_unexpected_failure_is_raised_only_after_the_other_leg_is_safe() -> (
    None
):
    desk = desk_of()
    task = await ready(desk)
    see_gap(task, desk)
    original = desk.submit

    async def broken(request: Any) -> Any:
        if request.venue == "B":
            raise RuntimeError("disk full")
        return await original(request)

    desk.submit = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="disk full"):
        await act(task, desk.quotes["BTC/USDT@B"])
    assert sides(desk.sent) == [("A", "BUY", "1.000"), ("A", "SELL", "1.000")]


async def test_while_legs_are_unsettled_no_new_gap_is_taken() -> None:
    desk = desk_of()
    desk.answer("lost", venue="B")
    task = await ready(desk)
    await shoot(task, desk)
    desk.clock.advance(6.0)
    await shoot(task, desk)

    assert len(desk.sent) == 2
    assert task.context.refused == {"busy": 1}


async def test_a_crash_between_the_legs_is_repaired_after_the_start() -> None:
    for seed in range(200):
        await _crashing_life(seed)


async def _crashing_life(seed: int) -> None:
    """Crashes, lost replies, partial fills: in the end both venues together hold nothing."""
    chance = random.Random(seed)
    desk = desk_of()
    task = await ready(desk, cooldown_s=0.5, max_leg_retries=50)
    saved = task.context
    answers = [
        "crash_before",
        "crash_after",
        "lost",
        "vanish",
        "reject:X",
        "accept",
        "rest",
    ]
    for turn in range(60):
        if turn < 40 and chance.random() < 0.5:
            desk.answer(chance.choice(answers), venue=chance.choice("AB"))
        try:
            if (
                see_gap(task, desk, quantity=chance.choice(["0.3", "2"])) is not None
                and turn < 40
            ):
                await act(task, desk.quotes["BTC/USDT@B"])
            await task.step()
        except Crash:
            for order in desk.open_orders():
                if order.status is OrderStatus.SUBMITTED:
                    desk._change(order, status=OrderStatus.UNKNOWN)
            task = await reborn(task, desk, saved)
        for order in desk.open_orders():
            if order.status is OrderStatus.UNKNOWN and chance.random() < 0.5:
                arrived = any(
                    o.client_order_id == order.client_order_id for o in desk.sent
                )
                order = desk.resolve(order, accepted=arrived)
                if arrived:
                    desk.fill(order, price="100.3")
            elif order.status is OrderStatus.PENDING_CANCEL:
                desk.acknowledge_cancel(order)
        desk.clock.advance(chance.choice([0.1, 1.1]))
    desk.script.clear()
    for _ in range(100):
        for order in desk.open_orders():
            if order.status is OrderStatus.UNKNOWN:
                desk.resolve(order, accepted=False)
            elif order.status is OrderStatus.PENDING_CANCEL:
                desk.acknowledge_cancel(order)
        desk.quote("100.0", "100.2", "A")
        desk.quote("100.0", "100.2", "B")
        await pass_time(task, desk, 2.0)
    net = sum(o.filled_quantity * o.request.side.sign for o in desk.orders())
    assert abs(net) * 100 < 5, f"seed {seed}: {net} naked, {task.context}"
    assert task.context.residual_delta == net, f"seed {seed}"


# Pools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"price_impact_ppm": -4_999}, "impact_below_minimum"),
        ({"pool": "0xCD"}, "pool_not_verified"),
        ({"pair": "SCAM/USDC"}, "pair_not_allowed"),
        ({"liquidity_usd": D("99999")}, "liquidity_below_floor"),
        ({"value_usd": D("999")}, "value_below_floor"),
        ({"price_impact_ppm": 5_100}, "edge_below_minimum"),
    ],
)
async def test_a_swap_is_refused_with_its_reason(
    changes: dict[str, Any], reason: str
) -> None:
    desk = desk_of()
    task = await ready(desk, **POOLS)
    assert task.assess(swap(**changes)) is None
    await settle(task)

    assert task.context.refused == {reason: 1}


async def test_costs_above_the_impact_leave_no_edge() -> None:
    desk = desk_of()
    task = await ready(desk, **POOLS, trade_usd="10")
    assert task.assess(swap()) is None
    await settle(task)

    assert task.context.refused == {"edge_not_positive": 1}


async def test_a_good_swap_is_one_opportunity_even_when_it_is_told_twice() -> None:
    """9,000 ppm less a pool fee of 3,000, slippage of 500, and 0.2 USD of 1,000."""
    desk = desk_of()
    task = await ready(desk, **POOLS)

    assert task.assess(swap()) == 5_300
    assert task.assess(swap(is_confirmed=True)) is None
    assert task.assess(swap(log_index=2)) is None
    await settle(task)
    assert task.context.refused == {"cooling_down": 1}


async def test_without_a_venue_for_it_a_swap_is_observed_and_nothing_is_sent() -> None:
    desk = desk_of()
    task = await ready(desk, **POOLS)
    await act(task, swap(), 5_300)

    assert desk.sent == []
    assert (task.context.taken, task.context.observed) == (0, 1)
    assert task.context.decisions[0].about == "WETH/USDC base:0xAB"


HEDGE: dict[str, Any] = {
    **POOLS,
    "hedge_symbol": "ETH/USDT",
    "hedge_venue": "A",
    "hedge_quantity": "0.500",
    "hedge_hold_s": 10.0,
}


@pytest.mark.parametrize(
    ("impact", "there", "back"), [(9_000, "BUY", "SELL"), (-9_000, "SELL", "BUY")]
)
async def test_a_swap_is_followed_at_the_hedge_venue_and_left_after_its_time(
    impact: int, there: str, back: str
) -> None:
    desk = desk_of()
    task = await ready(desk, **HEDGE)
    desk.quote("3000.0", "3000.2", "A", symbol="ETH/USDT")
    await act(task, swap(price_impact_ppm=impact))
    assert sides(desk.sent) == [("A", there, "0.500")]
    await act(task, swap(price_impact_ppm=impact, log_index=2))
    assert task.context.refused == {"busy": 1}

    await pass_time(task, desk, 9.0)
    assert len(desk.sent) == 1
    task = await reborn(task, desk)
    desk.denials.append("RATE_LIMIT_EXCEEDED")
    desk.answer("reject:X")
    await pass_time(task, desk, 6.0)

    assert sides(desk.sent)[-1] == ("A", back, "0.500")
    assert len(desk.sent) == 3
    assert task.keys()[2] == "ETH/USDT@A"


async def test_a_swap_is_not_followed_at_an_old_price_or_with_too_little() -> None:
    desk = desk_of()
    task = await ready(desk, **HEDGE)
    await act(task, swap())
    desk.quote("1.0", "1.1", "A", symbol="ETH/USDT")
    await act(task, swap())
    desk.quote("3000.0", "3000.2", "A", symbol="ETH/USDT")
    desk.denials.append("TRADING_HALTED")
    await act(task, swap())

    assert desk.sent == []
    assert task.context.refused == {
        "price_too_old": 1,
        "quantity_below_minimum": 1,
        "denied_trading_halted": 1,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("symbol", "BTC"),
        ("venues", ("A", "A")),
        ("quantity", "0"),
        ("slippage_buffer", "1"),
        ("cooldown_s", -1.0),
        ("max_age_s", 0.0),
        ("max_leg_retries", 0),
        ("trade_usd", "0"),
        ("hedge_symbol", "ETH/USDT"),
    ],
)
def test_a_wrong_parameter_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}` is .*expected"):
        task_of(**{field: value})


def test_the_hedge_may_not_disturb_the_difference_of_the_legs() -> None:
    with pytest.raises(ValueError, match="`hedge_venue`"):
        task_of(hedge_symbol="BTC/USDT", hedge_venue="A", hedge_quantity="1")


@pytest.mark.parametrize("policy", ["unwind", "hedge"])
async def test_a_halt_between_two_legs_does_not_keep_the_desk_on_one(
    policy: Any,
) -> None:
    """A halted gate lets only orders pass that are marked reduce-only."""
    desk = desk_of()
    desk.answer("reject:NOT_NOW", venue="B")
    submit = desk.submit

    async def halted(request: OrderRequest) -> Order:
        if len(desk.sent) >= 2 and not request.reduce_only:
            raise OrderDeniedError("TRADING_HALTED", "by the operator")
        return await submit(request)

    desk.submit = halted  # type: ignore[method-assign]
    task = await ready(desk, on_leg_failure=policy)
    await shoot(task, desk)
    await pass_time(task, desk, 30)

    assert sides(desk.sent)[2:] == [("A", "SELL", "1.000")]
    assert desk.sent[2].request.reduce_only
