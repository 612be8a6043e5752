"""The child's side of a background host, without a process of its own: the desk is played by the test."""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fakes.hosts import BTC, TESTS, hosted, quote, until
from nightdesk.errors import NightdeskError
from nightdesk.host import Host
from nightdesk.kernel import _child
from nightdesk.kernel._pulse import (
    HostLoop,
    Page,
    Pulse,
    new_host_loop,
    new_shared_file,
)
from nightdesk.kernel._remote import ForwardingHandler, RemoteDesk
from nightdesk.kernel._wire import (
    AddTasks,
    Alerted,
    Answer,
    Ask,
    Channel,
    Emitted,
    Failed,
    Failure,
    Finished,
    Frame,
    Happened,
    HealthChanged,
    Hello,
    HostedTask,
    Instruments,
    Logged,
    OrdersChanged,
    Placement,
    Positions,
    Quotes,
    Refused,
    Reported,
    Saved,
    Setup,
    Stop,
    Stopped,
    Subscribe,
    Succeeded,
    decode,
    encode,
)
from nightdesk.model.events import CandleClosed, FeedStalled, QuoteChanged
from nightdesk.model.health import TaskHealth
from nightdesk.model.order import Order, OrderRequest, Side
from nightdesk.model.position import Position
from nightdesk.model.schedule import Schedule


class PlayedDesk:
    """The other end of the line. `answers` maps a verb to what it answers."""

    def __init__(self, loop: HostLoop, directory: Path) -> None:
        ours, theirs = socket.socketpair()
        self.page_fd = new_shared_file("test")
        self.page = Page(self.page_fd)
        self.frames: list[Frame] = []
        self.answers: dict[str, Any] = {"subscribe": []}
        self.asked: list[tuple[str, str, Any]] = []
        self.is_closed = False
        self._numbers = 0
        numbers: dict[str, int] = {}
        self.pulse = Pulse(self.page_fd, numbers, lambda: self.host.on_parked())
        self._loop = loop
        loop.pulse = self.pulse
        self.host = Host(loop, theirs, self.pulse, numbers)
        self.channel = Channel(loop, ours, self._take, self._close)
        self.send(Setup(str(TESTS), 1, 3, 100, str(directory)))
        self.running = asyncio.ensure_future(self.host.run())

    def _take(self, frame: Frame) -> None:
        self.frames.append(frame)
        if isinstance(frame, Ask):
            self.asked.append((frame.verb, frame.task_id, decode(frame.body)))
            if frame.verb not in self.answers:
                return
            answer = self.answers[frame.verb]
            nothing = msgspec.Raw(encode(None))
            if isinstance(answer, Exception):
                self.send(Answer(frame.number, nothing, Failure.of(answer)))
            else:
                self.send(Answer(frame.number, msgspec.Raw(encode(answer))))

    def _close(self) -> None:
        self.is_closed = True

    def send(self, frame: Frame) -> None:
        self.channel.send(frame)

    def add(
        self, *specs: HostedTask, foreign: tuple[str, ...] = (), orders: Any = ()
    ) -> None:
        placements = []
        for spec in specs:
            self._numbers += 1
            placements.append(
                Placement(self._numbers, spec, list(orders), list(foreign))
            )
        self.send(AddTasks(placements))

    async def ask(self, verb: str, task_id: str, body: Any = None) -> Answer:
        self._numbers += 1
        number = self._numbers
        self.send(Ask(number, verb, task_id, msgspec.Raw(encode(body))))
        await until(lambda: [a for a in self.of(Answer) if a.number == number], verb)
        return next(a for a in self.of(Answer) if a.number == number)

    def of(self, kind: type[Any]) -> list[Any]:
        return [frame for frame in self.frames if isinstance(frame, kind)]

    def contexts(self, task_id: str) -> list[dict[str, Any]]:
        return [
            msgspec.json.decode(saved.data)
            for frame in self.of(Saved)
            for saved in frame.contexts
            if saved.task_id == task_id
        ]

    def count(self, task_id: str) -> int:
        return max((c["count"] for c in self.contexts(task_id)), default=0)

    def desk(self, task_id: str = "t") -> RemoteDesk:
        return RemoteDesk(self.host.line, task_id, lambda: None)

    async def end(self) -> None:
        self.channel.close()
        await self.running
        self._loop.pulse = None
        self.pulse.close()
        self.page.close()
        os.close(self.page_fd)


Story = Callable[[PlayedDesk], Awaitable[None]]
Play = Callable[[Story], None]


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    """Run a story on the loop that hosts have."""
    loop = new_host_loop()

    async def tell(story: Story) -> None:
        desk = PlayedDesk(loop, tmp_path)
        try:
            await story(desk)
        finally:
            await desk.end()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left, timeout=0.1)

    yield lambda story: loop.run_until_complete(tell(story))
    loop.close()


def order(number: int = 1, task_id: str = "t", **changes: Any) -> Order:
    request = OrderRequest(
        symbol="BTC/USDT",
        venue="paper",
        side=Side.BUY,
        quantity=Decimal(1),
        price=Decimal(100),
    )
    return Order(
        client_order_id=f"c{number}", task_id=task_id, request=request, **changes
    )


# --- tasks ---------------------------------------------------------------------------------------


def test_a_host_greets_runs_a_task_and_reports_it(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        desk.add(hosted("t", every_s=0.01))

        await until(lambda: desk.of(Reported), "a report")

        assert desk.of(Hello) == [Hello(os.getpid())]
        assert desk.page.beat_ns > 0
        task_id, raw = desk.of(Reported)[0].health[0]
        health = msgspec.msgpack.decode(raw, type=TaskHealth)
        assert (task_id, health.runs_in, health.state) == (
            "t",
            "background",
            "EXECUTING",
        )
        assert desk.count("t") > 3
        assert desk.contexts("t")[0]["_meta"]["epoch"] == 3

    play(story)


def test_a_task_goes_on_from_its_saved_context(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        desk.add(hosted("t", every_s=0.01))
        await until(lambda: desk.count("t") > 3, "some counts")
        saved = desk.of(Saved)[-1].contexts[-1]
        desk.add(hosted("u", context=saved.data.replace(b'"t"', b'"u"')))

        await until(lambda: desk.count("u") > 6, "it goes on")

        lives = {c["started_at"] for c in desk.contexts("u")} - {-1, 0}
        assert lives == {msgspec.json.decode(saved.data)["count"]}

    play(story)


def test_a_finished_task_is_reported_after_its_last_context(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        desk.add(hosted("t", every_s=0.0, limit=3))
        await until(lambda: desk.of(Finished), "its end")

        last = [f for f in desk.frames if isinstance(f, Saved | Finished)]
        assert isinstance(last[-1], Finished)
        assert last[-1].health.state == "COMPLETED"
        saved = last[-2].contexts[-1]
        assert (saved.shelf, desk.contexts("t")[-1]["count"]) == ("completed", 3)

        desk.add(hosted("again", context=saved.data))
        await until(lambda: len(desk.of(Finished)) == 2, "it had ended before")
        assert desk.of(Finished)[-1].health.why == "it had ended before"

    play(story)


def test_a_failing_task_is_reported_with_its_exception(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        desk.add(hosted("bad", "Raiser"), hosted("exit", "Exiter"))
        await until(lambda: len(desk.of(Failed)) == 2, "both fail")

        failed = {frame.task_id: (frame.kind, frame.text) for frame in desk.of(Failed)}
        assert failed["bad"] == ("ValueError", "always")
        assert "sys.exit('enough')" in failed["exit"][1]

    play(story)


def test_what_cannot_be_built_is_refused(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        desk.add(
            hosted("broken", "Broken"),
            hosted("absent", "Absent"),
            hosted("damaged", context=b"{"),
            hosted("odd", schedule=Schedule(cron="never")),
        )
        await until(lambda: len(desk.of(Refused)) == 4, "all four")

        reasons = {frame.task_id: frame for frame in desk.of(Refused)}
        assert "no such model file" in reasons["broken"].text
        assert [r.task_id for r in desk.of(Refused) if r.is_context] == ["damaged"]

    play(story)


def test_a_task_that_comes_after_another_waits_for_it_here_and_elsewhere(
    play: Play,
) -> None:
    async def story(desk: PlayedDesk) -> None:
        often = Schedule(every_s=0.01)
        desk.add(
            hosted("second", after=("first",), schedule=often),
            hosted("first", schedule=often),
        )
        desk.add(
            hosted("far", after=("candles",), schedule=often), foreign=("candles",)
        )
        await until(lambda: desk.count("second") > 1, "the second follows")
        assert desk.contexts("far")[-1]["state"] == "NOT_STARTED"

        desk.send(Succeeded(["candles"]))
        await until(lambda: desk.contexts("far")[-1]["state"] == "IDLE", "one run")
        desk.send(Succeeded([], ["candles"]))
        await until(lambda: desk.count("far") > 1, "nothing to wait for")

        assert not any("elsewhere" in h.health.task_id for h in desk.of(HealthChanged))

    play(story)


def test_operators_verbs_reach_the_scheduler_and_errors_come_back(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        desk.add(hosted("t", schedule=Schedule(every_s=60), adjustments={"timeout": 5}))

        assert (await desk.ask("pause", "t")).failure is None
        refused = await desk.ask("trigger", "t")
        assert refused.failure is not None
        assert "is paused" in refused.failure.text
        await desk.ask("start", "t")
        await desk.ask("trigger", "t")
        await desk.ask("adjust", "t", {"every": 0.01})
        words = await desk.ask("explain", "t")
        assert "next_run_words" in decode(words.body)
        assert decode(words.body)["context"]["task_id"] == "t"
        unknown = await desk.ask("fly", "t")
        assert unknown.failure is not None
        assert decode((await desk.ask("remove", "t")).body) is True
        gone = await desk.ask("pause", "t")

        assert gone.failure is not None
        assert next(h.health.status for h in desk.of(HealthChanged)) == "paused"

    play(story)


def test_a_stopping_host_ends_its_tasks_saves_and_says_goodbye(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        desk.add(hosted("t", every_s=0.01), hosted("bad", "Swallower", after_s=0.01))
        await until(lambda: desk.count("t") > 3, "it runs")
        await asyncio.sleep(0.1)

        desk.send(Stop(0.5))
        desk.send(Stop(0.5))
        await until(lambda: desk.is_closed, "it hangs up")

        assert desk.of(Stopped) == [Stopped(["bad"])]

    play(story)


def test_a_host_whose_desk_is_gone_ends(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        await until(lambda: desk.of(Hello), "hello")

        desk.channel.close()

        await asyncio.wait_for(desk.running, 10)

    play(story)


def test_a_parked_host_runs_no_task_until_the_word_is_taken_back_or_runs_out(
    play: Play,
) -> None:
    async def story(desk: PlayedDesk) -> None:
        desk.add(hosted("t", every_s=0.0))
        await until(lambda: desk.count("t") > 3, "it runs")

        desk.page.park(desk.host._clock.monotonic_ns() + 150_000_000)
        await asyncio.sleep(0.08)
        parked_at = desk.count("t")
        await asyncio.sleep(0.03)
        assert desk.count("t") == parked_at

        await until(lambda: desk.count("t") > parked_at, "its word runs out")

    play(story)


# --- events --------------------------------------------------------------------------------------


def candle(symbol: str) -> CandleClosed:
    one = Decimal(1)
    return CandleClosed(
        symbol=symbol, venue="paper", timeframe="1m", ts_open_ns=1,
        open=one, high=one, low=one, close=one, volume=one,
    )  # fmt: skip


def test_events_wake_listeners_and_schedules_and_bring_quotes(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        desk.add(
            hosted("listener", "Listener"),
            HostedTask(
                task_id="f",
                type="fakes.hosted.count_up",
                schedule=Schedule(on=("CandleClosed",)),
            ),
        )
        await until(lambda: desk.count("listener") == 1, "first run")
        assert Subscribe(["CandleClosed"]) in desk.of(Subscribe)

        events = [candle("ETH/USDT"), candle("BTC/USDT"), quote("101")]
        desk.send(Happened([msgspec.Raw(encode(event)) for event in events]))
        await until(lambda: desk.count("listener") == 2, "woken once")

        await until(
            lambda: any(f.text == "counted" for f in desk.of(Logged)),
            "the function ran",
        )
        found = desk.host.line.quotes["BTC/USDT@paper"]
        assert found.bid == Decimal(101)

    play(story)


def test_a_wants_that_raises_wakes_nobody_and_is_told(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        desk.add(hosted("listener", "Chooser"))
        await until(lambda: desk.count("listener") == 1, "first run")

        desk.send(Happened([msgspec.Raw(encode(candle("BTC/USDT")))]))
        await until(lambda: desk.of(Failed), "the failure")

        assert "wants" in desk.of(Failed)[0].consequence
        desk.send(Happened([msgspec.Raw(encode({"type": "Unheard"}))]))
        await until(
            lambda: any("Happened" in f.text for f in desk.of(Logged)),
            "the odd event is told",
        )

    play(story)


# --- the handle ----------------------------------------------------------------------------------


def test_reads_are_copies_that_the_desk_keeps_fresh(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        handle = desk.desk()
        desk.answers["subscribe"] = [quote("99")]
        assert handle.price("BTC/USDT", "paper") is None
        await until(lambda: handle.price("BTC/USDT", "paper"), "the first quote")
        assert desk.asked == [("subscribe", "", ["BTC/USDT@paper"])]

        desk.send(Quotes([quote("98")]))
        desk.send(Instruments([BTC]))
        desk.send(
            Positions([Position(symbol="BTC/USDT", venue="paper", quantity=Decimal(4))])
        )
        desk.send(OrdersChanged([order(1), order(2, task_id="other")]))
        await until(handle.orders, "all is there")

        newest = handle.price("BTC/USDT", "paper")
        assert isinstance(newest, QuoteChanged)
        assert newest.bid == 98
        assert handle.instrument("BTC/USDT", "paper") == BTC
        assert handle.position("BTC/USDT", "paper").quantity == 4
        assert handle.position("ETH/USDT", "paper").quantity == 0
        assert len(handle.positions()) == 1
        assert [o.client_order_id for o in handle.orders()] == ["c1"]
        assert handle.order("c2") is None
        with pytest.raises(
            NightdeskError,
            match="no instrument 'X/Y' at venue 'paper'; it has BTC/USDT",
        ):
            handle.instrument("X/Y", "paper")

    play(story)


def test_writes_are_questions_with_answers(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        handle = desk.desk()
        desk.answers.update(
            submit=order(7), cancel=order(7, reason="gone"), save=None, load=b"x"
        )

        submitted = await handle.submit(order(7).request)
        assert handle.orders() == [submitted]
        cancelled = await handle.cancel("c7")
        assert handle.order("c7") == cancelled
        with pytest.raises(NightdeskError, match="not one of task 't'"):
            await handle.cancel("c9")
        await handle.save("memo", b"y")
        assert await handle.load("memo") == b"x"
        with pytest.raises(NightdeskError, match="memo"):
            await handle.save("memo", bytes(2_000_000))
        desk.answers["submit"] = NightdeskError("no such venue")
        with pytest.raises(NightdeskError, match="no such venue"):
            await handle.submit(order(8).request)
        await handle.checkpoint()

        assert [verb for verb, *_ in desk.asked] == [
            "submit",
            "cancel",
            "save",
            "load",
            "submit",
        ]
        assert desk.asked[2][2] == ["memo", b"y"]

    play(story)


def test_words_reach_the_desk_but_not_without_end(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        handle = desk.desk()
        handle.log.debug("not wanted")
        handle.log.bind(a=1).warning("careful", b=Decimal(2))
        handle.log.exception("worse")
        handle.alert("critical", "help")
        handle.emit(FeedStalled(source="s", silent_s=1.0))
        for number in range(1000):
            handle.log.info(f"line {number}")
        await until(lambda: len(desk.of(Logged)) >= 190, "lines")
        await asyncio.sleep(0.05)

        assert Logged("t", "warning", "careful", {"a": 1, "b": "2"}) in desk.of(Logged)
        assert desk.of(Alerted) == [Alerted("t", "critical", "help")]
        assert len(desk.of(Emitted)) == 1
        assert len(desk.of(Logged)) < 400
        await asyncio.sleep(1.0)
        handle.log.info("a second later")
        await until(
            lambda: desk.of(Logged)[-1].text == "a second later", "it may speak again"
        )
        assert "dropped" in desk.of(Logged)[-2].text

    play(story)


def test_what_libraries_log_from_any_thread_reaches_the_desk(play: Play) -> None:
    async def story(desk: PlayedDesk) -> None:
        handler = ForwardingHandler(desk.host.line, asyncio.get_running_loop())
        logger = logging.getLogger("some.library")
        logger.addHandler(handler)
        try:
            logger.warning("here %s", "and")
            try:
                raise ValueError("oops")
            except ValueError:
                logger.exception("now")
            thread = threading.Thread(target=logger.error, args=("there",))
            thread.start()
            await until(lambda: len(desk.of(Logged)) == 3, "three lines")
            thread.join()
        finally:
            logger.removeHandler(handler)

        lines = {frame.text: (frame.level, frame.fields) for frame in desk.of(Logged)}
        assert lines["here and"] == ("warning", {"logger": "some.library"})
        assert "ValueError: oops" in lines["now"][1]["traceback"]
        assert lines["there"][0] == "error"

    play(story)


# --- the process ---------------------------------------------------------------------------------


def test_the_process_refuses_to_live_without_its_desk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its parent died between the start and the first line: nobody would ever end it."""

    class EndedError(Exception):
        pass

    def end(code: int) -> None:
        raise EndedError(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(_child.sys, "platform", "darwin")
    monkeypatch.setattr(_child, "_watch", lambda parent: None)

    with pytest.raises(EndedError):
        _child.die_with(parent=-1)
