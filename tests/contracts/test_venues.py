"""The contract of every venue that needs no outside world: one send, codes for refusals, ends by events."""

import asyncio
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fakes.paper import RICH, SYMBOL, D, instrument, order, quote
from nightdesk.abc import Venue
from nightdesk.errors import VenueRejectedError
from nightdesk.exchange.server import PaperServer
from nightdesk.kernel.clock import SystemClock
from nightdesk.market.matching import MatchingEngine
from nightdesk.model.events import Event, OrderCanceled, OrderFilled
from nightdesk.model.order import OrderStatus, Side
from nightdesk.venues.paper import PaperVenue
from nightdesk.venues.paper_remote import PaperRemoteVenue

BUY, SELL = Side.BUY, Side.SELL
Market = Callable[[Event], None]
KINDS = ["paper", "paper_remote"]


@pytest.fixture
def home() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="nd"))
    yield directory
    shutil.rmtree(directory)


@asynccontextmanager
async def open_venue(
    kind: str, home: Path, events: list[Event]
) -> AsyncIterator[tuple[Venue, Market]]:
    """Open a venue of `kind` with 100.0 / 100.2 shown, and the way to show it more."""
    clock = SystemClock()
    paper = PaperVenue(
        "A",
        instruments=[instrument()],
        matching=MatchingEngine("A", [instrument()]),
        balances=RICH,
        directory=home,
    )
    closers: list[Callable[[], Awaitable[None]]] = [paper.stop]
    if kind == "paper":
        venue: Venue = paper
    else:
        server = PaperServer(paper, [], home / "x.sock", clock, random.Random, 0)
        await server.start()
        venue = PaperRemoteVenue(
            "A", instruments=[instrument()], socket=home / "x.sock"
        )
        closers = [venue.stop, server.stop]
    await venue.start(events.append, clock, random.Random(1))
    paper.on_market(quote("100.0", "100.2"))
    try:
        yield venue, paper.on_market
    finally:
        for close in closers:
            await close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_fill_is_reported_once_and_agrees_with_every_answer(
    kind: str, home: Path
) -> None:
    events: list[Event] = []
    async with open_venue(kind, home, events) as (venue, _):
        order_id = await venue.submit(order("a", BUY, "0.5"))
        await until(lambda: events)

        (event,) = events
        assert isinstance(event, OrderFilled)
        assert await venue.fills(0) == [event.fill]
        found = await venue.find_order(SYMBOL, "a")
        assert found is not None
        assert (found.status, found.venue_order_id) == (OrderStatus.FILLED, order_id)
        assert await venue.fills(event.fill.ts_event_ns + 1) == []
        assert (await venue.balances())["BTC"] == RICH["BTC"] + event.fill.quantity


@pytest.mark.parametrize("kind", KINDS)
async def test_an_open_order_is_listed_until_its_end_is_told(
    kind: str, home: Path
) -> None:
    events: list[Event] = []
    async with open_venue(kind, home, events) as (venue, _):
        asked = order("a", SELL, "0.5", "100.3")
        await venue.submit(asked)
        listed = [each.client_order_id for each in await venue.open_orders()]

        await venue.cancel(asked)
        await until(lambda: events)

        assert listed == ["a"]
        assert await venue.open_orders() == []
        assert [
            (type(event), event.filled_quantity)
            for event in events
            if isinstance(event, OrderCanceled)
        ] == [(OrderCanceled, D(0))]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_refusal_is_an_exception_with_a_code_and_no_event(
    kind: str, home: Path
) -> None:
    events: list[Event] = []
    async with open_venue(kind, home, events) as (venue, _):
        for wrong, code in (
            (order("a", BUY, "0.0005", "100.0"), "QUANTITY_BELOW_MINIMUM"),
            (order("b", BUY, "1", "100.05"), "PRICE_NOT_ON_TICK"),
            (order("c", BUY, "0.049", "100.0"), "NOTIONAL_BELOW_MINIMUM"),
        ):
            with pytest.raises(VenueRejectedError) as refused:
                await venue.submit(wrong)
            assert refused.value.code == code
        with pytest.raises(VenueRejectedError):
            await venue.cancel(order("nobody", BUY, "1", "100.0"))

        assert events == []
        assert await venue.open_orders() == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_order_id_is_taken_once(kind: str, home: Path) -> None:
    async with open_venue(kind, home, []) as (venue, _):
        await venue.submit(order("a", BUY, "0.5"))

        with pytest.raises(VenueRejectedError):
            await venue.submit(order("a", BUY, "0.5"))
        assert len(await venue.fills(0)) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_everything_is_still_known_after_a_restart(kind: str, home: Path) -> None:
    async with open_venue(kind, home, []) as (venue, _):
        await venue.submit(order("done", BUY, "0.5"))
        await venue.submit(order("open", BUY, "1", "99.0"))
        before = (
            await venue.open_orders(),
            await venue.fills(0),
            await venue.balances(),
        )

    async with open_venue(kind, home, []) as (venue, _):
        assert (
            await venue.open_orders(),
            await venue.fills(0),
            await venue.balances(),
        ) == before


@pytest.mark.parametrize("kind", KINDS)
async def test_it_lists_its_instruments_and_tells_the_time(
    kind: str, home: Path
) -> None:
    async with open_venue(kind, home, []) as (venue, _):
        assert venue.instruments()[SYMBOL].key == f"{SYMBOL}@A"
        assert abs(await venue.venue_time_ns() - SystemClock().now_ns()) < 5_000_000_000
        assert isinstance(venue.stats(), dict)
