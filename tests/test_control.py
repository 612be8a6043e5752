"""The control socket serves its user, and nobody can hold it up."""

import asyncio
import json
import os
import signal
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from fakes.control import FakeClock
from nightdesk import control
from nightdesk.control import ControlClient, ControlServer, RemoteError, socket_path
from nightdesk.errors import (
    CommandError,
    DeskNotRunningError,
    DeskSilentError,
    StateNotWritableError,
    UnknownTaskError,
)


async def echo(verb: str, arguments: dict[str, Any], actor: str, reason: str) -> Any:
    if verb == "unknown task":
        raise UnknownTaskError("sel", ["sell"])
    if verb == "bug":
        raise ZeroDivisionError("oops")
    if verb == "cancelled":
        raise asyncio.CancelledError
    return {"verb": verb, "arguments": arguments, "actor": actor, "reason": reason}


async def serve(directory: Path, handler: Any = echo, **options: Any) -> ControlServer:
    server = ControlServer(directory / "control.sock", handler, FakeClock(), **options)
    await server.start()
    return server


async def ask(directory: Path, *arguments: Any, **options: Any) -> Any:
    def call() -> Any:
        with ControlClient(directory, options.pop("timeout_s", 5.0)) as client:
            return client.ask(*arguments, **options)

    return await asyncio.to_thread(call)


async def raw(path: Path, data: bytes) -> list[dict[str, Any]]:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(data)
    writer.write_eof()
    replies = (await reader.read()).splitlines()
    writer.close()
    return [json.loads(reply) for reply in replies]


async def test_a_question_is_answered(tmp_path: Path) -> None:
    server = await serve(tmp_path)

    reply = await ask(tmp_path, "orders", {"limit": 5}, actor="me", reason="why not")

    assert reply == {
        "verb": "orders",
        "arguments": {"limit": 5},
        "actor": "me",
        "reason": "why not",
    }
    assert server.stats()["served"] == 1
    await server.stop()


async def test_one_connection_carries_many_questions(tmp_path: Path) -> None:
    server = await serve(tmp_path)

    def both() -> list[Any]:
        with ControlClient(tmp_path) as client:
            return [client.ask("a")["verb"], client.ask("b")["verb"], client.pid]

    assert await asyncio.to_thread(both) == ["a", "b", os.getpid()]
    await server.stop()


async def test_the_socket_is_private_and_goes_with_the_server(tmp_path: Path) -> None:
    server = await serve(tmp_path)

    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    await server.stop()
    assert not server.path.exists()


@pytest.mark.parametrize(
    ("verb", "kind", "exit_code"),
    [
        ("unknown task", "UnknownTaskError", 2),
        ("bug", "ZeroDivisionError", 1),
        ("cancelled", "Cancelled", 1),
    ],
)
async def test_an_error_keeps_its_type_and_exit_code(
    verb: str, kind: str, exit_code: int, tmp_path: Path
) -> None:
    server = await serve(tmp_path)

    with pytest.raises(RemoteError) as caught:
        await ask(tmp_path, verb)

    assert (caught.value.type, caught.value.exit_code) == (kind, exit_code)
    await server.stop()


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"[]",
        b'{"id": 1}',
        b'{"verb": 5}',
        b'{"verb": "a", "arguments": 5}',
        b"\xff",
        b"[" * 5000,
    ],
)
async def test_garbage_is_answered_and_the_next_request_still_works(
    line: bytes, tmp_path: Path
) -> None:
    server = await serve(tmp_path)

    replies = await raw(server.path, line + b'\n{"id": 2, "verb": "a"}\n')

    assert replies[0]["error"]["type"] == "BadRequest"
    assert replies[1]["result"]["verb"] == "a"
    await server.stop()


async def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    server = await serve(tmp_path)
    reader, writer = await asyncio.open_unix_connection(str(server.path), limit=2**22)

    writer.write(b"x" * (control.MAX_REQUEST + 10))
    reply = json.loads(await reader.readline())

    assert "longer than" in reply["error"]["message"]
    writer.close()
    await server.stop()


async def test_one_client_too_many_is_told_so(tmp_path: Path) -> None:
    server = await serve(tmp_path, max_clients=1)
    first = await asyncio.open_unix_connection(str(server.path))
    first[1].write(b'{"verb": "a"}\n')
    await first[0].readline()

    with pytest.raises(RemoteError, match="1 clients are connected"):
        await ask(tmp_path, "status")

    first[1].close()
    await server.stop()
    assert server.stats()["refused"] == 1


async def test_a_client_that_asks_nothing_is_dropped(tmp_path: Path) -> None:
    server = await serve(tmp_path, idle_timeout_s=0.01)
    reader, writer = await asyncio.open_unix_connection(str(server.path))

    assert await reader.read() == b""

    writer.close()
    await server.stop()
    assert server.stats()["dropped"] == 1


async def test_a_client_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    async def much(*_: Any) -> Any:
        return {"text": "x" * 8_000_000}

    server = await serve(tmp_path, much, write_timeout_s=0.05)
    _, writer = await asyncio.open_unix_connection(str(server.path), limit=1024)
    writer.write(b'{"verb": "a"}\n')

    async with asyncio.timeout(10):
        while not server.stats()["dropped"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    writer.close()
    await server.stop()


async def test_a_slow_command_goes_on_after_its_client_was_told(tmp_path: Path) -> None:
    done = asyncio.Event()

    async def slow(*_: Any) -> Any:
        await asyncio.sleep(0.05)
        done.set()
        raise ValueError("nobody waits for this any more")

    server = await serve(tmp_path, slow, request_timeout_s=0.01)

    with pytest.raises(RemoteError, match="still under way") as caught:
        await ask(tmp_path, "halt")

    assert caught.value.type == "StillUnderWay"
    await done.wait()
    await server.stop()


async def test_a_reply_that_is_too_large_is_refused(tmp_path: Path) -> None:
    async def huge(*_: Any) -> Any:
        return {"text": "x" * (control.MAX_REPLY + 1)}

    server = await serve(tmp_path, huge)

    with pytest.raises(RemoteError, match="too large"):
        await ask(tmp_path, "status")
    await server.stop()


# --- where it lies -----------------------------------------------------------------------------------


async def test_a_long_path_gets_a_short_socket_and_a_pointer(tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 30)
    directory.mkdir()

    server = await serve(directory)

    assert len(str(server.path)) <= 100
    assert (directory / "control.path").read_text().strip() == str(server.path)
    assert (await ask(directory, "status"))["verb"] == "status"
    await server.stop()
    assert not (directory / "control.path").exists()


async def test_a_directory_in_tmp_that_others_may_use_is_refused(
    tmp_path: Path,
) -> None:
    open_to_all = tmp_path / "shared"
    open_to_all.mkdir(mode=0o777)
    open_to_all.chmod(0o777)

    with pytest.raises(StateNotWritableError, match="not a private directory"):
        control.private_directory(open_to_all)


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(socket_path(tmp_path)))
    stale.close()

    server = await serve(tmp_path)

    assert (await ask(tmp_path, "status"))["verb"] == "status"
    await server.stop()


async def test_a_directory_that_cannot_hold_a_socket_is_an_error_in_one_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "control.sock").mkdir()

    with pytest.raises(StateNotWritableError, match="control socket cannot be made"):
        await serve(tmp_path)


# --- no desk, or a stuck one ----------------------------------------------------------------------------


def test_no_desk_is_said_with_exit_code_3(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(socket_path(tmp_path)))
    stale.close()

    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(DeskNotRunningError) as caught:
            ControlClient(directory).ask("status")
        assert caught.value.exit_code == 3


def stuck_desk(directory: Path) -> socket.socket:
    """Listens and never answers, as a blocked loop does."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(socket_path(directory)))
    listening.listen(1)
    return listening


def test_a_desk_that_does_not_answer_is_named_with_its_process(tmp_path: Path) -> None:
    with stuck_desk(tmp_path), pytest.raises(DeskSilentError) as caught:
        ControlClient(tmp_path, 0.05).ask("status")

    assert caught.value.pid == os.getpid()


def test_a_full_queue_of_a_stuck_desk_counts_as_silence(tmp_path: Path) -> None:
    with stuck_desk(tmp_path):
        waiting = []
        for _ in range(8):
            one = socket.socket(socket.AF_UNIX)
            one.setblocking(False)
            waiting.append(one)
            try:
                one.connect(str(socket_path(tmp_path)))
            except BlockingIOError:
                break

        with pytest.raises(DeskSilentError):
            ControlClient(tmp_path, 0.05).ask("status")
        for one in waiting:
            one.close()


def test_halt_of_a_stuck_desk_leaves_the_flag_and_signals_it(tmp_path: Path) -> None:
    signals: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: signals.append(number))
    try:
        with stuck_desk(tmp_path):
            found = control.halt(
                tmp_path, "cancel", actor="me", reason="smoke", timeout_s=0.05
            )
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert found["by"] == "flag file"
    assert found["running"] is True
    assert signals == [signal.SIGUSR1]
    assert "smoke (by me, " in (tmp_path / "HALT").read_text()
    assert stat.S_IMODE((tmp_path / "HALT").stat().st_mode) == 0o600


def test_halt_without_a_desk_halts_the_next_one(tmp_path: Path) -> None:
    found = control.halt(tmp_path / "state", "pause", actor="me", reason="x")

    assert (found["by"], found["running"]) == ("flag file", False)
    assert (tmp_path / "state" / "HALT").exists()


def test_halt_that_can_do_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StateNotWritableError, match="halt flag cannot be written"):
        control.halt(tmp_path / "file", "pause", actor="me", reason="x")


async def test_halt_of_a_healthy_desk_goes_by_the_socket(tmp_path: Path) -> None:
    server = await serve(tmp_path)

    found = await asyncio.to_thread(
        control.halt, tmp_path, "pause", actor="me", reason="x"
    )

    assert found["by"] == "desk"
    assert not (tmp_path / "HALT").exists()
    await server.stop()


# --- hostile words --------------------------------------------------------------------------------------


async def test_a_halt_takes_effect_whatever_bytes_its_reason_has(
    tmp_path: Path,
) -> None:
    server = await serve(tmp_path)

    reply = await asyncio.to_thread(
        control.halt, tmp_path, "pause", actor="m\udce9", reason="caf\udce9" * 9000
    )

    assert reply["by"] == "desk"
    assert reply["reason"].startswith("caf\\udce9")
    await server.stop()


def test_a_halt_without_a_desk_takes_any_reason_too(tmp_path: Path) -> None:
    control.halt(tmp_path, "pause", actor="m\udce9", reason="caf\udce9")

    assert "caf\\udce9 (by m\\udce9" in (tmp_path / "HALT").read_text()


async def test_a_desk_that_takes_no_more_clients_still_halts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _: signalled.append(pid))
    server = await serve(tmp_path, max_clients=1)
    _, greedy = await asyncio.open_unix_connection(str(server.path))
    await asyncio.sleep(0.05)

    reply = await asyncio.to_thread(
        control.halt, tmp_path, "pause", actor="me", reason="now"
    )

    assert reply["by"] == "flag file"
    assert (tmp_path / "HALT").exists()
    assert signalled == [os.getpid()]
    greedy.close()
    await server.stop()


async def test_a_mode_that_does_not_exist_is_said_and_halts_nothing(
    tmp_path: Path,
) -> None:
    async def refuse(*_: Any) -> Any:
        raise CommandError("halt mode is 'x'")

    server = await serve(tmp_path, refuse)

    with pytest.raises(RemoteError):
        await asyncio.to_thread(control.halt, tmp_path, "x", actor="me", reason="")

    assert not (tmp_path / "HALT").exists()
    await server.stop()


async def test_a_reply_may_hold_bytes_that_are_no_utf_8(tmp_path: Path) -> None:
    async def odd(*_: Any) -> Any:
        return {"file": "caf\udce9", "n": 10**40}

    server = await serve(tmp_path, odd)

    assert await ask(tmp_path, "x") == {"file": "caf\udce9", "n": 10**40}
    await server.stop()


async def test_a_reply_that_cannot_be_written_is_an_error_and_no_silence(
    tmp_path: Path,
) -> None:
    async def endless(*_: Any) -> Any:
        found: list[Any] = []
        for _ in range(100_000):
            found = [found]
        return found

    server = await serve(tmp_path, endless)

    with pytest.raises(RemoteError, match="cannot be written as JSON"):
        await ask(tmp_path, "x")
    with pytest.raises(RemoteError, match="cannot be written as JSON"):
        await ask(tmp_path, "again")
    await server.stop()
