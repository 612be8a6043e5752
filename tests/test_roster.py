"""Tasks that are set aside or removed: they trade no more, and they do not come back."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from fakes.desks import config, iceberg, market, play, venue
from nightdesk import loading
from nightdesk.abc import Put
from nightdesk.config import Config, TaskEntry
from nightdesk.desk import TradingDesk
from nightdesk.errors import CommandError
from nightdesk.model.serializer import encode_context


def gaps(tmp_path: Path) -> Config:
    """A desk that takes a gap between two venues every few seconds."""
    handler = TaskEntry(
        id="gap",
        type="arbitrage",
        params={
            "symbol": "BTC/USDT",
            "venues": ["alpha", "beta"],
            "quantity": "0.05",
            "min_profitability": "0.0005",
            "cooldown_s": 0.5,
        },
    )
    return config(
        tmp_path,
        handler,
        venues=(venue("alpha"), venue("beta")),
        sources=(market("alpha", "beta", gap_every_s=3.0, gap_ppm=[4000, 8000]),),
    )


async def handling(desk: TradingDesk) -> None:
    for _ in range(60_000):
        if desk.roster.local["gap"].handling:
            return
        await desk.clock.sleep(0.001)
    raise AssertionError("no opportunity in a minute")


@pytest.mark.parametrize("verb", ["task.pause", "task.stop"])
def test_a_handler_that_is_set_aside_takes_no_opportunity(
    tmp_path: Path, verb: str
) -> None:
    async def story(desk: TradingDesk) -> None:
        await handling(desk)
        await desk.command(verb, {"task_id": "gap"}, "tester")
        await desk.clock.sleep(2)
        sent = len(desk.orders.orders_of("gap"))

        await desk.clock.sleep(30)
        assert len(desk.orders.orders_of("gap")) == sent

        await desk.command(
            verb.replace("pause", "resume").replace("stop", "start"),
            {"task_id": "gap"},
            "tester",
        )
        await desk.clock.sleep(30)
        assert len(desk.orders.orders_of("gap")) > sent

    play(gaps(tmp_path), story)


def test_a_handler_that_is_removed_while_it_works_does_not_come_back(
    tmp_path: Path,
) -> None:
    async def story(desk: TradingDesk) -> list[str]:
        await handling(desk)
        assert await desk.roster.remove("gap")
        await desk.clock.sleep(5)
        kinds = ("context", "health")
        return [r.key for kind in kinds for r in await desk.store.load(kind)]

    assert play(gaps(tmp_path), story) == []


def test_a_new_task_of_a_removed_ones_id_executes_its_own_total(tmp_path: Path) -> None:
    async def story(desk: TradingDesk) -> tuple[Decimal, Decimal, list[Any]]:
        while not desk.orders.fill_count or not desk.orders.open_orders():
            await desk.clock.sleep(0.01)
        working = desk.orders.open_orders()[0]
        assert await desk.roster.remove("sell")
        assert not await desk.roster.remove("sell")
        alerts = [a["text"] for a in desk.alerts]
        await desk.orders.cancel(working.client_order_id)
        await desk.clock.sleep(1)
        await desk.orders.forget("sell")

        before = (await desk.venues["alpha"].balances())["BTC"]
        entry = iceberg()
        kind = loading.load_task("iceberg", desk.config)
        await desk.roster.add(loading.make_task(kind, entry, desk.config), entry)
        while desk.roster.local["sell"].task.context.state != "COMPLETED":
            await desk.clock.sleep(0.1)
        after = (await desk.venues["alpha"].balances())["BTC"]
        await desk.orders.sweep()
        position = desk.positions.of("BTC/USDT", "alpha").quantity
        assert position == after - 10, "the fills of the first one are booked once"
        return before - after, position, alerts

    executed, _, alerts = play(config(tmp_path, iceberg()), story)

    assert executed == Decimal("0.5")
    assert any("nobody looks after its orders" in text for text in alerts)


@pytest.mark.parametrize("task_id", ["", "a\nb", "a\0b", "caf\udce9", "x" * 211])
def test_a_task_whose_id_cannot_be_kept_is_refused(
    tmp_path: Path, task_id: str
) -> None:
    async def story(desk: TradingDesk) -> None:
        kind = loading.load_task("iceberg", desk.config)
        entry = iceberg(task_id)
        with pytest.raises(CommandError, match="cannot be the id"):
            await desk.roster.add(loading.make_task(kind, entry, desk.config), entry)
        with pytest.raises(CommandError, match="cannot be the id"):
            desk.roster.add_function(entry, story)

    play(config(tmp_path, iceberg()), story)


@pytest.mark.parametrize("number", ["NaN", "sNaN", "-1"])
def test_a_saved_context_that_breaks_its_task_is_set_aside_and_the_others_run(
    tmp_path: Path, number: str
) -> None:
    async def leave(desk: TradingDesk) -> None:
        kind = loading.load_task("iceberg", desk.config)
        good = loading.make_task(kind, iceberg("bad"), desk.config).context
        data = encode_context(good, type="iceberg", schema=1, saved_ns=1)
        hostile = data.replace(
            b'"total_quantity":"0.5"', b'"total_quantity":"%s"' % number.encode()
        )
        assert hostile != data
        await desk.store.save([Put("context", "bad", hostile)])

    async def story(desk: TradingDesk) -> tuple[list[str], list[str]]:
        found = await desk.store.load("quarantine")
        return [record.key for record in found], list(desk.roster.local)

    play(config(tmp_path, iceberg()), leave)
    kept, running = play(config(tmp_path, iceberg(), iceberg("bad")), story)

    assert kept == ["bad"]
    assert running == ["sell"]
