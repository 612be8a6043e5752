"""What may go wrong between a desk and the paper venue, on purpose and under a seed.

Comes from: venues/paper.py
Goes to: venues/paper.py
"""

import random
from typing import Literal

import msgspec

__all__ = ["FaultInjector", "Faults"]


class Faults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rates are probabilities from 0 to 1 per request or event.

    Attributes:
        lost_requests: The request never arrives; the desk sees a timeout.
        lost_replies: The request is carried out, the reply never arrives.
        errors: The venue answers with a proof of refusal (`SERVICE_BUSY`); a question just fails.
        duplicated_events, reordered_events: Fills and ends that come twice, or after later ones.
        timeout_s: How long the desk waits before it knows that no reply comes.
        outages: Windows `(from, to)` in seconds since the start in which nothing gets through.
        lookup: `open_only` answers questions about finished orders with "not found".
        index_lag_s: How long fresh orders and fills are missing from answers.
        clock_skew_ms: The venue's clock minus ours.
    """

    lost_requests: float = 0.0
    lost_replies: float = 0.0
    errors: float = 0.0
    duplicated_events: float = 0.0
    reordered_events: float = 0.0
    timeout_s: float = 1.0
    outages: tuple[tuple[float, float], ...] = ()
    lookup: Literal["all", "open_only"] = "all"
    index_lag_s: float = 0.0
    clock_skew_ms: int = 0


class FaultInjector:
    """Rolls the dice, and counts what it did to whom."""

    def __init__(
        self,
        faults: Faults,
        latency_ms: tuple[float, float],
        random: random.Random,
        start_ns: int,
    ) -> None:
        self.faults = faults
        self.counts: dict[str, int] = {}
        self._latency_ms = latency_ms
        self._random = random
        self._start_ns = start_ns

    @property
    def is_quiet(self) -> bool:
        """True when nothing is slow and nothing can fail, so requests need no journey."""
        faults = self.faults
        rates = (faults.lost_requests, faults.lost_replies, faults.errors)
        return self._latency_ms[1] <= 0 and not any(rates) and not faults.outages

    def hits(self, fault: str) -> bool:
        """Return whether `fault` strikes now."""
        rate: float = getattr(self.faults, fault)
        if rate <= 0 or self._random.random() >= rate:
            return False
        self.count(fault)
        return True

    def count(self, fault: str) -> None:
        self.counts[fault] = self.counts.get(fault, 0) + 1

    def is_out(self, now_ns: int) -> bool:
        """Return whether nothing gets through now."""
        elapsed_s = (now_ns - self._start_ns) / 1e9
        is_out = any(begin <= elapsed_s < end for begin, end in self.faults.outages)
        if is_out:
            self.count("outages")
        return is_out

    def delay_ns(self) -> int:
        """Return the time that one way takes."""
        low, high = self._latency_ms
        return round(self._random.uniform(low, high) * 1_000_000) if high > 0 else 0
