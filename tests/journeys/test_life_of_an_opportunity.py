"""The walk of `docs/explanation/life-of-an-opportunity.md`, step by step, on a real desk in virtual time."""

from decimal import Decimal
from pathlib import Path

from fakes.desks import config, market, play, venue
from nightdesk.config import TaskEntry
from nightdesk.desk import TradingDesk
from nightdesk.model.events import Event, OrderAccepted, OrderFilled, QuoteChanged


def test_an_opportunity_walks_through_the_house_and_back(tmp_path: Path) -> None:
    handler = TaskEntry(
        id="gap",
        type="arbitrage",
        params={
            "symbol": "BTC/USDT",
            "venues": ["alpha", "beta"],
            "quantity": "0.02",
        },
    )

    async def walk(desk: TradingDesk) -> None:
        seen: list[tuple[int, Event]] = []
        desk.inbox.subscribe(
            (Event,), lambda event: seen.append((desk.clock.monotonic_ns(), event))
        )
        while not desk.switch.traces or desk.orders.open_orders():
            await desk.clock.sleep(0.05)
        trace = desk.switch.traces[0]

        # 1, 2: a quote came in by the one door before anything was decided.
        assert any(
            at <= trace.decided_ns and isinstance(e, QuoteChanged) for at, e in seen
        )
        # 3, 4: the switch let the handler in, and it asked for both legs.
        assert trace.handler_ns >= trace.closed_ns >= trace.decided_ns
        legs = desk.orders.orders_of("gap")
        assert {leg.request.venue for leg in legs[:2]} == {"alpha", "beta"}
        # 5, 6: each intent lies in the store under the id that the venue knows.
        for leg in legs:
            assert await desk.store.get("order", leg.client_order_id) is not None
            found = await desk.venues[leg.request.venue].find_order(
                "BTC/USDT", leg.client_order_id
            )
            assert found is not None
            assert found.filled_quantity == leg.filled_quantity
        # 7: acknowledgements and fills came back by the same door.
        kinds = {type(event) for _, event in seen}
        assert {OrderAccepted, OrderFilled} <= kinds
        # 8: the fills moved the positions, the legs cancel out, and the lanes are open again.
        assert sum((p.quantity for p in desk.positions.all()), Decimal(0)) == 0
        assert trace.reopened_ns >= trace.handler_ns
        assert not desk.lanes.lanes_closed

    play(
        config(
            tmp_path,
            handler,
            venues=(venue("alpha"), venue("beta")),
            sources=(market("alpha", "beta", gap_every_s=5.0),),
        ),
        walk,
    )
