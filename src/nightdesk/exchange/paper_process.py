"""The paper venue as a process: `python -m nightdesk.exchange.paper_process --config FILE --socket PATH`.

Comes from: exchange/building.py
Goes to: exchange/server.py
"""

import argparse
import asyncio
import fcntl
import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from nightdesk.errors import NightdeskError, StateLockedError
from nightdesk.exchange.options import (
    ProcessConfig,
    build_feed,
    build_local,
    dice,
    read_options,
)
from nightdesk.exchange.server import PaperServer
from nightdesk.kernel.clock import SystemClock

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until told to stop; return the exit code (4: another process serves this venue)."""
    parser = argparse.ArgumentParser(
        prog="nightdesk.exchange.paper_process", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        help="JSON as written by the desk (exchange.json)",
    )
    parser.add_argument(
        "--socket", type=Path, required=True, help="Unix socket to listen on"
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    try:
        config = msgspec.json.decode(given.config.read_bytes(), type=ProcessConfig)
        with _Lock(Path(config.directory)):
            asyncio.run(_serve(config, given.socket))
    except NightdeskError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (OSError, msgspec.MsgspecError) as error:
        print(f"{given.config}: {error}", file=sys.stderr)
        return 2
    return 0


async def _serve(config: ProcessConfig, socket: Path) -> None:
    options = read_options(config.venue)
    venue = build_local(config.venue, options, Path(config.directory))
    feeds = [
        build_feed(venue.name, entry, number)
        for number, entry in enumerate(options.feeds)
    ]
    server = PaperServer(
        venue,
        feeds,
        socket,
        SystemClock(),
        partial(dice, config.seed),
        options.idle_exit_s,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.end)
    try:
        await server.start()
        await server.run()
    finally:
        await server.stop()


class _Lock:
    """One process per venue: a lock on its pid file, which ends with the process however it ends."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "exchange.pid"
        self._descriptor = -1

    def __enter__(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._descriptor = os.open(
            self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(self._descriptor, 20).decode(errors="replace").strip()
            os.close(self._descriptor)
            pid = int(owner) if owner.isdigit() else None
            raise StateLockedError(
                str(self._path.parent), pid, "this machine", "earlier"
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def __exit__(self, *_: object) -> None:
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


if __name__ == "__main__":
    sys.exit(main())
