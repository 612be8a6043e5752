"""Keys: cycles that touch the same instrument never overlap, and no lock object exists.

A key is a queue on a single-threaded loop. All keys of a request are taken in one step or none
is, and the order among requests (priority, then arrival) is the same at every key: the first request
of that order is first in each of its queues, so it only waits for holders, and a circle cannot form.

Comes from: kernel/runner.py
Goes to: kernel/runner.py (the owners that may run now)
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping

__all__ = ["KeyQueues"]


class _Request:
    __slots__ = ("keys", "order", "owner")

    def __init__(
        self, owner: str, keys: tuple[str, ...], order: tuple[int, int]
    ) -> None:
        self.owner = owner
        self.keys = keys
        self.order = order


class _Key:
    """Who holds one key and who waits for it, first come first."""

    __slots__ = ("capacity", "holders", "orders", "requests")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.holders: dict[str, None] = {}
        self.orders: list[tuple[int, int]] = []
        self.requests: dict[tuple[int, int], _Request] = {}

    def admits(self, order: tuple[int, int]) -> bool:
        """Return whether a request waiting at `order` may take this key now.

        Everyone ahead keeps a place, even one who still waits for another key: otherwise a
        request for two busy keys could wait for ever.
        """
        ahead = bisect_left(self.orders, order)
        return ahead < self.capacity - len(self.holders)

    def enqueue(self, request: _Request) -> None:
        insort(self.orders, request.order)
        self.requests[request.order] = request

    def withdraw(self, request: _Request) -> None:
        del self.orders[bisect_left(self.orders, request.order)]
        del self.requests[request.order]


class KeyQueues:
    """Grants keys to owners: each key to one at a time, or to as many as its capacity says.

    Args:
        on_granted: Called with an owner that had to wait, once it holds all its keys.
        capacities: Keys that several may hold at once, such as a group's share of the slots.
    """

    def __init__(
        self,
        on_granted: Callable[[str], None],
        capacities: Mapping[str, int] | None = None,
    ) -> None:
        self._on_granted = on_granted
        self._capacities = dict(capacities or {})
        self._keys: dict[str, _Key] = {}
        self._held: dict[str, tuple[str, ...]] = {}
        self._waiting: dict[str, _Request] = {}
        self._arrivals = 0

    def acquire(self, owner: str, keys: tuple[str, ...], rank: int = 0) -> bool:
        """Take all `keys` for `owner` at once, or queue for all of them.

        Args:
            rank: Urgency; the lower number goes first, and equal numbers in order of arrival.

        Returns:
            True if `owner` holds them now. False: `on_granted` will tell.
        """
        assert owner not in self._held and owner not in self._waiting, owner
        self._arrivals += 1
        request = _Request(owner, tuple(sorted(set(keys))), (rank, self._arrivals))
        if all(self._key(name).admits(request.order) for name in request.keys):
            self._hold(request)
            return True
        self._waiting[owner] = request
        for name in request.keys:
            self._key(name).enqueue(request)
        return False

    def release(self, owner: str) -> None:
        """Give back what `owner` holds, or end its wait. Harmless if it does neither."""
        keys = self._held.pop(owner, None)
        if keys is None:
            request = self._waiting.pop(owner, None)
            if request is None:
                return
            keys = request.keys
            for name in keys:
                self._keys[name].withdraw(request)
        else:
            for name in keys:
                del self._keys[name].holders[owner]
        self._grant(keys)

    def why(self, owner: str) -> str:
        """Return what `owner` waits for, in words: `waits for BTC/USDT@paper held by sell-btc`."""
        request = self._waiting.get(owner)
        if request is None:
            return ""
        for name in request.keys:
            key = self._keys[name]
            if not key.admits(request.order):
                if key.holders:
                    return f"waits for {name} held by {', '.join(key.holders)}"
                ahead = key.requests[key.orders[0]].owner
                return f"waits for {name} behind {ahead}"
        return "may run now"

    def holders(self, key: str) -> tuple[str, ...]:
        """Return the owners that hold `key`."""
        found = self._keys.get(key)
        return tuple(found.holders) if found is not None else ()

    @property
    def waiting(self) -> int:
        """Owners in the queues."""
        return len(self._waiting)

    @property
    def held(self) -> int:
        """Owners that hold at least one key."""
        return len(self._held)

    def _key(self, name: str) -> _Key:
        key = self._keys.get(name)
        if key is None:
            key = self._keys[name] = _Key(self._capacities.get(name, 1))
        return key

    def _hold(self, request: _Request) -> None:
        self._held[request.owner] = request.keys
        for name in request.keys:
            self._keys[name].holders[request.owner] = None

    def _grant(self, names: tuple[str, ...]) -> None:
        # One pass is enough: a grant turns a kept place into a held one, which frees nothing more.
        first_in_line: dict[tuple[int, int], _Request] = {}
        for name in names:
            key = self._keys[name]
            free = max(0, key.capacity - len(key.holders))
            for order in key.orders[:free]:
                first_in_line[order] = key.requests[order]
            if not key.holders and not key.orders:
                del self._keys[
                    name
                ]  # keys come and go with instruments; do not collect them
        granted = []
        for _, request in sorted(first_in_line.items()):
            if all(self._keys[name].admits(request.order) for name in request.keys):
                del self._waiting[request.owner]
                for name in request.keys:
                    self._keys[name].withdraw(request)
                self._hold(request)
                granted.append(request.owner)
        for owner in granted:
            self._on_granted(owner)
