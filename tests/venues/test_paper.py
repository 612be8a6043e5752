"""The paper venue: time, lost messages, look-ups that lag, and a statement that outlives everything."""

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.paper import (
    RICH,
    SYMBOL,
    D,
    ManualClock,
    PaperHouse,
    instrument,
    order,
    quote,
    settle,
    trade,
)
from nightdesk.errors import (
    OutcomeUnknownError,
    QueryFailedError,
    StateDamagedError,
    StateLockedError,
    StateNotWritableError,
    VenueRejectedError,
)
from nightdesk.market.matching import MatchingEngine
from nightdesk.model.events import Event, OrderCanceled, OrderExpired, OrderFilled
from nightdesk.model.order import OrderStatus, Side, TimeInForce
from nightdesk.venues.paper import PaperVenue, read_rows, read_statement, summarise

BUY, SELL = Side.BUY, Side.SELL


def filled(events: list[Event]) -> list[tuple[str, Any]]:
    return [
        (event.client_order_id, event.fill.quantity)
        for event in events
        if isinstance(event, OrderFilled)
    ]


async def test_a_fill_comes_back_as_an_event_and_never_from_inside_the_market_event() -> (
    None
):
    async with PaperHouse() as house:
        await house.venue.submit(order("a", BUY, "1", "100.0"))

        house.venue.on_market(trade(SELL, "1.4", "100.0"))
        inside = list(house.events)
        await settle()

        assert inside == []
        assert filled(house.events) == [("a", D("0.4"))]


async def test_submit_returns_the_venues_order_id() -> None:
    async with PaperHouse() as house:
        assert await house.venue.submit(order("a", BUY, "1", "99.0")) == "1"
        assert await house.venue.submit(order("b", BUY, "1", "99.0")) == "2"
        found = await house.venue.find_order(SYMBOL, "b")
        assert found is not None
        assert (found.venue_order_id, found.status) == ("2", OrderStatus.ACCEPTED)
        assert await house.venue.find_order("ETH/USDT", "b") is None
        assert await house.venue.find_order(SYMBOL, "c") is None


async def test_a_refusal_carries_the_venues_code() -> None:
    async with PaperHouse() as house:
        with pytest.raises(VenueRejectedError) as refused:
            await house.venue.submit(order("a", BUY, "1", "100.2", post_only=True))

        assert refused.value.code == "POST_ONLY_WOULD_TAKE"


async def test_a_cancel_is_told_by_its_event_and_a_late_one_is_refused() -> None:
    async with PaperHouse() as house:
        asked = order("a", BUY, "3", "100.2")
        await house.venue.submit(asked)

        await house.venue.cancel(asked)
        await settle()

        canceled = [event for event in house.events if isinstance(event, OrderCanceled)]
        assert [
            (event.client_order_id, event.filled_quantity) for event in canceled
        ] == [("a", D(1))]
        with pytest.raises(VenueRejectedError) as refused:
            await house.venue.cancel(asked)
        assert refused.value.code == "ORDER_NOT_OPEN"


async def test_gtd_orders_expire_by_the_clock_without_any_market_event() -> None:
    async with PaperHouse() as house:
        expire_ns = house.clock.now_ns() + 2_000_000_000
        later_ns = expire_ns + 1_000_000_000
        await house.venue.submit(
            order(
                "b", BUY, "1", "99.0", time_in_force=TimeInForce.GTD, expire_ns=later_ns
            )
        )
        await house.venue.submit(
            order(
                "a",
                BUY,
                "1",
                "99.0",
                time_in_force=TimeInForce.GTD,
                expire_ns=expire_ns,
            )
        )

        await house.clock.advance(1.9)
        before = list(house.events)
        await house.clock.advance(0.2)
        first = [
            event.client_order_id
            for event in house.events
            if isinstance(event, OrderExpired)
        ]
        await house.clock.advance(1.0)

        assert before == []
        assert first == ["a"]
        assert len(house.events) == 2


async def test_latency_is_paid_on_the_way_there_and_back() -> None:
    async with PaperHouse(latency_ms=(10, 10)) as house:
        sending = asyncio.create_task(house.venue.submit(order("a", BUY, "0.5")))
        await house.clock.advance(0.009)
        nothing_yet = house.matching.open_orders(), house.matching.fills()
        await house.clock.advance(0.002)
        executed = len(house.matching.fills())
        await house.clock.advance(0.010)

        assert nothing_yet == ([], [])
        assert executed == 1
        assert sending.result() == "1"
        assert filled(house.events) == [("a", D("0.5"))]


async def test_a_request_goes_on_when_its_caller_is_cancelled() -> None:
    async with PaperHouse(latency_ms=(10, 10)) as house:
        sending = asyncio.create_task(house.venue.submit(order("a", BUY, "0.5")))
        await house.clock.advance(0.001)
        sending.cancel()
        await house.clock.advance(0.1)

        assert filled(house.events) == [("a", D("0.5"))]


async def test_a_request_that_arrives_too_late_is_void() -> None:
    async with PaperHouse(latency_ms=(6000, 6000), expiry_s=5.0) as house:
        sending = asyncio.create_task(house.venue.submit(order("a", BUY, "0.5")))
        await house.clock.advance(20)

        with pytest.raises(VenueRejectedError, match="REQUEST_EXPIRED"):
            await sending
        assert house.matching.fills() == []


async def test_a_lost_reply_leaves_an_executed_order_behind() -> None:
    async with PaperHouse(faults={"lost_replies": 1.0}) as house:
        sending = asyncio.create_task(house.venue.submit(order("a", BUY, "0.5")))
        await house.clock.advance(2)

        with pytest.raises(OutcomeUnknownError):
            await sending
        assert filled(house.events) == [("a", D("0.5"))]
        assert house.venue.stats()["faults"]["lost_replies"] >= 1


async def test_a_lost_request_leaves_nothing_behind() -> None:
    async with PaperHouse(faults={"lost_requests": 1.0}) as house:
        sending = asyncio.create_task(house.venue.submit(order("a", BUY, "0.5")))
        await house.clock.advance(2)

        with pytest.raises(OutcomeUnknownError):
            await sending
        assert house.matching.find("a") is None


async def test_an_error_is_a_proof_for_requests_and_no_answer_for_questions() -> None:
    async with PaperHouse(faults={"errors": 1.0}) as house:
        with pytest.raises(VenueRejectedError, match="SERVICE_BUSY"):
            await house.venue.submit(order("a", BUY, "0.5"))
        for question in (
            house.venue.open_orders(),
            house.venue.balances(),
            house.venue.fills(0),
        ):
            with pytest.raises(QueryFailedError):
                await question


async def test_an_outage_lets_nothing_through_while_it_lasts() -> None:
    async with PaperHouse(faults={"outages": [[1, 3]], "timeout_s": 0.1}) as house:
        await house.venue.submit(order("a", BUY, "0.1"))
        await house.clock.advance(1)
        during = asyncio.create_task(house.venue.submit(order("b", BUY, "0.1")))
        await house.clock.advance(0.5)
        with pytest.raises(QueryFailedError):
            await house.venue.find_order(SYMBOL, "a")
        await house.clock.advance(2)

        with pytest.raises(OutcomeUnknownError):
            await during
        assert await house.venue.find_order(SYMBOL, "b") is None
        assert await house.venue.find_order(SYMBOL, "a") is not None


async def test_look_ups_lag_behind_and_may_forget_finished_orders() -> None:
    async with PaperHouse(
        faults={"index_lag_s": 2.0, "lookup": "open_only", "clock_skew_ms": 250}
    ) as house:
        await house.venue.submit(order("open", BUY, "1", "99.0"))
        await house.venue.submit(order("done", BUY, "0.5"))
        fresh = (
            await house.venue.open_orders(),
            await house.venue.fills(0),
            await house.venue.find_order(SYMBOL, "open"),
        )
        await house.clock.advance(2)

        assert fresh == ([], [], None)
        assert [found.client_order_id for found in await house.venue.open_orders()] == [
            "open"
        ]
        assert await house.venue.find_order(SYMBOL, "done") is None
        assert len(await house.venue.fills(0)) == 1
        assert house.venue.index_lag_s == 2.0
        assert await house.venue.venue_time_ns() - house.clock.now_ns() == 250_000_000


async def test_events_may_come_twice_and_out_of_order_but_none_is_missing() -> None:
    faults = {"duplicated_events": 0.5, "reordered_events": 0.5}
    async with PaperHouse(latency_ms=(1, 20), faults=faults) as house:
        for number in range(40):
            sending = asyncio.create_task(
                house.venue.submit(order(f"o{number}", BUY, "0.06"))
            )
            await house.clock.advance(0.005)
            house.venue.on_market(
                quote("100.0", "100.2", ask_quantity=str(1 + number % 2))
            )
            assert sending
        await house.clock.advance(1)

        ids = [cid for cid, _ in filled(house.events)]
        assert set(ids) == {f"o{number}" for number in range(40)}
        assert len(ids) > 40
        order_of_first = list(dict.fromkeys(ids))
        assert order_of_first != sorted(order_of_first, key=lambda cid: int(cid[1:]))


async def test_the_same_seed_writes_the_same_statement(tmp_path: Path) -> None:
    async def run(directory: Path) -> bytes:
        faults = {
            "lost_replies": 0.2,
            "lost_requests": 0.1,
            "errors": 0.1,
            "timeout_s": 0.01,
        }
        async with PaperHouse(
            directory, latency_ms=(1, 20), faults=faults, seed=5
        ) as house:
            sends = []
            for number in range(60):
                side = BUY if number % 3 else SELL
                sends.append(
                    asyncio.create_task(
                        house.venue.submit(order(f"o{number}", side, "0.1", "100.1"))
                    )
                )
                await house.clock.advance(0.003)
                house.venue.on_market(quote("100.0", f"100.{1 + number % 3}"))
                house.venue.on_market(trade(BUY, "0.2", "100.1", str(number)))
            await house.clock.advance(1)
            await asyncio.gather(*sends, return_exceptions=True)
        return (directory / "statement.jsonl").read_bytes()

    first, second = await run(tmp_path / "1"), await run(tmp_path / "2")

    assert first == second
    assert first.count(b"traded") > 5


# The statement -----------------------------------------------------------------------------------


async def test_a_restarted_venue_knows_everything_it_wrote(tmp_path: Path) -> None:
    async with PaperHouse(tmp_path) as house:
        await house.venue.submit(order("open", BUY, "1", "99.0"))
        await house.venue.submit(order("part", BUY, "3", "100.2"))
        before = (
            await house.venue.open_orders(),
            await house.venue.fills(0),
            await house.venue.balances(),
            house.venue.order_events(0),
        )

    async with PaperHouse(tmp_path, balances={"BTC": D(5)}, has_market=False) as again:
        after = (
            await again.venue.open_orders(),
            await again.venue.fills(0),
            await again.venue.balances(),
            again.venue.order_events(0),
        )
        assert after == before
        with pytest.raises(VenueRejectedError, match="DUPLICATE_CLIENT_ORDER_ID"):
            await again.venue.submit(order("open", BUY, "1", "99.0"))
        assert await again.venue.submit(order("next", BUY, "1", "99.0")) == "3"


async def test_a_statement_cut_at_any_byte_still_starts_and_loses_only_the_torn_line(
    tmp_path: Path,
) -> None:
    async with PaperHouse(tmp_path / "whole") as house:
        await house.venue.submit(order("a", BUY, "1.5", "100.2"))
        await house.venue.cancel(order("a", BUY, "1.5", "100.2"))
    whole = (tmp_path / "whole" / "statement.jsonl").read_bytes()
    for cut in range(1, len(whole), 7):
        directory = tmp_path / f"cut{cut}"
        directory.mkdir()
        (directory / "statement.jsonl").write_bytes(whole[:cut])

        async with PaperHouse(directory):
            pass

        kept = (directory / "statement.jsonl").read_bytes()
        lines = whole[:cut].rfind(b"\n") + 1
        assert kept.startswith(whole[:lines])
        assert kept.endswith(b"\n")


async def test_a_damaged_line_stops_the_start_and_names_it(tmp_path: Path) -> None:
    async with PaperHouse(tmp_path):
        pass
    path = tmp_path / "statement.jsonl"
    path.write_bytes(b"{broken}\n" + path.read_bytes())

    with pytest.raises(StateDamagedError, match="line 1"):
        async with PaperHouse(tmp_path):
            pass


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [line.replace(b"1.5", b"1.6") for line in lines],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [lines[0], b"\xff" + lines[1][1:], *lines[2:]],
    ],
    ids=["changed", "gone", "moved", "no text"],
)
async def test_a_changed_or_missing_line_is_never_taken_for_the_truth(
    tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]]
) -> None:
    async with PaperHouse(tmp_path) as house:
        await house.venue.submit(order("a", BUY, "1.5", "100.2"))
        await house.venue.cancel(order("a", BUY, "1.5", "100.2"))
    path = tmp_path / "statement.jsonl"
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))

    with pytest.raises(StateDamagedError, match=r"line \d cannot be read"):
        async with PaperHouse(tmp_path):
            pass


async def test_a_statement_of_other_instruments_is_not_guessed_at(
    tmp_path: Path,
) -> None:
    async with PaperHouse(tmp_path) as house:
        await house.venue.submit(order("a", BUY, "1", "99.0"))

    with pytest.raises(StateDamagedError, match="BTC/USDT"):
        async with PaperHouse(tmp_path, instrument={"symbol": "ETH/USDT"}):
            pass


async def test_two_venues_never_write_one_statement(tmp_path: Path) -> None:
    async with PaperHouse(tmp_path):
        with pytest.raises(StateLockedError):
            async with PaperHouse(tmp_path):
                pass


async def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(StateNotWritableError, match="statement"):
        async with PaperHouse(tmp_path / "file"):
            pass


async def test_a_venue_that_cannot_write_reports_nothing_and_answers_unknown(
    tmp_path: Path,
) -> None:
    """What is not in the statement must not become a fill that the desk books."""
    async with PaperHouse(tmp_path) as house:
        os.close(house.venue._statement._descriptor)  # type: ignore[union-attr, arg-type]
        house.venue._statement._descriptor = os.open(
            tmp_path / "statement.jsonl", os.O_RDONLY
        )  # type: ignore[union-attr]

        with pytest.raises(OutcomeUnknownError, match="cannot be written"):
            await house.venue.submit(order("a", BUY, "0.5"))
        with pytest.raises(OutcomeUnknownError):
            await house.venue.submit(order("b", BUY, "0.5"))
        with pytest.raises(QueryFailedError):
            await house.venue.balances()
        house.venue.on_market(quote("99.0", "99.1"))
        await settle()

        assert house.events == []


async def test_the_statement_says_what_became_of_each_client_order_id(
    tmp_path: Path,
) -> None:
    async with PaperHouse(tmp_path, client_ids="none") as house:
        await house.venue.submit(order("twice", BUY, "0.5", "100.2"))
        await house.venue.submit(order("twice", BUY, "0.7", "100.2"))
        await house.venue.submit(order("gone", BUY, "1", "99.0"))
        await house.venue.cancel(order("gone", BUY, "1", "99.0"))
        with pytest.raises(VenueRejectedError):
            await house.venue.submit(order("bad", BUY, "1", "100.05"))
        path = tmp_path / "statement.jsonl"

        said = summarise(read_rows(path))

        assert (
            said["twice"].placed,
            said["twice"].filled,
            said["twice"].average_price,
        ) == (2, D(1), D("100.2"))
        assert said["twice"].fees == {"USDT": D("0.0501")}
        assert said["gone"].status is OrderStatus.CANCELED
        assert (said["bad"].refused, said["bad"].placed) == (["PRICE_NOT_ON_TICK"], 0)
        assert read_statement(path)[0] == {
            "row": "deposited",
            "sequence": 1,
            "ts_ns": house.clock.now_ns(),
            "asset": "BTC",
            "quantity": "1000",
        }
        assert (path.stat().st_mode & 0o777) == 0o600


async def test_market_events_of_other_venues_and_kinds_are_ignored() -> None:
    async with PaperHouse() as house:
        await house.venue.submit(order("a", BUY, "1", "100.1"))

        house.venue.on_market(trade(SELL, "5", "100.0", venue="B"))
        house.venue.on_market(Event())
        await settle()

        assert house.events == []


async def test_an_unseeded_venue_takes_the_desks_numbers_and_mappings_as_instruments() -> (
    None
):
    facts = {
        "symbol": SYMBOL,
        "tick_size": "0.1",
        "lot_size": "0.001",
        "min_quantity": "0.001",
    }
    venue = PaperVenue(
        "A",
        instruments=[facts],
        matching=MatchingEngine("A", [instrument()]),
        balances=RICH,
    )

    await venue.start(lambda _: None, ManualClock(), random.Random(3))

    assert venue.instruments()[SYMBOL].venue == "A"
    assert venue.stats()["open"] == 0
    await venue.stop()


def test_a_process_of_its_own_is_not_built_by_the_class() -> None:
    with pytest.raises(ValueError, match="build_paper_venue"):
        PaperVenue("A", instruments=[], matching=MatchingEngine("A", []), process="own")
