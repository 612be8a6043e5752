"""A store whose process can die: what was saved without waiting may be lost, what was awaited may not."""

from collections.abc import Awaitable, Callable, Generator

from nightdesk.abc import Batch, Delete, Put, Record, Shelf, Store
from nightdesk.errors import StateNotWritableError

__all__ = ["CrashableStore"]

Hook = Callable[[str], None]


class _Saving:
    def __init__(self, store: "CrashableStore") -> None:
        self._store = store

    def __await__(self) -> Generator[None, None, None]:
        self._store.flush()
        self._store.hook("saved")
        return
        yield


class CrashableStore(Store):
    """Keeps records in a dictionary that outlives it.

    Args:
        disk: What is durable; give it to the next store after a crash.
        hook: Called at `save`, before anything is queued, and at `saved`, once it is durable; may raise.
    """

    def __init__(
        self, disk: dict[tuple[str, str], Record] | None = None, epoch: int = 1
    ) -> None:
        self.disk = {} if disk is None else disk
        self.epoch = epoch
        self.hook: Hook = lambda point: None
        self.broken = False
        self.bad: list[tuple[str, str, str]] = []
        self.batches: list[list[Put | Delete]] = []
        self._queue: list[list[Put | Delete]] = []
        self._sequence = max(
            (record.sequence for record in self.disk.values()), default=0
        )

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        self.flush()

    def save(self, batch: Batch) -> Awaitable[None]:
        self.hook("save")
        if self.broken:
            raise StateNotWritableError("memory", "broken by the test", "Mend it.")
        self._queue.append(list(batch))
        self.batches.append(list(batch))
        return _Saving(self)

    def flush(self, batches: int | None = None) -> None:
        """Make the first `batches` that wait durable, or all."""
        count = len(self._queue) if batches is None else batches
        for batch in self._queue[:count]:
            for operation in batch:
                self._sequence += 1
                name = (operation.kind, operation.key)
                if isinstance(operation, Put):
                    self.disk[name] = Record(
                        *name,
                        operation.data,
                        operation.shelf,
                        self.epoch,
                        self._sequence,
                    )
                else:
                    self.disk.pop(name, None)
        del self._queue[:count]

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def load(self, kind: str, shelf: Shelf | None = None) -> list[Record]:
        self.flush()
        found = [
            r for r in self.disk.values() if r.kind == kind and shelf in (None, r.shelf)
        ]
        return sorted(found, key=lambda record: record.sequence)

    async def get(self, kind: str, key: str) -> Record | None:
        self.flush()
        return self.disk.get((kind, key))

    def quarantined(self) -> list[tuple[str, str, str]]:
        return self.bad
