"""What the operating system really gets: each acknowledgement comes after its sync (R-18, R-19, F3)."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        shutil.which("strace") is None, reason="strace is not installed"
    ),
]

SAVER = textwrap.dedent(
    """
    import asyncio, os, sys
    from pathlib import Path
    from nightdesk.abc import Put
    from nightdesk.errors import StateNotWritableError
    from nightdesk.kernel.clock import SystemClock
    from nightdesk.stores.files import FilesStore
    from nightdesk.stores.sqlite import SqliteStore

    async def main():
        store = {"sqlite": SqliteStore, "files": FilesStore}[sys.argv[2]](Path(sys.argv[1]), clock=SystemClock())
        await store.start()
        os.write(1, b"started")
        for n in range(6):
            try:
                await store.save([Put("order", str(n), b"x" * 50)])
                os.write(1, b"ack")
            except StateNotWritableError as error:
                os.write(1, b"refused")
        await store.stop()

    asyncio.run(main())
    """
)


def traced(directory: Path, store: str, *options: str) -> list[str]:
    log = directory / "trace"
    command = ["strace", "-f", "-y", "-qq", "-o", str(log), *options]
    done = subprocess.run(
        [*command, sys.executable, "-c", SAVER, str(directory / "state"), store],
        capture_output=True,
        timeout=60,
        check=False,
    )
    if b"Operation not permitted" in done.stderr:
        pytest.skip("this machine does not let us trace")
    assert done.returncode == 0, done.stderr.decode()
    return log.read_text().splitlines()


@pytest.mark.parametrize(
    ("store", "file"), [("sqlite", "state.db-wal"), ("files", "journal.log")]
)
def test_no_save_is_acknowledged_before_its_bytes_are_synced(
    tmp_path: Path, store: str, file: str
) -> None:
    lines = traced(tmp_path, store, "-e", "trace=write,pwrite64,fsync,fdatasync")

    unsynced = False
    acknowledged = 0
    for line in lines[next(n for n, line in enumerate(lines) if "started" in line) :]:
        if re.search(rf"p?write(64)?\(\d+<[^>]*{re.escape(file)}>", line):
            unsynced = True
        elif re.search(rf"f(data)?sync\(\d+<[^>]*{re.escape(file)}>", line):
            unsynced = False
        elif '"ack"' in line:
            assert not unsynced, line
            acknowledged += 1
    assert acknowledged == 6


def test_a_replaced_file_is_synced_before_the_rename_and_its_directory_after(
    tmp_path: Path,
) -> None:
    """R-19: each of the three alone loses data in a power cut."""
    lines = traced(tmp_path, "files", "-e", "trace=fsync,rename,renameat")

    renames = [
        number
        for number, line in enumerate(lines)
        if ".metadata.json.tmp" in line and "rename" in line
    ]
    assert renames
    for number in renames:
        assert (
            "fsync(" in lines[number - 1] and ".metadata.json.tmp>" in lines[number - 1]
        )
        assert re.search(r"fsync\(\d+<[^>]*/state>\)", lines[number + 1])


@pytest.mark.parametrize("store", ["sqlite", "files"])
def test_after_an_input_output_error_of_a_sync_nothing_is_acknowledged(
    tmp_path: Path, store: str
) -> None:
    """F3, by the kernel itself. The third sync of a log after the start fails, all later ones would succeed."""
    every = traced(tmp_path / "", store, "-e", "trace=write,fsync,fdatasync")
    started = next(number for number, line in enumerate(every) if "started" in line)
    name = (
        "fdatasync"
        if any("fdatasync(" in line for line in every[started:])
        else "fsync"
    )
    before = sum(f"{name}(" in line for line in every[:started])
    shutil.rmtree(tmp_path / "state")

    lines = traced(
        tmp_path,
        store,
        "-e",
        "trace=write,fsync,fdatasync",
        "-e",
        f"inject={name}:error=EIO:when={before + 3}",
    )

    answers = re.findall(r'"(ack|refused)"', "\n".join(lines))
    assert answers == ["ack", "ack", "refused", "refused", "refused", "refused"]
