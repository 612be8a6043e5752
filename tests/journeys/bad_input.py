"""Whatever is wrong with what a desk is given: one clear line, the documented exit code, nothing lost.

Run as a program: `python tests/journeys/bad_input.py`. Stories: every key of the sample configuration
mutated (F25); every byte of the small state files, and every n-th of the large ones, flipped and cut off
(F28); two desks on one directory (F26); a directory that cannot be written (F5); a full disk (F4); a desk
with nothing to do.

Prints `N passed, N failed` and exits 1 if anything failed.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml

from fakes.damage import Damage, Judge, damages, records_of
from fakes.running import Check, RunningDesk, nightdesk, until
from nightdesk import loading
from nightdesk.cli import main as command_line
from nightdesk.telemetry import logs

DESK = """
name: small
code: sm1
background: {{hosts: 0}}
state: {{store: {store}}}
venues:
  - name: alpha
    type: paper
    balances: {{USDT: 100000, BTC: 5}}
    instruments:
      - {{symbol: BTC/USDT, tick_size: 0.1, lot_size: 0.001, min_quantity: 0.001, min_notional: 5,
         maker_fee: 0.0002, taker_fee: 0.0005}}
{sources}
tasks:
  - {{id: sell, type: iceberg, symbol: BTC/USDT, venue: alpha, side: SELL, total_quantity: {total},
     order_quantity: 0.05, offset_ticks: {offset}, tick_tolerance: 50}}
  - {{id: stops, type: position_monitor, stop_loss: 0.05, take_profit: 0.1}}
"""
SMALL_BYTES = 1024
"""A state file up to this size is damaged at every byte."""
WHOLE_DESKS = 60
MAY_BE_NEGATIVE = ("seed", "maker_fee", "taker_fee")
MARKET = """sources:
  - {name: market, type: simulated, venues: [alpha], interval_ms: 20, seed: 3,
     markets: {BTC/USDT: {price: 60000, tick_size: 0.1}}}"""


def write_desk(
    folder: Path,
    *,
    store: str = "sqlite",
    total: str = "1.5",
    offset: int = 0,
    live: bool = True,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sources = MARKET if live else "sources: []"
    path = folder / ("desk.yaml" if live else "still.yaml")
    path.write_text(
        DESK.format(store=store, total=total, offset=offset, sources=sources)
    )
    return path


def one_line(text: str) -> str:
    """Return the only line that a refused start printed, or everything if it said more."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else text


# --- configuration (F25) ------------------------------------------------------------------------------


def keys_of(
    node: yaml.Node, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], yaml.Node, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), key, value
            yield from keys_of(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from keys_of(item, path)


def spliced(text: str, node: yaml.Node, by: str) -> str:
    return text[: node.start_mark.index] + by + text[node.end_mark.index :]


def mutations(text: str) -> Iterator[tuple[str, int, str, str]]:
    """Yield `(what was done, line, the word that must be named, the mutated text)` for every key."""
    for path, key, value in keys_of(yaml.compose(text, Loader=yaml.SafeLoader)):
        name, line = path[-1], key.start_mark.line + 1
        is_scalar = isinstance(value, yaml.ScalarNode)
        if path[-2:-1] != ("balances",):  # any currency may have a balance
            wrong = f"{name[0]}x{name[1:]}"
            yield "misspelt", line, wrong, spliced(text, key, wrong)
        yield (
            "mistyped",
            line,
            name,
            spliced(text, value, "{nonsense: [1]}" if is_scalar else "17.5\n"),
        )
        if not is_scalar:
            continue
        yield (
            "twice",
            line,
            name,
            spliced(text, value, f"{value.value}, {name}: 1")
            if _is_inline(text, key)
            else (_with_line_below(text, key, value)),
        )
        if value.style is None and value.value and _is_number(value.value):
            yield "a word", line, name, spliced(text, value, "plenty")
            if name not in MAY_BE_NEGATIVE:
                yield "negative", line, name, spliced(text, value, f"-{value.value}")
            yield "infinite", line, name, spliced(text, value, ".inf")


def _is_number(text: str) -> bool:
    return text.rstrip("smhu").replace(".", "", 1).isdigit()


def _is_inline(text: str, key: yaml.Node) -> bool:
    begin = text.rfind("\n", 0, key.start_mark.index) + 1
    return "{" in text[begin : key.start_mark.index]


def _with_line_below(text: str, key: yaml.Node, value: yaml.Node) -> str:
    end = text.find("\n", value.end_mark.index)
    return f"{text[:end]}\n{' ' * key.start_mark.column}{key.value}: {value.value}{text[end:]}"


def told(words: list[str]) -> tuple[int, str]:
    """Run one command in this process; return its exit code and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = command_line(words)
    return code, said.getvalue()


def configuration(check: Check, root: Path, processes: int = 8) -> None:
    print("configuration: every key of the sample, mutated")
    folder = root / "configuration"
    folder.mkdir()
    sample = folder / "desk.yaml"
    code, _ = told(["new-config", str(sample)])
    check("`new-config` writes one", code == 0 and sample.exists())
    text = sample.read_text()
    cases = list(mutations(text))
    named, wrong = Counter[str](), []
    for what, line, word, mutated in cases:
        sample.write_text(mutated)
        code, said = told(["check-config", "-c", str(sample)])
        good = any(
            f"{sample}: line {line}" in each and word in each
            for each in said.splitlines()
        ) or (what == "twice" and f"{sample}: line {line + 1}" in said and word in said)
        if code == 2 and good and "Traceback" not in said:
            named[what] += 1
        else:
            wrong.append(
                f"{what} {word} (line {line}): code {code}, {said.strip()[:200]!r}"
            )
    words = ", ".join(f"{count} {what}" for what, count in named.items())
    check(
        f"{len(cases)} mutations end with code 2, file, line and key", not wrong, words
    )
    for each in wrong[:20]:
        print(f"         {each}")
    for what, line, word, mutated in random.Random(1).sample(cases, processes):
        sample.write_text(mutated)
        ran = nightdesk("run", "-c", "desk.yaml", "--no-console", cwd=folder)
        fits = (
            ran.returncode == 2 and word in ran.stderr and f"line {line}" in ran.stderr
        )
        check(
            f"`run` refuses {what} `{word}` with code 2",
            fits or what == "twice",
            one_line(ran.stderr)[:120],
        )
    check("and leaves no state behind", not (folder / "state").exists())


def empty(check: Check, root: Path) -> None:
    print("a desk with nothing to do")
    folder = root / "empty"
    folder.mkdir()
    for name, text in (
        ("no tasks", "name: empty\n"),
        ("all disabled", "tasks: [{type: candles, enabled: false}]\n"),
        ("an empty file", ""),
    ):
        (folder / "desk.yaml").write_text(text)
        ran = nightdesk("run", "--no-console", cwd=folder)
        says = "Add one" in ran.stderr and "--allow-empty" in ran.stderr
        check(
            f"{name}: code 3, and what to add",
            ran.returncode == 3 and says,
            ran.stderr.strip().replace("\n", " ")[:160],
        )
    check("and leaves no state behind", not (folder / "state").exists())


# --- damaged state (F28) ------------------------------------------------------------------------------


def build_state(folder: Path, store: str, *, is_killed: bool) -> Path:
    """Let a desk trade until half of its iceberg is done, then end it; return its state directory."""
    write_desk(folder, store=store, total="200")
    with RunningDesk(folder) as desk:
        desk.until_up()
        until(
            lambda: desk.ask("status").get("orders", {}).get("booked_fills", 0) >= 6, 20
        )
        desk.ask("task.pause", task_id="stops")
        if is_killed:
            desk.process.kill()
            desk.process.wait()
        else:
            desk.stop()
    for name in ("reserve", "control.sock"):  # neither holds anything
        (folder / "state" / name).unlink(missing_ok=True)
    return folder / "state"


def damaged(check: Check, root: Path, most: int, every_desk: int) -> None:
    logs.set_console("off")
    for store, is_killed in (
        ("sqlite", False),
        ("sqlite", True),
        ("files", False),
        ("files", True),
    ):
        how = "killed" if is_killed else "stopped"
        print(f"state files of a {how} desk with `store: {store}`, damaged")
        folder = _fast_place(root) / f"{store}-{how}"
        original = build_state(folder, store, is_killed=is_killed)
        kept = original.rename(folder / "original")
        config = write_desk(folder, store=store, live=False)
        judge = Judge(folder, kept, loading.load_config(config))
        check(
            "its state is sound to begin with",
            bool(judge.expected),
            f"{len(judge.expected)} records",
        )
        names = [
            str(path.relative_to(kept))
            for path in sorted(kept.rglob("*"))
            if path.is_file()
            and not path.name.startswith(("log.jsonl", "lock", "control"))
        ]
        for name in names:
            content, begun = (kept / name).read_bytes(), time.monotonic()
            # The venue's own statement means nothing to the store, only to a whole desk.
            often = 1 if "venues" in name else every_desk
            density = len(content) if len(content) <= SMALL_BYTES else most
            if "venues" in name:  # a whole desk each time
                density = min(density, WHOLE_DESKS)
            endings, count = Counter[str](), 0
            for count, damage in enumerate(damages(content, density), 1):
                endings[judge.judge(name, damage, whole_desk=not count % often)] += 1
            words = ", ".join(f"{n} {ending}" for ending, n in sorted(endings.items()))
            figure = f"{len(content)} bytes, {words}; {time.monotonic() - begun:.0f} s"
            claim = f"{name}, {count} damages: no wrong value, no traceback"
            check(claim, not endings["WRONG"], figure)
        for each in list(dict.fromkeys(judge.wrong))[:10]:
            print(f"         {each[:400]}")
        main_file = "state.db" if store == "sqlite" else "journal.log"
        _in_processes(check, folder, judge, main_file)
        shutil.rmtree(folder, ignore_errors=True)


def _fast_place(root: Path) -> Path:
    """On memory where there is some: thousands of small states are opened."""
    memory = Path("/dev/shm")
    return memory / root.name if os.access(memory, os.W_OK) else root


def _in_processes(check: Check, folder: Path, judge: Judge, name: str) -> None:
    """A sample with real processes: what an operator sees."""
    samples: dict[str, Damage] = {
        "cut in half": lambda data: data[: len(data) // 2],
        "beginning with zeros": lambda data: bytes(64) + data[64:],
        "gone": lambda data: b"",
    }
    if judge.quarantining is not None:
        samples["with one flipped bit"] = judge.quarantining
    for what, damage in samples.items():
        # Right after a kill the log beside the database may hold all of it, and then nothing is lost.
        is_whole = judge.judge(name, damage, whole_desk=False) == "whole"
        judge.copy(name, damage).rename(folder / "state")
        (folder / "out.log").unlink(missing_ok=True)
        with RunningDesk(folder, config="still.yaml") as desk:
            if desk.until_up():
                shown = desk.ask("status").get("quarantined")
                claim = f"{name} {what}: up, and says what it put aside"
                figure = "nothing is lost" if is_whole else str(shown)[:160]
                check(claim, bool(shown) or is_whole, figure)
            else:
                code, said = desk.process.wait(5), desk.said().strip()
                is_line = len(said.splitlines()) == 1 and "Traceback" not in said
                claim = f"{name} {what}: code 5 and one line"
                check(claim, code == 5 and is_line, f"code {code}: {said[:200]}")
        looked = nightdesk("state", "inspect", cwd=folder)
        is_told = "Traceback" not in looked.stderr + looked.stdout
        check("and `state inspect` tells of it", is_told, looked.returncode)
        shutil.rmtree(folder / "state")


# --- two desks, and none that may write ---------------------------------------------------------------


HOLDER = """
import os, sys, time
from pathlib import Path
from nightdesk.kernel.clock import SystemClock
from nightdesk.stores._lock import DirectoryLock
lock = DirectoryLock(Path("state"), SystemClock())
lock.acquire()
lock.take_epoch(0, 0)
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


def two_desks(check: Check, root: Path) -> None:
    print("two desks on one state directory")
    folder = root / "two"
    write_desk(folder)
    with RunningDesk(folder) as first:
        check("the first starts", first.until_up())
        begun = time.monotonic()
        second = nightdesk("run", "--no-console", cwd=folder)
        took = time.monotonic() - begun
        host, pid = socket.gethostname(), str(first.process.pid)
        names = all(word in second.stderr for word in (pid, host, "started 20"))
        check("the second ends with code 4", second.returncode == 4, f"{took:.1f} s")
        check("naming process, host and start", names, one_line(second.stderr)[:200])
        check("the first goes on", bool(first.ask("status")))
        first.process.kill()
        first.process.wait()
        with RunningDesk(folder) as third:
            check("after kill -9 the next one starts", third.until_up())
    print("a holder that is killed and leaves a forked child")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        held = nightdesk("run", "--no-console", cwd=folder)
        check(
            "while it lives the desk ends with code 4",
            held.returncode == 4 and str(holder.pid) in held.stderr,
            one_line(held.stderr)[:120],
        )
        holder.kill()
        holder.wait()
        with RunningDesk(folder) as desk:
            check(
                "its child does not keep the directory",
                desk.until_up(),
                desk.said()[-200:] if not desk.is_alive else "",
            )
    finally:
        holder.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()


def read_only(check: Check, root: Path) -> None:
    print("a state directory that cannot be written")
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            print(
                "  skipped: running as root, and `setpriv` is not installed to give up its powers"
            )
            return
        prefix = (
            "setpriv",
            "--bounding-set=-dac_override,-dac_read_search",
            "--inh-caps=-all",
        )
    folder = root / "read-only"
    write_desk(folder)
    (folder / "state").mkdir(mode=0o700)
    for name, files in (
        ("an empty one", ()),
        ("one with a state", ("state.db", "high_water")),
    ):
        if files:
            (folder / "state").chmod(0o700)
            with RunningDesk(folder) as desk:
                desk.until_up()
                desk.stop()
        (folder / "state").chmod(0o500)
        begun = time.monotonic()
        ran = nightdesk("run", "--no-console", cwd=folder, prefix=prefix)
        took = time.monotonic() - begun
        text = ran.stderr + ran.stdout
        good = (
            ran.returncode == 5
            and len(text.strip().splitlines()) == 1
            and "writable" in text
        )
        check(
            f"{name}: code 5 and one line",
            good,
            f"code {ran.returncode}: {one_line(text)[:240]}",
        )
        check("within 2 s", took <= 2, f"{took:.2f} s")
    (folder / "state").chmod(0o700)


# --- a full disk (F4) ---------------------------------------------------------------------------------


def full_disk(check: Check, root: Path) -> None:
    """Needs a file system of its own: a small tmpfs, in a namespace that ends with its processes."""
    print("a full disk")
    flags = "-m" if os.geteuid() == 0 else "-rm"
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            ["unshare", flags, "true"], capture_output=True, check=False
        ).returncode
    ):
        print(
            "  skipped: no mount namespace can be made here (`unshare` is missing or not allowed)"
        )
        return
    told = subprocess.run(
        ["unshare", flags, sys.executable, __file__, "--inside", str(root)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    for line in (told.stdout + told.stderr).splitlines():
        print(line)
        check.passed += line.startswith("  ok ")
        if line.startswith("  FAILED"):
            check.failed.append(line)
    if told.returncode:
        check("the full disk's story came to its end", False, told.returncode)


def full_disk_inside(root: Path) -> int:
    check = Check()
    folder = root / "full"
    write_desk(folder, total="500")
    disk = folder / "state"
    disk.mkdir(mode=0o700)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m,mode=0700", "tmpfs", str(disk)],
        check=True,
    )
    with RunningDesk(folder) as desk:
        check(
            "the desk starts and trades",
            desk.until_up() and until(lambda: _fills(desk) >= 3, 20),
        )
        filler = disk / "filler"
        begun = time.monotonic()
        _fill(filler)
        found = until(
            lambda: (
                (s := desk.ask("status")) and s["trading"]["state"] == "HALTED" and s
            ),
            10,
            0.02,
        )
        took = time.monotonic() - begun
        check("trading halts within 1 s", bool(found) and took <= 1.0, f"{took:.2f} s")
        reason = (found or {}).get("trading", {}).get("reason", "")
        check("and the reason is named", "disk is full" in reason, reason[:120])
        check("`status` is not ready", (found or {}).get("ready") is False)
        before = _placed(disk)
        time.sleep(2.0)
        check(
            "no order leaves meanwhile",
            _placed(disk) == before,
            f"{len(before)} before",
        )
        stuck = nightdesk("status", cwd=folder)
        check(
            "`nightdesk status` works",
            stuck.returncode == 0 and "disk is full" in stuck.stdout,
        )
        filler.unlink()
        begun = time.monotonic()
        found = until(lambda: desk.ask("status").get("ready"), 10, 0.05)
        took = time.monotonic() - begun
        check("with space again it trades by itself", bool(found), f"{took:.2f} s")
        count = _fills(desk)
        check(
            "and fills come again",
            until(lambda: _fills(desk) >= count + 3, 20),
            _fills(desk),
        )
        _compare(check, desk, disk)
    shutil.copytree(disk, folder / "kept")
    print("  a disk that is full at start")
    filler = disk / "filler"
    (disk / "reserve").unlink(missing_ok=True)
    _fill(filler)
    ran = nightdesk("run", "--no-console", cwd=folder)
    text = one_line(ran.stderr + ran.stdout)
    check(
        "code 5 and one line",
        ran.returncode == 5 and "\n" not in text.strip(),
        f"code {ran.returncode}: {text[:200]}",
    )
    filler.unlink()
    with RunningDesk(folder) as desk:
        check(
            "with space it starts",
            desk.until_up() and until(lambda: desk.ask("status").get("ready"), 10),
        )
        _compare(check, desk, disk)
    return 1 if check.failed else 0


def _fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1 << 6):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)


def _fills(desk: RunningDesk) -> int:
    return int(desk.ask("status").get("orders", {}).get("booked_fills", 0))


def _rows(disk: Path) -> list[dict[str, Any]]:
    from nightdesk.venues._statement import read_statement

    return [
        row for path in disk.rglob("statement.jsonl") for row in read_statement(path)
    ]


def _placed(disk: Path) -> set[str]:
    return {row["client_order_id"] for row in _rows(disk) if row["row"] == "placed"}


def _compare(check: Check, desk: RunningDesk, disk: Path) -> None:
    """Stop; then every order of the venue has its intent, and every fill is booked."""
    took = desk.stop()
    check(
        "it stops",
        took <= 15 and desk.process.returncode == 0,
        f"{took:.1f} s, code {desk.process.returncode}",
    )
    records = records_of(disk)
    intents = {key for kind, key in records if kind == "order"}
    booked = {
        json.dumps(data["trade_id"])
        for (kind, _), data in records.items()
        if kind == "fill"
    }
    placed = _placed(disk)
    traded = {
        json.dumps(row["fill"]["trade_id"])
        for row in _rows(disk)
        if row["row"] == "traded"
    }
    check("no order without intent", placed <= intents, f"{len(placed)} orders")
    check(
        "no fill lost, none invented",
        booked == traded,
        f"{len(booked)} booked, {len(traded)} at the venue",
    )


# --- the program --------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--bytes",
        type=int,
        default=300,
        help="places of a large file that are damaged",
    )
    parser.add_argument(
        "--every-desk",
        type=int,
        default=5,
        help="start a whole desk on every n-th damage",
    )
    parser.add_argument("--only", default="", help="stories whose name begins so")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return full_disk_inside(options.inside)
    check = Check()
    root = Path(tempfile.mkdtemp(prefix="nightdesk-input-"))
    stories: dict[str, Callable[[], None]] = {
        "configuration": lambda: configuration(check, root),
        "empty": lambda: empty(check, root),
        "two": lambda: two_desks(check, root),
        "read-only": lambda: read_only(check, root),
        "full": lambda: full_disk(check, root),
        "damaged": lambda: damaged(check, root, options.bytes, options.every_desk),
    }
    try:
        for name, story in stories.items():
            if name.startswith(options.only):
                story()
    finally:
        for place in {root, _fast_place(root)}:
            shutil.rmtree(place, ignore_errors=True)
    return check.finish()


if __name__ == "__main__":
    sys.exit(main())
