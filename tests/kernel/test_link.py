"""What waits for a host: market data is replaced by newer, events are bounded, the rest is kept."""

import asyncio
import socket
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest

from fakes.hosts import hosted, quote, until
from nightdesk.errors import NightdeskError
from nightdesk.kernel._link import HostLink
from nightdesk.kernel._wire import (
    AddTasks,
    Answer,
    Ask,
    Channel,
    Failure,
    Happened,
    OrdersChanged,
    Placement,
    Positions,
    Quotes,
    decode_event,
    encode,
)
from nightdesk.kernel.clock import SystemClock
from nightdesk.model.events import FeedStalled
from nightdesk.model.order import Order, OrderRequest, Side
from nightdesk.model.position import Position


class NoProcess:
    pid = 1
    is_closed = False

    def kill(self) -> None:
        """There is none."""

    async def gone(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        self.is_closed = True


class Line:
    """A link, and the host at its other end: `listen` makes it read."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        self.said: list[Any] = []
        self.link = HostLink(
            1,
            NoProcess(),  # type: ignore[arg-type]
            ours,
            SystemClock(),
            lambda link, frame: self.said.append(frame),
        )
        self.heard: list[Any] = []
        self.host: Channel | None = None

    def listen(self) -> Channel:
        self.host = Channel(
            asyncio.get_running_loop(), self.theirs, self.heard.append, lambda: None
        )
        return self.host

    def of(self, kind: type[Any]) -> list[Any]:
        return [frame for frame in self.heard if isinstance(frame, kind)]


@pytest.fixture
async def line() -> AsyncIterator[Line]:
    line = Line()
    yield line
    if line.host is not None:
        line.host.close()
    line.theirs.close()
    await line.link.end()


def block(line: Line) -> None:
    """Fill the socket and more: nobody reads."""
    order = OrdersChanged([an_order()])
    while line.link.backlog < 1_100_000:
        line.link.send(order)


def an_order() -> Order:
    request = OrderRequest(
        symbol="BTC/USDT", venue="paper", side=Side.BUY, quantity=Decimal(1)
    )
    return Order(client_order_id="c", task_id="t", request=request, reason="x" * 10_000)


async def test_quotes_are_replaced_by_newer_ones_and_come_at_most_20_times_a_second(
    line: Line,
) -> None:
    line.listen()
    for number in range(100):
        line.link.push_quote("a", quote(str(100 + number)))
    await until(lambda: line.of(Quotes), "the first")
    for number in range(100):
        line.link.push_quote("a", quote(str(200 + number)))
    await until(lambda: len(line.of(Quotes)) == 2, "the second")

    assert [[str(q.bid) for q in frame.quotes] for frame in line.of(Quotes)] == [
        ["199"],
        ["299"],
    ]


async def test_a_host_that_does_not_read_loses_the_oldest_events_and_no_order(
    line: Line,
) -> None:
    block(line)
    for number in range(2000):
        line.link.push_event(FeedStalled(source=str(number), silent_s=1.0))
        line.link.push_event(quote(str(number)))
    line.link.push_positions([Position(symbol="A/B", venue="v")])
    line.link.push_order(an_order())
    assert line.link.dropped == 2000 - 1024
    await asyncio.sleep(0.01)
    assert line.link.blocked_s() > 0

    line.listen()
    await until(lambda: line.of(Positions), "it reads again")

    happened = [
        decode_event(raw) for frame in line.of(Happened) for raw in frame.events
    ]
    assert len(happened) == 1025
    assert happened[0] == quote("1999")
    assert happened[-1] == FeedStalled(source="1999", silent_s=1.0)
    assert len(line.of(OrdersChanged)) > 100


async def test_tasks_wait_for_a_host_that_does_not_read_and_go_in_batches(
    line: Line,
) -> None:
    block(line)
    for number in range(120):
        spec = hosted(f"t{number}")
        line.link.place(lambda spec=spec: Placement(1, spec))  # type: ignore[misc]

    line.listen()
    await until(
        lambda: sum(len(f.tasks) for f in line.of(AddTasks)) == 120, "all of them"
    )

    assert [len(frame.tasks) for frame in line.of(AddTasks)] == [50, 50, 20]


async def test_a_question_gets_its_answer_its_error_or_a_word_about_silence(
    line: Line,
) -> None:
    host = line.listen()

    def reply(frame: Any) -> None:
        if isinstance(frame, Ask) and frame.verb == "good":
            line.link.on_answer(Answer(frame.number, frame.body))
            line.link.on_answer(Answer(frame.number, frame.body))
        elif isinstance(frame, Ask) and frame.verb == "bad":
            failure = Failure.of(NightdeskError("refused"))
            line.link.on_answer(Answer(frame.number, frame.body, failure))

    host._on_frame = reply

    assert await line.link.ask("good", "t", {"a": 1}) == {"a": 1}
    with pytest.raises(NightdeskError, match="refused"):
        await line.link.ask("bad", "t")
    with pytest.raises(NightdeskError, match="did not answer `mute` of task 't'"):
        await line.link.ask("mute", "t", timeout_s=0.05)


async def test_a_question_to_a_host_that_dies_ends_at_once(line: Line) -> None:
    host = line.listen()
    asking = asyncio.ensure_future(line.link.ask("mute", "t"))
    await until(lambda: line.of(Ask), "it is asked")

    host.close()

    with pytest.raises(NightdeskError, match="has ended"):
        await asking
    assert line.link.closed.is_set()
    assert line.link.is_open
    assert encode(None)
