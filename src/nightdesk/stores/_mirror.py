"""Contexts as files a person can read: `active/`, `completed/`, `errored/`, `metadata.json` (design 001).

Comes from: stores/files.py

The journal is the truth and these files follow it within a second, so a torn or edited file can never
become a wrong context. The other direction works too: a file whose task the journal does not
know, such as one brought over from another program, is taken in.
"""

import contextlib
import hashlib
import os
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote, unquote

import msgspec

from nightdesk.abc import Put, Record, Shelf
from nightdesk.stores._lock import (
    create_private,
    sync_directory,
    write_all,
    write_durably,
)

__all__ = ["Finding", "Mirror"]

_SHELVES: tuple[Shelf, ...] = get_args(Shelf)
_SUFFIX = ".json"
_MAX_STEM = 180
_MAX_FOREIGN_BYTES = 16 * 1024 * 1024

Finding = tuple[str, str]
"""A task id and what was wrong with its file."""


class Mirror:
    """The readable side of a files store."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._dirty: dict[str, Record | None] = {}
        self._places: dict[str, Shelf] = {}

    def prepare(self) -> None:
        for shelf in _SHELVES:
            (self.directory / shelf).mkdir(mode=0o700, exist_ok=True)

    @property
    def waiting(self) -> int:
        """Files that do not show the newest context yet."""
        return len(self._dirty)

    def note(self, key: str, record: Record | None) -> None:
        """Remember that the file of `key` must be written, or removed if `record` is None."""
        self._dirty.pop(key, None)
        self._dirty[key] = record

    def write(self, limit: int | None = None) -> None:
        """Bring up to `limit` files up to date, durably (R-19)."""
        touched: set[Shelf] = set()
        for key in list(self._dirty)[:limit]:
            record = self._dirty[key]
            name = _file_name(key)
            if record is not None:
                _write_file(self.directory / record.shelf / name, record.data)
                touched.add(record.shelf)
            for shelf in _SHELVES:
                if (record is None or shelf != record.shelf) and self._places.get(
                    key, shelf
                ) == shelf:
                    with contextlib.suppress(FileNotFoundError):
                        (self.directory / shelf / name).unlink()
                        touched.add(shelf)
            if record is None:
                self._places.pop(key, None)
            else:
                self._places[key] = record.shelf
            del self._dirty[key]
        for shelf in sorted(touched):
            sync_directory(self.directory / shelf)

    def write_metadata(self, facts: Mapping[str, Any]) -> None:
        """Write `metadata.json`."""
        write_durably(
            self.directory / "metadata.json",
            msgspec.json.format(msgspec.json.encode(dict(facts)), indent=2),
        )

    def compare(
        self, contexts: Mapping[str, Record], deleted: Container[str]
    ) -> tuple[list[Put], list[Finding]]:
        """Set the files against what the journal says; `write` then makes them equal.

        A file whose task was `deleted` just before a crash is removed, not taken in again.

        Returns:
            Contexts that only a file knows, and the damaged files, whose bytes now stand in `errored/`.
        """
        foreign: list[Put] = []
        findings: list[Finding] = []
        seen: set[str] = set()
        for shelf, path in self._files():
            data = path.read_bytes()[: _MAX_FOREIGN_BYTES + 1]
            key = _key_of(path, contexts)
            record = contexts.get(key)
            if record is not None and record.shelf == shelf and record.data == data:
                seen.add(key)
                self._places[key] = shelf
            elif record is None and key in deleted:
                path.unlink()
            elif not _is_object(data):
                findings.append((key, self._set_aside(path)))
            elif record is None:
                foreign.append(Put("context", key, data, shelf))
                self._places[key] = shelf
            elif record.shelf != shelf:
                path.unlink()  # left by a crash between writing one shelf and clearing the other
        for key, record in contexts.items():
            if key not in seen:
                self.note(key, record)
        return foreign, findings

    def _files(self) -> Iterator[tuple[Shelf, Path]]:
        for shelf in _SHELVES:
            for path in sorted((self.directory / shelf).glob(f"*{_SUFFIX}")):
                if (
                    path.is_file()
                    and not path.is_symlink()
                    and not path.name.startswith(".")
                ):
                    yield shelf, path

    def _set_aside(self, path: Path) -> str:
        number = 1
        while (
            target := self.directory / "errored" / f"{path.stem}.damaged-{number}"
        ).exists():
            number += 1
        path.replace(target)
        sync_directory(path.parent)
        return f"its file was damaged; the bytes are in errored/{target.name}"


def _write_file(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    fd = create_private(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)  # the directory is synced once for all files of a pass


def _file_name(key: str) -> str:
    """Return a file name for any task id: percent-encoded, and with a hash where it would be too long."""
    stem = quote(key, safe=" @+,=()-")
    if stem.startswith("."):
        stem = f"%2E{stem[1:]}"
    if len(stem) > _MAX_STEM:
        stem = f"{stem[:_MAX_STEM]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return stem + _SUFFIX


def _key_of(path: Path, contexts: Mapping[str, Record]) -> str:
    key = unquote(path.stem)
    if key in contexts or len(path.stem) <= _MAX_STEM:
        return key
    return next((known for known in contexts if _file_name(known) == path.name), key)


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(data), dict)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
