"""What a class lets `desk.yaml` say: the fields of a task's context, the keywords of a venue or source.

Comes from: loading/check.py, loading/build.py
Goes to: tasks/, venues/, sources/
"""

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

from nightdesk.abc import Task
from nightdesk.market.matching import MatchingEngine
from nightdesk.model.context import TaskContext

__all__ = ["INJECTED", "Parameter", "engine_keywords", "of_callable", "of_part", "of_task", "struct_in"]

INJECTED = frozenset({"self", "name", "clock", "directory", "on_failure", "matching", "desk"})
"""What the desk itself hands to a class or function; never a key of `desk.yaml`."""

_OWN = {field.name for field in msgspec.structs.fields(TaskContext)} - {"metadata", "should_save_flag"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One key. `hint` is `Any` where the class does not say."""

    name: str
    hint: Any = Any
    required: bool = False


def of_task(kind: type[Task[Any]]) -> dict[str, Parameter]:
    """Return the fields of the task's context that an operator may set."""
    return {
        field.name: Parameter(field.name, field.type, field.required)
        for field in msgspec.structs.fields(kind.context_class)
        if field.name not in _OWN
    }


def of_callable(target: Callable[..., Any]) -> tuple[dict[str, Parameter], bool]:
    """Return the keywords of a class or function, and whether it takes any others, too."""
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):  # names that exist for the type checker only
        hints = {}
    found, open_ended = {}, False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
        elif parameter.kind is not parameter.VAR_POSITIONAL and parameter.name not in INJECTED:
            found[parameter.name] = Parameter(
                parameter.name, hints.get(parameter.name, Any), parameter.default is parameter.empty
            )
    return found, open_ended


def of_part(kind: type) -> tuple[dict[str, Parameter], bool]:
    """Return the keys of a venue or source; a venue that is given a matching engine takes its keys, too."""
    known, open_ended = of_callable(kind)
    if "matching" in inspect.signature(kind).parameters:
        known |= engine_keywords()
    return known, open_ended


def engine_keywords() -> dict[str, Parameter]:
    """Return the keys of the matching engine behind a paper venue."""
    keywords = inspect.signature(MatchingEngine).parameters.values()
    hints = get_type_hints(MatchingEngine.__init__)
    return {p.name: Parameter(p.name, hints[p.name]) for p in keywords if p.kind is p.KEYWORD_ONLY}


def struct_in(hint: Any) -> tuple[type[msgspec.Struct] | None, bool]:
    """Return the struct that a mapping may stand for in `hint`, and whether a list of them is meant."""
    origin = get_origin(hint)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint, False
    if origin in (Union, types.UnionType):
        for argument in get_args(hint):
            found, many = struct_in(argument)
            if found is not None:
                return found, many
    if isinstance(origin, type) and issubclass(origin, Sequence) and get_args(hint):
        return struct_in(get_args(hint)[0])[0], True
    return None, False
