"""Disks that fail on purpose: a SQLite file layer that refuses, and one that remembers for a power cut."""

import itertools
import random
from pathlib import Path
from typing import Any, NamedTuple

import apsw

__all__ = ["BadDisk", "Event", "MemoryOfDisk", "crash_state"]

_SECTOR = 512
_numbers = itertools.count()


class Event(NamedTuple):
    """One thing that happened to a file, or with `what` "ack" a save that was acknowledged."""

    what: str
    file: str = ""
    offset: int = 0
    data: bytes = b""


class BadDisk(apsw.VFS):
    """Passes everything on until `failing` names a method, which then raises."""

    def __init__(self) -> None:
        self.name = f"bad-disk-{next(_numbers)}"
        self.failing: str | None = None
        super().__init__(self.name, "")

    def xOpen(self, name: Any, flags: list[int]) -> "apsw.VFSFile":
        return _BadFile(self, name, flags)

    def check(self, method: str) -> None:
        if self.failing == method:
            raise {
                "xSync": apsw.IOError("injected"),
                "xWrite": apsw.FullError("injected"),
            }[method]


class _BadFile(apsw.VFSFile):
    def __init__(self, disk: BadDisk, name: Any, flags: list[int]) -> None:
        self._disk = disk
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        self._disk.check("xWrite")
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        self._disk.check("xSync")
        super().xSync(flags)


class MemoryOfDisk(apsw.VFS):
    """Notes every write, truncation and sync in order."""

    def __init__(self) -> None:
        self.name = f"memory-of-disk-{next(_numbers)}"
        self.events: list[Event] = []
        super().__init__(self.name, "")

    def xOpen(self, name: Any, flags: list[int]) -> "apsw.VFSFile":
        return _NotedFile(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        self.events.append(Event("delete", Path(filename).name))
        super().xDelete(filename, syncdir)


class _NotedFile(apsw.VFSFile):
    def __init__(self, disk: MemoryOfDisk, name: Any, flags: list[int]) -> None:
        self._note = disk.events.append
        self._file = Path(
            name.filename() if isinstance(name, apsw.URIFilename) else name
        ).name
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        self._note(Event("write", self._file, offset, bytes(data)))
        super().xWrite(data, offset)

    def xTruncate(self, size: int) -> None:
        self._note(Event("truncate", self._file, size))
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:
        self._note(Event("sync", self._file))
        super().xSync(flags)


def crash_state(events: list[Event], chance: random.Random) -> dict[str, bytes]:
    """Return the files as a power cut after the last of `events` may leave them.

    What was synced is there. Of what was not, any part may be, in any order, and each write may be torn
    between two sectors.
    """
    files: dict[str, bytearray] = {}
    for file in sorted({event.file for event in events if event.file}):
        own = [event for event in events if event.file == file]
        deleted = max(
            (number for number, event in enumerate(own) if event.what == "delete"),
            default=-1,
        )
        own = own[
            deleted + 1 :
        ]  # SQLite syncs the directory after it deletes a journal
        if not own:
            continue
        synced = max(
            (number for number, event in enumerate(own) if event.what == "sync"),
            default=-1,
        )
        content = files.setdefault(file, bytearray())
        for number, event in enumerate(own):
            if number <= synced:
                _apply(content, event)
            elif chance.random() < 0.7:
                _apply(content, _torn(event, chance))
    return {name: bytes(content) for name, content in files.items()}


def _apply(content: bytearray, event: Event) -> None:
    if event.what == "write":
        missing = event.offset - len(content)
        if missing > 0:
            content += bytes(missing)
        content[event.offset : event.offset + len(event.data)] = event.data
    elif event.what == "truncate":
        del content[event.offset :]


def _torn(event: Event, chance: random.Random) -> Event:
    if event.what != "write" or chance.random() < 0.5:
        return event
    first = _SECTOR - event.offset % _SECTOR
    cuts = [0, *range(first, len(event.data), _SECTOR), len(event.data)]
    return event._replace(data=event.data[: chance.choice(cuts)])
