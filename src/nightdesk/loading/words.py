"""Words for error messages: what was expected, what was found, what may have been meant.

Comes from: loading/tree.py, loading/check.py
Goes to: errors.py
"""

import re
import types
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["is_secret", "nearest", "shown", "type_words"]

_SECRET = re.compile(
    r"secret|passw|passphrase|token|key|credential|mnemonic|private", re.IGNORECASE
)
_PASSWORD_IN_URL = re.compile(r"(//[^/@\s]*?:)[^/@\s]+@")
_SIMPLE = {
    int: "a whole number",
    float: "a number",
    Decimal: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Path: "a path",
}


def is_secret(key: str) -> bool:
    """Return whether a value of this name must never be shown."""
    return bool(_SECRET.search(key))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that was probably meant."""
    by_lower = {k.lower(): k for k in known}
    found = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def shown(path: Iterable[str | int], value: Any) -> str:
    """Return `value` as a message may quote it: short, and without secrets."""
    if any(isinstance(part, str) and is_secret(part) for part in path):
        return "*** (hidden)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "empty"
    if isinstance(value, (int, float, Decimal)):
        return str(value)[:60]
    text = _PASSWORD_IN_URL.sub(r"\1***@", str(value))
    return repr(text if len(text) <= 60 else text[:57] + "...")


def type_words(hint: Any, key: str = "") -> str:
    """Return what a type asks for, in words an operator knows."""
    if key.endswith("_s") and any(t in (float, int) for t in (hint, *get_args(hint))):
        others = [
            type_words(a) for a in get_args(hint) if a not in (float, int, type(None))
        ]
        return " or ".join(["a duration such as 5, 5s, 300ms, 5m or 1h", *others])
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if origin in (Union, types.UnionType):
        return " or ".join(
            dict.fromkeys(type_words(a) for a in arguments if a is not type(None))
        )
    if origin is Literal:
        return _one_of([str(a) for a in arguments])
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _one_of([str(member.value) for member in hint])
    if _is_collection(origin or hint):
        inner = [a for a in arguments if a is not Ellipsis]
        return (
            f"a list of {type_words(inner[0])}"
            if inner and inner[0] is not Any
            else "a list"
        )
    if hint is Any:
        return "a value"
    return "a mapping"


def _is_collection(kind: Any) -> bool:
    return (
        isinstance(kind, type)
        and issubclass(kind, Collection)
        and not issubclass(kind, Mapping)
    )


def _one_of(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
