"""A task's context: everything it must still know after `kill -9`, and nothing else."""

import traceback
from decimal import Decimal
from enum import Enum, StrEnum
from functools import cache
from typing import Any, Self, get_args, get_type_hints

import msgspec

__all__ = [
    "TaskContext",
    "TaskError",
    "TaskExecutionResult",
    "TradingStrategyState",
    "state_name",
]


class TradingStrategyState(StrEnum):
    """The states every task has. A task's own states are strings in the same namespace.

    Design 001 used integers; two of its enumerations share the value 1, so a recovered
    number could mean two things (T-0). Names cannot collide unseen.
    """

    NOT_STARTED = "NOT_STARTED"
    IDLE = "IDLE"
    EXECUTING = "EXECUTING"
    MONITORING = "MONITORING"
    ADJUSTING = "ADJUSTING"
    PAUSED = "PAUSED"
    COMPLETED = "COMPLETED"
    CANCELLED = "CANCELLED"
    ERROR = "ERROR"


FINAL_STATES = frozenset({"COMPLETED", "CANCELLED", "ERROR"})


def state_name(state: "str | Enum") -> str:
    """Return the one string by which `state` is known, whether given as a string or an enum member."""
    if isinstance(state, Enum):
        return state.name
    return str(state)


class TaskError(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong, in a form that can be saved (an exception object cannot, T-0)."""

    type: str
    message: str
    where: str = ""
    when_ns: int = 0

    @classmethod
    def from_exception(cls, error: BaseException, when_ns: int = 0) -> "TaskError":
        frames = traceback.extract_tb(error.__traceback__)
        where = (
            f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}"
            if frames
            else ""
        )
        return cls(
            type=type(error).__name__,
            message=str(error)[:2000],
            where=where,
            when_ns=when_ns,
        )


class TaskContext(msgspec.Struct, kw_only=True):
    """Base of every context. Subclass it with plain, serialisable fields.

    Fields annotated `Decimal` accept int, float and str and are converted through
    their decimal notation, so `total_quantity=0.1` is exactly one tenth.

    Attributes:
        task_id: Unique in the desk and stable over restarts.
        state: Name of the state whose handler runs next.
        error: The last failure, structured.
        should_save_flag: False keeps this context out of the store.
        unknown: Fields found in a saved record that this version does not know; written back as they were.
    """

    task_id: str = ""
    state: str = TradingStrategyState.NOT_STARTED
    error: TaskError | None = None
    metadata: dict[str, Any] = {}
    should_save_flag: bool = True
    unknown: dict[str, Any] = {}

    def __post_init__(self) -> None:
        self.state = state_name(self.state)
        for name in _decimal_fields(type(self)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, str)):
                continue
            setattr(self, name, Decimal(str(value)))
        for name in _decimal_mappings(type(self)):
            mapping = getattr(self, name)
            if mapping:
                setattr(
                    self, name, {key: _decimal(value) for key, value in mapping.items()}
                )

    def evolve(self, **changes: Any) -> Self:
        """Return a copy with `changes`; `field__key=value` sets one key of a mapping field.

        The key may be given by its text or, for enum-keyed mappings, by the member's
        name in any case: `filled_quantity__buy=5` sets `filled_quantity[Side.BUY]`.

        Raises:
            AttributeError: A field does not exist, with the near misses named.
        """
        fields: dict[str, Any] = {}
        for name, value in changes.items():
            if name in self.__struct_fields__:
                fields[name] = value
                continue
            field, separator, key = name.partition("__")
            if not separator or field not in self.__struct_fields__:
                raise AttributeError(
                    f"{type(self).__name__} has no field {name!r}; it has {', '.join(self.__struct_fields__)}"
                )
            mapping = fields.get(field)
            if mapping is None:
                mapping = dict(getattr(self, field) or {})
            mapping[_mapping_key(type(self), field, key)] = value
            fields[field] = mapping
        if "state" in fields:
            fields["state"] = state_name(fields["state"])
        if isinstance(fields.get("error"), BaseException):
            fields["error"] = TaskError.from_exception(fields["error"])
        return msgspec.structs.replace(self, **fields)


class TaskExecutionResult(msgspec.Struct, kw_only=True):
    """What one cycle of a task came to.

    Attributes:
        should_continue: False ends the task (its context keeps the final state).
        next_delay: Seconds until the next cycle, unless an event wakes the task before.
    """

    task_id: str
    context: TaskContext
    should_continue: bool = True
    next_delay: float = 0.1
    state: str = TradingStrategyState.IDLE
    error: TaskError | None = None
    execution_time_ms: float = 0.0
    metadata: dict[str, Any] = {}


def _decimal(value: Any) -> Any:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return Decimal(str(value))
    return value


@cache
def _hints(cls: type[TaskContext]) -> dict[str, Any]:
    return get_type_hints(cls)


@cache
def _decimal_fields(cls: type[TaskContext]) -> tuple[str, ...]:
    return tuple(
        name
        for name, hint in _hints(cls).items()
        if hint is Decimal or Decimal in get_args(hint)
    )


@cache
def _decimal_mappings(cls: type[TaskContext]) -> tuple[str, ...]:
    names = []
    for name, hint in _hints(cls).items():
        arguments = get_args(hint)
        if len(arguments) == 2 and (
            arguments[1] is Decimal or Decimal in get_args(arguments[1])
        ):
            names.append(name)
    return tuple(name for name in names if name not in _plain_decimal(cls))


@cache
def _plain_decimal(cls: type[TaskContext]) -> frozenset[str]:
    """`Decimal | None` also has two type arguments, but is no mapping."""
    return frozenset(n for n, h in _hints(cls).items() if type(None) in get_args(h))


def _mapping_key(cls: type[TaskContext], field: str, key: str) -> Any:
    arguments = get_args(_hints(cls).get(field))
    if arguments and isinstance(arguments[0], type) and issubclass(arguments[0], Enum):
        for member in arguments[0]:
            if key.lower() in (member.name.lower(), str(member.value).lower()):
                return member
        raise AttributeError(
            f"{cls.__name__}.{field} has no key {key!r}: {arguments[0].__name__} does not know it"
        )
    return key
