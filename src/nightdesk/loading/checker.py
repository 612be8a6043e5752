"""Looks at values of the tree one by one, and notes what is wrong with each.

Comes from: loading/check.py
Goes to: loading/tree.py
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Literal, get_args, get_origin

import msgspec

from nightdesk.errors import ConfigError
from nightdesk.loading.classes import load_function_or_class
from nightdesk.loading.convert import convert, settle
from nightdesk.loading.parameters import Parameter, of_struct, struct_in, values_of
from nightdesk.loading.tree import Key, Problems, Tree, path_text
from nightdesk.loading.words import nearest, shown, type_words

__all__ = ["MISSING", "Checker"]

MISSING = object()
"""What a value that cannot be used is returned as, once its problem is noted."""

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
# The same for keys of venues and sources, by their last name; True: 0 is too little.
_LEAST_OF_PARTS: dict[str, tuple[int, bool]] = {
    "tick_size": (0, True),
    "lot_size": (0, True),
    "max_quantity": (0, True),
    "price": (0, True),
    "min_quantity": (0, False),
    "min_notional": (0, False),
    "interval_ms": (1, False),
    "history": (1, False),
    "max_open_orders": (1, False),
}


class Checker:
    """What every section needs. Nothing here raises for what an operator wrote: it is noted in `problems`."""

    def __init__(self, tree: Tree, problems: Problems, search_path: str) -> None:
        self.tree = tree
        self.problems = problems
        self.search_path = search_path

    def section(self, shape: type[msgspec.Struct], raw: Any, path: Key) -> Any:
        """Return one section of plain keys as its struct."""
        if raw is None:
            return shape()
        if not isinstance(raw, Mapping):
            self.wrong(path, raw, "a mapping of keys")
            return shape()
        fields = {field.name: field for field in msgspec.structs.fields(shape)}
        self.unknown(raw, path, fields)
        found: dict[str, Any] = {}
        for name, field in fields.items():
            if name not in raw or (raw[name] is None and field.default is not None):
                continue
            value = self.value(raw[name], field.type, (*path, name))
            if value is not MISSING and self.in_bounds(value, (*path, name)):
                found[name] = value
        return shape(**found)

    def value(self, raw: Any, hint: Any, path: Key) -> Any:
        """Return `raw` as `hint`, or `MISSING` after noting what was expected."""
        try:
            value = convert(raw, hint, str(path[-1]))
        except ValueError as error:
            self.wrong(path, raw, str(error), self._hint_for(raw, hint))
            return MISSING
        too_little = self._too_little(value, path)
        if too_little:
            self.wrong(path, raw, too_little)
            return MISSING
        return value

    @staticmethod
    def _too_little(value: Any, path: Key) -> str:
        """Return what was expected of a number of a venue or source that is below all sense."""
        if path[0] not in ("venues", "sources") or not isinstance(value, int | Decimal):
            return ""
        name = "balance" if path[-2:-1] == ("balances",) else str(path[-1])
        least, is_open = _LEAST_OF_PARTS.get(name, (None, False))
        if name == "balance":
            least = 0
        if least is None or value > least or (value == least and not is_open):
            return ""
        return f"more than {least}" if is_open else f"{least} or more"

    def in_bounds(self, value: Any, path: Key) -> bool:
        """Return whether a number makes sense where it stands."""
        least, most = _AT_LEAST.get(path), _AT_MOST.get(path)
        if value is None or (
            (least is None or value >= least) and (most is None or value <= most)
        ):
            return True
        words = f"{least} or more" if most is None else f"{least} to {most}"
        self.wrong(path, value, words)
        return False

    def items(self, raw: Any, name: str, expected: str) -> list[tuple[Key, Any]]:
        """Return the entries of a list with their paths; an entry that is no mapping is noted."""
        if raw is None:
            return []
        if not isinstance(raw, list):
            self.wrong((name,), raw, expected)
            return []
        found: list[tuple[Key, Any]] = []
        for index, item in enumerate(raw):
            if isinstance(item, Mapping):
                found.append(((name, index), item))
            else:
                self.wrong((name, index), item, "a mapping, e.g. `- type: ...`")
        return found

    def nested(self, item: Mapping[str, Any], name: str, path: Key) -> dict[str, Any]:
        """Return the mapping under one key of `item`."""
        raw = item.get(name)
        if raw is None:
            return {}
        if not isinstance(raw, Mapping):
            self.wrong((*path, name), raw, "a mapping")
            return {}
        return dict(raw)

    def class_of(self, kind: str, type_name: str, path: Key) -> Any:
        """Return the class or function of a `type`, or None after noting why there is none."""
        try:
            return load_function_or_class(kind, type_name, self.search_path, "")
        except ConfigError as error:
            place = self.tree.place((*path, "type"))
            for problem in error.problems:
                self.problems.add(place, f"`{path_text((*path, 'type'))}`: {problem}")
            return None

    def given(
        self,
        raw: Mapping[str, Any],
        known: Mapping[str, Parameter],
        path: Key,
        beside: Iterable[str],
        open_ended: bool,
    ) -> dict[str, Any]:
        """Return the keys of `raw` as their readers want them; `beside` are read by someone else."""
        if not open_ended:
            self.unknown(raw, path, known, beside)
        found: dict[str, Any] = {}
        for key, value in raw.items():
            if key not in known or known[key].hint is Any:
                found[key] = settle(value)
            else:
                self.set(found, key, self.deep(value, known[key].hint, (*path, key)))
        return found

    def deep(self, raw: Any, hint: Any, path: Key) -> Any:
        """As `value`; mappings that stand for structs are checked key by key and stay mappings."""
        shape, many = struct_in(hint)
        inner = values_of(hint)
        if shape is None and inner is not None and isinstance(raw, Mapping):
            given = {
                key: self.value(value, inner, (*path, key))
                for key, value in raw.items()
            }
            return MISSING if MISSING in given.values() else given
        if shape is None or isinstance(raw, str | bool):
            return self.value(raw, hint, path)
        if many == "one":
            return self.shape(raw, shape, path)
        if many == "mapping":
            if not isinstance(raw, Mapping):
                self.wrong(path, raw, "a mapping of mappings")
                return MISSING
            return {
                key: self.shape(item, shape, (*path, key)) for key, item in raw.items()
            }
        if not isinstance(raw, list):
            self.wrong(path, raw, "a list of mappings")
            return MISSING
        return [
            self.shape(item, shape, (*path, index)) for index, item in enumerate(raw)
        ]

    def shape(self, raw: Any, shape: type[msgspec.Struct], path: Key) -> Any:
        """Check a mapping against a struct, and return it as a mapping of converted values."""
        if not isinstance(raw, Mapping):
            self.wrong(path, raw, "a mapping of keys")
            return MISSING
        # The instruments of a venue are its own, so they need not name it.
        known = of_struct(
            shape, frozenset({"venue"}) if path[0] == "venues" else frozenset()
        )
        self.required(known, raw, path)
        return self.given(raw, known, path, (), open_ended=False)

    def required(
        self, known: Mapping[str, Parameter], given: Mapping[str, Any], path: Key
    ) -> None:
        """Note every required key that is not there."""
        for name, parameter in known.items():
            if parameter.required and name not in given:
                self.missing(path, name, type_words(parameter.hint, name))

    def text(self, item: Mapping[str, Any], key: str, path: Key) -> str | None:
        """Return the text under one key of `item`, if there is any."""
        if item.get(key) is None:
            return None
        value = self.value(item[key], str, (*path, key))
        return None if value is MISSING else str(value)

    @staticmethod
    def set(found: dict[str, Any], key: str, value: Any) -> None:
        """Keep a value, unless it is `MISSING`."""
        if value is not MISSING:
            found[key] = value

    def missing(
        self, path: Key, key: str, expected: str, given: Mapping[str, Any] | None = None
    ) -> None:
        """Note a key that is not there, and one of `given` that may be meant to be it."""
        near = nearest(key, given or ())
        hint = f" Did you mean {key!r} by `{near}`?" if near else ""
        place = self.tree.place((*path, near) if near else path)
        self.problems.add(
            place, f"`{path_text(path)}` has no `{key}`, expected {expected}.{hint}"
        )

    def wrong(self, path: Key, raw: Any, expected: str, hint: str = "") -> None:
        """Note a value that cannot be used."""
        text = f"`{path_text(path)}` is {shown(path, raw)}, expected {expected}.{hint}"
        self.problems.add(self.tree.place(path), text)

    def unknown(
        self,
        raw: Mapping[str, Any],
        path: Key,
        known: Iterable[str],
        beside: Iterable[str] = (),
    ) -> None:
        """Note every key that nobody would read."""
        names = [*known, *beside]
        for key in raw:
            if key not in names:
                hint = (
                    self.did_you_mean(str(key), names)
                    or f" Known: {', '.join(names) or 'none'}."
                )
                self.problems.add(
                    self.tree.place((*path, key)),
                    f"no key `{path_text((*path, key))}`.{hint}",
                )

    @staticmethod
    def did_you_mean(word: str, known: Iterable[str]) -> str:
        """Return a suggestion that begins with a space, or nothing."""
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
            return self.did_you_mean(raw, names)
        return (
            " Put it in quotes." if hint is str and isinstance(raw, (int, bool)) else ""
        )
