"""What commands print: JSON for programs, aligned words for people, and no noise when the reader leaves.

Comes from: cli/
Goes to: cli/
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nightdesk.telemetry.words import visible

__all__ = [
    "clock",
    "complain",
    "guarded",
    "instant",
    "note",
    "number",
    "print_json",
    "say_anything",
    "table",
    "us",
]

_LINES = "\n\t"
_CONTROLS = re.compile("[\x7f-\x9f]")  # JSON escapes the others itself


def say_anything() -> None:
    """Let no character that this terminal does not know end a command; it is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Let `nightdesk ... | head` end quietly: a reader that leaves is no error (F33)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered would fail again when the interpreter exits.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: str) -> None:
    """Say on standard error why a command failed."""
    with contextlib.suppress(OSError, ValueError):
        print(f"nightdesk: {visible(text, keep=_LINES)}", file=sys.stderr)


def note(text: str) -> None:
    """Say on standard error what an operator should know, though nothing failed."""
    with contextlib.suppress(OSError, ValueError):
        print(f"note: {visible(text, keep=_LINES)}", file=sys.stderr)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    text = json.dumps(value, indent=2, default=str, ensure_ascii=False)
    print(_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def table(rows: Iterable[Sequence[Any]], headings: Sequence[str], empty: str) -> None:
    """Print rows in columns; `empty` is said instead when there are none.

    A terminal gets colours and as many columns as fit; a pipe gets whole values.
    """
    lines = [
        ["" if cell is None else visible(str(cell)) for cell in row] for row in rows
    ]
    if not lines:
        print(empty)
        return
    if not sys.stdout.isatty():
        _plain(lines, headings)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(*headings, box=None, header_style="bold", pad_edge=False)
    for line in lines:
        shown.add_row(*map(Text, line))
    Console(highlight=False).print(shown)


def _plain(lines: list[list[str]], headings: Sequence[str]) -> None:
    everything = [list(headings), *lines]
    widths = [
        max(len(line[column]) for line in everything) for column in range(len(headings))
    ]
    for line in everything:
        print(
            "  ".join(
                cell.ljust(width) for cell, width in zip(line, widths, strict=True)
            ).rstrip()
        )


def pairs(facts: Mapping[str, Any]) -> None:
    """Print facts below each other."""
    width = max((len(name) for name in facts), default=0) + 2
    for name, value in facts.items():
        print(visible(f"{name:<{width}}{value}"))


def number(value: Any, digits: int = 8) -> str:
    """Return a decimal string without the zeros nobody needs, in plain notation."""
    if value is None or value == "":
        return "-"
    from decimal import Decimal, InvalidOperation

    try:
        decimal = round(Decimal(str(value)), digits)
    except (InvalidOperation, ValueError):
        return str(value)
    text = f"{decimal:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def us(value: Any) -> str:
    """Return microseconds in the unit that reads best."""
    if not isinstance(value, (int, float)):
        return "-"
    return (
        f"{value:.0f} us"
        if value < 1000
        else f"{value / 1000:.2f} ms"
        if value < 1e6
        else f"{value / 1e6:.2f} s"
    )


def instant(ns: int) -> str:
    """Return nanoseconds since 1970 as an ISO instant, to the second."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(ns // 1_000_000_000, UTC).isoformat()


def clock(value: Any) -> str:
    """Return the time of day of an ISO instant; the date too if it is not today's."""
    if not value:
        return "-"
    from datetime import UTC, datetime

    text = str(value)
    today = datetime.now(UTC).date().isoformat()
    return text[11:19] if text.startswith(today) else text[:19].replace("T", " ")
