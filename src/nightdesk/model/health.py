"""Health of tasks and traces of switches: what observers and operators read."""

import msgspec

__all__ = ["SwitchTrace", "TaskHealth"]


class TaskHealth(msgspec.Struct, kw_only=True):
    """One line of `nightdesk tasks`. Times are UTC nanoseconds, durations and lags seconds.

    `status`: waiting, running, parked, paused, backoff, quarantined, completed, stopped.
    `why`: the same in words an operator can act on. `streak`: failures in a row, up to now.
    """

    task_id: str
    type: str
    priority: str
    group: str | None = None
    runs_in: str = "desk"
    host: int | None = None
    status: str = "waiting"
    why: str = ""
    state: str = ""
    runs: int = 0
    errors: int = 0
    restarts: int = 0
    streak: int = 0
    overruns: int = 0
    missed: int = 0
    last_run_ns: int = 0
    next_run_ns: int = 0
    last_error: str = ""
    lag_p99_s: float = 0.0
    duration_p50_s: float = 0.0
    duration_p99_s: float = 0.0


class SwitchTrace(msgspec.Struct, frozen=True, kw_only=True):
    """The stamps of one switch, in monotonic nanoseconds; `*_us` are differences in microseconds.

    Attributes:
        parked: Background tasks that were held back.
        outcome: `handled`, `late` (deadline passed before the handler could start), `failed`, `timeout`.
        durability: `sync` if the handler waited for the fsync of the parked contexts.
    """

    handler: str
    key: str
    edge_ppm: int
    received_ns: int
    decided_ns: int
    closed_ns: int
    snapshot_ns: int
    handler_ns: int
    done_ns: int
    reopened_ns: int
    parked: int
    outcome: str
    durability: str
    ts_event_ns: int = 0

    @property
    def switch_us(self) -> float:
        """From the receipt of the event to the first line of the handler."""
        return (self.handler_ns - self.received_ns) / 1000
