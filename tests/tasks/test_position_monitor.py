"""Guarding positions: T-16 to T-20, H6a and H6b."""

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
from nightdesk.model.events import OrderFilled, QuoteChanged
from nightdesk.model.order import Fill, Liquidity, OrderStatus, OrderType, Side
from nightdesk.model.position import Position
from nightdesk.tasks.position_monitor import PositionMonitorContext, PositionMonitorTask

D = Decimal
HELD: dict[str, Any] = {
    "task_id": "watch",
    "symbol": "BTC/USDT",
    "venue": "A",
    "side": "LONG",
    "quantity": "1.000",
    "entry_price": "100",
}


def monitor(**changes: Any) -> PositionMonitorTask:
    return PositionMonitorTask(PositionMonitorContext(**(HELD | changes)))


def bid(desk: FakeDesk, price: str) -> None:
    desk.quote(price, str(D(price) + D("0.1")))


def ask(desk: FakeDesk, price: str) -> None:
    desk.quote(str(D(price) - D("0.1")), price)


@pytest.fixture
def desk() -> FakeDesk:
    desk = FakeDesk()
    bid(desk, "100.0")
    return desk


async def guarding(desk: FakeDesk, **changes: Any) -> PositionMonitorTask:
    task: PositionMonitorTask = await attach(monitor(**changes), desk)
    await settle(task)
    return task


async def test_t16_a_long_is_stopped_at_its_level_and_not_a_tick_before(
    desk: FakeDesk,
) -> None:
    task = await guarding(desk, stop_loss="0.05")
    bid(desk, "95.1")
    await settle(task)
    assert desk.sent == []

    desk.answer("rest")
    bid(desk, "95.0")
    await settle(task)
    for step in range(100):
        bid(desk, str(D("95.0") - D("0.1") * (step % 20)))
        await settle(task)
    assert sides(desk.sent) == [("A", "SELL", "1.000")]
    assert desk.sent[0].request.type is OrderType.MARKET
    assert desk.sent[0].request.reduce_only

    desk.fill(desk.only_open(), price="94.0", liquidity=Liquidity.TAKER)
    await settle(task)
    assert (task.context.state, task.context.close_reason) == ("COMPLETED", "STOP_LOSS")
    assert task.context.exit_price == D("94.0")


async def test_t16_a_short_is_the_mirror_on_the_ask(desk: FakeDesk) -> None:
    task = await guarding(desk, side="SHORT", stop_loss="0.05")
    ask(desk, "104.9")
    await settle(task)
    assert desk.sent == []
    ask(desk, "105.0")
    await settle(task)

    assert sides(desk.sent) == [("A", "BUY", "1.000")]
    assert task.context.close_reason == "STOP_LOSS"
    assert task.context.gross_pnl == D("-5.0")


@pytest.mark.parametrize(("late", "closed"), [(False, "9.000"), (True, "10.000")])
async def test_t17_a_partial_entry_is_stopped_with_exactly_what_is_held(
    late: bool, closed: str
) -> None:
    """H6a: another executor had no stop loss until the entry was complete."""
    desk = FakeDesk()
    bid(desk, "100.5")
    task = await guarding(
        desk, entry="limit", quantity="10", entry_price="100", stop_loss="0.05"
    )
    entry = desk.only_open()
    desk.fill(entry, "9")
    await settle(task)
    bid(desk, "80.0")
    await settle(task)
    assert desk.cancels == [entry.client_order_id]
    assert len(desk.sent) == 1

    if late:
        desk.fill(entry, "1")
    else:
        desk.acknowledge_cancel(entry)
    await settle(task)

    assert sides(desk.sent)[1:] == [("A", "SELL", closed)]
    assert (task.context.state, task.context.held_quantity) == ("COMPLETED", 0)


async def test_t17_an_entry_cancelled_by_the_venue_keeps_its_9_and_is_not_repeated() -> (
    None
):
    """H6b: another executor bought 10 again."""
    desk = FakeDesk()
    bid(desk, "100.5")
    task = await guarding(
        desk, entry="limit", quantity="10", entry_price="100", stop_loss="0.05"
    )
    desk.fill(desk.only_open(), "9")
    desk.end(desk.only_open(), OrderStatus.CANCELED, "by the venue")
    await pass_time(task, desk, 5.0)
    assert len(desk.sent) == 1
    assert task.context.held_quantity == 9

    bid(desk, "95.0")
    await settle(task)
    assert sides(desk.sent)[1:] == [("A", "SELL", "9.000")]


async def test_t17_a_cancel_without_proof_does_not_keep_the_stop_waiting_for_ever() -> (
    None
):
    desk = FakeDesk()
    bid(desk, "100.5")
    task = await guarding(
        desk, entry="limit", quantity="10", entry_price="100", stop_loss="0.05"
    )
    entry = desk.only_open()
    desk.fill(entry, "9")
    bid(desk, "90.0")
    await pass_time(task, desk, 2.5)
    assert sides(desk.sent)[1:] == [("A", "SELL", "9.000")]

    desk.fill(entry, "1")
    await settle(task)
    assert sides(desk.sent)[2:] == [("A", "SELL", "1.000")]
    assert task.context.state == "COMPLETED"


async def test_t18_the_trailing_stop_follows_and_survives_a_restart(
    desk: FakeDesk,
) -> None:
    task = await guarding(desk, trailing_activation="0.02", trailing_delta="0.01")

    def level() -> Decimal | None:
        return task.context.guards["BTC/USDT@A"].trailing_stop

    bid(desk, "101.9")
    await settle(task)
    assert level() is None
    for price, stop in (("102.0", "101.0"), ("104.0", "103.0"), ("103.2", "103.0")):
        bid(desk, price)
        await settle(task)
        assert level() == D(stop)
    assert desk.sent == []

    task = await reborn(task, desk)
    bid(desk, "103.0")
    await settle(task)

    assert (task.context.close_reason, task.context.exit_price) == (
        "TRAILING_STOP",
        D("103.0"),
    )


async def test_t18_the_trailing_stop_of_a_short_is_the_mirror(desk: FakeDesk) -> None:
    task = await guarding(
        desk, side="SHORT", trailing_activation="0.02", trailing_delta="0.01"
    )
    for price in ("98.0", "96.0"):
        ask(desk, price)
        await settle(task)
    assert task.context.guards["BTC/USDT@A"].trailing_stop == D("97.0")
    ask(desk, "97.0")
    await settle(task)

    assert task.context.close_reason == "TRAILING_STOP"


async def test_t19_of_three_barriers_due_at_once_the_stop_loss_counts(
    desk: FakeDesk,
) -> None:
    task = await guarding(
        desk,
        stop_loss="0.05",
        trailing_activation="0.02",
        trailing_delta="0.01",
        time_limit_s=60.0,
    )
    bid(desk, "103.0")
    await settle(task)
    desk.clock.advance(61)
    bid(desk, "80.0")
    await settle(task)

    assert len(desk.sent) == 1
    assert (task.context.close_reason, task.context.exit_price) == (
        "STOP_LOSS",
        D("80.0"),
    )


@pytest.mark.parametrize(
    ("params", "path", "reason"),
    [
        ({"take_profit": "0.1"}, ["109.9", "110.0"], "TAKE_PROFIT"),
        ({"break_even": "0.01"}, ["101.0", "100.0"], "BREAK_EVEN"),
    ],
)
async def test_a_barrier_closes_with_its_own_reason(
    desk: FakeDesk, params: dict[str, Any], path: list[str], reason: str
) -> None:
    task = await guarding(desk, **params)
    for price in path:
        assert desk.sent == []
        bid(desk, price)
        await settle(task)

    assert task.context.close_reason == reason


async def test_the_time_limit_closes(desk: FakeDesk) -> None:
    task = await guarding(desk, time_limit_s=5.0)
    await pass_time(task, desk, 6.0)

    assert task.context.close_reason == "TIME_LIMIT"


async def test_t19_an_old_price_triggers_nothing_and_alerts_the_next_fresh_one_triggers(
    desk: FakeDesk,
) -> None:
    task = await guarding(desk, stop_loss="0.05")
    bid(desk, "90.0")
    desk.clock.advance(10.5)
    await settle(task)
    await settle(task)
    assert desk.sent == []
    assert [level for level, _ in desk.alerts] == ["warning"]

    bid(desk, "94.0")
    await settle(task)
    assert len(desk.sent) == 1


async def test_t20_the_money_of_a_profit_is_exact() -> None:
    desk = FakeDesk()
    ask(desk, "100.0")
    task = await guarding(
        desk,
        entry="market",
        quantity="10",
        entry_price=None,
        take_profit="0.1",
        platform_fee="0.2",
        profit_share="0.2",
    )
    bid(desk, "110.0")
    await settle(task)

    c = task.context
    assert (c.gross_pnl, c.fees_paid, c.net_pnl) == (100, D("1.05"), D("98.75"))
    assert (c.profit_share_due, c.user_pnl) == (D("19.75"), D("79.00"))
    balance = sum(
        -o.request.side.sign * o.filled_quantity * (o.average_price or 0)
        - o.fees["USDT"]
        for o in desk.orders()
    )
    assert balance == c.net_pnl + D("0.2")


async def test_t20_a_loss_shares_nothing(desk: FakeDesk) -> None:
    task = await guarding(desk, stop_loss="0.05", profit_share="0.2", entry_fees="0.05")
    bid(desk, "95.0")
    await settle(task)

    c = task.context
    assert (c.profit_share_due, c.user_pnl) == (0, c.net_pnl)
    assert c.net_pnl == D("-5.0") - D("0.05") - D("95") * D("0.0005")


async def test_a_fee_in_the_base_asset_is_not_sold_and_the_crumb_is_reported() -> None:
    desk = FakeDesk(instrument(fee_in="base", taker_fee=D("0.001")))
    ask(desk, "100.0")
    task = await guarding(
        desk, entry="market", entry_price=None, stop_loss="0.05", quantity="1.0005"
    )
    bid(desk, "95.0")
    await settle(task)

    assert sides(desk.sent) == [("A", "BUY", "1.000"), ("A", "SELL", "0.999")]
    assert task.context.held_quantity == 0


async def test_a_residue_too_small_to_close_is_told() -> None:
    desk = FakeDesk(instrument(min_notional=D("200")))
    bid(desk, "100.0")
    task = await guarding(desk, stop_loss="0.05")
    bid(desk, "95.0")
    await settle(task)

    assert task.context.state == "COMPLETED"
    assert task.context.closed[0].residual == D("1.000")
    assert any("too little" in text for _, text in desk.alerts)


async def test_a_refused_close_is_critical_and_tried_again_with_delay(
    desk: FakeDesk,
) -> None:
    desk.answer("reject:X", "reject:X")
    desk.denials.append("RATE_LIMIT_EXCEEDED")
    task = await guarding(desk, stop_loss="0.05")
    bid(desk, "95.0")
    await pass_time(task, desk, 3.0)

    assert len(desk.sent) == 3
    assert task.context.state == "COMPLETED"
    assert [level for level, _ in desk.alerts].count("critical") == 1


async def test_an_entry_that_never_fills_guards_nothing_and_says_so() -> None:
    desk = FakeDesk()
    bid(desk, "100.5")
    task = await guarding(desk, entry="limit", entry_timeout_s=2.0)
    desk.cancel_script.append("now")
    await pass_time(task, desk, 3.0)

    assert (task.context.state, task.context.close_reason) == (
        "COMPLETED",
        "ENTRY_CANCELED",
    )
    assert len(desk.sent) == 1


async def test_a_late_entry_is_cut_off_and_its_part_guarded() -> None:
    desk = FakeDesk()
    bid(desk, "100.5")
    task = await guarding(desk, entry="limit", entry_timeout_s=2.0, stop_loss="0.05")
    desk.fill(desk.only_open(), "0.4")
    desk.cancel_script.append("now")
    await pass_time(task, desk, 3.0)
    assert task.context.state == "EXECUTING"
    bid(desk, "95.0")
    await settle(task)

    assert sides(desk.sent)[1:] == [("A", "SELL", "0.400")]


async def test_a_market_entry_waits_for_a_fresh_price() -> None:
    desk = FakeDesk()
    task = await guarding(desk, entry="market", entry_price=None)
    assert desk.sent == []
    bid(desk, "100.0")
    await settle(task)
    assert len(desk.sent) == 1


@pytest.mark.parametrize("answer", ["crash_before", "crash_after"])
async def test_a_crash_while_closing_never_closes_twice(
    desk: FakeDesk, answer: str
) -> None:
    desk.answer(answer)
    task = await guarding(desk, stop_loss="0.05")
    old = task.context
    bid(desk, "95.0")
    with pytest.raises(Crash):
        await settle(task)
    desk._change(desk.only_open(), status=OrderStatus.UNKNOWN)

    task = await reborn(task, desk, old)
    bid(desk, "110.0")
    await pass_time(task, desk, 3.0)
    assert len(desk.ledger) == 1
    desk.resolve(desk.only_open(), accepted=answer == "crash_after")
    if answer == "crash_after":
        desk.fill(desk.only_open(), price="94.0")
    bid(desk, "94.0")
    await pass_time(task, desk, 2.0)

    assert desk.total() == 1
    assert task.context.state == "COMPLETED"


async def test_a_lost_context_with_a_closing_order_in_the_ledger_goes_on_closing(
    desk: FakeDesk,
) -> None:
    task = await guarding(desk, stop_loss="0.05")
    desk.answer("rest")
    bid(desk, "95.0")
    await settle(task)
    desk.fill(desk.only_open(), "0.4", price="95.0")
    desk.end(desk.only_open(), OrderStatus.EXPIRED)

    task = await attach(monitor(stop_loss="0.05"), desk)
    bid(desk, "99.0")
    await settle(task)

    assert desk.total() == 1
    assert task.context.close_reason == "RECOVERED"


# Whatever the desk holds ------------------------------------------------------------------


def holding(
    desk: FakeDesk, quantity: str, price: str = "100", venue: str = "A"
) -> None:
    desk.held_positions[f"BTC/USDT@{venue}"] = Position(
        symbol="BTC/USDT", venue=venue, quantity=D(quantity), average_price=D(price)
    )


async def watching_all(desk: FakeDesk, **changes: Any) -> PositionMonitorTask:
    task: PositionMonitorTask = await attach(
        PositionMonitorTask(PositionMonitorContext(task_id="all", **changes)), desk
    )
    await settle(task)
    return task


async def test_without_a_symbol_it_guards_every_position_and_never_ends() -> None:
    desk = FakeDesk(instrument(venue="A"), instrument(venue="B"))
    bid(desk, "100.0")
    desk.quote("100.0", "100.1", "B")
    holding(desk, "1.000")
    holding(desk, "-2.000", venue="B")
    task = await watching_all(desk, stop_loss="0.05")
    assert set(task.context.guards) == {"BTC/USDT@A", "BTC/USDT@B"}

    bid(desk, "95.0")
    await settle(task)
    await settle(task)

    assert sides(desk.sent) == [("A", "SELL", "1.000")]
    assert task.context.state == "EXECUTING"
    assert [c.reason for c in task.context.closed] == ["STOP_LOSS"]
    assert task.context.closed[0].exit_price == D("95.0")
    assert set(task.context.guards) == {"BTC/USDT@B"}


async def test_a_position_closed_by_others_is_let_go(desk: FakeDesk) -> None:
    holding(desk, "1.000")
    task = await watching_all(desk, symbol="BTC/USDT", venue="A", stop_loss="0.05")
    holding(desk, "-1.000", price="101")
    await settle(task)

    assert task.context.closed[0].reason == "CLOSED_ELSEWHERE"
    assert task.context.guards["BTC/USDT@A"].side == "SHORT"
    holding(desk, "-1.000", price="102")
    await settle(task)
    assert task.context.guards["BTC/USDT@A"].entry_price == 102


def test_it_wants_quotes_of_what_it_guards_and_fills_that_may_open_something() -> None:
    one = D(1)
    quote = QuoteChanged(
        symbol="BTC/USDT",
        venue="A",
        bid=one,
        ask=one,
        bid_quantity=one,
        ask_quantity=one,
    )
    fill = OrderFilled(
        venue="A",
        symbol="BTC/USDT",
        client_order_id="x",
        fill=Fill(
            venue="A",
            symbol="BTC/USDT",
            trade_id="1",
            venue_order_id="1",
            client_order_id="x",
            side=Side.BUY,
            quantity=one,
            price=one,
        ),
    )
    own, every = monitor(), PositionMonitorTask(PositionMonitorContext(task_id="all"))

    assert (own.wants(quote), own.wants(fill)) == (True, False)
    assert (every.wants(quote), every.wants(fill)) == (False, True)
    assert (own.keys(), every.keys()) == (("BTC/USDT@A",), ())


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("symbol", {"symbol": "", "venue": ""}),
        ("side", {"side": None}),
        ("quantity", {"quantity": "0"}),
        ("entry_price", {"entry_price": None}),
        ("trailing_delta", {"trailing_activation": "0.02"}),
        ("stop_loss", {"stop_loss": "-0.05"}),
        ("profit_share", {"profit_share": "1"}),
        ("max_age_s", {"max_age_s": 0.0}),
    ],
)
def test_a_wrong_parameter_is_named(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{field}` is .*expected"):
        monitor(**changes)
