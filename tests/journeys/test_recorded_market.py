"""An iceberg on recorded BTC/USDT ticks: it completes, inside the recorded market, the same way twice."""

import gzip
import json
from bisect import bisect_right
from decimal import Decimal
from pathlib import Path

import pytest

from nightdesk import running
from nightdesk.config import (
    BackgroundConfig,
    Config,
    SourceConfig,
    StateConfig,
    TaskEntry,
    VenueConfig,
)
from recordings import recording

pytestmark = pytest.mark.recordings

NEAR_NS = 50_000_000
"""Between the tick that causes a fill and the row that reports it."""


def desk(tape: Path, state: Path) -> Config:
    return Config(
        virtual_time=True,
        seed=7,
        state=StateConfig(directory=str(state)),
        background=BackgroundConfig(hosts=0),
        venues=(
            VenueConfig(
                name="binance",
                type="paper",
                options={
                    "seed": 7,
                    "latency_ms": [5, 20],
                    "instruments": [
                        {
                            "symbol": "BTC/USDT",
                            "tick_size": "0.01",
                            "lot_size": "0.00001",
                            "min_quantity": "0.00001",
                            "min_notional": "5",
                            "maker_fee": "0.001",
                            "taker_fee": "0.001",
                        }
                    ],
                    "balances": {"USDT": "100000", "BTC": "1"},
                },
            ),
        ),
        sources=(
            SourceConfig(
                name="tape",
                type="replay",
                options={"venue": "binance", "speed": "max", "files": [str(tape)]},
            ),
        ),
        tasks=(
            TaskEntry(
                id="sell",
                type="iceberg",
                params={
                    "symbol": "BTC/USDT",
                    "venue": "binance",
                    "side": "SELL",
                    "total_quantity": "0.5",
                    "order_quantity": "0.05",
                    "tick_tolerance": 50,
                },
            ),
        ),
    )


def prices_by_time(tape: Path) -> tuple[list[int], list[tuple[Decimal, Decimal]]]:
    """Return receipt stamps and, for each, the lowest and highest price shown or traded then."""
    stamps, prices = [], []
    with gzip.open(tape, "rt") as lines:
        for line in lines:
            stamp, _, text = line.partition(" ")
            message = json.loads(text)
            data = message.get("data", {})
            if message.get("stream", "").endswith("@bookTicker"):
                prices.append((Decimal(data["b"]), Decimal(data["a"])))
            elif message.get("stream", "").endswith("@trade"):
                prices.append((Decimal(data["p"]), Decimal(data["p"])))
            else:
                continue
            stamps.append(int(stamp))
    return stamps, prices


def test_an_iceberg_on_recorded_ticks(tmp_path: Path) -> None:
    tape = recording("market_raw/binance_spot_btcusdt_20240808.gz")

    statements = []
    for run in ("first", "second"):
        assert running.run(desk(tape, tmp_path / run)) == 0
        statements.append(next((tmp_path / run).rglob("statement.jsonl")).read_bytes())

    assert statements[0] == statements[1]
    rows = [json.loads(line) for line in statements[0].splitlines()]
    fills = [row["fill"] for row in rows if row["row"] == "traded"]
    assert sum(Decimal(fill["quantity"]) for fill in fills) == Decimal("0.5")
    placed = [Decimal(row["quantity"]) for row in rows if row["row"] == "placed"]
    assert max(placed) == Decimal("0.05"), "never more than one child's size at once"
    stamps, prices = prices_by_time(tape)
    for fill in fills:
        last = bisect_right(stamps, fill["ts_event_ns"])
        first = bisect_right(stamps, fill["ts_event_ns"] - NEAR_NS) - 1
        around = prices[max(first, 0) : last + 1]
        assert min(low for low, _ in around) <= Decimal(fill["price"])
        assert Decimal(fill["price"]) <= max(high for _, high in around)
