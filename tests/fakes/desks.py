"""Whole desks for tests: real rooms, a simulated market, virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from nightdesk.config import (
    BackgroundConfig,
    Config,
    RiskConfig,
    SourceConfig,
    StateConfig,
    TaskEntry,
    VenueConfig,
)
from nightdesk.desk import TradingDesk
from nightdesk.kernel.loop import in_lanes
from nightdesk.simulation.virtual import VirtualClock, VirtualLoop

T = TypeVar("T")
START_NS = 1_760_000_000_000_000_000


def venue(name: str = "alpha", **options: Any) -> VenueConfig:
    instrument = {
        "symbol": "BTC/USDT",
        "tick_size": "0.1",
        "lot_size": "0.001",
        "min_quantity": "0.001",
        "min_notional": "5",
        "maker_fee": "0.0002",
        "taker_fee": "0.0005",
    }
    return VenueConfig(
        name=name,
        type="paper",
        options={
            "instruments": [instrument],
            "balances": {"USDT": "1000000", "BTC": "10"},
            "latency_ms": [1, 5],
            **options,
        },
    )


def market(*venues: str, **options: Any) -> SourceConfig:
    return SourceConfig(
        name="market",
        type="simulated",
        options={
            "venues": list(venues or ("alpha",)),
            "markets": {"BTC/USDT": {"price": "60000", "tick_size": "0.1"}},
            "interval_ms": 50,
            **options,
        },
    )


def iceberg(task_id: str = "sell", **params: Any) -> TaskEntry:
    return TaskEntry(
        id=task_id,
        type="iceberg",
        params={
            "symbol": "BTC/USDT",
            "venue": "alpha",
            "side": "SELL",
            "total_quantity": "0.5",
            "order_quantity": "0.1",
            **params,
        },
    )


def config(tmp_path: Path, *tasks: TaskEntry, **changes: Any) -> Config:
    """Return a desk with one paper venue on a simulated market, under the virtual clock."""
    settings: dict[str, Any] = {
        "name": "test",
        "virtual_time": True,
        "state": StateConfig(store="sqlite", directory=str(tmp_path / "state")),
        "background": BackgroundConfig(hosts=0),
        "risk": RiskConfig(),
        "venues": (venue(),),
        "sources": (market(),),
        "tasks": tasks,
    }
    return Config(**{**settings, **changes})


def play(
    config: Config,
    story: Callable[[TradingDesk], Awaitable[T]],
    *,
    clean: bool = True,
    start_ns: int = START_NS,
) -> T:
    """Start a desk in virtual time, tell `story`, and stop it; `clean=False` drops it as a crash would."""
    loop = in_lanes(VirtualLoop)(config.seed)
    clock = VirtualClock(loop, start_ns)  # type: ignore[arg-type]
    desk = TradingDesk(config, loop, clock)

    async def whole() -> T:
        await desk.start()
        try:
            return await story(desk)
        finally:
            if clean:
                await desk.stop()
            else:
                for part in (
                    *desk.venues.values(),
                    desk.store,
                ):  # their files are let go, nothing is tidied
                    await part.stop()

    try:
        return loop.run_until_complete(whole())
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
