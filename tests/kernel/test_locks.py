"""Keys are taken all or none, in one order for all, and always come back."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nightdesk.kernel.locks import KeyQueues


def queues(**capacities: int) -> tuple[KeyQueues, list[str]]:
    granted: list[str] = []
    return KeyQueues(granted.append, capacities), granted


def test_a_free_key_is_taken_at_once() -> None:
    keys, _ = queues()

    assert keys.acquire("a", ("x", "y"))
    assert keys.holders("x") == keys.holders("y") == ("a",)
    assert keys.holders("z") == ()


def test_the_next_in_order_of_priority_then_arrival_gets_the_key() -> None:
    keys, granted = queues()
    keys.acquire("holder", ("x",))
    keys.acquire("low", ("x",), rank=3)
    keys.acquire("normal-1", ("x",), rank=2)
    keys.acquire("normal-2", ("x",), rank=2)
    keys.acquire("critical", ("x",), rank=0)

    for owner in ("holder", "critical", "normal-1", "normal-2"):
        keys.release(owner)

    assert granted == ["critical", "normal-1", "normal-2", "low"]


def test_a_request_for_two_keys_takes_both_or_none() -> None:
    keys, granted = queues()
    keys.acquire("a", ("x",))

    assert not keys.acquire("both", ("y", "x"))
    assert keys.holders("y") == ()

    keys.release("a")
    assert granted == ["both"]
    assert keys.holders("y") == ("both",)


def test_a_request_for_two_busy_keys_is_not_overtaken_for_ever() -> None:
    keys, granted = queues()
    keys.acquire("x1", ("x",))
    keys.acquire("both", ("x", "y"))

    assert not keys.acquire("y1", ("y",))
    assert keys.why("y1") == "waits for y behind both"
    assert keys.why("both") == "waits for x held by x1"

    keys.release("x1")
    keys.release("both")
    assert granted == ["both", "y1"]
    assert keys.why("y1") == ""


def test_who_gives_up_waiting_lets_the_next_pass() -> None:
    keys, granted = queues()
    keys.acquire("x1", ("x",))
    keys.acquire("both", ("x", "y"))
    keys.acquire("y1", ("y",))

    keys.release("both")

    assert granted == ["y1"]


def test_a_key_of_capacity_two_is_held_by_two() -> None:
    keys, granted = queues(group=2)

    assert keys.acquire("a", ("group",))
    assert keys.acquire("b", ("group",))
    assert not keys.acquire("c", ("group",))

    keys.release("a")
    assert granted == ["c"]


def test_releasing_nothing_is_harmless() -> None:
    keys, granted = queues()

    keys.release("nobody")

    assert (granted, keys.waiting, keys.held) == ([], 0, 0)


@given(st.lists(st.text("xyz", min_size=1, max_size=3), min_size=1, max_size=30))
def test_everybody_gets_a_turn(requests: list[str]) -> None:
    """No deadlock: as long as holders release, every request is granted."""
    keys, granted = queues()
    active = []
    for number, wanted in enumerate(requests):
        if keys.acquire(str(number), tuple(wanted), rank=number % 4):
            active.append(str(number))

    done = 0
    while active or granted:
        active += granted
        granted.clear()
        keys.release(active.pop(0))
        done += 1

    assert done == len(requests)
    assert (keys.waiting, keys.held, keys._keys) == (0, 0, {})


class Exclusive(RuleBasedStateMachine):
    """Any sequence of requests, releases and withdrawals keeps every key with one holder at most."""

    def __init__(self) -> None:
        super().__init__()
        self.holding: dict[str, set[str]] = {}
        self.waiting: dict[str, set[str]] = {}
        self.queues = KeyQueues(self.granted, {"wide": 2})
        self.count = 0

    def granted(self, owner: str) -> None:
        self.holding[owner] = self.waiting.pop(owner)

    @rule(
        names=st.sets(st.sampled_from(["a", "b", "c", "wide"]), min_size=1),
        rank=st.integers(0, 3),
    )
    def request(self, names: set[str], rank: int) -> None:
        self.count += 1
        owner = f"o{self.count}"
        if self.queues.acquire(owner, tuple(names), rank):
            self.holding[owner] = names
        else:
            self.waiting[owner] = names

    @rule(pick=st.integers(0, 100))
    def release(self, pick: int) -> None:
        if self.holding:
            owner = sorted(self.holding)[pick % len(self.holding)]
            del self.holding[owner]
            self.queues.release(owner)

    @rule(pick=st.integers(0, 100))
    def withdraw(self, pick: int) -> None:
        if self.waiting:
            owner = sorted(self.waiting)[pick % len(self.waiting)]
            del self.waiting[owner]
            self.queues.release(owner)

    @invariant()
    def no_key_has_too_many_holders(self) -> None:
        for key in ("a", "b", "c", "wide"):
            holders = [o for o, names in self.holding.items() if key in names]
            assert len(holders) <= (2 if key == "wide" else 1)
            assert sorted(self.queues.holders(key)) == sorted(holders)

    @invariant()
    def nobody_waits_for_free_keys_alone(self) -> None:
        assert not self.waiting or self.holding
        assert self.queues.waiting == len(self.waiting)
        assert self.queues.held == len(self.holding)


TestExclusive = Exclusive.TestCase
