"""TWAP: even slices, and H5: a slice that fails is still owed."""

from decimal import Decimal
from typing import Any

import pytest

from fakes.desk import Crash, FakeDesk, attach, instrument, reborn, settle
from nightdesk.model.order import OrderStatus, OrderType, Side, TimeInForce
from nightdesk.tasks.twap import TwapContext, TwapTask

D = Decimal


def twap(**changes: Any) -> TwapTask:
    facts: dict[str, Any] = {
        "task_id": "twap",
        "symbol": "BTC/USDT",
        "venue": "A",
        "side": Side.BUY,
        "total_quantity": "4.000",
        "duration_s": 40.0,
        "slices": 4,
    }
    return TwapTask(TwapContext(**(facts | changes)))


@pytest.fixture
def desk() -> FakeDesk:
    desk = FakeDesk()
    desk.quote("100.0", "100.2")
    return desk


async def live(task: TwapTask, desk: FakeDesk, seconds: int) -> TwapTask:
    """Second by second, with a fresh price in each."""
    for _ in range(seconds):
        book = desk.quotes["BTC/USDT@A"]
        desk.quote(str(book.bid), str(book.ask))
        await settle(task)
        desk.clock.advance(1.0)
    await settle(task)
    return task


async def test_equal_slices_at_equal_distances(desk: FakeDesk) -> None:
    task = await attach(twap(), desk)
    start = desk.clock.now
    await live(task, desk, 40)

    assert desk.quantities() == ["1.000"] * 4
    assert [(o.created_ns - start) // 10**9 for o in desk.sent] == [0, 10, 20, 30]
    assert {o.request.type for o in desk.sent} == {OrderType.MARKET}
    assert (task.context.state, task.context.executed_slices) == ("COMPLETED", 4)


async def test_h5_a_slice_that_fails_follows_and_four_of_four_are_reported(
    desk: FakeDesk,
) -> None:
    desk.answer("accept", "accept", "reject:TEMPORARY")
    task = await attach(twap(), desk)
    await live(task, desk, 40)

    assert desk.total() == D("4.000")
    assert task.context.filled_quantity == D("4.000")
    assert task.context.executed_slices == 4
    assert len(desk.sent) == 5


async def test_an_uneven_total_is_executed_to_the_last_lot(desk: FakeDesk) -> None:
    task = await attach(twap(total_quantity="1.0005", slices=3, duration_s=30.0), desk)
    await live(task, desk, 30)

    assert desk.quantities() == ["0.333", "0.333", "0.334"]
    assert task.context.residual_quantity == D("0.0005")


async def test_the_schedule_survives_a_restart_and_catches_up_in_bounded_steps(
    desk: FakeDesk,
) -> None:
    task = await attach(twap(slices=10, duration_s=100.0), desk)
    await live(task, desk, 1)
    desk.clock.advance(55.0)  # the desk was down
    desk.quote("100.0", "100.2")
    task = await reborn(task, desk)
    await settle(task)

    assert [str(q) for q in (o.request.quantity.normalize() for o in desk.sent)] == [
        "0.4",
        "0.8",
        "0.8",
        "0.4",
    ]
    await live(task, desk, 60)
    assert desk.total() == D("4.000")


async def test_a_crash_after_the_send_sends_nothing_twice(desk: FakeDesk) -> None:
    desk.answer("crash_after")
    task = await attach(twap(), desk)
    with pytest.raises(Crash):
        await settle(task)
    desk._change(desk.only_open(), status=OrderStatus.UNKNOWN)
    task = await reborn(task, desk, twap().context)
    await live(task, desk, 5)
    assert len(desk.sent) == 1

    desk.resolve(desk.only_open(), accepted=True)
    desk.fill(desk.only_open(), price="100.2")
    await live(task, desk, 50)
    assert desk.total() == D("4.000")


async def test_a_patient_slice_waits_at_the_touch_and_is_taken_at_its_fallback(
    desk: FakeDesk,
) -> None:
    task = await attach(twap(order_type="limit", fallback_s=4.0), desk)
    await live(task, desk, 1)
    first = desk.only_open()
    assert (first.request.price, first.request.post_only) == (D("100.0"), True)
    desk.fill(first, "0.4")
    desk.cancel_script.append("now")
    await live(task, desk, 5)

    assert desk.sent[1].request.type is OrderType.MARKET
    assert desk.sent[1].request.quantity == D("0.600")


async def test_a_patient_slice_follows_the_market(desk: FakeDesk) -> None:
    task = await attach(twap(order_type="limit", fallback_s=9.0), desk)
    await live(task, desk, 1)
    desk.cancel_script.append("now")
    desk.quote("100.5", "100.7")
    await settle(task)

    assert [o.request.price for o in desk.sent] == [D("100.0"), D("100.5")]
    desk.fill(desk.only_open(), "0.970")
    desk.quote("103.5", "103.7")
    await settle(task)
    assert len(desk.cancels) == 2


async def test_the_limit_price_holds_back_a_slice_which_stays_owed(
    desk: FakeDesk,
) -> None:
    task = await attach(twap(limit_price="100.2"), desk)
    await live(task, desk, 1)
    assert desk.sent[0].request.time_in_force is TimeInForce.IOC
    assert desk.sent[0].request.price == D("100.2")

    desk.quote("101.0", "101.2")
    await live(task, desk, 30)
    assert len(desk.sent) == 1
    desk.quote("99.9", "100.1")
    await live(task, desk, 20)
    assert desk.total() == D("4.000")


async def test_a_patient_slice_does_not_fall_back_beyond_the_limit(
    desk: FakeDesk,
) -> None:
    task = await attach(
        twap(order_type="limit", fallback_s=0.0, limit_price="100.1"), desk
    )
    await live(task, desk, 3)

    assert [o.request.price for o in desk.sent] == [D("100.0")]
    assert desk.cancels == []


async def test_a_slice_below_the_minimum_is_refused_and_nothing_sent(
    desk: FakeDesk,
) -> None:
    task = await attach(twap(total_quantity="0.100"), desk)
    await settle(task)

    assert desk.sent == []
    assert (task.context.state, task.context.close_reason) == (
        "ERROR",
        "NOTIONAL_BELOW_MINIMUM",
    )


async def test_a_crumb_too_small_at_the_end_is_reported(desk: FakeDesk) -> None:
    task = await attach(twap(slices=1, duration_s=10.0, order_type="limit"), desk)
    await live(task, desk, 1)
    desk.fill(desk.only_open(), "3.960")
    desk.end(desk.only_open(), OrderStatus.EXPIRED)
    await live(task, desk, 3)

    assert task.context.residual_quantity == D("0.040")
    assert task.context.state == "COMPLETED"


async def test_without_a_price_it_waits() -> None:
    desk = FakeDesk()
    task = await attach(twap(), desk)
    await settle(task)
    assert desk.sent == []


async def test_a_crumb_left_to_a_patient_child_is_not_cancelled(desk: FakeDesk) -> None:
    task = await attach(
        twap(slices=1, duration_s=10.0, order_type="limit", fallback_s=100.0), desk
    )
    await live(task, desk, 1)
    desk.fill(desk.only_open(), "3.960")
    desk.quote("104.0", "104.2")
    await live(task, desk, 2)
    assert desk.cancels == []


async def test_an_interval_instead_of_a_count_and_a_largest_quantity() -> None:
    desk = FakeDesk(instrument(max_quantity=D("0.7")))
    desk.quote("100.0", "100.2")
    task = await attach(twap(slices=None, interval_s=10.0), desk)
    await live(task, desk, 41)

    assert desk.total() == D("4.000")
    assert max(o.request.quantity for o in desk.sent) == D("0.7")


async def test_ten_slices_by_default(desk: FakeDesk) -> None:
    task = await attach(twap(slices=None), desk)
    await live(task, desk, 40)
    assert len(desk.sent) == 10


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("duration_s", {"duration_s": 0.0}),
        ("slices", {"slices": 0}),
        ("interval_s", {"interval_s": 5.0}),
        ("interval_s", {"interval_s": 50.0, "slices": None}),
        ("fallback_s", {"fallback_s": -1.0}),
        ("max_catch_up", {"max_catch_up": 0}),
    ],
)
def test_a_wrong_parameter_is_named(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{field}` is .*expected"):
        twap(**changes)
