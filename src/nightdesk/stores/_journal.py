"""The append-only log of the files store: one frame per group commit (R-16).

A frame is magic, length, number, checksum, body. At most one frame is unsynced at any time, so a bad
frame at the end is a write that a crash cut off, and was never acknowledged; a bad frame with a good
one behind it is damage to acknowledged data, which is never skipped.
"""

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import msgspec

from nightdesk.abc import Delete, Put, Record, Shelf
from nightdesk.errors import NewerSchemaError, StateDamagedError
from nightdesk.stores._lock import create_private, sync_directory, write_all
from nightdesk.stores._writer import DiskFull

__all__ = [
    "FORMAT_VERSION",
    "RESTORE",
    "Entry",
    "Frame",
    "Journal",
    "Replay",
    "apply",
    "encode_frame",
    "entries_of",
    "replay",
    "write_compacted",
]

FORMAT_VERSION = 1
RESTORE = "Nothing was changed. Restore a backup: `nightdesk state restore BACKUP`."

_MAGIC = b"NDJ\x01"
_HEAD = struct.Struct("<4sIQ8s")
_MAX_BODY = 256 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """One operation. A deletion has `data` None."""

    kind: str
    key: str
    shelf: Shelf
    data: bytes | None
    epoch: int
    sequence: int


class Frame(msgspec.Struct, array_like=True, frozen=True):
    """One group commit, or with no entries a remark: the new epoch at a start, the clean end at a stop."""

    version: int
    epoch: int
    sequence: int
    entries: tuple[Entry, ...] = ()
    remark: str = ""


class Replay(NamedTuple):
    """What a journal says: the live records in order of sequence, and where its good part ends."""

    records: dict[tuple[str, str], Record]
    deleted: set[tuple[str, str]]
    frames: int
    version: int
    epoch: int
    sequence: int
    good_bytes: int
    torn_bytes: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


def entries_of(
    records: list[Put | Delete], epoch: int, sequence: int
) -> tuple[Entry, ...]:
    """Number `records` from `sequence` + 1."""
    return tuple(
        Entry(op.kind, op.key, op.shelf, op.data, epoch, sequence + number)
        if isinstance(op, Put)
        else Entry(op.kind, op.key, "active", None, epoch, sequence + number)
        for number, op in enumerate(records, 1)
    )


def entry_of(record: Record) -> Entry:
    """Return the entry that writes `record` again as it is."""
    return Entry(
        record.kind,
        record.key,
        record.shelf,
        record.data,
        record.epoch,
        record.sequence,
    )


def encode_frame(number: int, frame: Frame) -> bytes:
    """Return `frame` as it stands in the file."""
    body = _encoder.encode(frame)
    return _HEAD.pack(_MAGIC, len(body), number, _checksum(number, body)) + body


def _checksum(number: int, body: bytes) -> bytes:
    return blake2b(struct.pack("<IQ", len(body), number) + body, digest_size=8).digest()


def _frames(data: bytes) -> Iterator[tuple[int, int, Frame]]:
    """Yield `(end, number, frame)` of the good frames from the beginning on, up to the first bad one."""
    start, expected = 0, 0
    while (found := _frame_at(data, start)) is not None:
        end, number, frame = found
        if number != expected:
            return
        yield end, number, frame
        start, expected = end, expected + 1


def _frame_at(data: bytes, start: int) -> tuple[int, int, Frame] | None:
    if start + _HEAD.size > len(data):
        return None
    magic, length, number, checksum = _HEAD.unpack_from(data, start)
    end = start + _HEAD.size + length
    if magic != _MAGIC or length > _MAX_BODY or end > len(data):
        return None
    body = data[start + _HEAD.size : end]
    if _checksum(number, body) != checksum:
        return None
    try:
        return end, number, _decoder.decode(body)
    except msgspec.MsgspecError:
        return None


def _good_frame_after(data: bytes, start: int, number: int) -> bool:
    """Return whether a whole frame with a number above `number` stands somewhere behind `start`."""
    at = data.find(_MAGIC, start + 1)
    while at >= 0:
        found = _frame_at(data, at)
        if found is not None and found[1] > number:
            return True
        at = data.find(_MAGIC, at + 1)
    return False


def replay(data: bytes, path: str, *, version: int = FORMAT_VERSION) -> Replay:
    """Return what the journal `data` says.

    Raises:
        StateDamagedError: A bad frame has good ones behind it, or the first frame is bad.
        NewerSchemaError: Written by a newer version.
    """
    records: dict[tuple[str, str], Record] = {}
    deleted: set[tuple[str, str]] = set()
    good = frames = epoch = sequence = 0
    written_by = version
    for end, number, frame in _frames(data):
        if frame.version > version:
            raise NewerSchemaError(path, frame.version, version)
        for entry in frame.entries:
            apply(records, entry)
            (deleted.add if entry.data is None else deleted.discard)(
                (entry.kind, entry.key)
            )
        good, frames, epoch, sequence = (
            end,
            number + 1,
            max(epoch, frame.epoch),
            frame.sequence,
        )
        written_by = min(written_by, frame.version)
    if good < len(data) and _good_frame_after(data, good, frames):
        raise StateDamagedError(
            path,
            f"the record at byte {good} is damaged, and acknowledged ones follow it",
            RESTORE,
        )
    return Replay(
        records, deleted, frames, written_by, epoch, sequence, good, len(data) - good
    )


def apply(records: dict[tuple[str, str], Record], entry: Entry) -> None:
    """Change `records` as `entry` says, keeping them in order of sequence."""
    name = (entry.kind, entry.key)
    records.pop(name, None)
    if entry.data is not None:
        records[name] = Record(
            entry.kind, entry.key, entry.data, entry.shelf, entry.epoch, entry.sequence
        )


def write_compacted(
    path: Path, records: Iterable[Record], *, epoch: int, sequence: int, version: int
) -> None:
    """Replace the journal at `path` by one that holds only `records`; a crash leaves the old or the new one.

    Each frame ends at the sequence of its last record, so that a journal cut off later is noticed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    fd = create_private(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    number = 0
    try:
        for chunk in _chunks(records):
            frame = Frame(
                version, epoch, chunk[-1].sequence, tuple(map(entry_of, chunk))
            )
            write_all(fd, encode_frame(number, frame))
            number += 1
        write_all(
            fd,
            encode_frame(number, Frame(version, epoch, sequence, remark="compacted")),
        )
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    sync_directory(path.parent)


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += len(record.data)
        if size > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class Journal:
    """The open file. Appends are durable when `append` returns."""

    def __init__(self, fd: int, path: Path, *, frames: int, size: int) -> None:
        self.path, self.frames, self.size = path, frames, size
        self._fd = fd
        os.lseek(fd, size, os.SEEK_SET)

    def append(self, frame: Frame) -> None:
        """Write and sync one frame.

        Raises:
            DiskFull: The file is as before; a second try is safe.
            OSError: A write or sync failed in another way; no later append may be believed.
        """
        data = encode_frame(self.frames, frame)
        try:
            write_all(self._fd, data)
        except OSError as error:
            os.ftruncate(self._fd, self.size)
            os.lseek(self._fd, self.size, os.SEEK_SET)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(str(self.path)) from error
            raise
        os.fdatasync(self._fd)  # no space *here* is final: the pages may be gone
        self.frames += 1
        self.size += len(data)

    def close(self) -> None:
        os.close(self._fd)
