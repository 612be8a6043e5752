"""What becomes of a task that fails: restart with backoff, then quarantine; and nobody floods the log.

Comes from: kernel/scheduler.py
Goes to: kernel/scheduler.py (the verdict), telemetry/ (as observers and log records)
"""

import logging
import random
from collections import OrderedDict, deque
from collections.abc import Sequence

import msgspec

from nightdesk.abc import Observer

__all__ = ["Failures", "StormFilter", "Supervisor", "Verdict"]

_SECOND_NS = 1_000_000_000
_MAX_STORMS = 10_000

_log = logging.getLogger(__name__)


class Verdict(msgspec.Struct, frozen=True):
    """Restart after `delay_s`, or never by itself. `consequence` says so in words."""

    delay_s: float
    quarantined: bool
    consequence: str


class Failures:
    """The failures of one task that still count."""

    __slots__ = ("recent", "streak")

    def __init__(self, keep: int) -> None:
        self.streak = 0
        self.recent: deque[tuple[int, int]] = deque(
            maxlen=keep
        )  # when, and runs until then


class StormFilter:
    """Lets the 1st, 2nd, 4th, 8th ... message of a kind pass (R-25).

    Args:
        quiet_s: After so long without one, the next counts as the first again.
    """

    def __init__(self, quiet_s: float = 600.0) -> None:
        self._quiet_ns = int(quiet_s * _SECOND_NS)
        self._seen: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def passes(self, kind: str, now_ns: int) -> int:
        """Count one message; return its number if it is to be written, else 0."""
        count, last_ns = self._seen.pop(kind, (0, now_ns))
        count = 1 if now_ns - last_ns > self._quiet_ns else count + 1
        self._seen[kind] = count, now_ns
        if len(self._seen) > _MAX_STORMS:
            self._seen.popitem(last=False)
        return count if count & (count - 1) == 0 else 0


class Supervisor:
    """Answers failures (R-23): 1, 2, 4 ... 60 s of backoff, and quarantine for who goes on failing.

    A task is quarantined at the `quarantine_after`-th failure within `window_s` if it failed in at least
    half of its runs meanwhile: an outage of two minutes is survived, a task that always raises starts
    seven times in two minutes, and one that fails now and then among many good runs goes on.

    Args:
        random: Spreads restarts, so that tasks felled by one cause do not come back in step.
        observers: Told of every failure.
    """

    def __init__(
        self,
        *,
        random: random.Random,
        observers: Sequence[Observer] = (),
        quarantine_after: int = 8,
        window_s: float = 600.0,
        base_s: float = 1.0,
        cap_s: float = 60.0,
    ) -> None:
        self._random = random
        self._observers = tuple(observers)
        self._quarantine_after = quarantine_after
        self._window_s = window_s
        self._base_s = base_s
        self._cap_s = cap_s
        self._storms = StormFilter()

    def answer(
        self,
        task_id: str,
        kind: str,
        failures: Failures | None,
        error: BaseException,
        *,
        now_ns: int,
        runs: int,
    ) -> tuple[Failures, Verdict]:
        """Decide what follows from `error`, log it, and tell the observers.

        Args:
            kind: The task's type; failures of one type and one exception share a log storm.
            failures: What this returned for the last failure of the task, None if there was none.
            now_ns: Monotonic.
            runs: Cycles of the task so far, this one included.
        """
        failures = failures or Failures(self._quarantine_after)
        failures.streak += 1
        failures.recent.append((now_ns, runs))
        verdict = self._verdict(failures, error, now_ns, runs)
        self._write(task_id, kind, error, verdict.consequence, now_ns)
        return failures, verdict

    def remember(self, streak: int, now_ns: int) -> Failures | None:
        """Return `streak` failures in a row of a task that failed elsewhere, in a host that is gone."""
        if not streak:
            return None
        failures = Failures(self._quarantine_after)
        failures.streak = streak
        failures.recent.extend((now_ns, 0) for _ in range(streak))
        return failures

    def forgive(self, failures: Failures) -> None:
        """A good run: the next failure starts at the shortest backoff again."""
        failures.streak = 0

    def quarantine(
        self, task_id: str, kind: str, error: BaseException, now_ns: int
    ) -> Verdict:
        """Quarantine at once, whatever went before."""
        verdict = self._quarantined(str(error))
        self._write(task_id, kind, error, verdict.consequence, now_ns)
        return verdict

    def warn(self, task_id: str, kind: str, text: str, now_ns: int) -> None:
        """Log a harmless-looking misbehaviour of a task, without a flood."""
        count = self._storms.passes(f"{task_id}:{kind}", now_ns)
        if count:
            _log.warning("task %s %s%s", task_id, text, _times(count))

    def _verdict(
        self, failures: Failures, error: BaseException, now_ns: int, runs: int
    ) -> Verdict:
        first_ns, first_runs = failures.recent[0]
        failed = len(failures.recent)
        recently = now_ns - first_ns <= self._window_s * _SECOND_NS
        mostly = 2 * failed >= runs - first_runs + 1
        if failed == self._quarantine_after and recently and mostly:
            within = (now_ns - first_ns) / _SECOND_NS
            return self._quarantined(
                f"{failed} failures within {within:.0f} s, the last: {describe(error)}"
            )
        delay_s = min(self._cap_s, self._base_s * 2.0 ** min(failures.streak - 1, 30))
        # Upwards only: a shorter pause than promised would add starts.
        delay_s *= 1 + self._random.uniform(0.0, 0.1)
        return Verdict(
            delay_s,
            False,
            f"restart in {delay_s:.1f} s (failure {failures.streak} in a row)",
        )

    def _quarantined(self, reason: str) -> Verdict:
        return Verdict(0.0, True, f"quarantined: {reason}")

    def _write(
        self,
        task_id: str,
        kind: str,
        error: BaseException,
        consequence: str,
        now_ns: int,
    ) -> None:
        count = self._storms.passes(f"{kind}:{type(error).__name__}", now_ns)
        if count:
            _log.error(
                "task %s failed%s: %s; %s",
                task_id,
                _times(count),
                describe(error),
                consequence,
                exc_info=error,
            )
        for observer in self._observers:
            try:
                observer.on_task_failed(task_id, error, consequence)
            except Exception:
                _log.exception("observer %s failed", type(observer).__name__)


def describe(error: BaseException) -> str:
    """Return an exception as one bounded line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text}"[:500] if text else name


def _times(count: int) -> str:
    return f" ({count} times by now)" if count > 1 else ""
