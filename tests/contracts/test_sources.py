"""The contract of every source: starts at once, emits until stopped, and repeats itself under a seed."""

import inspect
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import nightdesk.sources
from fakes.paper import ManualClock
from nightdesk.abc import Source
from nightdesk.model.events import Event
from nightdesk.sources.replay import ReplaySource
from nightdesk.sources.simulated import SimulatedSource


def simulated(directory: Path) -> Source:
    return SimulatedSource("simulated", venues=["a", "b"], swaps=True)


def replay(directory: Path) -> Source:
    path = directory / "trades.csv"
    path.write_text(
        "".join(
            f"{1_315_922_016 + number},5.{number % 9 + 1},1.0\n" for number in range(50)
        )
    )
    return ReplaySource("replay", files=[path], venue="a")


MAKERS: dict[str, Callable[[Path], Source]] = {"simulated": simulated, "replay": replay}
NAMES = sorted(
    path.stem
    for path in Path(inspect.getfile(nightdesk.sources)).parent.glob("[!_]*.py")
)
KNOWN = [name for name in NAMES if name in MAKERS]


async def run(source: Source, seconds: float = 5.0) -> list[Event]:
    clock, events = ManualClock(), []  # type: ManualClock, list[Event]
    await source.start(events.append, clock, random.Random(11))
    await clock.advance(seconds)
    await source.stop()
    return events


@pytest.mark.parametrize("name", KNOWN)
async def test_start_returns_before_anything_is_waited_for(
    name: str, tmp_path: Path
) -> None:
    clock = ManualClock()
    source = MAKERS[name](tmp_path)

    await source.start(lambda _: None, clock, random.Random(1))
    await source.stop()

    assert source.name == name


@pytest.mark.parametrize("name", KNOWN)
async def test_it_emits_events_with_the_desks_times(name: str, tmp_path: Path) -> None:
    events = await run(MAKERS[name](tmp_path))

    begin = ManualClock().now_ns()
    assert len(events) >= 5
    assert all(
        begin <= event.ts_received_ns <= begin + 5_000_000_000 for event in events
    )
    received = [event.ts_received_ns for event in events]
    assert received == sorted(received)


@pytest.mark.parametrize("name", KNOWN)
async def test_the_same_seed_and_clock_give_the_same_events(
    name: str, tmp_path: Path
) -> None:
    assert await run(MAKERS[name](tmp_path)) == await run(MAKERS[name](tmp_path))


@pytest.mark.parametrize("name", KNOWN)
async def test_after_stop_nothing_follows_and_a_second_stop_is_harmless(
    name: str, tmp_path: Path
) -> None:
    clock, events = ManualClock(), []  # type: ManualClock, list[Event]
    source = MAKERS[name](tmp_path)
    await source.start(events.append, clock, random.Random(1))
    await clock.advance(1)
    await source.stop()
    await source.stop()
    count = len(events)

    await clock.advance(5)

    assert len(events) == count


async def test_only_a_source_with_an_end_finishes(tmp_path: Path) -> None:
    finished = {}
    for name in KNOWN:
        source = MAKERS[name](tmp_path)
        await run(source, 60)
        finished[name] = source.finished

    assert finished == {"replay": True, "simulated": False}
