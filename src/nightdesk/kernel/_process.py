"""One background host as the desk sees it: a child process, its page, its socket, its vital signs.

Comes from: kernel/hosts.py
Goes to: host.py
"""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

import nightdesk
from nightdesk.abc import Clock
from nightdesk.kernel._pulse import Page, new_shared_file

__all__ = ["HostProcess", "spawn"]

_STACK_BYTES = 4000
_STACK_POLLS = 100
_TAIL_BYTES = 4000
_READ_BYTES = 64 * 1024
_MAX_LOOK_S = 0.25
_MAX_STARVED = 4.0
_OPTIONS = ("--fd", "--page", "--stack", "--parent")
# Libraries for arrays start a thread per core of the machine unless somebody says otherwise.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)


class HostProcess:
    """A child process that is watched from outside. Nothing here waits for its cooperation."""

    def __init__(
        self, process: subprocess.Popen[bytes], page: Page, stack: int, clock: Clock
    ) -> None:
        self.pid = process.pid
        self.page = page
        self._process = process
        self._stack = stack
        self._clock = clock
        self._seen_beat = 0
        self._looked_ns = clock.monotonic_ns()
        self._still_s = 0.0
        self._starved_s = 0.0
        self._schedule: tuple[int, int] | None = None
        self._output = b""
        self._psutil: psutil.Process | None = None
        self.is_closed = False

    # vital signs

    def exit_code(self) -> int | None:
        """Return how the process ended (-9: killed by signal 9), or None while it lives."""
        return self._process.poll()

    def look(self) -> None:
        """Take the pulse. Call it every tenth of a second."""
        now = self._clock.monotonic_ns()
        # The desk itself may have been suspended between two looks, and the host with it.
        passed = min((now - self._looked_ns) / 1e9, _MAX_LOOK_S)
        self._looked_ns = now
        beat = self.page.beat_ns
        if beat != self._seen_beat:
            self._seen_beat = beat
            self._still_s = self._starved_s = 0.0
            self._schedule = None
            return
        self._still_s += passed
        self._starved_s += min(passed, self._starved(passed))

    @property
    def still_s(self) -> float:
        """For how long the host's loop has not gone round, by its own fault.

        A host runs at idle priority. While the desk and others use every core it stands still and is
        not to blame, so the time it waited for a core does not count, up to a limit.
        """
        return max(self._still_s - self._starved_s, self._still_s / _MAX_STARVED)

    def _starved(self, passed_s: float) -> float:
        try:
            ran, waited, state = self._read_schedule()
        except (OSError, ValueError):
            return 0.0
        before, self._schedule = self._schedule, (ran, waited)
        if before is None:
            return 0.0
        starved = (waited - before[1]) / 1e9
        if state == "R":  # the wait that has not ended yet is not in the figures
            starved = max(starved, passed_s - (ran - before[0]) / 1e9)
        return max(0.0, starved)

    def _read_schedule(self) -> tuple[int, int, str]:
        """Return how long the loop's thread ran, how long it waited for a core, and its state."""
        ran, waited, _ = Path(f"/proc/{self.pid}/schedstat").read_text().split()
        status = Path(f"/proc/{self.pid}/stat").read_text()
        return int(ran), int(waited), status.rpartition(")")[2].split()[0]

    def resident_bytes(self) -> int:
        """Return the memory it holds; 0 when it is gone."""
        try:
            if self._psutil is None:
                self._psutil = psutil.Process(self.pid)
            return int(self._psutil.memory_info().rss)
        except (psutil.Error, OSError):
            return 0

    def cpu_s(self) -> float:
        """Return the processor time it used; 0 when it is gone."""
        try:
            times = psutil.Process(self.pid).cpu_times()
        except (psutil.Error, OSError):
            return 0.0
        return float(times.user + times.system)

    # what it says

    def read_output(self) -> list[str]:
        """Return what its tasks printed since the last call, at most 64 KiB at a time.

        A task that prints without end fills the pipe and then waits for us: 640 KiB/s at most.
        """
        pipe = self._process.stdout
        if pipe is None or pipe.closed:
            return []
        try:
            data = os.read(pipe.fileno(), _READ_BYTES)
        except BlockingIOError:
            return []
        self._output = (self._output + data)[-_TAIL_BYTES:]
        return data.decode(errors="replace").splitlines()

    def last_words(self) -> str:
        """Return what a process that died left behind: its fatal error, else the end of its output."""
        self.read_output()
        fatal = self._read_stack()
        return fatal or self._output.decode(errors="replace")

    async def stack(self) -> str:
        """Return where every thread stands now, the loop's first; "" if it did not answer in time.

        The signal's handler is C code and takes no lock, so it answers for a host that is deaf to
        everything else, native code that holds the interpreter's lock included.
        """
        with contextlib.suppress(OSError):
            os.ftruncate(self._stack, 0)
            os.kill(self.pid, signal.SIGUSR2)
        size = 0
        for _ in range(
            _STACK_POLLS
        ):  # at idle priority on a busy machine it takes its time
            await self._clock.sleep(0.01)
            before, size = size, os.fstat(self._stack).st_size
            if size and size == before:
                break
        return self._read_stack() or ""

    def _read_stack(self) -> str:
        text = (
            os.pread(self._stack, 16 * _STACK_BYTES, 0).decode(errors="replace").strip()
        )
        at = text.find("Current thread")
        if at > 0:
            text = f"{text[at:]}\n\n{text[:at]}"
        return text[:_STACK_BYTES].strip()

    # its end

    def kill(self) -> None:
        """End it now."""
        with contextlib.suppress(OSError):
            self._process.kill()

    async def gone(self, timeout_s: float) -> bool:
        """Wait until it has ended; return whether it has."""
        until = self._clock.monotonic_ns() + int(timeout_s * 1e9)
        while self.exit_code() is None:
            if self._clock.monotonic_ns() > until:
                return False
            await self._clock.sleep(0.01)
        return True

    def close(self) -> None:
        """Give back its page and descriptors."""
        if self.is_closed:
            return
        self.is_closed = True
        self.page.close()
        os.close(self._stack)
        if self._process.stdout is not None:
            self._process.stdout.close()


def spawn(clock: Clock, *, is_idle: bool = True) -> tuple[HostProcess, socket.socket]:
    """Start a host and return it with our end of its socket.

    A new interpreter, no fork: it inherits three descriptors and nothing else, in particular not the
    lock of the state directory (R-21). A process group of its own keeps Ctrl-C for the desk.

    Raises:
        OSError: The machine has no process, memory or descriptor left.
    """
    ours, theirs = socket.socketpair()
    page = new_shared_file("nightdesk-page")
    stack = new_shared_file("nightdesk-stack")
    try:
        fcntl.fcntl(stack, fcntl.F_SETFL, os.O_APPEND)
        shared_page = Page(page)
        descriptors = (theirs.fileno(), page, stack)
        command = [sys.executable, "-P", "-m", "nightdesk.host"]
        for name, value in zip(_OPTIONS, (*descriptors, os.getpid()), strict=True):
            command += [name, str(value)]
        if not is_idle:
            command.append("--no-idle")
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=descriptors,
            close_fds=True,
            process_group=0,
            env={
                **_ONE_THREAD,
                **os.environ,
                "PYTHONPATH": _python_path(),
                "PYTHONUNBUFFERED": "1",
            },
        )
    except BaseException:
        ours.close()
        os.close(stack)
        raise
    finally:
        theirs.close()
        os.close(page)
    if is_idle:
        _make_idle(process.pid)
    if process.stdout is not None:
        os.set_blocking(process.stdout.fileno(), False)
    return HostProcess(process, shared_page, stack, clock), ours


def _python_path() -> str:
    """Make sure that the child finds this very package, however this process found it."""
    home = str(Path(nightdesk.__file__).parents[1])
    return os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))


def _make_idle(pid: int) -> None:
    """Lower its priority before its imports begin; it does the same itself where we may not."""
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
