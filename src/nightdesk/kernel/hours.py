"""Market hours: is the exchange open, and when does that change.

A calendar is a sorted table of the instants at which a market opens and closes, so a question is one
bisection (asking the library costs 0.3 to 4 ms each time). The table is compiled once by
pandas-market-calendars, corrected by what that library cannot hold, and kept on disk so that a desk
starts without importing pandas.

Comes from: desk.py
Goes to: kernel/scheduler.py
"""

import logging
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

import msgspec

from nightdesk.errors import ConfigError, MissingExtraError, UnknownTypeError

__all__ = ["Calendar", "Calendars", "Phase", "SessionOverride", "instant_in_words"]

Phase = Literal["open", "closed"]

_SECOND_NS = 1_000_000_000
_DAY_S = 86_400
_WARN_BEFORE_S = 60 * _DAY_S
_LIBRARY = "pandas-market-calendars"
_FORMAT = 1  # of the file on disk; raise it when the table changes its shape
_FIRST_DAY = "2000-01-01"
_LAST_YEAR = 2040
_YEARS_PAST_HORIZON = 5
_ALWAYS = frozenset({"", "24/7", "24x7", "always", "crypto"})

_log = logging.getLogger(__name__)


class SessionOverride(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """What really happens on one day at an exchange; replaces whatever the library says of it.

    Attributes:
        date: `YYYY-MM-DD`, local to the exchange.
        open, close: `HH:MM` local; both None closes the day. Two entries of one date are two sessions.
        source: Where this is written, for whoever wonders later.
    """

    date: str
    open: str | None = None
    close: str | None = None
    source: str = ""


# Days that the library cannot hold because they fall on a weekend (its issues 480 and 481).
_BUDGET = "NSE circular: live trading session on account of the Union Budget"
_KNOWN: Mapping[str, tuple[SessionOverride, ...]] = {
    "NSE": tuple(
        SessionOverride(date=day, open="09:15", close="15:30", source=source)
        for day, source in (
            ("2015-02-28", _BUDGET),
            ("2020-02-01", _BUDGET),
            ("2024-01-20", "NSE circular: Saturday session before 22 January 2024"),
            ("2025-02-01", _BUDGET),
            ("2026-02-01", _BUDGET),
        )
    )
}
_ALIASES = {"XNSE": "NSE", "XNYS": "NYSE", "XNAS": "NASDAQ", "XLON": "LSE"}


class _Table(msgspec.Struct):
    """What is kept on disk. `changes_s`: opening, closing, opening ... in UTC seconds, ascending."""

    format: int
    library: str
    name: str
    timezone: str
    horizon_s: int | None
    changes_s: list[int]


class Calendar:
    """The hours of one market.

    Attributes:
        name: As in `desk.yaml`.
        timezone: IANA name of the exchange's own time.
        horizon_ns: Up to here holidays are known; None means there are none to know. What the table
            says of later days is unverified: every weekday counts as a session.
    """

    def __init__(
        self,
        name: str,
        timezone: str = "UTC",
        changes_s: Sequence[int] = (),
        horizon_s: int | None = None,
        *,
        always: bool = False,
    ) -> None:
        self.name = name
        self.timezone = timezone
        self.always = always
        self.horizon_ns = None if horizon_s is None else horizon_s * _SECOND_NS
        self._changes_ns = [second * _SECOND_NS for second in changes_s]
        self._zone = ZoneInfo(timezone)

    def is_open(self, ns: int) -> bool:
        """Return whether the market is in session at `ns` (UTC nanoseconds)."""
        return self.always or bisect_right(self._changes_ns, ns) % 2 == 1

    def phase(self, ns: int) -> Phase:
        """Return `open` or `closed`; an opening belongs to its session, a closing does not."""
        return "open" if self.is_open(ns) else "closed"

    def next_change(self, ns: int) -> int | None:
        """Return the first instant after `ns` at which the phase changes, None if none is known."""
        index = bisect_right(self._changes_ns, ns)
        return self._changes_ns[index] if index < len(self._changes_ns) else None

    def verified(self, ns: int) -> bool:
        """Return whether the holidays around `ns` are known."""
        return self.horizon_ns is None or ns < self.horizon_ns

    def warning(self, ns: int) -> str | None:
        """Return what an operator should know at `ns` about the end of the known holidays."""
        if (
            self.horizon_ns is None
            or self.horizon_ns - ns >= _WARN_BEFORE_S * _SECOND_NS
        ):
            return None
        last = datetime.fromtimestamp(self.horizon_ns // _SECOND_NS - 1, self._zone)
        return (
            f"market hours of {self.name}: no holiday is known after {last:%Y-%m-%d}, "
            "so later weekdays all count as sessions. Upgrade pandas-market-calendars, "
            "or list the holidays under `calendar_overrides`."
        )

    def describe(self, ns: int) -> str:
        """Return the phase and its end in words: `closed until Mon 09:15 IST`."""
        if self.always:
            return "always open"
        change = self.next_change(ns)
        text: str = self.phase(ns)
        if change is not None:
            text += f" until {instant_in_words(change, ns, self.timezone)}"
        if not self.verified(ns if change is None else change):
            text += " (unverified: holidays not known that far)"
        return text


class Calendars:
    """Finds calendars by name and keeps them.

    Args:
        cache_dir: Where compiled tables are kept; None compiles anew in each process.
        overrides: Calendar name to days on which the library is wrong.
    """

    def __init__(
        self,
        cache_dir: Path | None = None,
        overrides: Mapping[str, Sequence[SessionOverride]] | None = None,
    ) -> None:
        self._cache_dir = cache_dir
        self._overrides = {
            _canonical(name): tuple(days) for name, days in (overrides or {}).items()
        }
        self._calendars: dict[str, Calendar] = {}

    def get(self, name: str) -> Calendar:
        """Return the calendar called `name`: `24/7`, or an exchange (`NSE`, `NYSE`, ISO codes ...).

        Raises:
            MissingExtraError: An exchange, and the extra `markets` is not installed.
            UnknownTypeError: No exchange has this name.
            ConfigError: An override of this calendar cannot be read.
        """
        calendar = self._calendars.get(name)
        if calendar is None:
            calendar = self._calendars[name] = self._load(name.strip())
        return calendar

    def _load(self, name: str) -> Calendar:
        if name.lower() in _ALWAYS:
            return Calendar("24/7", always=True)
        canonical = _canonical(name)
        table = self._table(canonical)
        own = self._overrides.get(canonical, ())
        changes = _corrected(table, table.changes_s, _KNOWN.get(canonical, ()))
        changes = _corrected(table, changes, own)
        return Calendar(name, table.timezone, changes, _horizon(table, own))

    def _table(self, name: str) -> _Table:
        version = _library_version(name)
        path = self._path(name)
        kept = _read(path) if path is not None else None
        if kept is not None and (kept.format, kept.library, kept.name) == (
            _FORMAT,
            version,
            name,
        ):
            return kept
        table = _compile(name, version)
        if path is not None:
            _write(path, table)
        return table

    def _path(self, name: str) -> Path | None:
        if self._cache_dir is None:
            return None
        return self._cache_dir / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}.json"


def instant_in_words(ns: int, now_ns: int, timezone: str) -> str:
    """Return `ns` as an operator reads it: `Mon 09:15 IST`, with the date if it is six days away or more."""
    zone = ZoneInfo(timezone)
    when = datetime.fromtimestamp(ns // _SECOND_NS, zone)
    today = datetime.fromtimestamp(now_ns // _SECOND_NS, zone)
    near = abs((when.date() - today.date()).days) < 6
    return f"{when:%a %H:%M %Z}" if near else f"{when:%a %Y-%m-%d %H:%M %Z}"


# --- The table ------------------------------------------------------------------------------------


def _canonical(name: str) -> str:
    upper = name.upper()
    return _ALIASES.get(upper, upper if upper in _KNOWN else name)


def _library_version(name: str) -> str:
    try:
        return metadata.version(_LIBRARY)
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError(f"market hours of {name}", "markets") from error


def _read(path: Path) -> _Table | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Table)
    except (OSError, msgspec.MsgspecError):
        return None  # absent, or damaged: it is compiled again


def _write(path: Path, table: _Table) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(table))
        fresh.replace(path)
    except OSError as error:
        _log.warning(
            "market hours of %s are not kept in %s: %s", table.name, path, error
        )


def _compile(name: str, version: str) -> _Table:
    try:
        import pandas_market_calendars as library
    except ImportError as error:
        raise MissingExtraError(f"market hours of {name}", "markets") from error
    known = library.get_calendar_names()
    found = name if name in known else {k.lower(): k for k in known}.get(name.lower())
    if found is None:
        raise UnknownTypeError("calendar", name, known, "schedule.calendar")
    calendar = library.get_calendar(found)
    zone = ZoneInfo(_plain_zone(str(calendar.tz)))
    last = _last_holiday(calendar)
    end_year = _LAST_YEAR if last is None else last.year + _YEARS_PAST_HORIZON
    end = date(min(end_year, _LAST_YEAR), 12, 31)
    schedule = calendar.schedule(_FIRST_DAY, end.isoformat())
    horizon = None
    if last is not None and last < end:
        midnight = datetime.combine(last + timedelta(days=1), time(), zone)
        horizon = int(midnight.timestamp())
    return _Table(
        format=_FORMAT,
        library=version,
        name=name,
        timezone=str(zone),
        horizon_s=horizon,
        changes_s=_changes(_sessions(schedule)),
    )


def _plain_zone(name: str) -> str:
    return {"Asia/Calcutta": "Asia/Kolkata"}.get(name, name)


def _last_holiday(calendar: Any) -> date | None:
    days = list(calendar.holidays().holidays)[-1:] + list(calendar.adhoc_holidays)
    dates = [date.fromisoformat(str(day)[:10]) for day in days]
    return max(dates, default=None)


def _sessions(schedule: Any) -> list[tuple[int, int]]:
    """Return `(opening, closing)` in UTC seconds of every session, a lunch break making two of one."""

    def seconds(column: str) -> list[int | None]:
        return [
            None
            if moment != moment
            else int(moment.timestamp())  # NaT differs from itself
            for moment in schedule[column]
        ]

    opens, closes = seconds("market_open"), seconds("market_close")
    if "break_start" not in schedule.columns:
        return [(a, b) for a, b in zip(opens, closes, strict=True) if a and b]
    sessions: list[tuple[int, int]] = []
    pauses = zip(seconds("break_start"), seconds("break_end"), strict=True)
    for begin, end, (rest, back) in zip(opens, closes, pauses, strict=True):
        if not begin or not end:
            continue
        if rest and back and begin < rest < back < end:
            sessions += [(begin, rest), (back, end)]
        else:
            sessions.append((begin, end))
    return sessions


def _changes(sessions: Sequence[tuple[int, int]]) -> list[int]:
    """Return openings and closings, ascending; sessions that touch or overlap become one."""
    changes: list[int] = []
    for begin, end in sorted(sessions):
        if end <= begin:
            continue
        if changes and begin <= changes[-1]:
            changes[-1] = max(changes[-1], end)
        else:
            changes += [begin, end]
    return changes


def _corrected(
    table: _Table, changes: Sequence[int], days: Sequence[SessionOverride]
) -> list[int]:
    if not days:
        return list(changes)
    sessions = list(zip(changes[::2], changes[1::2], strict=True))
    for date_text in {day.date for day in days}:
        first = _local_s(table, date_text, "00:00")
        sessions = [s for s in sessions if not first <= s[0] < first + _DAY_S]
    for day in days:
        if (day.open is None) != (day.close is None):
            raise ConfigError(
                f"calendar_overrides.{table.name}",
                [
                    f"{day.date} has only one of `open` and `close`; give both, or neither for a closed day."
                ],
            )
        if day.open is not None and day.close is not None:
            begin = _local_s(table, day.date, day.open)
            end = _local_s(table, day.date, day.close)
            sessions.append((begin, end if end > begin else end + _DAY_S))
    return _changes(sessions)


def _horizon(table: _Table, own: Sequence[SessionOverride]) -> int | None:
    """Holidays that the user lists are known ones: they move the horizon."""
    if table.horizon_s is None:
        return None
    closed = [_local_s(table, day.date, "00:00") for day in own if day.open is None]
    return max(table.horizon_s, *(second + _DAY_S for second in closed), 0)


def _local_s(table: _Table, day: str, clock: str) -> int:
    try:
        moment = datetime.fromisoformat(f"{day}T{clock}")
    except ValueError:
        raise ConfigError(
            f"calendar_overrides.{table.name}",
            [f"{day} {clock} is no local date and time; write 2026-11-08 and 18:15."],
        ) from None
    return int(moment.replace(tzinfo=ZoneInfo(table.timezone)).timestamp())
