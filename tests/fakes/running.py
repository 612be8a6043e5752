"""A desk as a real process, for journeys: start it, ask it, stop it, and leave nothing behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Check", "RunningDesk", "nightdesk", "until"]


class Check:
    """Counts what held and what did not, and prints a line for each."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []

    def __call__(self, claim: str, holds: bool, figure: object = "") -> bool:
        words = f"{claim}{f': {figure}' if figure != '' else ''}"
        if holds:
            self.passed += 1
        else:
            self.failed.append(words)
        print(f"  {'ok    ' if holds else 'FAILED'} {words}", flush=True)
        return holds

    def finish(self) -> int:
        print(f"{self.passed} passed, {len(self.failed)} failed")
        return 1 if self.failed or not self.passed else 0


def nightdesk(
    *words: str,
    cwd: Path,
    timeout_s: float = 60.0,
    prefix: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run one command to its end."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "nightdesk", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **(environment or {})},
        check=False,
    )


def until(met: Callable[[], Any], timeout_s: float, pause_s: float = 0.1) -> Any:
    """Return the first true answer of `met`, or its last after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (answer := met()) and time.monotonic() < end:
        time.sleep(pause_s)
    return answer


class RunningDesk:
    """One `nightdesk run`."""

    def __init__(
        self,
        folder: Path,
        *,
        config: str = "desk.yaml",
        state: str = "state",
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        self.state = folder / state
        self.log = folder / "out.log"
        self._out = self.log.open("ab")
        self.begun = time.monotonic()
        command = [sys.executable, "-m", "nightdesk", "run", "-c", config]
        self.process = subprocess.Popen(
            [*prefix, *command, "--state", state, "--no-console"],
            cwd=folder,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._seen: dict[int, psutil.Process] = {}

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.begun

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def ask(self, verb: str, /, **arguments: Any) -> dict[str, Any]:
        """Ask over the control socket; empty while the desk does not answer."""
        from nightdesk.control import ControlClient
        from nightdesk.errors import NightdeskError

        try:
            with ControlClient(self.state, timeout_s=10.0) as client:
                return dict(client.ask(verb, arguments))
        except (NightdeskError, OSError, ValueError):
            return {}

    def until_up(self, timeout_s: float = 30.0) -> bool:
        """Wait until the desk answers; False if it ended or did not in time."""
        return bool(
            until(lambda: not self.is_alive or self.ask("status"), timeout_s)
        ) and (self.is_alive)

    def children(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._seen[child.pid] = child
        return [child for child in self._seen.values() if child.is_running()]

    def resident_mb(self) -> float:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).memory_info().rss / 1e6
        return 0.0

    def stop(self, timeout_s: float = 30.0) -> float:
        """Ask it to end as an operator does, by SIGTERM; return the seconds it took, or infinity."""
        self.children()
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return float("inf")
        return time.monotonic() - begun

    def end(self) -> None:
        """Leave nothing behind."""
        children = self.children()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self._out.close()

    def __enter__(self) -> "RunningDesk":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
