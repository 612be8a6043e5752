"""The state directory from outside: look, copy, put back."""

import asyncio
import contextlib
import json
import sys
import types
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nightdesk.abc import Put
from nightdesk.cli import main
from nightdesk.kernel.clock import SystemClock
from nightdesk.model.order import Order, OrderRequest, OrderStatus, Side
from nightdesk.model.serializer import encode_context
from nightdesk.stores.sqlite import SqliteStore
from nightdesk.tasks.candles import CandlesContext


def order(name: str, status: OrderStatus) -> Put:
    request = OrderRequest(
        symbol="BTC/USDT", venue="alpha", side=Side.SELL, quantity=Decimal("0.05")
    )
    body = Order(client_order_id=name, task_id="sell", request=request, status=status)
    return Put("order", name, msgspec.json.encode(body))


@pytest.fixture(autouse=True)
def here(tmp_path: Path) -> Iterator[Path]:
    async def fill() -> None:
        store = SqliteStore(tmp_path / "state", clock=SystemClock())
        await store.start()
        context = CandlesContext(task_id="candles", state="EXECUTING")
        await store.save(
            [
                order("a", OrderStatus.FILLED),
                order("b", OrderStatus.UNKNOWN),
                order("c", OrderStatus.INITIALIZED),
                Put(
                    "context",
                    "candles",
                    encode_context(context, type="candles", schema=1, saved_ns=1),
                ),
                Put("order", "d", b"\x00 no order"),
            ]
        )
        await store.stop()

    asyncio.run(fill())
    with contextlib.chdir(tmp_path):
        yield tmp_path


def call(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def test_inspect_tells_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(call(capsys, "state", "inspect", "--json"))

    assert found["version"] == 1
    assert found["store"] == "sqlite"
    words = call(capsys, "state", "inspect")
    assert "sqlite" in words
    assert "context (active 1)" in words


def test_export_writes_one_line_per_record(capsys: pytest.CaptureFixture[str]) -> None:
    everything = call(capsys, "state", "export").splitlines()
    contexts = call(capsys, "state", "export", "--kind", "context").splitlines()

    assert len(everything) == 5
    assert [json.loads(line)["key"] for line in contexts] == ["candles"]


def test_a_kind_that_no_record_has_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["state", "export", "--kind", "odrer"]) == 0

    out, err = capsys.readouterr()
    assert out == ""
    assert "no record is of kind 'odrer'; there are " in err
    assert "context" in err


def test_a_backup_can_be_put_back(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(capsys, "state", "backup", "copy.db")

    assert main(["state", "backup", "copy.db"]) == 2
    assert "exists" in capsys.readouterr().err
    call(capsys, "state", "restore", "copy.db", "--json")
    call(capsys, "state", "migrate")
    assert len(call(capsys, "state", "export").splitlines()) == 5


def test_recover_shows_what_the_next_start_would_take_up(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "state" / "HALT").touch()

    found = json.loads(call(capsys, "recover", "--dry-run", "--json"))

    assert [(o["client_order_id"], o["status"]) for o in found["orders"]] == [
        ("b", "UNKNOWN"),
        ("c", "INITIALIZED"),
    ]
    assert found["tasks"] == [
        {"task_id": "candles", "type": "candles", "state": "EXECUTING"}
    ]
    assert found["unreadable"] == 1
    assert "HALTED" in found["trading"]
    text = call(capsys, "recover", "--dry-run")
    assert "nothing is sent again" in text
    assert "candles" in text


# --- bench: whatever a benchmark returns is printed ----------------------------------------------------------


@contextlib.contextmanager
def benchmark(**parts: Any) -> Iterator[None]:
    from nightdesk import bench

    module = types.ModuleType("nightdesk.bench.path")
    module.__dict__.update(parts)
    before = sys.modules.get(module.__name__)
    module.__spec__ = types.SimpleNamespace(name=module.__name__)  # type: ignore[assignment]
    sys.modules[module.__name__] = module
    had = getattr(bench, "path", None)
    try:
        yield
    finally:
        sys.modules.pop(module.__name__)
        if before is not None:
            sys.modules[module.__name__] = before
            bench.path = had


def test_a_benchmark_is_run_with_its_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(events: int = 10) -> dict[str, Any]:
        return {"events": events, "ours": {"p50_us": 1.5}}

    with benchmark(run=run):
        found = json.loads(call(capsys, "bench", "path", "--json", "--set", "events=5"))
        words = call(capsys, "bench", "path")
    with benchmark(run=run, render=lambda result: f"events: {result['events']}"):
        rendered = call(capsys, "bench", "path")

    assert found == {
        "version": 1,
        "benchmark": "path",
        "events": 5,
        "ours": {"p50_us": 1.5},
    }
    assert "ours.p50_us  1.5" in words
    assert rendered == "events: 10\n"


def test_an_option_that_a_benchmark_does_not_have_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with benchmark(run=lambda events=10: {}):
        assert main(["bench", "path", "--set", "evxnts=5"]) == 2
    assert "one of events" in capsys.readouterr().err
