"""One desk per directory (R-21), and the small file that remembers how far it got.

The lock is `flock` on a close-on-exec descriptor: it ends with the process, however that ends.
A forked child would inherit it and keep a dead desk's directory locked, so the child drops
its copy. The *fencing epoch* grows at each start and stands in every record.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import time
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import msgspec

from nightdesk.abc import Clock
from nightdesk.errors import StateDamagedError, StateLockedError, StateNotWritableError

__all__ = [
    "HIGH_WATER",
    "DirectoryLock",
    "HighWater",
    "Owner",
    "create_private",
    "is_locked",
    "not_writable",
    "read_high_water",
    "read_owner",
    "sync_directory",
    "write_all",
    "write_durably",
]

HIGH_WATER = "high_water"
_LOCK = "lock"
_HIGH_WATER = struct.Struct("<QQ8s")
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW


class Owner(msgspec.Struct):
    """Who holds a directory, as written in its lock."""

    pid: int = 0
    host: str = "an unknown host"
    started: str = "at an unknown time"
    epoch: int = 0


class HighWater(NamedTuple):
    """The newest epoch and the newest acknowledged sequence of a directory."""

    epoch: int = 0
    sequence: int = 0


class DirectoryLock:
    """The right to write into one directory, held from `acquire` to `release`."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.directory = directory
        self.high_water = HighWater()
        self._clock = clock
        self._lock_fd = -1
        self._mark_fd = -1

    def acquire(self) -> None:
        """Create the directory if need be, check who may read it, lock it.

        Raises:
            StateLockedError: Another process owns it.
            StateNotWritableError: Missing, foreign, read-only, or the lock is a symbolic link.
        """
        with not_writable(self.directory):
            self._prepare_directory()
            self._lock_fd = self._lock()
        _held.add(self)
        try:
            with not_writable(self.directory / HIGH_WATER):
                self._mark_fd = create_private(self.directory / HIGH_WATER)
        except BaseException:
            self.release()
            raise
        self.high_water = read_high_water(self.directory)

    def take_epoch(self, stored: int, sequence: int) -> int:
        """Return the next epoch, one above every earlier one, made durable before it is used."""
        epoch = max(stored, self.high_water.epoch) + 1
        self.mark(epoch, sequence)
        owner = Owner(
            os.getpid(), socket.gethostname(), _utc(self._clock.now_ns()), epoch
        )
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, msgspec.json.encode(owner), 0)
        os.fsync(self._lock_fd)
        os.fsync(self._mark_fd)
        sync_directory(self.directory)
        return epoch

    def mark(self, epoch: int, sequence: int) -> None:
        """Note that `sequence` is durable.

        Called after the commit and not synced itself: it may be too low after a power cut, never too high.
        A start that finds less than this knows that acknowledged records are gone.
        """
        self.high_water = HighWater(epoch, sequence)
        os.pwrite(self._mark_fd, _pack(self.high_water), 0)

    def reset_sequence(self) -> None:
        """Forget what was acknowledged, durably: another state takes the place of this one."""
        self.mark(self.high_water.epoch, 0)
        os.fsync(self._mark_fd)

    def release(self) -> None:
        """Give the directory free. Harmless when not held."""
        _held.discard(self)
        self._forget()

    def _forget(self) -> None:
        for fd in (self._mark_fd, self._lock_fd):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._lock_fd = self._mark_fd = -1

    def _prepare_directory(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.directory.stat()
        if found.st_uid != os.geteuid():
            raise StateNotWritableError(
                str(self.directory),
                f"belongs to user {found.st_uid}, this is user {os.geteuid()}",
                "Run the desk as the owner, `chown` the directory, or pass another one with `--state DIR`.",
            )
        if stat.S_IMODE(found.st_mode) & 0o077:
            self.directory.chmod(0o700)

    def _lock(self) -> int:
        path = self.directory / _LOCK
        for patience in (3, 2, 1, 0):
            fd = create_private(path)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The file may have been replaced between open and lock; then this lock guards nothing.
                if os.fstat(fd).st_ino == path.stat().st_ino:
                    return fd
            except BlockingIOError:
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            if (
                patience
            ):  # `is_locked` of an inspecting process holds it for some microseconds
                time.sleep(0.01)
        owner = read_owner(self.directory)
        raise StateLockedError(
            str(self.directory), owner.pid or None, owner.host, owner.started
        )


_held: "weakref.WeakSet[DirectoryLock]" = weakref.WeakSet()


def _drop_in_child() -> None:
    for lock in list(_held):
        lock._forget()
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)


@contextlib.contextmanager
def not_writable(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into `StateNotWritableError` with a next step."""
    try:
        yield
    except OSError as error:
        found = os.strerror(error.errno).lower() if error.errno else str(error)
        where = str(error.filename or path)
        raise StateNotWritableError(
            where, f"cannot be written ({found})", _next_step(error.errno)
        ) from error


def _next_step(code: int | None) -> str:
    if code == errno.ELOOP:
        return "It must be a plain file: remove the symbolic link, or pass another directory with `--state DIR`."
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space and start again."
    return "Make the directory writable for this user, or pass another one with `--state DIR`."


def create_private(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open `path` for this user only (0600), never through a symbolic link; return the descriptor."""
    fd = os.open(path, flags | _OPEN, 0o600)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if stat.S_IMODE(found.st_mode) != 0o600:
            os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd


def sync_directory(directory: Path) -> None:
    """Make creations and renames in `directory` durable (R-19)."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash at any instant leaves the old or the new file (R-19)."""
    temporary = path.with_name(f".{path.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    fd = create_private(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    sync_directory(path.parent)


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`: one `write` may take less."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def read_owner(directory: Path) -> Owner:
    """Return who wrote the lock of `directory`, as far as that can be read."""
    try:
        return msgspec.json.decode((directory / _LOCK).read_bytes(), type=Owner)
    except (OSError, msgspec.MsgspecError):
        return Owner()


def read_high_water(directory: Path) -> HighWater:
    """Return the mark of `directory`; zeros where there is none or a power cut tore it.

    Raises:
        StateDamagedError: It cannot be read at all.
    """
    try:
        raw = (directory / HIGH_WATER).read_bytes()
    except FileNotFoundError:
        return HighWater()
    except OSError as error:
        raise StateDamagedError(
            str(directory / HIGH_WATER),
            f"cannot be read ({error})",
            "Check the disk; restore a backup.",
        ) from error
    if len(raw) != _HIGH_WATER.size:
        return HighWater()
    epoch, sequence, _ = _HIGH_WATER.unpack(raw)
    mark = HighWater(epoch, sequence)
    return mark if _pack(mark) == raw else HighWater()


def is_locked(directory: Path) -> bool:
    """Return whether some process holds `directory` right now."""
    try:
        fd = os.open(directory / _LOCK, os.O_RDONLY | _OPEN)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _pack(mark: HighWater) -> bytes:
    body = struct.pack("<QQ", mark.epoch, mark.sequence)
    return body + blake2b(body, digest_size=8).digest()


def _utc(ns: int) -> str:
    return datetime.fromtimestamp(ns // 1_000_000_000, UTC).isoformat()
