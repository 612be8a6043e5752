"""The tree against the types: one pass that finds every problem, and a `Config` if there is none.

Comes from: loading/tree.py
Goes to: config.py, desk.py
"""

import re
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

import msgspec

from nightdesk import config as shapes
from nightdesk.abc import Task
from nightdesk.config import Config, SourceConfig, TaskEntry, VenueConfig
from nightdesk.errors import ConfigError
from nightdesk.loading.build import make_context, make_task
from nightdesk.loading.checker import MISSING, Checker
from nightdesk.loading.classes import catalog
from nightdesk.loading.convert import convert
from nightdesk.loading.parameters import of_callable, of_part, of_task
from nightdesk.loading.schedules import SCHEDULE_KEYS, read_schedule
from nightdesk.loading.tree import Key, Problems, Tree, path_text
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
_PART_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
"""Names of venues become directories and parts of keys."""
_MAX_ID = 200
_SYMBOL = r"[!-.0-?A-{}~]{1,40}/[!-.0-?A-{}~]{1,60}"
_QUOTES = ("USDT", "USDC", "BUSD", "FDUSD", "USD", "EUR", "BTC", "ETH")


def check(tree: Tree, problems: Problems, search_path: str) -> Config:
    """Return the whole configuration.

    Raises:
        ConfigError: Lists everything that is wrong with it.
    """
    checked = _ConfigChecker(tree, problems, search_path).config()
    if problems:
        raise problems.error()
    return checked


class _ConfigChecker(Checker):
    """The sections of `desk.yaml`, each in its own way."""

    def config(self) -> Config:
        root = self.tree.value
        self.unknown(root, (), SECTIONS)
        found: dict[str, Any] = {
            "source_file": self.tree.origin,
            "search_path": self.search_path,
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
            self.set(found, name, self.value(root[name], field.type, (name,)))
        for name, shape in _STRUCT_SECTIONS.items():
            found[name] = self.section(shape, root.get(name), (name,))
        if not re.fullmatch("[a-z0-9]{3}", found.get("code", "nd1")):
            self.wrong(("code",), found["code"], "three characters of a-z and 0-9")
        self.search_path = found["search_path"]
        found["venues"] = self._parts(root.get("venues"), "venue", VenueConfig)
        found["sources"] = self._parts(root.get("sources"), "source", SourceConfig)
        found["tasks"] = self._tasks(root, {venue.name for venue in found["venues"]})
        return Config(**found) if not self.problems else Config()

    # --- venues and sources ---------------------------------------------------------------------------

    def _parts(self, raw: Any, kind: str, shape: Any) -> tuple[Any, ...]:
        found: dict[str, Any] = {}
        for path, item in self.items(
            raw, f"{kind}s", "a list of entries with `name` and `type`"
        ):
            name = self.text(item, "name", path) or ""
            type_name = self.text(item, "type", path)
            if type_name is None:
                self.missing(path, "type", f"one of {', '.join(catalog(kind))}", item)
                continue
            name = name or type_name
            if not re.fullmatch(_PART_NAME, name):
                self.wrong(
                    (*path, "name"), name, "at most 64 letters, digits, . - or _"
                )
                continue
            if name in found:
                self.problems.add(
                    self.tree.place(path),
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
        nested = self.nested(item, "options", path)
        target = self.class_of(kind, type_name, path)
        if target is None:
            return {**raw, **nested}
        known, open_ended = of_part(target, type_name)
        here = self.given(raw, known, path, ("name", "type"), open_ended)
        there = self.given(nested, known, (*path, "options"), (), open_ended)
        self.required(known, {**raw, **nested}, path)
        if kind == "venue":
            self._symbols({**raw, **nested}.get("instruments"), path)
        if kind == "venue" and "feeds" in raw:
            self._feeds(raw["feeds"], (*path, "feeds"))
        return {**here, **there}

    def _symbols(self, instruments: Any, path: Key) -> None:
        """A name that is no pair of words would fail where its base or quote asset is asked for."""
        for index, each in enumerate(
            instruments if isinstance(instruments, list) else ()
        ):
            symbol = each.get("symbol") if isinstance(each, Mapping) else None
            if isinstance(symbol, str) and not re.fullmatch(_SYMBOL, symbol):
                here = (*path, "instruments", index, "symbol")
                self.wrong(here, symbol, "a base and a quote, such as BTC/USDT")

    # --- tasks ----------------------------------------------------------------------------------------

    def _tasks(
        self, root: Mapping[str, Any], venues: set[str]
    ) -> tuple[TaskEntry, ...]:
        found: dict[str, TaskEntry] = {}
        paths: dict[str, Key] = {}
        counts: dict[str, int] = {}
        defaults = self._trading(root.get("trading"))
        items = self.items(root.get("tasks"), "tasks", "a list of entries with `type`")
        for path, item in [*items, *self._forgotten_tasks(root, items)]:
            type_name = self.text(item, "type", path)
            if type_name is None:
                self.missing(
                    path,
                    "type",
                    f"one of {', '.join(catalog('task'))}, or a dotted name of your own",
                    item,
                )
                continue
            counts[type_name] = counts.get(type_name, 0) + 1
            given_id = self.text(item, "id", path)
            if given_id and not (len(given_id) <= _MAX_ID and given_id.isprintable()):
                words = f"at most {_MAX_ID} printable characters"
                self.wrong((*path, "id"), given_id, words)
                continue
            default_id = (
                type_name
                if counts[type_name] == 1
                else f"{type_name}-{counts[type_name]}"
            )
            entry = self._task(
                item,
                path,
                given_id or default_id,
                type_name,
                defaults,
                venues,
            )
            for each in self._copies(
                entry, item.get("count"), path, _MOST_COPIES - len(found)
            ):
                if each.id in found:
                    self.problems.add(
                        self.tree.place(path),
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
                self.set(
                    found, name, self.value(item[name], fields[name], (*path, name))
                )
        for name in ("timeout", "timeout_s"):
            if item.get(name) is not None:
                try:
                    found["timeout_s"] = convert(item[name], float, "timeout_s")
                except ValueError as error:
                    self.wrong((*path, name), item[name], str(error))
        if item.get("priority") is not None:
            self._priority(found, item["priority"], (*path, "priority"))
        found["schedule"] = read_schedule(item, path, self.wrong, self.unknown)
        target = self.class_of("task", type_name, path)
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
        if count is MISSING:
            return []
        if not 1 <= count <= room:
            words = f"1 to {room}, so that there are {_MOST_COPIES} tasks at most"
            self.wrong((*path, "count"), raw, words)
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
            self.wrong(
                path,
                raw,
                f"one of {', '.join(names)}",
                self.did_you_mean(str(raw), names),
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
        nested = self.nested(item, "params", path)
        if target is None:
            found["params"] = {**raw, **nested}
            return
        if isinstance(target, type) and issubclass(target, Task):
            known, open_ended = of_task(target), False
        else:
            known, open_ended = of_callable(target)
        if "instruments" in known and defaults.get("symbols"):
            at = [
                f"{symbol}@{venue}"
                for symbol in defaults["symbols"]
                for venue in sorted(venues)
            ]
            defaults = {**defaults, "instruments": tuple(at)}
        given = {
            **{key: value for key, value in defaults.items() if key in known},
            **self.given(raw, known, path, (*_TASK_KEYS, *SCHEDULE_KEYS), open_ended),
            **self.given(nested, known, (*path, "params"), (), open_ended),
        }
        self.required(known, {**defaults, **raw, **nested}, path)
        self._venues_exist(given, raw, path, venues)
        found["params"] = given
        if isinstance(target, type) and not self.problems:
            # Fields may be right one by one and wrong together.
            # Tasks of ours also check themselves when they are made; those of others may do more than that.
            make = make_context if "." in found["type"] else make_task
            entry = TaskEntry(id=found["id"], type=found["type"], params=given)
            try:
                make(target, entry, Config())
            except ConfigError as error:
                for problem in error.problems:
                    named = re.findall(r"`(\w+)` is", problem)
                    key = next((name for name in named if name in raw), None)
                    here = path if key is None else (*path, key)
                    text = f"`{path_text(path)}`: {problem}"
                    self.problems.add(self.tree.place(here), text)

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
                    self.wrong(here, name, known, self.did_you_mean(name, venues))

    def _dependencies(self, found: dict[str, TaskEntry], paths: dict[str, Key]) -> None:
        graph = {}
        for entry in found.values():
            for other in entry.after:
                if other not in found:
                    here = (*paths[entry.id], "after")
                    self.wrong(
                        here,
                        other,
                        "the id of another task",
                        self.did_you_mean(other, found),
                    )
            graph[entry.id] = set(entry.after)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = " -> ".join(error.args[1])
            place = self.tree.place((*paths[error.args[1][0]], "after"))
            self.problems.add(
                place,
                f"tasks wait for each other in a circle: {circle}. Remove one `after`.",
            )

    # --- the two sections of design 004 -----------------------------------------------------------------

    def _trading(self, raw: Any) -> dict[str, Any]:
        """`trading: {symbols, timeframes}`: what every task uses that has such a key and does not say otherwise."""
        if raw is None:
            return {}
        if not isinstance(raw, Mapping):
            self.wrong(("trading",), raw, "a mapping with `symbols` and `timeframes`")
            return {}
        self.unknown(raw, ("trading",), ("symbols", "timeframes"))
        found = {}
        for name in ("symbols", "timeframes"):
            if raw.get(name) is not None:
                values = self.value(raw[name], tuple[str, ...], ("trading", name))
                if values is not MISSING:
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
            self.wrong(("background_tasks",), raw, "a mapping of task names")
            return
        for name, changes in raw.items():
            path: Key = ("background_tasks", name)
            targets = [e.id for e in found.values() if name in (e.id, e.type)]
            if not targets:
                known = [*found, *catalog("task")]
                text = f"`{path_text(path)}` is neither a task's id nor a task type.{self.did_you_mean(name, known)}"
                self.problems.add(self.tree.place(path), text)
            elif not isinstance(changes, Mapping):
                self.wrong(path, changes, "a mapping with `enabled` and `interval`")
            else:
                self.unknown(changes, path, ("enabled", "interval"))
                for task_id in targets:
                    found[task_id] = self._overridden(found[task_id], changes, path)

    def _overridden(
        self, entry: TaskEntry, changes: Mapping[str, Any], path: Key
    ) -> TaskEntry:
        new: dict[str, Any] = {}
        if changes.get("enabled") is not None:
            self.set(
                new, "enabled", self.value(changes["enabled"], bool, (*path, "enabled"))
            )
        if changes.get("interval") is not None:
            item = {"every": changes["interval"]}
            places = lambda key, *rest: self.wrong((*path, "interval"), *rest)  # noqa: E731
            new["schedule"] = read_schedule(item, path, places, self.unknown)
        return msgspec.structs.replace(entry, **new)

    def _feeds(self, raw: Any, path: Key) -> None:
        """What feeds a paper venue in a process of its own: sources, but for the venue they show."""
        for index, item in enumerate(raw if isinstance(raw, list) else []):
            here = (*path, index)
            type_name = (
                self.text(item, "type", here) if isinstance(item, Mapping) else None
            )
            if type_name is None:
                self.missing(here, "type", "simulated or replay")
                continue
            target = self.class_of("source", type_name, here)
            if target is not None:
                known, open_ended = of_part(target, type_name)
                given = {
                    key: value
                    for key, value in item.items()
                    if key not in ("name", "type")
                }
                for name in ("venue", "venues"):
                    known.pop(name, None)
                self.given(given, known, here, ("name", "type"), open_ended)
                self.required(known, given, here)


def _with_slash(symbol: str) -> str:
    """`BTCUSDT`, as design 004 writes it, is `BTC/USDT` here."""
    for quote in _QUOTES:
        if "/" not in symbol and symbol.endswith(quote) and len(symbol) > len(quote):
            return f"{symbol.removesuffix(quote)}/{quote}"
    return symbol
