"""A market out of a seed: quotes and trades at one or more venues, gaps between them, swaps in pools.

Comes from: model/events.py
Goes to: kernel/inbox.py
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import msgspec

from nightdesk.abc import Clock, Emit, Source
from nightdesk.errors import ConfigError
from nightdesk.sources._pools import PoolSpec, Swaps, SwapSpec
from nightdesk.sources._walk import MarketSpec, Walk

__all__ = ["MarketSpec", "PoolSpec", "SimulatedSource", "SwapSpec"]

_SECOND = 1_000_000_000
_LONGEST_STEP_S = 1.0
_DEFAULT_MARKETS = {
    "BTC/USDT": MarketSpec(
        price=Decimal(60_000), tick_size=Decimal("0.1"), lot_size=Decimal("0.00001")
    ),
    "ETH/USDT": MarketSpec(
        price=Decimal(3_000), lot_size=Decimal("0.0001"), quantity=Decimal(8)
    ),
    "SOL/USDT": MarketSpec(
        price=Decimal(150), lot_size=Decimal("0.001"), quantity=Decimal(120)
    ),
}


class SimulatedSource(Source):
    """Random walks with a seed. The same seed and the same times give the same events.

    Now and then (`gap_every_s` on average) the last of several venues drifts away from the others
    by `gap_ppm` for `gap_lasts_s`: wide enough to pay for the fees of both legs.

    Args:
        name: As in `desk.yaml`.
        venues: Venues that show the market; one name is enough.
        markets: Symbol to `MarketSpec` fields; BTC, ETH and SOL against USDT if left out.
        seed: None takes the desk's.
        interval_ms: Time between two steps.
        gap_every_s: Mean time between two gaps of any market; 0 for none.
        gap_ppm: Least and greatest width of a gap.
        gap_lasts_s: Least and greatest length of a gap.
        swaps: `SwapSpec` fields, or true for the defaults; none if left out.
    """

    def __init__(
        self,
        name: str,
        *,
        venues: Sequence[str] | str,
        markets: Mapping[str, MarketSpec | Mapping[str, Any]] | None = None,
        seed: int | None = None,
        interval_ms: int = 50,
        gap_every_s: float = 25.0,
        gap_ppm: tuple[int, int] = (2_500, 6_000),
        gap_lasts_s: tuple[float, float] = (1.0, 3.0),
        swaps: bool | Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.emitted = 0
        self.gaps = 0
        self._venues = [venues] if isinstance(venues, str) else list(venues)
        self._seed = seed
        self._interval_ms = interval_ms
        self._gap_every_s = gap_every_s
        self._gap_ppm = gap_ppm
        self._gap_lasts_s = gap_lasts_s
        where = f"source {name!r}"
        if not self._venues or interval_ms < 1:
            raise ConfigError(
                where,
                ["needs at least one of `venues`, and `interval_ms` of at least 1."],
            )
        self._markets = {
            symbol: _convert(where, f"markets.{symbol}", spec, MarketSpec)
            for symbol, spec in (markets or _DEFAULT_MARKETS).items()
        }
        self._swap_spec = (
            _convert(where, "swaps", {} if swaps is True else swaps, SwapSpec)
            if swaps
            else None
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self, emit: Emit, clock: Clock, random: random.Random) -> None:
        dice = random if self._seed is None else type(random)(self._seed)
        self._dice = dice
        self._walks = [
            Walk(symbol, spec, self._venues, dice)
            for symbol, spec in self._markets.items()
        ]
        self._swaps = Swaps(self._swap_spec, dice) if self._swap_spec else None
        self._task = asyncio.create_task(
            self._run(emit, clock), name=f"source {self.name}"
        )

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def stats(self) -> dict[str, Any]:
        return {"emitted": self.emitted, "gaps": self.gaps}

    async def _run(self, emit: Emit, clock: Clock) -> None:
        interval_ns = self._interval_ms * 1_000_000
        due = last = clock.now_ns()
        self._step(emit, due, self._interval_ms / 1000)
        while True:
            # Steps lie on a grid, so that a late one shifts none of those after it.
            due = max(due + interval_ns, clock.now_ns() - interval_ns)
            await clock.sleep(max(0, due - clock.now_ns()) / 1e9)
            now = clock.now_ns()
            self._step(emit, now, min((now - last) / _SECOND, _LONGEST_STEP_S))
            last = now

    def _step(self, emit: Emit, now_ns: int, elapsed_s: float) -> None:
        if len(self._venues) > 1 and self._gap_every_s > 0:
            self._maybe_open_gap(now_ns, elapsed_s)
        for walk in self._walks:
            for event in walk.step(now_ns, elapsed_s):
                self.emitted += 1
                emit(event)
        if self._swaps:
            for swap in self._swaps.step(now_ns, elapsed_s):
                self.emitted += 1
                emit(swap)

    def _maybe_open_gap(self, now_ns: int, elapsed_s: float) -> None:
        dice = self._dice
        if dice.random() >= elapsed_s / self._gap_every_s:
            return
        length_ns = round(dice.uniform(*self._gap_lasts_s) * _SECOND)
        dice.choice(self._walks).open_gap(
            dice.randint(*self._gap_ppm), now_ns + length_ns
        )
        self.gaps += 1


def _convert(where: str, key: str, value: Any, kind: Any) -> Any:
    if isinstance(value, kind):
        return value
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(where, [f"`{key}`: {error}."]) from error
