"""One desk per directory (R-21, F26), private files (S-7), one line when it cannot write (F5)."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.clock import ManualClock
from nightdesk.abc import Put
from nightdesk.errors import StateDamagedError, StateLockedError, StateNotWritableError
from nightdesk.stores._directory import DirectoryStore
from nightdesk.stores._lock import DirectoryLock, is_locked, read_high_water
from nightdesk.stores.files import FilesStore
from nightdesk.stores.sqlite import SqliteStore

HOLDER = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from nightdesk.kernel.clock import SystemClock
    from nightdesk.stores._lock import DirectoryLock
    lock = DirectoryLock(Path(sys.argv[1]), SystemClock())
    lock.acquire()
    lock.take_epoch(0, 0)
    child = os.fork() if len(sys.argv) > 2 else 1
    if child:
        print(child, flush=True)
    time.sleep(60)
    """
)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture(params=[SqliteStore, FilesStore])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> DirectoryStore:
    made: DirectoryStore = request.param(
        tmp_path / "state", clock=ManualClock(), inline=True
    )
    return made


@pytest.mark.process
def test_the_second_instance_is_told_pid_host_and_start_of_the_first(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(StateLockedError) as caught:
        DirectoryLock(tmp_path, ManualClock()).acquire()

    assert caught.value.pid == holder.pid
    assert caught.value.host == socket.gethostname()
    assert caught.value.started.startswith("20")
    assert str(holder.pid) in str(caught.value)
    assert caught.value.exit_code == 4
    assert is_locked(tmp_path)


@pytest.mark.process
def test_the_lock_ends_with_the_process_that_held_it(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()

    lock = DirectoryLock(tmp_path, ManualClock())
    lock.acquire()

    assert lock.take_epoch(0, 0) == 2
    lock.release()


@pytest.mark.process
def test_a_forked_child_does_not_keep_a_dead_desk_locked(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), "fork"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()

        lock = DirectoryLock(tmp_path, ManualClock())
        lock.acquire()
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


async def test_two_stores_in_one_process_cannot_share_a_directory(
    store: DirectoryStore,
) -> None:
    await store.start()

    with pytest.raises(StateLockedError):
        await type(store)(store.directory, clock=ManualClock(), inline=True).start()

    await store.stop()
    assert not is_locked(store.directory)


async def test_everything_written_is_for_this_user_only(store: DirectoryStore) -> None:
    old = os.umask(0)
    try:
        await store.start()
        await store.save([Put("context", "1", b"{}")])
        loose = [
            f"{path.relative_to(store.directory)} {stat.S_IMODE(path.stat().st_mode):o}"
            for path in [store.directory, *store.directory.rglob("*")]
            if stat.S_IMODE(path.stat().st_mode) & 0o077
        ]
        await store.stop()
    finally:
        os.umask(old)

    assert loose == []


async def test_a_directory_that_others_could_read_is_closed(
    store: DirectoryStore,
) -> None:
    store.directory.mkdir(mode=0o755)

    await store.start()
    await store.stop()

    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["lock", "high_water", "state.db", "journal.log"])
async def test_a_symbolic_link_in_the_place_of_a_file_is_refused(
    store: DirectoryStore, name: str, tmp_path: Path
) -> None:
    if name in ("state.db", "journal.log") and name != store.file_name:
        pytest.skip("the file of the other store")
    target = tmp_path / "precious"
    target.write_text("mine")
    store.directory.mkdir()
    (store.directory / name).symlink_to(target)

    with pytest.raises(StateNotWritableError, match="symbolic link"):
        await store.start()

    assert target.read_text() == "mine"


async def test_a_lock_that_is_no_plain_file_is_refused(store: DirectoryStore) -> None:
    store.directory.mkdir()
    (store.directory / "lock").mkdir()

    with pytest.raises(StateNotWritableError):
        await store.start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
async def test_a_directory_of_another_user_is_refused(store: DirectoryStore) -> None:
    store.directory.mkdir()
    os.chown(store.directory, 65534, 65534)

    with pytest.raises(StateNotWritableError, match="belongs to user 65534"):
        await store.start()


@pytest.fixture
def as_plain_user() -> Iterator[None]:
    """Root may write anywhere, so look at the world as somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


async def test_a_read_only_directory_is_refused_in_one_line(
    store: DirectoryStore, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store.directory.mkdir(mode=0o500)
    if os.geteuid() == 0:
        os.chown(store.directory, 65534, 65534)
        for parent in [tmp_path, *tmp_path.parents][:4]:
            if parent.owner() == "root" and str(parent) not in ("/", "/tmp"):
                parent.chmod(0o755)
    request.getfixturevalue("as_plain_user")

    with pytest.raises(StateNotWritableError) as caught:
        await store.start()

    assert "\n" not in str(caught.value)
    assert str(store.directory) in str(caught.value)
    assert "--state DIR" in str(caught.value)
    assert caught.value.exit_code == 5


async def test_a_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StateNotWritableError):
        await SqliteStore(
            tmp_path / "file" / "state", clock=ManualClock(), inline=True
        ).start()


async def test_a_failed_start_frees_the_lock_and_the_thread(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(
        b"this is no database, whatever its name says" * 100
    )
    store = SqliteStore(tmp_path, clock=ManualClock())

    with pytest.raises(StateDamagedError):
        await store.start()

    assert not is_locked(tmp_path)
    with pytest.raises(StateNotWritableError, match="not started"):
        store.save([Put("a", "1", b"")])


async def test_the_epoch_grows_at_each_start_and_outlives_the_database(
    store: DirectoryStore,
) -> None:
    epochs = []
    for _ in range(3):
        await store.start()
        epochs.append(store.epoch)
        await store.stop()
    store.path.unlink()

    await store.start()

    assert [*epochs, store.epoch] == [1, 2, 3, 4]
    await store.stop()


async def test_a_lock_with_garbage_in_it_still_locks(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"\xff\x00")
    first = DirectoryLock(tmp_path, ManualClock())
    first.acquire()

    with pytest.raises(StateLockedError, match="another process"):
        DirectoryLock(tmp_path, ManualClock()).acquire()

    first.release()


def test_a_torn_mark_counts_as_none(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path, ManualClock())
    lock.acquire()
    lock.mark(3, 9)
    lock.release()
    whole = (tmp_path / "high_water").read_bytes()

    for position in range(len(whole)):
        (tmp_path / "high_water").write_bytes(
            whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]
        )
        assert read_high_water(tmp_path) == (0, 0)
    (tmp_path / "high_water").write_bytes(whole)
    assert read_high_water(tmp_path) == (3, 9)


async def test_the_lock_names_its_owner_as_json(store: DirectoryStore) -> None:
    await store.start()

    owner = json.loads((store.directory / "lock").read_bytes())

    assert owner["pid"] == os.getpid()
    assert owner["epoch"] == store.epoch
    await store.stop()
