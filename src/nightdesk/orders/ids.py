"""Client order ids (R-1): ours, unique for ever, recognisable at the venue, legal everywhere.

`nd` + desk (3) + boot epoch (4) + sequence (9) + attempt (2) + check (4), all of `[a-z0-9]`, 24 characters.

Comes from: orders/protocol.py
Goes to: venues/
"""

from collections.abc import Iterable
from hashlib import blake2s

import msgspec

__all__ = ["ClientOrderIds", "ParsedId", "highest_sequence", "is_ours", "parse"]

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_PREFIX = "nd"
_LENGTH = 24


class ParsedId(msgspec.Struct, frozen=True):
    code: str
    epoch: int
    sequence: int
    attempt: int


class ClientOrderIds:
    """Makes ids. The sequence goes on from the journal and the epoch differs per start, so none returns.

    Args:
        code: Three characters of `[a-z0-9]` that tell this desk's orders from another's.
        epoch: Of this start.
        next_sequence: One more than the highest in the journal.
    """

    def __init__(self, code: str, epoch: int, next_sequence: int = 1) -> None:
        if len(code) != 3 or any(letter not in _DIGITS for letter in code):
            raise ValueError(
                f"desk code is {code!r}, expected three characters of a-z and 0-9"
            )
        self.code = code
        self._head = f"{_PREFIX}{code}{_base36(epoch % 36**4, 4)}"
        self._sequence = next_sequence

    def next(self, attempt: int = 0) -> str:
        """Return a new id."""
        body = f"{self._head}{_base36(self._sequence, 9)}{_base36(min(attempt, 36**2 - 1), 2)}"
        self._sequence += 1
        return body + _check(body)


def is_ours(client_order_id: str, code: str) -> bool:
    """Return whether an order seen at a venue was sent by this desk, in this or an earlier life."""
    parsed = parse(client_order_id)
    return parsed is not None and parsed.code == code


def parse(client_order_id: str) -> ParsedId | None:
    """Return the parts of one of our ids; None for anything else."""
    body, check = client_order_id[:-4], client_order_id[-4:]
    if (
        len(client_order_id) != _LENGTH
        or not body.startswith(_PREFIX)
        or check != _check(body)
    ):
        return None
    try:
        return ParsedId(
            body[2:5], int(body[5:9], 36), int(body[9:18], 36), int(body[18:20], 36)
        )
    except ValueError:
        return None


def highest_sequence(client_order_ids: Iterable[str]) -> int:
    """Return the highest sequence in ids of our own, 0 if there is none.

    The digits of a sequence sort as its number does, so only one of them is read.
    """
    return int(max((cid[9:18] for cid in client_order_ids), default="0"), 36)


def _base36(number: int, width: int) -> str:
    digits = ""
    while number:
        number, rest = divmod(number, 36)
        digits = _DIGITS[rest] + digits
    return digits.rjust(width, "0")


def _check(body: str) -> str:
    digest = int.from_bytes(blake2s(body.encode(), digest_size=4).digest())
    return _base36(digest % 36**4, 4)
