"""Frames over a socket: whole, in order, bounded."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from nightdesk.errors import CapacityError, NightdeskError, OrderDeniedError
from nightdesk.kernel._wire import (
    MAX_FRAME_BYTES,
    Channel,
    Emitted,
    Failure,
    Hello,
    Saved,
    SavedContext,
    decode_event,
    encode,
)
from nightdesk.model.events import Event, FeedStalled


class End:
    """One end of a line: what came, and whether the other end is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self.frames: list[Any] = []
        self.closed = asyncio.Event()
        self.drained = asyncio.Event()
        self.channel = Channel(
            asyncio.get_running_loop(),
            sock,
            self.frames.append,
            self.closed.set,
            on_drained=self.drained.set,
        )

    async def has(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.frames) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.fixture
async def sockets() -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


def big(size: int) -> Saved:
    return Saved([SavedContext("t", "active", b"x" * size)])


async def test_frames_arrive_whole_and_in_order_however_large(sockets: Any) -> None:
    left, right = End(sockets[0]), End(sockets[1])
    sent = [Hello(1), big(3_000_000), Hello(2), big(10), big(5_000_000), Hello(3)]

    for frame in sent:
        left.channel.send(frame)
    assert left.channel.backlog > 0
    assert left.channel.blocked_s() < 10
    await right.has(len(sent))

    assert right.frames == sent
    assert left.channel.backlog == 0
    assert left.drained.is_set()
    left.channel.close()
    right.channel.close()


async def test_a_frame_beyond_the_bound_is_refused_and_the_line_stays(
    sockets: Any,
) -> None:
    left, right = End(sockets[0]), End(sockets[1])

    with pytest.raises(CapacityError, match="Saved message"):
        left.channel.send(big(MAX_FRAME_BYTES))
    left.channel.send(Hello(1))
    await right.has(1)

    assert right.frames == [Hello(1)]
    left.channel.close()
    right.channel.close()


async def test_what_was_sent_before_a_death_is_still_handed_over(sockets: Any) -> None:
    end = End(sockets[1])
    body = encode(Hello(7))
    sockets[0].sendall(len(body).to_bytes(4, "big") + body + b"\x00\x00")

    sockets[0].close()
    end.channel.send(Hello(8))  # nobody is there: no error, and reading goes on
    end.channel.send(Hello(9))
    await asyncio.wait_for(end.closed.wait(), 10)

    assert end.frames == [Hello(7)]
    assert not end.channel.is_open
    end.channel.send(Hello(10))


@pytest.mark.parametrize(
    "noise",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x02\xc1\xc1",
        (100_001).to_bytes(4, "big") + b"\x91" * 100_000 + b"\xc0",
    ],
    ids=["huge", "none", "deep"],
)
async def test_noise_ends_the_line(noise: bytes, sockets: Any) -> None:
    end = End(sockets[1])

    sockets[0].sendall(noise)
    await asyncio.wait_for(end.closed.wait(), 10)

    assert end.frames == []


async def test_a_reader_that_does_not_keep_up_makes_the_sender_wait(
    sockets: Any,
) -> None:
    """Reading stops while a megabyte waits to be understood: memory stays bounded."""
    left, right = End(sockets[0]), End(sockets[1])
    for number in range(3000):
        left.channel.send(big(1000 + number % 7))

    await right.has(3000)

    assert [len(f.contexts[0].data) for f in right.frames] == [
        1000 + n % 7 for n in range(3000)
    ]
    left.channel.close()
    right.channel.close()


def test_events_of_a_users_own_class_cross_if_both_sides_know_it() -> None:
    class MoonRisen(Event, frozen=True, kw_only=True):
        phase: int

    raw = msgspec.Raw(encode(MoonRisen(phase=3)))

    assert decode_event(raw) == MoonRisen(phase=3)
    assert decode_event(encode(FeedStalled(source="a", silent_s=1.0))) == FeedStalled(
        source="a", silent_s=1.0
    )
    assert Emitted("t", raw).event == raw


@pytest.mark.parametrize("data", [encode({"type": "NeverHeardOf"}), encode([1]), b""])
def test_an_event_that_cannot_be_read_is_an_error_in_words(data: bytes) -> None:
    with pytest.raises(NightdeskError, match="event"):
        decode_event(data)


def test_an_exception_crosses_with_what_matters() -> None:
    denied = Failure.of(OrderDeniedError("KILL_SWITCH", "halted")).raised()
    other = Failure.of(ValueError("bad")).raised()
    own = Failure.of(NightdeskError("plain")).raised()

    assert isinstance(denied, OrderDeniedError)
    assert (denied.code, denied.reason) == ("KILL_SWITCH", "halted")
    assert str(other) == "ValueError: bad"
    assert str(own) == "plain"
