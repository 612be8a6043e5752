"""What every file of `tasks/` promises: one task, a context that survives a restart, honest defaults."""

import importlib
import inspect
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fakes.desk import FakeDesk, attach, instrument, settle
from nightdesk.abc import OpportunityHandler, Task
from nightdesk.model.context import FINAL_STATES, TaskContext
from nightdesk.model.events import Event
from nightdesk.model.order import Side
from nightdesk.model.priority import Priority

FOLDER = Path(__file__).parents[2] / "src" / "nightdesk" / "tasks"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))

PAIR: dict[str, Any] = {"symbol": "BTC/USDT", "venue": "A"}
ORDER: dict[str, Any] = {**PAIR, "side": "BUY", "total_quantity": "1"}
PARAMS: dict[str, dict[str, Any]] = {
    "arbitrage": {"symbol": "BTC/USDT", "venues": ["A", "B"], "quantity": "1"},
    "delta_neutral": {
        "symbol": "BTC/USDT",
        "venues": {"BUY": "A", "SELL": "B"},
        "total_quantity": "1",
        "order_quantity": "0.5",
    },
    "iceberg": {**ORDER, "order_quantity": "0.3"},
    "spread_watch": {"symbol": "BTC/USDT", "venues": ["A", "B"]},
    "twap": {**ORDER, "duration_s": 60.0},
}
"""The least that `desk.yaml` must say; a type that is not listed runs without any parameter."""


def kind_of(name: str) -> type[Task[Any]]:
    module = importlib.import_module(f"nightdesk.tasks.{name}")
    kinds = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Task)
        and value.__module__ == module.__name__
    ]
    assert len(kinds) == 1, f"tasks/{name}.py defines {kinds}"
    return kinds[0]


def task_of(name: str) -> Task[Any]:
    kind = kind_of(name)
    params = {"task_id": f"{name}-1", **PARAMS.get(name, {})}
    return kind(msgspec.convert(params, kind.context_class, strict=False))


pytestmark = pytest.mark.parametrize("name", NAMES)


def test_the_file_offers_its_task_and_its_context(name: str) -> None:
    kind = kind_of(name)
    offered = importlib.import_module(f"nightdesk.tasks.{name}").__all__

    assert kind.__name__ in offered
    assert kind.context_class.__name__ in offered
    assert kind.__name__ == "".join(part.title() for part in name.split("_")) + "Task"


def test_class_and_context_say_what_they_are(name: str) -> None:
    kind = kind_of(name)

    assert inspect.getdoc(kind) not in (None, inspect.getdoc(Task))
    assert inspect.getdoc(kind.context_class) not in (None, inspect.getdoc(TaskContext))


def test_the_class_attributes_are_of_the_contract(name: str) -> None:
    kind = kind_of(name)

    assert issubclass(kind.context_class, TaskContext)
    assert kind.context_class is not TaskContext
    assert isinstance(kind.priority, Priority)
    assert kind.runs_in in ("desk", "background")
    assert all(issubclass(event, Event) for event in kind.listens)
    if issubclass(kind, OpportunityHandler):
        assert kind.handles
        assert kind.runs_in == "desk"


def test_it_is_made_from_its_parameters(name: str) -> None:
    task = task_of(name)

    assert task.context.state == "NOT_STARTED"
    keys = task.keys()
    assert all(isinstance(key, str) and "@" in key for key in keys)


def test_its_context_survives_json(name: str) -> None:
    context = task_of(name).context
    again = msgspec.json.decode(msgspec.json.encode(context), type=type(context))

    assert again == context
    assert msgspec.json.encode(again) == msgspec.json.encode(context)


async def test_it_runs_waits_and_leaves_a_context_that_survives_json(name: str) -> None:
    desk = FakeDesk(instrument(venue="A"), instrument(venue="B"))
    desk.quote("100.0", "100.2", "A")
    desk.quote("100.0", "100.2", "B")
    task = await attach(task_of(name), desk)

    await settle(task)
    result = await task.step()

    assert task.context.state not in FINAL_STATES
    assert result.next_delay > 0
    again = msgspec.json.decode(
        msgspec.json.encode(task.context), type=type(task.context)
    )
    assert again == task.context


async def test_a_restart_at_rest_sends_nothing(name: str) -> None:
    desk = FakeDesk(instrument(venue="A"), instrument(venue="B"))
    desk.quote("100.0", "100.2", "A")
    desk.quote("100.0", "100.2", "B")
    await settle(await attach(task_of(name), desk))
    sent = len(desk.sent)

    await settle(await attach(task_of(name), desk))

    assert len(desk.sent) == sent
    assert desk.cancels == []


def test_fields_that_hold_money_are_decimals(name: str) -> None:
    context = task_of(name).context
    money = ("quantity", "price", "pnl", "fee", "delta", "notional", "usd")

    for field in context.__struct_fields__:
        value = getattr(context, field)
        if field.endswith(money):
            assert not isinstance(value, float), field
    for value in (
        getattr(context, "filled_quantity", {Side.BUY: Decimal(0)}).values()
        if isinstance(getattr(context, "filled_quantity", None), dict)
        else ()
    ):
        assert isinstance(value, Decimal)
