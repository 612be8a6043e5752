"""When a task runs. Plain data, as it stands in `desk.yaml`; `kernel/scheduler.py` gives it life."""

from typing import Literal

import msgspec

__all__ = ["Pause", "Schedule"]

Pause = Literal["pause"]


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exactly one trigger, and how it changes with the market's session.

    Attributes:
        every_s: Fixed rate: run each `every_s` seconds, missed ticks coalesced into one.
        cron: Five- or six-field cron expression in `timezone`.
        at: `HH:MM[:SS]` every day in `timezone`, or an ISO instant for a single run.
        once: Run once, right after the start.
        continuous: Run again as soon as the last run ended and there is spare time.
        on: Names of event types whose arrival triggers a run (`CandleClosed`, `OrderFilled` ...).
        calendar: `24/7`, or an exchange calendar such as `NSE`.
        open_s, closed_s: Interval while the calendar's session is open or closed; `pause` stops it.
        jitter_s: Uniform random delay added to each due time.
        timezone: IANA name for `cron` and `at`.
    """

    every_s: float | None = None
    cron: str | None = None
    at: str | None = None
    once: bool = False
    continuous: bool = False
    on: tuple[str, ...] = ()
    calendar: str = "24/7"
    open_s: float | Pause | None = None
    closed_s: float | Pause | None = None
    jitter_s: float = 0.0
    timezone: str = "UTC"
