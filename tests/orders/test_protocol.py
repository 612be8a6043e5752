"""The order protocol, one claim at a time."""

import asyncio
from decimal import Decimal
from itertools import permutations
from typing import Any

import msgspec
import pytest

from fakes.house import House, request
from fakes.store import CrashableStore
from fakes.venue import FakeVenue
from nightdesk.errors import NightdeskError, OrderDeniedError, StateNotWritableError
from nightdesk.model.events import (
    CancelRejected,
    OrderAccepted,
    OrderCanceled,
    OrderDenied,
    OrderEvent,
    OrderFilled,
    OrderRejected,
    OrderUnknown,
)
from nightdesk.model.order import Fill, Order, OrderStatus, Side
from nightdesk.orders.ids import ClientOrderIds, parse
from nightdesk.orders.ledger import Ledger

D = Decimal


def fill(
    trade: str,
    quantity: str,
    price: str = "100",
    cid: str = "",
    voi: str = "v1",
    **more: Any,
) -> Fill:
    return Fill(
        venue="A",
        symbol="BTC/USDT",
        trade_id=trade,
        venue_order_id=voi,
        client_order_id=cid,
        side=more.pop("side", Side.BUY),
        quantity=D(quantity),
        price=D(price),
        **more,
    )


def standing(house: House, cid: str) -> Order:
    found = house.orders.order(cid)
    assert found is not None
    return found


def names(cid: str) -> dict[str, Any]:
    return {
        "venue": "A",
        "symbol": "BTC/USDT",
        "client_order_id": cid,
        "venue_order_id": "v1",
    }


# --- submit -------------------------------------------------------------------------------------------


async def test_the_intent_is_durable_before_the_venue_hears_of_it() -> None:
    house = await House().open()
    seen: list[Any] = []
    house.venue.hook = lambda point: seen.append(
        (point, [key for kind, key in house.store.disk if kind == "order"])
    )

    order = await house.orders.submit("t", request())

    assert seen[0] == ("submit", [order.client_order_id])
    assert order.status is OrderStatus.ACCEPTED
    assert order.venue_order_id == "v1"


async def test_nothing_is_sent_when_the_intent_cannot_be_saved() -> None:
    house = await House().open()
    house.store.broken = True

    with pytest.raises(StateNotWritableError):
        await house.orders.submit("t", request())

    assert house.venue.requests == []
    assert house.orders.orders_of("t") == []
    assert len(house.gate.exposure) == 0


async def test_a_denied_order_is_an_event_and_an_error_and_never_sent() -> None:
    house = await House().open()

    with pytest.raises(OrderDeniedError) as denied:
        await house.orders.submit("t", request("0.0005"))

    assert denied.value.code == "QUANTITY_BELOW_MINIMUM"
    assert house.venue.requests == []
    assert isinstance(house.events[-1], OrderDenied)
    with pytest.raises(OrderDeniedError, match="no venue 'B'"):
        await house.orders.submit("t", request(venue="B"))


async def test_a_fill_that_comes_before_the_reply_counts_once() -> None:
    house = await House().open()
    house.venue.submits.append("fill:0.4")

    order = await house.orders.submit("t", request())

    assert order.status is OrderStatus.PARTIALLY_FILLED
    assert order.filled_quantity == D("0.4")
    assert house.gate.exposure.working("BTC/USDT@A", Side.BUY) == D("0.6")


async def test_a_rejected_order_gives_its_reservation_back() -> None:
    house = await House().open()
    house.venue.submits.append("reject")

    order = await house.orders.submit("t", request())

    assert order.status is OrderStatus.REJECTED
    assert order.reason == "INSUFFICIENT_BALANCE: not enough"
    assert len(house.gate.exposure) == 0
    house.store.flush()
    assert house.store.disk[("order", order.client_order_id)].shelf == "completed"


@pytest.mark.parametrize("answer", ["lost_reply", "garbage"])
async def test_t13_a_lost_reply_is_resolved_by_its_id_and_never_resent(
    answer: str,
) -> None:
    house = await House().open()
    house.venue.submits.append(answer)

    order = await house.orders.submit("t", request())
    assert order.status is OrderStatus.UNKNOWN
    await house.settle(0.5)

    assert standing(house, order.client_order_id).status is OrderStatus.ACCEPTED
    assert house.venue.requests == [("submit", order.client_order_id)]
    assert house.orders.unresolved_count == 0


async def test_an_unknown_order_blocks_its_symbol_until_it_is_proven() -> None:
    house = await House(FakeVenue(expiry_s=5.0, index_lag_s=5.0)).open()
    house.venue.submits.append("lost_request")
    order = await house.orders.submit("t", request())

    with pytest.raises(OrderDeniedError, match="SYMBOL_UNRESOLVED"):
        await house.orders.submit("other", request())
    assert order.working_quantity == D("1")

    await house.settle(9.9)
    assert standing(house, order.client_order_id).status is OrderStatus.UNKNOWN
    await house.settle(20)
    proven = house.orders.order(order.client_order_id)
    assert proven is not None
    assert proven.status is OrderStatus.REJECTED
    assert proven.reason is not None
    assert "again" in proven.reason
    assert "open orders" in proven.reason
    assert (
        await house.orders.submit("other", request())
    ).status is OrderStatus.ACCEPTED


async def test_a_failed_question_is_never_evidence() -> None:
    house = await House().open()
    house.venue.submits.append("lost_request")
    house.venue.failing = 10_000
    order = await house.orders.submit("t", request())

    for _ in range(30):
        await house.settle(5)

    assert standing(house, order.client_order_id).status is OrderStatus.UNKNOWN
    assert any(
        "is unresolved after 10 look-ups" in text
        for _, _, text in house.listener.alerts
    )
    house.venue.failing = 0
    await house.settle(10)
    assert standing(house, order.client_order_id).status is OrderStatus.REJECTED


async def test_a_venue_clock_behind_ours_delays_the_negative() -> None:
    venue = FakeVenue(expiry_s=1.0)
    venue.skew_ns = -60 * 10**9
    house = await House(venue).open()
    venue.submits.append("lost_request")
    order = await house.orders.submit("t", request())

    await house.settle(30)
    assert standing(house, order.client_order_id).status is OrderStatus.UNKNOWN
    for _ in range(10):
        await house.settle(5)
    assert standing(house, order.client_order_id).status is OrderStatus.REJECTED


async def test_a_task_cancelled_while_the_request_is_under_way_leaves_the_order_unknown() -> (
    None
):
    house = await House().open()
    work = asyncio.ensure_future(house.orders.submit("t", request()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # it is at the venue now, and its reply is on the way
    assert house.venue.orders

    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    (order,) = house.orders.orders_of("t")
    assert order.status is OrderStatus.UNKNOWN
    await house.settle(1)

    assert house.orders.orders_of("t")[0].status is OrderStatus.ACCEPTED


async def test_a_task_cancelled_before_the_send_leaves_a_rejected_order() -> None:
    house = await House().open()
    saving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    original = house.store.save
    house.store.save = lambda batch: (original(batch), saving)[1]  # type: ignore[method-assign]
    work = asyncio.ensure_future(house.orders.submit("t", request()))
    await asyncio.sleep(0)
    house.store.save = original  # type: ignore[method-assign]

    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work

    (order,) = house.orders.orders_of("t")
    assert order.status is OrderStatus.REJECTED
    assert order.reason == "NOT_SENT: its task was cancelled before the send"
    assert house.venue.requests == []


async def test_a_halt_that_falls_during_the_save_stops_the_send() -> None:
    house = await House().open()
    house.store.hook = lambda point: (
        house.gate.halt_now("test", "op")
        if point == "saved" and house.gate.state == "ACTIVE"
        else None
    )

    order = await house.orders.submit("t", request())

    assert order.status is OrderStatus.REJECTED
    assert order.reason is not None
    assert order.reason.startswith("TRADING_HALTED")
    assert house.venue.requests == []


async def test_a_replacement_names_its_parent_and_counts_the_attempt() -> None:
    house = await House().open()
    first = await house.orders.submit("t", request())

    second = await house.orders.submit("t", request(parent=first.client_order_id))

    assert second.attempt == 1
    assert second.client_order_id != first.client_order_id


# --- cancel --------------------------------------------------------------------------------------------


async def test_a_cancel_ends_only_by_the_venues_word() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.telling = "hold"

    asked = await house.orders.cancel(order.client_order_id)
    assert asked.status is OrderStatus.PENDING_CANCEL
    assert asked.working_quantity == D(1)
    house.venue.release()

    ended = house.orders.order(order.client_order_id)
    assert ended is not None
    assert ended.status is OrderStatus.CANCELED
    assert len(house.gate.exposure) == 0


async def test_t6_a_fill_that_beats_the_cancel_counts_once() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request("0.3"))
    house.venue.cancels.append("filled_first")
    house.venue.telling = "drop"

    await house.orders.cancel(order.client_order_id)
    await house.settle(0.3)

    filled = house.orders.order(order.client_order_id)
    assert filled is not None
    assert filled.status is OrderStatus.FILLED
    assert filled.filled_quantity == D("0.3")
    assert house.orders.fill_count == 1
    assert any(isinstance(event, CancelRejected) for event in house.events)


async def test_the_word_that_an_order_is_cancelled_may_get_lost() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.telling = "drop"

    await house.orders.cancel(order.client_order_id)
    await house.settle(3)

    assert standing(house, order.client_order_id).status is OrderStatus.CANCELED


async def test_a_cancel_that_never_arrived_is_taken_back_once_it_is_void() -> None:
    house = await House(FakeVenue(expiry_s=2.0)).open()
    order = await house.orders.submit("t", request())
    house.venue.cancels.append("lost_request")

    await house.orders.cancel(order.client_order_id)
    await house.settle(1)
    assert (
        house.orders.order(order.client_order_id).status is OrderStatus.PENDING_CANCEL
    )  # type: ignore[union-attr]
    await house.settle(5)

    assert standing(house, order.client_order_id).status is OrderStatus.ACCEPTED
    await house.orders.cancel(order.client_order_id)
    assert standing(house, order.client_order_id).status is OrderStatus.CANCELED


async def test_t22_an_end_that_names_more_fills_than_are_booked_waits_for_them() -> (
    None
):
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.telling = "drop"
    house.venue.fill(order.client_order_id, "0.4")
    house.venue.telling = "now"
    house.venue.failing = 3

    house.venue.end(order.client_order_id)
    waiting = house.orders.order(order.client_order_id)
    assert waiting is not None
    assert waiting.status is OrderStatus.PENDING_CANCEL
    assert waiting.working_quantity == D(1)
    await house.settle(10)

    ended = house.orders.order(order.client_order_id)
    assert ended is not None
    assert (ended.status, ended.filled_quantity) == (OrderStatus.CANCELED, D("0.4"))


async def test_cancel_of_an_unknown_id_says_so_and_of_an_ended_order_asks_nobody() -> (
    None
):
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.end(order.client_order_id)

    assert (
        await house.orders.cancel(order.client_order_id)
    ).status is OrderStatus.CANCELED
    with pytest.raises(NightdeskError, match="no order 'x'"):
        await house.orders.cancel("x")

    assert house.venue.requests == [("submit", order.client_order_id)]


# --- events --------------------------------------------------------------------------------------------


CID = ClientOrderIds("tst", 1, 1).next()


def story(*events: OrderEvent) -> set[str]:
    """Return every final state that some order of the events leads to."""
    states = set()
    for order_of_events in permutations(events):
        ledger = Ledger("tst")
        ledger.add(
            Order(
                client_order_id=CID,
                task_id="t",
                request=request(),
                status=OrderStatus.SUBMITTED,
            )
        )
        for event in order_of_events:
            ledger.apply(event, 7)
        final = ledger.order(CID)
        fees = sorted(final.fees.items()) if final else None
        states.add(
            str(
                msgspec.to_builtins(
                    msgspec.structs.replace(final, fees={}), enc_hook=str
                )
            )
            + str(fees)
        )
    return states


ACCEPTED = OrderAccepted(**names(CID))
ONE = OrderFilled(
    **names(CID), fill=fill("1", "0.3", "100.1", CID, fee=D("0.1"), fee_asset="USDT")
)
TWO = OrderFilled(
    **names(CID), fill=fill("2", "0.7", "100.3", CID, fee=D("0.0001"), fee_asset="BTC")
)
THREE = OrderFilled(
    **names(CID), fill=fill("3", "0.2", "99.7", CID, fee=D("0.2"), fee_asset="USDT")
)


@pytest.mark.parametrize(
    "events",
    [
        (ACCEPTED, ONE, TWO, ONE, TWO, ACCEPTED),
        (
            ACCEPTED,
            ONE,
            THREE,
            ONE,
            OrderCanceled(**names(CID), filled_quantity=D("0.5"), reason="user"),
        ),
        (
            ACCEPTED,
            ONE,
            TWO,
            OrderUnknown(**names(CID), reason="timeout"),
            OrderCanceled(**names(CID), filled_quantity=D("0.3")),
        ),
        (
            OrderUnknown(**names(CID), reason="timeout"),
            ONE,
            THREE,
            OrderCanceled(**names(CID), filled_quantity=D("0.3")),
            ACCEPTED,
        ),
        (
            ACCEPTED,
            ONE,
            TWO,
            OrderCanceled(**names(CID), filled_quantity=D(1)),
            OrderUnknown(**names(CID), reason="x"),
            TWO,
        ),
        (OrderRejected(**names(CID), code="X", reason="y"), ACCEPTED, ONE, THREE, ONE),
        (
            OrderRejected(**names(CID), code="X", reason="y"),
            OrderUnknown(**names(CID), reason="z"),
        ),
    ],
)
def test_f14_events_in_any_order_and_from_two_feeds_give_one_state(
    events: tuple[OrderEvent, ...],
) -> None:
    assert len(story(*events)) == 1


async def test_the_same_fill_by_stream_and_by_query_is_booked_once() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    booked = house.venue.fill(order.client_order_id, "0.5")

    house.emit(OrderFilled(**names(order.client_order_id), fill=booked))

    assert house.orders.fill_count == 1
    assert house.positions.of("BTC/USDT", "A").quantity == D("0.5")
    assert [f.trade_id for f in house.orders.fills(10)] == ["t1"]


async def test_order_fill_position_and_cursor_are_saved_in_one_batch() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())

    house.clock.jump(1)
    house.venue.fill(order.client_order_id, "0.5")

    assert [put.kind for put in house.store.batches[-1]] == [
        "fill",
        "position",
        "cursor",
        "order",
    ]


async def test_an_overfill_is_booked_and_halts_the_symbol() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.fill(order.client_order_id, "1")

    house.emit(
        OrderFilled(
            **names(order.client_order_id),
            fill=fill("x", "0.2", cid=order.client_order_id),
        )
    )

    final = house.orders.order(order.client_order_id)
    assert final is not None
    assert final.filled_quantity == D("1.2")
    assert final.working_quantity == 0
    with pytest.raises(OrderDeniedError, match="SYMBOL_HALTED"):
        await house.orders.submit("t", request())
    assert any(
        "overfilled: quantity 1, filled 1.2" in text
        for _, _, text in house.listener.alerts
    )


async def test_a_foreign_fill_moves_the_position_and_no_order() -> None:
    house = await House().open()

    house.emit(OrderFilled(**names("web-77"), fill=fill("f", "2", cid="web-77")))

    assert house.positions.of("BTC/USDT", "A").quantity == D(2)
    assert house.orders.recent() == []


async def test_a_fill_that_names_only_the_venues_id_finds_its_order_before_and_after_the_ack() -> (
    None
):
    house = await House().open()
    house.venue.submits.append("lost_reply")
    order = await house.orders.submit("t", request())
    house.emit(OrderFilled(**names(""), fill=fill("early", "0.1")))
    assert house.positions.of("BTC/USDT", "A").quantity == D("0.1")

    await house.settle(1)
    house.emit(OrderFilled(**names(""), fill=fill("late", "0.2")))

    final = house.orders.order(order.client_order_id)
    assert final is not None
    assert final.filled_quantity == D("0.3")
    assert house.positions.of("BTC/USDT", "A").quantity == D("0.3")


async def test_a_late_fill_after_the_cancel_is_booked() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.end(order.client_order_id)

    house.emit(
        OrderFilled(
            **names(order.client_order_id),
            fill=fill("late", "0.2", cid=order.client_order_id),
        )
    )

    final = house.orders.order(order.client_order_id)
    assert final is not None
    assert (final.status, final.filled_quantity) == (OrderStatus.CANCELED, D("0.2"))


async def test_an_order_that_lives_although_it_counted_as_rejected_halts_its_symbol() -> (
    None
):
    house = await House().open()
    house.venue.submits.append("reject")
    order = await house.orders.submit("t", request())

    house.emit(OrderAccepted(**names(order.client_order_id)))

    assert standing(house, order.client_order_id).status is OrderStatus.ACCEPTED
    assert house.gate.describe()["halted_symbols"]


async def test_the_owner_and_the_observers_hear_every_change() -> None:
    house = await House().open()
    woken: list[str] = []
    house.orders.on_order_changed = lambda order, event: woken.append(order.task_id)

    await house.orders.submit("t", request())

    assert woken == ["t"]
    assert [type(event).__name__ for _, event in house.listener.orders] == [
        "OrderAccepted"
    ]


async def test_booking_goes_on_and_trading_halts_when_the_store_fails() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.store.broken = True

    house.venue.fill(order.client_order_id, "0.5")

    assert standing(house, order.client_order_id).filled_quantity == D("0.5")
    assert house.gate.state == "HALTED"


async def test_finished_orders_of_a_gone_task_move_to_the_archive() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.fill(order.client_order_id, "1")
    await house.orders.submit("t", request())

    assert await house.orders.forget("t") == 1

    kinds = sorted(kind for kind, _ in house.store.disk)
    assert kinds.count("archived_order") == kinds.count("order") == 1
    assert len(house.orders.open_orders()) == 1


async def test_a_fill_of_an_archived_order_is_not_booked_again_when_the_venue_lists_it_again() -> (
    None
):
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.fill(order.client_order_id, "1")
    await house.orders.forget("t")

    await house.orders.sweep()
    assert house.positions.of("BTC/USDT", "A").quantity == 1

    again = await house.next(keep=100).open()
    await again.orders.sweep()
    assert again.positions.of("BTC/USDT", "A").quantity == 1
    assert again.orders.fill_count == 1
    assert again.report.differences == []


async def test_what_is_halted_while_the_intent_is_saved_is_not_sent() -> None:
    async def symbol(house: House) -> None:
        await house.gate.halt_symbol("BTC/USDT", "A", "overfilled")

    async def reducing(house: House) -> None:
        await house.gate.reduce("careful", "operator")

    async def whole(house: House) -> None:
        await house.gate.halt("stop", "operator")

    for fall in (symbol, reducing, whole):
        house = await House().open()
        save = house.store.save

        async def save_and_halt(batch: Any) -> None:
            house.store.save = save  # type: ignore[method-assign]
            await save(batch)
            await fall(house)

        house.store.save = save_and_halt  # type: ignore[method-assign,assignment]
        order = await house.orders.submit("t", request())

        assert house.venue.requests == [], fall
        assert order.status is OrderStatus.REJECTED
        assert len(house.gate.exposure) == 0


# --- evidence ------------------------------------------------------------------------------------------


async def test_an_order_that_only_the_open_list_knows_is_found_there() -> None:
    house = await House(FakeVenue(lookup="listed_only")).open()
    house.venue.submits.append("lost_reply")
    order = await house.orders.submit("t", request())

    await house.settle(1)

    assert standing(house, order.client_order_id).status is OrderStatus.ACCEPTED


async def test_one_negative_is_not_enough_although_every_wait_is_over() -> None:
    """The venue's index is slower than it promises: only the second look, a lag later, finds the order."""
    house = await House(FakeVenue(expiry_s=1.0, index_lag_s=1.0)).open()
    house.venue.submits.append("lost_reply")
    order = await house.orders.submit("t", request())
    house.venue.delay_index(order.client_order_id, 1.5)

    await house.settle(10)

    assert standing(house, order.client_order_id).status is OrderStatus.ACCEPTED


async def test_a_garbled_answer_does_not_end_the_watch() -> None:
    house = await House().open()
    house.venue.submits.append("lost_reply")
    order = await house.orders.submit("t", request())
    original = house.venue.find_order

    async def garbled(symbol: str, client_order_id: str) -> Any:
        house.venue.find_order = original  # type: ignore[method-assign]
        raise KeyError("status")

    house.venue.find_order = garbled  # type: ignore[method-assign]
    await house.settle(2)

    assert standing(house, order.client_order_id).status is OrderStatus.ACCEPTED


async def test_an_order_that_the_venue_lists_as_rejected_is_rejected() -> None:
    house = await House().open()
    house.venue.submits.append("lost_reply")
    order = await house.orders.submit("t", request())
    house.venue.telling = "drop"
    house.venue.end(order.client_order_id, OrderStatus.REJECTED)

    await house.settle(1)

    assert standing(house, order.client_order_id).status is OrderStatus.REJECTED


async def test_an_order_filled_with_less_than_asked_is_over() -> None:
    house = await House().open()
    house.venue.submits.append("lost_reply")
    order = await house.orders.submit("t", request())
    house.venue.telling = "drop"
    house.venue.fill(order.client_order_id, "0.9")
    house.venue.end(order.client_order_id, OrderStatus.FILLED)

    await house.settle(1)

    final = standing(house, order.client_order_id)
    assert (final.status, final.filled_quantity) == (OrderStatus.EXPIRED, D("0.9"))


async def test_a_desk_restored_from_a_backup_repeats_no_id() -> None:
    """The backup brings back an old epoch and an old sequence; the wall clock does not go back."""
    house = await House().open()
    backup = dict(house.store.disk)
    first = await house.orders.submit("t", request())
    house.venue.end(first.client_order_id)
    house.clock.jump(1)

    restored = House(
        house.venue, CrashableStore(backup, house.store.epoch), house.clock
    )
    await restored.open()
    second = await restored.orders.submit("t", request())

    assert second.client_order_id != first.client_order_id
    assert (
        parse(second.client_order_id).sequence > parse(first.client_order_id).sequence
    )  # type: ignore[union-attr]


async def test_the_sequence_goes_on_even_if_the_clock_goes_back() -> None:
    house = await House().open()
    first = await house.orders.submit("t", request())
    house.clock.jump(-3600)

    after = await house.next().open()
    second = await after.orders.submit("t", request())

    assert (
        parse(second.client_order_id).sequence > parse(first.client_order_id).sequence
    )  # type: ignore[union-attr]
