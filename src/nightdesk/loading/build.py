"""From typed configuration to objects: what `desk.py` asks for when it builds the house.

Comes from: desk.py
Goes to: stores/, venues/, sources/, tasks/
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec

from nightdesk.abc import Clock, Source, Store, Task, Venue
from nightdesk.config import Config, SourceConfig, TaskEntry, VenueConfig
from nightdesk.errors import CommandError, ConfigError
from nightdesk.loading import parameters
from nightdesk.loading.classes import load_class
from nightdesk.loading.convert import convert
from nightdesk.loading.parameters import Parameter
from nightdesk.loading.words import shown
from nightdesk.market.matching import MatchingEngine
from nightdesk.model.context import TaskContext
from nightdesk.model.instrument import Instrument
from nightdesk.model.priority import Priority
from nightdesk.model.schedule import Schedule

__all__ = [
    "adjustments",
    "build_source",
    "build_store",
    "build_venue",
    "function_cycle",
    "make_context",
    "start_of_recordings",
]

SIMULATED_START_NS = 1_704_067_200_000_000_000
"""Where virtual time begins when no recording says otherwise: 2024-01-01T00:00:00Z."""


def build_store(config: Config, clock: Clock, *, on_failure: Callable[[Exception], None] | None = None) -> Store:
    """Return the store that `state` names, not yet opened. Virtual time saves in line, so that a run repeats."""
    kind = load_class("store", config.state.store, config.search_path, config.source_file)
    accepted = inspect.signature(kind).parameters
    given: dict[str, Any] = {"clock": clock, "inline": config.virtual_time, "on_failure": on_failure}
    if "directory" in accepted:
        given["directory"] = Path(config.state.directory)
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        given = {name: value for name, value in given.items() if name in accepted}
    return cast(Store, kind(**given))


async def build_venue(entry: VenueConfig, config: Config, directory: Path) -> Venue:
    """Return one venue, not yet started; its own files lie in `directory/venues/<name>`."""
    kind = load_class("venue", entry.type, config.search_path, config.source_file)
    known, _ = parameters.of_part(kind)
    options = _typed(entry.options, known, f"{config.source_file}: venue {entry.name!r}")
    accepted = inspect.signature(kind).parameters
    if "matching" in accepted:
        engine = {name: options.pop(name) for name in parameters.engine_keywords() if name in options}
        instruments = [_instrument(each, entry.name) for each in options.get("instruments", ())]
        options["instruments"] = instruments
        options["matching"] = MatchingEngine(entry.name, instruments, **engine)
    if "directory" in accepted:
        options["directory"] = None if config.state.store == "memory" else directory / "venues" / entry.name
    return cast(Venue, _made(kind, entry.name, options, config))


def build_source(entry: SourceConfig, config: Config) -> Source:
    """Return one source, not yet started."""
    kind = load_class("source", entry.type, config.search_path, config.source_file)
    known, _ = parameters.of_part(kind)
    options = _typed(entry.options, known, f"{config.source_file}: source {entry.name!r}")
    return cast(Source, _made(kind, entry.name, options, config))


def _instrument(each: Any, venue: str) -> Instrument:
    if isinstance(each, Instrument):
        return each
    return msgspec.convert({"venue": venue, **each}, Instrument, strict=False)


def _made(kind: type, name: str, options: dict[str, Any], config: Config) -> Any:
    accepted = inspect.signature(kind).parameters
    if "name" in accepted:
        options["name"] = name
    try:
        made = kind(**options)
    except (TypeError, ValueError, msgspec.ValidationError) as error:
        raise ConfigError(config.source_file, [f"{name!r} cannot be built: {error}."]) from error
    made.name = name
    return made


def make_context(kind: type[Task[Any]], entry: TaskEntry, config: Config) -> TaskContext:
    """Return the first context of a task, from its parameters.

    Raises:
        ConfigError: Names every parameter that cannot be used.
    """
    where = f"{config.source_file}: task {entry.id!r}"
    known = parameters.of_task(kind)
    unknown = [name for name in entry.params if name not in known]
    missing = [name for name, p in known.items() if p.required and name not in entry.params]
    problems = [f"no parameter `{name}`; {entry.type} knows {', '.join(known)}." for name in unknown]
    problems += [f"needs the parameter `{name}`." for name in missing]
    if problems:
        raise ConfigError(where, problems)
    values = _typed(entry.params, known, where)
    try:
        return kind.context_class(task_id=entry.id, **values)
    except (TypeError, ValueError) as error:
        raise ConfigError(where, [f"{error}."]) from error


def _typed(options: Mapping[str, Any], known: Mapping[str, Parameter], where: str) -> dict[str, Any]:
    """Convert what `desk.yaml` (or a program) gave to what the class asks for."""
    found: dict[str, Any] = {}
    problems = []
    for name, value in options.items():
        hint = known[name].hint if name in known else Any
        if hint is Any or parameters.struct_in(hint)[0] is not None or _is_made(value):
            found[name] = value
            continue
        try:
            found[name] = convert(value, hint, name)
        except ValueError as error:
            problems.append(f"`{name}` is {shown((name,), value)}, expected {error}.")
    if problems:
        raise ConfigError(where, problems)
    return found


def _is_made(value: Any) -> bool:
    """A program may hand over ready structs or objects; those pass as they are."""
    return isinstance(value, msgspec.Struct)


def function_cycle(
    function: Callable[..., Any], desk: Any, params: Mapping[str, Any] | None = None
) -> Callable[[], Awaitable[None]]:
    """Return one cycle of a plain function: the function face of a task.

    An `async def` runs on the loop. A plain `def` runs in a thread, because it may block; if it takes
    the handle (a parameter called `desk`, or one without a default) it runs on the loop, where the handle lives.
    """
    takes_desk, arguments = _call_plan(function, dict(params or {}))
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004

        async def run() -> None:
            await function(*((desk,) if takes_desk else ()), **arguments)

    elif takes_desk:

        async def run() -> None:
            result = function(desk, **arguments)
            if inspect.isawaitable(result):
                await result

    else:

        async def run() -> None:
            result = await asyncio.to_thread(function, **arguments)
            if inspect.isawaitable(result):
                await result

    return run


def _call_plan(function: Callable[..., Any], params: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    try:
        accepted = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return False, params
    positional = [p for p in accepted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    first = positional[0] if positional else None
    return first is not None and (first.name == "desk" or (first.default is first.empty and first.name not in params)), params


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
            elif key == "priority":
                found["priority"] = Priority.parse(value)
            else:
                raise CommandError(f"nothing called {name!r} can be adjusted: expected every, priority or timeout")
        except ValueError as error:
            raise CommandError(f"{name} is {value!r}, expected {error}") from None
    return found


def start_of_recordings(config: Config) -> int:
    """Return the UTC nanoseconds at which virtual time begins: the first event of the recordings."""
    starts = []
    for entry in config.sources:
        first = getattr(build_source(entry, config), "first_event_ns", None)
        if callable(first):
            first = first()
        if isinstance(first, int) and first > 0:
            starts.append(first)
    return min(starts, default=SIMULATED_START_NS)
