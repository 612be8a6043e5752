"""What `desk.yaml` may say of a paper venue, checked in one place for both ways to run it.

Comes from: config.py
Goes to: exchange/building.py, exchange/paper_process.py
"""

import random
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import msgspec

from nightdesk.abc import Source
from nightdesk.config import SourceConfig, VenueConfig
from nightdesk.errors import ConfigError, UnknownTypeError
from nightdesk.market.matching import ClientIdRule, MatchingEngine
from nightdesk.model.instrument import Instrument
from nightdesk.sources.replay import ReplaySource
from nightdesk.sources.simulated import SimulatedSource
from nightdesk.venues.paper import Faults, PaperVenue

__all__ = ["PaperOptions", "ProcessConfig", "build_feed", "build_local", "read_options"]

_FEEDS: dict[str, type[SimulatedSource] | type[ReplaySource]] = {
    "simulated": SimulatedSource,
    "replay": ReplaySource,
}


class PaperOptions(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """The options of a paper venue. See `PaperVenue` and `MatchingEngine` for what they mean."""

    instruments: list[dict[str, Any]]
    balances: dict[str, Decimal] = {}
    seed: int | None = None
    latency_ms: tuple[float, float] = (0.0, 0.0)
    faults: Faults = Faults()
    expiry_s: float = 1.0
    process: Literal["desk", "own"] = "desk"
    feeds: list[dict[str, Any]] = []
    idle_exit_s: float = 1800.0
    client_ids: ClientIdRule = "forever"
    check_funds: bool = True
    stale_after_s: float = 120.0
    market_patience_s: float = 3.0
    max_open_orders: int = 10_000
    history: int = 200_000


class ProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a paper venue's own process must know; it lies beside its statement."""

    venue: VenueConfig
    directory: str
    seed: int = 1


def read_options(config: VenueConfig) -> PaperOptions:
    """Return the options of one paper venue.

    Raises:
        ConfigError: Names the key that cannot be used.
    """
    try:
        return msgspec.convert(_plain(config.options), PaperOptions, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"venue {config.name!r}", [f"{error}."]) from error


def instruments_of(config: VenueConfig, options: PaperOptions) -> list[Instrument]:
    """Return the instruments of one paper venue.

    Raises:
        ConfigError: One of them cannot be used, or there is none.
    """
    if not options.instruments:
        raise ConfigError(
            f"venue {config.name!r}",
            ["`instruments` lists 0 entries, so nothing could be traded."],
        )
    try:
        return [
            msgspec.convert({"venue": config.name, **each}, Instrument, strict=False)
            for each in options.instruments
        ]
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"venue {config.name!r}", [f"`instruments`: {error}."]
        ) from error


def build_local(
    config: VenueConfig, options: PaperOptions, directory: Path | None
) -> PaperVenue:
    """Return the venue itself, with its engine."""
    instruments = instruments_of(config, options)
    matching = MatchingEngine(
        config.name,
        instruments,
        client_ids=options.client_ids,
        check_funds=options.check_funds,
        stale_after_s=options.stale_after_s,
        market_patience_s=options.market_patience_s,
        max_open_orders=options.max_open_orders,
        history=options.history,
    )
    return PaperVenue(
        config.name,
        instruments=instruments,
        matching=matching,
        balances=options.balances,
        directory=directory,
        seed=options.seed,
        latency_ms=options.latency_ms,
        faults=options.faults,
        expiry_s=options.expiry_s,
    )


def build_feed(venue: str, entry: dict[str, Any], number: int) -> Source:
    """Return one source that feeds a venue in a process of its own.

    Raises:
        UnknownTypeError: Only simulated markets and recordings can feed it there.
        ConfigError: Its options cannot be used.
    """
    feed = msgspec.convert(
        {"name": f"{venue}-feed-{number}", **_nested(entry)}, SourceConfig
    )
    kind = _FEEDS.get(feed.type)
    where = f"venue {venue!r}, feeds[{number}]"
    if kind is None:
        raise UnknownTypeError("feed", feed.type, _FEEDS, where)
    own_key = "venues" if kind is SimulatedSource else "venue"
    try:
        return kind(feed.name, **{own_key: venue, **feed.options})
    except (TypeError, ValueError) as error:
        raise ConfigError(where, [f"{error}."]) from error


def dice(seed: int, name: str) -> random.Random:
    """Return the seeded random numbers of one part, as the desk makes them."""
    return random.Random(f"{seed}:{name}")


def _nested(entry: dict[str, Any]) -> dict[str, Any]:
    """A feed's options may stand under `options` or beside its type."""
    own = {key: value for key, value in entry.items() if key in ("name", "type")}
    rest = {
        key: value
        for key, value in entry.items()
        if key not in ("name", "type", "options")
    }
    return {**own, "options": {**rest, **entry.get("options", {})}}


def _plain(value: Any) -> Any:
    """Ready-made structs, which a program may hand over, become what a file would say."""
    return msgspec.to_builtins(value, builtin_types=(Decimal,), str_keys=True)
