"""The house as a whole: built from a configuration, run in virtual time."""

from decimal import Decimal
from pathlib import Path

import pytest

from fakes.desks import config, iceberg, market, play, venue
from nightdesk.abc import Task
from nightdesk.config import StateConfig, TaskEntry
from nightdesk.desk import TradingDesk
from nightdesk.errors import (
    CommandError,
    DuplicateTaskError,
    NoTasksError,
    OrderDeniedError,
    UnknownTaskError,
)
from nightdesk.model.context import TaskContext
from nightdesk.model.order import OrderRequest, Side


async def until(
    desk: TradingDesk, state: str, task_id: str, seconds: float = 300
) -> None:
    for _ in range(round(seconds / 0.1)):
        if desk.roster.local[task_id].task.context.state == state:
            return
        await desk.clock.sleep(0.1)
    raise AssertionError(f"{task_id} is {desk.roster.local[task_id].task.context}")


def test_an_empty_desk_is_refused_with_what_to_add(tmp_path: Path) -> None:
    async def story(desk: TradingDesk) -> None: ...

    with pytest.raises(NoTasksError, match="Add one") as raised:
        play(config(tmp_path), story)

    assert raised.value.exit_code == 3


def test_an_iceberg_completes_and_the_books_agree(tmp_path: Path) -> None:
    async def story(desk: TradingDesk) -> dict[str, Decimal]:
        before = await desk.venues["alpha"].balances()
        await until(desk, "COMPLETED", "sell")
        after = await desk.venues["alpha"].balances()
        assert desk.positions.of("BTC/USDT", "alpha").quantity == Decimal("-0.5")
        assert sum(f.quantity for f in desk.orders.fills(100)) == Decimal("0.5")
        return {asset: after[asset] - before[asset] for asset in after}

    moved = play(config(tmp_path, iceberg()), story)

    assert moved["BTC"] == Decimal("-0.5")
    assert moved["USDT"] > 29_000


def test_the_same_seed_gives_the_same_fills_byte_for_byte(tmp_path: Path) -> None:
    async def story(desk: TradingDesk) -> None:
        await until(desk, "COMPLETED", "sell")

    statements = []
    for run in ("first", "second"):
        play(config(tmp_path / run, iceberg()), story)
        path = next((tmp_path / run).rglob("statement.jsonl"))
        statements.append(path.read_bytes())

    assert statements[0] == statements[1]
    assert statements[0].count(b'"traded"') >= 5


def test_a_desk_that_was_dropped_goes_on_where_it_stood(tmp_path: Path) -> None:
    """What matters is the venue's own total, not what the desk believes."""

    async def interrupted(desk: TradingDesk) -> None:
        while not desk.orders.fill_count:
            await desk.clock.sleep(0.05)

    async def finished(desk: TradingDesk) -> Decimal:
        await until(desk, "COMPLETED", "sell")
        return (await desk.venues["alpha"].balances())["BTC"]

    settings = config(tmp_path, iceberg())
    play(settings, interrupted, clean=False)
    held = play(settings, finished, start_ns=1_760_000_100_000_000_000)

    assert held == Decimal("9.5")


def test_a_finished_task_is_kept_but_not_run_again(tmp_path: Path) -> None:
    async def first(desk: TradingDesk) -> None:
        await until(desk, "COMPLETED", "sell")

    async def second(desk: TradingDesk) -> tuple[str, int]:
        await desk.clock.sleep(5)
        return desk.roster.local["sell"].task.context.state, len(
            desk.orders.open_orders()
        )

    settings = config(tmp_path, iceberg())
    play(settings, first)

    assert play(settings, second, start_ns=1_760_000_500_000_000_000) == (
        "COMPLETED",
        0,
    )


def test_a_context_nobody_can_read_is_quarantined_and_the_others_run(
    tmp_path: Path,
) -> None:
    async def damage(desk: TradingDesk) -> None:
        from nightdesk.abc import Put

        await until(desk, "COMPLETED", "sell")
        await desk.store.save(
            [
                Put(
                    "context",
                    "other",
                    b'{"_meta":{"type":"iceberg","schema":1},"side":7}',
                )
            ]
        )

    async def story(desk: TradingDesk) -> tuple[list[str], list[str]]:
        kept = [record.data.decode() for record in await desk.store.load("quarantine")]
        return kept, [
            alert["text"] for alert in desk.alerts if alert["level"] == "critical"
        ]

    settings = config(tmp_path, iceberg(), iceberg("other"))
    play(config(tmp_path, iceberg()), damage)
    kept, alerts = play(settings, story, start_ns=1_760_000_500_000_000_000)

    assert kept == ['{"_meta":{"type":"iceberg","schema":1},"side":7}']
    assert any("quarantine" in text for text in alerts)


class CountContext(TaskContext):
    count: int = 0


class CountTask(Task[CountContext]):
    """Counts its cycles."""

    context_class = CountContext

    async def _handle_executing(self) -> None:
        self.evolve_context(count=self.context.count + 1)
        await self.desk.checkpoint()
        self.wait(1.0)


def test_tasks_are_added_steered_and_removed_while_the_desk_runs(
    tmp_path: Path,
) -> None:
    async def story(desk: TradingDesk) -> None:
        entry = TaskEntry(id="count", type="CountTask")
        task = CountTask(CountContext())
        await desk.roster.add(task, entry)
        with pytest.raises(DuplicateTaskError):
            await desk.roster.add(CountTask(CountContext()), entry)
        await desk.clock.sleep(5)
        assert task.context.count >= 4

        await desk.command("task.pause", {"task_id": "count"}, "tester", "for a test")
        paused = task.context.count
        await desk.clock.sleep(5)
        assert task.context.count == paused
        await desk.command("task.resume", {"task_id": "count"}, "tester", "go on")
        await desk.clock.sleep(3)
        assert task.context.count > paused

        assert await desk.roster.remove("count")
        assert not await desk.roster.remove("count")
        assert await desk.store.get("context", "count") is None
        audits = [record.data.decode() for record in await desk.store.load("audit")]
        assert any("task.pause" in line and "for a test" in line for line in audits)

    play(config(tmp_path, allow_empty=True), story)


def test_commands_about_nothing_name_what_exists(tmp_path: Path) -> None:
    async def story(desk: TradingDesk) -> None:
        with pytest.raises(CommandError, match="no command 'fly'"):
            await desk.command("fly", {}, "tester")
        with pytest.raises(UnknownTaskError, match="sell"):
            await desk.command("task.pause", {"task_id": "sel"}, "tester")
        with pytest.raises(CommandError, match="needs a task"):
            await desk.command("task.show", {}, "tester")
        with pytest.raises(CommandError, match="nothing to adjust"):
            await desk.command("task.adjust", {"task_id": "sell"}, "tester")
        with pytest.raises(CommandError, match="limit"):
            await desk.command("orders", {"limit": "many"}, "tester")
        with pytest.raises(CommandError, match="needs a reason"):
            await desk.command("resume_trading", {}, "tester")
        with pytest.raises(CommandError, match="halt mode"):
            await desk.command("halt", {"mode": "panic"}, "tester")

    play(config(tmp_path, iceberg()), story)


def test_every_looking_command_answers_and_carries_its_version(tmp_path: Path) -> None:
    async def story(desk: TradingDesk) -> dict[str, dict[str, object]]:
        await until(desk, "COMPLETED", "sell")
        verbs = (
            "status",
            "tasks",
            "orders",
            "fills",
            "trades",
            "positions",
            "opportunities",
            "performance",
            "logs",
            "workers",
        )
        replies = {verb: await desk.command(verb, {}, "tester") for verb in verbs}
        replies["task.show"] = await desk.command(
            "task.show", {"task_id": "sell"}, "tester"
        )
        return replies

    replies = play(config(tmp_path, iceberg()), story)

    assert all(reply["version"] == 1 for reply in replies.values())
    assert replies["status"]["ready"] is True
    assert replies["positions"]["positions"][0]["quantity"] == "-0.5"
    assert replies["task.show"]["context"]["filled_quantity"] == "0.5"
    assert replies["task.show"]["history"][-1]["state"] == "COMPLETED"
    assert len(replies["fills"]["fills"]) == len(replies["trades"]["trades"]) >= 5


def test_halt_cancels_and_flattens_and_survives_a_restart(tmp_path: Path) -> None:
    request = OrderRequest(
        symbol="BTC/USDT",
        venue="alpha",
        side=Side.SELL,
        quantity=Decimal("0.01"),
        price=Decimal("66000"),
    )

    async def story(desk: TradingDesk) -> None:
        await until(desk, "COMPLETED", "sell")
        resting = await desk.orders.submit("tester", request)
        reply = await desk.command("halt", {"mode": "flatten"}, "tester", "drill")
        assert resting.client_order_id in reply["cancelled"]
        await desk.clock.sleep(2)
        assert desk.positions.of("BTC/USDT", "alpha").quantity == 0
        assert desk.orders.open_orders() == []
        with pytest.raises(OrderDeniedError, match="TRADING_HALTED"):
            await desk.orders.submit("tester", request)

    async def restarted(desk: TradingDesk) -> None:
        status = await desk.command("status", {}, "tester")
        assert status["trading"]["state"] == "HALTED"
        assert (status["up"], status["ready"]) == (True, False)
        await desk.command("resume_trading", {}, "tester", "drill over")
        assert (await desk.command("status", {}, "tester"))["ready"] is True

    settings = config(tmp_path, iceberg())
    play(settings, story)
    play(settings, restarted, start_ns=1_760_000_500_000_000_000)


def test_background_contexts_are_handed_over_in_one_piece_at_a_switch(
    tmp_path: Path,
) -> None:
    """Two venues drift apart, the arbitrage handler is let in, and its trace tells each step."""
    handler = TaskEntry(
        id="gap",
        type="arbitrage",
        params={"symbol": "BTC/USDT", "venues": ["alpha", "beta"], "quantity": "0.02"},
    )

    async def story(desk: TradingDesk) -> None:
        for _ in range(4000):
            await desk.clock.sleep(0.1)
            if desk.switch.traces and not desk.orders.open_orders():
                break
        trace = desk.switch.traces[0]
        assert trace.handler == "gap"
        assert trace.outcome == "handled"
        assert (
            trace.received_ns
            <= trace.decided_ns
            <= trace.closed_ns
            <= trace.handler_ns
            <= trace.reopened_ns
        )
        assert len(desk.orders.orders_of("gap")) >= 2
        held = sum((p.quantity for p in desk.positions.all()), Decimal(0))
        assert abs(held) < Decimal("0.02"), "the legs cancel out"

    play(
        config(
            tmp_path,
            handler,
            venues=(venue("alpha"), venue("beta")),
            sources=(market("alpha", "beta", gap_every_s=5.0),),
        ),
        story,
    )


@pytest.mark.parametrize("store", ["files", "memory"])
def test_a_desk_runs_on_every_store(tmp_path: Path, store: str) -> None:
    async def story(desk: TradingDesk) -> None:
        await until(desk, "COMPLETED", "sell")

    play(
        config(
            tmp_path,
            iceberg(),
            state=StateConfig(store=store, directory=str(tmp_path / "state")),
        ),
        story,
    )  # type: ignore[arg-type]
