"""Builds paper venues, and starts, finds and ends those in a process of their own.

Comes from: desk.py
Goes to: exchange/options.py, exchange/paper_process.py, venues/paper_remote.py
"""

import asyncio
import hashlib
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from nightdesk.abc import Clock, Venue
from nightdesk.config import Config, VenueConfig
from nightdesk.control import private_directory
from nightdesk.errors import CommandError, ConfigError, QueryFailedError
from nightdesk.exchange.options import (
    ProcessConfig,
    build_local,
    instruments_of,
    read_options,
)
from nightdesk.kernel.clock import SystemClock
from nightdesk.venues.paper_remote import PaperRemoteVenue

__all__ = [
    "build_paper_venue",
    "ensure_paper_process",
    "socket_path",
    "stop_paper_process",
]

_POLL_S = 0.05
_MAX_SOCKET_PATH = 100  # the kernel's limit is 108 with the final zero
_started: list[subprocess.Popen[bytes]] = []
"""Kept so that the interpreter reaps them when they end before we do."""


async def build_paper_venue(
    entry: VenueConfig, config: Config, directory: Path | None
) -> Venue:
    """Return a paper venue, not yet started; its files lie in `directory/venues/<name>`.

    With `process: own` it lives in a process that is started now if it does not run, and that goes
    on when the desk is killed; what comes back is the desk's end of the line.

    Args:
        entry: The venue's entry of the configuration.
        config: The desk's, for the seed.
        directory: The state directory; None, or a memory store, keeps nothing.

    Raises:
        ConfigError: An option cannot be used.
        CommandError: The process would not start; with the end of its log.
    """
    options = read_options(entry)
    keeps = directory is not None and config.state.store != "memory"
    home = directory / "venues" / entry.name if directory is not None else None
    if options.process == "desk":
        if options.feeds:
            raise ConfigError(
                f"venue {entry.name!r}",
                [
                    "`feeds` goes with `process: own`; in the desk, list them as sources."
                ],
            )
        return build_local(entry, options, home if keeps else None)
    if home is None or not keeps or config.virtual_time:
        raise ConfigError(
            f"venue {entry.name!r}",
            [
                "`process: own` needs a state directory, a store that keeps, and real time. Use `process: desk`."
            ],
        )
    path = await ensure_paper_process(entry, home, seed=config.seed)

    async def ensure() -> None:
        await ensure_paper_process(entry, home, seed=config.seed)

    return PaperRemoteVenue(
        entry.name,
        instruments=instruments_of(entry, options),
        socket=path,
        ensure=ensure,
        expiry_s=options.expiry_s,
        index_lag_s=options.faults.index_lag_s,
    )


def socket_path(directory: Path) -> Path:
    """Return where the venue of `directory` listens: in it, or in the temporary directory if that is too long."""
    path = directory.resolve() / "exchange.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        return path
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"nightdesk-{os.getuid()}" / f"{digest}.sock"


def _keep_private(path: Path, directory: Path) -> None:
    """Whoever could listen there in the venue's stead would tell this desk its fills."""
    if path.parent != directory.resolve():
        private_directory(path.parent)


async def ensure_paper_process(
    entry: VenueConfig, directory: Path, *, seed: int = 1, start_timeout_s: float = 15.0
) -> Path:
    """Return the socket of the venue's process, which is started if nobody answers there.

    Raises:
        StateNotWritableError: The place of its socket belongs to somebody else.
        CommandError: It ended again, or did not answer in time; with the end of its log.
    """
    path = socket_path(directory)
    _keep_private(path, directory)
    if await _answers(entry.name, path):
        return path
    process = await asyncio.to_thread(_spawn, entry, directory, path, seed)
    deadline = asyncio.get_running_loop().time() + start_timeout_s
    while not await _answers(entry.name, path):
        code = process.poll()
        # 4 says that another starter was quicker: its process is the one to wait for.
        if (
            code is not None and code != 4
        ) or asyncio.get_running_loop().time() > deadline:
            state = (
                "did not answer in time" if code is None else f"ended with code {code}"
            )
            log = await asyncio.to_thread(_end_of_log, directory)
            raise CommandError(
                f"the process of paper venue {entry.name!r} {state}.{log}"
            )
        await asyncio.sleep(_POLL_S)
    return path


async def stop_paper_process(
    name: str, socket: Path, *, timeout_s: float = 10.0
) -> bool:
    """End the venue's process if it runs; return whether it is gone."""
    venue = _line_to(name, socket)
    try:
        await venue.start(lambda _: None, _CLOCK, random.Random(0))
        if not venue.is_connected:
            return True
        await venue.shut_down()
    except QueryFailedError:
        pass
    finally:
        await venue.stop()
    deadline = asyncio.get_running_loop().time() + timeout_s
    while await _answers(name, socket):
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(_POLL_S)
    return True


_CLOCK: Clock = SystemClock()


async def _answers(name: str, path: Path) -> bool:
    if not await asyncio.to_thread(path.exists):
        return False
    venue = _line_to(name, path)
    try:
        await venue.start(lambda _: None, _CLOCK, random.Random(0))
        await venue.venue_time_ns()
    except QueryFailedError:
        return False
    finally:
        await venue.stop()
    return True


def _line_to(name: str, path: Path) -> PaperRemoteVenue:
    return PaperRemoteVenue(
        name, instruments=[], socket=path, timeout_s=1.0, connect_timeout_s=0.2
    )


def _spawn(
    entry: VenueConfig, directory: Path, socket: Path, seed: int
) -> "subprocess.Popen[bytes]":
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    config = directory / "exchange.json"
    content = msgspec.json.format(
        msgspec.json.encode(
            ProcessConfig(venue=entry, directory=str(directory), seed=seed),
            enc_hook=_as_text,
        )
    )
    with _private(config) as stream:
        stream.truncate()
        stream.write(content)
    command = [
        sys.executable,
        "-P",  # a file of the working directory must not pass for a library
        "-m",
        "nightdesk.exchange.paper_process",
        "--config",
        str(config),
        "--socket",
        str(socket),
    ]
    with _private(directory / "exchange.log", os.O_APPEND) as log:
        # A session of its own: neither the desk's signals nor its end reach it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            close_fds=True,
        )
    _started[:] = [each for each in _started if each.poll() is None]
    _started.append(process)
    return process


def _private(path: Path, flags: int = 0) -> Any:
    return os.fdopen(
        os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600
        ),
        "wb",
    )


def _as_text(value: Any) -> str:
    return str(value)


def _end_of_log(directory: Path) -> str:
    try:
        lines = (
            (directory / "exchange.log").read_text(errors="replace").splitlines()[-5:]
        )
    except OSError:
        return ""
    return "".join(f"\n  {line}" for line in lines)
