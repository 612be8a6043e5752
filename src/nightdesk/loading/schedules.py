"""The schedule of a task: the shorthand keys of `desk.yaml` become one `Schedule`.

Comes from: loading/check.py
Goes to: kernel/scheduler.py
"""

from collections.abc import Callable, Mapping
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from nightdesk.loading.convert import convert
from nightdesk.loading.tree import Key
from nightdesk.loading.words import nearest
from nightdesk.model import events
from nightdesk.model.schedule import Schedule

__all__ = ["SCHEDULE_KEYS", "read_schedule"]

_SHORT = {
    "every": "every_s",
    "open": "open_s",
    "closed": "closed_s",
    "jitter": "jitter_s",
}
_FIELDS: dict[str, Any] = {
    field.name: field.type for field in msgspec.structs.fields(Schedule)
}
SCHEDULE_KEYS = (
    "schedule", "every", "cron", "at", "once", "continuous", "on", "calendar", "open", "closed", "jitter", "timezone",
)  # fmt: skip
_TRIGGERS = ("every_s", "cron", "at", "once", "continuous", "on")
_EVENTS = [name for name in events.__all__ if name not in ("Event", "OrderEvent")]

Wrong = Callable[..., None]
Unknown = Callable[..., None]


def read_schedule(
    item: Mapping[str, Any], path: Key, wrong: Wrong, unknown: Unknown
) -> Schedule | None:
    """Return the schedule of one task, or None if it names none; problems go to `wrong` and `unknown`."""
    given: dict[str, tuple[Key, Any]] = {}
    section = item.get("schedule")
    if section is not None and not isinstance(section, Mapping):
        wrong((*path, "schedule"), section, "a mapping, e.g. `{every: 5s}`")
        section = None
    if isinstance(section, Mapping):
        unknown(section, (*path, "schedule"), [*_FIELDS, *_SHORT])
        for key, value in section.items():
            given[_SHORT.get(str(key), str(key))] = ((*path, "schedule", key), value)
    for key in SCHEDULE_KEYS[1:]:
        if item.get(key) is not None:
            given[_SHORT.get(key, key)] = ((*path, key), item[key])
    found: dict[str, Any] = {}
    for name, (here, raw) in given.items():
        if name not in _FIELDS:
            continue
        try:
            found[name] = convert(raw, _FIELDS[name], name)
        except ValueError as error:
            wrong(here, raw, str(error))
            return None
    if not found:
        return None
    _check(found, {name: here for name, (here, _) in given.items()}, wrong)
    return Schedule(**found)


def _check(found: dict[str, Any], places: dict[str, Key], wrong: Wrong) -> None:
    triggers = [name for name in _TRIGGERS if found.get(name)]
    sessions = [name for name in ("open_s", "closed_s") if found.get(name) is not None]
    if len(triggers) > 1:
        names = " and ".join(name.removesuffix("_s") for name in triggers)
        wrong(
            places[triggers[1]],
            found[triggers[1]],
            f"one trigger, but here are {names}",
        )
    elif not triggers and not sessions:
        here = next(iter(places.values()))
        wrong(
            here,
            found[next(iter(found))],
            "a trigger beside it: every, cron, at, once, continuous, on, or open and closed",
        )
    if found.get("every_s") == 0:
        wrong(
            places["every_s"],
            0,
            "more than 0; `continuous: true` runs whenever there is spare time",
        )
    for name in sessions:
        if found[name] == 0:
            wrong(places[name], 0, "more than 0, or `pause`")
    _check_names(found, places, wrong)


def _check_names(found: dict[str, Any], places: dict[str, Key], wrong: Wrong) -> None:
    for name in found.get("on", ()):
        if name not in _EVENTS:
            near = nearest(name, _EVENTS)
            wrong(
                places["on"],
                name,
                "the name of an event",
                f" Did you mean {near!r}?"
                if near
                else f" Known: {', '.join(_EVENTS)}.",
            )
    if "timezone" in found:
        try:
            ZoneInfo(found["timezone"])
        except (ZoneInfoNotFoundError, ValueError, OSError):
            wrong(
                places["timezone"],
                found["timezone"],
                "an IANA time zone such as UTC or Asia/Kolkata",
            )
    if found.get("cron"):
        _check_cron(found["cron"], places["cron"], wrong)
    if found.get("at") and not _is_time(found["at"]):
        wrong(
            places["at"],
            found["at"],
            "HH:MM, HH:MM:SS or an ISO instant such as 2030-01-31T09:15:00Z",
        )


def _check_cron(text: str, place: Key, wrong: Wrong) -> None:
    from datetime import UTC, datetime

    from cronsim import CronSim, CronSimError

    try:
        CronSim(text, datetime(2024, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        wrong(
            place,
            text,
            f"five or six cron fields such as `*/5 9-15 * * mon-fri` ({error})",
        )


def _is_time(text: str) -> bool:
    from datetime import datetime, time

    for parse in (time.fromisoformat, datetime.fromisoformat):
        try:
            parse(text)
        except ValueError:
            continue
        return True
    return False
