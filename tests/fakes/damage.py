"""Damaged copies of a state directory, and a judge of how a store and a whole desk end on each (F28)."""

import asyncio
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from nightdesk.config import Config
from nightdesk.desk import TradingDesk
from nightdesk.errors import NightdeskError
from nightdesk.kernel.clock import SystemClock
from nightdesk.kernel.loop import new_event_loop
from nightdesk.stores import _tools as tools
from nightdesk.stores.files import FilesStore
from nightdesk.stores.sqlite import SqliteStore
from nightdesk.venues._statement import read_statement

__all__ = ["Damage", "Judge", "damages", "records_of"]

Damage = Callable[[bytes], bytes]
Records = dict[tuple[str, str], Any]


def records_of(directory: Path) -> Records:
    """Return what can be read, as `nightdesk state export` shows it."""
    return {
        (line["kind"], line["key"]): line.get("data", line.get("data_base64"))
        for line in tools.export(directory)
        if "damaged" not in line
    }


def damages(content: bytes, most: int) -> Iterator[Damage]:
    """One flipped bit, everything behind some byte gone, a hole of zeros: at every byte, or at `most` of them."""
    chance = random.Random(len(content))
    step = max(1, len(content) // max(1, most))
    for at in range(0, len(content), step):
        place = min(len(content) - 1, at + chance.randrange(step))
        changed = bytes([content[place] ^ 1 << chance.randrange(8)])
        yield lambda data, at=place, by=changed: data[:at] + by + data[at + 1 :]
        yield lambda data, at=place: data[:at]
    for at in range(0, len(content), max(step, 512)):
        width = len(content[at : at + 512])
        yield lambda data, at=at, n=width: data[:at] + bytes(n) + data[at + n :]


class Judge:
    """Starts a store, and then a whole desk, on damaged copies, and says how each ended.

    Endings: `whole`, `quarantined`, `halted` (it starts, and does not trade before somebody has looked),
    `refused` (code 5 and one line), `WRONG`.

    Attributes:
        wrong: What may not be: a wrong value, something lost in silence, an unexpected exception.
        quarantining: A damage that ended in quarantine.
    """

    def __init__(self, folder: Path, original: Path, config: Config) -> None:
        self.folder = folder
        self.original = original
        self.config = config
        self.kind = SqliteStore if config.state.store == "sqlite" else FilesStore
        self.expected = records_of(original)
        self.fills = _fills_at_the_venue(original)
        self.wrong: list[str] = []
        self.quarantining: Damage | None = None
        self._copies = 0
        self._work = folder / "work-0"

    def copy(self, name: str, damage: Damage) -> Path:
        """Return a copy of the directory in which one file is damaged."""
        shutil.rmtree(self._work, ignore_errors=True)
        # Another name each time: the log of the last desk may still write its last line.
        self._copies += 1
        work = self._work = self.folder / f"work-{self._copies}"
        shutil.copytree(self.original, work)
        (work / name).write_bytes(damage((work / name).read_bytes()))
        return work

    def judge(self, name: str, damage: Damage, *, whole_desk: bool) -> str:
        """Return how it ends."""
        ending = self._of_store(self.copy(name, damage), name)
        if ending == "quarantined" and self.quarantining is None:
            self.quarantining = damage
        if whole_desk and ending != "WRONG":
            ending = self._of_desk(self.copy(name, damage), name, ending)
        return ending

    def _of_store(self, work: Path, name: str) -> str:
        """No readable record may differ from what was written, and what is missing must be said."""
        store = self.kind(work, clock=SystemClock(), inline=True)

        async def start_and_stop() -> None:
            await store.start()
            await store.stop()

        try:
            asyncio.run(start_and_stop())
            found = records_of(work)
        except NightdeskError as error:
            return self._refused(error, name)
        except Exception as error:
            return self._note(name, f"the store raised {type(error).__name__}: {error}")
        said = store.quarantined()
        changed = [k for k in found if found[k] != self.expected.get(k)]
        if changed:
            return self._note(name, f"wrong or invented: {changed[:3]}")
        missing = self.expected.keys() - found.keys()
        if len(missing) > len(said):
            return self._note(name, f"lost in silence: {sorted(missing)[:3]}")
        return "quarantined" if said else "whole"

    def _of_desk(self, work: Path, name: str, before: str) -> str:
        state = msgspec.structs.replace(self.config.state, directory=str(work))
        config = msgspec.structs.replace(self.config, state=state)
        loop = new_event_loop("auto", 100)
        try:
            shown = loop.run_until_complete(_status_of(config, loop))
        except NightdeskError as error:
            return self._refused(error, name)
        except Exception as error:
            return self._note(name, f"the desk raised {type(error).__name__}: {error}")
        finally:
            loop.close()
        is_halted = shown["trading"]["state"] == "HALTED"
        if before == "quarantined" and not shown["quarantined"]:
            return self._note(name, "the desk does not say what it put in quarantine")
        fills = _fills_at_the_venue(work)
        if any(fills[trade] != self.fills.get(trade) for trade in fills):
            return self._note(name, "the venue's statement has a wrong fill")
        if len(fills) < len(self.fills) and not is_halted:
            return self._note(name, "the venue forgot fills, and the desk trades")
        return "halted" if is_halted else before

    def _refused(self, error: NightdeskError, name: str) -> str:
        text = str(error)
        if error.exit_code != 5 or "\n" in text or text.count(".") < 2:
            code = error.exit_code
            return self._note(name, f"refused with code {code} and {text!r}")
        return "refused"

    def _note(self, name: str, text: str) -> str:
        self.wrong.append(f"{name}: {text}")
        return "WRONG"


async def _status_of(config: Config, loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """Start a whole desk and stop it; return what it says of itself in between."""
    desk = TradingDesk(config, loop)
    try:
        await desk.start()
    except BaseException:
        await desk.abandon()
        raise
    shown = await desk.command("status", {}, "journey")
    await desk.stop()
    return dict(shown)


def _fills_at_the_venue(directory: Path) -> dict[str, Any]:
    return {
        row["fill"]["trade_id"]: row["fill"]
        for path in directory.rglob("statement.jsonl")
        for row in read_statement(path)
        if row["row"] == "traded"
    }
