"""The paper venue's statement on disk: JSON lines, appended, never rewritten.

A batch of rows is one write, so `kill -9` leaves at most one torn line, which is cut at the next
start. A line that cannot be read anywhere else means that acknowledged rows are damaged.

Comes from: venues/paper.py
Goes to: venues/paper.py
"""

import fcntl
import os
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from nightdesk.errors import StateDamagedError, StateLockedError, StateNotWritableError
from nightdesk.model.order import OrderStatus, Side
from nightdesk.model.statement import Ended, Placed, Refused, StatementRow, Traded

__all__ = ["OrderSummary", "StatementFile", "read_rows", "read_statement", "summarise"]

_decoder = msgspec.json.Decoder(StatementRow)
_encoder = msgspec.json.Encoder()
_NOTHING = Decimal(0)


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

    def open(self) -> list[StatementRow]:
        """Take the file, cut a torn tail, and return what it holds.

        Raises:
            StateLockedError: Another venue writes it.
            StateDamagedError: A line before the last cannot be read.
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
        rows = _decode(self.path, data[:whole])
        if whole < len(data):
            os.ftruncate(self._descriptor, whole)
        return rows

    def append(self, rows: Sequence[StatementRow]) -> None:
        """Write `rows` with one system call.

        Raises:
            StateNotWritableError: They may be missing from the file, whole or in part.
        """
        assert self._descriptor is not None, "the statement is not open"
        data = _encoder.encode_lines(rows)
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
    """Return the rows of a statement, without a torn last line; also while a venue writes it."""
    data = path.read_bytes()
    return _decode(path, data[: data.rfind(b"\n") + 1])


def read_statement(path: Path) -> list[dict[str, Any]]:
    """Return the rows as plain mappings; money stays text, exactly as written."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    rows: list[dict[str, Any]] = [
        msgspec.json.decode(line) for line in whole.splitlines()
    ]
    return rows


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


def _decode(path: Path, data: bytes) -> list[StatementRow]:
    rows: list[StatementRow] = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            rows.append(_decoder.decode(line))
        except msgspec.MsgspecError as error:
            raise StateDamagedError(
                str(path),
                f"line {number} cannot be read ({error})",
                "Restore it from a backup, or move the file away to start this paper venue anew.",
            ) from error
    return rows
