"""`desk.yaml` becomes a desk: text to typed structs, names to classes.

Every problem of a configuration is found in one pass and told with its file, line, key, what was
expected, and what was probably meant (R-26).

Comes from: cli/
Goes to: config.py, wiring.py, host.py
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from nightdesk.config import Config
from nightdesk.errors import ConfigError
from nightdesk.loading.build import (
    adjustments,
    function_cycle,
    make_context,
    make_task,
)
from nightdesk.loading.check import SECTIONS, check
from nightdesk.loading.classes import catalog, load_class, load_task
from nightdesk.loading.document import read_file
from nightdesk.loading.overlays import overlay_environment, overlay_flags
from nightdesk.loading.tree import Problems, Tree
from nightdesk.loading.words import is_secret

__all__ = [
    "DEFAULT_FILE",
    "adjustments",
    "catalog",
    "check_config",
    "function_cycle",
    "load_class",
    "load_config",
    "load_task",
    "make_context",
    "make_task",
    "sample_config",
    "secrets_of",
]

DEFAULT_FILE = "desk.yaml"
_FLAGS = {
    "state.directory": "--state",
    "log_level": "--log-level",
    "allow_empty": "--allow-empty",
    "virtual_time": "--fast",
}


def load_config(
    path: str | Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """Return the checked configuration. Order: flag, environment, file, default.

    Args:
        path: The file; None takes `desk.yaml` of the working directory.
        environment: Variables `NIGHTDESK__SECTION__KEY`; others are ignored.
        flags: From a path such as `state.directory` to a value; None is not given.

    Raises:
        ConfigError: Lists every problem of it.
    """
    file = Path(path or DEFAULT_FILE)
    problems = Problems(str(file))
    tree = read_file(file, problems)
    overlay_environment(tree, environment or {}, problems, SECTIONS)
    overlay_flags(
        tree, flags or {}, lambda key: _FLAGS.get(key, f"--{key.replace('_', '-')}")
    )
    return check(tree, problems, _search_path(tree, file))


def _search_path(tree: Tree, file: Path) -> str:
    """The user's modules lie beside the file, unless it says where."""
    given = tree.value.get("search_path")
    if isinstance(given, str):
        tree.value["search_path"] = str(file.parent / given)
        return str(file.parent / given)
    return str(file.parent)


def check_config(
    path: str | Path | None = None, environment: Mapping[str, str] | None = None
) -> list[str]:
    """Return what is wrong or doubtful in a configuration, one line each, without starting anything.

    Lines that begin with `warning:` keep nothing from running.
    """
    try:
        config = load_config(path, environment=environment)
    except ConfigError as error:
        return str(error).splitlines()
    return [f"warning: {config.source_file}: {text}" for text in _doubts(config)]


def _doubts(config: Config) -> list[str]:
    doubts = []
    if not [entry for entry in config.tasks if entry.enabled]:
        doubts.append(
            "no task is enabled, so `nightdesk run` would refuse to start (exit code 3). Add one under `tasks:`."
        )
    if not config.sources:
        doubts.append("`sources` lists nothing, so no price would ever arrive.")
    if config.state.store == "memory":
        doubts.append("`state.store: memory` forgets everything when the desk stops.")
    if config.risk.max_daily_loss is None:
        doubts.append("`risk.max_daily_loss` is not set: nothing stops a losing day.")
    listed = {
        each.get("symbol")
        for venue in config.venues
        for each in venue.options.get("instruments", ())
    }
    strange = [symbol for symbol in config.risk.allowed_symbols if symbol not in listed]
    if strange and listed:
        doubts.append(
            f"`risk.allowed_symbols` names {', '.join(strange)}, which no venue lists."
        )
    doubts += _unlisted_symbols(config)
    silent = [entry.id for entry in config.tasks if not entry.enabled]
    if silent:
        doubts.append(f"disabled: {', '.join(silent)}.")
    return doubts


def _unlisted_symbols(config: Config) -> list[str]:
    """A task that names an instrument its venue does not list would wait for a price for ever."""
    listed = {
        venue.name: [
            each.get("symbol") for each in venue.options.get("instruments", ())
        ]
        for venue in config.venues
    }
    found = []
    for entry in config.tasks:
        symbol, venue = entry.params.get("symbol"), entry.params.get("venue")
        known = listed.get(venue) if isinstance(venue, str) else None
        if known and isinstance(symbol, str) and symbol not in known:
            found.append(
                f"task {entry.id!r}: `symbol` is {symbol!r}, which venue {venue} does not list. It has {', '.join(known)}."
            )
    return found


def sample_config() -> str:
    """Return the commented configuration that `nightdesk new-config` writes."""
    return (
        resources.files("nightdesk.cli")
        .joinpath("templates/desk.yaml")
        .read_text(encoding="utf-8")
    )


def secrets_of(config: Config) -> list[str]:
    """Return the secret values of a configuration, so that logs can hide them."""
    found: list[str] = []

    def walk(value: Any, hidden: bool) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, hidden or is_secret(str(key)))
        elif isinstance(value, (list, tuple)):
            for inner in value:
                walk(inner, hidden)
        elif hidden and isinstance(value, str) and len(value) >= 6:
            found.append(value)

    walk(msgspec.to_builtins(config), hidden=False)
    return found
