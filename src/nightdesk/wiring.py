"""From entries of the configuration to objects: which class, with which arguments.

Comes from: config.py, loading/
Goes to: desk.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from nightdesk import loading
from nightdesk.abc import Clock, Source, Store, Venue
from nightdesk.config import Config, SourceConfig, VenueConfig
from nightdesk.errors import ConfigError
from nightdesk.exchange import build_paper_venue
from nightdesk.stores.files import FilesStore
from nightdesk.stores.memory import MemoryStore
from nightdesk.stores.sqlite import SqliteStore

__all__ = [
    "build_source",
    "build_store",
    "build_venue",
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
    venue: Venue = _construct(
        kind, entry.name, entry.options, config, f"venues.{entry.name}"
    )
    return venue


def build_source(entry: SourceConfig, config: Config) -> Source:
    kind = loading.load_class("source", entry.type, config.search_path)
    options = entry.options
    replays = sum(source.type == "replay" for source in config.sources)
    if entry.type == "replay" and replays > 1:
        options = {"origin_ns": start_of_recordings(config), **options}
    source: Source = _construct(
        kind, entry.name, options, config, f"sources.{entry.name}"
    )
    return source


def _construct(
    kind: type, name: str, options: dict[str, Any], config: Config, where: str
) -> Any:
    try:
        return kind(name, **options)
    except (TypeError, ValueError, msgspec.ValidationError) as error:
        raise ConfigError(config.source_file, [f"{where}: {error}."]) from error


def start_of_recordings(config: Config) -> int:
    """Return the first receipt stamp of every recording, in UTC nanoseconds: where virtual time begins."""
    from nightdesk.sources.replay import start_ns

    starts = [
        start_ns(source.options.get("files", ()))
        for source in config.sources
        if source.type == "replay"
    ]
    return min(starts, default=0)
