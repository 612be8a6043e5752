"""What a class lets `desk.yaml` say: the fields of a task's context, the keywords of a venue or source.

Comes from: loading/check.py, loading/build.py
Goes to: tasks/, venues/, sources/
"""

import inspect
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from nightdesk.abc import Task
from nightdesk.exchange.options import PaperOptions
from nightdesk.model.context import TaskContext
from nightdesk.model.instrument import Instrument

__all__ = [
    "INJECTED",
    "Parameter",
    "of_callable",
    "of_part",
    "of_struct",
    "of_task",
    "struct_in",
    "values_of",
]

INJECTED = frozenset({"self", "name", "clock", "directory", "on_failure", "desk"})
"""What the desk itself hands to a class or function; never a key of `desk.yaml`."""

Shape = Literal["one", "list", "mapping"]
_OWN = frozenset(f.name for f in msgspec.structs.fields(TaskContext)) - {
    "metadata",
    "should_save_flag",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One key. `hint` is `Any` where the class does not say."""

    name: str
    hint: Any = Any
    required: bool = False


def of_task(kind: type[Task[Any]]) -> dict[str, Parameter]:
    """Return the fields of the task's context that an operator may set."""
    return of_struct(kind.context_class, _OWN)


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
        elif (
            parameter.kind is not parameter.VAR_POSITIONAL
            and parameter.name not in INJECTED
        ):
            found[parameter.name] = Parameter(
                parameter.name,
                hints.get(parameter.name, Any),
                parameter.default is parameter.empty,
            )
    return found, open_ended


def of_part(kind: type, type_name: str) -> tuple[dict[str, Parameter], bool]:
    """Return the keys of a venue or source."""
    if type_name != "paper":
        return of_callable(kind)
    # The paper venue may live in a process of its own, so its keys are a struct and not its keywords.
    known = of_struct(PaperOptions)
    return known | {
        "instruments": Parameter("instruments", list[Instrument], required=True)
    }, False


def of_struct(
    shape: type[msgspec.Struct], but: frozenset[str] = frozenset()
) -> dict[str, Parameter]:
    """Return the fields of a struct as keys."""
    return {
        field.name: Parameter(field.name, field.type, field.required)
        for field in msgspec.structs.fields(shape)
        if field.name not in but
    }


def struct_in(hint: Any) -> tuple[type[msgspec.Struct] | None, Shape]:
    """Return the struct that mappings stand for in `hint`, and whether it is one, a list or a mapping of them."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint, "one"
    if origin in (Union, types.UnionType):
        for argument in arguments:
            found, shape = struct_in(argument)
            if found is not None:
                return found, shape
    elif isinstance(origin, type) and arguments and origin is not type:
        if issubclass(origin, Mapping):
            return struct_in(arguments[-1])[0], "mapping"
        if issubclass(origin, Collection):
            return struct_in(arguments[0])[0], "list"
    return None, "one"


def values_of(hint: Any) -> Any:
    """Return the type of the values of a mapping by text, or None if `hint` is something else."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return next(
            (found for found in map(values_of, arguments) if found is not None), None
        )
    if (
        isinstance(origin, type)
        and issubclass(origin, Mapping)
        and arguments[:1] == (str,)
    ):
        return None if arguments[1] is Any else arguments[1]
    return None
