"""Recordings, played again at the pace they had, N times faster, or as fast as the clock jumps.

Comes from: sources/_recordings.py
Goes to: kernel/inbox.py
"""

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from heapq import merge
from pathlib import Path
from typing import Any, Literal

import msgspec

from nightdesk.abc import Clock, Emit, Source
from nightdesk.errors import ConfigError
from nightdesk.model.events import Event
from nightdesk.sources._recordings import (
    FORMATS,
    Naming,
    Problems,
    Stamped,
    detect,
    events_of,
)

__all__ = ["ReplaySource", "start_ns"]

_EVENTS_PER_TURN = 200
_NEAR_NS = 10_000_000_000


class ReplaySource(Source):
    """Emits the events of recorded files in the order in which they were received.

    The receipt stamp decides when an event is due; all times of the recording are moved by one
    offset onto the desk's clock, so that ages stay as they were recorded (negative ones too).
    With a virtual clock that starts at `start_ns(files)` the offset is zero and the desk lives at
    the recorded time.

    Args:
        name: As in `desk.yaml`.
        files: Recordings, plain, gzip or zip; several are merged by their stamps.
        venue: Venue that the events are of.
        symbol: Name of the one instrument; else names are mapped by `symbols` or guessed (BTCUSDT).
        speed: 1 as recorded, N times as fast, or `max`: recorded pace under a virtual clock, which
            jumps from event to event, and without any pause under a real one.
        format: One of `binance, trades, lean, candles`, or `auto`: by content.
        spread_ppm: Distance of bid and ask of the quotes made from candles.
        origin_ns: Recorded time that is now when the source starts; None takes the first event's. The desk gives
            all its recordings the same one, so that those of two venues keep their distance in time.
    """

    def __init__(
        self,
        name: str,
        *,
        files: Sequence[str | Path],
        venue: str,
        symbol: str | None = None,
        symbols: Mapping[str, str] | None = None,
        speed: float | Literal["max"] = 1,
        format: str = "auto",
        spread_ppm: int = 100,
        origin_ns: int | None = None,
    ) -> None:
        self.name = name
        self.problems = Problems()
        self.emitted = 0
        self._paths = _existing(name, files)
        if format not in ("auto", *FORMATS):
            raise ConfigError(
                f"source {name!r}",
                [f"`format` is {format!r}, expected auto or one of {FORMATS}."],
            )
        if speed != "max" and not speed > 0:
            raise ConfigError(
                f"source {name!r}",
                [f"`speed` is {speed!r}, expected a number above 0 or 'max'."],
            )
        self._format = format
        self._speed = speed
        self._origin_ns = origin_ns
        self._naming = Naming(
            venue=venue,
            symbol=symbol,
            symbols=symbols or {},
            spread_ppm=Decimal(spread_ppm),
        )
        self._task: asyncio.Task[None] | None = None
        self._finished = False

    async def start(self, emit: Emit, clock: Clock, random: random.Random) -> None:
        self._finished = False
        events = self._events()
        self._task = asyncio.create_task(
            self._play(events, emit, clock), name=f"source {self.name}"
        )

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    @property
    def finished(self) -> bool:
        return self._finished

    def first_event_ns(self) -> int:
        """Return the first receipt stamp of the recordings: where a virtual clock should start.

        Raises:
            ConfigError: None holds an event.
        """
        first = next(self._events(), None)
        if first is None:
            raise ConfigError(
                f"source {self.name!r}",
                ["its recordings hold no event.", *self.problems.kept],
            )
        return first[0]

    def stats(self) -> dict[str, Any]:
        return {
            "emitted": self.emitted,
            "bad_lines": self.problems.count,
            "first_bad_lines": self.problems.kept,
            "finished": self._finished,
        }

    def _events(self) -> Iterator[Stamped]:
        streams = [
            events_of(
                path,
                detect(path) if self._format == "auto" else self._format,
                self._naming,
                self.problems,
            )
            for path in self._paths
        ]
        return (
            streams[0]
            if len(streams) == 1
            else merge(*streams, key=lambda stamped: stamped[0])
        )

    async def _play(self, events: Iterator[Stamped], emit: Emit, clock: Clock) -> None:
        """Play to the end, whatever is in the files: a source that dies in silence looks like a quiet market."""
        try:
            await self._emit_all(events, emit, clock)
        except Exception as error:
            self.problems.add(self.name, 0, f"ends early: {error!r}")
        self._finished = True

    async def _emit_all(
        self, events: Iterator[Stamped], emit: Emit, clock: Clock
    ) -> None:
        timeline: _Timeline | None = None
        in_turn = 0
        for stamp, event in events:
            if timeline is None:
                origin_ns = stamp if self._origin_ns is None else self._origin_ns
                timeline = _Timeline(origin_ns, clock.now_ns(), self._pace(clock))
            due = timeline.move(stamp)
            wait_ns = due - clock.now_ns()
            if wait_ns > 0 and timeline.pace is not None:
                await clock.sleep(wait_ns / 1e9)
                in_turn = 0
            elif (in_turn := in_turn + 1) >= _EVENTS_PER_TURN:
                await clock.sleep(
                    0
                )  # behind, or without pauses: the rest of the desk has its turn too
                in_turn = 0
            emit(timeline.place(event, stamp, clock.now_ns()))
            self.emitted += 1

    def _pace(self, clock: Clock) -> float | None:
        """Return how many recorded seconds pass in one of the desk's; None for no pauses at all."""
        if self._speed != "max":
            return float(self._speed)
        # A clock that says where it started is one whose time jumps.
        return 1.0 if hasattr(clock, "start_ns") else None


class _Timeline:
    """The recording's time on the desk's clock."""

    def __init__(self, first_stamp: int, now_ns: int, pace: float | None) -> None:
        self.pace = pace
        self._first = first_stamp
        # A clock that has just reached the recording lives in it: its times stay as they are.
        is_there = pace == 1 and 0 <= now_ns - first_stamp < _NEAR_NS
        self._now = first_stamp if is_there else now_ns

    def move(self, recorded_ns: int) -> int:
        """Return where `recorded_ns` lies on the desk's clock."""
        elapsed = recorded_ns - self._first
        if self.pace is None or self.pace == 1:
            return self._now + elapsed
        return self._now + round(elapsed / self.pace)

    def place(self, event: Event, stamp: int, now_ns: int) -> Event:
        """Return `event` with the desk's times, its recorded age kept."""
        received = now_ns if self.pace is None else self.move(stamp)
        if received == stamp:
            return event
        sent = received + event.ts_event_ns - stamp if event.ts_event_ns else 0
        return msgspec.structs.replace(event, ts_event_ns=sent, ts_received_ns=received)


def start_ns(files: Sequence[str | Path], format: str = "auto") -> int:
    """Return the first receipt stamp of recordings that have no source yet.

    Raises:
        ConfigError: A file is missing, or none holds an event.
    """
    return ReplaySource("replay", files=files, venue="", format=format).first_event_ns()


def _existing(name: str, files: Sequence[str | Path]) -> list[Path]:
    paths = [
        Path(file).expanduser()
        for file in ([files] if isinstance(files, (str, Path)) else files)
    ]
    problems = [
        f"recording {str(path)!r} does not exist."
        for path in paths
        if not path.is_file()
    ]
    if not paths:
        problems = ["`files` names no recording."]
    if problems:
        raise ConfigError(f"source {name!r}", problems)
    return paths
