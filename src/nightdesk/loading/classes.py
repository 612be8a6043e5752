"""From the name in `type:` to the class. A folder is the list; there is no registry to keep.

Comes from: desk.py, loading/check.py
Goes to: tasks/, venues/, sources/, stores/, alerts/, signals/
"""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from nightdesk import abc
from nightdesk.config import Config
from nightdesk.errors import ConfigError, UnknownTypeError

__all__ = ["KINDS", "catalog", "load_class", "load_function_or_class", "load_task"]

KINDS: dict[str, type] = {
    "task": abc.Task,
    "venue": abc.Venue,
    "source": abc.Source,
    "store": abc.Store,
    "alert": abc.Alert,
    "signal": abc.Signal,
}
_PACKAGE = Path(__file__).parents[1]


@cache
def catalog(kind: str) -> tuple[str, ...]:
    """Return the types of a collection by the names of its files, without importing one of them."""
    return tuple(sorted(path.stem for path in (_PACKAGE / f"{kind}s").glob("[!_]*.py")))


def load_class(
    kind: str, name: str, search_path: str = ".", where: str = "desk.yaml"
) -> type:
    """Return the class that `type: name` means.

    Args:
        kind: `task`, `venue`, `source`, `store`, `alert` or `signal`.
        name: A file of the collection, or a dotted name of the user's own module or class.
        search_path: Directory of the user's modules.
        where: Named in errors.

    Raises:
        UnknownTypeError: The collection has no such file.
        ConfigError: The user's module cannot be imported, or holds no such class.
    """
    found = load_function_or_class(kind, name, search_path, where)
    if not isinstance(found, type):
        raise ConfigError(
            where, [f"{name!r} is a function; only tasks may be functions."]
        )
    return found


def load_task(name: str, config: Config) -> Any:
    """Return the Task subclass, or the user's function, that `type: name` means.

    Raises:
        ConfigError: As `load_class`.
    """
    return load_function_or_class("task", name, config.search_path, config.source_file)


def load_function_or_class(kind: str, name: str, search_path: str, where: str) -> Any:
    """As `load_class`; for a task, a plain function of the user's will do, too."""
    if "." in name:
        return _users_own(kind, name, search_path, where)
    if name not in catalog(kind):
        raise UnknownTypeError(kind, name, catalog(kind), where)
    return _of_collection(kind, name)


@cache
def _of_collection(kind: str, name: str) -> type:
    module = importlib.import_module(f"nightdesk.{kind}s.{name}")
    found = _classes(module, KINDS[kind])
    assert len(found) == 1, (
        f"{module.__name__} must define exactly one {kind}, found {found}"
    )
    return found[0]


def _classes(module: ModuleType, contract: type) -> list[type]:
    return [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, contract)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]


def _users_own(kind: str, name: str, search_path: str, where: str) -> Any:
    contract = KINDS[kind]
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(
            where,
            [
                f"{name!r} is no dotted name. Write it as in `import`: `my_desk.grid_task`."
            ],
        )
    with _importable(search_path):
        module = _import(name, where, search_path)
        if module is not None:
            found = _classes(module, contract)
            if len(found) == 1:
                return found[0]
            names = ", ".join(c.__name__ for c in found) or f"no {contract.__name__}"
            raise ConfigError(
                where,
                [
                    f"module {name!r} defines {names}; name one of them: `type: {name}.NAME`."
                ],
            )
        parent, _, attribute = name.rpartition(".")
        module = _import(parent, where, search_path)
    if module is None:
        top = name.split(".")[0]
        raise ConfigError(
            where,
            [
                f"no module {parent!r} for {name!r}. Put `{top}.py` or a folder `{top}` into {Path(search_path).resolve()}."
            ],
        )
    value = getattr(module, attribute, None)
    if isinstance(value, type) and issubclass(value, contract):
        return value
    if kind == "task" and callable(value) and not isinstance(value, type):
        return _checked(value, name, where)
    known = [c.__name__ for c in _classes(module, contract)]
    if kind == "task":
        known += [
            n
            for n, v in vars(module).items()
            if inspect.isfunction(v) and v.__module__ == module.__name__
        ]
    hint = (
        f"It has {', '.join(known)}."
        if known
        else f"It has no {contract.__name__} at all."
    )
    raise ConfigError(where, [f"module {parent!r} has no {kind} {attribute!r}. {hint}"])


def _checked(function: Callable[..., Any], name: str, where: str) -> Callable[..., Any]:
    """A function may take the desk's handle and keyword parameters, nothing else by position."""
    required = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 1:
        raise ConfigError(
            where,
            [
                f"function {name!r} wants {', '.join(required)}; a task function takes at most `desk` by position."
            ],
        )
    return function


@contextmanager
def _importable(search_path: str) -> Iterator[None]:
    """The user's directory comes last on the path, so that a file named like a library hides nothing."""
    directory = str(Path(search_path).resolve())
    if directory not in sys.path:
        sys.path.append(directory)
        importlib.invalidate_caches()
    yield


def _import(name: str, where: str, search_path: str) -> ModuleType | None:
    """Return the module, or None if there is none of that name (as opposed to one that fails)."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            return None
        raise _import_error(name, where, search_path, error) from error
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}"
        raise ConfigError(
            where, [f"{name!r} cannot be imported: {place}: {error.msg}."]
        ) from error
    except (KeyboardInterrupt, SystemExit, GeneratorExit) as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _import_error(name, where, search_path, error) from error
    except Exception as error:
        raise _import_error(name, where, search_path, error) from error


def _import_error(
    name: str, where: str, search_path: str, error: BaseException
) -> ConfigError:
    root = str(Path(search_path).resolve())
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(root)] or frames[-1:]
    return ConfigError(
        where,
        [
            f"{name!r} cannot be imported: {own[-1].filename}, line {own[-1].lineno}: {type(error).__name__}: {error}."
        ],
    )
