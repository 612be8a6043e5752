"""The paper venue in a process of its own: its server in this loop, and once as a real process."""

import asyncio
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fakes.paper import RICH, SYMBOL, D, instrument, order, quote, trade
from nightdesk.abc import Clock, Emit, Source
from nightdesk.config import Config, StateConfig, VenueConfig
from nightdesk.errors import (
    CommandError,
    ConfigError,
    OutcomeUnknownError,
    QueryFailedError,
    StateNotWritableError,
    UnknownTypeError,
    VenueRejectedError,
)
from nightdesk.exchange import (
    build_paper_venue,
    ensure_paper_process,
    stop_paper_process,
)
from nightdesk.exchange.building import socket_path
from nightdesk.exchange.options import ProcessConfig, build_feed
from nightdesk.exchange.paper_process import main
from nightdesk.exchange.server import PaperServer
from nightdesk.kernel.clock import SystemClock
from nightdesk.market.matching import MatchingEngine
from nightdesk.model.events import (
    BookChanged,
    Event,
    FeedStalled,
    OrderFilled,
    QuoteChanged,
)
from nightdesk.model.order import Side
from nightdesk.sources.simulated import SimulatedSource
from nightdesk.venues import _wire
from nightdesk.venues.paper import PaperVenue, read_rows, summarise
from nightdesk.venues.paper_remote import PaperRemoteVenue

BUY, SELL = Side.BUY, Side.SELL
FACTS = {
    "symbol": SYMBOL,
    "tick_size": "0.1",
    "lot_size": "0.001",
    "min_quantity": "0.001",
    "min_notional": 5,
}


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory short enough for a socket."""
    directory = Path(tempfile.mkdtemp(prefix="nd"))
    yield directory
    shutil.rmtree(directory)


class HandFeed(Source):
    """A feed that a test drives."""

    name = "hand"

    async def start(self, emit: Emit, clock: Clock, random: random.Random) -> None:
        self.emit = emit

    async def stop(self) -> None: ...


class House:
    """A server and one desk's end of it."""

    def __init__(self, home: Path, **venue_options: Any) -> None:
        self.socket = home / "x.sock"
        self.home = home
        self.venue_options = venue_options
        self.events: list[Event] = []
        self.remote = PaperRemoteVenue(
            "A", instruments=[instrument()], socket=self.socket, timeout_s=2.0
        )

    async def open(self) -> None:
        self.feed = HandFeed()
        matching = MatchingEngine("A", [instrument()])
        options = {"balances": RICH, "directory": self.home, **self.venue_options}
        self.venue = PaperVenue(
            "A", instruments=[instrument()], matching=matching, **options
        )
        self.server = PaperServer(
            self.venue, [self.feed], self.socket, SystemClock(), random.Random, 0
        )
        await self.server.start()
        self.feed.emit(quote("100.0", "100.2"))

    async def until(self, condition: Any, seconds: float = 5.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - the other side is a socket away
                await asyncio.sleep(0.005)

    def fills(self) -> list[str]:
        return [
            event.client_order_id
            for event in self.events
            if isinstance(event, OrderFilled)
        ]


@asynccontextmanager
async def house_in(home: Path, **venue_options: Any) -> AsyncIterator[House]:
    house = House(home, **venue_options)
    await house.open()
    await house.remote.start(house.events.append, SystemClock(), random.Random(1))
    try:
        yield house
    finally:
        await house.remote.stop()
        await house.server.stop()


async def test_orders_and_market_travel_both_ways(home: Path) -> None:
    async with house_in(home) as house:
        assert await house.remote.submit(order("a", BUY, "0.5")) == "1"
        assert await house.remote.submit(order("b", BUY, "1", "99.0")) == "2"
        await house.remote.cancel(order("b", BUY, "1", "99.0"))
        house.feed.emit(quote("100.1", "100.3"))
        house.feed.emit(trade(BUY, "1", "100.3"))
        await house.until(lambda: len(house.events) >= 4)

        assert house.fills() == ["a"]
        assert any(
            isinstance(event, QuoteChanged) and event.bid == D("100.1")
            for event in house.events
        )
        found = await house.remote.find_order(SYMBOL, "a")
        assert found is not None
        assert found.filled_quantity == D("0.5")
        assert await house.remote.find_order(SYMBOL, "nobody") is None
        assert await house.remote.open_orders() == []
        assert len(await house.remote.fills(0)) == 1
        assert (await house.remote.balances())["BTC"] == RICH["BTC"] + D("0.5")
        assert abs(await house.remote.venue_time_ns() - SystemClock().now_ns()) < 5e9


async def test_a_refusal_keeps_its_code_and_an_unknown_outcome_stays_unknown(
    home: Path,
) -> None:
    async with house_in(home) as house:
        with pytest.raises(VenueRejectedError) as refused:
            await house.remote.submit(order("a", BUY, "1", "100.05"))
        assert refused.value.code == "PRICE_NOT_ON_TICK"
    async with house_in(home, faults={"lost_replies": 1.0, "timeout_s": 0.01}) as house:
        with pytest.raises(OutcomeUnknownError):
            await house.remote.submit(order("b", BUY, "1"))
        with pytest.raises(QueryFailedError):
            await house.remote.balances()


async def test_without_a_connection_nothing_was_sent_and_that_is_proof(
    home: Path,
) -> None:
    remote = PaperRemoteVenue(
        "A", instruments=[FACTS], socket=home / "nobody.sock", connect_timeout_s=0.05
    )
    await remote.start(lambda _: None, SystemClock(), random.Random(1))

    with pytest.raises(VenueRejectedError) as refused:
        await remote.submit(order("a", BUY, "1"))
    with pytest.raises(QueryFailedError):
        await remote.find_order(SYMBOL, "a")
    await remote.stop()

    assert refused.value.code == "NOT_SENT"
    assert remote.stats()["connected"] is False


async def test_a_line_that_breaks_after_the_bytes_left_leaves_the_outcome_unknown(
    home: Path,
) -> None:
    async with house_in(home, latency_ms=(200, 200)) as house:
        sending = asyncio.create_task(house.remote.submit(order("a", BUY, "1")))
        asking = asyncio.create_task(house.remote.balances())
        await asyncio.sleep(0.05)
        for client in house.server._clients:
            client.close()

        with pytest.raises(OutcomeUnknownError, match="connection lost"):
            await sending
        with pytest.raises(QueryFailedError):
            await asking


async def test_no_reply_in_time_leaves_the_outcome_unknown(home: Path) -> None:
    async with house_in(home, latency_ms=(300, 300)) as house:
        house.remote._timeout_s = 0.05

        with pytest.raises(OutcomeUnknownError, match=r"no reply within 0.05 s"):
            await house.remote.submit(order("a", BUY, "1"))


async def test_after_a_restart_of_the_venue_the_desk_hears_what_it_missed(
    home: Path,
) -> None:
    async with house_in(home) as house:
        await house.remote.submit(order("resting", BUY, "1", "99.0"))
        feed = house.feed
        house.remote._ensure = None
        await house.server.stop()
        await house.until(lambda: not house.remote.is_connected)
        stalled = [event for event in house.events if isinstance(event, FeedStalled)]
        assert stalled
        assert feed is house.feed

        await house.open()
        house.feed.emit(quote("98.0", "98.1"))
        await house.until(
            lambda: house.remote.is_connected and "resting" in house.fills()
        )

        assert house.remote.stats()["reconnects"] >= 1
        assert await house.remote.submit(order("next", BUY, "0.1")) == "2"


async def test_a_client_that_speaks_nonsense_is_disconnected_and_the_others_go_on(
    home: Path,
) -> None:
    async with house_in(home) as house:
        for nonsense in (
            b"\x00\x00\x00\x02hi",
            b"\xff\xff\xff\xff",
            _wire.encode(_wire.Push(events=[])),
        ):
            reader, writer = await asyncio.open_unix_connection(str(house.socket))
            writer.write(nonsense)
            while await reader.read(65536):
                pass
            writer.close()
        number = next(house.remote._numbers)
        assert number

        reply = await house.remote._call(house.remote._writer, "no_such_verb", None)  # type: ignore[arg-type]

        assert reply.failure is not None
        assert "no_such_verb" in reply.failure.reason
        assert await house.remote.submit(order("a", BUY, "0.5")) == "1"


async def test_a_slow_client_gets_the_newest_quote_and_every_order_event(
    home: Path,
) -> None:
    async with house_in(home) as house:
        reader, writer = await asyncio.open_unix_connection(str(house.socket))
        await house.until(lambda: len(house.server._clients) == 2)
        await house.remote.submit(order("a", BUY, "0.5"))
        for number in range(12_000):
            house.feed.emit(trade(BUY, "1", "100.5", f"t{number}"))
            house.feed.emit(quote("100.0", "100.2", bid_quantity=str(number + 1)))

        seen: list[Any] = []
        lost = 0
        async with asyncio.timeout(5):
            while not any(
                isinstance(e, QuoteChanged) and e.bid_quantity == 12_000 for e in seen
            ):
                push = _wire.decode(await _wire.read_frame(reader))
                assert isinstance(push, _wire.Push)
                seen += push.events
                lost += push.lost
        writer.close()

        assert [e.client_order_id for e in seen if isinstance(e, OrderFilled)] == ["a"]
        assert lost > 0
        assert sum(isinstance(e, QuoteChanged) for e in seen) < 100


async def test_long_answers_come_page_by_page(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nightdesk.venues.paper_remote.PAGE", 2)
    monkeypatch.setattr("nightdesk.exchange.server.PAGE", 2)
    async with house_in(home) as house:
        for number in range(5):
            await house.remote.submit(order(f"o{number}", BUY, "1", "99.0"))

        found = await house.remote.open_orders()

        assert [each.client_order_id for each in found] == [
            f"o{number}" for number in range(5)
        ]


async def test_too_many_clients_are_turned_away(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nightdesk.exchange.server._MAX_CLIENTS", 1)
    async with house_in(home) as house:
        reader, writer = await asyncio.open_unix_connection(str(house.socket))

        assert await reader.read() == b""
        writer.close()
        assert await house.remote.submit(order("a", BUY, "0.5")) == "1"


async def test_a_lonely_server_ends_by_itself(home: Path) -> None:
    house = House(home)
    await house.open()
    house.server._idle_exit_s = 0.01

    async with asyncio.timeout(5):
        await house.server.run()

    await house.server.stop()
    assert not house.socket.exists()


# Building ----------------------------------------------------------------------------------------


def config(home: Path, **changes: Any) -> Config:
    return Config(state=StateConfig(directory=str(home)), **changes)


async def test_a_venue_in_the_desk_is_built_from_its_options(home: Path) -> None:
    entry = VenueConfig(
        name="A",
        type="paper",
        options={
            "instruments": [{**FACTS, "tick_size": 0.1}],
            "balances": {"USDT": 1000},
            "latency_ms": [1, 2],
            "faults": {"lost_replies": 0.1},
            "client_ids": "open",
            "market_patience_s": 1,
        },
    )

    venue = await build_paper_venue(entry, config(home), home)

    assert isinstance(venue, PaperVenue)
    assert venue.instruments()[SYMBOL].tick_size == D("0.1")
    await venue.start(lambda _: None, SystemClock(), random.Random(1))
    await venue.stop()
    assert summarise(read_rows(home / "venues" / "A" / "statement.jsonl")) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"instruments": [FACTS], "balancse": {}}, "balancse"),
        ({"instruments": []}, "0 entries"),
        ({"instruments": [{"symbol": SYMBOL}]}, "tick_size"),
        ({"instruments": [FACTS], "feeds": [{"type": "simulated"}]}, "sources"),
        ({"instruments": [FACTS], "faults": {"lost": 1}}, "lost"),
    ],
)
async def test_a_wrong_option_is_named(
    home: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        await build_paper_venue(
            VenueConfig(name="A", type="paper", options=options), config(home), home
        )


async def test_a_process_of_its_own_needs_a_state_directory_and_real_time(
    home: Path,
) -> None:
    entry = VenueConfig(
        name="A", type="paper", options={"instruments": [FACTS], "process": "own"}
    )

    for wrong, directory in (
        (config(home, virtual_time=True), home),
        (config(home), None),
    ):
        with pytest.raises(ConfigError, match="process: own"):
            await build_paper_venue(entry, wrong, directory)


def test_feeds_are_simulated_markets_or_recordings() -> None:
    feed = build_feed(
        "A", {"type": "simulated", "interval_ms": 20, "options": {"seed": 4}}, 0
    )

    assert isinstance(feed, SimulatedSource)
    with pytest.raises(UnknownTypeError):
        build_feed("A", {"type": "moralis"}, 0)
    with pytest.raises(ConfigError):
        build_feed("A", {"type": "simulated", "intervall": 1}, 0)


def test_a_socket_path_that_is_too_long_moves_to_the_temporary_directory(
    tmp_path: Path,
) -> None:
    deep = tmp_path / ("d" * 120)

    assert len(os.fsencode(socket_path(deep))) < 108
    assert socket_path(deep) == socket_path(deep)


def test_a_process_with_an_unreadable_configuration_says_so(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "c.json").write_text("{")

    assert main(["--config", str(home / "c.json"), "--socket", str(home / "s")]) == 2
    assert "c.json" in capsys.readouterr().err


@pytest.mark.process
async def test_the_process_outlives_a_killed_desk_and_its_own_death_loses_nothing(
    home: Path,
) -> None:
    entry = VenueConfig(
        name="A",
        type="paper",
        options={
            "instruments": [FACTS],
            "balances": {"BTC": "10", "USDT": "1000000"},
            "process": "own",
            "feeds": [
                {
                    "type": "simulated",
                    "interval_ms": 20,
                    "markets": {
                        SYMBOL: {"price": "100", "tick_size": "0.1", "quantity": "2"}
                    },
                }
            ],
        },
    )
    directory = home / "venues" / "A"
    events: list[Event] = []
    first = await build_paper_venue(entry, config(home), home)
    assert isinstance(first, PaperRemoteVenue)
    try:
        await first.start(events.append, SystemClock(), random.Random(1))
        while not any(isinstance(event, QuoteChanged) for event in events):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await first.submit(order("a", BUY, "0.1", "103.0"))
        pid = int((directory / "exchange.pid").read_text())
        assert os.getsid(pid) == pid
        assert (
            main(
                [
                    "--config",
                    str(directory / "exchange.json"),
                    "--socket",
                    str(home / "other"),
                ]
            )
            == 4
        )
        os.kill(pid, signal.SIGKILL)
        while first.is_connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while not first.is_connected:  # noqa: ASYNC110 - the desk's end starts it again
            await asyncio.sleep(0.02)
        with pytest.raises(VenueRejectedError, match="DUPLICATE"):
            await first.submit(order("a", BUY, "0.1", "103.0"))
        assert int((directory / "exchange.pid").read_text()) != pid
        assert (await first.fills(0))[0].client_order_id == "a"
        await first.stop()

        second = await build_paper_venue(entry, config(home), home)
        await second.start(events.append, SystemClock(), random.Random(1))
        assert (await second.find_order(SYMBOL, "a")) is not None
        await second.stop()
    finally:
        assert await stop_paper_process("A", socket_path(directory))
    said = summarise(read_rows(directory / "statement.jsonl"))
    assert (said["a"].placed, said["a"].filled) == (1, D("0.1"))
    assert json.loads((directory / "exchange.json").read_text())["venue"]["name"] == "A"


@pytest.mark.process
async def test_a_process_that_cannot_start_is_reported_with_its_last_words(
    home: Path,
) -> None:
    entry = VenueConfig(
        name="A",
        type="paper",
        options={"instruments": [FACTS], "feeds": [{"type": "moralis"}]},
    )

    with pytest.raises(CommandError, match="moralis"):
        await ensure_paper_process(entry, home / "v")


def test_the_process_serves_until_it_is_told_to_shut_down(home: Path) -> None:
    """`main` itself, in this process, with a client in a thread."""
    entry = VenueConfig(
        name="A",
        type="paper",
        options={"instruments": [FACTS], "feeds": [{"type": "simulated"}]},
    )
    (home / "c.json").write_bytes(
        msgspec.json.encode(ProcessConfig(venue=entry, directory=str(home / "v")))
    )
    stopped: list[bool] = []

    def stop() -> None:
        while not (home / "s").exists():
            time.sleep(0.01)
        stopped.append(asyncio.run(stop_paper_process("A", home / "s")))

    client = threading.Thread(target=stop)
    client.start()
    code = main(["--config", str(home / "c.json"), "--socket", str(home / "s")])
    client.join()

    assert (code, stopped) == (0, [True])
    assert (home / "v" / "exchange.pid").read_text() == ""
    assert asyncio.run(stop_paper_process("A", home / "s")) is True


def test_a_process_with_wrong_options_ends_with_the_code_of_the_error(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = VenueConfig(name="A", type="paper", options={"instruments": []})
    (home / "c.json").write_bytes(
        msgspec.json.encode(ProcessConfig(venue=entry, directory=str(home / "v")))
    )

    assert main(["--config", str(home / "c.json"), "--socket", str(home / "s")]) == 2
    assert "0 entries" in capsys.readouterr().err


async def test_a_process_that_could_not_be_started_at_first_is_tried_again(
    home: Path,
) -> None:
    """A desk that started without its venue must find it as soon as it is there."""
    tries = 0

    async def ensure() -> None:
        nonlocal tries
        tries += 1
        await asyncio.sleep(0.02)
        raise CommandError("it does not start yet")

    venue = PaperRemoteVenue(
        "paper",
        instruments=[],
        socket=home / "nobody.sock",
        ensure=ensure,
        connect_timeout_s=0.005,
    )
    await venue.start(lambda _: None, SystemClock(), random.Random(1))
    async with asyncio.timeout(10):
        while tries < 2:  # noqa: ASYNC110 - what is counted lies outside any event
            await asyncio.sleep(0.01)
    await venue.stop()


# --- hostile ends of the line -----------------------------------------------------------------------------


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    "data",
    [
        _frame(b"\x91" * 200_000 + b"\xc0"),
        _frame(b"\x82\xa4type\xa5reply\xa4body" + b"\x91" * 200_000 + b"\xc0"),
        _frame(b""),
        _frame(b"\x83\xa4type\xa5reply\xa2id\x01\xa4body\x81\xa1a\xc3"),
        (2**31).to_bytes(4, "big"),
        b"\xff" * 5_000,
        random.Random(1).randbytes(5_000),
    ],
    ids=["deep", "deep body", "empty", "wrong body", "huge", "ones", "noise"],
)
async def test_a_venue_that_speaks_nonsense_is_called_again(
    home: Path, data: bytes
) -> None:
    calls = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        writer.write(data)
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(talk, str(home / "s"))
    venue = PaperRemoteVenue("A", instruments=[], socket=home / "s", timeout_s=0.2)
    await venue.start(lambda _: None, SystemClock(), random.Random(1))

    with pytest.raises(QueryFailedError):
        await venue.venue_time_ns()
    async with asyncio.timeout(5):
        while calls < 3:  # noqa: ASYNC110 - the other side is a socket away
            await asyncio.sleep(0.01)

    await venue.stop()
    server.close()


@pytest.mark.parametrize("number", ["NaN", "sNaN", "Infinity", "1e999999", "1e-999999"])
async def test_an_order_of_an_odd_number_gets_an_answer(
    home: Path, number: str
) -> None:
    async with house_in(home) as house:
        for odd in (order("a", BUY, number, "99.0"), order("b", BUY, "1", number)):
            with pytest.raises((VenueRejectedError, OutcomeUnknownError)) as caught:
                await house.remote.submit(odd)
            assert "no reply" not in str(caught.value)
        assert await house.remote.submit(order("c", BUY, "0.5")) == "1"


async def test_many_whole_books_go_in_more_than_one_frame(home: Path) -> None:
    levels = [(D(price), D("1.12345678")) for price in range(1, 8_001)]
    async with house_in(home) as house:
        for number in range(150):
            house.feed.emit(
                BookChanged(
                    symbol=SYMBOL,
                    venue="A",
                    bids=levels,
                    asks=[],
                    first_sequence=number,
                    last_sequence=number,
                    is_snapshot=True,
                )
            )
        await house.until(
            lambda: sum(isinstance(e, BookChanged) for e in house.events) == 150, 20.0
        )
        assert house.remote.reconnects == 0


async def test_a_socket_outside_of_its_directory_lies_in_a_private_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    shared = home / f"nightdesk-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)

    with pytest.raises(StateNotWritableError, match="not a private directory"):
        await ensure_paper_process(
            VenueConfig(name="A", type="paper"), home / ("d" * 120)
        )


async def test_a_file_where_the_desk_was_started_does_not_pass_for_a_library(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "msgspec.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(home)
    entry = VenueConfig(name="A", type="paper", options={"instruments": [FACTS]})

    socket = await ensure_paper_process(entry, home / "A")

    assert await stop_paper_process("A", socket)
