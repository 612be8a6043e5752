"""The words between a desk and a paper venue in a process of its own: length-prefixed MessagePack.

Comes from: venues/paper_remote.py, exchange/paper_process.py
Goes to: venues/paper_remote.py, exchange/paper_process.py
"""

import asyncio
from typing import Any, Literal

import msgspec

from nightdesk.model.events import (
    BookChanged,
    CandleClosed,
    Event,
    FeedStalled,
    OrderCanceled,
    OrderExpired,
    OrderFilled,
    PoolSwap,
    QuoteChanged,
    TradePrinted,
)

__all__ = [
    "MAX_FRAME",
    "PAGE",
    "AnyEvent",
    "Call",
    "Failure",
    "Message",
    "Push",
    "Reply",
    "decode",
    "encode",
    "is_news",
    "pack",
    "read_frame",
]

MAX_FRAME = 16 * 1024 * 1024
PAGE = 5_000
"""Rows in one answer; longer lists are asked for page by page."""

AnyEvent = (
    QuoteChanged
    | TradePrinted
    | BookChanged
    | CandleClosed
    | PoolSwap
    | FeedStalled
    | OrderFilled
    | OrderCanceled
    | OrderExpired
)
_encoder = msgspec.msgpack.Encoder()


class Call(msgspec.Struct, tag="call"):
    """A request. `sent_ns` is when its bytes left, by the machine's clock, which both sides share."""

    id: int
    verb: str
    sent_ns: int = 0
    body: msgspec.Raw = msgspec.Raw(b"\xc0")


class Failure(msgspec.Struct):
    """Why a call failed: proof of refusal, an unknown outcome, or a question without answer."""

    kind: Literal["rejected", "unknown", "failed"]
    code: str
    reason: str


class Reply(msgspec.Struct, tag="reply"):
    id: int
    body: msgspec.Raw = msgspec.Raw(b"\xc0")
    failure: Failure | None = None


class Push(msgspec.Struct, tag="push"):
    """News. `lost` market events were dropped because this client was slow."""

    events: list[AnyEvent]
    lost: int = 0


Message = Call | Reply | Push
_decoder = msgspec.msgpack.Decoder(Message)


def pack(body: Any) -> msgspec.Raw:
    return msgspec.Raw(_encoder.encode(body))


def encode(message: Message) -> bytes:
    """Return one frame."""
    data = _encoder.encode(message)
    return len(data).to_bytes(4, "big") + data


def decode(frame: bytes) -> Message:
    """Return the message of one frame.

    Raises:
        msgspec.MsgspecError, ValueError: It is none.
    """
    try:
        message: Message = _decoder.decode(frame)
    except RecursionError:
        raise ValueError("a message is nested too deeply") from None
    return message


def is_news(event: Event) -> bool:
    """Return whether `event` is of a kind that travels."""
    return isinstance(event, AnyEvent)


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """Return the next frame.

    Raises:
        asyncio.IncompleteReadError: The other side hung up.
        ValueError: The frame is larger than `MAX_FRAME`.
    """
    size = int.from_bytes(await reader.readexactly(4), "big")
    if size > MAX_FRAME:
        raise ValueError(f"frame of {size} bytes, at most {MAX_FRAME} expected")
    return await reader.readexactly(size)
