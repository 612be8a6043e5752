"""One YAML document as plain values with their lines. No tag is obeyed, no alias multiplies, no depth overflows.

PyYAML only tells what stands in the text, event by event. Its constructors read `on` as true, `09:15`
as 555 and `0.1` as a binary float; its composers recurse, the quick one until the process crashes.

Comes from: loading/__init__.py, cli/connection.py
Goes to: loading/tree.py
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nightdesk.errors import ConfigError
from nightdesk.loading.tree import Key, Place, Problems, Tree, path_text, plain_scalar

__all__ = ["parse_yaml", "read_file"]

MAX_BYTES = 1024 * 1024
MAX_NODES = 100_000
MAX_DEPTH = 40

_LOADER: Any = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # in C it is twenty times as fast
_CORE_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "map", "seq")
}


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
    """Parse one document. Duplicate keys and tags become problems.

    Raises:
        ConfigError: It is no YAML, or more of it than a desk could need.
    """
    tree = Tree(origin=problems.origin)
    try:
        root = _compose(text, problems)
    except yaml.MarkedYAMLError as error:
        # The library's own text quotes the lines around the error, which may hold a secret.
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problems.add(
            Place(problems.origin, line), f"no valid YAML: {_harmless(error.problem)}."
        )
        raise problems.error() from None
    except yaml.reader.ReaderError as error:
        text = f"no valid YAML: a character that text may not hold, at position {error.position}."
        problems.add(Place(problems.origin), text)
        raise problems.error() from None
    if root is None or (root.kind == "scalar" and not root.text):
        return tree
    if root.kind != "mapping":
        problems.add(
            Place(problems.origin, root.line), "expected keys such as `tasks:` here."
        )
        raise problems.error()
    tree.value = _Builder(tree, problems).mapping(root, (), 0)
    return tree


def _harmless(problem: str | None) -> str:
    """Return the parser's words without anything it quotes longer than a character."""
    return re.sub(r"(['\"])(?:(?!\1).){2,}\1", "(text)", problem or "unknown trouble")


@dataclass(slots=True)
class _Node:
    """`text` of a scalar, `items` of a list, `pairs` of a mapping."""

    kind: str
    line: int
    tag: str | None = None
    is_plain: bool = True
    text: str = ""
    items: list["_Node"] = field(default_factory=list)
    pairs: list[tuple["_Node", "_Node"]] = field(default_factory=list)
    key: "_Node | None" = None

    def take(self, node: "_Node") -> None:
        if self.kind == "list":
            self.items.append(node)
        elif self.key is None:
            self.key = node
        else:
            self.pairs.append((self.key, node))
            self.key = None


def _compose(text: str, problems: Problems) -> _Node | None:
    """Return the document's root; aliases stand for the very node they name."""
    anchors: dict[str, _Node] = {}
    stack: list[_Node] = []
    root: _Node | None = None
    event: Any
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.DocumentStartEvent) and root is not None:
            line = _line(event)
            problems.add(
                Place(problems.origin, line),
                "a second document begins here; only one is read.",
            )
            return root
        if isinstance(event, yaml.CollectionEndEvent):
            stack.pop()
            continue
        node = _node_of(event, anchors, problems)
        if node is None:
            continue
        if stack:
            stack[-1].take(node)
        else:
            root = node
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append(node)
            if len(stack) > MAX_DEPTH:
                problems.add(
                    Place(problems.origin, node.line),
                    f"is nested deeper than {MAX_DEPTH} levels.",
                )
                raise problems.error()
    return root


def _node_of(event: Any, anchors: dict[str, _Node], problems: Problems) -> _Node | None:
    kinds = (yaml.ScalarEvent, yaml.AliasEvent, yaml.CollectionStartEvent)
    if not isinstance(event, kinds):
        return None
    line = _line(event)
    if isinstance(event, yaml.AliasEvent):
        anchor = str(event.anchor)
        if anchor not in anchors:
            problems.add(
                Place(problems.origin, line),
                "has an alias (`*...`) of an anchor that is not there.",
            )
        return anchors.get(anchor, _Node("scalar", line))
    if isinstance(event, yaml.ScalarEvent):
        node = _Node("scalar", line, event.tag, event.implicit[0], event.value)
    else:
        kind = "list" if isinstance(event, yaml.SequenceStartEvent) else "mapping"
        node = _Node(kind, line, event.tag)
    if node.tag not in (None, "!") and node.tag not in _CORE_TAGS:
        problems.add(
            Place(problems.origin, line),
            "has a YAML tag (`!...`); only plain values are read.",
        )
    if event.anchor:
        anchors[event.anchor] = node
    return node


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


class _Builder:
    """Turns nodes into plain values, within bounds that no alias can multiply."""

    def __init__(self, tree: Tree, problems: Problems) -> None:
        self._tree = tree
        self._problems = problems
        self._nodes = 0

    def value(self, node: _Node, path: Key, depth: int) -> Any:
        self._count(depth)
        if node.kind == "mapping":
            return self.mapping(node, path, depth)
        if node.kind == "list":
            return self._list(node, path, depth)
        return plain_scalar(node.text) if node.is_plain else node.text

    def mapping(self, node: _Node, path: Key, depth: int) -> dict[str, Any]:
        self._count(depth)
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.pairs:
            place = Place(self._problems.origin, key_node.line)
            if key_node.kind != "scalar":
                self._problems.add(
                    place, f"`{path_text(path)}` has a key that is no plain word."
                )
            elif key_node.text == "<<" and key_node.is_plain:
                merged |= self._merged(value_node, path, depth)
            elif key_node.text in found:
                self._told_twice((*path, key_node.text), place)
            else:
                here = (*path, key_node.text)
                self._tree.places[here] = place
                found[key_node.text] = self.value(value_node, here, depth + 1)
        return {**merged, **found}

    def _told_twice(self, path: Key, place: Place) -> None:
        first = self._tree.places[path].line
        text = f"`{path_text(path)}` stands here a second time; the first is in line {first}."
        self._problems.add(place, text)

    def _merged(self, node: _Node, path: Key, depth: int) -> dict[str, Any]:
        """Return what `<<: *alias` brings in; of several, the first has the last word."""
        merged: dict[str, Any] = {}
        for part in reversed(node.items if node.kind == "list" else [node]):
            if part.kind == "mapping":
                merged |= self.mapping(part, (*path, "<<"), depth + 1)
            else:
                self._problems.add(
                    Place(self._problems.origin, part.line),
                    "`<<` expects the alias of a mapping.",
                )
        return merged

    def _list(self, node: _Node, path: Key, depth: int) -> list[Any]:
        items = []
        for index, item in enumerate(node.items):
            here = (*path, index)
            self._tree.places[here] = Place(self._problems.origin, item.line)
            items.append(self.value(item, here, depth + 1))
        return items

    def _count(self, depth: int) -> None:
        self._nodes += 1
        if self._nodes <= MAX_NODES and depth <= MAX_DEPTH:
            return
        bound = f"{MAX_NODES} values" if depth <= MAX_DEPTH else f"{MAX_DEPTH} levels"
        self._problems.add(
            Place(self._problems.origin),
            f"holds more than {bound} once its aliases are followed.",
        )
        raise self._problems.error()
