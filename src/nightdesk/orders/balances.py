"""Do the venue's balances agree with our positions? Compared by what changed since a first look.

Comes from: orders/reconciler.py
Goes to: orders/reconciler.py
"""

from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal

import msgspec

from nightdesk.abc import Clock, Put, Store, Venue
from nightdesk.errors import QueryFailedError, RecordCorruptError
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Fill
from nightdesk.model.position import Position

__all__ = ["BalanceCheck", "Mismatch"]

_KIND = "baseline"
_ZERO = Decimal(0)


class Mismatch(msgspec.Struct, frozen=True):
    """One asset of which the venue holds something else than our fills say."""

    venue: str
    asset: str
    expected: Decimal
    found: Decimal
    symbols: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.venue} holds {self.found} {self.asset}, our fills say {self.expected} "
            f"(difference {self.found - self.expected:+f})"
        )


class BalanceCheck:
    """Compares base assets of spot instruments.

    What the account held when the desk first saw it is the baseline; from then on a balance may only move
    by our booked fills. Money in quote assets is not compared: interest, funding and fees of other
    products move it. Derivatives hold no base asset and are left out.
    """

    def __init__(
        self, store: Store, clock: Clock, positions: Callable[[], Iterable[Position]]
    ) -> None:
        self._store = store
        self._clock = clock
        self._positions = positions
        self._baselines: dict[str, dict[str, Decimal]] = {}
        self._told: dict[tuple[str, str], Decimal] = {}

    async def load(self) -> list[RecordCorruptError]:
        """Read the baselines; a damaged one is returned, and taken anew."""
        damaged = []
        for record in await self._store.load(_KIND):
            try:
                self._baselines[record.key] = msgspec.json.decode(
                    record.data, type=dict[str, Decimal]
                )
            except msgspec.MsgspecError as error:
                damaged.append(RecordCorruptError(_KIND, record.key, str(error)))
        return damaged

    async def compare(
        self, venue: Venue, *, dry_run: bool = False, unbooked: Iterable[Fill] = ()
    ) -> list[Mismatch]:
        """Return what differs; on the very first look nothing does, and a baseline is taken (not with `dry_run`).

        Args:
            unbooked: Fills that a dry run found and may not book.

        Raises:
            QueryFailedError: No usable answer, which says nothing about positions.
        """
        bases = _bases(venue.instruments())
        balances = await venue.balances()
        baseline = self._baselines.get(venue.name)
        if baseline is None or not bases.keys() <= baseline.keys():
            if dry_run:
                return []
            self._begin(venue, bases, balances, baseline or {})
            baseline = self._baselines[venue.name]
        if not balances and any(baseline.values()):
            raise QueryFailedError(
                venue.name, "balances", "an empty reply, which is never read as flat"
            )
        held = self._held(venue.name)
        for fill in unbooked:
            base = fill.symbol.split("/")[0]
            fee = fill.fee if fill.fee_asset == base else _ZERO
            change = fill.side.sign * fill.quantity - fee
            held[base] = held.get(base, _ZERO) + change
        found = []
        for asset, instruments in bases.items():
            expected = baseline[asset] + held.get(asset, _ZERO)
            actual = balances.get(asset, _ZERO)
            if abs(actual - expected) >= min(i.lot_size for i in instruments):
                symbols = tuple(i.symbol for i in instruments)
                found.append(Mismatch(venue.name, asset, expected, actual, symbols))
        return found

    def is_told(self, mismatch: Mismatch) -> bool:
        """Return whether this very difference has been reported while the desk ran."""
        return (
            self._told.get((mismatch.venue, mismatch.asset))
            == mismatch.found - mismatch.expected
        )

    def note_told(self, mismatch: Mismatch) -> None:
        self._told[(mismatch.venue, mismatch.asset)] = (
            mismatch.found - mismatch.expected
        )

    async def accept(self, mismatches: Iterable[Mismatch]) -> None:
        """Take differences that the operator was told of as the new baseline, durably."""
        venues = set()
        for mismatch in mismatches:
            self._baselines[mismatch.venue][mismatch.asset] += (
                mismatch.found - mismatch.expected
            )
            venues.add(mismatch.venue)
        if venues:
            await self._store.save([self._put(venue) for venue in sorted(venues)])

    def _begin(
        self,
        venue: Venue,
        bases: Mapping[str, list[Instrument]],
        balances: Mapping[str, Decimal],
        known: Mapping[str, Decimal],
    ) -> None:
        held = self._held(venue.name)
        fresh = {
            asset: balances.get(asset, _ZERO) - held.get(asset, _ZERO)
            for asset in bases
        }
        self._baselines[venue.name] = {**fresh, **known}
        self._store.save([self._put(venue.name)])

    def _put(self, venue: str) -> Put:
        return Put(_KIND, venue, msgspec.json.encode(self._baselines[venue]))

    def _held(self, venue: str) -> dict[str, Decimal]:
        held: dict[str, Decimal] = {}
        for position in self._positions():
            if position.venue == venue and ":" not in position.symbol:
                base = position.symbol.split("/")[0]
                held[base] = held.get(base, _ZERO) + position.quantity
        return held


def _bases(instruments: Mapping[str, Instrument]) -> dict[str, list[Instrument]]:
    """Return the assets whose balance only trades of their own instruments can move, with those instruments."""
    quotes = {instrument.quote for instrument in instruments.values()}
    bases: dict[str, list[Instrument]] = {}
    for instrument in instruments.values():
        if ":" not in instrument.symbol and instrument.base not in quotes:
            bases.setdefault(instrument.base, []).append(instrument)
    return bases
