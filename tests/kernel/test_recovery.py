"""The normal start is the recovery: what it reports, and what it costs."""

from fakes.house import House, request
from nightdesk.kernel.recovery import RecoveryReport, RecoveryStep


def test_a_report_reads_as_lines() -> None:
    report = RecoveryReport(
        steps=[
            RecoveryStep(name="ledger", count=3, duration_ms=1.25),
            RecoveryStep(name="balances", notes=["A: silent"]),
        ],
        differences=["A holds 1"],
        unresolved=["nd1"],
        external=["A:7"],
    )

    assert report.lines() == [
        "ledger: 3 in 1.2 ms",
        "balances: 0 in 0.0 ms: A: silent",
        "DIFFERENCE: A holds 1",
        "unresolved, counts as working: nd1",
        "external, not touched: A:7",
        "trading halted until an operator has looked after 1.2 ms",
    ]


async def test_the_first_start_and_a_start_after_a_crash_take_the_same_steps_in_the_same_order() -> (
    None
):
    first = await House().open()
    await first.orders.submit("t", request())
    second = await first.next().open()

    names = [step.name for step in first.report.steps]

    assert names == [
        "ledger",
        "venue clocks",
        "open intents",
        "open orders at the venues",
        "missed fills",
        "balances",
    ]
    assert [step.name for step in second.report.steps] == names
    assert second.report.lines()[-1].startswith("ready after")


async def test_recovering_twice_changes_nothing_more() -> None:
    house = await House().open()
    order = await house.orders.submit("t", request())
    house.venue.telling = "drop"
    house.venue.fill(order.client_order_id, "0.3")

    second = await house.next().open()
    third = await second.next(keep=100).open()

    assert third.orders.recent() == second.orders.recent()
    assert third.positions.all() == second.positions.all()
    assert third.report.booked_fills == 0
    assert third.gate.state == "ACTIVE"


async def test_a_clock_that_is_off_is_named() -> None:
    house = House()
    house.venue.skew_ns = 2_000_000_000

    await house.open()

    assert any(
        "the clock of A is +2000 ms from ours" in line for line in house.report.lines()
    )
