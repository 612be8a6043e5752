"""What the desk and its background hosts say to each other, and how it crosses the socket.

A frame is a four-byte length and one msgpack body. Both sides use the same `Channel`: it sends at
once where the socket has room, so that a frame which was handed over survives a `kill -9` of its
sender, and keeps what has no room in a backlog whose size the sender can see.

Comes from: kernel/hosts.py, host.py
Goes to: kernel/hosts.py, host.py
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any

import msgspec

from nightdesk.abc import Shelf
from nightdesk.errors import CapacityError, NightdeskError, OrderDeniedError
from nightdesk.kernel.clock import SystemClock
from nightdesk.kernel.loop import LANE, Lane
from nightdesk.model.events import Event, QuoteChanged
from nightdesk.model.health import TaskHealth
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Order
from nightdesk.model.position import Position
from nightdesk.model.schedule import Schedule

__all__ = [
    "MAX_FRAME_BYTES",
    "AddTasks",
    "Alerted",
    "Answer",
    "Ask",
    "Channel",
    "Emitted",
    "Failed",
    "Failure",
    "Finished",
    "Frame",
    "Happened",
    "HealthChanged",
    "Hello",
    "HostedTask",
    "Instruments",
    "Logged",
    "OrdersChanged",
    "Placement",
    "Positions",
    "Quotes",
    "Refused",
    "Reported",
    "Saved",
    "SavedContext",
    "Setup",
    "Stop",
    "Stopped",
    "Subscribe",
    "Succeeded",
    "decode",
    "decode_event",
    "encode",
]

MAX_FRAME_BYTES = 8 * 1024 * 1024
_READ_BYTES = 64 * 1024
_PAUSE_BYTES = 1024 * 1024
_PARSE_NS = 50_000
_HEADER = 4

encode = msgspec.msgpack.Encoder(enc_hook=str).encode
decode = msgspec.msgpack.decode


# --- Frames -----------------------------------------------------------------------------------------


class HostedTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task that shall run in a host: an entry of `desk.yaml`, and where the task stood.

    Attributes:
        params: Fields of a fresh context; used when there is no `context`.
        context: The last saved record, as `encode_context` wrote it.
        status: `paused`, `stopped` or `quarantined` if it was left so.
        streak: Failures in a row in its last host.
        adjustments: What an operator changed since, as `nightdesk tasks adjust` names it.
    """

    task_id: str
    type: str
    params: dict[str, Any] = {}
    context: bytes | None = None
    schedule: Schedule | None = None
    priority: str | None = None
    timeout_s: float | None = None
    group: str | None = None
    after: tuple[str, ...] = ()
    status: str = ""
    streak: int = 0
    adjustments: dict[str, Any] = {}


class Frame(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One message. The class name travels as its tag."""


class Setup(Frame, frozen=True):
    """The first frame to a host: what it must know before its first task."""

    search_path: str
    seed: int
    epoch: int
    max_concurrent: int
    directory: str
    log_level: str = "info"


class Placement(msgspec.Struct, frozen=True, array_like=True):
    """A task with the number it has in the shared page, and its orders so far.

    `foreign`: the names of its `after` that run elsewhere; the host hears of them by `Succeeded`.
    """

    number: int
    task: HostedTask
    orders: list[Order] = []
    foreign: list[str] = []


class AddTasks(Frame, frozen=True):
    tasks: list[Placement]


class Instruments(Frame, frozen=True):
    instruments: list[Instrument]


class Quotes(Frame, frozen=True):
    quotes: list[QuoteChanged]


class Positions(Frame, frozen=True):
    positions: list[Position]


class OrdersChanged(Frame, frozen=True):
    orders: list[Order]


class Happened(Frame, frozen=True):
    """Events that some task of the host listens to."""

    events: list[msgspec.Raw]


class Succeeded(Frame, frozen=True):
    """Tasks elsewhere that others here come after: `names` succeeded again, `gone` exist no more."""

    names: list[str]
    gone: list[str] = []


class Stop(Frame, frozen=True):
    timeout_s: float


class Ask(Frame, frozen=True):
    """A question that wants an `Answer` with the same `number`. Both sides may ask."""

    number: int
    verb: str
    task_id: str
    body: msgspec.Raw


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """An exception on its way through the socket."""

    type: str
    text: str
    code: str = ""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        if isinstance(error, OrderDeniedError):
            return cls("OrderDeniedError", error.reason, error.code)
        return cls(type(error).__name__, str(error)[:4000])

    def raised(self) -> NightdeskError:
        """Return the exception to raise on this side."""
        if self.type == "OrderDeniedError":
            return OrderDeniedError(self.code, self.text)
        return NightdeskError(
            self.text if self.type == "NightdeskError" else f"{self.type}: {self.text}"
        )


class Answer(Frame, frozen=True):
    number: int
    body: msgspec.Raw
    failure: Failure | None = None


class Hello(Frame, frozen=True):
    """The first frame of a host: it runs."""

    pid: int


class Subscribe(Frame, frozen=True):
    """Event types that the host wants from now on, too."""

    events: list[str]


class SavedContext(msgspec.Struct, frozen=True, array_like=True):
    task_id: str
    shelf: Shelf
    data: bytes


class Saved(Frame, frozen=True):
    contexts: list[SavedContext]


class Emitted(Frame, frozen=True):
    task_id: str
    event: msgspec.Raw


class Alerted(Frame, frozen=True):
    task_id: str
    level: str
    text: str


class Logged(Frame, frozen=True):
    task_id: str
    level: str
    text: str
    fields: dict[str, Any] = {}


class Reported(Frame, frozen=True):
    """Health of tasks, still encoded: the desk decodes it only when somebody asks."""

    health: list[tuple[str, msgspec.Raw]]


class HealthChanged(Frame, frozen=True):
    """A pause, a quarantine, or the end of one."""

    health: TaskHealth


class Failed(Frame, frozen=True):
    task_id: str
    kind: str
    text: str
    consequence: str


class Finished(Frame, frozen=True):
    """A task has come to its end; its last context was sent before."""

    health: TaskHealth


class Refused(Frame, frozen=True):
    """A task could not even be built; nothing of it ran. `is_context`: its saved context is the reason."""

    task_id: str
    text: str
    is_context: bool = False


class Stopped(Frame, frozen=True):
    """The last frame of a host. `stuck`: tasks that would not stop."""

    stuck: list[str]


_Any = (
    Setup
    | AddTasks
    | Instruments
    | Quotes
    | Positions
    | OrdersChanged
    | Happened
    | Succeeded
    | Stop
    | Ask
    | Answer
    | Hello
    | Subscribe
    | Saved
    | Emitted
    | Alerted
    | Logged
    | Reported
    | HealthChanged
    | Failed
    | Finished
    | Refused
    | Stopped
)
_decode_frame = msgspec.msgpack.Decoder(_Any).decode
_event_types: dict[str, type[Event]] = {}


class _Tagged(msgspec.Struct):
    type: str


def decode_event(data: bytes | msgspec.Raw) -> Event:
    """Return the event in `data`, of whichever class that is known in this process.

    Raises:
        NightdeskError: Its class is unknown here, or it is malformed.
    """
    try:
        name = msgspec.msgpack.decode(data, type=_Tagged).type
        kind = _event_types.get(name) or _find_event_type(name)
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise NightdeskError(f"an event cannot be read: {error}") from error


def _find_event_type(name: str) -> type[Event]:
    waiting: list[type[Event]] = [Event]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        _event_types[str(kind.__struct_config__.tag)] = kind
    if name not in _event_types:
        raise NightdeskError(
            f"an event of type {name!r} came from another process, and no module imported here defines it. "
            "Import its module on both sides, or use one of nightdesk.model.events."
        )
    return _event_types[name]


# --- The socket -------------------------------------------------------------------------------------


class Channel:
    """Frames over one non-blocking socket.

    Args:
        on_frame: Called for each frame, in `lane`, for at most a slice at a time.
        on_closed: Called once, after the last frame: the other side is gone, or spoke nonsense.
        lane: Reading only collects bytes; decoding them queues here, so that a talkative host
            waits while an opportunity is handled.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        on_frame: Callable[[Any], None],
        on_closed: Callable[[], None],
        *,
        lane: Lane = Lane.DESK,
        on_drained: Callable[[], None] | None = None,
    ) -> None:
        sock.setblocking(False)
        self._loop, self._sock = loop, sock
        self._on_frame, self._on_closed, self._on_drained = (
            on_frame,
            on_closed,
            on_drained,
        )
        self._monotonic_ns = SystemClock.monotonic_ns
        self._context: Context = copy_context()
        self._context.run(LANE.set, lane)
        self._incoming = bytearray()
        self._parsed = 0
        self._parse_due = False
        self._reading = False
        self._ended = False
        self._is_mute = False
        self._outgoing: deque[memoryview] = deque()
        self._progress_ns = 0
        self.backlog = 0
        self.is_open = True
        self._read_more()

    # sending

    def send(self, frame: Frame) -> None:
        """Send `frame`, or queue it behind what waits; after the end it is dropped.

        Raises:
            CapacityError: It is larger than `MAX_FRAME_BYTES`.
        """
        body = encode(frame)
        if len(body) > MAX_FRAME_BYTES:
            raise CapacityError(
                f"one {type(frame).__name__} message of {len(body)} bytes",
                MAX_FRAME_BYTES,
                "it was not sent",
            )
        if not self.is_open or self._is_mute:
            return
        data = memoryview(len(body).to_bytes(_HEADER, "big") + body)
        if not self._outgoing:
            data = data[self._push(data) :]
            if not data or self._is_mute:
                return
            self._progress_ns = self._monotonic_ns()
            self._loop.add_writer(self._sock, self._on_writable)
        self._outgoing.append(data)
        self.backlog += len(data)

    def blocked_s(self) -> float:
        """Return for how long the other side has read nothing although something waits."""
        if not self._outgoing:
            return 0.0
        return (self._monotonic_ns() - self._progress_ns) / 1e9

    def _push(self, data: memoryview) -> int:
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            # Gone. What it had sent before is still to be read, so only this direction ends here.
            self._is_mute = True
            return 0

    def _on_writable(self) -> None:
        sent = 0
        while self._outgoing and sent < _READ_BYTES:
            head = self._outgoing[0]
            count = self._push(head[:_READ_BYTES])
            if not count:
                break
            sent += count
            if count == len(head):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = head[count:]
        self.backlog -= sent
        if sent:
            self._progress_ns = self._monotonic_ns()
        if self._is_mute:
            self._outgoing.clear()
            self.backlog = 0
        if not self._outgoing:
            self._loop.remove_writer(self._sock)
            if self._on_drained is not None:
                self._on_drained()

    # receiving

    def _read_more(self) -> None:
        if not self._reading and self.is_open:
            self._reading = True
            self._loop.add_reader(self._sock, self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        self._incoming += data
        waiting = len(self._incoming) - self._parsed
        if waiting > max(_PAUSE_BYTES, self._head_length()):
            self._loop.remove_reader(self._sock)
            self._reading = False
        self._parse_soon()

    def _head_length(self) -> int:
        at = self._parsed
        return _HEADER + int.from_bytes(self._incoming[at : at + _HEADER], "big")

    def _parse_soon(self) -> None:
        if not self._parse_due:
            self._parse_due = True
            self._loop.call_soon(self._parse, context=self._context)

    def _parse(self) -> None:
        self._parse_due = False
        until = self._monotonic_ns() + _PARSE_NS
        while self._parse_one():
            if self._monotonic_ns() > until:
                self._parse_soon()
                break
        else:
            if self._ended:
                self._finish()
            self._read_more()
        if self._parsed == len(self._incoming) or self._parsed > _PAUSE_BYTES:
            del self._incoming[: self._parsed]
            self._parsed = 0

    def _parse_one(self) -> bool:
        waiting = len(self._incoming) - self._parsed
        if waiting < _HEADER:
            return False
        length = self._head_length()
        if length > MAX_FRAME_BYTES + _HEADER:
            self._end(forget=True)
            return False
        if waiting < length:
            return False
        start = self._parsed + _HEADER
        self._parsed += length
        try:
            frame = _decode_frame(bytes(self._incoming[start : self._parsed]))
        except (msgspec.MsgspecError, RecursionError):
            self._end(forget=True)
            return False
        self._on_frame(frame)
        return True

    # ending

    def _end(self, forget: bool = False) -> None:
        """Close the socket; what was received whole is still handed over."""
        if forget:
            self._incoming.clear()
            self._parsed = 0
        if not self.is_open:
            return
        self._close_socket()
        self._ended = True
        self._parse_soon()

    def _finish(self) -> None:
        self._ended = False
        self._on_closed()

    def close(self) -> None:
        """End it from this side; `on_closed` is not called."""
        if self.is_open:
            self._close_socket()

    def _close_socket(self) -> None:
        self.is_open = False
        if self._reading:
            self._loop.remove_reader(self._sock)
            self._reading = False
        self._loop.remove_writer(self._sock)
        self._outgoing.clear()
        self.backlog = 0
        self._sock.close()
