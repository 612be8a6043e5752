"""Whatever the venue does and wherever the desk dies: nothing is sent twice, nothing is lost (F1, F10)."""

import asyncio
import contextlib
import random
from decimal import Decimal

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.house import House, request
from fakes.venue import FakeVenue, btc
from nightdesk.errors import OrderDeniedError
from nightdesk.model.order import OrderStatus

D = Decimal
TOTAL, CHILD = D("1.000"), D("0.300")
FAULTY_CYCLES, MOST_CYCLES = 40, 400
SUBMITS = [
    "accept",
    "accept",
    "reject",
    "lost_reply",
    "lost_request",
    "garbage",
    "fill:0.1",
    "fill:0.3",
]
CANCELS = ["ok", "lost_reply", "lost_request", "filled_first"]


class Crash(BaseException):
    """The process ends here."""


class Life:
    """One desk after the other over one venue, each dying at its own crash point."""

    def __init__(
        self, seed: int, crashes: list[int], lookup: str, expiry_s: float, lag_s: float
    ) -> None:
        self.dice = random.Random(seed)
        self.crashes = crashes
        self.venue = FakeVenue(lookup=lookup, expiry_s=expiry_s, index_lag_s=lag_s)
        self.venue.listed = {"BTC/USDT": btc(min_notional=D(0))}
        self.house = House(self.venue)
        self.dead = False
        self.deaths = 0

    async def begin(self) -> None:
        """Open the house, again and again while it dies at that."""
        while True:
            self.dead = False
            left = self.crashes.pop(0) if self.crashes else None
            self.house.store.hook = self.venue.hook = self._countdown(left)
            opening = asyncio.ensure_future(self.house.open())
            while (
                not opening.done()
            ):  # recovery may rest, and only a test moves its clock
                await self.house.settle(0.25)
            if opening.exception() is not None and not self.dead:
                opening.result()
            if not self.dead:
                return
            await self.bury()

    async def bury(self) -> None:
        self.deaths += 1
        await self.house.orders.stop()
        self.house = self.house.next(
            keep=self.dice.randint(0, self.house.store.waiting)
        )

    def _countdown(self, left: int | None):  # type: ignore[no-untyped-def]
        def hook(point: str) -> None:
            nonlocal left
            if self.dead:
                raise Crash(point)
            if left is not None:
                left -= 1
                if left < 0:
                    self.dead = True
                    raise Crash(point)

        return hook

    async def cycle(self, number: int) -> None:
        """One round of task, venue and time. May raise Crash."""
        faulty = number < FAULTY_CYCLES
        await self.task(faulty)
        self.market(faulty)
        await self.house.settle(self.dice.choice([0, 0, 0.25, 1.0]) if faulty else 1.0)
        if number % 8 == 7:
            await self.house.orders.sweep()

    async def task(self, faulty: bool) -> None:
        """Buy until the total is reached, knowing only the ledger."""
        orders = self.house.orders
        mine = orders.orders_of("t")
        filled = sum((order.filled_quantity for order in mine), D(0))
        working = sum((order.working_quantity for order in mine), D(0))
        assert filled + working <= TOTAL
        live = [
            o
            for o in mine
            if o.status in (OrderStatus.ACCEPTED, OrderStatus.PARTIALLY_FILLED)
        ]
        if live and faulty and self.dice.random() < 0.3:
            self.venue.cancels.append(self.dice.choice(CANCELS))
            await orders.cancel(live[-1].client_order_id)
            self.venue.cancels.clear()
        elif not working and filled < TOTAL:
            if faulty:
                self.venue.submits.append(self.dice.choice(SUBMITS))
            try:
                await orders.submit("t", request(str(min(CHILD, TOTAL - filled))))
            except OrderDeniedError as denied:
                assert denied.code in ("SYMBOL_HALTED", "SYMBOL_UNRESOLVED")
            self.venue.submits.clear()

    def market(self, faulty: bool) -> None:
        venue, dice = self.venue, self.dice
        venue.telling = dice.choice(["now", "now", "hold", "drop"]) if faulty else "now"
        venue.failing = dice.choice([0, 0, 1, 5]) if faulty else 0
        for order in venue.working():
            chance = dice.random()
            if chance < 0.3 or not faulty:
                most = int((order.quantity - order.filled_quantity) * 1000)
                venue.fill(
                    order.client_order_id,
                    D(dice.randint(1, most) if faulty else most) / 1000,
                )
            elif chance < 0.4:
                venue.end(order.client_order_id)
        if dice.random() < 0.5 or not faulty:
            dice.shuffle(venue.outbox)
            venue.release()

    @property
    def is_done(self) -> bool:
        orders = self.house.orders
        filled = sum((order.filled_quantity for order in orders.orders_of("t")), D(0))
        return filled >= TOTAL and not orders.open_orders()


async def live(life: Life) -> None:
    # A watcher that dies with its process has nobody left to tell.
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    await life.begin()
    for number in range(MOST_CYCLES):
        with contextlib.suppress(Crash):
            await life.cycle(number)
        if life.dead:
            await life.bury()
            await life.begin()
        if number >= FAULTY_CYCLES and life.is_done:
            break
    await life.house.orders.sweep()
    await life.house.orders.stop()


def judge(life: Life) -> None:
    venue, orders = life.venue, life.house.orders
    sent = [cid for verb, cid in venue.requests if verb == "submit"]
    assert len(sent) == len(set(sent))
    assert venue.executed == TOTAL
    assert venue.working() == []
    assert {fill.key for fill in orders.fills(1000)} == {
        fill.key for fill in venue.trades
    }
    assert orders.fill_count == len(venue.trades)
    assert life.house.positions.of("BTC/USDT", "A").quantity == TOTAL
    assert all(order.status.is_terminal for order in orders.orders_of("t"))
    assert len(life.house.gate.exposure) == 0
    cost = sum((fill.price * fill.quantity for fill in venue.trades), D(0))
    assert (
        sum(
            (o.filled_quantity * (o.average_price or 0) for o in orders.orders_of("t")),
            D(0),
        )
        == cost
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    crashes=st.lists(st.integers(0, 60), max_size=6),
    lookup=st.sampled_from(["all", "open_only", "listed_only"]),
    expiry_s=st.sampled_from([0.0, 1.0]),
    lag_s=st.sampled_from([0.0, 0.5]),
)
def test_a_total_is_executed_exactly_whatever_fails(
    seed: int, crashes: list[int], lookup: str, expiry_s: float, lag_s: float
) -> None:
    life = Life(seed, crashes, lookup, expiry_s, lag_s)

    asyncio.run(live(life))

    judge(life)


def test_f1_a_crash_at_every_single_point_of_one_story() -> None:
    """Not a sample: the desk dies at the first, the second, ... the 80th call that leaves its process."""
    deaths = 0
    for point in range(80):
        life = Life(11, [point], "all" if point % 2 else "open_only", 0.0, 0.0)
        asyncio.run(live(life))
        judge(life)
        deaths += life.deaths

    assert deaths >= 60
