"""Contexts survive versions: golden files load for ever, unknown fields stay, mistakes are named (R-22)."""

import json
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nightdesk
from nightdesk.errors import NewerSchemaError, RecordCorruptError
from nightdesk.model.context import TaskContext, TaskError
from nightdesk.model.order import Side
from nightdesk.model.serializer import (
    TaskSerializer,
    decode_context,
    encode_context,
    peek_meta,
    type_name,
)

GOLDEN = Path(__file__).parents[1] / "golden"


class Leg(Enum):
    NEAR = "near"
    FAR = "far"


class IcebergTaskContext(TaskContext, kw_only=True):
    """Stands for any task's context; the real ones have golden tests beside their tasks."""

    symbol: str = ""
    venue: str = ""
    side: Side = Side.BUY
    total_quantity: Decimal | None = None
    filled_quantity: Decimal = Decimal(0)
    offset_ticks: int = 0
    order_id: str | None = None


class PairContext(TaskContext, kw_only=True):
    symbol: str = ""
    filled_quantity: dict[Side, Decimal] = msgspec.field(default_factory=dict)
    order_id: dict[Side, str | None] = msgspec.field(default_factory=dict)
    leg: Leg = Leg.NEAR
    ratio: float = 0.0


def encoded(context: TaskContext, **options: Any) -> bytes:
    return encode_context(
        context,
        **{"type": "iceberg", "schema": 1, "saved_ns": 5, "epoch": 2, **options},
    )


def test_a_context_comes_back_as_it_was() -> None:
    context = IcebergTaskContext(
        task_id="iceberg-1",
        state="EXECUTING",
        symbol="BTC/USDT",
        side=Side.SELL,
        total_quantity="0.123456789012345678901234567890",  # type: ignore[arg-type]
        error=TaskError(type="ValueError", message="bad", when_ns=3),
        metadata={"note": "ä", "ratio": 0.5, "list": [1, None]},
    )

    assert decode_context(encoded(context), IcebergTaskContext) == context


def test_the_head_says_what_it_is_without_the_class() -> None:
    data = encoded(IcebergTaskContext(task_id="i1", state="IDLE"))

    assert data.startswith(b'{"_meta":{"type":"iceberg"')
    assert peek_meta(data) == {
        "type": "iceberg",
        "schema": 1,
        "saved_ns": 5,
        "epoch": 2,
        "program": nightdesk.__version__,
        "task_id": "i1",
        "state": "IDLE",
    }


def test_unknown_fields_are_kept_and_written_back_at_the_top() -> None:
    newer = json.loads(encoded(IcebergTaskContext(task_id="i1")))
    newer["added_later"] = {"a": [1, 2.5, "x"]}

    context = decode_context(json.dumps(newer), IcebergTaskContext)
    again = json.loads(encoded(context.evolve(state="IDLE")))

    assert context.unknown == {"added_later": {"a": [1, 2.5, "x"]}}
    assert again["added_later"] == {"a": [1, 2.5, "x"]}
    assert "unknown" not in again


def test_an_unknown_field_cannot_shadow_a_real_one() -> None:
    context = IcebergTaskContext(task_id="i1", unknown={"task_id": "other", "_meta": 1})

    assert decode_context(encoded(context), IcebergTaskContext).task_id == "i1"


def first_to_second(fields: dict[str, Any]) -> dict[str, Any]:
    fields["venue"] = fields.pop("exchange_name")
    return fields


def second_to_third(fields: dict[str, Any]) -> dict[str, Any]:
    fields["offset_ticks"] = int(fields["offset_ticks"]) * 10
    return fields


def test_old_versions_are_brought_forward_step_by_step() -> None:
    old = {
        "_meta": {"type": "iceberg", "schema": 1},
        "task_id": "i1",
        "state": "waiting",
        "offset_ticks": "2",
    }
    migrations = {1: first_to_second, 2: second_to_third}

    context = decode_context(
        json.dumps({**old, "exchange_name": "mexc", "kept": 1}),
        IcebergTaskContext,
        migrations=migrations,
        schema=3,
    )

    assert (context.venue, context.offset_ticks, context.state) == (
        "mexc",
        20,
        "waiting",
    )
    assert context.unknown == {"kept": 1}
    assert peek_meta(encoded(context, schema=3))["schema"] == 3


def test_a_newer_version_is_refused_by_name() -> None:
    with pytest.raises(
        NewerSchemaError, match=r"context 'i1'.*version 4 is newer.*\(3\)"
    ):
        decode_context(
            encoded(IcebergTaskContext(task_id="i1"), schema=4),
            IcebergTaskContext,
            schema=3,
        )


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "truncated"),
        (b"[]", "object"),
        (b'{"task_id": "i1"', "truncated"),
        (b'{"task_id": "i1", "symbol": "\xff"}', "utf-8"),
        (b'{"_meta": 3, "task_id": "i1"}', "_meta|object"),
        (
            b'{"_meta": {"schema": 1}, "task_id": "i1", "offset_ticks": "many"}',
            "offset_ticks",
        ),
        (
            b'{"_meta": {"schema": 1}, "task_id": "i1", "total_quantity": "1.2.3"}',
            "total_quantity",
        ),
        (b'{"task_id": "i1", "state": 77}', "no state has the number 77"),
        (b'{"task_id": "i1", "side": 2}', "side"),
        (
            b'{"task_id": "i1", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "recursion|nest|depth",
        ),
    ],
)
def test_a_mistake_is_named_with_the_task_and_the_place(
    data: bytes, found: str
) -> None:
    with pytest.raises(RecordCorruptError) as caught:
        decode_context(data, IcebergTaskContext)

    assert caught.value.key == ("i1" if b"i1" in data else "?")
    assert any(word in caught.value.found.lower() for word in found.split("|")), (
        caught.value.found
    )


def test_a_missing_or_failing_migration_is_a_corrupt_record_not_a_crash() -> None:
    data = encoded(IcebergTaskContext(task_id="i1"))

    with pytest.raises(
        RecordCorruptError, match="no migration from schema version 1 to 2"
    ):
        decode_context(data, IcebergTaskContext, schema=2)
    with pytest.raises(RecordCorruptError, match="exchange_name"):
        decode_context(
            data, IcebergTaskContext, migrations={1: first_to_second}, schema=2
        )


def test_peeking_into_garbage_is_a_corrupt_record() -> None:
    with pytest.raises(RecordCorruptError):
        peek_meta(b"\x00")


# --- golden files: never changed once released ------------------------------------------------------


def test_the_golden_context_of_schema_1_loads() -> None:
    context = decode_context(
        (GOLDEN / "context-schema-1.json").read_bytes(), PairContext
    )

    assert context == PairContext(
        task_id="pair-7",
        state="REBALANCING",
        error=TaskError(
            type="TimeoutError",
            message="no reply",
            where="x.py:3 in f",
            when_ns=1_700_000_000_000_000_000,
        ),
        metadata={"note": "ä", "tries": 3},
        symbol="BTC/USDT",
        filled_quantity={
            Side.BUY: Decimal("0.30000000000000000001"),
            Side.SELL: Decimal("0.1"),
        },
        order_id={Side.BUY: "nd1-1-2", Side.SELL: None},
        leg=Leg.FAR,
        ratio=0.25,
        unknown={"from_a_later_version": [1, 2]},
    )


def test_version_1_is_still_written_as_in_the_golden_file() -> None:
    golden = json.loads((GOLDEN / "context-schema-1.json").read_bytes())
    context = decode_context(json.dumps(golden), PairContext)
    meta = golden["_meta"]

    written = json.loads(
        encode_context(
            context,
            type=meta["type"],
            schema=1,
            saved_ns=meta["saved_ns"],
            epoch=meta["epoch"],
        )
    )

    written["_meta"]["program"] = meta["program"]
    assert written == golden


def test_a_context_of_design_001_loads() -> None:
    """Numbers for states, an error as text, sides in any case, symbols as objects, floats for money."""
    data = (GOLDEN / "context-design-001.json").read_bytes()

    context = decode_context(data, PairContext)

    assert context.state == "EXECUTING"
    assert context.error == TaskError(type="Exception", message="insufficient balance")
    assert context.symbol == "BTC/USDT"
    assert context.filled_quantity == {
        Side.BUY: Decimal("0.1"),
        Side.SELL: Decimal("0.30000000000000004"),
    }
    assert context.order_id == {Side.BUY: None, Side.SELL: "77"}
    assert context.leg is Leg.FAR
    assert set(context.unknown) == {"direction", "_saved_at"}
    assert peek_meta(data)["type"] == "delta_neutral"
    assert peek_meta(data)["state"] == "EXECUTING"


@pytest.mark.parametrize(
    ("saved", "state"),
    [(-1, "NOT_STARTED"), (0, "PAUSED"), (1, "IDLE"), (100, "COMPLETED"), (-2, "CANCELLED"), (-100, "ERROR"),
     ("TradingStrategyState.MONITORING", "MONITORING"), ("idle", "IDLE"), ("my_own", "my_own")],
)  # fmt: skip
def test_states_of_design_001_have_names(saved: Any, state: str) -> None:
    data = json.dumps({"task_id": "iceberg_1", "state": saved})

    assert decode_context(data, IcebergTaskContext).state == state
    assert peek_meta(data)["state"] == state


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"task_id": "delta_neutral_BTC_USDT_17"}, "delta_neutral"),
        ({"task_id": "iceberg_1700000000"}, "iceberg"),
        ({"task_id": "IcebergTask_MEXC_BTC"}, "iceberg"),
        ({"task_id": "17", "task_type": "DeltaNeutralTask"}, "delta_neutral"),
        ({"task_id": "17", "metadata": {"task_type": "IcebergTask"}}, "iceberg"),
        ({"task_id": "17"}, ""),
    ],
)
def test_the_type_of_a_design_001_record_is_found(
    fields: dict[str, Any], name: str
) -> None:
    assert peek_meta(json.dumps(fields))["type"] == name


def test_the_face_of_design_001() -> None:
    context = IcebergTaskContext(task_id="i1", symbol="BTC/USDT", total_quantity=0.1)  # type: ignore[arg-type]

    text = TaskSerializer.serialize_context(context)

    assert isinstance(text, str)
    assert TaskSerializer.deserialize_context(text, IcebergTaskContext) == context
    assert TaskSerializer.extract_task_metadata(text)["task_type"] == "iceberg"


def test_class_names_become_type_names() -> None:
    names = ["IcebergTaskContext", "DeltaNeutralTask", "PairContext", "TaskContext"]

    assert [type_name(name) for name in names] == [
        "iceberg",
        "delta_neutral",
        "pair",
        "task",
    ]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.builds(
        PairContext,
        task_id=st.text(min_size=1),
        state=st.text(),
        metadata=st.dictionaries(st.text(), json_values, max_size=3),
        filled_quantity=st.dictionaries(
            st.sampled_from(Side), st.decimals(allow_nan=False, allow_infinity=False)
        ),
        order_id=st.dictionaries(st.sampled_from(Side), st.none() | st.text()),
        leg=st.sampled_from(Leg),
        unknown=st.dictionaries(
            st.from_regex(r"x_[a-z]+", fullmatch=True), json_values, max_size=3
        ),
    )
)
def test_any_context_survives_the_way_there_and_back(context: PairContext) -> None:
    data = encode_context(context, type="pair", schema=1, saved_ns=1)

    assert decode_context(data, PairContext) == context
    assert peek_meta(data)["task_id"] == context.task_id


@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | json_values.map(lambda v: json.dumps(v).encode())
)
def test_any_bytes_are_a_context_or_a_corrupt_record(data: bytes) -> None:
    for read in (lambda: decode_context(data, PairContext), lambda: peek_meta(data)):
        try:
            read()
        except (RecordCorruptError, NewerSchemaError):
            continue
