"""Background hosts with real processes: who harms one is named, and the others go on."""

import asyncio
import os
import signal
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from fakes.hosts import (
    TESTS,
    RecordingCallbacks,
    hosted,
    is_running,
    quote,
    running_pool,
    until,
)
from nightdesk.errors import (
    CommandError,
    DuplicateTaskError,
    NightdeskError,
    UnknownTaskError,
)
from nightdesk.kernel.hosts import HostedTask, HostPool
from nightdesk.model.events import CandleClosed, FeedStalled
from nightdesk.model.health import TaskHealth
from nightdesk.model.order import OrderStatus
from nightdesk.model.position import Position
from nightdesk.model.schedule import Schedule

pytestmark = pytest.mark.process


def health_of(pool: HostPool, task_id: str) -> TaskHealth:
    return next(line for line in pool.health() if line.task_id == task_id)


def candle(symbol: str = "BTC/USDT", n: int = 0) -> CandleClosed:
    one = Decimal(1)
    return CandleClosed(
        symbol=symbol, venue="paper", timeframe="1m", ts_open_ns=n,
        open=one, high=one, low=one, close=one, volume=one,
    )  # fmt: skip


# --- offenders ----------------------------------------------------------------------------------


async def test_a_task_that_never_awaits_is_named_and_isolated_and_then_quarantined(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        await pool.run_task(hosted("good"))
        await pool.run_task(hosted("bad", "Spinner", after_s=0.2))
        pids = {line["pid"] for line in pool.describe()}

        await until(
            lambda: health_of(pool, "bad").status == "quarantined", "quarantine"
        )
        before = desk.counts("good")[-1]
        await until(
            lambda: desk.counts("good")[-1] > before + 5, "the neighbour goes on"
        )

        assert desk.named() == {"bad"}
        kinds = [kind for _, kind, *_ in desk.offenders]
        assert kinds[:2] == ["slow", "stuck"]
        assert kinds.count("stuck") == 2
        assert all(
            "spin_for_ever" in stack
            for _, kind, _, stack in desk.offenders
            if kind == "stuck"
        )
        assert "spin_for_ever" in health_of(pool, "bad").why
        assert [line.status for line in desk.changes] == ["quarantined"]
        lives = {context["started_at"] for context in desk.contexts["good"]} - {-1}
        assert len(lives) == 2, "one restart only: the second offence hit nobody"
        assert desk.counts("good") == sorted(desk.counts("good")), "it never went back"
        assert health_of(pool, "good").restarts == 1
        assert not any(map(is_running, pids))


@pytest.mark.parametrize(
    ("kind", "word", "line"),
    [
        ("Sleeper", "stuck", "in harm"),
        ("SpinnerInSubtask", "stuck", "in spin"),
        ("Gripper", "stuck", "in harm"),
        ("Crasher", "crashes", "in harm"),
        ("Quitter", "crashes", ""),
    ],
)
async def test_the_offender_is_named_with_its_stack_and_the_neighbour_resumes_from_its_checkpoint(
    kind: str, word: str, line: str, tmp_path: Path
) -> None:
    """Blocking, spinning beside its cycle, holding the interpreter's lock, dying: all by its own name."""
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk, timeout_s=0.5) as pool:
        await pool.run_task(hosted("good"))
        await pool.run_task(hosted("bad", kind, after_s=0.2))

        await until(lambda: desk.named(word), f"{kind} is named")
        await until(
            lambda: desk.contexts["good"][-1]["started_at"] > 0, "the neighbour resumes"
        )

        assert desk.named() == {"bad"}
        stack = next(stack for _, kind, _, stack in desk.offenders if kind == word)
        assert line in stack
        resumed_at = desk.contexts["good"][-1]["started_at"]
        assert resumed_at in desk.counts("good")


async def test_the_leaking_task_is_named_and_not_the_one_that_gives_its_memory_back(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk, memory_mb=110) as pool:
        await pool.run_task(hosted("churner", "Churner"))
        await pool.run_task(hosted("leaker", "Leaker"))
        await pool.run_task(hosted("good"))

        await until(lambda: desk.named("leaks"), "the leaker is named")

        assert desk.named("leaks") == {"leaker"}
        assert "MB" in desk.offenders[-1][2]


async def test_a_task_that_always_raises_harms_nobody_and_backs_off(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        await pool.run_task(hosted("bad", "Raiser"))
        await pool.run_task(hosted("exit", "Exiter"))

        await until(lambda: health_of(pool, "bad").status == "backoff", "backoff")
        await until(lambda: health_of(pool, "exit").status == "backoff", "backoff")

        assert ("bad", "ValueError: always") in desk.failures
        assert any("sys.exit" in text for who, text in desk.failures if who == "exit")
        assert desk.offenders == []
        assert len(pool.describe()) == 1


async def test_stop_ends_in_time_and_names_who_swallows_its_cancellation(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        await pool.run_task(hosted("good", every_s=0.01))
        await pool.run_task(hosted("bad", "Swallower", after_s=0.01))
        await until(lambda: health_of(pool, "bad").status == "running", "it is at it")
        pids = [line["pid"] for line in pool.describe()]

        stuck = await pool.stop(1.5)

        assert stuck == ["bad"]
        assert desk.named("ignores stop") == {"bad"}
        assert not any(map(is_running, pids))


async def test_stop_names_who_holds_a_host_that_does_not_even_answer(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk, stall_s=30.0) as pool:
        await pool.run_task(hosted("bad", "Spinner"))
        await until(lambda: desk.named("slow"), "it holds its host")

        assert await pool.stop(0.3) == ["bad"]


async def test_a_removed_task_that_goes_on_takes_its_host_with_it_and_the_others_resume(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        await pool.run_task(hosted("good"))
        await pool.run_task(hosted("bad", "Swallower"))
        await until(lambda: health_of(pool, "bad").status == "running", "it is at it")

        await pool.remove("bad")
        await until(
            lambda: desk.contexts["good"][-1]["started_at"] > 0, "the neighbour resumes"
        )

        assert desk.named("ignores stop") == {"bad"}
        assert not pool.knows("bad")


async def test_a_host_that_somebody_kills_is_replaced_and_nobody_is_blamed(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        await pool.run_task(hosted("good"))
        await until(lambda: len(desk.counts("good")) > 3, "it runs")
        first = pool.describe()[0]["pid"]

        os.kill(first, signal.SIGKILL)
        await until(lambda: desk.contexts["good"][-1]["started_at"] > 0, "it resumes")

        assert desk.offenders == []
        assert any("signal 9" in text for *_, text in desk.alerts)
        assert pool.describe()[0]["pid"] != first
        assert pool.describe()[0]["restarts"] == 1


async def test_a_task_is_resumed_only_after_its_requests_under_way_have_ended(
    tmp_path: Path,
) -> None:
    """Else it might look at its orders before its own intent is in the ledger, and buy twice."""
    desk = RecordingCallbacks()
    desk.gate.clear()
    async with running_pool(tmp_path, desk) as pool:
        pool.push_quote(quote())
        await pool.run_task(hosted("buyer", "Buyer"))
        await pool.run_task(hosted("good"))
        await until(
            lambda: health_of(pool, "buyer").status == "running", "it has asked"
        )
        os.kill(pool.describe()[0]["pid"], signal.SIGKILL)
        await until(
            lambda: desk.contexts["good"][-1]["started_at"] > 0, "the neighbour resumes"
        )
        assert health_of(pool, "buyer").status == "backoff"

        desk.gate.set()
        await until(lambda: health_of(pool, "buyer").host is not None, "it is placed")

        assert len(desk.booked["buyer"]) >= 1


# --- a good neighbour's life ---------------------------------------------------------------------


async def test_a_hosted_task_has_the_whole_handle_of_the_desk(tmp_path: Path) -> None:
    desk = RecordingCallbacks()
    desk.held = [Position(symbol="BTC/USDT", venue="paper", quantity=Decimal(2))]
    async with running_pool(tmp_path, desk) as pool:
        pool.push_quote(quote("100"))
        await pool.run_task(hosted("buyer", "Buyer"))

        await until(lambda: desk.finished == ["buyer"], "it completes")

        last = desk.contexts["buyer"][-1]
        assert last["note"] == "ACCEPTED CANCELED b'kept' 2 1"
        assert last["total"] == "100"
        assert desk.shelves["buyer"] == "completed"
        assert desk.emitted == [FeedStalled(source="buyer", silent_s=1.5)]
        assert ("buyer", "warning", "bought") in desk.alerts
        assert (
            "buyer",
            "info",
            "bought",
            {"side": "BUY", "price": "100"},
        ) in desk.lines
        assert desk.booked["buyer"][0].status is OrderStatus.CANCELED
        assert health_of(pool, "buyer").status == "completed"
        assert health_of(pool, "buyer").state == "COMPLETED"


async def test_a_refused_order_arrives_as_the_same_exception(tmp_path: Path) -> None:
    desk = RecordingCallbacks()
    desk.denied = "MAX_NOTIONAL"
    async with running_pool(tmp_path, desk) as pool:
        pool.push_quote(quote())
        await pool.run_task(hosted("buyer", "Buyer"))

        await until(lambda: desk.failures, "it fails")

        assert (
            "OrderDeniedError: order denied (MAX_NOTIONAL): too much"
            in desk.failures[0][1]
        )


async def test_events_and_orders_wake_the_task_that_they_concern(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        await pool.run_task(hosted("listener", "Listener"))
        await until(lambda: desk.counts("listener")[-1:] == [1], "its first run")

        pool.push_event(candle("ETH/USDT"))
        pool.push_event(FeedStalled(source="x", silent_s=1.0))
        pool.push_event(candle("BTC/USDT"))
        await until(lambda: desk.counts("listener")[-1] == 2, "the candle wakes it")
        await asyncio.sleep(0.1)

        assert desk.counts("listener")[-1] == 2


async def test_a_schedule_on_an_event_runs_a_function_with_the_handle(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        spec = HostedTask(
            task_id="f",
            type="fakes.hosted.count_up",
            schedule=Schedule(on=("CandleClosed",)),
        )
        await pool.run_task(spec)
        await until(lambda: pool.describe()[0]["status"] == "ready", "ready")

        def counted() -> int:
            return sum(line[:3] == ("f", "info", "counted") for line in desk.lines)

        while not counted():
            pool.push_event(candle())
            await asyncio.sleep(0.02)

        assert counted() >= 1


async def test_the_desk_parks_hosted_tasks_through_shared_memory(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        await pool.run_task(hosted("busy", every_s=0.0))
        await until(lambda: len(desk.counts("busy")) > 3, "it runs")

        pool.park()
        await asyncio.sleep(0.1)
        parked_at = desk.counts("busy")[-1]
        await asyncio.sleep(0.2)
        assert desk.counts("busy")[-1] == parked_at

        pool.resume_all()
        await until(lambda: desk.counts("busy")[-1] > parked_at, "it goes on")


async def test_an_operator_steers_hosted_tasks(tmp_path: Path) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        await pool.run_task(hosted("t", schedule=Schedule(every_s=60)))
        await until(lambda: health_of(pool, "t").runs == 1, "first run")

        await pool.trigger("t")
        await until(lambda: health_of(pool, "t").runs == 2, "triggered run")
        await pool.adjust("t", {"every": 0.02})
        await until(lambda: health_of(pool, "t").runs > 4, "the new interval")
        assert "in " in (await pool.explain("t"))["next_run_words"]
        await pool.pause("t")
        assert health_of(pool, "t").status == "paused"
        with pytest.raises(NightdeskError, match="is paused"):
            await pool.trigger("t")
        os.kill(pool.describe()[0]["pid"], signal.SIGKILL)
        await until(lambda: health_of(pool, "t").restarts == 1, "replaced")
        await until(
            lambda: health_of(pool, "t").status == "paused",
            "still paused on the fresh host",
        )
        runs = health_of(pool, "t").runs
        await pool.resume("t")
        await until(
            lambda: health_of(pool, "t").runs > runs + 2, "the interval is kept, too"
        )
        await pool.remove("t")

        assert pool.health() == []
        with pytest.raises(UnknownTaskError):
            await pool.pause("t")


async def test_a_task_waits_for_one_that_runs_elsewhere(tmp_path: Path) -> None:
    desk = RecordingCallbacks()
    done = {"candles": 0}
    async with running_pool(tmp_path, desk, successes=done.get) as pool:
        await pool.run_task(
            hosted("after", after=("candles",), schedule=Schedule(every_s=0.02))
        )
        await pool.run_task(hosted("free", schedule=Schedule(every_s=0.02)))
        await until(lambda: health_of(pool, "free").runs > 3, "the other runs")
        assert health_of(pool, "after").runs == 0

        done["candles"] = 1
        await until(lambda: health_of(pool, "after").runs == 1, "it follows")
        await asyncio.sleep(0.3)
        assert health_of(pool, "after").runs == 1

        del done["candles"]
        await until(
            lambda: health_of(pool, "after").runs > 3, "nothing is left to wait for"
        )


async def test_tasks_that_come_after_each_other_share_a_host_in_whatever_order_they_are_named(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk, hosts=2) as pool:
        await pool.run_task(
            hosted("second", after=("first",), schedule=Schedule(every_s=0.02))
        )
        await pool.run_task(hosted("other"))
        await pool.run_task(hosted("first", schedule=Schedule(every_s=0.02)))

        await until(lambda: health_of(pool, "second").runs > 2, "it follows")

        hosts = {
            name: health_of(pool, name).host for name in ("first", "second", "other")
        }
        assert hosts["first"] == hosts["second"] != hosts["other"]


async def test_what_cannot_be_built_is_refused_by_name_and_the_others_run(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        await pool.run_task(hosted("broken", "Broken"))
        await pool.run_task(hosted("absent", "NoSuchTask"))
        await pool.run_task(hosted("mistyped", "Ticker", count="many"))
        await pool.run_task(hosted("damaged", "Ticker", context=b"{not json"))
        await pool.run_task(hosted("good"))

        await until(
            lambda: len(desk.refused) == 4 and desk.counts("good")[-1:] > [2],
            "all judged",
        )

        reasons = {who: text for who, text, _ in desk.refused}
        assert "no such model file" in reasons["broken"]
        assert "NoSuchTask" in reasons["absent"]
        assert "count" in reasons["mistyped"]
        assert [who for who, _, is_context in desk.refused if is_context] == ["damaged"]
        assert health_of(pool, "broken").status == "quarantined"
        with pytest.raises(CommandError, match="quarantined"):
            await pool.trigger("broken")
        with pytest.raises(DuplicateTaskError):
            await pool.run_task(hosted("good"))


async def test_a_quarantined_task_stays_so_over_a_restart_until_somebody_resumes_it(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        await pool.run_task(hosted("q", status="quarantined"))
        assert health_of(pool, "q").status == "quarantined"
        assert await pool.explain("q") == {
            "next_run_words": "before the desk was restarted"
        }

        await pool.resume("q")

        await until(lambda: len(desk.counts("q")) > 2, "it runs")


async def test_a_completed_task_is_kept_and_may_be_started_again(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        await pool.run_task(hosted("once", schedule=Schedule(once=True)))
        await until(lambda: desk.finished == ["once"], "it ran")
        assert health_of(pool, "once").status == "completed"
        assert (health_of(pool, "once").runs, pool.knows("once")) == (1, True)

        await pool.steer("start", "once")
        await until(lambda: desk.finished == ["once", "once"], "it ran again")

        assert health_of(pool, "once").runs == 2


async def test_a_callback_that_raises_costs_one_message_and_not_the_line(
    tmp_path: Path,
) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        desk.emit = None  # type: ignore[method-assign,assignment]
        pool.push_quote(quote())
        await pool.run_task(hosted("buyer", "Buyer"))

        await until(lambda: desk.finished, "it completes all the same")

        assert any(
            "Emitted message of host 1 was dropped" in line[2] for line in desk.lines
        )


async def test_what_a_task_prints_ends_in_the_log(tmp_path: Path) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk) as pool:
        await pool.run_task(hosted("p", "Printer"))

        await until(
            lambda: any(line[2] == "hello from a task" for line in desk.lines),
            "it prints",
        )

        assert pool.describe()[0]["tasks"] == 1


# --- the process ---------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_host_runs_at_idle_priority_and_inherits_nothing(
    tmp_path: Path,
) -> None:
    """In particular not the lock of the state directory (R-21)."""
    desk = RecordingCallbacks()
    with (tmp_path / "LOCK").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        async with running_pool(tmp_path, desk, idle_priority=True) as pool:
            await until(lambda: pool.describe()[0]["status"] == "ready", "ready")
            pid = pool.describe()[0]["pid"]

            assert tmp_path / "LOCK" not in open_files(pid)
            assert os.sched_getscheduler(pid) == os.SCHED_IDLE
            assert os.getpgid(pid) != os.getpgid(0)


def open_files(pid: int) -> set[Path]:
    return {link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir()}


ORPHAN = """
import asyncio, sys
from pathlib import Path
from fakes.hosts import RecordingCallbacks, hosted, running_pool, until

async def main():
    desk = RecordingCallbacks()
    async with running_pool(Path(sys.argv[1]), desk, stall_s=60.0) as pool:
        await pool.run_task(hosted("t", sys.argv[2], after_s=0.2))
        await until(lambda: desk.contexts.get("t"), "it runs")
        if sys.argv[2] == "Spinner":
            await until(lambda: pool.describe()[0]["still_s"] > 0.2, "it holds its host")
        print(pool.describe()[0]["pid"], flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["Ticker", "Spinner"])
async def test_no_host_outlives_its_desk_not_even_one_that_is_held(
    kind: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    desk = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", ORPHAN, str(tmp_path), kind],
        stdout=subprocess.PIPE,
        env=environment,
    )
    try:
        assert desk.stdout is not None
        pid = int(await asyncio.to_thread(desk.stdout.readline))
        assert is_running(pid)

        desk.kill()
        desk.wait()

        await until(lambda: not is_running(pid), "the host ends", timeout_s=2.0)
    finally:
        desk.kill()
        desk.wait()
        desk.stdout.close()  # type: ignore[union-attr]


@pytest.mark.slow
async def test_ten_thousand_harmless_tasks_live_in_one_host(tmp_path: Path) -> None:
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk, memory_mb=400) as pool:
        schedule = Schedule(every_s=5.0)
        for number in range(10_000):
            await pool.run_task(hosted(f"t{number}", schedule=schedule))

        await until(lambda: len(desk.contexts) == 10_000, "all have run")

        line: dict[str, Any] = pool.describe()[0]
        assert line["resident_mb"] < 400
        assert desk.offenders == []


async def test_a_quarantined_task_stays_so_although_its_host_is_replaced(
    tmp_path: Path,
) -> None:
    """It would harm its new neighbours as it did the old ones."""
    desk = RecordingCallbacks()
    async with running_pool(tmp_path, desk, timeout_s=0.5) as pool:
        await pool.run_task(hosted("good"))
        await pool.run_task(hosted("q", "Swallower", timeout_s=0.2))
        await until(lambda: health_of(pool, "q").status == "quarantined", "quarantine")
        why = health_of(pool, "q").why

        await pool.run_task(hosted("bad", "Spinner"))
        await until(lambda: health_of(pool, "good").restarts, "the host is replaced")
        before = len(desk.counts("good"))
        await until(lambda: len(desk.counts("good")) > before + 5, "others go on")

        assert health_of(pool, "q").status == "quarantined"
        assert health_of(pool, "q").why == why
        assert pool.count_by_status()["quarantined"] >= 1
        assert "q" in [line.task_id for line in pool.health_of(("quarantined",))]
