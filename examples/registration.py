"""Registered functions in groups: the form of design 004.

python examples/registration.py [seconds]
"""

import asyncio
import sys

from nightdesk.compat.registration import (
    BackgroundTaskManager,
    TaskConfig,
    TaskPriority,
)
from nightdesk.errors import NoTasksError

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0


async def collect_market_data() -> None:
    print("subscribed to the candle streams")


async def monitor_positions() -> None:
    print("looked at every position")


async def generate_signals() -> None:
    raise ConnectionError("the signal service is down")


async def main() -> None:
    manager = BackgroundTaskManager(
        enable_health_monitoring=True,
        health_check_interval=30,
        enable_auto_recovery=True,
    )
    try:
        await manager.start_all()
    except NoTasksError as error:
        print(f"refused: {error}")

    await manager.add_task(
        TaskConfig(
            name="market_data_collection",
            func=collect_market_data,
            interval=None,
            priority=TaskPriority.CRITICAL,
            timeout=60,
        ),
        group="trading",
    )
    await manager.add_task(
        TaskConfig(
            name="position_monitoring",
            func=monitor_positions,
            interval=0.5,
            priority=TaskPriority.HIGH,
            timeout=20,
        ),
        group="trading",
        start_immediately=False,
    )
    await manager.add_task(
        TaskConfig(
            name="signal_generation",
            func=generate_signals,
            interval=1,
            priority=TaskPriority.MEDIUM,
        ),
        group="trading",
    )
    print(f"started {await manager.start_all(group='trading')} tasks")
    try:
        await asyncio.sleep(SECONDS)
        for name, line in manager.get_all_health().items():
            print(
                f"{name}: {line.status}, runs {line.runs}, errors {line.errors}: {line.why or line.last_error}"
            )
    finally:
        await manager.stop_all()


if __name__ == "__main__":
    asyncio.run(main())
