"""A distribution that is learned for ever in bounded space.

Comes from: tasks/regime.py, tasks/spread_watch.py, tasks/pool_impact.py
Goes to: model/context.py
"""

import math

import msgspec

__all__ = ["Histogram"]

_STEP = math.log(1.05)


class Histogram(msgspec.Struct):
    """Counts of integers in buckets 5 % wide, so a quantile is right to about 3 %.

    There are at most some 450 buckets per sign. Once `limit` values are counted all counts are
    halved: the past fades, and the distribution follows a market that changes.
    """

    limit: int = 100_000
    count: int = 0
    buckets: dict[int, int] = {}

    def add(self, value: int) -> None:
        bucket = _bucket(value)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.count += 1
        if self.count >= self.limit:
            self.buckets = {b: n // 2 for b, n in self.buckets.items() if n > 1}
            self.count = sum(self.buckets.values())

    def quantile(self, share: float) -> int | None:
        """Return the value below which `share` of all counted values lie, or None without any."""
        if not self.count:
            return None
        wanted, below = share * self.count, 0
        for bucket in sorted(self.buckets):
            below += self.buckets[bucket]
            if below >= wanted:
                return _value(bucket)
        return _value(max(self.buckets))

    def rank(self, value: int) -> float:
        """Return the share of counted values that lie below the bucket of `value`."""
        if not self.count:
            return 0.0
        bucket = _bucket(value)
        return sum(n for b, n in self.buckets.items() if b < bucket) / self.count

    def quantiles(self) -> dict[str, int]:
        """Return p50, p90, p99 and p99.9; empty without any value."""
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
        found = {name: self.quantile(share) for name, share in shares.items()}
        return {name: value for name, value in found.items() if value is not None}


def _bucket(value: int) -> int:
    index = round(math.log1p(abs(value)) / _STEP)
    return index if value >= 0 else -index


def _value(bucket: int) -> int:
    size = round(math.expm1(abs(bucket) * _STEP))
    return size if bucket >= 0 else -size
