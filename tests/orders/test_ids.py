"""Client order ids (R-1)."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightdesk.orders.ids import (
    ClientOrderIds,
    ParsedId,
    highest_sequence,
    is_ours,
    parse,
)


@given(
    epoch=st.integers(0, 36**4 - 1),
    sequence=st.integers(0, 36**9 - 1),
    attempt=st.integers(0, 36**2 - 1),
)
def test_an_id_fits_every_venue_and_says_what_it_was_made_of(
    epoch: int, sequence: int, attempt: int
) -> None:
    made = ClientOrderIds("ab1", epoch, sequence).next(attempt)

    assert re.fullmatch(r"[a-z][a-z0-9]{0,27}", made)
    assert parse(made) == ParsedId("ab1", epoch, sequence, attempt)


def test_no_two_ids_are_equal() -> None:
    ids = ClientOrderIds("ab1", 7, 0)

    assert len({ids.next() for _ in range(1000)}) == 1000


def test_ours_is_told_from_other_desks_and_from_chance() -> None:
    made = ClientOrderIds("ab1", 7, 42).next()

    assert is_ours(made, "ab1")
    assert not is_ours(made, "ab2")
    assert not is_ours(made[:-1] + ("0" if made[-1] != "0" else "1"), "ab1")
    assert not is_ours("ndab1", "ab1")
    assert not is_ours("", "ab1")


def test_the_highest_sequence_is_found_without_reading_every_id() -> None:
    ids = [
        ClientOrderIds("ab1", epoch, n).next()
        for epoch, n in ((9, 5), (1, 40_000), (3, 36**8))
    ]

    assert highest_sequence(ids) == 36**8
    assert highest_sequence([]) == 0


@pytest.mark.parametrize("code", ["", "AB1", "abcd", "a-1"])
def test_a_bad_code_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match="three characters"):
        ClientOrderIds(code, 1, 1)
