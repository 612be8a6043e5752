"""What a start found out: step by step, for the log, for `nightdesk recover --dry-run` and for `status`."""

import msgspec

__all__ = ["RecoveryReport", "RecoveryStep"]


class RecoveryStep(msgspec.Struct, kw_only=True):
    """One step of R-9. `count` is what it dealt with, `notes` what an operator should read."""

    name: str
    count: int = 0
    duration_ms: float = 0.0
    notes: list[str] = []


class RecoveryReport(msgspec.Struct, kw_only=True):
    """What recovery did, or with `dry_run` would do.

    Attributes:
        differences: What the desk and a venue disagree about. Any of them halts trading.
        unresolved: Client order ids whose fate no venue could prove yet; they count as working.
        adopted: Client order ids of our own that the ledger did not know.
        external: Open orders of others on the account, `venue:venue_order_id`; never touched.
        booked_fills: Fills that happened while no desk was there.
        quarantined: Records that could not be read.
    """

    dry_run: bool = False
    steps: list[RecoveryStep] = []
    differences: list[str] = []
    unresolved: list[str] = []
    adopted: list[str] = []
    external: list[str] = []
    booked_fills: int = 0
    quarantined: list[str] = []

    @property
    def duration_ms(self) -> float:
        return sum(step.duration_ms for step in self.steps)

    def lines(self) -> list[str]:
        """Return the report as text, one line per step, then what needs a look."""
        text = [
            f"{step.name}: {step.count} in {step.duration_ms:.1f} ms{': ' if step.notes else ''}{'; '.join(step.notes)}"
            for step in self.steps
        ]
        for name, found in (
            ("DIFFERENCE", self.differences),
            ("unresolved, counts as working", self.unresolved),
            ("adopted", self.adopted),
            ("external, not touched", self.external),
            ("quarantined", self.quarantined),
        ):
            text += [f"{name}: {item}" for item in found]
        verdict = (
            "trading halted until an operator has looked"
            if self.differences
            else "ready"
        )
        return [
            *text,
            f"{'dry run, nothing changed; ' if self.dry_run else ''}{verdict} after {self.duration_ms:.1f} ms",
        ]
