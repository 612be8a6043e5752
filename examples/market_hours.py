"""Tasks that follow a market's session, and a cache they share: the form of design 003.

python examples/market_hours.py [seconds]
"""

import asyncio
import sys

from nightdesk.compat.market_hours import CacheManager, TaskManager

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 12.0


class Services:
    """Three loops of a trading service; each asks the cache, so that one request serves all."""

    def __init__(self) -> None:
        self.cache = CacheManager()
        self.requests = 0

    async def _fetch_quotes(self) -> dict[str, str]:
        self.requests += 1
        await asyncio.sleep(0.01)
        return {"NIFTY": "24500.00"}

    async def _fetch_headlines(self) -> list[str]:
        await asyncio.sleep(0.01)
        return ["Markets open higher"]

    async def monitor_market(self) -> None:
        await self.cache.get("market", "quotes", self._fetch_quotes)

    async def generate_signals(self) -> None:
        await self.cache.get("market", "quotes", self._fetch_quotes)

    async def integrate_news(self) -> None:
        await self.cache.get("news", "headlines", self._fetch_headlines)


async def main() -> None:
    services = Services()
    manager = TaskManager(calendar="NSE")
    manager.register_task(
        name="market_monitoring", coro=services.monitor_market, priority="critical"
    )
    manager.register_task(
        name="signal_generation", coro=services.generate_signals, priority="critical"
    )
    manager.register_task(
        name="regime_monitoring", coro=services.monitor_market, priority="important"
    )
    manager.register_task(
        name="news_integration",
        coro=services.integrate_news,
        priority="nice_to_have",
        market_hours_only=True,
    )
    started = await manager.start()
    print(
        f"started {started} tasks; the market is {'open' if manager.is_market_open() else 'closed'}"
    )
    try:
        await asyncio.sleep(SECONDS)
        health = manager.get_health()
        for name, line in health["tasks"].items():
            print(
                f"{name}: {line.status}, {line.runs} runs, {line.restarts} restarts, {line.why}"
            )
        print("requests for quotes", services.requests, "cache", services.cache.stats())
    finally:
        await manager.stop()


if __name__ == "__main__":
    asyncio.run(main())
