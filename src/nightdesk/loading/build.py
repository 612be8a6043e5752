"""The last step from configuration to a running task: a first context, a cycle, a change.

Comes from: wiring.py, host.py
Goes to: tasks/, kernel/scheduler.py
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from nightdesk.abc import Task
from nightdesk.config import Config, TaskEntry
from nightdesk.errors import CommandError, ConfigError
from nightdesk.loading.convert import convert
from nightdesk.loading.parameters import of_task
from nightdesk.loading.words import shown
from nightdesk.model.context import TaskContext
from nightdesk.model.priority import Priority
from nightdesk.model.schedule import Schedule

__all__ = ["adjustments", "function_cycle", "make_context", "make_task"]


def make_context(
    kind: type[Task[Any]], entry: TaskEntry, config: Config
) -> TaskContext:
    """Return the first context of a task, from its parameters.

    Raises:
        ConfigError: Names every parameter that cannot be used.
    """
    known = of_task(kind)
    missing = [
        name for name, p in known.items() if p.required and name not in entry.params
    ]
    problems = [f"needs the parameter `{name}`." for name in missing]
    values: dict[str, Any] = {}
    for name, value in entry.params.items():
        if name not in known:
            problems.append(
                f"no parameter `{name}`; {entry.type} knows {', '.join(known)}."
            )
        elif isinstance(value, msgspec.Struct):
            values[name] = value  # a program may hand over ready values
        else:
            try:
                values[name] = convert(value, known[name].hint, name)
            except ValueError as error:
                problems.append(
                    f"`{name}` is {shown((name,), value)}, expected {error}."
                )
    where = f"{config.source_file}: task {entry.id!r}"
    if problems:
        raise ConfigError(where, problems)
    try:
        return kind.context_class(task_id=entry.id, **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(where, [f"{error}."]) from error


def make_task(kind: type[Task[Any]], entry: TaskEntry, config: Config) -> Task[Any]:
    """Return a task that begins afresh.

    Raises:
        ConfigError: Its parameters cannot be used, one by one or together.
    """
    context = make_context(kind, entry, config)
    try:
        return kind(context)
    except (TypeError, ValueError) as error:
        where = f"{config.source_file}: task {entry.id!r}"
        raise ConfigError(where, [f"{error}."]) from error


def function_cycle(
    function: Callable[..., Any], desk: Any, params: Mapping[str, Any] | None = None
) -> Callable[[], Awaitable[float | None]]:
    """Return one cycle of a plain function: the function face of a task.

    An `async def` runs on the loop. A plain `def` runs in a thread, because it may block; if it takes
    the handle (a parameter `desk`, or one without a default) it runs on the loop, where the handle lives.
    A number that it returns is the seconds until its next run.
    """
    takes_desk, arguments = _call_plan(function, dict(params or {}))
    handle = (desk,) if takes_desk else ()
    in_thread = (
        not takes_desk
        and inspect.isfunction(function)
        and not inspect.iscoroutinefunction(function)
    )

    async def cycle() -> float | None:
        result = (
            await asyncio.to_thread(function, **arguments)
            if in_thread
            else function(*handle, **arguments)
        )
        if inspect.isawaitable(result):
            result = await result
        return (
            result
            if isinstance(result, (int, float)) and not isinstance(result, bool)
            else None
        )

    return cycle


def _call_plan(
    function: Callable[..., Any], params: dict[str, Any]
) -> tuple[bool, dict[str, Any]]:
    try:
        accepted = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return False, params
    positional = [
        p for p in accepted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if not positional:
        return False, params
    first = positional[0]
    return first.name == "desk" or (
        first.default is first.empty and first.name not in params
    ), params


def adjustments(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Scheduler.adjust` for what an operator typed: `every`, `priority`, `timeout`.

    Raises:
        CommandError: Names what cannot be used.
    """
    found: dict[str, Any] = {}
    for name, value in changes.items():
        key = name.removesuffix("_s")
        try:
            if key == "every":
                seconds = convert(value, float, "every_s")
                if seconds <= 0:
                    raise ValueError("more than 0")
                found["schedule"] = Schedule(every_s=seconds)
            elif key == "timeout":
                found["timeout_s"] = convert(value, float, "timeout_s")
                if found["timeout_s"] <= 0:
                    raise ValueError("more than 0")
            elif key == "priority":
                found["priority"] = Priority.parse(value)
            else:
                raise CommandError(
                    f"nothing called {name!r} can be adjusted: expected every, priority or timeout"
                )
        except ValueError as error:
            expected = str(error).rpartition("expected ")[2]
            raise CommandError(f"{name} is {value!r}, expected {expected}.") from None
    return found
