"""What stands over the file: variables of the environment, and flags over those.

Comes from: loading/__init__.py
Goes to: loading/tree.py
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nightdesk.errors import ConfigError
from nightdesk.loading.document import parse_yaml
from nightdesk.loading.tree import Key, Place, Problems, RawText, Tree, path_text
from nightdesk.loading.words import nearest

__all__ = ["ENVIRONMENT_PREFIX", "overlay_environment", "overlay_flags"]

ENVIRONMENT_PREFIX = "NIGHTDESK__"


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
