"""Two legs: T-9 to T-15, and H1 to H4 of the failures of others."""

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
from nightdesk.model.events import QuoteChanged
from nightdesk.model.order import (
    Liquidity,
    Order,
    OrderRequest,
    OrderStatus,
    OrderType,
    Side,
)
from nightdesk.model.position import Position
from nightdesk.tasks.delta_neutral import DeltaNeutralContext, DeltaNeutralTask

D = Decimal


def task_of(**changes: Any) -> DeltaNeutralTask:
    facts: dict[str, Any] = {
        "task_id": "dn",
        "symbol": "BTC/USDT",
        "venues": {Side.BUY: "A", Side.SELL: "B"},
        "total_quantity": "1.000",
        "order_quantity": "1.000",
    }
    return DeltaNeutralTask(DeltaNeutralContext(**(facts | changes)))


def two_venues(**b: Any) -> FakeDesk:
    desk = FakeDesk(instrument(venue="A"), instrument(venue="B", **b))
    requote(desk)
    return desk


def requote(desk: FakeDesk, a: str = "100.0", b: str = "100.3") -> None:
    desk.quote(a, str(D(a) + D("0.2")), "A")
    desk.quote(str(D(b) - D("0.2")), b, "B")


async def running(desk: FakeDesk, **changes: Any) -> DeltaNeutralTask:
    task: DeltaNeutralTask = await attach(task_of(**changes), desk)
    await settle(task)
    return task


async def states_of(task: DeltaNeutralTask, desk: FakeDesk) -> list[str]:
    states = [task.context.state]
    for _ in range(50):
        result = await task.step()
        if result.state != states[-1]:
            states.append(result.state)
        if not result.should_continue or result.next_delay > 0:
            break
    return states


async def test_t9_both_legs_as_maker_earn_exactly_0_25994() -> None:
    desk = two_venues()
    task: DeltaNeutralTask = await attach(task_of(), desk)
    states = await states_of(task, desk)
    desk.fill(desk.only_open("A"))
    desk.fill(desk.only_open("B"))
    states += (await states_of(task, desk))[1:]

    c = task.context
    assert (c.gross_pnl, c.fees_paid, c.net_pnl) == (
        D("0.3000"),
        D("0.04006"),
        D("0.25994"),
    )
    assert c.filled_quantity == {Side.BUY: D("1.000"), Side.SELL: D("1.000")}
    assert states == [
        "NOT_STARTED",
        "IDLE",
        "SYNCING",
        "ANALYZING",
        "MANAGING_ORDERS",
        "SYNCING",
        "ANALYZING",
        "COMPLETING",
        "COMPLETED",
    ]
    assert (c.close_reason, c.residual_delta, desk.alerts) == ("COMPLETED", 0, [])


async def test_t10_the_lagging_leg_is_completed_at_market_after_its_cancel_is_proved() -> (
    None
):
    desk = two_venues()
    task = await running(desk)
    desk.fill(desk.only_open("A"), "0.500")
    b = desk.only_open("B")
    desk.fill(b, "0.200")
    await settle(task)
    assert desk.cancels == [b.client_order_id]
    assert len(desk.sent) == 2

    desk.acknowledge_cancel(b)
    await settle(task)

    assert sides(desk.sent)[2] == ("B", "SELL", "0.300")
    assert desk.sent[2].request.type is OrderType.MARKET
    assert task.context.delta == 0


async def test_t10_what_fills_during_the_cancel_is_not_hedged_again() -> None:
    desk = two_venues()
    task = await running(desk)
    desk.fill(desk.only_open("A"), "0.500")
    b = desk.only_open("B")
    desk.fill(b, "0.200")
    await settle(task)
    desk.fill(b, "0.100")
    desk.acknowledge_cancel(b)
    await settle(task)

    assert sides(desk.sent)[2] == ("B", "SELL", "0.200")
    assert task.context.delta == 0


async def test_t11_an_imbalance_too_small_to_trade_is_carried_until_it_is_not() -> None:
    desk = two_venues()
    task = await running(desk)
    a = desk.only_open("A")
    desk.fill(a, "0.040")
    await settle(task)
    assert (len(desk.sent), desk.cancels) == (2, [])

    desk.cancel_script.append("now")
    desk.fill(a, "0.050")
    await settle(task)
    assert sides(desk.sent)[2] == ("B", "SELL", "0.090")


async def test_t11_a_residue_at_the_end_is_reported_and_alerted() -> None:
    desk = two_venues()
    task = await running(desk)
    b = desk.only_open("B")
    desk.fill(b, "0.960")
    desk.fill(desk.only_open("A"))
    desk.end(b, OrderStatus.CANCELED)
    await settle(task)

    assert task.context.state == "COMPLETED"
    assert task.context.residual_delta == D("0.040")
    assert any("+0.040" in text for _, text in desk.alerts)


async def test_t12_a_leg_refused_three_times_is_unwound_on_the_other_venue() -> None:
    """H3: another executor resent four times, ended with the bought leg naked, and reported a profit of 0."""
    desk = two_venues()
    desk.answer(*["reject:SOMETHING"] * 3, venue="B")
    task = await running(desk)
    desk.fill(desk.only_open("A"))
    desk.quote("99.9", "100.1", "A")
    await pass_time(task, desk, 2.0)

    assert sides(desk.sent)[-1] == ("A", "SELL", "1.000")
    assert len([o for o in desk.sent if o.request.venue == "B"]) == 3
    c = task.context
    assert (c.state, c.close_reason, c.failed_leg) == (
        "COMPLETED",
        "UNWOUND",
        Side.SELL,
    )
    assert (c.delta, c.net_pnl) == (0, D("-0.16995"))
    assert [level for level, _ in desk.alerts] == ["critical"]


async def test_t12_a_leg_that_is_down_for_five_seconds_is_unwound() -> None:
    desk = two_venues()
    task = await running(desk, max_leg_retries=100)
    b = desk.only_open("B")
    desk.cancel_script.append("now")
    desk.fill(desk.only_open("A"))
    desk.denials.extend(["VENUE_DOWN"] * 6)
    await settle(task)
    assert b.client_order_id in desk.cancels
    for _ in range(12):
        await pass_time(task, desk, 0.5)

    assert sides(desk.sent)[-1] == ("A", "SELL", "1.000")
    assert task.context.close_reason == "UNWOUND"


async def test_t12_hold_keeps_the_leg_and_says_so() -> None:
    desk = two_venues()
    desk.answer(*["reject:X"] * 3, venue="B")
    task = await running(desk, on_leg_failure="hold")
    desk.fill(desk.only_open("A"))
    await pass_time(task, desk, 3.0)

    assert (task.context.close_reason, task.context.residual_delta) == (
        "HELD",
        D("1.000"),
    )
    assert [level for level, _ in desk.alerts] == ["critical", "warning"]


async def test_hedge_keeps_trying_the_dead_leg() -> None:
    desk = two_venues()
    desk.answer(*["reject:X"] * 6, venue="B")
    task = await running(desk, on_leg_failure="hedge")
    desk.fill(desk.only_open("A"))
    await pass_time(task, desk, 30.0)

    assert sides(desk.sent)[-1] == ("B", "SELL", "1.000")
    assert task.context.delta == 0


async def test_a_leg_refused_before_anything_was_filled_ends_the_task_flat() -> None:
    desk = two_venues()
    desk.answer(*["reject:X"] * 3, venue="B")
    desk.cancel_script.append("now")
    task = await running(desk)
    await pass_time(task, desk, 3.0)

    assert (task.context.state, task.context.close_reason) == (
        "COMPLETED",
        "LEG_REJECTED",
    )
    assert desk.total() == 0
    assert desk.open_orders() == []


@pytest.mark.parametrize("crash", [False, True])
async def test_t13_an_ambiguous_leg_is_adopted_and_never_sent_again(
    crash: bool,
) -> None:
    desk = two_venues()
    desk.answer("crash_after" if crash else "lost", venue="B")
    task: DeltaNeutralTask = await attach(task_of(), desk)
    try:
        await settle(task)
    except Crash:
        desk._change(desk.only_open("B"), status=OrderStatus.UNKNOWN)
        task = await reborn(task, desk, task_of().context)
    desk.fill(desk.only_open("A"))
    await pass_time(task, desk, 4.0)
    assert len([o for o in desk.sent if o.request.venue == "B"]) == 1

    desk.resolve(desk.only_open("B"), accepted=True)
    desk.fill(desk.only_open("B"))
    await settle(task)

    assert len([o for o in desk.sent if o.request.venue == "B"]) == 1
    assert (task.context.state, task.context.delta) == ("COMPLETED", 0)


async def test_t13_a_leg_unknown_for_too_long_is_a_critical_alert_but_no_second_order() -> (
    None
):
    desk = two_venues()
    desk.answer("lost", venue="B")
    task = await running(desk)
    desk.fill(desk.only_open("A"))
    await pass_time(task, desk, 9.0)
    assert len(desk.sent) == 2
    assert "critical" in [level for level, _ in desk.alerts]

    desk.resolve(desk.only_open("B"), accepted=False)
    await pass_time(task, desk, 2.0)
    assert task.context.delta == 0


async def test_t14_six_that_fill_while_the_cancel_is_under_way_are_hedged_too() -> None:
    """H1 and H2: another executor hedged none of them."""
    desk = two_venues()
    task = await running(
        desk,
        total_quantity="10",
        order_quantity="10",
        maker_side=Side.BUY,
        min_profitability="-0.01",
    )
    a = desk.only_open("A")
    desk.fill(a, "4")
    await settle(task)
    assert sides(desk.sent)[1:] == [("B", "SELL", "4.000")]

    requote(desk, b="90.0")  # the edge is gone: the maker order is cancelled
    await settle(task)
    assert desk.cancels == [a.client_order_id]
    desk.fill(a, "6")
    await settle(task)

    assert sides(desk.sent)[1:] == [("B", "SELL", "4.000"), ("B", "SELL", "6.000")]
    assert desk.total("B") == 10
    assert task.context.delta == 0


async def test_t15_lots_differ_the_carry_stays_below_the_coarser_lot() -> None:
    desk = two_venues(lot_size=D("0.01"), min_quantity=D("0.01"))
    task = await running(
        desk, total_quantity="2.00", order_quantity="2.00", maker_side=Side.BUY
    )
    a = desk.only_open("A")
    desk.fill(a, "1.234")
    await settle(task)
    desk.fill(a, "0.077")
    await settle(task)

    assert sides(desk.sent)[1:] == [("B", "SELL", "1.230"), ("B", "SELL", "0.080")]
    assert task.context.delta == D("0.001")


@pytest.mark.parametrize("maker", [None, Side.BUY])
async def test_t15_a_fee_in_the_base_asset_is_not_sold(maker: Side | None) -> None:
    desk = FakeDesk(
        instrument(venue="A", fee_in="base", maker_fee=D("0.001")),
        instrument(venue="B"),
    )
    requote(desk)
    task = await running(desk, maker_side=maker)
    if maker is None:
        assert desk.only_open("B").request.quantity == D("0.999")
        desk.fill(desk.only_open("B"))
    desk.fill(desk.only_open("A"))
    await settle(task)

    assert desk.total("B") == D("0.999")
    assert (task.context.state, task.context.delta) == ("COMPLETED", 0)


@pytest.mark.parametrize(("least", "opens"), [("0.0015", True), ("0.0025", False)])
async def test_t15_it_opens_only_at_a_sufficient_edge(least: str, opens: bool) -> None:
    desk = two_venues()
    requote(desk, a="100.0", b="100.7")  # ask 100.2, bid 100.5: edge 0.0019915
    await running(desk, min_profitability=least)

    assert bool(desk.sent) is opens


async def test_t15_a_poor_edge_does_not_stop_rebalancing() -> None:
    desk = two_venues()
    requote(desk, b="100.7")
    task = await running(desk, min_profitability="0.0015")
    desk.fill(desk.only_open("A"), "0.500")
    requote(desk, b="99.0")
    desk.cancel_script.extend(["now", "now"])
    await settle(task)

    assert sides(desk.sent)[-1] == ("B", "SELL", "0.500")
    assert desk.open_orders() == []


async def test_old_prices_open_nothing_but_hedges_still_go() -> None:
    desk = two_venues()
    task = await running(desk)
    desk.fill(desk.only_open("A"), "0.500")
    desk.clock.advance(11)
    desk.cancel_script.append("now")
    await settle(task)

    assert sides(desk.sent)[-1] == ("B", "SELL", "0.500")
    assert len(desk.sent) == 3


async def test_a_leg_is_replaced_when_it_is_off_by_more_than_its_tolerance() -> None:
    desk = two_venues()
    task = await running(
        desk, offset_ticks={"buy": 1, "sell": 1}, tick_tolerance={"buy": 2, "sell": 2}
    )
    assert desk.only_open("A").request.price == D("99.9")
    requote(desk, a="100.2")
    await settle(task)
    assert desk.cancels == []
    requote(desk, a="100.3")
    await settle(task)
    assert len(desk.cancels) == 1
    desk.acknowledge_cancel(desk.only_open("A"))
    await settle(task)
    assert desk.only_open("A").request.price == D("100.2")


async def test_children_never_run_more_than_one_ahead_of_the_other_leg() -> None:
    desk = two_venues()
    task = await running(desk, order_quantity="0.250", max_imbalance="10")
    desk.fill(desk.only_open("A"))
    await settle(task)

    assert desk.open_orders("A") == []
    desk.fill(desk.only_open("B"))
    await settle(task)
    assert len(desk.open_orders("A")) == len(desk.open_orders("B")) == 1


async def test_within_the_tolerance_the_limit_orders_may_finish_and_the_end_is_flat() -> (
    None
):
    desk = two_venues()
    task = await running(desk, max_imbalance="1")
    desk.fill(desk.only_open("A"))
    await settle(task)
    assert desk.cancels == []
    desk.fill(desk.only_open("B"), "0.4")
    await settle(task)
    desk.end(desk.only_open("B"), OrderStatus.EXPIRED)
    await settle(task)
    desk.fill(desk.only_open("B"))
    await settle(task)
    assert (task.context.state, task.context.delta) == ("COMPLETED", 0)


async def test_at_the_time_limit_both_legs_are_cancelled_and_the_rest_balanced() -> (
    None
):
    desk = two_venues()
    task = await running(desk, time_limit_s=3.0, max_imbalance="1")
    desk.fill(desk.only_open("A"), "0.3")
    desk.cancel_script.extend(["now", "now"])
    await pass_time(task, desk, 4.0)

    assert (task.context.state, task.context.close_reason) == (
        "COMPLETED",
        "TIME_LIMIT",
    )
    assert (task.context.delta, desk.open_orders()) == (0, [])


async def test_a_late_fill_while_completing_is_still_balanced() -> None:
    desk = two_venues()
    task = await running(desk, time_limit_s=1.0)
    b = desk.only_open("B")
    desk.cancel_script.extend(["now", "now"])
    await pass_time(task, desk, 1.0)
    for _ in range(6):
        if task.context.state == "COMPLETING":
            break
        await task.step()
    desk._change(
        desk.ledger[b.client_order_id],
        filled_quantity=D("0.5"),
        average_price=D("100.3"),
    )
    await settle(task)

    assert sides(desk.sent)[-1] == ("A", "BUY", "0.500")
    assert (task.context.state, task.context.delta) == ("COMPLETED", 0)


async def test_t14_random_lives_always_end_flat_and_never_beyond_the_total() -> None:
    for seed in range(300):
        await _random_life(seed)


async def _random_life(seed: int) -> None:
    chance = random.Random(seed)
    desk = two_venues()
    maker = chance.choice([None, Side.BUY, Side.SELL])
    facts: dict[str, Any] = {
        "order_quantity": chance.choice(["1.000", "0.300"]),
        "maker_side": maker,
        "max_imbalance": chance.choice(["0", "0.2"]),
        "max_naked_s": 1e9,
        "max_leg_retries": 1000,
    }
    task: DeltaNeutralTask = await attach(task_of(**facts), desk)
    saved = task.context
    for _ in range(3_000):
        roll = chance.random()
        if roll < 0.45:
            try:
                await task.step()
            except Crash:
                roll = 0.94
        elif roll < 0.70:
            for order in desk.open_orders():
                if order.status is OrderStatus.UNKNOWN:
                    arrived = any(
                        o.client_order_id == order.client_order_id for o in desk.sent
                    )
                    desk.resolve(order, accepted=arrived)
                elif order.request.price is None:
                    desk.fill(order, price="100.1", liquidity=Liquidity.TAKER)
                elif chance.random() < 0.4:
                    lots = int(order.remaining_quantity / D("0.001"))
                    desk.fill(order, D("0.001") * chance.randint(1, lots))
                elif order.status is OrderStatus.PENDING_CANCEL:
                    desk.acknowledge_cancel(order)
        elif roll < 0.80:
            requote(desk, a=str(D("100") + D("0.1") * chance.randint(-5, 5)))
        elif roll < 0.90:
            desk.clock.advance(chance.choice([0.01, 0.5]))
            requote(desk)
        elif roll < 0.92:
            saved = task.context
        elif roll > 0.95:
            answers = [
                "accept",
                "lost",
                "reject:X",
                "crash_before",
                "crash_after",
                "fill",
            ]
            desk.answer(chance.choice(answers), venue=chance.choice("AB"))
        if 0.93 < roll <= 0.95:
            for order in desk.open_orders():
                if order.status is OrderStatus.SUBMITTED:
                    desk._change(order, status=OrderStatus.UNKNOWN)
            task = await reborn(task, desk, saved)
        for venue, side in (("A", Side.BUY), ("B", Side.SELL)):
            orders = [
                o
                for o in desk.orders()
                if o.request.venue == venue and o.request.side is side
            ]
            risk = sum((o.filled_quantity + o.working_quantity for o in orders), D(0))
            assert risk <= D("1.000"), f"seed {seed}: {risk} at risk on {venue}"
        if task.context.state == "COMPLETED":
            break
    else:
        raise AssertionError(f"seed {seed}: never completed, {task.context}")
    assert abs(task.context.delta) * 99 < 5, f"seed {seed}: {task.context}"
    assert task.context.delta == task.context.residual_delta
    assert desk.total("A") - desk.total("B") == task.context.delta


def test_it_wants_the_quotes_of_its_legs() -> None:
    one = D(1)
    task = task_of()
    events = [
        QuoteChanged(
            symbol=s, venue=v, bid=one, ask=one, bid_quantity=one, ask_quantity=one
        )
        for s, v in (
            ("BTC/USDT", "A"),
            ("BTC/USDT", "B"),
            ("BTC/USDT", "C"),
            ("ETH/USDT", "A"),
        )
    ]

    assert [task.wants(e) for e in events] == [True, True, False, False]
    assert task.keys() == ("BTC/USDT@A", "BTC/USDT@B")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("symbol", "BTC"),
        ("venues", {Side.BUY: "A", Side.SELL: "A"}),
        ("venues", {Side.BUY: "A"}),
        ("total_quantity", "0"),
        ("order_quantity", "0"),
        ("max_imbalance", "-1"),
        ("max_naked_s", 0.0),
        ("max_leg_retries", 0),
        ("max_age_s", 0.0),
        ("time_limit_s", 0.0),
    ],
)
def test_a_wrong_parameter_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}` is .*expected"):
        task_of(**{field: value})


# --- What a crash and a halt must not undo ---------------------------------------------------------------


async def test_a_leg_that_was_unwound_is_not_begun_again_by_an_older_context() -> None:
    """The unwinding order left, and the process died before the context said so: the ledger does."""
    desk = two_venues()
    task = await running(desk, max_naked_s=3600)
    desk.fill(desk.only_open("A"))
    await settle(task)
    desk.acknowledge_cancel(desk.only_open("B"))
    desk.denials.extend(["SYMBOL_HALTED"] * 3)
    older = task.context
    while ("A", "SELL", "1.000") not in sides(desk.sent):
        older = task.context
        requote(desk)
        await task.step()
        desk.clock.advance(0.1)
    assert older.close_reason is None
    sent = len(desk.sent)

    task = await reborn(task, desk, older)
    requote(desk)
    await pass_time(task, desk, 5)

    assert len(desk.sent) == sent
    assert (task.context.state, task.context.close_reason) == ("COMPLETED", "UNWOUND")


class HaltedDesk(FakeDesk):
    """Its gate lets only reduce-only orders pass, once it is halted."""

    is_halted = False

    async def submit(self, request: OrderRequest) -> Order:
        if self.is_halted and not request.reduce_only:
            raise OrderDeniedError("TRADING_HALTED", "by the operator")
        return await super().submit(request)


async def test_a_halt_does_not_keep_the_desk_on_one_leg() -> None:
    desk = HaltedDesk(instrument(venue="A"), instrument(venue="B"))
    requote(desk)
    task = await running(desk)
    desk.fill(desk.only_open("A"))
    desk.end(desk.only_open("B"), OrderStatus.REJECTED, "no")
    desk.is_halted = True

    for _ in range(40):
        requote(desk)
        await pass_time(task, desk, 0.5)

    assert (task.context.delta, task.context.close_reason) == (0, "UNWOUND")
    assert sides(desk.sent)[-1] == ("A", "SELL", "1.000")


async def test_an_unwinding_order_is_only_marked_reduce_only_if_the_position_covers_it() -> (
    None
):
    """Several tasks may share a net position: another one's short must not make the venue refuse ours."""
    desk = two_venues()
    desk.held_positions["BTC/USDT@A"] = Position(
        symbol="BTC/USDT", venue="A", quantity=D("-0.4")
    )
    desk.answer("reject:no", "reject:no", "reject:no", "reject:no", venue="B")
    task = await running(desk)
    desk.fill(desk.only_open("A"))
    for _ in range(20):
        requote(desk)
        await pass_time(task, desk, 0.5)

    assert sides(desk.sent)[-1] == ("A", "SELL", "1.000")
    assert desk.sent[-1].request.reduce_only is False
