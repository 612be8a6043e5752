"""One tree of plain values, each with the place it came from, and the list of what is wrong with it.

Comes from: loading/document.py, loading/overlays.py
Goes to: loading/check.py
"""

import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from nightdesk.errors import ConfigError

__all__ = ["Key", "Place", "Problems", "RawText", "Tree", "path_text", "plain_scalar"]

MAX_DIGITS = 100
_MOST_PROBLEMS = 1_000

Key = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+\Z")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?\Z")
_CONSTANTS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands: a file and line, a variable of the environment, or a flag."""

    origin: str
    line: int | None = None


class RawText(str):
    """A value given as text outside the file; it becomes a number or a flag only where one is expected."""

    __slots__ = ()


class Problems:
    """Everything that is wrong, in the order of the file, to be told at once."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self._found: dict[tuple[Place, str], None] = {}

    def add(self, place: Place, text: str) -> None:
        self._found[place, text] = None

    def __bool__(self) -> bool:
        return bool(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def lines(self) -> list[str]:
        """Return one line per problem, each beginning with its place; the first thousand will do."""
        ordered = sorted(
            self._found,
            key=lambda item: (item[0].origin != self.origin, item[0].line or 0),
        )
        lines = [
            f"{place.origin}: {_at(place)}{text}"
            for place, text in ordered[:_MOST_PROBLEMS]
        ]
        hidden = len(ordered) - len(lines)
        return [*lines, f"{self.origin}: and {hidden} more."] if hidden else lines

    def error(self) -> ConfigError:
        """Return them as one exception."""
        if all(place.origin == self.origin for place, _ in self._found):
            return ConfigError(
                self.origin,
                [line.removeprefix(f"{self.origin}: ") for line in self.lines()],
            )
        return ConfigError("configuration", self.lines())


def _at(place: Place) -> str:
    return f"line {place.line}: " if place.line is not None else ""


@dataclass
class Tree:
    """Plain values, and the place of every key in them."""

    value: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)
    origin: str = "desk.yaml"

    def place(self, path: Key) -> Place:
        """Return where `path` stands, or the nearest thing around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return Place(self.origin)

    def put(self, path: Key, value: Any, place: Place) -> None:
        """Set `value` at `path`; mappings on the way are made, existing list items are walked into."""
        node: Any = self.value
        for depth, part in enumerate(path[:-1], start=1):
            below = node[part] if isinstance(part, int) else node.get(part)
            if not isinstance(below, (dict, list)):
                below = node[part] = {}
                self.places[path[:depth]] = place
            node = below
        node[path[-1]] = value
        for known in [k for k in self.places if k[: len(path)] == path]:
            del self.places[known]
        self.places[path] = place


def path_text(path: Key) -> str:
    """Return a path as an operator writes it: `tasks[3].type`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def plain_scalar(text: str) -> Any:
    """Return what an unquoted scalar means; a fraction becomes a `Decimal`, so that no digit of it is lost."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) <= MAX_DIGITS:
        if _INT.match(text):
            return int(text)
        if _NUMBER.match(text):
            return Decimal(text)
    return text
