"""The paper venue's statement on disk: JSON lines, appended, never rewritten.

A batch of rows is one write, so `kill -9` leaves at most one torn line, which is cut at the next
start. Each line ends in a checksum over it and all before it: money may never change, vanish or move
in silence because a byte did.

Comes from: venues/paper.py
Goes to: venues/paper.py
"""

import fcntl
import os
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from nightdesk.errors import StateDamagedError, StateLockedError, StateNotWritableError
from nightdesk.model.order import OrderStatus, Side
from nightdesk.model.statement import Ended, Placed, Refused, StatementRow, Traded

__all__ = ["OrderSummary", "StatementFile", "read_rows", "read_statement", "summarise"]

_decoder = msgspec.json.Decoder(StatementRow)
_encoder = msgspec.json.Encoder()
_NOTHING = Decimal(0)
_SEAL = b',"crc":'


class OrderSummary(msgspec.Struct, kw_only=True):
    """What the statement says of one client order id.

    `placed` above 1 means that the id was accepted twice; `refused` lists the codes of other tries.
    """

    client_order_id: str
    symbol: str = ""
    side: Side | None = None
    quantity: Decimal = _NOTHING
    filled: Decimal = _NOTHING
    cost: Decimal = _NOTHING
    fees: dict[str, Decimal] = {}
    placed: int = 0
    fills: int = 0
    status: OrderStatus = OrderStatus.REJECTED
    refused: list[str] = []

    @property
    def average_price(self) -> Decimal | None:
        return self.cost / self.filled if self.filled else None


class StatementFile:
    """One open statement, owned by one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._chain = 0

    def open(self) -> list[StatementRow]:
        """Take the file, cut a torn tail, and return what it holds.

        Raises:
            StateLockedError: Another venue writes it.
            StateDamagedError: A line is not what was written.
            StateNotWritableError: It cannot be opened for writing.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise StateNotWritableError(
                str(self.path), f"cannot be opened ({error})", _SPACE
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise StateLockedError(str(self.path.parent), None, "", "") from error
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        lines, self._chain = _checked(self.path, data[:whole])
        rows = _decode(self.path, lines)
        if whole < len(data):
            os.ftruncate(self._descriptor, whole)
        return rows

    def append(self, rows: Sequence[StatementRow]) -> None:
        """Write `rows` with one system call.

        Raises:
            StateNotWritableError: They may be missing from the file, whole or in part.
        """
        assert self._descriptor is not None, "the statement is not open"
        lines, chain = [], self._chain
        for row in rows:
            line, chain = _sealed(_encoder.encode(row), chain)
            lines.append(line)
        data = b"".join(lines)
        self._chain = chain
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise StateNotWritableError(
                str(self.path), f"cannot be written ({error})", _SPACE
            ) from error

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_SPACE = "Check space and rights of its directory, then start the venue again: it goes on from what the file holds."


def read_rows(path: Path) -> list[StatementRow]:
    """Return the rows of a statement, without a torn last line; also while a venue writes it.

    Raises:
        StateDamagedError: A line is not what was written.
    """
    return _decode(path, _lines_of(path))


def read_statement(path: Path) -> list[dict[str, Any]]:
    """Return the rows as plain mappings; money stays text, exactly as written.

    Raises:
        StateDamagedError: A line is not what was written.
    """
    return [msgspec.json.decode(line) for line in _lines_of(path)]


def _lines_of(path: Path) -> list[bytes]:
    data = path.read_bytes()
    return _checked(path, data[: data.rfind(b"\n") + 1])[0]


def _sealed(line: bytes, chain: int) -> tuple[bytes, int]:
    """Return `line` as it stands in the file, with the checksum up to here, and that checksum."""
    chain = crc32(line, chain)
    return b"%s%s%d}\n" % (line[:-1], _SEAL, chain), chain


def _checked(path: Path, data: bytes) -> tuple[list[bytes], int]:
    """Return the lines as they were before they were sealed, and the last checksum."""
    lines: list[bytes] = []
    chain = 0
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        bare = line.rpartition(_SEAL)[0] + b"}"
        sealed, chain = _sealed(bare, chain)
        if sealed[:-1] != line:
            raise _damaged(path, number, "its checksum does not fit")
        lines.append(bare)
    return lines, chain


def summarise(rows: Iterable[StatementRow]) -> dict[str, OrderSummary]:
    """Return, per client order id, what the venue says became of it."""
    summaries: dict[str, OrderSummary] = {}
    for row in rows:
        if isinstance(row, Traded):
            _add_fill(summaries[row.fill.client_order_id], row)
        elif isinstance(row, (Placed, Refused, Ended)):
            known = summaries.setdefault(
                row.client_order_id,
                OrderSummary(client_order_id=row.client_order_id, symbol=row.symbol),
            )
            if isinstance(row, Placed):
                known.placed += 1
                known.side = row.side
                known.quantity += row.quantity
                known.status = OrderStatus.ACCEPTED
            elif isinstance(row, Refused):
                known.refused = [*known.refused, row.code]
            else:
                known.status = row.status
    return summaries


def _add_fill(known: OrderSummary, row: Traded) -> None:
    fill = row.fill
    known.fills += 1
    known.filled += fill.quantity
    known.cost += fill.quantity * fill.price
    known.fees = {
        **known.fees,
        fill.fee_asset: known.fees.get(fill.fee_asset, _NOTHING) + fill.fee,
    }
    known.status = (
        OrderStatus.FILLED
        if known.filled >= known.quantity
        else OrderStatus.PARTIALLY_FILLED
    )


def _decode(path: Path, lines: Iterable[bytes]) -> list[StatementRow]:
    rows: list[StatementRow] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _damaged(path, number, str(error)) from error
    return rows


def _damaged(path: Path, number: int, found: str) -> StateDamagedError:
    return StateDamagedError(
        str(path),
        f"line {number} cannot be read ({found})",
        "Restore it from a backup, or move the file away to start this paper venue anew.",
    )
