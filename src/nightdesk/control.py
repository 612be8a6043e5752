"""The operator's way in: a Unix socket in the state directory, one JSON line per request and reply.

It is there when HTTP is not, only the user who runs the desk may use it, and a client that is slow,
greedy or gone costs the desk nothing. Looking waits behind opportunities; commands do not.

Comes from: cli/, running.py
Goes to: operations.py
"""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import stat
import struct
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from nightdesk.abc import Clock
from nightdesk.errors import (
    CommandError,
    DeskNotRunningError,
    DeskSilentError,
    NightdeskError,
    StateNotWritableError,
)
from nightdesk.kernel.loop import Lane, lane
from nightdesk.telemetry.words import sayable

__all__ = [
    "FLAG_NAME",
    "ControlClient",
    "ControlServer",
    "RemoteError",
    "halt",
    "private_directory",
    "socket_path",
]

Handler = Callable[[str, dict[str, Any], str, str], Awaitable[Any]]

SOCKET_NAME = "control.sock"
POINTER_NAME = "control.path"
FLAG_NAME = "HALT"
MAX_REQUEST = 1024 * 1024
MAX_REPLY = 64 * 1024 * 1024
MAX_ACTOR = 200
MAX_REASON = 2000
_REFUSAL_S = 1.0
_MAX_PATH = 100  # sun_path holds 108 bytes on Linux, 104 on macOS
_LOOKING = frozenset(
    [
        "status",
        "tasks",
        "task.show",
        "orders",
        "fills",
        "positions",
        "trades",
        "opportunities",
        "performance",
        "logs",
        "workers",
    ]
)


# --- where the socket is ----------------------------------------------------------------------------


def socket_path(directory: Path) -> Path:
    """Return where a desk with this state directory listens; a path too long for a socket gets a short one."""
    path = directory.resolve() / SOCKET_NAME
    if len(os.fsencode(path)) <= _MAX_PATH:
        return path
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    runtime = os.environ.get("XDG_RUNTIME_DIR") or ""
    base = Path(runtime) if runtime and len(runtime) < 60 else Path("/tmp")
    return base / f"nightdesk-{os.getuid()}" / f"{name}.sock"


def _known_path(directory: Path) -> Path:
    """Where a client looks: the desk may have been started with another runtime directory."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        pointer = (directory / POINTER_NAME).read_text().strip()
        if pointer:
            return Path(pointer)
    return socket_path(directory)


def private_directory(path: Path) -> None:
    """Make a short socket's directory, and refuse one that somebody else has laid out (in /tmp).

    Raises:
        StateNotWritableError: It is there and belongs to, or is open to, somebody else.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid != os.getuid()
        or stat.S_IMODE(found.st_mode) & 0o077
    ):
        raise StateNotWritableError(
            str(path),
            "is not a private directory of this user",
            "Remove it and start again.",
        )


def _peer(connection: Any) -> tuple[int | None, int | None]:
    """Return the process and user at the other end; None where the platform does not say."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None, None
    raw = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    pid, uid, _ = struct.unpack("3i", raw)
    return pid, uid


# --- the desk's end -----------------------------------------------------------------------------------


class ControlServer:
    """Answers requests `{id, verb, arguments, actor, reason}` by `{id, result}` or `{id, error}`.

    Args:
        path: The socket, e.g. `<state>/control.sock`.
        handler: `TradingDesk.command`.
        clock: Times the requests.
        max_clients: More are told so and sent away.
        request_timeout_s: After this the client is told that the command is still under way; it is
            not cancelled, since half a `halt` is worse than a late answer.
        write_timeout_s: A client that does not read its reply for so long is dropped.
        idle_timeout_s: So is one that asks nothing.
    """

    def __init__(
        self,
        path: Path,
        handler: Handler,
        clock: Clock,
        *,
        max_clients: int = 32,
        request_timeout_s: float = 30.0,
        write_timeout_s: float = 5.0,
        idle_timeout_s: float = 300.0,
    ) -> None:
        self._directory = path.parent
        self.path = socket_path(path.parent)
        self._handler = handler
        self._clock = clock
        self._max_clients = max_clients
        self._request_timeout_s = request_timeout_s
        self._write_timeout_s = write_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._server: asyncio.Server | None = None
        self._inode: tuple[int, int] | None = None
        self._clients: set[asyncio.StreamWriter] = set()
        self._commands: set[asyncio.Task[Any]] = set()
        self._conversations: set[asyncio.Task[Any]] = set()
        self._served = self._refused = self._dropped = 0

    async def start(self) -> None:
        """Listen. Whoever calls this holds the lock of the state directory, so a socket that lies there is stale.

        Raises:
            StateNotWritableError: The socket cannot be made.
        """
        try:
            listening = self._bind()
        except OSError as error:
            raise StateNotWritableError(
                str(self.path),
                f"the control socket cannot be made ({error.strerror})",
                "Check the directory's owner.",
            ) from error
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listening, limit=MAX_REQUEST
        )

    def _bind(self) -> socket.socket:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.path.parent != self._directory.resolve():
            private_directory(self.path.parent)
            (self._directory / POINTER_NAME).write_text(f"{self.path}\n")
        else:
            (self._directory / POINTER_NAME).unlink(missing_ok=True)
        if self.path.is_socket():
            self.path.unlink()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(str(self.path))
            self.path.chmod(0o600)
            found = self.path.stat()
            self._inode = (found.st_dev, found.st_ino)
            listening.listen(self._max_clients)
            listening.setblocking(False)
        except BaseException:
            listening.close()
            raise
        return listening

    async def stop(self) -> None:
        """Stop listening, let commands under way end (at most a second), drop the clients, remove the socket."""
        if self._server is not None:
            self._server.close()
        if self._commands:
            await asyncio.wait(self._commands, timeout=1.0)
        for writer in list(self._clients):
            writer.transport.abort()
        if self._conversations:
            await asyncio.wait(self._conversations, timeout=1.0)
        with contextlib.suppress(OSError):
            found = self.path.stat()
            if (found.st_dev, found.st_ino) == self._inode:
                self.path.unlink()
                (self._directory / POINTER_NAME).unlink(missing_ok=True)

    def stats(self) -> dict[str, int]:
        return {
            "clients": len(self._clients),
            "served": self._served,
            "refused": self._refused,
            "dropped": self._dropped,
        }

    # --- one client -------------------------------------------------------------------------------------

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        conversation = asyncio.current_task()
        assert conversation is not None
        conversation.set_name("control")
        self._conversations.add(conversation)
        conversation.add_done_callback(self._conversations.discard)
        refusal = self._refusal(writer)
        if refusal:
            self._refused += 1
            with contextlib.suppress(
                ConnectionError, TimeoutError, ValueError, asyncio.CancelledError
            ):
                # Its question is read first: closing over unread bytes would take the answer with it.
                await asyncio.wait_for(reader.readline(), _REFUSAL_S)
                await self._write(writer, _failure(None, "Refused", refusal, 1))
            writer.close()
            return
        self._clients.add(writer)
        try:
            while await self._answer_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client left, or the desk stops; nobody waits for this conversation
        except TimeoutError:
            self._dropped += 1
            writer.transport.abort()
        finally:
            self._clients.discard(writer)
            writer.close()

    def _refusal(self, writer: asyncio.StreamWriter) -> str:
        _, uid = _peer(writer.get_extra_info("socket"))
        if uid is not None and uid != os.getuid():
            return "only the user who runs the desk may command it"
        if len(self._clients) >= self._max_clients:
            return f"{self._max_clients} clients are connected already; close one and try again"
        return ""

    async def _answer_one(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        try:
            line = await asyncio.wait_for(reader.readline(), self._idle_timeout_s)
        except (
            ValueError
        ):  # longer than the limit: what follows cannot be told apart any more
            await self._write(
                writer,
                _failure(
                    None,
                    "BadRequest",
                    f"the request is longer than {MAX_REQUEST} bytes",
                    2,
                ),
            )
            return False
        if not line:
            return False
        await self._write(writer, await self._reply(line))
        return True

    async def _reply(self, line: bytes) -> bytes:
        try:
            request = msgspec.json.decode(line)
            request_id, verb = request.get("id"), request["verb"]
            arguments, reason = (
                request.get("arguments") or {},
                request.get("reason") or "",
            )
            actor = str(request.get("actor") or "unknown")[:MAX_ACTOR]
            if not (
                isinstance(verb, str)
                and isinstance(arguments, dict)
                and isinstance(reason, str)
            ):
                raise TypeError
        except (
            msgspec.DecodeError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ):
            text = 'expected one line such as {"id": 1, "verb": "status", "arguments": {}, "actor": "me", "reason": ""}'
            return _failure(None, "BadRequest", text, 2)
        self._served += 1
        started = self._clock.monotonic_ns()
        # Looking may wait; a command must not, so it runs in the desk's own lane.
        with lane(Lane.NORMAL if verb in _LOOKING else Lane.DESK):
            command = asyncio.ensure_future(
                self._handler(verb, arguments, actor, reason[:MAX_REASON])
            )
            command.set_name(f"command {verb}"[:60])
        self._commands.add(command)
        command.add_done_callback(self._commands.discard)
        done, _ = await asyncio.wait({command}, timeout=self._request_timeout_s)
        if not done:
            command.add_done_callback(_take_note)
            text = f"{verb!r} is still under way after {self._request_timeout_s:g} s; it goes on. See `nightdesk status`."
            return _failure(request_id, "StillUnderWay", text, 1)
        took_ms = round((self._clock.monotonic_ns() - started) / 1e6, 3)
        return _outcome(request_id, command, took_ms)

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await asyncio.wait_for(writer.drain(), self._write_timeout_s)


def _take_note(command: asyncio.Task[Any]) -> None:
    if not command.cancelled():
        command.exception()  # nobody waits for it any more


def _outcome(request_id: Any, command: asyncio.Task[Any], took_ms: float) -> bytes:
    if command.cancelled():
        return _failure(request_id, "Cancelled", "the desk is stopping", 1)
    error = command.exception()
    if error is None:
        outcome = {"id": request_id, "result": command.result(), "took_ms": took_ms}
        try:
            reply = _as_json(outcome)
        except (
            Exception
        ) as found:  # it came out of a task's memory, which holds anything
            text = f"the reply cannot be written as JSON ({type(found).__name__})"
            return _failure(request_id, "Unprintable", text, 1)
        if len(reply) > MAX_REPLY:
            return _failure(
                request_id,
                "TooLarge",
                "the reply is too large; ask for less with a limit",
                1,
            )
        return reply + b"\n"
    if isinstance(error, NightdeskError):
        return _failure(request_id, type(error).__name__, str(error), error.exit_code)
    return _failure(
        request_id,
        type(error).__name__,
        f"unexpected: {type(error).__name__}: {error}",
        1,
    )


def _failure(request_id: Any, kind: str, message: str, exit_code: int) -> bytes:
    error = {"type": kind, "message": message, "exit_code": exit_code}
    return _as_json({"id": request_id, "error": error}) + b"\n"


def _as_json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value, enc_hook=str)
    except UnicodeEncodeError:
        # Names of files may hold bytes that are no UTF-8; the standard library can say them.
        plain = msgspec.to_builtins(value, enc_hook=str, str_keys=True)
        return json.dumps(plain, default=str).encode()


# --- the operator's end ---------------------------------------------------------------------------------


class RemoteError(NightdeskError):
    """The desk answered with an error; it keeps the type and exit code it had there."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        self.type = str(error.get("type", "Error"))
        self.exit_code = int(error.get("exit_code", 1))
        super().__init__(str(error.get("message", "no message")))


class ControlClient:
    """Asks a running desk, one question at a time, over one connection. Blocking; for commands and threads.

    Args:
        directory: The desk's state directory.
        timeout_s: How long one reply may take.
    """

    def __init__(self, directory: Path, timeout_s: float = 10.0) -> None:
        self.directory = directory
        self.timeout_s = timeout_s
        self.pid: int | None = None
        self._socket: socket.socket | None = None
        self._buffer = b""
        self._count = 0

    def ask(
        self,
        verb: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        actor: str = "",
        reason: str = "",
    ) -> Any:
        """Return the desk's reply.

        Raises:
            DeskNotRunningError: Nobody listens.
            DeskSilentError: The desk is there, the reply is not.
            RemoteError: The desk refused.
        """
        self._count += 1
        request = {
            "id": self._count,
            "verb": verb,
            "arguments": dict(arguments or {}),
            "actor": sayable(actor[:MAX_ACTOR]),
            "reason": sayable(reason[:MAX_REASON]),
        }
        try:
            connection = self._connect()
            connection.sendall(json.dumps(request).encode() + b"\n")
            reply = json.loads(self._line(connection))
        except TimeoutError:
            self.close()
            raise DeskSilentError(
                str(self.directory), verb, self.timeout_s, self.pid
            ) from None
        except (ConnectionError, FileNotFoundError, json.JSONDecodeError):
            self.close()
            raise DeskNotRunningError(str(self.directory)) from None
        if "error" in reply:
            raise RemoteError(reply["error"])
        return reply.get("result")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._buffer = None, b""

    def __enter__(self) -> "ControlClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> socket.socket:
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(self.timeout_s)
            try:
                connection.connect(str(_known_path(self.directory)))
                self.pid, uid = _peer(connection)
            except (
                BlockingIOError
            ):  # so many wait already that the desk cannot be taking them
                connection.close()
                raise TimeoutError from None
            except OSError:
                connection.close()
                raise
            if uid is not None and uid != os.getuid():
                connection.close()
                raise ConnectionRefusedError
            self._socket = connection
        return self._socket

    def _line(self, connection: socket.socket) -> bytes:
        parts = [self._buffer]
        total = len(self._buffer)
        while b"\n" not in parts[-1]:
            chunk = connection.recv(262_144)
            total += len(chunk)
            if not chunk or total > MAX_REPLY + MAX_REQUEST:
                raise ConnectionResetError
            parts.append(chunk)
        line, _, self._buffer = b"".join(parts).partition(b"\n")
        return line


def halt(
    directory: Path, mode: str, *, actor: str, reason: str, timeout_s: float = 2.0
) -> dict[str, Any]:
    """Stop trading: by the socket, and if no answer comes in time, by the flag file that the desk watches.

    The file also holds when no desk runs: the next one starts halted (S-14).

    Returns:
        The desk's reply, or `{"state": "HALTED", "by": "flag file", ...}`.

    Raises:
        StateNotWritableError: Neither way worked.
    """
    client = ControlClient(directory, timeout_s)
    try:
        with client:
            found: dict[str, Any] = client.ask(
                "halt", {"mode": mode}, actor=actor, reason=reason
            )
            return {**found, "by": "desk"}
    except (DeskNotRunningError, DeskSilentError, RemoteError, OSError) as error:
        if isinstance(error, RemoteError) and error.type == CommandError.__name__:
            raise  # no such mode
        # Any other refusal (too many clients, a disk that fails) must not keep a desk trading.
        running = not isinstance(error, DeskNotRunningError)
        path = _raise_flag(directory, mode, actor, reason)
        if running and client.pid:
            # Only a process that listened on our own socket is signalled: anyone else would die of it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(client.pid, signal.SIGUSR1)
        return {
            "version": 1,
            "state": "HALTED",
            "mode": mode,
            "by": "flag file",
            "path": str(path),
            "running": running,
        }


def _raise_flag(directory: Path, mode: str, actor: str, reason: str) -> Path:
    import time

    path = directory / FLAG_NAME
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    body = f"{sayable(reason[:MAX_REASON])} (by {sayable(actor[:MAX_ACTOR])}, {at}, asked to {mode})\n"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=directory, prefix=".halt-")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except OSError as error:
        raise StateNotWritableError(
            str(path),
            f"the halt flag cannot be written ({error.strerror})",
            "Stop the desk by its process id, then look.",
        ) from error
    return path
