"""A state machine with states of its own, in the form of design 001.

    python examples/custom_task.py

It watches the spread, buys once when the spread is small, and ends when the order is filled.
Defining the class is enough for recovery: kill the program and start it again.
"""

import asyncio
from collections.abc import Mapping
from decimal import Decimal
from enum import IntEnum

from nightdesk import OrderRequest, TaskContext
from nightdesk.compat.execution import (
    BaseTradingTask,
    ExchangeEnum,
    Side,
    Symbol,
    TaskManager,
    TradingStrategyState,
    get_hft_logger,
)


class WatchContext(TaskContext):
    """What must survive a restart."""

    symbol: Symbol
    exchange_name: ExchangeEnum
    target_price: Decimal
    quantity: Decimal
    filled_quantity: Decimal = Decimal(0)
    order_ids: dict[str, str] = {}


class WatchState(IntEnum):
    """Its own states; that the numbers collide with others does not matter, names count."""

    ANALYZING_MARKET = 1
    PLACING_ORDERS = 2
    MONITORING_FILLS = 3


class WatchAndBuy(BaseTradingTask[WatchContext, WatchState]):
    """Buy `quantity` once the ask is at or below `target_price`."""

    name = "WatchAndBuy"

    @property
    def context_class(self) -> type[WatchContext]:
        return WatchContext

    async def start(self, **kwargs: object) -> None:
        await super().start(**kwargs)
        self._exchange = self._load_exchange(self.context.exchange_name)
        await self._exchange.initialize([self.context.symbol])

    def _build_tag(self) -> None:
        self._tag = (
            f"{self.name}_{self.context.exchange_name.name}_{self.context.symbol}"
        )

    def get_extended_state_handlers(self) -> Mapping[WatchState, str]:
        return {
            WatchState.ANALYZING_MARKET: "_handle_analyzing_market",
            WatchState.PLACING_ORDERS: "_handle_placing_orders",
            WatchState.MONITORING_FILLS: "_handle_monitoring_fills",
        }

    async def _handle_executing(self) -> None:
        self._transition(WatchState.ANALYZING_MARKET)

    async def _handle_analyzing_market(self) -> None:
        quote = self._exchange.quote(self.context.symbol)
        if quote is not None and quote.ask <= self.context.target_price:
            self._transition(WatchState.PLACING_ORDERS)

    async def _handle_placing_orders(self) -> None:
        if (
            not self.desk.orders()
        ):  # the ledger, not the context, knows whether it was sent before a crash
            quote = self._exchange.quote(self.context.symbol)
            order = await self.desk.submit(
                OrderRequest(
                    symbol=str(self.context.symbol),
                    venue=str(self.context.exchange_name),
                    side=Side.BUY,
                    quantity=self.context.quantity,
                    price=quote.ask,
                )
            )
            self.evolve_context(order_ids__buy=order.client_order_id)
        self._transition(WatchState.MONITORING_FILLS)

    async def _handle_monitoring_fills(self) -> None:
        filled = sum(
            (order.filled_quantity for order in self.desk.orders()), Decimal(0)
        )
        self.evolve_context(filled_quantity=filled)
        if filled >= self.context.quantity:
            self._transition(TradingStrategyState.COMPLETED)

    async def cleanup(self) -> None:
        await self._exchange.close()


async def main() -> None:
    logger = get_hft_logger("custom_task")
    manager = TaskManager(logger, base_path="state/examples/custom")
    task = WatchAndBuy(
        logger,
        WatchContext(
            symbol=Symbol("BTC", "USDT"),
            exchange_name=ExchangeEnum.MEXC,
            target_price=70000.0,  # type: ignore[arg-type]  # any number becomes a Decimal
            quantity=0.5,  # type: ignore[arg-type]
        ),
    )
    await task.start()
    task_id = await manager.add_task(task)
    await manager.start(recover_tasks=True)
    try:
        for _ in range(60):
            shown = manager.get_task(task_id)
            print(shown.context.state if shown else None)
            if manager.task_count == 0:
                break
            await asyncio.sleep(0.25)
        assert shown is not None
        print("filled", shown.context.filled_quantity)
    finally:
        await manager.stop()


if __name__ == "__main__":
    asyncio.run(main())
