"""Simulated swaps in pools of an automated market maker: large and small, in known and unknown pools.

Comes from: sources/simulated.py
Goes to: sources/simulated.py
"""

import random
from collections import deque
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import msgspec

from nightdesk.model.events import PoolSwap

__all__ = ["PoolSpec", "SwapSpec", "Swaps"]

_SECOND = 1_000_000_000
_CONFIRMED_AFTER_NS = 2 * _SECOND


class PoolSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pool. An allow-list elsewhere decides which pools count; `weight` is its share of the swaps."""

    pool: str
    pair: str
    chain: str = "arbitrum"
    price: Decimal = Decimal(3000)
    liquidity_usd: Decimal = Decimal(5_000_000)
    weight: int = 1


_POOLS = (
    PoolSpec(
        pool="0xc31e54c7a869b9fcbecc14363cf510d1c41fa443", pair="WETH/USDC", weight=3
    ),
    PoolSpec(
        pool="0x0e4831319a50228b9e450861297ab92dee15b44f",
        pair="WBTC/USDC",
        price=Decimal(60_000),
        weight=2,
    ),
    # A thin pool that nobody verified: its swaps look like opportunities and are none.
    PoolSpec(
        pool="0x00000000000000000000000000000000deadbeef",
        pair="WETH/USDC",
        liquidity_usd=Decimal(20_000),
        weight=3,
    ),
)


class SwapSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`every_s` is the mean time between swaps; `large` the share that moves the price above 0.5 %."""

    every_s: float = 4.0
    large: float = 0.3
    pools: tuple[PoolSpec, ...] = _POOLS


class Swaps:
    """Yields swaps; each comes a second time, confirmed, two seconds later."""

    def __init__(self, spec: SwapSpec, random: random.Random) -> None:
        self._spec = spec
        self._random = random
        self._unconfirmed: deque[PoolSwap] = deque()
        self._weights = [pool.weight for pool in spec.pools]

    def step(self, now_ns: int, elapsed_s: float) -> Iterator[PoolSwap]:
        while (
            self._unconfirmed
            and now_ns - self._unconfirmed[0].ts_event_ns >= _CONFIRMED_AFTER_NS
        ):
            swap = self._unconfirmed.popleft()
            yield msgspec.structs.replace(
                swap, is_confirmed=True, ts_received_ns=now_ns
            )
        if self._random.random() < elapsed_s / self._spec.every_s:
            swap = self._swap(now_ns)
            self._unconfirmed.append(swap)
            yield swap

    def _swap(self, now_ns: int) -> PoolSwap:
        dice = self._random
        pool = dice.choices(self._spec.pools, self._weights)[0]
        impact_ppm = (
            dice.randint(5_001, 20_000)
            if dice.random() < self._spec.large
            else dice.randint(10, 5_000)
        )
        facts: dict[str, Any] = {
            # A constant-product pool moves by about twice the share of its liquidity that is swapped.
            "value_usd": (pool.liquidity_usd * impact_ppm / 4_000_000).quantize(
                Decimal("0.01")
            ),
            "price": (
                pool.price * (1_000_000 + dice.choice((-1, 1)) * impact_ppm) / 1_000_000
            ).quantize(Decimal("0.0001")),
        }
        return PoolSwap(
            chain=pool.chain,
            pool=pool.pool,
            pair=pool.pair,
            transaction_hash=f"0x{dice.getrandbits(256):064x}",
            log_index=dice.randint(0, 200),
            price_impact_ppm=impact_ppm,
            liquidity_usd=pool.liquidity_usd,
            ts_event_ns=now_ns,
            ts_received_ns=now_ns,
            **facts,
        )
