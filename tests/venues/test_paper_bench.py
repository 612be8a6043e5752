"""The benchmark of the paper venue runs, so that its figure stays one command away."""

from nightdesk.bench.paper import bench


def test_the_benchmark_matches_every_order() -> None:
    figures = bench(orders=200, rounds=1)

    assert figures["engine_orders_per_s"] > 0
    assert figures["venue_orders_per_s"] > 0
