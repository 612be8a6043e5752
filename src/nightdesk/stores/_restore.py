"""Puts a restored state in place so that a kill at any instant leaves the old or the new one.

The new file waits in `restore.pending`, a directory that appears by one rename when it is
complete and durable. Moving it in place can then be repeated by whoever comes next: the
restore itself, or the next start.
"""

import shutil
from pathlib import Path

from nightdesk.stores._lock import DirectoryLock, not_writable, sync_directory

__all__ = ["ASIDE", "PENDING", "finish_restore"]

PENDING = "restore.pending"
ASIDE = "aside"

# A write-ahead log left behind would be replayed into the new database, so it goes first.
_OLD = (
    "state.db-wal",
    "state.db-shm",
    "state.db",
    "journal.log",
    "metadata.json",
    "active",
    "completed",
    "errored",
)


def finish_restore(lock: DirectoryLock) -> Path | None:
    """Complete a restore that was begun; return where the state it replaced is kept, or None."""
    directory = lock.directory
    pending = directory / PENDING
    if not pending.exists():
        return None
    with not_writable(directory):
        arriving = [path for path in pending.iterdir() if path.name != ASIDE]
        aside = None
        if arriving:  # the old files are still in place, or some of them
            aside = directory / (pending / ASIDE).read_text()
            aside.mkdir(mode=0o700, exist_ok=True)
            for name in _OLD:
                if (directory / name).exists():
                    (directory / name).replace(aside / name)
            sync_directory(aside)
            lock.reset_sequence()
        for path in arriving:
            path.replace(directory / path.name)
        sync_directory(directory)
        shutil.rmtree(pending)
        sync_directory(directory)
    return aside
