"""One value of the configuration becomes the type that its reader wants, or says why it cannot.

Comes from: loading/check.py, loading/build.py
Goes to: config.py
"""

import re
import types
from collections.abc import Mapping, Sequence
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from nightdesk.loading.tree import MAX_DIGITS, RawText, plain_scalar
from nightdesk.loading.words import type_words

__all__ = ["convert", "duration_s", "settle"]

_DURATION = re.compile(
    r"\s*([0-9]*\.?[0-9]+)\s*(us|ms|s|sec|m|min|h|d)\s*\Z", re.IGNORECASE
)
_LISTS = (tuple, list, frozenset, set, Sequence)
_LARGEST = Decimal("1e60")
_MOST_SECONDS = 100 * 366 * 86_400
_UNITS = {
    "us": "0.000001",
    "ms": "0.001",
    "s": "1",
    "sec": "1",
    "m": "60",
    "min": "60",
    "h": "3600",
    "d": "86400",
}


def duration_s(value: Any) -> Any:
    """Return `"5m"` as 300; what is no such text is returned as it is."""
    found = (
        _DURATION.match(value)
        if isinstance(value, str) and len(value) <= MAX_DIGITS
        else None
    )
    if found is None:
        return value
    seconds = Decimal(found[1]) * Decimal(_UNITS[found[2].lower()])
    return int(seconds) if seconds == seconds.to_integral_value() else seconds


def convert(value: Any, hint: Any, key: str = "") -> Any:
    """Return `value` as `hint`; a key that ends in `_s` may be written `5s`, names may have any case.

    Raises:
        ValueError: It cannot be; the text says what was expected.
    """
    expected = type_words(hint, key)
    hint = _as_text_type(hint)
    for candidate in _readings(value, hint, key):
        try:
            result = msgspec.convert(candidate, hint, strict=False)
        except msgspec.ValidationError as error:
            detail = str(error)
            continue
        except TypeError:  # a type msgspec does not know: its reader decides
            return candidate
        if _is_sane(result, key):
            return result
        detail = ""
    where = re.search(r"at `\$(.+)`", detail)
    raise ValueError(
        f"{expected} ({_inner(detail)} at `{where[1]}`)" if where else expected
    )


def _as_text_type(hint: Any) -> Any:
    """A path is text here; msgspec does not know the type."""
    if hint is Path:
        return str
    origin, arguments = get_origin(hint), get_args(hint)
    if not arguments or origin is Literal or Path not in _all_arguments(hint):
        return hint
    inner = tuple(_as_text_type(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return Union[inner]  # noqa: UP007
    return origin[inner]


def _all_arguments(hint: Any) -> list[Any]:
    return [hint, *(inner for a in get_args(hint) for inner in _all_arguments(a))]


def settle(value: Any) -> Any:
    """Return what an untyped reader gets: text from outside the file becomes what it looks like."""
    return plain_scalar(value) if isinstance(value, RawText) else value


def _inner(detail: str) -> str:
    """msgspec's words about a value inside a list or mapping, without the value itself."""
    return re.sub(
        r"Invalid enum value .*", "no such name", detail.split(" - at ")[0]
    ).replace("`", "")


def _readings(value: Any, hint: Any, key: str) -> list[Any]:
    if isinstance(value, RawText):
        text = str(value)
        readings = [plain_scalar(text), text]
        if get_origin(hint) in _LISTS:
            readings.insert(
                0, [part.strip() for part in text.split(",") if part.strip()]
            )
        return [_reading(reading, hint, key) for reading in readings]
    return [_reading(value, hint, key)]


def _reading(value: Any, hint: Any, key: str) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str):
        if key.endswith("_s"):
            value = duration_s(value)
        if get_origin(hint) in _LISTS and get_args(hint)[:1] == (str,):
            return [value]  # `after: candles` is a list of one
        return _member(value, hint) if isinstance(value, str) else value
    wants_int = hint is int or (int in get_args(hint) and float not in get_args(hint))
    if wants_int and isinstance(value, Decimal) and value == value.to_integral_value():
        return int(value)
    return value


def _member(value: str, hint: Any) -> str:
    """Return the spelling that the enumeration itself has."""
    for kind in (
        get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    ):
        if get_origin(kind) is Literal:
            known = [a for a in get_args(kind) if isinstance(a, str)]
        elif isinstance(kind, type) and issubclass(kind, Enum):
            known = [str(member.value) for member in kind]
        else:
            continue
        for name in known:
            if name.lower() == value.lower():
                return name
    return value


def _is_sane(result: Any, key: str) -> bool:
    """Numbers are of a size that arithmetic, clocks and formats can bear, also inside lists and mappings."""
    if isinstance(result, Mapping):
        return all(_is_sane(value, key) for value in result.values())
    if isinstance(result, (list, tuple, set, frozenset)):
        return all(_is_sane(value, key) for value in result)
    if isinstance(result, bool) or not isinstance(result, (int, float, Decimal)):
        return True
    if isinstance(result, int) and not -(2**63) <= result < 2**63:
        return False
    number = Decimal(result)
    if not number.is_finite() or not (
        not number or 1 / _LARGEST < number.copy_abs() < _LARGEST
    ):
        return False
    return 0 <= result <= _MOST_SECONDS or not key.endswith("_s")
