"""Halting and stopping: in force for what is under way, too, and what is reported is what happened."""

import asyncio
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from fakes.desks import config, iceberg, market, play, venue
from nightdesk.abc import Task
from nightdesk.config import TaskEntry
from nightdesk.desk import TradingDesk
from nightdesk.errors import StateNotWritableError
from nightdesk.model.context import TaskContext
from nightdesk.model.events import QuoteChanged
from nightdesk.model.order import OrderRequest, OrderType, Side

D = Decimal


def buy(quantity: str = "0.5") -> OrderRequest:
    return OrderRequest(
        symbol="BTC/USDT",
        venue="alpha",
        side=Side.BUY,
        quantity=D(quantity),
        type=OrderType.MARKET,
    )


def resting(price: Decimal) -> OrderRequest:
    return OrderRequest(
        symbol="BTC/USDT",
        venue="alpha",
        side=Side.BUY,
        quantity=D("0.1"),
        price=price,
    )


@pytest.mark.parametrize("seed", range(4))
def test_an_order_on_its_way_is_cancelled_once_it_has_arrived(
    tmp_path: Path, seed: int
) -> None:
    """A cancel may overtake the order that it is for, and finds nothing then."""

    async def story(desk: TradingDesk) -> None:
        await desk.clock.sleep(1)
        price = desk.quotes["BTC/USDT@alpha"].bid - 1000
        sending = asyncio.create_task(desk.orders.submit("t", resting(price)))
        await desk.clock.sleep(0.0001)
        [order] = desk.orders.open_orders()
        assert order.status == "SUBMITTED"

        reply = await desk.command("halt", {"mode": "cancel"}, "tester", "drill")

        [order] = desk.orders.recent()
        assert reply["cancelled"] == [order.client_order_id]
        assert reply["still_open"] == []
        assert order.status == "CANCELED"
        await sending

    settings = config(
        tmp_path, allow_empty=True, venues=(venue(latency_ms=[5, 60]),), seed=seed
    )
    play(settings, story)


def test_flatten_also_closes_what_was_under_way(tmp_path: Path) -> None:
    async def story(desk: TradingDesk) -> None:
        await desk.clock.sleep(1)
        order = asyncio.create_task(desk.orders.submit("t", buy()))
        await desk.clock.sleep(0.0001)

        reply = await desk.command("halt", {"mode": "flatten"}, "tester", "drill")
        await desk.clock.sleep(2)

        sent = desk.orders.order((await order).client_order_id)
        assert sent is not None and sent.filled_quantity > 0
        assert len(reply["flattened"]) == 1
        assert desk.positions.of("BTC/USDT", "alpha").quantity == 0

    play(config(tmp_path, allow_empty=True, venues=(venue(latency_ms=[5, 60]),)), story)


def test_an_order_that_would_not_end_is_told_and_not_called_cancelled(
    tmp_path: Path,
) -> None:
    async def story(desk: TradingDesk) -> None:
        await desk.clock.sleep(1)
        price = desk.quotes["BTC/USDT@alpha"].bid - 1000
        order = await desk.orders.submit("t", resting(price))
        await desk.clock.sleep(
            1
        )  # the order is accepted, and its cancel falls into the outage

        reply = await desk.command("halt", {"mode": "cancel"}, "tester", "drill")

        assert reply["cancelled"] == []
        assert reply["still_open"] == [order.client_order_id]
        assert any("still open" in alert["text"] for alert in desk.alerts)

    outage = venue(faults={"outages": [[1.5, 60.0]], "timeout_s": 0.5})
    play(config(tmp_path, allow_empty=True, venues=(outage,)), story)


def test_a_large_position_is_flattened_in_pieces_that_the_venue_takes(
    tmp_path: Path,
) -> None:
    small = venue()
    small.options["instruments"][0]["max_quantity"] = "0.2"

    async def story(desk: TradingDesk) -> None:
        await desk.clock.sleep(1)
        for _ in range(3):
            await desk.orders.submit("t", buy("0.2"))
        await desk.clock.sleep(1)
        reply = await desk.command("halt", {"mode": "flatten"}, "tester", "drill")
        await desk.clock.sleep(2)
        assert len(reply["flattened"]) == 3
        assert desk.positions.of("BTC/USDT", "alpha").quantity == 0

    play(config(tmp_path, allow_empty=True, venues=(small,)), story)


def test_a_flag_file_that_lies_there_at_the_start_lets_no_order_out(
    tmp_path: Path,
) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "HALT").write_text("holiday")

    async def story(desk: TradingDesk) -> None:
        await desk.clock.sleep(3)
        assert desk.gate.state == "HALTED"
        assert desk.orders.orders_of("sell") == []

    play(config(tmp_path, iceberg()), story)


def test_the_watch_for_the_flag_file_survives_a_store_that_cannot_save(
    tmp_path: Path,
) -> None:
    flag = tmp_path / "state" / "HALT"

    async def story(desk: TradingDesk) -> None:
        desk._chore(desk._watch_safety())
        save = desk.store.save

        def refuse(batch: Any) -> Any:
            raise StateNotWritableError("state", "full", "make space")

        desk.store.save = refuse  # type: ignore[method-assign]
        flag.write_text("first")
        await desk.clock.sleep(1)
        assert desk.gate.state == "HALTED"
        desk.store.save = save  # type: ignore[method-assign]
        flag.unlink()
        await desk.gate.resume("space again", "tester")

        flag.write_text("second")
        await desk.clock.sleep(1)
        assert desk.gate.state == "HALTED"

    play(config(tmp_path, allow_empty=True), story)


class Slow(Task[TaskContext]):
    """Keeps a stopping desk waiting."""

    async def _handle_executing(self) -> None:
        await self.desk.clock.sleep(60)


def gap(now_ns: int) -> Iterator[QuoteChanged]:
    for name, bid in (("alpha", D(60000)), ("beta", D(60600))):
        yield QuoteChanged(
            symbol="BTC/USDT",
            venue=name,
            bid=bid,
            ask=bid + 1,
            bid_quantity=D(5),
            ask_quantity=D(5),
            ts_event_ns=now_ns,
        )


def test_a_stopping_desk_takes_no_opportunity_although_its_venues_go_on(
    tmp_path: Path,
) -> None:
    """A venue in a process of its own shows its market until it is hung up, and then no task would repair a leg."""
    handler = TaskEntry(
        id="gap",
        type="arbitrage",
        params={
            "symbol": "BTC/USDT",
            "venues": ["alpha", "beta"],
            "quantity": "0.05",
            "cooldown_s": 0.5,
        },
    )

    async def story(desk: TradingDesk) -> None:
        entry = TaskEntry(id="slow", type="slow")
        await desk.roster.add(Slow(TaskContext(task_id="slow")), entry)
        await desk.clock.sleep(1)

        async def go_on() -> None:
            while True:
                for quote in gap(desk.clock.now_ns()):
                    desk.inbox.emit(quote)
                await desk.clock.sleep(0.05)

        market_goes_on = asyncio.create_task(go_on())
        began_ns = desk.clock.now_ns()
        await desk.stop()
        market_goes_on.cancel()
        taken = [o for o in desk.orders.orders_of("gap") if o.created_ns >= began_ns]
        assert taken == []

    settings = config(
        tmp_path,
        handler,
        venues=(venue("alpha"), venue("beta")),
        sources=(market("alpha", "beta", gap_every_s=0),),
    )
    play(settings, story)


def test_the_figures_say_what_they_leave_out(tmp_path: Path) -> None:
    async def story(desk: TradingDesk) -> None:
        await desk.clock.sleep(1)
        await desk.orders.submit("t", buy("0.1"))
        await desk.clock.sleep(1)
        assert (await desk.command("performance", {}, "tester"))["unmarked"] == []

    async def without_a_market(desk: TradingDesk) -> None:
        money = await desk.command("performance", {}, "tester")
        assert money["unmarked"] == ["BTC/USDT@alpha"]

    play(config(tmp_path, allow_empty=True), story)
    play(
        config(tmp_path, allow_empty=True, sources=()),
        without_a_market,
        start_ns=1_760_000_500_000_000_000,
    )
