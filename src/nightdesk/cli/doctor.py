"""`nightdesk doctor`: is this machine fit for a desk, and is the desk on it well?

Comes from: cli/app.py
Goes to: control.py
"""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Literal, NamedTuple

from nightdesk.cli.connection import Target, state_directory
from nightdesk.cli.output import print_json

__all__ = ["Finding", "doctor"]

_HERE = Target()
_LIBRARIES = (
    "apsw",
    "async-lru",
    "cronsim",
    "cyclopts",
    "msgspec",
    "psutil",
    "pyyaml",
    "rich",
    "sortedcontainers",
    "structlog",
)
_LEAST_SQLITE = (3, 51, 3)
_MB = 1024 * 1024


class Finding(NamedTuple):
    """One line: what was looked at, how it is, and what to do if it is not well."""

    check: str
    result: Literal["ok", "warn", "fail"]
    found: str
    next_step: str = ""


def doctor(*, target: Target = _HERE) -> int:
    """Check Python, libraries, the state directory, the clock, priorities, calendars, and a running desk.

    Exit code 0 if nothing failed (warnings are no failure), else 1.
    """
    findings = list(examine(state_directory(target)))
    if target.json:
        print_json(
            {"version": 1, "findings": [finding._asdict() for finding in findings]}
        )
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            print(f"{finding.result:<5}{finding.check:<{width}}  {finding.found}")
            if finding.next_step:
                print(f"{'':<5}{'':<{width}}  -> {finding.next_step}")
    return 1 if any(finding.result == "fail" for finding in findings) else 0


def examine(directory: Path) -> Iterator[Finding]:
    """Yield every finding; a check that breaks is a finding itself."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _libraries,
        _loop,
        _sqlite,
        lambda: _directory(directory),
        lambda: _space(directory),
        _clock,
        _idle_priority,
        _memory,
        _calendars,
        lambda: _desk(directory),
    ]
    for check in checks:
        try:
            yield check()
        except Exception as error:
            yield Finding(
                getattr(check, "__name__", "check").strip("_<>"),
                "warn",
                f"could not be checked: {error}",
            )


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()} at {sys.executable}")


def _libraries() -> Finding:
    missing = []
    for name in _LIBRARIES:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding(
            "libraries",
            "fail",
            f"missing: {', '.join(missing)}",
            f"pip install {' '.join(missing)}",
        )
    return Finding("libraries", "ok", f"all {len(_LIBRARIES)} found")


def _loop() -> Finding:
    if util.find_spec("uvloop") is None:
        return Finding(
            "uvloop",
            "warn",
            "not installed; asyncio's own loop is used",
            "pip install uvloop",
        )
    return Finding("uvloop", "ok", metadata.version("uvloop"))


def _sqlite() -> Finding:
    import apsw

    version = apsw.sqlite_lib_version()
    if tuple(map(int, version.split(".")[:3])) < _LEAST_SQLITE:
        least = ".".join(map(str, _LEAST_SQLITE))
        return Finding(
            "SQLite",
            "fail",
            version,
            f"needs {least} or newer (older ones may damage a WAL): pip install -U apsw",
        )
    return Finding("SQLite", "ok", f"{version} by apsw {metadata.version('apsw')}")


def _directory(directory: Path) -> Finding:
    existing = directory
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(
            "state directory",
            "fail",
            f"{existing} is not writable",
            "Fix its owner, or pass --state DIR.",
        )
    if not directory.exists():
        return Finding(
            "state directory", "ok", f"{directory} will be made by the first start"
        )
    mode = directory.stat().st_mode & 0o777
    if mode & 0o077:
        return Finding(
            "state directory",
            "warn",
            f"{directory} is open to others ({mode:o})",
            f"chmod 700 {directory}",
        )
    return Finding("state directory", "ok", str(directory))


def _space(directory: Path) -> Finding:
    existing = directory
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    text = f"{free // _MB} MB free"
    if free < 50 * _MB:
        return Finding(
            "disk space",
            "fail",
            text,
            "Free some: without room for an intent no order is sent.",
        )
    if free < 1024 * _MB:
        return Finding("disk space", "warn", text, "Free some; logs and state grow.")
    return Finding("disk space", "ok", text)


def _clock() -> Finding:
    resolution = time.get_clock_info("monotonic").resolution
    if time.time() < 1_704_067_200:
        return Finding(
            "clock",
            "fail",
            f"it says {time.ctime()}",
            "Set it; venues refuse requests with a wrong time.",
        )
    synchronised = (
        Path("/run/systemd/timesync/synchronized").exists()
        or Path("/run/chrony").exists()
    )
    if not synchronised and sys.platform == "linux":
        return Finding(
            "clock",
            "warn",
            "no sign that it is synchronised",
            "Run chrony or systemd-timesyncd before trading live.",
        )
    return Finding("clock", "ok", f"resolution {resolution * 1e9:.0f} ns")


def _idle_priority() -> Finding:
    if not hasattr(os, "SCHED_IDLE"):
        return Finding(
            "idle priority", "warn", "SCHED_IDLE is not there; hosts run at nice 19", ""
        )
    return Finding("idle priority", "ok", f"SCHED_IDLE, {os.cpu_count()} processors")


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    result: Literal["ok", "warn"] = "ok" if free > 512 * _MB else "warn"
    return Finding(
        "memory",
        result,
        f"{free // _MB} MB available",
        "" if result == "ok" else "A desk with one host takes about 200 MB.",
    )


def _calendars() -> Finding:
    if util.find_spec("pandas_market_calendars") is None:
        return Finding(
            "calendars",
            "warn",
            "not installed; tasks run 24/7",
            "pip install 'nightdesk[markets]' for market hours",
        )
    return Finding(
        "calendars",
        "ok",
        f"pandas-market-calendars {metadata.version('pandas-market-calendars')}",
    )


def _desk(directory: Path) -> Finding:
    from nightdesk.control import ControlClient
    from nightdesk.errors import DeskNotRunningError, DeskSilentError
    from nightdesk.telemetry.health import judge

    try:
        with ControlClient(directory, 3.0) as client:
            health = judge(client.ask("status", actor="doctor"))
    except DeskNotRunningError:
        return Finding("desk", "ok", f"none is running in {directory}")
    except DeskSilentError as error:
        return Finding(
            "desk",
            "fail",
            str(error),
            "nightdesk logs; if it does not recover, end the process and start again.",
        )
    text = "; ".join(health.reasons) or "running and well"
    if health.level == "well":
        return Finding("desk", "ok", text)
    return Finding("desk", "warn", f"{health.level}: {text}", "nightdesk status")
