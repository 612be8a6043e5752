"""The baseline of `bench recover`: a program that keeps one JSON file per task, as design 001 describes.

Run as a file of its own, so that it imports nothing but the standard library.

Comes from: bench/recover.py
Goes to: bench/recover.py
"""

import asyncio
import json
import sys
import time
from dataclasses import dataclass, fields
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any


class Side(Enum):
    BUY = "BUY"
    SELL = "SELL"


@dataclass
class IcebergContext:
    task_id: str
    state: str
    symbol: str
    venue: str
    side: Side
    total_quantity: Decimal
    order_quantity: Decimal
    filled_quantity: Decimal
    avg_price: Decimal
    order_id: str | None
    offset_ticks: int
    tick_tolerance: int
    metadata: dict[str, Any]


class IcebergTask:
    def __init__(self, context: IcebergContext) -> None:
        self.context = context

    async def run(self, acted: asyncio.Event) -> None:
        acted.set()
        await asyncio.sleep(1.0)


def recover(text: str) -> IcebergTask:
    kind = json.loads(text)["_meta"]["type"]  # first the type, then the whole
    assert kind == "iceberg"
    saved = json.loads(text)
    values = {field.name: saved[field.name] for field in fields(IcebergContext)}
    values["side"] = Side(values["side"])
    for name in ("total_quantity", "order_quantity", "filled_quantity", "avg_price"):
        values[name] = Decimal(values[name])
    return IcebergTask(IcebergContext(**values))


async def main(directory: Path) -> None:
    acted = asyncio.Event()
    running = []
    for path in sorted(directory.glob("*.json")):  # noqa: ASYNC240 - naive on purpose
        task = recover(path.read_text(encoding="utf-8"))
        running.append(asyncio.create_task(task.run(acted)))
    print(time.time_ns(), flush=True)
    await acted.wait()
    print(time.time_ns(), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
