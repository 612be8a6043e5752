"""From entries of the configuration to objects: which class, with which arguments.

Comes from: config.py, loading/
Goes to: desk.py
"""

import inspect
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from nightdesk import loading
from nightdesk.abc import Clock, Source, Store, Task, Venue
from nightdesk.config import Config, SourceConfig, TaskEntry, VenueConfig
from nightdesk.errors import CommandError, ConfigError
from nightdesk.exchange import build_paper_venue
from nightdesk.handle import LocalDesk
from nightdesk.model.context import TaskContext
from nightdesk.model.priority import Priority
from nightdesk.model.schedule import Schedule
from nightdesk.stores.files import FilesStore
from nightdesk.stores.memory import MemoryStore
from nightdesk.stores.sqlite import SqliteStore

__all__ = [
    "adjustments",
    "build_source",
    "build_store",
    "build_venue",
    "function_cycle",
    "make_context",
    "start_of_recordings",
]


def build_store(
    config: Config, clock: Clock, on_failure: Callable[[Exception], None]
) -> Store:
    """Return the store of `config`; under the virtual clock it commits at once, so that order is certain."""
    directory = Path(config.state.directory)
    if config.state.store == "memory":
        return MemoryStore()
    kind = FilesStore if config.state.store == "files" else SqliteStore
    return kind(
        directory, clock=clock, inline=config.virtual_time, on_failure=on_failure
    )


async def build_venue(entry: VenueConfig, config: Config, directory: Path) -> Venue:
    """Return a venue; one in a process of its own is started if it does not run yet."""
    if entry.type == "paper":
        return await build_paper_venue(entry, config, directory)
    kind = loading.load_class("venue", entry.type, config.search_path)
    return _construct(kind, entry.name, entry.options, config, f"venues.{entry.name}")


def build_source(entry: SourceConfig, config: Config) -> Source:
    kind = loading.load_class("source", entry.type, config.search_path)
    return _construct(kind, entry.name, entry.options, config, f"sources.{entry.name}")


def _construct(
    kind: type, name: str, options: dict[str, Any], config: Config, where: str
) -> Any:
    try:
        return kind(name, **options)
    except (TypeError, ValueError, msgspec.ValidationError) as error:
        raise ConfigError(config.source_file, [f"{where}: {error}."]) from error


def make_context(kind: type[Task[Any]], entry: TaskEntry, config: Config) -> TaskContext:
    """Return a fresh context of a task from its entry.

    Raises:
        ConfigError: The parameters do not fit.
    """
    try:
        context = msgspec.convert(
            {**entry.params, "task_id": entry.id}, kind.context_class, strict=False
        )
    except msgspec.ValidationError as error:
        raise ConfigError(config.source_file, [f"task {entry.id!r}: {error}."]) from error
    return context


def function_cycle(
    function: Callable[..., Any], handle: LocalDesk
) -> Callable[[], Awaitable[float | None]]:
    """Return one cycle of a plain function, sync or async, that takes nothing or the desk's handle."""
    arguments = (handle,) if inspect.signature(function).parameters else ()

    async def cycle() -> float | None:
        result = function(*arguments)
        if inspect.isawaitable(result):
            result = await result
        return result if isinstance(result, (int, float)) and not isinstance(result, bool) else None

    return cycle


def adjustments(changes: dict[str, Any]) -> dict[str, Any]:
    """Turn an operator's words (`every`, `priority`, `timeout`) into what the scheduler takes.

    Raises:
        CommandError: An unknown word or a value that makes no sense.
    """
    known: dict[str, Any] = {}
    for name, value in changes.items():
        try:
            if name in ("every", "every_s"):
                known["schedule"] = Schedule(every_s=_positive(value))
            elif name in ("timeout", "timeout_s"):
                known["timeout_s"] = _positive(value)
            elif name == "priority":
                known["priority"] = Priority.parse(value)
            else:
                raise CommandError(
                    f"cannot adjust {name!r}: expected every, priority or timeout"
                )
        except ValueError as error:
            raise CommandError(f"{name} is {value!r}: {error}") from error
    return known


def _positive(value: Any) -> float:
    number = float(str(value).removesuffix("s"))
    if not 0 < number < 1e9:
        raise ValueError("expected seconds above 0")
    return number


def start_of_recordings(config: Config) -> int:
    """Return the first receipt stamp of every recording, in UTC nanoseconds: where virtual time begins."""
    from nightdesk.sources.replay import start_ns

    starts = [
        start_ns(source.options.get("files", ()))
        for source in config.sources
        if source.type == "replay"
    ]
    return min(starts, default=0)
