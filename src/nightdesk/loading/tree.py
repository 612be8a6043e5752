"""`desk.yaml`, the environment and the flags as one tree of plain values, each with the place it came from.

PyYAML only composes the nodes here: keys keep their lines, nothing is ever built from a tag, and
`on`, `09:15` and `0.1` mean what they look like (YAML 1.1 reads them as true, 555 and a binary float).

Comes from: cli/
Goes to: loading/check.py
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from nightdesk.errors import ConfigError
from nightdesk.loading.words import nearest

__all__ = [
    "ENVIRONMENT_PREFIX",
    "Key",
    "Place",
    "Problems",
    "RawText",
    "Tree",
    "overlay_environment",
    "overlay_flags",
    "parse_yaml",
    "path_text",
    "read_file",
]

MAX_BYTES = 1024 * 1024
MAX_NODES = 100_000
MAX_DEPTH = 40
MAX_DIGITS = 100
ENVIRONMENT_PREFIX = "NIGHTDESK__"

Key = tuple[str | int, ...]

_CORE_TAG = "tag:yaml.org,2002:"
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
        self._found: list[tuple[Place, str]] = []

    def add(self, place: Place, text: str) -> None:
        if (place, text) not in self._found:
            self._found.append((place, text))

    def __bool__(self) -> bool:
        return bool(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def lines(self) -> list[str]:
        """Return one line per problem, each beginning with its place."""
        ordered = sorted(
            self._found,
            key=lambda item: (item[0].origin != self.origin, item[0].line or 0),
        )
        return [f"{place.origin}: {_at(place)}{text}" for place, text in ordered]

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


# --- the file ---------------------------------------------------------------------------------------


def read_file(path: Path, problems: Problems) -> Tree:
    """Read and parse one file.

    Raises:
        ConfigError: It cannot be read at all, or is no YAML; nothing after that can be told.
    """
    origin = problems.origin
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(origin, [_missing(path)]) from None
    except IsADirectoryError:
        raise ConfigError(
            origin, ["is a directory, expected a YAML file. Name the file inside it."]
        ) from None
    except OSError as error:
        raise ConfigError(
            origin,
            [f"cannot be read: {error.strerror}. Check its owner and permissions."],
        ) from None
    if len(data) > MAX_BYTES:
        raise ConfigError(
            origin,
            [f"is larger than {MAX_BYTES // 1024} KiB, expected a desk, not its data."],
        )
    try:
        return parse_yaml(data.decode("utf-8-sig"), problems)
    except UnicodeDecodeError as error:
        raise ConfigError(
            origin, [f"byte {error.start} is no UTF-8. Save the file as UTF-8 text."]
        ) from None


def _missing(path: Path) -> str:
    if path.name in ("arbitrum", "base", "polygon"):
        return f"no such file. `-c` names the configuration here; chains are `--chain {path.name}`."
    return (
        "no such file. Write one with `nightdesk new-config`, or try `nightdesk demo`."
    )


def parse_yaml(text: str, problems: Problems) -> Tree:
    """Parse one document. Duplicate keys, tags and bombs become problems.

    Raises:
        ConfigError: It is no YAML.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        # The library's own text quotes the lines around the error, which may hold a secret.
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problems.add(
            Place(problems.origin, line), f"no valid YAML: {_harmless(error.problem)}."
        )
        raise problems.error() from None
    except yaml.YAMLError as error:
        where = (
            f" at character {error.position}"
            if isinstance(error, yaml.reader.ReaderError)
            else ""
        )
        problems.add(
            Place(problems.origin),
            f"no valid YAML: a character that text may not hold{where}.",
        )
        raise problems.error() from None
    except RecursionError:
        problems.add(
            Place(problems.origin), f"is nested deeper than {MAX_DEPTH} levels."
        )
        raise problems.error() from None
    tree = Tree(origin=problems.origin)
    if node is None:
        return tree
    if not isinstance(node, yaml.MappingNode):
        problems.add(
            Place(problems.origin, node.start_mark.line + 1),
            "expected keys such as `tasks:` here.",
        )
        raise problems.error()
    tree.value = _Builder(tree, problems).mapping(node, (), 0)
    return tree


def _harmless(problem: str | None) -> str:
    """Return the parser's words without anything it quotes longer than a character."""
    return re.sub(r"(['\"])(?:(?!\1).){2,}\1", "(text)", problem or "unknown trouble")


class _Builder:
    """Turns nodes into plain values, within bounds that no alias can multiply."""

    def __init__(self, tree: Tree, problems: Problems) -> None:
        self._tree = tree
        self._problems = problems
        self._nodes = 0

    def mapping(self, node: yaml.MappingNode, path: Key, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self._problems.add(
                    place, f"`{path_text(path)}` has a key that is no plain word."
                )
                continue
            if key_node.tag == f"{_CORE_TAG}merge":
                merged.update(self._merge(value_node, path, depth))
                continue
            key = key_node.value
            here = (*path, key)
            if key in found:
                first = self._tree.places[here].line
                self._problems.add(
                    place,
                    f"`{path_text(here)}` stands here a second time; the first is in line {first}.",
                )
                continue
            self._tree.places[here] = place
            found[key] = self.value(value_node, here, depth + 1)
        for key, value in merged.items():
            if key not in found:
                found[key] = value
        return found

    def _merge(self, node: yaml.Node, path: Key, depth: int) -> dict[str, Any]:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for part in reversed(parts):
            if isinstance(part, yaml.MappingNode):
                merged.update(self.mapping(part, (*path, "<<"), depth + 1))
            else:
                self._problems.add(
                    self._place(part), "`<<` expects the alias of a mapping."
                )
        return merged

    def value(self, node: yaml.Node, path: Key, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            bound = (
                f"{MAX_NODES} values"
                if self._nodes > MAX_NODES
                else f"{MAX_DEPTH} levels"
            )
            self._problems.add(
                Place(self._problems.origin),
                f"holds more than {bound} once its aliases are followed.",
            )
            raise self._problems.error()
        if isinstance(node, yaml.MappingNode) and self._allowed(node, "map"):
            return self.mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode) and self._allowed(node, "seq"):
            items = []
            for index, item in enumerate(node.value):
                self._tree.places[(*path, index)] = self._place(item)
                items.append(self.value(item, (*path, index), depth + 1))
            return items
        return self._scalar(node) if isinstance(node, yaml.ScalarNode) else None

    def _allowed(self, node: yaml.Node, kind: str) -> bool:
        if node.tag == f"{_CORE_TAG}{kind}":
            return True
        self._problems.add(
            self._place(node), "has a YAML tag (`!...`); only plain values are read."
        )
        return False

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if not node.tag.startswith(_CORE_TAG) or ":python" in node.tag:
            self._allowed(node, "str")
            return None
        if node.style is not None:  # quoted or a block: text, whatever it looks like
            return node.value
        return plain_scalar(node.value)

    def _place(self, node: yaml.Node) -> Place:
        return Place(self._problems.origin, node.start_mark.line + 1)


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


# --- environment and flags ----------------------------------------------------------------------------


def overlay_environment(
    tree: Tree,
    environment: Mapping[str, str],
    problems: Problems,
    sections: Iterable[str],
) -> None:
    """Put every `NIGHTDESK__SECTION__KEY` over the file. Entries of lists are named by their name or id."""
    known = list(sections)
    for name in sorted(environment):
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        place = Place(f"environment variable {name}")
        parts = [
            part.lower() for part in name.removeprefix(ENVIRONMENT_PREFIX).split("__")
        ]
        if parts[0] not in known:
            near = nearest(parts[0], known)
            hint = (
                f" Did you mean {ENVIRONMENT_PREFIX}{near.upper()}?"
                if near
                else f" Known: {', '.join(known)}."
            )
            problems.add(place, f"no section {parts[0]!r}.{hint}")
            continue
        path = _walk(tree, parts, place, problems)
        if path is not None:
            tree.put(path, _environment_value(environment[name]), place)


def _walk(tree: Tree, parts: list[str], place: Place, problems: Problems) -> Key | None:
    path: list[str | int] = []
    node: Any = tree.value
    for part in parts:
        if isinstance(node, list):
            names = [_entry_name(item) for item in node]
            if part not in names:
                known = ", ".join(filter(None, names)) or "nothing"
                problems.add(
                    place,
                    f"`{path_text(tuple(path))}` has no entry {part!r}; it has {known}.",
                )
                return None
            index = names.index(part)
            path.append(index)
            node = node[index]
            continue
        path.append(part)
        node = node.get(part) if isinstance(node, dict) else None
    return tuple(path)


def _entry_name(item: Any) -> str:
    if not isinstance(item, dict):
        return ""
    name = item.get("id") or item.get("name") or item.get("type") or ""
    return re.sub(r"\W", "_", str(name).lower())


def _environment_value(text: str) -> Any:
    if text[:1] in "[{":
        try:
            tree = parse_yaml(f"value: {text}", Problems("environment"))
            return tree.value["value"]
        except ConfigError:
            return RawText(text)
    return RawText(text)


def overlay_flags(
    tree: Tree, flags: Mapping[str, Any], name_of: Callable[[str], str]
) -> None:
    """Put flags over everything; a key is a path such as `state.directory`, None means not given."""
    for path, value in flags.items():
        if value is not None:
            tree.put(tuple(path.split(".")), value, Place(f"flag {name_of(path)}"))
