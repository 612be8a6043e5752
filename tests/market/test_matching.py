"""The matching engine, rule by rule, on the fixture market 100.0 / 100.2."""

from decimal import Decimal
from typing import Any

import msgspec
import pytest

from fakes.paper import (
    RICH,
    SECOND,
    START,
    D,
    book,
    engine,
    fills_of,
    instrument,
    order,
    quote,
    trade,
)
from nightdesk.market.matching import MatchingEngine
from nightdesk.model.order import Liquidity, OrderStatus, OrderType, Side, TimeInForce
from nightdesk.model.statement import (
    CancelRefused,
    Ended,
    Placed,
    Refused,
    StatementRow,
    Traded,
    Triggered,
)

BUY, SELL = Side.BUY, Side.SELL


def codes(rows: list[StatementRow]) -> list[str]:
    return [row.code for row in rows if isinstance(row, (Refused, CancelRefused))]


def ends(rows: list[StatementRow]) -> list[tuple[str, str]]:
    return [(row.client_order_id, row.reason) for row in rows if isinstance(row, Ended)]


def status(matching: MatchingEngine, client_order_id: str) -> OrderStatus:
    found = matching.find(client_order_id)
    assert found is not None
    return found.status


# Taking ------------------------------------------------------------------------------------------


def test_market_order_takes_the_shown_ask_and_never_the_last_price() -> None:
    matching = engine()
    matching.on_trade(START, trade(BUY, "5", "99.0"))

    rows = matching.submit(START, order("a", BUY, "0.5"))

    assert fills_of(rows) == [("a", D("0.5"), D("100.2"))]
    assert status(matching, "a") is OrderStatus.FILLED


def test_one_quote_is_never_filled_twice() -> None:
    matching = engine()

    first = matching.submit(START, order("a", BUY, "0.7", "100.2"))
    second = matching.submit(START, order("b", BUY, "0.7", "100.2"))
    repeated = matching.on_quote(START, quote("100.0", "100.2"))

    assert fills_of(first) == [("a", D("0.7"), D("100.2"))]
    assert fills_of(second) == [("b", D("0.3"), D("100.2"))]
    assert fills_of(repeated) == []


def test_what_the_feed_adds_at_a_level_can_be_taken_again() -> None:
    matching = engine()
    matching.submit(START, order("a", BUY, "1", "100.2"))

    less = matching.on_quote(START, quote("100.0", "100.2", ask_quantity="0.5"))
    matching.submit(START, order("b", BUY, "1", "100.2"))
    more = matching.on_quote(START, quote("100.0", "100.2", ask_quantity="0.8"))

    assert fills_of(less) == []
    assert fills_of(more) == [("b", D("0.3"), D("100.2"))]


def test_a_level_that_was_left_and_comes_back_is_new() -> None:
    matching = engine()
    matching.submit(START, order("a", BUY, "1", "100.2"))
    matching.on_quote(START, quote("100.0", "100.3"))
    matching.on_quote(START, quote("100.0", "100.2"))

    rows = matching.submit(START, order("b", BUY, "1", "100.2"))

    assert fills_of(rows) == [("b", D(1), D("100.2"))]


def test_a_level_that_is_hidden_for_a_moment_is_not_new() -> None:
    matching = engine()
    matching.submit(START, order("a", BUY, "1", "100.2"))
    matching.on_quote(START, quote("100.0", "100.1"))
    matching.on_quote(START, quote("100.0", "100.2"))

    rows = matching.submit(
        START, order("b", BUY, "1", "100.2", time_in_force=TimeInForce.IOC)
    )

    assert fills_of(rows) == []


def test_the_rest_of_a_market_order_waits_for_the_next_quotes_and_then_ends() -> None:
    matching = engine(market_patience_s=3)

    at_once = matching.submit(START, order("a", BUY, "3"))
    later = matching.on_quote(START + SECOND, quote("100.1", "100.3"))
    end = matching.advance(START + 3 * SECOND)

    assert fills_of(at_once) == [("a", D(1), D("100.2"))]
    assert fills_of(later) == [("a", D(1), D("100.3"))]
    assert ends(end) == [("a", "NO_LIQUIDITY")]
    assert matching.find("a").filled_quantity == D(2)  # type: ignore[union-attr]
    assert matching.next_deadline_ns is None


def test_market_order_walks_the_levels_of_the_book() -> None:
    matching = engine()
    matching.on_book(
        START,
        book(
            [("100.0", "1")],
            [("100.2", "9"), ("100.3", "2"), ("100.4", "5")],
            1,
            1,
            True,
        ),
    )

    rows = matching.submit(START, order("a", BUY, "4"))

    assert fills_of(rows) == [
        ("a", D(1), D("100.2")),
        ("a", D(2), D("100.3")),
        ("a", D(1), D("100.4")),
    ]


def test_a_limit_for_more_than_is_shown_fills_what_is_shown_and_rests() -> None:
    matching = engine()
    matching.on_quote(START, quote("100.0", "101.0", ask_quantity="5"))

    rows = matching.submit(START, order("a", BUY, "8", "101.0"))

    assert fills_of(rows) == [("a", D(5), D("101.0"))]
    assert status(matching, "a") is OrderStatus.PARTIALLY_FILLED


def test_ioc_takes_and_ends() -> None:
    matching = engine()

    rows = matching.submit(
        START, order("a", BUY, "3", "100.2", time_in_force=TimeInForce.IOC)
    )

    assert fills_of(rows) == [("a", D(1), D("100.2"))]
    assert ends(rows) == [("a", "IOC_REST")]


def test_fok_fills_all_or_nothing() -> None:
    matching = engine()

    too_much = matching.submit(
        START, order("a", BUY, "3", "100.2", time_in_force=TimeInForce.FOK)
    )
    enough = matching.submit(
        START, order("b", BUY, "1", "100.2", time_in_force=TimeInForce.FOK)
    )

    assert (fills_of(too_much), ends(too_much)) == ([], [("a", "FOK_NOT_FILLABLE")])
    assert fills_of(enough) == [("b", D(1), D("100.2"))]


def test_a_stale_market_fills_nothing() -> None:
    matching = engine(stale_after_s=10)
    late = START + 11 * SECOND

    assert codes(matching.submit(late, order("a", BUY, "1"))) == ["NO_MARKET"]
    assert fills_of(matching.submit(late, order("b", BUY, "1", "100.5"))) == []


def test_an_order_that_missed_a_stale_market_meets_the_fresh_one_at_its_price_not_at_its_own() -> (
    None
):
    matching = engine(stale_after_s=10)
    late = START + 11 * SECOND
    matching.submit(late, order("a", BUY, "1", "105.0"))

    rows = matching.on_quote(late, quote("100.0", "100.2", ask_quantity="5"))

    assert fills_of(rows) == [("a", D(1), D("100.2"))]


def test_a_post_only_order_needs_a_market_that_proves_it_passive() -> None:
    matching = engine(stale_after_s=10)

    rows = matching.submit(
        START + 11 * SECOND, order("p", BUY, "1", "99.0", post_only=True)
    )

    assert codes(rows) == ["NO_MARKET"]


def test_what_a_crossing_quote_could_not_fill_goes_on_at_the_market_not_outside_of_it() -> (
    None
):
    matching = engine()
    matching.submit(START, order("a", BUY, "3", "100.0"))
    crossed = matching.on_quote(START, quote("98.0", "98.2"))

    rows = matching.on_quote(START, quote("98.1", "98.3"))

    assert fills_of(crossed) == [("a", D(1), D("100.0"))]
    assert fills_of(rows) == [("a", D(1), D("98.3"))]


def test_an_order_restored_into_another_market_trades_inside_it() -> None:
    before = engine()
    rows = before.submit(START, order("a", BUY, "1", "100.0", post_only=True))
    after = MatchingEngine("A", [instrument()], check_funds=False)
    after.restore(
        [msgspec.structs.replace(row, sequence=n) for n, row in enumerate(rows, 1)]
    )

    filled = after.on_quote(START, quote("95.0", "95.2"))

    assert fills_of(filled) == [("a", D(1), D("95.2"))]


def test_an_order_that_missed_a_stale_market_meets_a_trade_at_the_trades_price() -> (
    None
):
    matching = engine(stale_after_s=10)
    late = START + 11 * SECOND
    matching.submit(late, order("a", BUY, "1", "105.0"))

    rows = matching.on_trade(late, trade(SELL, "0.4", "100.0"))

    assert fills_of(rows) == [("a", D("0.4"), D("100.0"))]


# Making ------------------------------------------------------------------------------------------


def test_a_resting_order_waits_for_the_queue_before_it() -> None:
    matching = engine()
    matching.submit(START, order("a", BUY, "1", "100.0"))

    assert fills_of(matching.on_trade(START, trade(SELL, "0.6", "100.0", "1"))) == []
    assert fills_of(matching.on_trade(START, trade(SELL, "0.6", "100.0", "2"))) == [
        ("a", D("0.2"), D("100.0"))
    ]
    assert fills_of(matching.on_trade(START, trade(SELL, "5", "100.0", "3"))) == [
        ("a", D("0.8"), D("100.0"))
    ]


def test_a_repeated_public_trade_counts_once() -> None:
    matching = engine()
    matching.submit(START, order("a", BUY, "1", "100.0"))
    matching.on_trade(START, trade(SELL, "1.5", "100.0", "t1"))

    assert fills_of(matching.on_trade(START, trade(SELL, "1.5", "100.0", "t1"))) == []


def test_a_shrinking_quote_moves_the_order_up() -> None:
    matching = engine()
    matching.submit(START, order("a", BUY, "1", "100.0"))
    matching.on_quote(START, quote("100.0", "100.2", bid_quantity="0.1"))
    matching.on_quote(START, quote("100.0", "100.2", bid_quantity="7"))

    rows = matching.on_trade(START, trade(SELL, "0.3", "100.0"))

    assert fills_of(rows) == [("a", D("0.2"), D("100.0"))]


def test_an_order_that_improves_the_market_is_first() -> None:
    matching = engine()
    matching.submit(START, order("a", BUY, "1", "100.1"))

    rows = matching.on_trade(START, trade(SELL, "0.3", "100.1"))

    assert fills_of(rows) == [("a", D("0.3"), D("100.1"))]


def test_an_order_deeper_than_the_feed_shows_waits_for_the_whole_level_once_it_is_seen() -> (
    None
):
    matching = engine()
    matching.submit(START, order("a", BUY, "1", "99.9"))

    unseen = matching.on_trade(START, trade(SELL, "50", "99.9", "1"))
    matching.on_quote(START, quote("99.9", "100.2", bid_quantity="2"))
    seen = matching.on_trade(START, trade(SELL, "2.5", "99.9", "2"))

    assert fills_of(unseen) == []
    assert fills_of(seen) == [("a", D("0.5"), D("99.9"))]


def test_the_book_tells_the_queue_of_a_deeper_level() -> None:
    matching = engine()
    matching.on_book(
        START, book([("100.0", "1"), ("99.9", "4")], [("100.2", "1")], 1, 1, True)
    )
    matching.submit(START, order("a", BUY, "1", "99.9"))
    matching.on_book(START, book([("99.9", "0.5")], [], 2, 2))

    rows = matching.on_trade(START, trade(SELL, "0.6", "99.9"))

    assert fills_of(rows) == [("a", D("0.1"), D("99.9"))]


def test_one_trade_is_shared_by_price_then_time_and_spent_once() -> None:
    matching = engine()
    matching.submit(START, order("late", BUY, "1", "100.0"))
    matching.submit(START, order("later", BUY, "1", "100.0"))
    matching.submit(START, order("better", BUY, "0.5", "100.1"))

    rows = matching.on_trade(START, trade(SELL, "3", "100.0"))

    assert fills_of(rows) == [
        ("better", D("0.5"), D("100.1")),
        ("late", D(1), D("100.0")),
        ("later", D("0.5"), D("100.0")),
    ]


def test_public_quantity_between_two_own_orders_trades_before_the_second() -> None:
    matching = engine()
    matching.submit(START, order("first", BUY, "1", "100.0"))
    matching.on_quote(START, quote("100.0", "100.2", bid_quantity="3"))
    matching.submit(START, order("second", BUY, "1", "100.0"))

    rows = matching.on_trade(START, trade(SELL, "4.5", "100.0"))

    assert fills_of(rows) == [
        ("first", D(1), D("100.0")),
        ("second", D("0.5"), D("100.0")),
    ]


def test_a_quote_that_crosses_fills_at_our_price_up_to_the_shown_quantity() -> None:
    matching = engine()
    matching.submit(START, order("a", BUY, "3", "100.0"))

    rows = matching.on_quote(START, quote("99.7", "99.9", ask_quantity="2"))

    assert fills_of(rows) == [("a", D(2), D("100.0"))]
    assert [row.fill.liquidity for row in rows if isinstance(row, Traded)] == [
        Liquidity.MAKER
    ]


def test_a_crossing_quote_is_shared_by_price_then_time() -> None:
    matching = engine()
    matching.submit(START, order("low", SELL, "1", "100.3"))
    matching.submit(START, order("high", SELL, "1", "100.4"))
    matching.submit(START, order("low2", SELL, "1", "100.3"))

    rows = matching.on_quote(START, quote("100.5", "100.7", bid_quantity="2.5"))

    assert fills_of(rows) == [
        ("low", D(1), D("100.3")),
        ("low2", D(1), D("100.3")),
        ("high", D("0.5"), D("100.4")),
    ]


def test_a_trade_on_the_other_side_does_not_fill() -> None:
    matching = engine()
    matching.submit(START, order("a", BUY, "1", "100.1"))

    assert fills_of(matching.on_trade(START, trade(BUY, "5", "100.1"))) == []


def test_a_book_without_quotes_is_a_market_too() -> None:
    matching = MatchingEngine("A", [instrument()])
    matching.deposit(START, RICH)
    matching.on_book(START, book([("100.0", "1")], [("100.2", "1")], 1, 1, True))
    matching.submit(START, order("a", BUY, "2"))

    rows = matching.on_book(START, book([], [("100.2", "0"), ("100.4", "3")], 2, 2))

    assert fills_of(rows) == [("a", D(1), D("100.4"))]


# Admission ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "request_"),
    [
        ("UNKNOWN_SYMBOL", order("x", BUY, "1", "100.0", symbol="ETH/USDT")),
        ("QUANTITY_BELOW_MINIMUM", order("x", BUY, "0.0005", "100.0")),
        ("QUANTITY_NOT_ON_LOT", order("x", BUY, "1.0005", "100.0")),
        ("QUANTITY_ABOVE_MAXIMUM", order("x", BUY, "10000000000", "100.0")),
        ("PRICE_NOT_ON_TICK", order("x", BUY, "1", "100.05")),
        ("PRICE_MISSING", order("x", BUY, "1", type=OrderType.LIMIT)),
        ("TRIGGER_PRICE_MISSING", order("x", SELL, "1", type=OrderType.STOP_MARKET)),
        ("NOTIONAL_BELOW_MINIMUM", order("x", BUY, "0.049", "100.0")),
        ("NOTIONAL_BELOW_MINIMUM", order("x", BUY, "0.048")),
        ("POST_ONLY_WOULD_TAKE", order("x", BUY, "1", "100.2", post_only=True)),
        ("POST_ONLY_NOT_POSSIBLE", order("x", BUY, "1", post_only=True)),
        (
            "REDUCE_ONLY_WOULD_INCREASE_POSITION",
            order("x", SELL, "1", reduce_only=True),
        ),
        ("INSUFFICIENT_BALANCE", order("x", BUY, "100000", "100.0")),
        ("INSUFFICIENT_BALANCE", order("x", SELL, "1000.001", "100.3")),
        (
            "EXPIRY_MISSING",
            order("x", BUY, "1", "100.0", time_in_force=TimeInForce.GTD),
        ),
        (
            "EXPIRY_IN_PAST",
            order(
                "x", BUY, "1", "100.0", time_in_force=TimeInForce.GTD, expire_ns=START
            ),
        ),
        (
            "STOP_WOULD_TRIGGER",
            order("x", SELL, "1", type=OrderType.STOP_MARKET, trigger_price=D("100.0")),
        ),
        (
            "STOP_WOULD_TRIGGER",
            order("x", BUY, "1", type=OrderType.STOP_MARKET, trigger_price=D("100.1")),
        ),
    ],
)
def test_a_wrong_order_is_refused_with_its_code(code: str, request_: Any) -> None:
    matching = engine()
    before = (matching.balances(), matching.locked())

    rows = matching.submit(START, request_)

    assert codes(rows) == [code]
    assert len(rows) == 1
    assert (matching.balances(), matching.locked()) == before
    assert matching.open_orders() == []


def test_a_post_only_order_beside_the_market_rests() -> None:
    matching = engine()

    rows = matching.submit(START, order("a", BUY, "1", "100.1", post_only=True))

    assert [type(row) for row in rows] == [Placed]


@pytest.mark.parametrize(("rule", "again_open", "again_done"), [
    ("forever", True, True),
    ("open", True, False),
    ("none", False, False),
])  # fmt: skip
def test_client_order_ids_are_unique_as_far_as_the_venue_says(
    rule: Any, again_open: bool, again_done: bool
) -> None:
    matching = engine(client_ids=rule)
    matching.submit(START, order("a", BUY, "1", "99.0"))

    while_open = matching.submit(START, order("a", BUY, "1", "99.0"))
    for _ in matching.open_orders():
        matching.cancel(START, "a")
        matching.submit(
            START, order("b", BUY, "0.1", "100.2", time_in_force=TimeInForce.IOC)
        )
    matching = engine(client_ids=rule)
    matching.submit(
        START, order("a", BUY, "0.1", "100.2", time_in_force=TimeInForce.IOC)
    )
    when_done = matching.submit(
        START, order("a", BUY, "0.1", "100.2", time_in_force=TimeInForce.IOC)
    )

    assert (codes(while_open) == ["DUPLICATE_CLIENT_ORDER_ID"]) is again_open
    assert (codes(when_done) == ["DUPLICATE_CLIENT_ORDER_ID"]) is again_done


def test_open_orders_are_bounded() -> None:
    matching = engine(max_open_orders=2)
    for name in "ab":
        matching.submit(START, order(name, BUY, "1", "99.0"))

    assert codes(matching.submit(START, order("c", BUY, "1", "99.0"))) == [
        "TOO_MANY_ORDERS"
    ]


# Money -------------------------------------------------------------------------------------------


def test_fees_in_quote_are_exact() -> None:
    matching = engine()
    matching.submit(START, order("a", BUY, "1", "100.2"))

    assert matching.balances() == {
        "BTC": RICH["BTC"] + 1,
        "USDT": RICH["USDT"] - D("100.2") - D("0.0501"),
    }


def test_a_fee_in_base_makes_the_bought_quantity_smaller_and_a_sale_pays_in_quote() -> (
    None
):
    matching = engine(instrument={"fee_in": "base"})
    matching.submit(START, order("a", BUY, "1", "100.2"))
    matching.submit(START, order("b", SELL, "1", "100.0"))

    assert matching.balances()["BTC"] == RICH["BTC"] - D("0.0005")
    assert matching.balances()["USDT"] == RICH["USDT"] - D("100.2") + D(100) - D("0.05")


def test_open_orders_lock_what_they_may_cost_and_give_it_back() -> None:
    matching = engine()
    matching.submit(START, order("a", BUY, "1", "100.0"))
    matching.submit(START, order("b", SELL, "2", "100.3"))

    locked = matching.locked()
    matching.cancel(START, "a")
    matching.cancel(START, "b")

    assert locked == {"USDT": D("100.0500"), "BTC": D(2)}
    assert matching.locked() == {}


def test_a_market_buy_that_runs_out_of_money_fills_what_it_can_and_ends() -> None:
    matching = MatchingEngine("A", [instrument()])
    matching.deposit(START, {"USDT": D(200)})
    matching.on_quote(START, quote("100.0", "100.0"))
    at_once = matching.submit(START, order("a", BUY, "1.9"))

    rows = matching.on_quote(START, quote("100.0", "150.0", ask_quantity="5"))

    assert fills_of(at_once) == [("a", D(1), D("100.0"))]
    assert fills_of(rows) == [("a", D("0.666"), D("150.0"))]
    assert ends(rows) == [("a", "INSUFFICIENT_BALANCE")]
    assert matching.balances()["USDT"] >= 0


def test_without_funds_check_one_may_sell_what_one_does_not_have() -> None:
    matching = MatchingEngine("A", [instrument()], check_funds=False)
    matching.on_quote(START, quote("100.0", "100.2"))
    matching.submit(START, order("a", SELL, "1"))

    assert matching.balances() == {"BTC": D(-1), "USDT": D("99.95")}


# Reduce-only, stops, expiry, cancel --------------------------------------------------------------


def test_reduce_only_shrinks_to_the_position_and_ends_with_it() -> None:
    matching = engine()
    matching.submit(START, order("in", BUY, "0.6", "100.2"))

    rows = matching.submit(START, order("out", SELL, "1", reduce_only=True))

    assert fills_of(rows) == [("out", D("0.6"), D("100.0"))]
    assert ends(rows) == [("out", "REDUCE_ONLY")]


def test_two_resting_reduce_only_orders_together_never_turn_the_position() -> None:
    matching = engine()
    matching.submit(START, order("in", BUY, "1", "100.2"))
    matching.submit(START, order("tp", SELL, "1", "100.3", reduce_only=True))
    matching.submit(START, order("tp2", SELL, "1", "100.4", reduce_only=True))

    rows = matching.on_trade(START, trade(BUY, "50", "100.5"))

    assert fills_of(rows) == [("tp", D(1), D("100.3"))]
    assert ends(rows) == [("tp2", "REDUCE_ONLY")]


def test_a_sell_stop_triggers_on_the_bid_and_a_buy_stop_on_the_ask() -> None:
    matching = engine()
    matching.submit(
        START,
        order("sell", SELL, "1", type=OrderType.STOP_MARKET, trigger_price=D("95.0")),
    )
    matching.submit(
        START,
        order("buy", BUY, "1", type=OrderType.STOP_MARKET, trigger_price=D("105.0")),
    )

    assert matching.on_trade(START, trade(SELL, "9", "90.0")) == []
    assert matching.on_quote(START, quote("95.1", "95.3")) == []
    down = matching.on_quote(START, quote("95.0", "95.3"))
    assert matching.on_quote(START, quote("104.8", "104.9")) == []
    up = matching.on_quote(START, quote("104.8", "105.2"))

    assert [type(row) for row in down] == [Triggered, Traded]
    assert fills_of(down) == [("sell", D(1), D("95.0"))]
    assert fills_of(up) == [("buy", D(1), D("105.2"))]


def test_a_stop_limit_rests_at_its_limit_after_the_trigger() -> None:
    matching = engine()
    stop = order(
        "s", SELL, "1", "95.5", type=OrderType.STOP_LIMIT, trigger_price=D("95.0")
    )
    matching.submit(START, stop)

    rows = matching.on_quote(START, quote("94.9", "95.3"))
    later = matching.on_quote(START, quote("95.6", "95.8"))

    assert [type(row) for row in rows] == [Triggered]
    assert fills_of(later) == [("s", D(1), D("95.5"))]


def test_a_trailing_stop_follows_the_bid_up_and_never_down() -> None:
    matching = engine()
    stop = order(
        "t", SELL, "1", type=OrderType.TRAILING_STOP_MARKET, trigger_price=D("99.0")
    )
    matching.submit(START, stop)

    matching.on_quote(START, quote("104.0", "104.2"))
    matching.on_quote(START, quote("103.2", "103.4"))
    rows = matching.on_quote(START, quote("103.0", "103.2"))

    assert fills_of(rows) == [("t", D(1), D("103.0"))]


def test_a_trailing_buy_stop_follows_the_ask_down() -> None:
    matching = engine()
    stop = order(
        "t", BUY, "1", type=OrderType.TRAILING_STOP_MARKET, trigger_price=D("101.2")
    )
    matching.submit(START, stop)

    matching.on_quote(START, quote("97.8", "98.0"))
    rows = matching.on_quote(START, quote("98.8", "99.0"))

    assert fills_of(rows) == [("t", D(1), D("99.0"))]


def test_gtd_expires_at_its_instant_with_its_fills_kept() -> None:
    matching = engine()
    matching.submit(
        START,
        order(
            "a",
            BUY,
            "3",
            "100.2",
            time_in_force=TimeInForce.GTD,
            expire_ns=START + SECOND,
        ),
    )

    assert matching.next_deadline_ns == START + SECOND
    assert matching.advance(START + SECOND - 1) == []
    rows = matching.advance(START + SECOND)

    assert ends(rows) == [("a", "GTD")]
    assert [(r.status, r.filled_quantity) for r in rows if isinstance(r, Ended)] == [
        (OrderStatus.EXPIRED, D(1))
    ]


def test_a_cancel_ends_the_order_with_its_fills_and_a_second_one_is_refused() -> None:
    matching = engine()
    matching.submit(START, order("a", BUY, "3", "100.2"))

    first = matching.cancel(START, "a")
    second = matching.cancel(START, "a")
    unknown = matching.cancel(START, "nobody")

    assert ends(first) == [("a", "REQUESTED")]
    assert codes(second) == ["ORDER_NOT_OPEN"]
    assert codes(unknown) == ["UNKNOWN_ORDER"]
    assert fills_of(matching.on_quote(START, quote("99.0", "99.1"))) == []


def test_finished_orders_are_forgotten_beyond_the_history_but_their_ids_stay_used() -> (
    None
):
    matching = engine(history=2)
    for number in range(4):
        matching.submit(
            START,
            order(f"o{number}", BUY, "0.1", "100.2", time_in_force=TimeInForce.IOC),
        )

    assert matching.find("o0") is None
    assert matching.find("o3") is not None
    assert len(matching.fills()) == 2
    assert codes(matching.submit(START, order("o0", BUY, "0.1", "100.2"))) == [
        "DUPLICATE_CLIENT_ORDER_ID"
    ]


def test_events_of_an_unlisted_symbol_are_counted_and_ignored() -> None:
    matching = engine()
    stranger = quote("1", "2")
    stranger = type(stranger)(
        **{
            **{f: getattr(stranger, f) for f in stranger.__struct_fields__},
            "symbol": "X/Y",
        }
    )

    assert matching.on_quote(START, stranger) == []
    assert matching.stats()["unknown_symbols"] == 1


def test_the_average_price_is_weighted() -> None:
    matching = engine()
    matching.submit(START, order("a", BUY, "2", "100.3"))
    matching.on_quote(START, quote("100.1", "100.3"))

    found = matching.find("a")

    assert found is not None
    assert found.average_price == Decimal("100.25")
