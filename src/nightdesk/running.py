"""One desk as a process: loop, signals, control socket, live view, exit code.

Comes from: cli/, config.py
Goes to: desk.py, control.py
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

from nightdesk import wiring
from nightdesk.config import Config
from nightdesk.control import ControlServer
from nightdesk.desk import TradingDesk
from nightdesk.kernel.loop import in_lanes, new_event_loop
from nightdesk.simulation.virtual import VirtualClock, VirtualLoop

__all__ = ["run"]

View = Callable[[TradingDesk], Awaitable[None]]
_SETTLE_S = 5.0
"""Virtual seconds that a desk goes on after the last event of its recordings, so that replies in flight arrive."""
_GRACE_S = 1.9
"""Beyond `kernel.stop_timeout_s`, after which an ordinary stop has left what would not end."""


def run(config: Config, *, view: View | None = None) -> int:
    """Run a desk until it is told to stop, or its recordings end; return the exit code.

    Raises:
        NightdeskError: It could not start; `exit_code` of the error is the process's.
    """
    if config.virtual_time:
        virtual = cast(VirtualLoop, in_lanes(VirtualLoop)(config.seed))
        clock = VirtualClock(virtual, wiring.start_of_recordings(config))
        loop: asyncio.AbstractEventLoop = virtual
        desk = TradingDesk(config, loop, clock)
    else:
        loop = new_event_loop(config.kernel.loop, config.kernel.slice_us)
        desk = TradingDesk(config, loop)
    asyncio.set_event_loop(loop)
    stuck = True
    over = threading.Event()
    try:
        stuck = bool(loop.run_until_complete(_live(desk, view, over)))
        return desk.exit_code
    finally:
        stuck = not _finish(loop) or stuck
        over.set()
        asyncio.set_event_loop(None)
        if stuck and desk.left_behind:
            # A task that swallows cancellation would keep the interpreter waiting for ever. Everything
            # durable is on disk, so the process may end here (F23).
            sys.stdout.flush()
            os._exit(desk.exit_code)


def _finish(loop: asyncio.AbstractEventLoop) -> bool:
    """Cancel what is left, wait a moment, close the loop. False: something would not end."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    pending: set[asyncio.Task[object]] = set()
    if left:
        _, pending = loop.run_until_complete(asyncio.wait(left, timeout=1.0))
    loop.run_until_complete(loop.shutdown_asyncgens())
    if not pending:
        loop.close()
    return not pending


async def _live(
    desk: TradingDesk, view: View | None, over: threading.Event
) -> list[str]:
    server: ControlServer | None = None
    showing: asyncio.Task[None] | None = None
    try:
        try:
            await desk.start()
        except BaseException:
            await desk.abandon()
            raise
        if not desk.config.virtual_time:
            _listen_to_signals(desk, over)
            server = ControlServer(
                Path(desk.config.state.directory) / "control.sock",
                desk.command,
                desk.clock,
            )
            await server.start()
            if view is not None:
                showing = asyncio.ensure_future(view(desk))
        await _until_done(desk)
    finally:
        if showing is not None:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
        if desk.ready:
            desk.left_behind = await desk.stop()
        if server is not None:
            await server.stop()
    return desk.left_behind


async def _until_done(desk: TradingDesk) -> None:
    if not desk.config.virtual_time:
        await desk.stopping.wait()
        return
    while not desk.inputs_finished and not desk.stopping.is_set():
        await desk.clock.sleep(1.0)
    await desk.clock.sleep(_SETTLE_S)


def _listen_to_signals(desk: TradingDesk, over: threading.Event) -> None:
    loop = asyncio.get_running_loop()
    asked = threading.Event()

    def stop(name: str) -> None:
        if not desk.stopping.is_set():
            desk.log.info("stopping", signal=name)
            desk.stopping.set()

    def count(number: int, _: object) -> None:
        """Runs between two instructions of whatever runs, so also when a task holds the loop."""
        if asked.is_set():
            _leave(desk, f"second {signal.Signals(number).name}")
        asked.set()
        threading.Thread(target=_insist, args=(desk, over), daemon=True).start()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, signal.Signals(number).name)
        # The loop is still told, by its wake-up socket; this replaces the handler that does nothing.
        signal.signal(number, count)
        signal.siginterrupt(number, False)
    loop.add_signal_handler(signal.SIGUSR1, desk.look_at_flag_file)


def _insist(desk: TradingDesk, over: threading.Event) -> None:
    """End a desk that cannot stop because a task does not give the loop back."""
    if not over.wait(desk.config.kernel.stop_timeout_s + _GRACE_S):
        _leave(desk, "a task holds the loop and the time to stop is over")


def _leave(desk: TradingDesk, why: str) -> None:
    """End the process now, as `kill -9` would; the next start takes up what is on disk."""
    with contextlib.suppress(OSError):
        os.write(
            2,
            f"nightdesk: leaving at once: {why}. Everything acknowledged is on disk.\n".encode(),
        )
    os._exit(desk.exit_code)
