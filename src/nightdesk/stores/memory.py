"""A store that forgets: for tests, and for desks that need no tomorrow.

Comes from: desk.py
Goes to: model/
"""

from collections.abc import Awaitable
from typing import Any

from nightdesk.abc import Batch, Delete, Put, Record, Shelf, Store
from nightdesk.stores._seal import READY

__all__ = ["MemoryStore"]


class MemoryStore(Store):
    """Keeps records in a dictionary. A save is done before it is awaited.

    Args:
        journal: If given, every operation saved is appended to it, in order.
        options: Those of the other stores are accepted and mean nothing here.
    """

    def __init__(
        self, *, journal: list[Put | Delete] | None = None, **options: Any
    ) -> None:
        self.journal = journal
        self.sequence = 0
        self._records: dict[tuple[str, str], Record] = {}

    async def start(self) -> None:
        self.epoch += 1

    async def stop(self) -> None:
        """Nothing to close; what was saved is there at the next `start`."""

    def save(self, batch: Batch) -> Awaitable[None]:
        for operation in batch:
            self.sequence += 1
            name = (operation.kind, operation.key)
            if isinstance(operation, Put):
                self._records[name] = Record(
                    operation.kind,
                    operation.key,
                    operation.data,
                    operation.shelf,
                    self.epoch,
                    self.sequence,
                )
            else:
                self._records.pop(name, None)
            if self.journal is not None:
                self.journal.append(operation)
        return READY

    async def load(self, kind: str, shelf: Shelf | None = None) -> list[Record]:
        found = (
            record
            for record in self._records.values()
            if record.kind == kind and shelf in (None, record.shelf)
        )
        return sorted(found, key=lambda record: record.sequence)

    async def get(self, kind: str, key: str) -> Record | None:
        return self._records.get((kind, key))

    def stats(self) -> dict[str, Any]:
        return {
            "state": "ok",
            "epoch": self.epoch,
            "sequence": self.sequence,
            "held": len(self._records),
        }
