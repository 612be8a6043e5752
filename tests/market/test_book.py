"""A book is only as good as its proof that no message is missing."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.paper import D, book
from nightdesk.market.book import Book
from nightdesk.model.events import BookChanged
from nightdesk.model.order import Side


def test_changes_before_the_snapshot_wait_for_it() -> None:
    kept = Book()

    kept.apply(book([("99", "1")], [], 5, 8))
    kept.apply(book([("98", "2")], [], 9, 12))
    kept.apply(book([("97", "3")], [("101", "1")], 1, 10, True))

    assert kept.synchronised
    assert list(kept.levels(Side.BUY)) == [(D(98), D(2)), (D(97), D(3))]
    assert kept.best(Side.SELL) == (D(101), D(1))


def test_a_missing_message_closes_the_book_until_the_next_snapshot() -> None:
    kept = Book()
    kept.apply(book([("99", "1")], [("101", "1")], 1, 10, True))

    kept.apply(book([("98", "1")], [], 12, 13))

    assert (kept.synchronised, kept.gaps, kept.best(Side.BUY)) == (False, 1, None)
    kept.apply(book([("97", "1")], [], 14, 15))
    kept.apply(book([("96", "1")], [], 1, 13, True))
    assert list(kept.levels(Side.BUY)) == [(D(97), D(1)), (D(96), D(1))]


def test_an_older_snapshot_and_older_changes_are_ignored() -> None:
    kept = Book()
    kept.apply(book([("99", "1")], [], 1, 10, True))

    assert not kept.apply(book([("98", "1")], [], 8, 10))
    assert not kept.apply(book([("97", "1")], [], 1, 9, True))
    assert list(kept.levels(Side.BUY)) == [(D(99), D(1))]


def test_a_feed_without_sequences_is_taken_as_it_comes() -> None:
    kept = Book()
    kept.apply(book([("99", "1")], [], snapshot=True))

    assert kept.apply(book([("99", "0"), ("98", "5")], []))
    assert list(kept.levels(Side.BUY)) == [(D(98), D(5))]


def test_the_worst_levels_leave_a_full_book() -> None:
    kept = Book(depth=2)
    kept.apply(
        book(
            [("97", "1"), ("98", "1"), ("99", "1")],
            [("101", "1"), ("102", "1"), ("103", "1")],
            snapshot=True,
        )
    )

    assert [p for p, _ in kept.levels(Side.BUY)] == [D(99), D(98)]
    assert [p for p, _ in kept.levels(Side.SELL, worse_than=D(101))] == [D(102)]


def deltas(count: int) -> list[BookChanged]:
    return [
        book([(str(90 + n % 7), str(n % 5))], [(str(110 + n % 6), str(n % 4))], n, n)
        for n in range(1, count + 1)
    ]


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 30))
def test_a_mangled_stream_gives_the_clean_book_or_says_that_it_has_a_gap(
    random: object, snapshot_at: int
) -> None:
    """Duplicates and late repeats change nothing; loss is seen, and a snapshot repairs it (F13)."""
    clean, mangled = Book(), Book()
    start = book([("95", "9")], [("105", "9")], 0, 0, True)
    stream = deltas(30)
    clean.apply(start)
    states = [BookChanged(symbol="", venue="", bids=[], asks=[], last_sequence=0)]
    for change in stream:
        clean.apply(change)
        states.append(
            BookChanged(
                symbol="",
                venue="",
                bids=list(clean.levels(Side.BUY)),
                asks=list(clean.levels(Side.SELL)),
                last_sequence=change.last_sequence,
                is_snapshot=True,
            )
        )
    received = [c for c in stream for _ in range(random.choice((0, 1, 1, 1, 2)))]  # type: ignore[attr-defined]
    mangled.apply(start)
    for change in received:
        mangled.apply(change)

    lost = {c.last_sequence for c in stream} - {c.last_sequence for c in received}
    seen_loss = any(
        number < max((c.last_sequence for c in received), default=0) for number in lost
    )
    assert (mangled.gaps > 0) is seen_loss
    mangled.apply(states[30])
    assert list(mangled.levels(Side.BUY)) == list(clean.levels(Side.BUY))
    assert list(mangled.levels(Side.SELL)) == list(clean.levels(Side.SELL))
