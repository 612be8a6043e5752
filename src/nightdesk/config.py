"""The typed shape of `desk.yaml`. Unknown keys are refused; `loading/` turns this into a house.

Comes from: cli/
Goes to: loading/, desk.py
"""

from decimal import Decimal
from typing import Any, Literal

import msgspec

from nightdesk.model.schedule import Schedule

__all__ = [
    "BackgroundConfig",
    "Config",
    "KernelConfig",
    "RiskConfig",
    "SourceConfig",
    "StateConfig",
    "TaskEntry",
    "VenueConfig",
]


class StateConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Where the desk remembers. `directory` is relative to the working directory."""

    store: Literal["sqlite", "files", "memory"] = "sqlite"
    directory: str = "state"
    keep_completed_hours: float = 24.0


class KernelConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """The loop and the switch.

    Attributes:
        loop: `auto` takes uvloop where it is installed.
        slice_us: Longest stretch of background work between two polls of the sockets.
        durability: `sync` makes the opportunity handler wait for the fsync of the parked contexts.
        max_park_s: A handler that waits longer for the network lets the background run in the gaps.
        opportunity_queue: Bound of waiting opportunities; the least edge is dropped first.
        max_concurrent: Task cycles that may be under way at once.
        stop_timeout_s: After this many seconds of a graceful stop the rest is named and left.
    """

    loop: Literal["auto", "uvloop", "asyncio"] = "auto"
    slice_us: int = 100
    durability: Literal["sync", "async"] = "async"
    max_park_s: float = 0.05
    opportunity_queue: int = 256
    max_concurrent: int = 1000
    stop_timeout_s: float = 8.0
    watchdog_lag_ms: int = 250


class BackgroundConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Child processes for background tasks; 0 hosts runs everything in one loop.

    A host whose loop stands still for `stall_s`, or that grows past `memory_mb`, is killed,
    the offender named, the others resumed.
    """

    hosts: int = 1
    stall_s: float = 2.0
    memory_mb: int = 512


class RiskConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of the gate. None switches one off. Money in quote units."""

    max_notional_per_order: Decimal | None = Decimal("100000")
    max_position_notional: Decimal | None = Decimal("1000000")
    max_gross_notional: Decimal | None = None
    max_daily_loss: Decimal | None = None
    max_orders_per_s: int = 100
    price_collar_ppm: int | None = 50_000
    max_quote_age_s: float = 10.0
    allowed_symbols: tuple[str, ...] = ()
    starting_equity: Decimal = Decimal("10000")


class VenueConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """One venue. `options` are the keyword arguments of its class."""

    name: str
    type: str
    options: dict[str, Any] = {}


class SourceConfig(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """One source of events. `options` are the keyword arguments of its class."""

    name: str
    type: str
    options: dict[str, Any] = {}


class TaskEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One task. `params` are the fields of its context; None keeps the default of the task's class."""

    id: str
    type: str
    params: dict[str, Any] = {}
    schedule: Schedule | None = None
    priority: str | None = None
    timeout_s: float | None = None
    group: str | None = None
    after: tuple[str, ...] = ()
    runs_in: Literal["desk", "background"] | None = None
    enabled: bool = True


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole desk.

    Attributes:
        code: Three characters `[a-z0-9]` that stand in every client order id of this desk.
        virtual_time: Run under the virtual clock, as fast as the events allow.
        search_path: Directory from which the user's own dotted modules are imported.
    """

    name: str = "desk"
    code: str = "nd1"
    mode: Literal["development", "production", "test"] = "development"
    seed: int = 1
    virtual_time: bool = False
    live: bool = False
    allow_empty: bool = False
    log_level: Literal["debug", "info", "warn", "error"] = "info"
    source_file: str = "desk.yaml"
    search_path: str = "."
    state: StateConfig = StateConfig()
    kernel: KernelConfig = KernelConfig()
    background: BackgroundConfig = BackgroundConfig()
    risk: RiskConfig = RiskConfig()
    venues: tuple[VenueConfig, ...] = ()
    sources: tuple[SourceConfig, ...] = ()
    tasks: tuple[TaskEntry, ...] = ()
