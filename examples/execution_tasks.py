"""Durable execution tasks through `TaskManager`, in the form of design 001.

    python examples/execution_tasks.py [seconds]

Three parts: one iceberg watched until it completes; delta-neutral pairs on three symbols at once; and a
look at what a restart would find. State lies under `state/examples/`; kill the program and start it again.
"""

import asyncio
import sys

from nightdesk.compat.execution import (
    DeltaNeutralTask,
    DeltaNeutralTaskContext,
    ExchangeEnum,
    IcebergTask,
    IcebergTaskContext,
    Side,
    Symbol,
    TaskManager,
    TaskPersistenceManager,
    TaskRecovery,
    TaskSerializer,
    get_hft_logger,
)

PATIENCE_S = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0


async def until_done(manager: TaskManager, seconds: float) -> None:
    """Watch the manager until its tasks have ended, or the patience has."""
    for _ in range(round(seconds / 0.5)):
        status = manager.get_status()
        shown = {line["task_id"]: line["state"] for line in status["tasks"]}
        print(
            f"active {status['active_tasks']}, cycles {status['total_executions']}: {shown}"
        )
        if manager.task_count == 0:
            return
        await asyncio.sleep(0.5)


async def one_iceberg() -> None:
    """Sell 100 BTC, of which ten show at a time."""
    logger = get_hft_logger("one_iceberg")
    manager = TaskManager(logger, base_path="state/examples/iceberg")
    task = IcebergTask(
        logger,
        IcebergTaskContext(
            symbol=Symbol(base="BTC", quote="USDT"),
            exchange_name=ExchangeEnum.MEXC,
            side=Side.SELL,
            total_quantity=100.0,
            order_quantity=10.0,
            offset_ticks=2,
            tick_tolerance=3,
        ),
    )
    await task.start()
    task_id = await manager.add_task(task)
    await manager.start(recover_tasks=True)
    try:
        await until_done(manager, PATIENCE_S)
        done = manager.get_task(task_id)
        print("filled", done.context.filled_quantity if done else None)
    finally:
        await manager.stop()


async def several_pairs() -> None:
    """Buy at one exchange, sell at the other, on three symbols."""
    logger = get_hft_logger("several_pairs")
    manager = TaskManager(logger, base_path="state/examples/pairs")
    for base in ("BTC", "ETH", "BNB"):
        task = DeltaNeutralTask(
            logger,
            DeltaNeutralTaskContext(
                symbol=Symbol(base=base, quote="USDT"),
                exchange_names={
                    Side.BUY: ExchangeEnum.MEXC,
                    Side.SELL: ExchangeEnum.GATEIO,
                },
                total_quantity=50.0,
                order_quantity=5.0,
                offset_ticks={Side.BUY: 1, Side.SELL: 1},
                tick_tolerance={Side.BUY: 2, Side.SELL: 2},
            ),
        )
        await task.start()
        await manager.add_task(task)
    await manager.start(recover_tasks=True)
    try:
        await until_done(manager, PATIENCE_S)
    finally:
        await manager.stop()


async def what_a_restart_finds() -> None:
    """Count what is kept, and read one record without starting it."""
    logger = get_hft_logger("what_a_restart_finds")
    manager = TaskManager(logger, base_path="state/examples/pairs")
    await manager.start(recover_tasks=True)
    print("kept:", manager.get_status()["persistence_stats"])
    manager.cleanup_persistence(max_age_hours=12)
    await manager.stop()
    recovery = TaskRecovery(logger, TaskPersistenceManager("state/examples/pairs"))
    for task_id, text in await recovery.recover_all_tasks():
        print(task_id, TaskSerializer.extract_task_metadata(text))


async def main() -> None:
    await one_iceberg()
    await several_pairs()
    await what_a_restart_finds()


if __name__ == "__main__":
    asyncio.run(main())
