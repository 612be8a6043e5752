"""Ledger against venue: at every start (R-9) and while running (R-10)."""

import asyncio
from decimal import Decimal
from typing import Any

import pytest

from fakes.house import House, request
from fakes.venue import FakeVenue, btc
from nightdesk.abc import Record
from nightdesk.errors import OrderDeniedError, QueryFailedError
from nightdesk.model.events import OrderFilled
from nightdesk.model.order import Fill, Order, OrderStatus, Side
from nightdesk.orders.ids import ClientOrderIds
from nightdesk.orders.protocol import ADOPTED

D = Decimal


def standing(house: House, cid: str) -> Order:
    found = house.orders.order(cid)
    assert found is not None
    return found


async def running(house: House, seconds: float = 30.0) -> House:
    """Open a house whose recovery rests between two questions."""
    opening = asyncio.ensure_future(house.open())
    while not opening.done() and seconds > 0:
        await house.settle(0.25)
        seconds -= 0.25
    await opening
    return house


async def crashed_between(house: House, point: str) -> House:
    """Submit one order and die at `point`; return the next run, not yet open."""

    class Dead(BaseException):
        pass

    def die(where: str) -> None:
        if where == point:
            raise Dead

    house.venue.hook = house.store.hook = die
    with pytest.raises(Dead):
        await house.orders.submit("t", request())
    await house.orders.stop()
    return house.next()


# --- the start --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["accepted", "replied"])
async def test_a_crash_after_the_venue_took_the_order_adopts_it(point: str) -> None:
    after = await (await crashed_between(await House().open(), point)).open()

    (order,) = after.orders.orders_of("t")

    assert order.status is OrderStatus.ACCEPTED
    assert len(after.venue.requests) == 1
    assert after.report.unresolved == []


@pytest.mark.parametrize("point", ["saved", "submit"])
async def test_a_crash_before_the_send_ends_in_a_proven_rejection(point: str) -> None:
    after = await (await crashed_between(await House().open(), point)).open()

    (order,) = after.orders.orders_of("t")

    assert order.status is OrderStatus.REJECTED
    assert order.reason is not None
    assert order.reason.startswith("NEVER_ARRIVED")
    assert after.venue.requests == []
    assert after.report.differences == []


async def test_an_intent_that_cannot_be_decided_yet_starts_as_unknown_and_is_resolved_later() -> (
    None
):
    house = await House(FakeVenue(expiry_s=5.0, index_lag_s=1.0)).open()
    after = await running(await crashed_between(house, "submit"))

    (order,) = after.orders.orders_of("t")
    assert order.status is OrderStatus.UNKNOWN
    assert order.working_quantity == D(1)
    assert after.report.unresolved == [order.client_order_id]
    with pytest.raises(OrderDeniedError, match="SYMBOL_UNRESOLVED"):
        await after.orders.submit("t", request())
    await after.settle(12)

    assert standing(after, order.client_order_id).status is OrderStatus.REJECTED


async def test_fills_that_happened_while_no_desk_was_there_are_booked() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.telling = "drop"
    house.venue.fill(order.client_order_id, "0.4")
    house.venue.fill(order.client_order_id, "0.1")

    after = await house.next().open()

    assert standing(after, order.client_order_id).filled_quantity == D("0.5")
    assert standing(after, order.client_order_id).status is OrderStatus.PARTIALLY_FILLED
    assert after.positions.of("BTC/USDT", "A").quantity == D("0.5")
    assert after.report.differences == []


async def test_t21_a_missed_fill_is_booked_once_over_ten_restarts() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.telling = "drop"
    fill = house.venue.fill(order.client_order_id, "1")

    for _ in range(10):
        house = await house.next().open()
        house.emit(
            OrderFilled(
                venue="A",
                symbol="BTC/USDT",
                client_order_id=order.client_order_id,
                fill=fill,
            )
        )

    assert standing(house, order.client_order_id).status is OrderStatus.FILLED
    assert house.orders.fill_count == 1
    assert house.positions.of("BTC/USDT", "A").quantity == D(1)


async def test_one_listing_answers_for_all_orders_that_stand_as_expected() -> None:
    house = await House().open()
    for _ in range(20):
        await house.orders.submit("t", request())
    after = house.next()
    after.venue.questions.clear()

    await after.open()

    assert sorted(after.venue.questions) == [
        "balances",
        "fills",
        "open_orders",
        "venue_time",
    ]
    assert len(after.orders.open_orders()) == 20
    assert after.gate.exposure.working("BTC/USDT@A", Side.BUY) == 20


async def test_t23_our_orphans_are_adopted_and_those_of_others_only_counted() -> None:
    venue = FakeVenue()
    house = House(venue)
    venue._clock = house.clock
    ours = ClientOrderIds("tst", 9, 77).next()
    venue.place(ours, "1")
    venue.place("web-1", "2")

    await house.open()

    assert [order.client_order_id for order in house.orders.orders_of(ADOPTED)] == [
        ours
    ]
    assert house.report.adopted == [ours]
    assert house.report.external == ["A:v2"]
    assert venue.requests == []
    assert house.gate.exposure.working("BTC/USDT@A", Side.BUY) == 3


async def test_t23_orphans_can_be_cancelled_by_policy() -> None:
    venue = FakeVenue()
    house = House(venue, orphans="cancel")
    venue._clock = house.clock
    ours = ClientOrderIds("tst", 9, 77).next()
    venue.place(ours, "1")
    venue.place("web-1", "2")

    await house.open()

    assert venue.requests == [("cancel", ours)]
    assert standing(house, ours).status is OrderStatus.CANCELED


async def test_a_position_that_differs_starts_halted_with_the_difference_and_tells_it_once() -> (
    None
):
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.fill(order.client_order_id, "1")
    house.venue.deposits["BTC"] -= D("0.25")

    after = await running(house.next())

    assert after.gate.state == "HALTED"
    assert after.report.differences == [
        "A holds 10.75 BTC, our fills say 11 (difference -0.25)"
    ]
    assert "DIFFERENCE: A holds" in "\n".join(after.report.lines())
    again = await after.next().open()
    assert again.gate.state == "HALTED"
    assert again.report.differences == []


async def test_a_balance_reply_that_is_empty_is_never_read_as_flat() -> None:
    house = await House().open()
    house.venue.deposits.clear()

    after = await house.next(keep=100).open()

    assert after.gate.state == "ACTIVE"
    assert any("never read as flat" in line for line in after.report.lines())


async def test_balances_of_quotes_derivatives_and_dust_are_not_compared() -> None:
    venue = FakeVenue()
    venue.listed = {
        "BTC/USDT": btc(),
        "ETH/BTC": btc(symbol="ETH/BTC"),
        "SOL/USDT:USDT": btc(symbol="SOL/USDT:USDT"),
    }
    house = await House(venue).open()
    venue.deposits.update({"BTC": D(3), "SOL": D(5), "USDT": D(1), "ETH": D("0.0009")})

    after = await house.next().open()

    assert after.report.differences == []


async def test_a_venue_that_does_not_answer_changes_nothing() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    after = house.next(keep=100)
    after.venue.failing = 1000

    await after.open()

    assert standing(after, order.client_order_id).status is OrderStatus.ACCEPTED
    assert after.report.differences == []
    assert any("scripted" in line for line in after.report.lines())


async def test_an_adapter_that_stumbles_does_not_keep_the_desk_from_starting() -> None:
    house = await House().open()
    after = house.next()

    async def stumble() -> Any:
        raise KeyError("free")

    after.venue.balances = after.venue.open_orders = after.venue.venue_time_ns = stumble  # type: ignore[method-assign]
    await after.open()
    report = await after.orders.sweep()

    assert any("KeyError" in line for line in after.report.lines())
    assert report.failures == ["A: KeyError: 'free'"]


@pytest.mark.parametrize("kind", ["order", "fill", "position"])
async def test_a_damaged_record_of_money_halts_the_start(kind: str) -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.fill(order.client_order_id, "1")
    after = house.next(keep=100)
    (name,) = [name for name in after.store.disk if name[0] == kind]
    after.store.disk[name] = Record(*name, b'{"torn')

    await running(after)

    assert after.gate.state == "HALTED"
    assert after.report.quarantined
    assert any(kind in text for text in after.report.differences)


async def test_quarantined_records_are_reported_and_only_money_halts() -> None:
    house = House()
    house.store.bad.append(("context", "ice", "checksum"))
    await house.open()
    assert house.gate.state == "ACTIVE"
    assert house.report.quarantined == ["context 'ice' cannot be decoded: checksum"]

    other = House()
    other.store.bad.append(("order", "nd1", "checksum"))
    await other.open()

    assert other.gate.state == "HALTED"


async def test_a_dry_run_tells_what_it_would_do_and_does_nothing() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.telling = "drop"
    house.venue.fill(order.client_order_id, "0.4")
    house.venue.place(ClientOrderIds("tst", 9, 77).next())
    after = house.next(keep=100)
    before = dict(after.store.disk)

    report = await after.orders.recover(dry_run=True)

    assert after.store.disk == before
    assert after.events == []
    assert report.dry_run
    assert len(report.adopted) == 1
    assert any(
        "would record OrderFilled" in line and "0.4 at 100" in line
        for line in report.lines()
    )
    assert report.lines()[-1].startswith("dry run, nothing changed; ready")


async def test_events_that_come_before_the_ledger_is_there_wait_for_it() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.telling = "drop"
    fill = house.venue.fill(order.client_order_id, "0.4")
    after = house.next()

    after.emit(
        OrderFilled(
            venue="A",
            symbol="BTC/USDT",
            client_order_id=order.client_order_id,
            fill=fill,
        )
    )
    assert after.orders.fill_count == 0
    await after.orders.load()

    assert after.orders.fill_count == 1
    assert standing(after, order.client_order_id).filled_quantity == D("0.4")


# --- while running ------------------------------------------------------------------------------------------


async def swept(house: House, times: int, every_s: float = 15.0) -> Any:
    report = None
    for _ in range(times):
        await house.settle(every_s)
        report = await house.orders.sweep()
        await house.settle()
    return report


async def test_t22_an_order_missing_from_the_list_is_looked_up_before_anything_is_concluded() -> (
    None
):
    house = await House(FakeVenue(lookup="open_only")).open()
    order = await house.orders.submit("t", request())
    house.venue.fill(order.client_order_id, "0.4")
    house.venue.telling = "drop"
    house.venue.end(order.client_order_id)

    await house.orders.sweep()
    await house.settle()
    assert not [
        q for q in house.venue.questions if q.startswith("find_order")
    ]  # younger than 5 s
    await swept(house, 1)
    assert standing(house, order.client_order_id).status is OrderStatus.PARTIALLY_FILLED
    await house.settle(30)

    final = standing(house, order.client_order_id)
    assert (final.status, final.filled_quantity) == (OrderStatus.CANCELED, D("0.4"))
    assert final.reason is not None
    assert final.reason.startswith("no longer known at the venue: 6 look-ups")


async def test_a_missed_fill_is_booked_with_the_next_sweep() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.telling = "drop"
    house.venue.fill(order.client_order_id, "1")

    report = await house.orders.sweep()

    assert report.booked_fills == 1
    assert standing(house, order.client_order_id).status is OrderStatus.FILLED


async def test_f15_a_position_that_differs_halts_its_symbol_within_two_sweeps() -> None:
    house = await House().open()
    house.venue.deposits["BTC"] += 1
    await house.settle(6)

    first = await house.orders.sweep()
    assert first.differences == []
    report = await swept(house, 1)

    assert report.differences == ["A holds 11 BTC, our fills say 10 (difference +1)"]
    with pytest.raises(OrderDeniedError, match="SYMBOL_HALTED"):
        await house.orders.submit("t", request())
    assert (await swept(house, 2)).differences == []  # told once


async def test_an_order_taken_for_rejected_that_works_at_the_venue_is_revived_and_its_symbol_halted() -> (
    None
):
    house = await House().open()
    house.venue.submits.append("reject")
    order = await house.orders.submit("t", request())
    house.venue.place(order.client_order_id)

    await swept(house, 2)

    assert standing(house, order.client_order_id).status is OrderStatus.ACCEPTED
    assert house.gate.describe()["halted_symbols"]


async def test_an_order_that_ended_here_and_works_there_halts_its_symbol() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.end(order.client_order_id)
    house.venue.place(order.client_order_id)

    first = await swept(house, 2)
    second = await swept(house, 1)

    assert "is CANCELED in the ledger and works at A" in first.differences[0]
    assert second.differences == []


async def test_an_orphan_fill_leads_to_its_order() -> None:
    house = await House().open()
    ours = ClientOrderIds("tst", 9, 77).next()
    house.venue.place(ours, "1")
    house.venue.fill(ours, "1")
    assert house.positions.of("BTC/USDT", "A").quantity == D(1)

    report = await house.orders.sweep()

    assert report.adopted == [ours]
    assert (standing(house, ours).status, standing(house, ours).filled_quantity) == (
        OrderStatus.FILLED,
        D(1),
    )


async def test_an_orphan_fill_without_an_order_is_given_up_after_ten_sweeps() -> None:
    house = await House().open()
    ours = ClientOrderIds("tst", 9, 77).next()
    fill = Fill(
        venue="A",
        symbol="BTC/USDT",
        trade_id="x",
        venue_order_id="v9",
        client_order_id=ours,
        side=Side.BUY,
        quantity=D(1),
        price=D(100),
    )
    house.emit(
        OrderFilled(venue="A", symbol="BTC/USDT", client_order_id=ours, fill=fill)
    )

    for _ in range(12):
        await house.orders.sweep()

    assert (
        sum(question.startswith("find_order") for question in house.venue.questions)
        == 10
    )


async def test_a_sweep_of_a_silent_venue_is_a_failure_and_no_finding() -> None:
    house = await House().open()
    house.venue.failing = 1

    report = await house.orders.sweep()

    assert report.failures == [str(QueryFailedError("A", "open_orders", "scripted"))]


async def test_an_order_whose_venue_is_gone_from_the_configuration_stays_unknown() -> (
    None
):
    house = await House().open()
    house.venue.submits.append("lost_reply")
    order = await house.orders.submit("t", request())
    del house.venues["A"]

    await house.settle(5)

    assert standing(house, order.client_order_id).status is OrderStatus.UNKNOWN
    assert (
        await house.orders.cancel(order.client_order_id)
    ).status is OrderStatus.UNKNOWN


async def test_a_venue_that_was_down_at_the_start_is_read_from_the_last_booked_fill_on() -> (
    None
):
    """Also fills that no order of ours would lead to: they are in the position all the same."""
    house = await House().open()
    order = await house.orders.submit("t", request())
    again = house.next(keep=100)
    house.venue.telling = "drop"
    house.venue.fill(order.client_order_id, "1")
    house.venue.place("somebody else's", "2")
    house.venue.fill("somebody else's", "2")
    house.venue.failing = 10_000
    await running(again)
    await again.settle(120)

    house.venue.failing = 0
    await again.settle(10)
    await again.orders.sweep()

    assert again.positions.of("BTC/USDT", "A").quantity == 3
    assert standing(again, order.client_order_id).status is OrderStatus.FILLED
