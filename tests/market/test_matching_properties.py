"""What must hold for every stream of orders and market messages."""

from collections import defaultdict
from decimal import Decimal
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.paper import RICH, SECOND, START, SYMBOL, D, instrument, order, quote, trade
from nightdesk.market.matching import MatchingEngine
from nightdesk.model.events import QuoteChanged, TradePrinted
from nightdesk.model.order import Order, OrderType, Side, TimeInForce
from nightdesk.model.statement import Deposited, Placed, StatementRow, Traded

TICK, LOT = D("0.1"), D("0.001")

prices = st.integers(980, 1020).map(lambda ticks: ticks * TICK)
quantities = st.integers(1, 40).map(lambda lots: lots * 100 * LOT)
sides = st.sampled_from(list(Side))


@st.composite
def orders(draw: Any) -> dict[str, Any]:
    kind = draw(
        st.sampled_from(["limit"] * 5 + ["market", "stop", "stop_limit", "trailing"])
    )
    made: dict[str, Any] = {
        "side": draw(sides),
        "quantity": str(draw(quantities)),
        "reduce_only": draw(st.booleans()),
    }
    if kind == "limit":
        made["price"] = str(draw(prices))
        made["time_in_force"] = draw(st.sampled_from(list(TimeInForce)))
        made["post_only"] = (
            draw(st.booleans()) and made["time_in_force"] is TimeInForce.GTC
        )
        made["reduce_only"] = False
        if made["time_in_force"] is TimeInForce.GTD:
            made["expire_ns"] = START + draw(st.integers(1, 60)) * SECOND
    elif kind != "market":
        made["type"] = {
            "stop": OrderType.STOP_MARKET,
            "stop_limit": OrderType.STOP_LIMIT,
            "trailing": OrderType.TRAILING_STOP_MARKET,
        }[kind]
        made["trigger_price"] = draw(prices)
        if kind == "stop_limit":
            made["price"] = str(draw(prices))
    return made


@st.composite
def quotes(draw: Any) -> QuoteChanged:
    bid = draw(prices)
    ask = bid + TICK * draw(st.integers(1, 4))
    return quote(str(bid), str(ask), str(draw(quantities)), str(draw(quantities)))


inputs = st.lists(
    st.one_of(
        orders().map(lambda made: ("submit", made)),
        orders().map(lambda made: ("submit", made)),
        quotes().map(lambda made: ("quote", made)),
        quotes().map(lambda made: ("quote", made)),
        st.tuples(sides, quantities, prices).map(
            lambda m: ("trade", trade(m[0], str(m[1]), str(m[2])))
        ),
        st.integers(0, 30).map(lambda number: ("cancel", number)),
        st.integers(1, 5).map(lambda seconds: ("advance", seconds)),
    ),
    max_size=60,
)


class Run:
    """Feeds inputs to an engine and keeps the rows of each."""

    def __init__(self, **options: Any) -> None:
        self.matching = MatchingEngine(
            "A", [instrument(**options)], market_patience_s=2
        )
        self.now = START
        self.sent = 0
        self.batches: list[tuple[Any, list[StatementRow]]] = [
            (None, self.matching.deposit(START, RICH))
        ]

    def feed(self, step: tuple[str, Any]) -> list[StatementRow]:
        verb, value = step
        self.now += SECOND // 20
        if verb == "submit":
            self.sent += 1
            rows = self.matching.submit(self.now, self.order(value))
        elif verb == "quote":
            rows = self.matching.on_quote(self.now, value)
        elif verb == "trade":
            rows = self.matching.on_trade(self.now, value)
        elif verb == "cancel":
            rows = self.matching.cancel(self.now, f"o{value}")
        else:
            self.now += value * SECOND
            rows = self.matching.advance(self.now)
        self.batches.append((value, rows))
        return rows

    def order(self, value: dict[str, Any]) -> Order:
        return order(f"o{self.sent}", **value)

    @property
    def rows(self) -> list[StatementRow]:
        return [row for _, rows in self.batches for row in rows]


def picture(matching: MatchingEngine, ids: int) -> Any:
    """Everything that a restart must not change."""
    return (
        [matching.find(f"o{n}") for n in range(ids + 1)],
        matching.open_orders(),
        matching.balances(),
        matching.locked(),
        matching.fills(),
        matching.sequence,
    )


def balances_of(rows: list[StatementRow]) -> dict[str, Decimal]:
    """Add the statement up by hand."""
    total: dict[str, Decimal] = defaultdict(Decimal)
    for row in rows:
        if isinstance(row, Deposited):
            total[row.asset] += row.quantity
        elif isinstance(row, Traded):
            fill = row.fill
            total["BTC"] += fill.side.sign * fill.quantity
            total["USDT"] -= fill.side.sign * fill.quantity * fill.price
            total[fill.fee_asset] -= fill.fee
    return dict(total)


@settings(max_examples=150, deadline=None)
@given(inputs, st.sampled_from(["quote", "base"]))
def test_money_is_conserved_and_no_order_is_overfilled(
    steps: list[tuple[str, Any]], fee_in: str
) -> None:
    run = Run(fee_in=fee_in)

    for step in steps:
        run.feed(step)

        matching = run.matching
        assert matching.balances() == balances_of(run.rows)
        locked: dict[str, Decimal] = defaultdict(Decimal)
        rates = {
            row.venue_order_id: row.lock_rate
            for row in run.rows
            if isinstance(row, Placed)
        }
        for open_order in matching.open_orders():
            remaining = open_order.quantity - open_order.filled_quantity
            assert remaining > 0
            asset = "USDT" if open_order.side is Side.BUY else "BTC"
            locked[asset] += rates[open_order.venue_order_id] * remaining
        assert matching.locked() == {
            asset: value for asset, value in locked.items() if value
        }
        assert all(
            value >= matching.locked().get(asset, 0)
            for asset, value in matching.balances().items()
        )
    filled: dict[str, Decimal] = defaultdict(Decimal)
    for fill in run.matching.fills():
        filled[fill.client_order_id] += fill.quantity
    asked = {
        row.client_order_id: row.quantity for row in run.rows if isinstance(row, Placed)
    }
    assert all(quantity <= asked[cid] for cid, quantity in filled.items())
    assert all(fill.quantity % LOT == 0 for fill in run.matching.fills())


@settings(max_examples=100, deadline=None)
@given(inputs)
def test_every_fill_lies_inside_the_market_of_its_moment_and_within_its_limit(
    steps: list[tuple[str, Any]],
) -> None:
    """Between the lowest and the highest of the quotes and trades just before and at the fill."""
    run = Run()
    printed: TradePrinted | None = None
    limits = {}
    last: QuoteChanged | None = None
    for step in steps:
        seen = [p for q in (last,) if q for p in (q.bid, q.ask)]
        if isinstance(step[1], QuoteChanged):
            last = step[1]
            seen += [last.bid, last.ask]
        if printed:
            seen.append(printed.price)
        if isinstance(step[1], TradePrinted):
            printed = step[1]
            seen.append(printed.price)

        for row in run.feed(step):
            if isinstance(row, Placed):
                limits[row.venue_order_id] = row
            if isinstance(row, Traded):
                fill, placed = row.fill, limits[row.fill.venue_order_id]
                assert min(seen) <= fill.price <= max(seen)
                if placed.price is not None:
                    assert (fill.price - placed.price) * fill.side.sign <= 0


@settings(max_examples=100, deadline=None)
@given(inputs)
def test_one_message_never_fills_more_than_it_shows(
    steps: list[tuple[str, Any]],
) -> None:
    run = Run()
    for step in steps:
        sold_before = sum(
            (f.quantity for f in run.matching.fills() if f.side is Side.SELL), D(0)
        )
        bought_before = sum(
            (f.quantity for f in run.matching.fills() if f.side is Side.BUY), D(0)
        )

        run.feed(step)

        sold = (
            sum((f.quantity for f in run.matching.fills() if f.side is Side.SELL), D(0))
            - sold_before
        )
        bought = (
            sum((f.quantity for f in run.matching.fills() if f.side is Side.BUY), D(0))
            - bought_before
        )
        if isinstance(step[1], QuoteChanged):
            assert sold <= step[1].bid_quantity
            assert bought <= step[1].ask_quantity
        if isinstance(step[1], TradePrinted):
            assert sold + bought <= step[1].quantity


@settings(max_examples=100, deadline=None)
@given(inputs)
def test_the_fills_at_a_standing_quote_add_up_to_no_more_than_it_showed(
    steps: list[tuple[str, Any]],
) -> None:
    run = Run()
    run.feed(("quote", quote("100.0", "100.2", "2", "3")))
    for step in steps:
        if step[0] in ("submit", "cancel"):
            run.feed(step)
        elif step[0] == "quote":
            run.feed(("quote", quote("100.0", "100.2", "2", "3")))

    bought = sum((f.quantity for f in run.matching.fills() if f.side is Side.BUY), D(0))
    sold = sum((f.quantity for f in run.matching.fills() if f.side is Side.SELL), D(0))

    assert bought <= 3
    assert sold <= 2


@settings(max_examples=60, deadline=None)
@given(inputs)
def test_a_restart_at_any_point_is_the_engine_that_ran_on(
    steps: list[tuple[str, Any]],
) -> None:
    run = Run()
    written: list[StatementRow] = list(run.rows)
    decoder = msgspec.json.Decoder(StatementRow)
    for step in steps:
        written += [decoder.decode(msgspec.json.encode(row)) for row in run.feed(step)]

        restored = MatchingEngine("A", [instrument()])
        restored.restore(written)

        assert picture(restored, run.sent) == picture(run.matching, run.sent)


@settings(max_examples=60, deadline=None)
@given(inputs, st.data())
def test_a_restart_in_the_middle_of_a_batch_goes_on_soundly(
    steps: list[tuple[str, Any]], data: Any
) -> None:
    run = Run()
    for step in steps:
        run.feed(step)
    cut = data.draw(st.integers(1, len(run.rows)))
    restored = MatchingEngine("A", [instrument()])

    restored.restore(run.rows[:cut])
    more = restored.advance(run.now)
    more += restored.on_quote(run.now, quote("100.0", "100.2", "90", "90"))

    assert all(o.type is not OrderType.MARKET for o in restored.open_orders())
    assert restored.balances() == balances_of([*run.rows[:cut], *more])
    assert restored.sequence == cut + len(more)


@settings(max_examples=40, deadline=None)
@given(inputs)
def test_the_same_inputs_give_the_same_statement_byte_for_byte(
    steps: list[tuple[str, Any]],
) -> None:
    first, second = Run(), Run()
    for step in steps:
        first.feed(step)
        second.feed(step)

    assert msgspec.json.encode(first.rows) == msgspec.json.encode(second.rows)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(990, 1000), quantities), min_size=2, max_size=12),
    quantities,
)
def test_better_prices_fill_first_and_equal_prices_in_order_of_arrival(
    resting: list[tuple[int, Decimal]], hit: Decimal
) -> None:
    matching = MatchingEngine("A", [instrument()])
    matching.deposit(START, RICH)
    matching.on_quote(START, quote("98.9", "100.2"))
    for number, (ticks, quantity) in enumerate(resting):
        matching.submit(
            START, order(f"o{number}", Side.BUY, str(quantity), str(ticks * TICK))
        )

    matching.on_trade(START, trade(Side.SELL, str(hit), "98.9"))

    ranked = sorted(range(len(resting)), key=lambda n: (-resting[n][0], n))
    left = hit
    for number in ranked:
        found = matching.find(f"o{number}")
        assert found is not None
        expected = min(left, resting[number][1])
        assert found.filled_quantity == expected
        left -= expected


def test_a_statement_with_a_gap_or_of_other_instruments_is_refused() -> None:
    run = Run()
    run.feed(("quote", quote("100.0", "100.2")))
    run.feed(("submit", {"side": Side.BUY, "quantity": "1", "price": "100.2"}))
    other = MatchingEngine("A", [instrument(symbol="ETH/USDT")])
    gapped = MatchingEngine("A", [instrument()])

    for matching, rows, words in (
        (other, run.rows, SYMBOL),
        (gapped, run.rows[1:], "follows row"),
    ):
        try:
            matching.restore(rows)
        except ValueError as error:
            assert words in str(error)
        else:
            raise AssertionError("was accepted")
