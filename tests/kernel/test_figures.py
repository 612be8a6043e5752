"""The histogram: constant space, and readings within its promise."""

from hypothesis import given
from hypothesis import strategies as st

from nightdesk.kernel.figures import Histogram


@given(st.lists(st.integers(-5, 1 << 62), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_is_at_most_a_sixteenth_above_the_true_value(
    values: list[int], share: float
) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)

    ordered = sorted(max(0, v) for v in values)
    index = next(i for i in range(len(ordered)) if i + 1 >= share * len(ordered))
    reading = histogram.quantile(share)

    assert ordered[index] <= reading <= ordered[index] * 17 / 16 + 1
    assert histogram.summary()["max"] == ordered[-1]


def test_an_empty_histogram_reads_zero() -> None:
    assert Histogram().summary() == {"p50": 0, "p99": 0, "p999": 0, "max": 0}
