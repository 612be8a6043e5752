"""The iceberg: T-1 to T-8, and H7 of the failures of others."""

import itertools
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
)
from nightdesk.model.events import QuoteChanged, TradePrinted
from nightdesk.model.order import Liquidity, OrderStatus, Side, TimeInForce
from nightdesk.tasks.iceberg import IcebergContext, IcebergTask

D = Decimal


def iceberg(**changes: Any) -> IcebergTask:
    facts: dict[str, Any] = {
        "task_id": "ice",
        "symbol": "BTC/USDT",
        "venue": "A",
        "side": Side.SELL,
        "total_quantity": "1.000",
        "order_quantity": "0.300",
    }
    return IcebergTask(IcebergContext(**(facts | changes)))


async def running(desk: FakeDesk, **changes: Any) -> IcebergTask:
    task: IcebergTask = await attach(iceberg(**changes), desk)
    await settle(task)
    return task


@pytest.fixture
def desk() -> FakeDesk:
    desk = FakeDesk()
    desk.quote("100.0", "100.2")
    return desk


async def fill_all(task: IcebergTask, desk: FakeDesk) -> None:
    while task.context.state == "EXECUTING":
        assert len(desk.open_orders()) == 1
        desk.fill(desk.only_open())
        await settle(task)


async def test_t1_a_total_of_1_is_sent_in_slices_of_0_3_and_a_rest(
    desk: FakeDesk,
) -> None:
    task = await running(desk)

    await fill_all(task, desk)

    assert desk.quantities() == ["0.300", "0.300", "0.300", "0.100"]
    assert {order.request.price for order in desk.sent} == {D("100.2")}
    assert task.context.state == "COMPLETED"
    assert task.context.close_reason == "COMPLETED"
    assert task.context.filled_quantity == D("1.000")
    assert desk.open_orders() == []


async def test_t2_the_tail_below_a_lot_is_reported_and_the_one_below_the_notional_merged(
    desk: FakeDesk,
) -> None:
    task = await running(desk, total_quantity="1.0005", order_quantity="0.3337")

    await fill_all(task, desk)

    assert desk.quantities() == ["0.333", "0.333", "0.334"]
    assert task.context.filled_quantity == D("1.000")
    assert task.context.residual_quantity == D("0.0005")
    assert any("residual 0.0005" in text for _, text in desk.alerts)


async def test_t3_a_child_below_the_notional_is_refused_and_nothing_is_sent(
    desk: FakeDesk,
) -> None:
    task = await running(desk, order_quantity="0.033")

    assert desk.sent == []
    assert task.context.state == "ERROR"
    assert task.context.close_reason == "NOTIONAL_BELOW_MINIMUM"
    assert task.context.error is not None
    assert task.context.error.type == "OrderDeniedError"
    assert "0.050" in task.context.error.message  # the least child that would do


async def test_t3_a_child_below_the_least_quantity_is_refused(desk: FakeDesk) -> None:
    task = await running(desk, order_quantity="0.0005")

    assert desk.sent == []
    assert task.context.close_reason == "QUANTITY_BELOW_MINIMUM"


async def test_t3_an_illegal_tail_is_merged_into_the_last_child(desk: FakeDesk) -> None:
    task = await running(desk, total_quantity="0.160", order_quantity="0.060")

    await fill_all(task, desk)

    assert desk.quantities() == ["0.060", "0.100"]


async def test_an_illegal_tail_is_left_and_reported_if_so_configured(
    desk: FakeDesk,
) -> None:
    task = await running(
        desk, total_quantity="0.160", order_quantity="0.060", on_tail="leave"
    )

    await fill_all(task, desk)

    assert desk.quantities() == ["0.060", "0.060"]
    assert task.context.residual_quantity == D("0.040")


async def test_t4_within_the_tolerance_nothing_is_sent_beyond_it_one_cancel_and_one_order(
    desk: FakeDesk,
) -> None:
    task = await running(desk, offset_ticks=2, tick_tolerance=3)
    assert desk.only_open().request.price == D("100.4")

    desk.quote("100.3", "100.5")
    await settle(task)
    assert (len(desk.sent), desk.cancels) == (1, [])

    desk.quote("100.4", "100.6")
    for _ in range(5):
        await settle(task)
    assert desk.cancels == [desk.sent[0].client_order_id]
    assert len(desk.sent) == 1

    desk.acknowledge_cancel(desk.sent[0])
    await settle(task)
    await settle(task)
    assert len(desk.sent) == 2
    assert desk.sent[1].request.price == D("100.8")
    assert len(desk.cancels) == 1


async def test_t5_a_partly_filled_child_that_is_moved_keeps_its_slice(
    desk: FakeDesk,
) -> None:
    task = await running(desk, offset_ticks=2, tick_tolerance=3)
    desk.fill(desk.only_open(), "0.120")

    desk.quote("100.4", "100.6")
    await settle(task)
    desk.acknowledge_cancel(desk.only_open())
    await settle(task)
    await fill_all(task, desk)

    assert desk.quantities() == ["0.300", "0.180", "0.300", "0.300", "0.100"]
    assert desk.total() == D("1.000")
    assert task.context.avg_price == D("100.752")


async def test_t5_a_slice_moved_twice_still_keeps_its_rest(desk: FakeDesk) -> None:
    """H7: another chaser sent the full size again at its second renewal."""
    task = await running(desk)
    for ask, part in (("100.5", "0.1"), ("100.8", "0.05")):
        desk.fill(desk.only_open(), part)
        desk.quote("100.0", ask)
        await settle(task)
        desk.acknowledge_cancel(desk.only_open())
        await settle(task)

    assert desk.quantities() == ["0.300", "0.200", "0.150"]
    assert desk.total() + desk.working() <= D("1.000")


async def test_t6_a_fill_that_beats_the_cancel_is_counted_once_and_nothing_is_sent_before(
    desk: FakeDesk,
) -> None:
    task = await running(desk)
    desk.quote("100.4", "100.6")
    await settle(task)
    assert desk.only_open().status is OrderStatus.PENDING_CANCEL

    for _ in range(3):
        await settle(task)
    assert len(desk.sent) == 1

    desk.fill(desk.only_open())
    await settle(task)
    assert task.context.filled_quantity == D("0.300")
    assert desk.quantities() == ["0.300", "0.300"]
    assert desk.total() + desk.working() == D("0.600")


class Interleaving:
    """One random life of an iceberg; the invariant is checked after every act."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.desk = FakeDesk(seed=seed)
        self.desk.quote("100.0", "100.2")
        self.side = self.random.choice(list(Side))
        self.saved = iceberg(side=self.side).context

    async def play(self) -> IcebergTask:
        task: IcebergTask = await attach(
            iceberg(
                side=self.side,
                tick_tolerance=self.random.choice((0, 1, 3)),
                size_variance=self.random.choice(("0", "0.2")),
                max_post_only_rejects=1000,
            ),
            self.desk,
        )
        for _ in range(2_000):
            task = await self.act(task)
            self.check()
            if task.context.state == "COMPLETED":
                return task
        raise AssertionError("never completed")

    async def act(self, task: IcebergTask) -> IcebergTask:
        roll = self.random.random()
        if roll < 0.45:
            return await self.cycle(task)
        if roll < 0.70:
            self.venue_acts()
        elif roll < 0.80:
            bid = D("100.0") + D("0.1") * self.random.randint(-8, 8)
            self.desk.quote(str(bid), str(bid + D("0.2")))
        elif roll < 0.90:
            self.desk.clock.advance(self.random.choice((0.01, 0.3, 1.0)))
            book = self.desk.quotes["BTC/USDT@A"]
            self.desk.quote(str(book.bid), str(book.ask))
        elif roll < 0.93:
            self.saved = task.context
        elif roll < 0.95:
            return await self.restart(task)
        else:
            self.desk.script["A"].append(
                self.random.choice(
                    (
                        "accept",
                        "fill",
                        "lost",
                        "vanish",
                        "reject:POST_ONLY",
                        "reject:insufficient balance",
                        "crash_before",
                        "crash_after",
                    )
                )
            )
            self.desk.cancel_script.append(
                self.random.choice(("now", "held", "refused"))
            )
        return task

    async def cycle(self, task: IcebergTask) -> IcebergTask:
        try:
            await task.step()
        except Crash:
            return await self.restart(task)
        return task

    async def restart(self, task: IcebergTask) -> IcebergTask:
        """Start again from a context that may be much older than the crash, once intents are UNKNOWN."""
        for order in self.desk.open_orders():
            if order.status is OrderStatus.SUBMITTED:
                self.desk._change(order, status=OrderStatus.UNKNOWN)
        return await reborn(task, self.desk, self.saved)

    def venue_acts(self) -> None:
        for order in self.desk.open_orders():
            roll = self.random.random()
            if order.status is OrderStatus.UNKNOWN:
                arrived = order in self.desk.sent or any(
                    o.client_order_id == order.client_order_id for o in self.desk.sent
                )
                self.desk.resolve(order, accepted=arrived and roll < 0.7)
            elif roll < 0.35:
                lots = int(order.remaining_quantity / D("0.001"))
                self.desk.fill(order, D("0.001") * self.random.randint(1, lots))
            elif roll < 0.55:
                self.desk.fill(order)
            elif order.status is OrderStatus.PENDING_CANCEL:
                self.desk.acknowledge_cancel(order)
            elif roll > 0.97:
                self.desk.end(order, OrderStatus.EXPIRED, "the venue ended it")

    def check(self) -> None:
        assert len(self.desk.open_orders()) <= 1
        assert self.desk.total() + self.desk.working() <= D("1.000")


async def test_t6_filled_and_working_never_pass_the_total_in_1000_random_interleavings() -> (
    None
):
    crumbs = 0
    for seed in range(1_000):
        game = Interleaving(seed)
        try:
            task = await game.play()
        except AssertionError as wrong:
            raise AssertionError(f"seed {seed}: {wrong}") from wrong
        total = game.desk.total()
        assert task.context.filled_quantity == total, f"seed {seed}"
        if total != D("1.000"):  # a fill raced a cancel and left what no venue takes
            crumbs += 1
            assert (D("1.000") - total) * D("99") < 5, f"seed {seed}"
            assert task.context.residual_quantity == D("1.000") - total, f"seed {seed}"
            assert any("residual" in text for _, text in game.desk.alerts)
        ids = [order.client_order_id for order in game.desk.sent]
        assert len(ids) == len(set(ids)), f"seed {seed}"
        value = sum(
            o.filled_quantity * (o.average_price or 0) for o in game.desk.orders()
        )
        assert task.context.avg_price == value / total, f"seed {seed}"
    assert crumbs < 100


async def test_t7_post_only_refusals_reprice_passively_with_growing_delay_and_pause_after_five(
    desk: FakeDesk,
) -> None:
    desk.answer(*["reject:POST_ONLY_WOULD_TAKE"] * 5)
    task: IcebergTask = await attach(iceberg(), desk)
    stamps = []

    for _ in range(400):
        await settle(task)
        if len(desk.sent) > len(stamps):
            stamps.append(desk.clock.now)
        desk.clock.advance(0.05)
        desk.quote("100.0", "100.2")

    prices = [order.request.price for order in desk.sent]
    assert prices == [D("100.2"), D("100.3"), D("100.4"), D("100.5"), D("100.6")]
    gaps = [b - a for a, b in itertools.pairwise(stamps)]
    assert gaps == sorted(set(gaps))
    assert task.context.state == "PAUSED"
    assert task.context.pause_reason == "POST_ONLY_REJECTED"
    assert len(desk.alerts) == 1
    assert desk.total() == 0


async def test_t7_an_operator_resumes_and_the_count_begins_anew(desk: FakeDesk) -> None:
    desk.answer(*["reject:POST_ONLY"] * 5)
    task = await running(desk)
    await pass_time(task, desk, 9.0)
    assert task.context.state == "PAUSED"

    task = await reborn(task, desk)  # the pause survives a restart
    await settle(task)
    assert task.context.state == "PAUSED"
    task.resume()
    await settle(task)

    assert len(desk.sent) == 6
    assert desk.only_open().status is OrderStatus.ACCEPTED
    assert task.context.pause_reason is None


async def test_t8_a_lost_reply_or_an_unsent_intent_is_never_followed_by_a_second_order(
    desk: FakeDesk,
) -> None:
    for answer in ("lost", "crash_before", "crash_after"):
        desk = FakeDesk()
        desk.quote("100.0", "100.2")
        desk.answer(answer)
        task: IcebergTask = await attach(iceberg(), desk)
        try:
            await settle(task)
        except Crash:
            task = await reborn(task, desk, iceberg().context)
        desk.clock.advance(3.0)
        desk.quote("101.0", "101.2")
        await settle(task)

        assert len(desk.ledger) == 1
        assert desk.cancels == []


async def test_t8_a_context_older_than_the_crash_does_no_harm(desk: FakeDesk) -> None:
    task = await running(desk)
    old = task.context
    desk.fill(desk.only_open())
    await settle(task)
    desk.fill(desk.only_open(), "0.2")

    task = await reborn(task, desk, old)
    await settle(task)
    await fill_all(task, desk)

    assert desk.total() == D("1.000")
    assert task.context.filled_quantity == D("1.000")


async def test_without_balance_it_pauses_and_tries_again_with_a_growing_delay(
    desk: FakeDesk,
) -> None:
    desk.answer(*["reject:INSUFFICIENT_BALANCE"] * 3)
    task = await running(desk)
    assert task.context.state == "PAUSED"
    assert task.context.pause_reason == "INSUFFICIENT_BALANCE"

    await pass_time(task, desk, 0.9)
    assert len(desk.sent) == 1
    await pass_time(task, desk, 0.3)
    assert len(desk.sent) == 2
    await pass_time(task, desk, 1.5)
    assert len(desk.sent) == 2
    for _ in range(7):
        await pass_time(task, desk, 1.0)
        desk.quote("100.0", "100.2")
    assert len(desk.sent) == 4
    assert task.context.state == "EXECUTING"
    assert len(desk.alerts) == 1


async def test_a_passing_denial_pauses_and_a_lasting_one_ends_it(
    desk: FakeDesk,
) -> None:
    desk.denials.append("TRADING_HALTED")
    task = await running(desk)
    assert (task.context.state, task.context.pause_reason) == (
        "PAUSED",
        "TRADING_HALTED",
    )
    await pass_time(task, desk, 1.5)
    assert len(desk.sent) == 1

    desk.denials.append("NOTIONAL_EXCEEDS_MAX_PER_ORDER")
    task = await running(desk)
    desk.fill(desk.only_open())
    await settle(task)
    assert task.context.state == "ERROR"
    assert task.context.residual_quantity == D("0.700")


async def test_an_old_price_triggers_nothing_and_alerts_once(desk: FakeDesk) -> None:
    task = await running(desk)
    desk.quote("105.0", "105.2")
    desk.clock.advance(10.1)

    for _ in range(5):
        await settle(task)
    assert desk.cancels == []
    assert len(desk.alerts) == 1

    desk.quote("105.0", "105.2")
    await settle(task)
    assert len(desk.cancels) == 1


async def test_no_price_or_half_a_price_sends_nothing() -> None:
    desk = FakeDesk()
    task = await running(desk)
    desk.quote("0", "100.2")
    await settle(task)

    assert desk.sent == []


async def test_the_limit_price_is_never_passed(desk: FakeDesk) -> None:
    await running(desk, limit_price="101.0")

    assert desk.only_open().request.price == D("101.0")


async def test_a_buy_stands_at_the_best_bid_minus_its_offset(desk: FakeDesk) -> None:
    await running(desk, side="buy", offset_ticks=3)

    assert desk.only_open().request.price == D("99.7")


async def test_a_negative_offset_crosses_when_post_only_is_off(desk: FakeDesk) -> None:
    task = await running(desk, offset_ticks=-2, post_only=False)

    assert task.context.state == "COMPLETED"
    assert task.context.avg_price == D("100.0")


async def test_after_the_urgency_timeout_it_takes_the_touch(desk: FakeDesk) -> None:
    task = await running(desk, urgency_timeout_s=5.0)
    for _ in range(6):
        await pass_time(task, desk, 1.0)
        desk.quote("100.0", "100.2")
    assert len(desk.cancels) == 1
    desk.acknowledge_cancel(desk.only_open())
    await settle(task)

    assert desk.sent[1].request.time_in_force is TimeInForce.IOC
    assert desk.sent[1].request.price == D("100.0")
    assert desk.sent[1].request.post_only is False
    assert task.context.filled_quantity == D("0.300")
    assert desk.only_open().request.post_only is True  # progress: patient again


async def test_urgency_respects_the_limit_price(desk: FakeDesk) -> None:
    task = await running(desk, urgency_timeout_s=1.0, limit_price="100.1")
    for _ in range(5):
        await pass_time(task, desk, 1.0)
        desk.quote("100.0", "100.2")

    assert desk.cancels == []


async def test_an_empty_urgent_attempt_is_not_repeated_at_once(desk: FakeDesk) -> None:
    task = await running(desk, urgency_timeout_s=1.0)
    desk.cancel_script.append("now")
    desk.answer(*["rest"] * 3)
    await pass_time(task, desk, 1.0)
    desk.quote("100.0", "100.2")
    await settle(task)
    desk.end(desk.only_open(), OrderStatus.EXPIRED, "nothing there")

    await settle(task)
    assert len(desk.sent) == 2
    desk.clock.advance(0.3)
    await settle(task)
    assert len(desk.sent) == 3


async def test_at_the_time_limit_the_child_is_cancelled_and_the_rest_reported(
    desk: FakeDesk,
) -> None:
    task = await running(desk, time_limit_s=3.0)
    desk.fill(desk.only_open(), "0.1")
    await pass_time(task, desk, 3.0)
    await settle(task)
    desk.acknowledge_cancel(desk.only_open())
    await settle(task)

    assert task.context.state == "COMPLETED"
    assert task.context.close_reason == "TIME_LIMIT"
    assert task.context.residual_quantity == D("0.900")
    assert desk.alerts[-1][0] == "warning"


async def test_a_refused_cancel_is_repeated_only_after_a_growing_delay(
    desk: FakeDesk,
) -> None:
    task = await running(desk)
    desk.cancel_script.extend(["refused"] * 3)
    desk.quote("101.0", "101.2")
    for _ in range(9):
        await settle(task)
        desk.clock.advance(0.1)

    assert len(desk.cancels) == 1
    desk.clock.advance(0.2)
    await settle(task)
    assert len(desk.cancels) == 2


async def test_a_venue_that_ends_every_child_is_not_stormed(desk: FakeDesk) -> None:
    task = await running(desk)
    for _ in range(40):
        for order in desk.open_orders():
            desk.end(order, OrderStatus.CANCELED, "self-trade prevention")
        await settle(task)
        desk.clock.advance(0.1)
        desk.quote("100.0", "100.2")

    assert len(desk.sent) <= 6


async def test_a_crumb_too_small_for_a_new_child_stays_with_the_old_one(
    desk: FakeDesk,
) -> None:
    task = await running(desk, total_quantity="0.300")
    desk.fill(desk.only_open(), "0.260")
    desk.quote("105.0", "105.2")
    await settle(task)
    assert desk.cancels == []

    desk.fill(desk.only_open())
    await settle(task)
    assert task.context.residual_quantity == 0


async def test_more_than_asked_is_a_critical_alert(desk: FakeDesk) -> None:
    task = await running(desk, total_quantity="0.300")
    order = desk.fill(desk.only_open())
    desk._change(order, filled_quantity=D("0.400"))

    await settle(task)

    assert task.context.close_reason == "OVERFILLED"
    assert desk.alerts[0][0] == "critical"


async def test_when_the_price_falls_the_slice_grows_to_what_can_be_traded(
    desk: FakeDesk,
) -> None:
    task = await running(desk, order_quantity="0.050")
    desk.fill(desk.only_open())
    desk.quote("90.0", "90.2")
    await settle(task)

    assert desk.sent[1].request.quantity == D("0.056")


async def test_variance_keeps_every_slice_legal_and_the_total_exact() -> None:
    desk = FakeDesk(seed=7)
    desk.quote("100.0", "100.2")
    task = await running(desk, order_quantity="0.100", size_variance="0.3")
    await fill_all(task, desk)

    assert desk.total() == D("1.000")
    assert len(set(desk.quantities())) > 3
    assert all(
        D("0.070") <= order.request.quantity <= D("0.180") for order in desk.sent
    )


async def test_a_child_never_passes_the_largest_quantity_of_the_venue() -> None:
    desk = FakeDesk(instrument(max_quantity=D("0.200")))
    desk.quote("100.0", "100.2")
    task = await running(desk)
    await fill_all(task, desk)

    assert desk.total() == D("1.000")
    assert max(order.request.quantity for order in desk.sent) == D("0.200")


async def test_a_taker_fill_of_a_patient_child_counts_like_any_other(
    desk: FakeDesk,
) -> None:
    task = await running(desk, total_quantity="0.300")
    desk.fill(desk.only_open(), liquidity=Liquidity.TAKER)
    await settle(task)

    assert task.context.state == "COMPLETED"


def test_it_wants_only_quotes_of_its_own_instrument() -> None:
    task = iceberg()
    one = D(1)
    quote = QuoteChanged(
        symbol="BTC/USDT",
        venue="A",
        bid=one,
        ask=one,
        bid_quantity=one,
        ask_quantity=one,
    )
    other = QuoteChanged(
        symbol="BTC/USDT",
        venue="B",
        bid=one,
        ask=one,
        bid_quantity=one,
        ask_quantity=one,
    )
    trade = TradePrinted(
        symbol="BTC/USDT",
        venue="A",
        price=one,
        quantity=one,
        side=Side.BUY,
        trade_id="1",
    )

    assert [task.wants(e) for e in (quote, other, trade)] == [True, False, False]
    assert task.keys() == ("BTC/USDT@A",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("symbol", "BTCUSDT"),
        ("venue", ""),
        ("total_quantity", "0"),
        ("order_quantity", "-1"),
        ("tick_tolerance", -1),
        ("size_variance", "1"),
        ("offset_ticks", -1),
        ("limit_price", "0"),
        ("time_limit_s", 0.0),
        ("urgency_timeout_s", 0.0),
        ("max_age_s", 0.0),
        ("max_post_only_rejects", 0),
    ],
)
def test_a_wrong_parameter_is_named_with_what_was_found(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{field}` is .*expected"):
        iceberg(**{field: value})


def test_a_wrong_side_is_named() -> None:
    with pytest.raises(ValueError, match="expected BUY or SELL"):
        iceberg(side="LONG")
