"""What every benchmark says of its samples, and of the machine they come from."""

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["figures", "machine", "stillness", "table"]

_GAP_S = 50e-6
_PACKAGES = ("uvloop", "msgspec", "apsw", "apscheduler")


def figures(samples: Iterable[float]) -> dict[str, float | int]:
    """Return sample count, p50, p99, p99.9 and maximum, in the unit of `samples`."""
    ordered = sorted(samples)
    if not ordered:
        return {"n": 0}

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 3)

    return {
        "n": len(ordered),
        "p50": at(0.5),
        "p99": at(0.99),
        "p99.9": at(0.999),
        "max": round(ordered[-1], 3),
    }


def machine() -> dict[str, Any]:
    """Return what a reader must know to compare figures: processor, system, versions, load."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "implementation": sys.implementation.name,
        "versions": versions,
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def stillness(seconds: float = 0.5) -> dict[str, float]:
    """Return how much of `seconds` this machine took from a process that only looks at the clock.

    Latencies beyond the worst gap are the program's; those below it may well be the machine's.
    """
    gaps = []
    now = time.perf_counter()
    end = now + seconds
    while now < end:
        before, now = now, time.perf_counter()
        if now - before > _GAP_S:
            gaps.append(now - before)
    return {
        "lost_share": round(sum(gaps) / seconds, 4),
        "worst_gap_us": round(max(gaps, default=0.0) * 1e6, 1),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return `rows` as aligned text; numbers to the right."""
    cells = [list(head), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 or not cell[:1].isdigit() else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _text(cell: object) -> str:
    return f"{cell:,.1f}" if isinstance(cell, float) else str(cell)
