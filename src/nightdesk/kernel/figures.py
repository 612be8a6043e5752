"""Distributions of nanoseconds in constant space.

Comes from: kernel/scheduler.py
Goes to: telemetry/, control.py
"""

from typing import Final

__all__ = ["Histogram"]

_SUB_BITS: Final = (
    4  # 16 buckets per octave: a reading is at most 6 % above the true value
)
_OCTAVES: Final = 64


class Histogram:
    """Counts in buckets that grow with the value, and the largest value exactly."""

    __slots__ = ("_buckets", "count", "max")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._buckets = [0] * (_OCTAVES << _SUB_BITS)
        self.count = 0
        self.max = 0

    def add(self, value: int) -> None:
        """Count one value; what is negative counts as 0."""
        self.count += 1
        if value > self.max:
            self.max = value
        octave = value.bit_length() - 5 if value > 0 else 0
        if octave > 0:
            self._buckets[(octave << 4) + (value >> octave)] += 1
        else:
            self._buckets[value if value > 0 else 0] += 1

    def quantile(self, share: float) -> int:
        """Return the value beneath which `share` of the counted values lie."""
        wanted = share * self.count
        seen = 0
        for index, count in enumerate(self._buckets):
            seen += count
            if count and seen >= wanted:
                return min(_upper(index), self.max)
        return 0

    def summary(self) -> dict[str, int]:
        """Return p50, p99, p99.9 and the maximum."""
        return {
            "p50": self.quantile(0.5),
            "p99": self.quantile(0.99),
            "p999": self.quantile(0.999),
            "max": self.max,
        }


def _upper(index: int) -> int:
    """Return the largest value that falls into a bucket."""
    octave, within = divmod(index, 1 << _SUB_BITS)
    if octave < 1:
        return index
    octave -= 1
    return ((within + (1 << _SUB_BITS) + 1) << octave) - 1
