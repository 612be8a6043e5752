"""The gate: T-24, T-25, and limits that hold under concurrency."""

import os
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fakes.clock import ManualClock
from fakes.house import Listener, quote, request
from fakes.store import CrashableStore
from fakes.venue import btc
from nightdesk.abc import Record
from nightdesk.config import RiskConfig
from nightdesk.errors import OrderDeniedError, StateNotWritableError
from nightdesk.model.events import QuoteChanged, TradingStateChanged
from nightdesk.model.order import Fill, Order, OrderStatus, OrderType, Side, VenueOrder
from nightdesk.portfolio.positions import Positions
from nightdesk.risk.gate import Gate

D = Decimal
OPEN: dict[str, Any] = {
    "max_notional_per_order": None,
    "max_position_notional": None,
    "price_collar_ppm": None,
}


class Desk:
    """A gate with everything it asks."""

    def __init__(
        self, limits: dict[str, Any] | None = None, store: CrashableStore | None = None
    ) -> None:
        self.clock = ManualClock()
        self.store = store or CrashableStore()
        self.positions = Positions()
        self.quotes: dict[str, QuoteChanged] = {}
        self.listener = Listener()
        self.mark("100", "100.2")
        self.gate = Gate(
            RiskConfig(**(OPEN | (limits or {}))),
            clock=self.clock,
            store=self.store,
            instruments=lambda symbol, venue: (
                btc(venue, symbol) if venue in "AB" else None
            ),
            positions=self.positions,
            quote=lambda symbol, venue: self.quotes.get(symbol + venue),
            observers=(self.listener,),
        )

    def mark(
        self, bid: str, ask: str, symbol: str = "BTC/USDT", venue: str = "A"
    ) -> None:
        self.quotes[symbol + venue] = quote(
            bid, ask, venue=venue, symbol=symbol, ns=self.clock.now_ns()
        )

    def hold(self, quantity: str, price: str = "100", fee: str = "0") -> None:
        amount = D(quantity)
        self.positions.apply(
            Fill(
                venue="A",
                symbol="BTC/USDT",
                trade_id=quantity + price,
                venue_order_id="v",
                client_order_id="c",
                side=Side.BUY if amount > 0 else Side.SELL,
                quantity=abs(amount),
                price=D(price),
                fee=D(fee),
                fee_asset="USDT",
            )
        )

    def ask(self, *args: Any, cid: str = "c", **more: Any) -> str:
        """Return the code of the denial, or "" if it passed."""
        try:
            self.gate.reserve("t", request(*args, **more), cid)
        except OrderDeniedError as denied:
            return denied.code
        return ""


def order(
    cid: str = "c",
    status: OrderStatus = OrderStatus.ACCEPTED,
    filled: str = "0",
    **more: Any,
) -> Order:
    return Order(
        client_order_id=cid,
        task_id="t",
        request=request(**more),
        status=status,
        filled_quantity=D(filled),
    )


# --- T-24 -----------------------------------------------------------------------------------------------


def test_t24_quantity_below_minimum() -> None:
    assert Desk().ask("0.0005") == "QUANTITY_BELOW_MINIMUM"
    assert Desk().ask("-1") == "QUANTITY_BELOW_MINIMUM"


def test_t24_quantity_not_on_lot() -> None:
    assert Desk().ask("1.0005") == "QUANTITY_NOT_ON_LOT"
    assert Desk().ask("NaN") == "QUANTITY_NOT_ON_LOT"


def test_t24_quantity_exceeds_maximum() -> None:
    assert Desk().ask("1000000000.001") == "QUANTITY_EXCEEDS_MAXIMUM"


def test_t24_price_not_on_tick() -> None:
    assert Desk().ask("1", "100.05") == "PRICE_NOT_ON_TICK"
    assert Desk().ask("1", "1" + "0" * 40) == "PRICE_NOT_ON_TICK"
    stop = request("1", None)
    denied = Desk()
    with pytest.raises(
        OrderDeniedError, match=r"trigger price 99\.95 is no multiple of tick 0\.1"
    ):
        denied.gate.reserve(
            "t", _with(stop, type=OrderType.STOP_MARKET, trigger_price=D("99.95")), "c"
        )
    with pytest.raises(OrderDeniedError, match="PRICE_MISSING"):
        denied.gate.reserve("t", _with(stop, type=OrderType.STOP_MARKET), "c")


def _with(what: Any, **changes: Any) -> Any:
    return replace(what, **changes)


def test_t24_notional_below_minimum() -> None:
    assert Desk().ask("0.049") == "NOTIONAL_BELOW_MINIMUM"
    assert Desk().ask("0.05") == ""


def test_t24_notional_exceeds_max_per_order() -> None:
    desk = Desk({"max_notional_per_order": D(1000)})

    assert desk.ask("10.001") == "NOTIONAL_EXCEEDS_MAX_PER_ORDER"
    assert desk.ask("10") == ""
    with pytest.raises(
        OrderDeniedError, match=r"notional 1000\.100 exceeds limit 1000"
    ):
        desk.gate.reserve("t", request("10.001"), "c")


def test_t24_reduce_only_would_increase_position() -> None:
    desk = Desk()
    assert (
        desk.ask("1", side=Side.SELL, reduce_only=True)
        == "REDUCE_ONLY_WOULD_INCREASE_POSITION"
    )
    desk.hold("1")

    assert desk.ask("1", reduce_only=True) == "REDUCE_ONLY_WOULD_INCREASE_POSITION"
    assert (
        desk.ask("1.001", side=Side.SELL, reduce_only=True)
        == "REDUCE_ONLY_WOULD_INCREASE_POSITION"
    )
    assert desk.ask("0.6", side=Side.SELL, reduce_only=True) == ""
    assert (
        desk.ask("0.6", side=Side.SELL, reduce_only=True, cid="d")
        == "REDUCE_ONLY_WOULD_INCREASE_POSITION"
    )


def test_t24_rate_limit_exceeded() -> None:
    desk = Desk({"max_orders_per_s": 100})

    assert [desk.ask(cid=str(n)) for n in range(101)] == [""] * 100 + [
        "RATE_LIMIT_EXCEEDED"
    ]
    desk.clock.jump(0.999)
    assert desk.ask(cid="x") == "RATE_LIMIT_EXCEEDED"
    desk.clock.jump(0.001)
    assert desk.ask(cid="x") == ""


def test_t24_symbol_and_instrument() -> None:
    assert Desk({"allowed_symbols": ("ETH/USDT",)}).ask() == "SYMBOL_NOT_ALLOWED"
    assert Desk().ask(venue="X") == "UNKNOWN_INSTRUMENT"


def test_t24_price_outside_collar_only_where_it_costs() -> None:
    desk = Desk({"price_collar_ppm": 50_000})

    assert desk.ask("1", "105.2") == ""
    assert desk.ask("1", "105.3", cid="b") == "PRICE_OUTSIDE_COLLAR"
    assert desk.ask("1", "50", cid="c") == ""
    assert desk.ask("1", "94.9", side=Side.SELL, cid="d") == "PRICE_OUTSIDE_COLLAR"
    assert desk.ask("1", "150", side=Side.SELL, cid="e") == ""


def test_t24_no_price() -> None:
    desk = Desk({"max_quote_age_s": 10.0})
    desk.hold("1")
    assert desk.ask("1", None) == ""
    desk.clock.jump(10.1)

    assert desk.ask("1", None, cid="b") == "NO_PRICE"
    assert (
        desk.ask("1", cid="c") == ""
    )  # a limit order brings its own price where there is no collar
    assert Desk({"price_collar_ppm": 1, "max_quote_age_s": -1.0}).ask() == "NO_PRICE"
    desk.quotes.clear()
    assert desk.ask("1", None, cid="d") == "NO_PRICE"
    assert desk.ask("1", None, side=Side.SELL, reduce_only=True, cid="e") == ""


def test_an_unresolved_order_blocks_its_instrument_but_not_closing() -> None:
    desk = Desk()
    desk.hold("1")
    desk.gate.update(order("u", OrderStatus.UNKNOWN))

    assert desk.ask() == "SYMBOL_UNRESOLVED"
    assert desk.ask(symbol="ETH/USDT", price=None) == "NO_PRICE"
    assert desk.ask("1", side=Side.SELL, reduce_only=True) == ""
    desk.gate.update(order("u"))
    assert desk.ask(cid="d") == ""


# --- reserved exposure (S-12) -------------------------------------------------------------------------


def test_position_limit_counts_what_is_held_and_what_works() -> None:
    desk = Desk({"max_position_notional": D(1000)})
    desk.hold("4")

    assert desk.ask("5", cid="a") == ""
    assert desk.ask("1.1", cid="b") == "POSITION_LIMIT_EXCEEDED"
    assert desk.ask("1", cid="c") == ""
    assert desk.ask("14", side=Side.SELL, cid="d") == ""  # to -10 at worst
    assert desk.ask("0.1", side=Side.SELL, cid="e") == "POSITION_LIMIT_EXCEEDED"


def test_an_order_that_shrinks_passes_although_the_position_is_over_the_limit() -> None:
    desk = Desk({"max_position_notional": D(100)})
    desk.hold("4")

    assert desk.ask("4", side=Side.SELL) == ""
    assert desk.ask("1", cid="d") == "POSITION_LIMIT_EXCEEDED"


def test_gross_limit_sums_all_instruments_at_their_worst() -> None:
    desk = Desk({"max_gross_notional": D(1000)})
    desk.mark("10", "10", "ETH/USDT")
    desk.hold("5")  # marked at the ask: 501

    assert desk.ask("40", "10", symbol="ETH/USDT", cid="a") == ""
    assert desk.ask("10", "10", symbol="ETH/USDT", cid="b") == "GROSS_LIMIT_EXCEEDED"
    del desk.quotes["ETH/USDTA"]
    assert (
        desk.ask("1.1", cid="c") == "GROSS_LIMIT_EXCEEDED"
    )  # 610 here, 400 there at the order's price
    desk.gate.release("a")
    assert desk.ask("1", cid="d") == ""


def test_a_reservation_follows_its_order_to_the_end() -> None:
    desk = Desk()
    desk.ask("1")

    desk.gate.update(order(filled="0.4", status=OrderStatus.PARTIALLY_FILLED))
    assert desk.gate.exposure.working("BTC/USDT@A", Side.BUY) == D("0.6")
    desk.gate.update(order(filled="0.4", status=OrderStatus.CANCELED))

    assert desk.gate.exposure.working("BTC/USDT@A", Side.BUY) == 0
    assert len(desk.gate.exposure) == 0


def test_limits_hold_from_the_first_instant_after_a_crash() -> None:
    desk = Desk({"max_position_notional": D(1000)})

    desk.gate.restore([order("old", quantity="9")])

    assert desk.ask("2") == "POSITION_LIMIT_EXCEEDED"


def test_t23_orders_of_others_count_against_the_limits() -> None:
    desk = Desk({"max_position_notional": D(1000)})
    foreign = VenueOrder(
        venue="A",
        symbol="BTC/USDT",
        venue_order_id="77",
        client_order_id="web",
        side=Side.BUY,
        type=OrderType.LIMIT,
        quantity=D(9),
        price=D(100),
        status=OrderStatus.ACCEPTED,
        filled_quantity=D(0),
    )

    desk.gate.set_external("A", [foreign])
    assert desk.ask("2") == "POSITION_LIMIT_EXCEEDED"
    desk.gate.set_external("A", [])

    assert desk.ask("2") == ""


@given(seed=st.integers(0, 2**32))
def test_s12_limits_are_never_exceeded_at_any_instant(seed: int) -> None:
    """Many tasks ask, orders fill, end and get lost in any order; the worst case never passes the limit."""
    dice = random.Random(seed)
    desk = Desk({"max_position_notional": D(1000), "max_orders_per_s": 10_000})
    orders: dict[str, Order] = {}
    for number in range(60):
        side = dice.choice([Side.BUY, Side.SELL])
        quantity = str(D(dice.randint(100, 5000)) / 1000)
        if dice.random() < 0.6:
            if desk.ask(quantity, side=side, cid=str(number)) == "":
                orders[str(number)] = order(str(number), quantity=quantity, side=side)
        elif orders:
            known = orders[dice.choice(list(orders))]
            if dice.random() < 0.7 and known.remaining_quantity:
                part = known.remaining_quantity
                desk.hold(str(part * known.request.side.sign))
                known = _with(
                    known,
                    filled_quantity=known.filled_quantity + part,
                    status=OrderStatus.FILLED,
                )
            else:
                known = _with(known, status=OrderStatus.CANCELED)
            desk.gate.update(known)
            del orders[known.client_order_id]
        held = desk.positions.of("BTC/USDT", "A").quantity
        assert (
            desk.gate.exposure.worst_quantity("BTC/USDT@A", held, Side.BUY) * 100
            <= 1000
        )


# --- T-25 and the kill switch -----------------------------------------------------------------------------


def test_t25_the_daily_loss_halts_one_cent_beyond_its_limit() -> None:
    desk = Desk({"max_daily_loss": D(100), "starting_equity": D(10_000)})
    desk.hold("10", "100")
    desk.gate.check_losses()

    desk.mark("90.000", "91")
    desk.gate.check_losses()
    assert desk.gate.state == "ACTIVE"  # equity 9,900.00
    desk.mark("89.999", "91")
    desk.gate.check_losses()

    assert desk.gate.state == "HALTED"  # equity 9,899.99
    assert desk.ask() == "TRADING_HALTED"
    assert "daily loss 100.010 exceeds limit 100" in desk.gate.describe()["reason"]


def test_t25_fees_count_and_a_fill_alone_triggers_it() -> None:
    desk = Desk({"max_daily_loss": D(100)})
    desk.hold("10", "100", "98")
    desk.hold("-10", "99.79")

    desk.gate.update(order(filled="1", status=OrderStatus.FILLED))

    assert desk.gate.state == "HALTED"


def test_without_a_mark_nothing_is_decided_and_a_new_day_counts_anew() -> None:
    desk = Desk({"max_daily_loss": D(100)})
    desk.hold("10", "100")
    desk.gate.check_losses()
    desk.quotes.clear()
    desk.gate.check_losses()
    desk.clock.jump(86_400)
    desk.mark("80", "81")

    desk.gate.check_losses()
    assert desk.gate.state == "ACTIVE"
    desk.mark("69.9", "70")
    desk.gate.check_losses()

    assert desk.gate.state == "HALTED"


async def test_the_days_first_equity_survives_a_restart_and_a_resume_counts_anew() -> (
    None
):
    desk = Desk({"max_daily_loss": D(100)})
    desk.hold("10", "100")
    desk.gate.check_losses()
    desk.store.flush()
    after = Desk({"max_daily_loss": D(100)}, CrashableStore(desk.store.disk))
    after.hold("10", "100")
    await after.gate.load()
    after.mark("89", "90")

    after.gate.check_losses()
    assert after.gate.state == "HALTED"
    await after.gate.resume("loss accepted", "ann")
    after.gate.check_losses()

    assert after.gate.state == "ACTIVE"
    assert after.gate.describe()["day_equity"] == D(9890)


async def test_t25_a_halt_is_in_force_at_once_durable_and_audited() -> None:
    desk = Desk()
    desk.hold("1")
    heard: list[TradingStateChanged] = []
    desk.gate.on_state_changed = heard.append

    await desk.gate.halt("strange fills", "ann", mode="cancel")

    assert desk.ask() == "TRADING_HALTED"
    assert desk.ask("1", side=Side.SELL, reduce_only=True) == ""
    audits = [
        record for (kind, _), record in desk.store.disk.items() if kind == "audit"
    ]
    assert b'"actor":"ann"' in audits[0].data
    assert b'"reason":"strange fills"' in audits[0].data
    assert heard[0].state == "HALTED"
    assert desk.listener.alerts[0][0] == "critical"

    after = Desk(store=CrashableStore(desk.store.disk))
    await after.gate.load()
    assert after.gate.state == "HALTED"
    assert after.gate.describe()["mode"] == "cancel"
    await after.gate.resume("compared, all equal", "bob")
    again = Desk(store=CrashableStore(desk.store.disk))
    await again.gate.load()
    assert again.gate.state == "ACTIVE"


async def test_t25_reducing_lets_only_shrinking_orders_through() -> None:
    desk = Desk()
    desk.hold("1")
    await desk.gate.reduce("end of day", "ann")

    assert desk.ask("1", cid="a") == "TRADING_REDUCING"
    assert desk.ask("0.7", side=Side.SELL, cid="b") == ""
    assert desk.ask("0.7", side=Side.SELL, cid="c") == "TRADING_REDUCING"
    assert desk.ask("0.3", side=Side.SELL, cid="d") == ""


async def test_a_halted_symbol_stays_halted_over_a_restart_until_trading_is_resumed() -> (
    None
):
    desk = Desk()
    desk.hold("1")

    await desk.gate.halt_symbol("BTC/USDT", "A", "position differs")

    after = Desk(store=CrashableStore(desk.store.disk))
    after.hold("1")
    await after.gate.load()
    assert after.ask() == "SYMBOL_HALTED"
    assert after.ask("1", side=Side.SELL, reduce_only=True) == ""
    assert after.gate.state == "ACTIVE"
    await after.gate.resume("looked", "ann")
    assert after.ask(cid="d") == ""
    assert not [
        key
        for kind, key in after.store.disk
        if kind == "halt" and key.startswith("symbol")
    ]


@pytest.mark.parametrize("damage", ["garbled", "quarantined", "day"])
async def test_a_kill_switch_that_cannot_be_read_counts_as_pulled(damage: str) -> None:
    store = CrashableStore()
    if damage == "quarantined":
        store.bad.append(("halt", "state", "checksum"))
    else:
        kind, key = ("halt", "state") if damage == "garbled" else ("risk", "day")
        store.disk[(kind, key)] = Record(kind, key, b"\x00")
    desk = Desk(store=store)

    await desk.gate.load()

    assert desk.gate.state == "HALTED"


async def test_a_halt_holds_even_if_it_cannot_be_saved() -> None:
    desk = Desk()
    desk.store.broken = True

    desk.gate.halt_now("disk full", "store")
    desk.gate.halt_symbol_now("BTC/USDT", "A", "x")
    assert desk.gate.state == "HALTED"
    with pytest.raises(StateNotWritableError):
        await desk.gate.halt("again", "ann")

    assert any(
        "a restart would not know" in text for _, _, text in desk.listener.alerts
    )


@pytest.mark.parametrize("kind", ["pipe", "directory", "large", "noise"])
async def test_s14_whatever_lies_in_place_of_the_flag_file_halts_at_once(
    tmp_path: Path, kind: str
) -> None:
    desk = Desk()
    flag = tmp_path / "HALT"
    if kind == "pipe":
        os.mkfifo(flag)
    elif kind == "directory":
        flag.mkdir()
    else:
        flag.write_bytes(b"x" * 9_000_000 if kind == "large" else b"\xff\x00" * 50)

    await desk.gate.check_flag_file(flag)

    assert desk.gate.state == "HALTED"
    assert len(desk.gate.describe()["reason"]) < 500


async def test_s14_the_flag_file_halts_until_it_is_gone(tmp_path: Path) -> None:
    desk = Desk()
    flag = tmp_path / "HALT"
    await desk.gate.check_flag_file(flag)
    assert desk.gate.state == "ACTIVE"

    flag.write_text("feed looks wrong")
    await desk.gate.check_flag_file(flag)
    await desk.gate.check_flag_file(flag)
    assert desk.gate.state == "HALTED"
    assert "feed looks wrong" in desk.gate.describe()["reason"]
    await desk.gate.resume("too early", "ann")
    await desk.gate.check_flag_file(flag)
    assert desk.gate.state == "HALTED"
    flag.unlink()
    await desk.gate.resume("file removed", "ann")
    await desk.gate.check_flag_file(flag)

    assert desk.gate.state == "ACTIVE"


async def test_an_unknown_halt_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of pause, cancel, flatten"):
        await Desk().gate.halt("x", "ann", mode="stop")


def test_status_counts_denials_by_code() -> None:
    desk = Desk()
    desk.ask("0.0005")
    desk.ask("0.0005")

    assert desk.gate.describe()["denied"] == {"QUANTITY_BELOW_MINIMUM": 2}


# --- what an order can really come to -------------------------------------------------------------------


def test_a_sell_far_below_the_market_counts_at_what_it_would_be_executed_at() -> None:
    desk = Desk({"max_notional_per_order": D(1000)})
    assert desk.ask("20", "40", Side.SELL) == "NOTIONAL_EXCEEDS_MAX_PER_ORDER"
    assert desk.ask("9", "40", Side.SELL) == ""
    desk = Desk({"max_position_notional": D(1000)})
    assert desk.ask("20", "40", Side.SELL) == "POSITION_LIMIT_EXCEEDED"


def test_the_least_notional_goes_by_the_price_that_the_venue_sees() -> None:
    assert Desk().ask("0.1", "40", Side.SELL) == "NOTIONAL_BELOW_MINIMUM"


def test_an_order_that_shrinks_a_position_is_not_stopped_by_its_own_reservation() -> (
    None
):
    desk = Desk()
    desk.hold("1")
    assert desk.ask("1", "100", Side.SELL) == ""
    desk.gate.halt_symbol_now("ETH/USDT", "A", "another")
    assert desk.gate.why_stopped(request("1", "100", Side.SELL)) is None


async def test_reducing_lets_go_on_what_was_reserved_and_shrinks() -> None:
    desk = Desk()
    desk.hold("1")
    assert desk.ask("1", "100", Side.SELL) == ""
    await desk.gate.reduce("careful", "operator")
    assert desk.gate.why_stopped(request("1", "100", Side.SELL)) is None
    assert desk.gate.why_stopped(request("1", "100", Side.BUY)) is not None
