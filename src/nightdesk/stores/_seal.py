"""The checksum that every record carries, and the ready awaitables of synchronous saves."""

from collections.abc import Generator
from hashlib import blake2b

from nightdesk.abc import Shelf

__all__ = ["READY", "SEAL_MASK", "Failed", "Ready", "seal"]

SEAL_MASK = (1 << 48) - 1


def seal(
    kind: str, key: str, shelf: Shelf | str, data: bytes, epoch: int, sequence: int
) -> int:
    """Return the checksum of one whole record: BLAKE2b cut to 48 bits.

    Wider than a CRC-32, because the stores add the checksums of all records up to notice
    a record that vanished, and in hashlib, so that it costs no dependency (2 us per KiB).
    48 bits, so that SQLite can sum 32,768 of them without overflow.
    """
    head = f"{kind}\0{key}\0{shelf}\0{epoch}\0{sequence}\0".encode(
        "utf-8", "surrogatepass"
    )
    return int.from_bytes(blake2b(head + data, digest_size=6).digest(), "little")


class Ready:
    """An awaitable that is done: what a synchronous save returns."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


class Failed:
    """An awaitable that raises `error`: a save whose failure was known at once."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __await__(self) -> Generator[None, None, None]:
        raise self.error
        yield


READY = Ready()
