"""The tree against the types: one pass that finds every problem, and a `Config` if there is none.

Comes from: loading/tree.py
Goes to: config.py, desk.py
"""

import re
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal, get_args, get_origin

import msgspec

from nightdesk import config as shapes
from nightdesk.abc import Task
from nightdesk.config import Config, SourceConfig, TaskEntry, VenueConfig
from nightdesk.errors import ConfigError
from nightdesk.loading import parameters
from nightdesk.loading.build import make_context
from nightdesk.loading.classes import catalog, load_function_or_class
from nightdesk.loading.convert import convert, settle
from nightdesk.loading.parameters import Parameter
from nightdesk.loading.schedules import SCHEDULE_KEYS, read_schedule
from nightdesk.loading.tree import Key, Problems, Tree, path_text
from nightdesk.loading.words import nearest, shown, type_words
from nightdesk.model.priority import Priority
from nightdesk.model.schedule import Schedule

__all__ = ["SECTIONS", "check"]

_INTERNAL = frozenset({"source_file"})
_STRUCT_SECTIONS: dict[str, type[msgspec.Struct]] = {
    "state": shapes.StateConfig,
    "kernel": shapes.KernelConfig,
    "background": shapes.BackgroundConfig,
    "risk": shapes.RiskConfig,
}
_LISTS = ("venues", "sources", "tasks")
_DESIGN_004 = ("trading", "background_tasks")
SECTIONS = (
    *(f.name for f in msgspec.structs.fields(Config) if f.name not in _INTERNAL),
    *_DESIGN_004,
)

# Smallest sensible value; a key that is not here may be 0 or, where money is meant, anything.
_AT_LEAST: dict[Key, int] = {
    ("kernel", "slice_us"): 1,
    ("kernel", "opportunity_queue"): 1,
    ("kernel", "max_concurrent"): 1,
    ("kernel", "watchdog_lag_ms"): 1,
    ("background", "hosts"): 0,
    ("background", "memory_mb"): 16,
    ("risk", "max_orders_per_s"): 1,
    ("risk", "price_collar_ppm"): 0,
    ("risk", "max_notional_per_order"): 0,
    ("risk", "max_position_notional"): 0,
    ("risk", "max_gross_notional"): 0,
    ("risk", "max_daily_loss"): 0,
    ("risk", "starting_equity"): 0,
    ("state", "keep_completed_hours"): 0,
}
_AT_MOST: dict[Key, int] = {("background", "hosts"): 256}

_TASK_KEYS = (
    "id",
    "type",
    "count",
    "priority",
    "timeout",
    "timeout_s",
    "group",
    "after",
    "runs_in",
    "enabled",
    "params",
)
_OTHER_NAMES = {
    "market_data_collection": "candles",
    "position_monitoring": "position_monitor",
    "signal_generation": "signals",
    "risk_checks": "risk_check",
    "order_status_sync": "order_sync",
}
_MOST_COPIES = 100_000
_QUOTES = ("USDT", "USDC", "BUSD", "FDUSD", "USD", "EUR", "BTC", "ETH")
_MISSING = object()


def check(tree: Tree, problems: Problems, search_path: str) -> Config:
    """Return the whole configuration.

    Raises:
        ConfigError: Lists everything that is wrong with it.
    """
    checked = _Checker(tree, problems, search_path).config()
    if problems:
        raise problems.error()
    return checked


class _Checker:
    def __init__(self, tree: Tree, problems: Problems, search_path: str) -> None:
        self._tree = tree
        self._problems = problems
        self._search_path = search_path

    def config(self) -> Config:
        root = self._tree.value
        self._unknown(root, (), SECTIONS)
        found: dict[str, Any] = {
            "source_file": self._tree.origin,
            "search_path": self._search_path,
        }
        for field in msgspec.structs.fields(Config):
            name = field.name
            if (
                name in _STRUCT_SECTIONS
                or name in _LISTS
                or name in _INTERNAL
                or root.get(name) is None
            ):
                continue
            self._set(found, name, self.value(root[name], field.type, (name,)))
        for name, shape in _STRUCT_SECTIONS.items():
            found[name] = self.section(shape, root.get(name), (name,))
        if not re.fullmatch("[a-z0-9]{3}", found.get("code", "nd1")):
            self._wrong(("code",), found["code"], "three characters of a-z and 0-9")
        self._search_path = found["search_path"]
        found["venues"] = self._parts(root.get("venues"), "venue", VenueConfig)
        found["sources"] = self._parts(root.get("sources"), "source", SourceConfig)
        found["tasks"] = self._tasks(root, {venue.name for venue in found["venues"]})
        return Config(**found) if not self._problems else Config()

    # --- plain sections -------------------------------------------------------------------------------

    def section(self, shape: type[msgspec.Struct], raw: Any, path: Key) -> Any:
        if raw is None:
            return shape()
        if not isinstance(raw, Mapping):
            self._wrong(path, raw, "a mapping of keys")
            return shape()
        fields = {field.name: field for field in msgspec.structs.fields(shape)}
        self._unknown(raw, path, fields)
        found: dict[str, Any] = {}
        for name, field in fields.items():
            if name not in raw or (raw[name] is None and field.default is not None):
                continue
            value = self.value(raw[name], field.type, (*path, name))
            if value is not _MISSING and self._in_bounds(value, (*path, name)):
                found[name] = value
        return shape(**found)

    def value(self, raw: Any, hint: Any, path: Key) -> Any:
        try:
            return convert(raw, hint, str(path[-1]))
        except ValueError as error:
            self._wrong(path, raw, str(error), self._hint_for(raw, hint))
            return _MISSING

    def _in_bounds(self, value: Any, path: Key) -> bool:
        least, most = _AT_LEAST.get(path), _AT_MOST.get(path)
        if value is None or (
            (least is None or value >= least) and (most is None or value <= most)
        ):
            return True
        words = f"{least} or more" if most is None else f"{least} to {most}"
        self._wrong(path, value, words)
        return False

    # --- venues and sources ---------------------------------------------------------------------------

    def _parts(self, raw: Any, kind: str, shape: Any) -> tuple[Any, ...]:
        found: dict[str, Any] = {}
        for path, item in self._items(
            raw, f"{kind}s", "a list of entries with `name` and `type`"
        ):
            name = self._text(item, "name", path) or ""
            type_name = self._text(item, "type", path)
            if type_name is None:
                self._missing(path, "type", f"one of {', '.join(catalog(kind))}", item)
                continue
            name = name or type_name
            if name in found:
                self._problems.add(
                    self._tree.place(path),
                    f"a second {kind} is named {name!r}. Give it another `name`.",
                )
                continue
            found[name] = shape(
                name=name,
                type=type_name,
                options=self._options(kind, type_name, item, path),
            )
        return tuple(found.values())

    def _options(
        self, kind: str, type_name: str, item: Mapping[str, Any], path: Key
    ) -> dict[str, Any]:
        raw = {
            key: value
            for key, value in item.items()
            if key not in ("name", "type", "options")
        }
        nested = self._nested(item, "options", path)
        target = self._class(kind, type_name, path)
        if target is None:
            return {**raw, **nested}
        known, open_ended = parameters.of_part(target, type_name)
        here = self._given(raw, known, path, ("name", "type"), open_ended)
        there = self._given(nested, known, (*path, "options"), (), open_ended)
        self._required(known, {**raw, **nested}, path)
        if kind == "venue" and "feeds" in raw:
            self._feeds(raw["feeds"], (*path, "feeds"))
        return {**here, **there}

    # --- tasks ----------------------------------------------------------------------------------------

    def _tasks(
        self, root: Mapping[str, Any], venues: set[str]
    ) -> tuple[TaskEntry, ...]:
        found: dict[str, TaskEntry] = {}
        paths: dict[str, Key] = {}
        counts: dict[str, int] = {}
        defaults = self._trading(root.get("trading"))
        items = self._items(root.get("tasks"), "tasks", "a list of entries with `type`")
        for path, item in [*items, *self._forgotten_tasks(root, items)]:
            type_name = self._text(item, "type", path)
            if type_name is None:
                self._missing(
                    path,
                    "type",
                    f"one of {', '.join(catalog('task'))}, or a dotted name of your own",
                    item,
                )
                continue
            counts[type_name] = counts.get(type_name, 0) + 1
            default_id = (
                type_name
                if counts[type_name] == 1
                else f"{type_name}-{counts[type_name]}"
            )
            entry = self._task(
                item,
                path,
                self._text(item, "id", path) or default_id,
                type_name,
                defaults,
                venues,
            )
            for each in self._copies(
                entry, item.get("count"), path, _MOST_COPIES - len(found)
            ):
                if each.id in found:
                    self._problems.add(
                        self._tree.place(path),
                        f"a second task has the id {each.id!r}. Give it another `id`.",
                    )
                    break
                found[each.id], paths[each.id] = each, path
        self._overrides(root.get("background_tasks"), found)
        self._dependencies(found, paths)
        return tuple(found.values())

    def _task(
        self,
        item: Mapping[str, Any],
        path: Key,
        task_id: str,
        type_name: str,
        defaults: dict[str, Any],
        venues: set[str],
    ) -> TaskEntry:
        found: dict[str, Any] = {"id": task_id, "type": type_name}
        fields = {field.name: field.type for field in msgspec.structs.fields(TaskEntry)}
        for name in ("group", "after", "runs_in", "enabled"):
            if item.get(name) is not None:
                self._set(
                    found, name, self.value(item[name], fields[name], (*path, name))
                )
        for name in ("timeout", "timeout_s"):
            if item.get(name) is not None:
                try:
                    found["timeout_s"] = convert(item[name], float, "timeout_s")
                except ValueError as error:
                    self._wrong((*path, name), item[name], str(error))
        if item.get("priority") is not None:
            self._priority(found, item["priority"], (*path, "priority"))
        found["schedule"] = read_schedule(item, path, self._wrong, self._unknown)
        target = self._class("task", type_name, path)
        self._params(found, target, item, path, defaults, venues)
        if (
            target is not None
            and not isinstance(target, type)
            and found["schedule"] is None
        ):
            found["schedule"] = Schedule(once=True)
        return TaskEntry(**found)

    def _copies(
        self, entry: TaskEntry, raw: Any, path: Key, room: int
    ) -> list[TaskEntry]:
        """`count: n` stands for n tasks that differ in nothing but their number: `name-1` to `name-n`."""
        if raw is None:
            return [entry]
        count = self.value(raw, int, (*path, "count"))
        if count is _MISSING:
            return []
        if not 1 <= count <= room:
            words = f"1 to {room}, so that there are {_MOST_COPIES} tasks at most"
            self._wrong((*path, "count"), raw, words)
            return []
        return [
            msgspec.structs.replace(entry, id=f"{entry.id}-{number}")
            for number in range(1, count + 1)
        ]

    def _priority(self, found: dict[str, Any], raw: Any, path: Key) -> None:
        try:
            found["priority"] = str(Priority.parse(raw))
        except ValueError:
            names = [str(p) for p in Priority]
            self._wrong(
                path,
                raw,
                f"one of {', '.join(names)}",
                self._did_you_mean(str(raw), names),
            )

    def _params(
        self,
        found: dict[str, Any],
        target: Any,
        item: Mapping[str, Any],
        path: Key,
        defaults: dict[str, Any],
        venues: set[str],
    ) -> None:
        raw = {
            key: value
            for key, value in item.items()
            if key not in _TASK_KEYS and key not in SCHEDULE_KEYS
        }
        nested = self._nested(item, "params", path)
        if target is None:
            found["params"] = {**raw, **nested}
            return
        if isinstance(target, type) and issubclass(target, Task):
            known, open_ended = parameters.of_task(target), False
        else:
            known, open_ended = parameters.of_callable(target)
        if "instruments" in known and defaults.get("symbols"):
            at = [
                f"{symbol}@{venue}"
                for symbol in defaults["symbols"]
                for venue in sorted(venues)
            ]
            defaults = {**defaults, "instruments": tuple(at)}
        given = {
            **{key: value for key, value in defaults.items() if key in known},
            **self._given(raw, known, path, (*_TASK_KEYS, *SCHEDULE_KEYS), open_ended),
            **self._given(nested, known, (*path, "params"), (), open_ended),
        }
        self._required(known, {**defaults, **raw, **nested}, path)
        self._venues_exist(given, raw, path, venues)
        found["params"] = given
        if isinstance(target, type) and not self._problems:
            # Fields may be right one by one and wrong together.
            try:
                make_context(
                    target,
                    TaskEntry(id=found["id"], type=found["type"], params=given),
                    Config(),
                )
            except ConfigError as error:
                for problem in error.problems:
                    self._problems.add(
                        self._tree.place(path), f"`{path_text(path)}`: {problem}"
                    )

    def _venues_exist(
        self, given: dict[str, Any], raw: Mapping[str, Any], path: Key, venues: set[str]
    ) -> None:
        for key, value in given.items():
            if not (key == "venue" or key.endswith("_venue") or key == "venues"):
                continue
            here = (*path, key) if key in raw else (*path, "params", key)
            for name in (
                [value]
                if isinstance(value, str)
                else value
                if isinstance(value, (list, tuple))
                else []
            ):
                if isinstance(name, str) and name not in venues:
                    known = (
                        f"one of {', '.join(sorted(venues))}"
                        if venues
                        else "a venue, but `venues` lists none"
                    )
                    self._wrong(here, name, known, self._did_you_mean(name, venues))

    def _dependencies(self, found: dict[str, TaskEntry], paths: dict[str, Key]) -> None:
        graph = {}
        for entry in found.values():
            for other in entry.after:
                if other not in found:
                    here = (*paths[entry.id], "after")
                    self._wrong(
                        here,
                        other,
                        "the id of another task",
                        self._did_you_mean(other, found),
                    )
            graph[entry.id] = set(entry.after)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = " -> ".join(error.args[1])
            place = self._tree.place((*paths[error.args[1][0]], "after"))
            self._problems.add(
                place,
                f"tasks wait for each other in a circle: {circle}. Remove one `after`.",
            )

    # --- the two sections of design 004 -----------------------------------------------------------------

    def _trading(self, raw: Any) -> dict[str, Any]:
        """`trading: {symbols, timeframes}`: what every task uses that has such a key and does not say otherwise."""
        if raw is None:
            return {}
        if not isinstance(raw, Mapping):
            self._wrong(("trading",), raw, "a mapping with `symbols` and `timeframes`")
            return {}
        self._unknown(raw, ("trading",), ("symbols", "timeframes"))
        found = {}
        for name in ("symbols", "timeframes"):
            if raw.get(name) is not None:
                values = self.value(raw[name], tuple[str, ...], ("trading", name))
                if values is not _MISSING:
                    found[name] = (
                        tuple(_with_slash(v) for v in values)
                        if name == "symbols"
                        else values
                    )
        return found

    def _forgotten_tasks(
        self, root: Mapping[str, Any], items: list[tuple[Key, Any]]
    ) -> list[tuple[Key, dict[str, Any]]]:
        """A name of `background_tasks` that no task has becomes a task, so that none can be forgotten."""
        section = root.get("background_tasks")
        if not isinstance(section, Mapping):
            return []
        known = {item.get("id") for _, item in items} | {
            item.get("type") for _, item in items
        }
        return [
            (
                ("background_tasks", name),
                {"type": _OTHER_NAMES.get(name, name), "id": name},
            )
            for name in section
            if name not in known and _OTHER_NAMES.get(name, name) in catalog("task")
        ]

    def _overrides(self, raw: Any, found: dict[str, TaskEntry]) -> None:
        if raw is None:
            return
        if not isinstance(raw, Mapping):
            self._wrong(("background_tasks",), raw, "a mapping of task names")
            return
        for name, changes in raw.items():
            path: Key = ("background_tasks", name)
            targets = [e.id for e in found.values() if name in (e.id, e.type)]
            if not targets:
                known = [*found, *catalog("task")]
                text = f"`{path_text(path)}` is neither a task's id nor a task type.{self._did_you_mean(name, known)}"
                self._problems.add(self._tree.place(path), text)
            elif not isinstance(changes, Mapping):
                self._wrong(path, changes, "a mapping with `enabled` and `interval`")
            else:
                self._unknown(changes, path, ("enabled", "interval"))
                for task_id in targets:
                    found[task_id] = self._overridden(found[task_id], changes, path)

    def _overridden(
        self, entry: TaskEntry, changes: Mapping[str, Any], path: Key
    ) -> TaskEntry:
        new: dict[str, Any] = {}
        if changes.get("enabled") is not None:
            self._set(
                new, "enabled", self.value(changes["enabled"], bool, (*path, "enabled"))
            )
        if changes.get("interval") is not None:
            item = {"every": changes["interval"]}
            places = lambda key, *rest: self._wrong((*path, "interval"), *rest)  # noqa: E731
            new["schedule"] = read_schedule(item, path, places, self._unknown)
        return msgspec.structs.replace(entry, **new)

    # --- helpers --------------------------------------------------------------------------------------

    def _items(self, raw: Any, name: str, expected: str) -> list[tuple[Key, Any]]:
        if raw is None:
            return []
        if not isinstance(raw, list):
            self._wrong((name,), raw, expected)
            return []
        found: list[tuple[Key, Any]] = []
        for index, item in enumerate(raw):
            if isinstance(item, Mapping):
                found.append(((name, index), item))
            else:
                self._wrong((name, index), item, "a mapping, e.g. `- type: ...`")
        return found

    def _nested(self, item: Mapping[str, Any], name: str, path: Key) -> dict[str, Any]:
        raw = item.get(name)
        if raw is None:
            return {}
        if not isinstance(raw, Mapping):
            self._wrong((*path, name), raw, "a mapping")
            return {}
        return dict(raw)

    def _class(self, kind: str, type_name: str, path: Key) -> Any:
        try:
            return load_function_or_class(kind, type_name, self._search_path, "")
        except ConfigError as error:
            place = self._tree.place((*path, "type"))
            for problem in error.problems:
                self._problems.add(place, f"`{path_text((*path, 'type'))}`: {problem}")
            return None

    def _given(
        self,
        raw: Mapping[str, Any],
        known: Mapping[str, Parameter],
        path: Key,
        beside: Iterable[str],
        open_ended: bool,
    ) -> dict[str, Any]:
        if not open_ended:
            self._unknown(raw, path, known, beside)
        found: dict[str, Any] = {}
        for key, value in raw.items():
            if key not in known or known[key].hint is Any:
                found[key] = settle(value)
            else:
                self._set(found, key, self._deep(value, known[key].hint, (*path, key)))
        return found

    def _deep(self, raw: Any, hint: Any, path: Key) -> Any:
        """As `value`; mappings that stand for structs are checked key by key and stay mappings."""
        shape, many = parameters.struct_in(hint)
        inner = parameters.values_of(hint)
        if shape is None and inner is not None and isinstance(raw, Mapping):
            given = {
                key: self.value(value, inner, (*path, key))
                for key, value in raw.items()
            }
            return _MISSING if _MISSING in given.values() else given
        if shape is None or isinstance(raw, str | bool):
            return self.value(raw, hint, path)
        if many == "one":
            return self._shape(raw, shape, path)
        if many == "mapping":
            if not isinstance(raw, Mapping):
                self._wrong(path, raw, "a mapping of mappings")
                return _MISSING
            return {
                key: self._shape(item, shape, (*path, key)) for key, item in raw.items()
            }
        if not isinstance(raw, list):
            self._wrong(path, raw, "a list of mappings")
            return _MISSING
        return [
            self._shape(item, shape, (*path, index)) for index, item in enumerate(raw)
        ]

    def _shape(self, raw: Any, shape: type[msgspec.Struct], path: Key) -> Any:
        if not isinstance(raw, Mapping):
            self._wrong(path, raw, "a mapping of keys")
            return _MISSING
        # The instruments of a venue are its own, so they need not name it.
        known = parameters.of_struct(
            shape, frozenset({"venue"}) if path[0] == "venues" else frozenset()
        )
        self._required(known, raw, path)
        return self._given(raw, known, path, (), open_ended=False)

    def _feeds(self, raw: Any, path: Key) -> None:
        """What feeds a paper venue in a process of its own: sources, but for the venue they show."""
        for index, item in enumerate(raw if isinstance(raw, list) else []):
            here = (*path, index)
            type_name = (
                self._text(item, "type", here) if isinstance(item, Mapping) else None
            )
            if type_name is None:
                self._missing(here, "type", "simulated or replay")
                continue
            target = self._class("source", type_name, here)
            if target is not None:
                known, open_ended = parameters.of_part(target, type_name)
                given = {
                    key: value
                    for key, value in item.items()
                    if key not in ("name", "type")
                }
                for name in ("venue", "venues"):
                    known.pop(name, None)
                self._given(given, known, here, ("name", "type"), open_ended)
                self._required(known, given, here)

    def _required(
        self, known: Mapping[str, Parameter], given: Mapping[str, Any], path: Key
    ) -> None:
        for name, parameter in known.items():
            if parameter.required and name not in given:
                self._missing(path, name, type_words(parameter.hint, name))

    def _text(self, item: Mapping[str, Any], key: str, path: Key) -> str | None:
        if item.get(key) is None:
            return None
        value = self.value(item[key], str, (*path, key))
        return None if value is _MISSING else str(value)

    @staticmethod
    def _set(found: dict[str, Any], key: str, value: Any) -> None:
        if value is not _MISSING:
            found[key] = value

    def _missing(
        self, path: Key, key: str, expected: str, given: Mapping[str, Any] | None = None
    ) -> None:
        near = nearest(key, given or ())
        hint = f" Did you mean {key!r} by `{near}`?" if near else ""
        place = self._tree.place((*path, near) if near else path)
        self._problems.add(
            place, f"`{path_text(path)}` has no `{key}`, expected {expected}.{hint}"
        )

    def _wrong(self, path: Key, raw: Any, expected: str, hint: str = "") -> None:
        text = f"`{path_text(path)}` is {shown(path, raw)}, expected {expected}.{hint}"
        self._problems.add(self._tree.place(path), text)

    def _unknown(
        self,
        raw: Mapping[str, Any],
        path: Key,
        known: Iterable[str],
        beside: Iterable[str] = (),
    ) -> None:
        names = [*known, *beside]
        for key in raw:
            if key not in names:
                hint = (
                    self._did_you_mean(str(key), names)
                    or f" Known: {', '.join(names) or 'none'}."
                )
                self._problems.add(
                    self._tree.place((*path, key)),
                    f"no key `{path_text((*path, key))}`.{hint}",
                )

    @staticmethod
    def _did_you_mean(word: str, known: Iterable[str]) -> str:
        near = nearest(word, known)
        return f" Did you mean {near!r}?" if near else ""

    def _hint_for(self, raw: Any, hint: Any) -> str:
        if isinstance(raw, str):
            kinds = [hint, *get_args(hint)]
            names = [
                str(a)
                for kind in kinds
                if get_origin(kind) is Literal
                for a in get_args(kind)
            ]
            names += [
                str(m.value)
                for kind in kinds
                if hasattr(kind, "__members__")
                for m in kind
            ]
            return self._did_you_mean(raw, names)
        return (
            " Put it in quotes." if hint is str and isinstance(raw, (int, bool)) else ""
        )


def _with_slash(symbol: str) -> str:
    """`BTCUSDT`, as design 004 writes it, is `BTC/USDT` here."""
    for quote in _QUOTES:
        if "/" not in symbol and symbol.endswith(quote) and len(symbol) > len(quote):
            return f"{symbol.removesuffix(quote)}/{quote}"
    return symbol
