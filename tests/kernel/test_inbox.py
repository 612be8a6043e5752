"""The one door: what comes in is judged once and reaches everyone in the same order."""

import asyncio
from decimal import Decimal
from typing import Any

import pytest

from fakes.clock import ManualClock
from nightdesk.abc import Observer
from nightdesk.kernel import inbox as inbox_module
from nightdesk.kernel.inbox import Inbox
from nightdesk.kernel.loop import LANE, Lane, lane, new_event_loop
from nightdesk.model.events import (
    Event,
    FeedStalled,
    Opportunity,
    OrderAccepted,
    OrderEvent,
    PoolSwap,
    QuoteChanged,
    TradePrinted,
)
from nightdesk.model.order import Side

ONE = Decimal(1)


def quote(bid: int = 100, symbol: str = "BTC/USDT", **changes: Any) -> QuoteChanged:
    return QuoteChanged(
        symbol=symbol,
        venue="binance",
        bid=Decimal(bid),
        bid_quantity=ONE,
        ask=Decimal(bid + 1),
        ask_quantity=ONE,
        **changes,
    )


def trade(number: int = 1) -> TradePrinted:
    return TradePrinted(
        symbol="BTC/USDT",
        venue="binance",
        price=ONE,
        quantity=ONE,
        side=Side.BUY,
        trade_id=str(number),
    )


def swap(number: int = 1, impact_ppm: int = 7_000, **changes: Any) -> PoolSwap:
    return PoolSwap(
        chain="base", pool="0xp", pair="ARB/USDC", transaction_hash=f"0x{number}", log_index=0,
        price_impact_ppm=impact_ppm, value_usd=ONE, price=ONE, **changes,
    )  # fmt: skip


class RecordingObserver(Observer):
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.alerts: list[tuple[str, str, str]] = []

    def on_event(self, event: Event, disposition: str) -> None:
        self.events.append((type(event).__name__, disposition))

    def on_alert(self, level: str, source: str, text: str) -> None:
        self.alerts.append((level, source, text))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


# --- Judging ----------------------------------------------------------------------------------------


def test_an_event_without_a_receipt_stamp_gets_one_and_others_keep_theirs(
    clock: ManualClock,
) -> None:
    inbox, seen = Inbox(clock), []
    inbox.subscribe((QuoteChanged,), seen.append)

    inbox.emit(quote())
    inbox.emit(quote(ts_received_ns=5))

    assert [e.ts_received_ns for e in seen] == [clock.now_ns(), 5]


def test_a_duplicate_is_dropped_and_an_event_without_a_key_never_is_one(
    clock: ManualClock,
) -> None:
    inbox, seen, kept = Inbox(clock, persist=(kept := []).append), [], kept
    inbox.subscribe((Event,), seen.append)

    for event in (
        swap(1),
        swap(2),
        swap(1),
        swap(1, is_confirmed=True),
        quote(),
        quote(),
    ):
        inbox.emit(event)

    assert len(seen) == 5
    assert kept == ["base|0x1|0|0", "base|0x2|0|0", "base|0x1|0|1"]
    assert inbox.stats()["events"]["PoolSwap"] == {
        "accepted": 3,
        "duplicate": 1,
        "stale": 0,
        "negative_age": 0,
    }


def test_keys_of_an_earlier_run_count_as_seen_and_are_not_kept_again(
    clock: ManualClock,
) -> None:
    kept: list[str] = []
    inbox, seen = Inbox(clock, persist=kept.append), []
    inbox.subscribe((PoolSwap,), seen.append)

    inbox.remember(["base|0x1|0|0"])
    inbox.emit(swap(1))

    assert seen == kept == []


def test_the_key_is_kept_before_the_event_is_delivered(clock: ManualClock) -> None:
    order: list[str] = []
    inbox = Inbox(clock, persist=lambda key: order.append("kept"))
    inbox.subscribe((PoolSwap,), lambda event: order.append("delivered"))

    inbox.emit(swap())

    assert order == ["kept", "delivered"]


def test_memory_of_keys_is_bounded_and_forgets_the_least_recently_seen(
    clock: ManualClock,
) -> None:
    inbox, seen = Inbox(clock, seen_capacity=2), []
    inbox.subscribe((PoolSwap,), lambda event: seen.append(event.transaction_hash))

    for number in (1, 2, 1, 3, 1, 2):
        inbox.emit(swap(number))

    assert seen == ["0x1", "0x2", "0x3", "0x2"]
    assert inbox.stats()["seen_keys"] == 2


def test_an_event_older_than_its_type_allows_is_dropped(clock: ManualClock) -> None:
    inbox, seen = Inbox(clock, max_age_s={QuoteChanged: 1.0}), []
    inbox.subscribe((Event,), seen.append)

    inbox.emit(quote(ts_event_ns=clock.now_ns() - 2_000_000_000))
    inbox.emit(quote(ts_event_ns=clock.now_ns() - 500_000_000))
    inbox.emit(quote())
    inbox.emit(trade())

    assert [type(e).__name__ for e in seen] == [
        "QuoteChanged",
        "QuoteChanged",
        "TradePrinted",
    ]
    assert inbox.stats()["events"]["QuoteChanged"]["stale"] == 1


def test_a_limit_of_age_holds_for_subtypes_and_the_nearest_one_wins(
    clock: ManualClock,
) -> None:
    inbox, seen = Inbox(clock, max_age_s={Event: 1.0, QuoteChanged: 10.0}), []
    inbox.subscribe((Event,), seen.append)
    old_ns = clock.now_ns() - 5_000_000_000

    inbox.emit(quote(ts_event_ns=old_ns))
    inbox.emit(swap(ts_event_ns=old_ns))
    inbox.emit(FeedStalled(source="x", silent_s=1.0, ts_event_ns=old_ns))

    assert [type(e) for e in seen] == [QuoteChanged]


def test_age_is_corrected_by_the_measured_offset_of_the_senders_clock(
    clock: ManualClock,
) -> None:
    """A sender 1.27 s ahead of us makes an event that is 2 s old look 0.73 s old."""
    inbox, seen = Inbox(clock, max_age_s={QuoteChanged: 1.0}), []
    inbox.subscribe((QuoteChanged,), seen.append)
    inbox.set_clock_offset_ns("binance", 1_270_000_000)

    inbox.emit(quote(1, ts_event_ns=clock.now_ns() - 730_000_000))
    inbox.emit(quote(2, ts_event_ns=clock.now_ns() + 1_270_000_000))

    assert [e.bid for e in seen] == [2]


def test_a_negative_age_is_delivered_counted_and_told_once_per_sender(
    clock: ManualClock,
) -> None:
    observer = RecordingObserver()
    inbox, seen = Inbox(clock, max_age_s={QuoteChanged: 1.0}, observers=[observer]), []
    inbox.subscribe((QuoteChanged,), seen.append)

    inbox.emit(quote(ts_event_ns=clock.now_ns() + 1_000_000_000))
    inbox.emit(quote(ts_event_ns=clock.now_ns() + 1_270_000_000))

    assert len(seen) == 2
    assert inbox.stats()["events"]["QuoteChanged"]["negative_age"] == 2
    assert inbox.stats()["clock_lead_s"] == {"binance": 1.27}
    assert [(level, source) for level, source, _ in observer.alerts] == [
        ("warning", "binance")
    ]
    assert "clock is ahead" in observer.alerts[0][2]


def test_observers_hear_each_event_with_its_disposition_and_cannot_break_the_way(
    clock: ManualClock,
) -> None:
    class Broken(Observer):
        def on_event(self, event: Event, disposition: str) -> None:
            raise ValueError("broken observer")

    observer = RecordingObserver()
    inbox, seen = (
        Inbox(
            clock, observers=[Broken(), observer, Observer()], max_age_s={PoolSwap: 1.0}
        ),
        [],
    )
    inbox.subscribe((PoolSwap,), seen.append)

    for event in (swap(1), swap(1), swap(2, ts_event_ns=1)):
        inbox.emit(event)

    assert [d for _, d in observer.events] == ["accepted", "duplicate", "stale"]
    assert len(seen) == 1
    assert inbox.stats()["failures"] == {"Broken": 3}


# --- Plain subscribers --------------------------------------------------------------------------------


def test_a_subscriber_of_a_base_type_gets_its_subtypes(clock: ManualClock) -> None:
    inbox, orders, all_events = Inbox(clock), [], []
    inbox.subscribe((OrderEvent,), orders.append)
    inbox.subscribe((Event,), all_events.append)

    inbox.emit(OrderAccepted(venue="paper", symbol="X", client_order_id="1"))
    inbox.emit(trade())

    assert (len(orders), len(all_events)) == (1, 2)


def test_one_failing_subscriber_does_not_stop_the_others_and_is_reported_rarely(
    clock: ManualClock,
) -> None:
    observer = RecordingObserver()
    inbox, seen = Inbox(clock, observers=[observer]), []

    def fail(event: Event) -> None:
        raise ValueError("bad")

    inbox.subscribe((TradePrinted,), fail, owner="grid")
    inbox.subscribe((TradePrinted,), seen.append)
    for number in range(100):
        inbox.emit(trade(number))

    assert len(seen) == 100
    assert inbox.stats()["failures"] == {"grid": 100}
    assert len(observer.alerts) == 7  # 1, 2, 4 ... 64
    assert "subscriber 'grid' raised ValueError: bad" in observer.alerts[0][2]


def test_subscribing_and_unsubscribing_take_effect_with_the_next_event(
    clock: ManualClock,
) -> None:
    inbox, seen = Inbox(clock), []
    inbox.emit(trade(1))

    inbox.subscribe((TradePrinted,), lambda e: seen.append(e.trade_id), owner="a")
    inbox.emit(trade(2))
    inbox.unsubscribe("a")
    inbox.unsubscribe("nobody")
    inbox.emit(trade(3))

    assert seen == ["2"]


def test_every_subscriber_sees_the_cause_before_its_effect(clock: ManualClock) -> None:
    """The matcher answers a trade with a fill: the second subscriber must not see the fill first."""
    inbox, second = Inbox(clock), []

    def match(event: Event) -> None:
        inbox.emit(OrderAccepted(venue="paper", symbol="X", client_order_id="1"))

    inbox.subscribe((TradePrinted,), match)
    inbox.subscribe((Event,), lambda event: second.append(type(event).__name__))
    inbox.emit(trade())

    assert second == ["TradePrinted", "OrderAccepted"]


def test_subscribers_that_answer_each_other_without_end_are_stopped_and_named(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "_MAX_NESTED", 50)
    inbox = Inbox(clock)
    inbox.subscribe((TradePrinted,), lambda event: inbox.emit(trade()), owner="echo")

    inbox.emit(trade())

    assert inbox.stats()["failures"] == {"echo": 1}
    assert inbox.stats()["events"]["TradePrinted"]["accepted"] == 51


def test_an_event_from_a_background_task_is_delivered_in_the_desks_lane(
    clock: ManualClock,
) -> None:
    inbox, lanes = Inbox(clock), []
    inbox.subscribe((TradePrinted,), lambda event: lanes.append(LANE.get()))

    with lane(Lane.LOW):
        inbox.emit(trade())

    assert lanes == [Lane.DESK]


# --- Conflated subscribers ---------------------------------------------------------------------------


async def test_waiting_events_with_one_key_are_replaced_by_the_newest(
    clock: ManualClock,
) -> None:
    inbox, seen = Inbox(clock), []
    inbox.subscribe(
        (QuoteChanged,), lambda e: seen.append((e.symbol, int(e.bid))), conflated=True
    )

    for bid in (1, 2, 3):
        inbox.emit(quote(bid))
    inbox.emit(quote(7, symbol="ETH/USDT"))
    assert seen == []
    assert inbox.stats()["waiting"] == 2
    await asyncio.sleep(0)
    inbox.emit(quote(4))
    await asyncio.sleep(0)

    assert seen == [("BTC/USDT", 3), ("ETH/USDT", 7), ("BTC/USDT", 4)]
    assert inbox.stats()["conflated"] == 2


async def test_events_without_a_key_all_count_up_to_a_bound_then_the_oldest_goes(
    clock: ManualClock,
) -> None:
    inbox, seen = Inbox(clock, mailbox_limit=3), []
    inbox.subscribe((TradePrinted,), lambda e: seen.append(e.trade_id), conflated=True)

    for number in range(5):
        inbox.emit(trade(number))
    await asyncio.sleep(0)

    assert seen == ["2", "3", "4"]
    assert inbox.stats()["dropped"] == 2


async def test_a_failing_conflated_subscriber_gets_the_rest_of_its_events(
    clock: ManualClock,
) -> None:
    inbox, seen = Inbox(clock), []

    def deliver(event: TradePrinted) -> None:
        if event.trade_id == "0":
            raise ValueError("first is bad")
        seen.append(event.trade_id)

    inbox.subscribe((TradePrinted,), deliver, conflated=True, owner="grid")
    for number in range(3):
        inbox.emit(trade(number))
    await asyncio.sleep(0)

    assert seen == ["1", "2"]
    assert inbox.stats()["failures"] == {"grid": 1}


async def test_after_unsubscribing_nothing_that_waited_is_delivered(
    clock: ManualClock,
) -> None:
    inbox, seen = Inbox(clock), []
    inbox.subscribe((TradePrinted,), seen.append, conflated=True, owner="a")

    inbox.emit(trade())
    inbox.unsubscribe("a")
    await asyncio.sleep(0)

    assert seen == []


def test_conflated_events_wait_while_the_background_is_parked(
    clock: ManualClock,
) -> None:
    loop = new_event_loop()
    inbox, seen = Inbox(clock), []
    inbox.subscribe(
        (QuoteChanged,),
        lambda e: seen.append((int(e.bid), LANE.get())),
        conflated=True,
        lane=Lane.NORMAL,
    )

    async def main() -> None:
        loop.close_lanes()
        for bid in range(10):
            inbox.emit(quote(bid))
            await asyncio.sleep(0)
        assert seen == []
        loop.open_lanes()
        for _ in range(30):
            await asyncio.sleep(0)

    loop.run_until_complete(main())
    loop.close()

    assert seen == [(9, Lane.NORMAL)]


# --- Opportunities -----------------------------------------------------------------------------------


def test_an_edge_makes_an_opportunity_with_a_deadline_and_its_cause(
    clock: ManualClock,
) -> None:
    inbox = Inbox(clock)
    raised: list[Opportunity] = []
    inbox.on_opportunity = raised.append
    inbox.add_handler(
        "arbitrage",
        (PoolSwap,),
        lambda e: e.price_impact_ppm - 5_000 if e.price_impact_ppm > 5_000 else None,
        0.5,
    )

    inbox.emit(swap(1, 4_000, ts_event_ns=7))
    inbox.emit(swap(2, 7_000, ts_event_ns=8))

    (found,) = raised
    assert (found.handler, found.edge_ppm, found.ts_event_ns) == ("arbitrage", 2_000, 8)
    assert found.deadline_ns == clock.now_ns() + 500_000_000
    assert isinstance(found.cause, PoolSwap)
    assert inbox.stats()["opportunities"] == 1


def test_a_failing_assessment_is_named_and_means_no_opportunity(
    clock: ManualClock,
) -> None:
    observer = RecordingObserver()
    inbox = Inbox(clock, observers=[observer])
    raised: list[Opportunity] = []
    inbox.on_opportunity = raised.append
    inbox.add_handler("broken", (PoolSwap,), lambda e: 1 // 0)
    inbox.add_handler("sound", (PoolSwap,), lambda e: 1)

    inbox.emit(swap())

    assert [o.handler for o in raised] == ["sound"]
    assert "handler 'broken' raised ZeroDivisionError" in observer.alerts[0][2]


def test_opportunities_of_one_event_come_best_edge_first_and_the_rest_is_dropped(
    clock: ManualClock,
) -> None:
    inbox = Inbox(clock, opportunity_limit=2)
    raised: list[Opportunity] = []
    inbox.on_opportunity = raised.append
    for edge in (5, 9, 7):
        inbox.add_handler(f"h{edge}", (PoolSwap,), lambda e, edge=edge: edge)

    inbox.emit(swap())

    assert [o.handler for o in raised] == ["h9", "h7"]
    assert inbox.stats()["opportunities_dropped"] == 1


def test_a_handler_runs_after_every_subscriber_and_may_emit_at_once(
    clock: ManualClock,
) -> None:
    """The handler's first step sends an order, and must find its fill booked when the venue returns."""
    inbox, order = Inbox(clock), []
    inbox.subscribe((Event,), lambda event: order.append(type(event).__name__))

    def react(opportunity: Opportunity) -> None:
        inbox.emit(OrderAccepted(venue="paper", symbol="X", client_order_id="1"))
        order.append("handler goes on")

    inbox.on_opportunity = react
    inbox.add_handler("h", (PoolSwap,), lambda e: 1)
    inbox.emit(swap())

    assert order == ["PoolSwap", "OrderAccepted", "handler goes on"]


def test_a_failing_switch_is_reported_and_a_removed_handler_is_not_asked(
    clock: ManualClock,
) -> None:
    inbox = Inbox(clock)

    def fail(opportunity: Opportunity) -> None:
        raise RuntimeError("no switch")

    inbox.add_handler("h", (PoolSwap,), lambda e: 1)
    inbox.emit(swap(1))
    inbox.on_opportunity = fail
    inbox.emit(swap(2))
    inbox.unsubscribe("h")
    inbox.emit(swap(3))

    assert inbox.stats()["failures"] == {"h": 1}
    assert inbox.stats()["opportunities"] == 2
