"""Contexts as bytes and back: versioned, migrated forward, with unknown fields kept (R-22).

The bytes are one JSON object: `_meta` first, then the fields of the context, then whatever an
earlier reader did not know. Decimals are strings, so no digit is lost.
"""

import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

import nightdesk
from nightdesk.errors import NewerSchemaError, RecordCorruptError
from nightdesk.model.context import TaskContext

__all__ = [
    "Migrations",
    "TaskSerializer",
    "decode_context",
    "encode_context",
    "peek_meta",
    "type_name",
]

ContextT = TypeVar("ContextT", bound=TaskContext)
Migrations = Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]

_META = "_meta"
# Design 001 saved states as numbers. Where two of its enumerations share a number (1 to 6), the base
# meaning is taken: it leads a task to look at its orders again, which is right from anywhere.
_LEGACY_STATES = {
    1: "IDLE",
    2: "EXECUTING",
    3: "MONITORING",
    4: "ADJUSTING",
    5: "IDLE",
    6: "ADJUSTING",
    100: "COMPLETED",
    -1: "NOT_STARTED",
    -2: "CANCELLED",
    0: "PAUSED",
    -100: "ERROR",
}


class _Meta(msgspec.Struct):
    """Who wrote a context, when, and in which version."""

    type: str = ""
    schema: int = 1
    saved_ns: int = 0
    epoch: int = 0
    program: str = ""


class _Head(msgspec.Struct):
    """What can be known of a record without its class."""

    meta: _Meta | None = msgspec.field(default=None, name=_META)
    task_id: Any = ""
    state: Any = ""
    task_type: Any = None
    metadata: Any = None


_encoder = msgspec.json.Encoder()
_head_decoder = msgspec.json.Decoder(_Head)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_meta_decoder = msgspec.json.Decoder(_Meta)


def encode_context(
    context: TaskContext, *, type: str, schema: int, saved_ns: int, epoch: int = 0
) -> bytes:
    """Return `context` as bytes for a store.

    Args:
        type: The task's type: the name of its file, or the user's dotted name.
        schema: The `schema_version` of the task's class.
        saved_ns: When, UTC nanoseconds.
        epoch: The fencing epoch of the desk that saves it.
    """
    record: dict[str, Any] = {
        _META: _Meta(type, schema, saved_ns, epoch, nightdesk.__version__)
    }
    for name in context.__struct_fields__:
        if name != "unknown":
            record[name] = _writable(getattr(context, name))
    for name, value in context.unknown.items():
        record.setdefault(name, value)
    return _encoder.encode(record)


def _writable(value: Any) -> Any:
    """JSON knows no infinity: it would be written as null, and the whole context could not be read again."""
    return str(value) if type(value) is float and not math.isfinite(value) else value


def decode_context(
    data: bytes | str,
    context_class: type[ContextT],
    *,
    migrations: Migrations | None = None,
    schema: int = 1,
) -> ContextT:
    """Return the context that `data` says, brought forward to version `schema`.

    Args:
        migrations: From an old version to the function that makes the next one of its mapping. They get the
            mapping without `_meta` and may change it.

    Raises:
        NewerSchemaError: Written by a newer version of the task.
        RecordCorruptError: Not a context of this class, with what was found and where.
    """
    try:
        raw = _fields_decoder.decode(data)
        meta = _meta_of(raw.pop(_META, None))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RecordCorruptError("context", _id_in(data), str(error)) from error
    if meta is not None and meta.schema > schema:
        raise NewerSchemaError(f"context {_id_in(data)!r}", meta.schema, schema)
    if meta is not None and meta.schema == schema:
        context = _decode_current(data, raw, context_class)
        if context is not None:
            return context
    return _decode_old(data, context_class, migrations or {}, meta, schema)


def peek_meta(data: bytes | str) -> dict[str, Any]:
    """Return type, schema, saved_ns, epoch, program, task_id and state of a saved context without its class.

    Raises:
        RecordCorruptError: `data` is no saved context.
    """
    try:
        head = _head_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RecordCorruptError("context", _id_in(data), str(error)) from error
    if head.meta is None:
        return _described(_Meta(type=_legacy_type(head)), head, _peek_state(head.state))
    return _described(head.meta, head, str(head.state))


def _described(meta: _Meta, head: _Head, state: str) -> dict[str, Any]:
    return {
        **msgspec.structs.asdict(meta),
        "task_id": str(head.task_id),
        "state": state,
    }


def _peek_state(value: Any) -> str:
    return (
        _LEGACY_STATES.get(value, str(value))
        if isinstance(value, int)
        else _legacy_state(value)
    )


def type_name(name: str) -> str:
    """Return the type that a class of design 001 stands for: `IcebergTaskContext` is `iceberg`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return re.sub(r"(_task)?(_context)?$", "", words)


class TaskSerializer:
    """The face of design 001, for programs written against it."""

    @staticmethod
    def serialize_context(context: TaskContext, *, saved_ns: int = 0) -> str:
        """Return `context` as JSON text; the type is told by the name of its class."""
        return encode_context(
            context, type=type_name(type(context).__name__), schema=1, saved_ns=saved_ns
        ).decode()

    @staticmethod
    def deserialize_context(
        data: bytes | str, context_class: type[ContextT]
    ) -> ContextT:
        """Return the context in `data`, which may also be one that design 001 wrote."""
        return decode_context(data, context_class)

    @staticmethod
    def extract_task_metadata(data: bytes | str) -> dict[str, Any]:
        """Return what `peek_meta` does, with the type also under its old name `task_type`."""
        meta = peek_meta(data)
        return {**meta, "task_type": meta["type"]}


# --- the current version: one typed pass --------------------------------------------------------------


@cache
def _decoder(context_class: type[ContextT]) -> msgspec.json.Decoder[ContextT]:
    return msgspec.json.Decoder(context_class)


@cache
def _known(context_class: type[TaskContext]) -> frozenset[str]:
    return frozenset(context_class.__struct_fields__)


def _decode_current(
    data: bytes | str, raw: dict[str, msgspec.Raw], context_class: type[ContextT]
) -> ContextT | None:
    """Decode without looking for old habits; None if it does not fit, to be looked at again."""
    try:
        context: ContextT = _decoder(context_class).decode(data)
        unknown = raw.keys() - _known(context_class)
        if unknown:
            context.unknown = {
                name: msgspec.json.decode(raw[name]) for name in raw if name in unknown
            }
    except (msgspec.ValidationError, ArithmeticError):
        return None
    return context


# --- older versions, and records of design 001 --------------------------------------------------------


def _decode_old(
    data: bytes | str,
    context_class: type[ContextT],
    migrations: Migrations,
    meta: _Meta | None,
    schema: int,
) -> ContextT:
    try:
        fields = msgspec.json.decode(data)
        fields.pop(_META, None)
        if meta is None:
            fields = _modern_base(fields)
        for step in range(meta.schema if meta else 1, schema):
            if step not in migrations:
                raise ValueError(
                    f"no migration from schema version {step} to {step + 1}"
                )
            fields = migrations[step](fields)
        known = _known(context_class)
        hints = _hints(context_class)
        wanted = {
            name: _fitting(value, hints[name])
            for name, value in fields.items()
            if name in known
        }
        context = msgspec.convert(wanted, context_class, strict=False)
        context.unknown = {
            **context.unknown,
            **{k: v for k, v in fields.items() if k not in known},
        }
    except Exception as error:
        # A migration is the user's code and may raise anything; the record stays as it was.
        raise RecordCorruptError(
            "context", _id_in(data), f"{type(error).__name__}: {error}"
        ) from error
    return context


@cache
def _hints(context_class: type[TaskContext]) -> dict[str, Any]:
    return get_type_hints(context_class)


def _modern_base(fields: dict[str, Any]) -> dict[str, Any]:
    """Return `fields` of design 001 with state and error as version 1 has them."""
    if "state" in fields:
        fields["state"] = _legacy_state(fields["state"])
    if isinstance(fields.get("error"), str):
        fields["error"] = {"type": "Exception", "message": fields["error"]}
    return fields


def _fitting(value: Any, hint: Any) -> Any:
    origin = get_origin(hint)
    if value is None:
        return None
    if origin in (Union, UnionType):
        inner = [each for each in get_args(hint) if each is not type(None)]
        return _fitting(value, inner[0]) if len(inner) == 1 else value
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _member(value, hint)
    if hint is Decimal and isinstance(value, float):
        return str(value)  # the shortest text that is this float: 0.1 is one tenth
    if hint is str and isinstance(value, dict) and {"base", "quote"} <= value.keys():
        return f"{value['base']}/{value['quote']}"
    if origin is dict and isinstance(value, dict):
        key_hint, value_hint = get_args(hint)
        return {
            _fitting(key, key_hint): _fitting(each, value_hint)
            for key, each in value.items()
        }
    return value


def _member(value: Any, enumeration: type[Enum]) -> Any:
    """Return the member meant by a name or a value in any case, also `Side.BUY`; never a guess from a number."""
    text = str(value).rpartition(".")[2].lower()
    for member in enumeration:
        if text in (member.name.lower(), str(member.value).lower()):
            return member.value
    return value


def _legacy_state(value: Any) -> str:
    """Return the name of a state saved as a number, as `TradingStrategyState.IDLE`, or as `idle`."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value not in _LEGACY_STATES:
            raise ValueError(
                f"no state has the number {value}; known are {sorted(_LEGACY_STATES)}"
            )
        return _LEGACY_STATES[value]
    name = str(value).rpartition(".")[2]
    return name.upper() if name.upper() in _LEGACY_STATES.values() else name


def _legacy_type(head: _Head) -> str:
    """Return the task's type as design 001 told it: a field, the metadata, or the beginning of the id."""
    told = head.task_type
    if not told and isinstance(head.metadata, dict):
        told = head.metadata.get("task_type")
    if told:
        return type_name(str(told))
    words = re.match(r"(?:[a-z]+_)*[a-z]+(?![a-zA-Z])|[A-Za-z]+", str(head.task_id))
    return type_name(words.group()) if words else ""


def _meta_of(raw: msgspec.Raw | None) -> _Meta | None:
    return None if raw is None else _meta_decoder.decode(raw)


def _id_in(data: bytes | str) -> str:
    """Return the task id for a message about a record that may be unreadable."""
    text = data if isinstance(data, str) else data.decode("utf-8", "replace")
    found = re.search(r'"task_id"\s*:\s*"((?:[^"\\]|\\.)*)"', text)
    return found.group(1) if found else "?"
