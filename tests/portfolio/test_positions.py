"""Positions: exact money."""

from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.house import quote
from nightdesk.model.order import Fill, Side
from nightdesk.model.position import Position
from nightdesk.portfolio.positions import Positions

D = Decimal


def trade(
    side: str,
    quantity: str,
    price: str,
    fee: str = "0",
    asset: str = "USDT",
    **more: Any,
) -> Fill:
    return Fill(
        venue="A",
        symbol=more.pop("symbol", "BTC/USDT"),
        trade_id="1",
        venue_order_id="v",
        client_order_id="c",
        side=Side(side),
        quantity=D(quantity),
        price=D(price),
        fee=D(fee),
        fee_asset=asset,
        ts_event_ns=5,
    )


def booked(*fills: Fill) -> Positions:
    positions = Positions()
    for fill in fills:
        positions.apply(fill)
    return positions


def test_t20_a_round_trip_earns_gross_minus_fees_exactly() -> None:
    positions = booked(
        trade("BUY", "10", "100", "0.5"), trade("SELL", "10", "110", "0.55")
    )

    assert positions.realized_pnl() == D(100)
    assert positions.fees_in_quote() == D("1.05")
    assert positions.of("BTC/USDT", "A").quantity == 0
    assert positions.equity(D(1000), lambda symbol, venue: None) == D("1098.95")


def test_a_position_averages_in_and_keeps_its_average_on_the_way_out() -> None:
    positions = booked(
        trade("BUY", "1", "100"), trade("BUY", "3", "104"), trade("SELL", "2", "110")
    )

    position = positions.of("BTC/USDT", "A")

    assert (position.quantity, position.average_price, position.realized_pnl) == (
        D(2),
        D(103),
        D(14),
    )
    assert positions.unrealized_pnl(lambda symbol, venue: quote("105", "106")) == D(4)


def test_a_sale_of_more_than_is_held_opens_the_other_side_at_its_price() -> None:
    positions = booked(trade("BUY", "1", "100"), trade("SELL", "3", "110"))

    position = positions.of("BTC/USDT", "A")

    assert (position.quantity, position.average_price, position.realized_pnl) == (
        D(-2),
        D(110),
        D(10),
    )
    assert positions.unrealized_pnl(lambda symbol, venue: quote("105", "106")) == D(8)


def test_a_fee_in_the_base_asset_makes_what_is_held_smaller() -> None:
    positions = booked(trade("BUY", "1", "100", "0.001", "BTC"))

    position = positions.of("BTC/USDT", "A")

    assert position.quantity == D("0.999")
    assert position.average_price == D(100)
    assert position.fees == {"BTC": D("0.001")}
    assert positions.fees_in_quote() == D("0.1")
    assert positions.equity(D(1000), lambda symbol, venue: quote("100", "100")) == D(
        "999.9"
    )


def test_a_fee_in_a_third_asset_is_kept_apart() -> None:
    positions = booked(
        trade("BUY", "1", "100", "0.01", "BNB"),
        trade("SELL", "1", "100", "0.01", "BNB"),
    )

    assert positions.fees_in_quote() == 0
    assert positions.unpriced_fees() == {"BNB": D("0.02")}


def test_without_a_mark_nothing_is_said_about_equity() -> None:
    positions = booked(trade("BUY", "1", "100"))

    assert positions.unrealized_pnl(lambda symbol, venue: None) is None
    assert positions.equity(D(1000), lambda symbol, venue: None) is None


def test_eighteen_decimals_stay_exact() -> None:
    quantity, price = "1234567.123456789012345678", "98765.123456789012345678"

    positions = booked(trade("BUY", quantity, price), trade("SELL", quantity, price))

    assert positions.realized_pnl() == 0


def test_what_was_never_traded_is_flat() -> None:
    assert Positions().of("X/Y", "A") == Position(symbol="X/Y", venue="A")
    assert Positions().all() == []


def test_a_saved_position_goes_on_as_if_nothing_had_happened() -> None:
    fills = [
        trade("BUY", "1", "100"),
        trade("BUY", "3", "104"),
        trade("SELL", "2", "110", "0.1"),
        trade("SELL", "3", "90"),
    ]
    straight = booked(*fills)
    first = booked(*fills[:2])

    second = Positions()
    second.restore(first.record("BTC/USDT", "A"))
    for fill in fills[2:]:
        second.apply(fill)

    assert second.all() == straight.all()
    assert second.fees_in_quote() == straight.fees_in_quote()
    with pytest.raises(msgspec.MsgspecError):
        second.restore(b"{}")


amounts = st.integers(1, 10**6).map(lambda n: D(n) / 1000)


@given(
    st.lists(st.tuples(st.sampled_from(["BUY", "SELL"]), amounts, amounts), max_size=30)
)
def test_profit_and_mark_always_sum_to_what_changed_hands(
    trades: list[tuple[str, Decimal, Decimal]],
) -> None:
    fills = [trade(side, str(quantity), str(price)) for side, quantity, price in trades]
    positions = Positions()
    positions.rebuild(fills)
    position = positions.of("BTC/USDT", "A")

    cash = sum((-f.side.sign * f.quantity * f.price for f in fills), D(0))

    assert position.quantity == sum((f.side.sign * f.quantity for f in fills), D(0))
    worth = position.realized_pnl + position.unrealized_pnl(D(77))
    assert abs(worth - (cash + position.quantity * 77)) < D("1e-12")
