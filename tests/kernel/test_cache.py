"""The cache: one flight per key, lifetimes by class, and honest figures."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from nightdesk.kernel.cache import Cache
from nightdesk.simulation.virtual import VirtualLoop

Play = Callable[[Callable[[], Awaitable[Any]]], Any]


@pytest.fixture
def play() -> Iterator[Play]:
    loop = VirtualLoop(1)

    def play(script: Callable[[], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            return await script()

        return loop.run_until_complete(main())

    yield play
    loop.close()


class Loader:
    """Counts its calls and takes a second for each."""

    def __init__(self, takes_s: float = 1.0, fails: int = 0) -> None:
        self.calls = 0
        self.takes_s = takes_s
        self.fails = fails

    async def __call__(self) -> int:
        self.calls += 1
        call = self.calls
        await asyncio.sleep(self.takes_s)
        if call <= self.fails:
            raise ConnectionError(f"call {call}")
        return call


def test_many_who_ask_at_once_share_one_flight(play: Play) -> None:
    cache, load = Cache(), Loader()

    async def script() -> list[Any]:
        return await asyncio.gather(
            *(cache.get("market", "BTC", load) for _ in range(100))
        )

    assert play(script) == [1] * 100
    assert load.calls == 1
    figures = cache.stats()["market"]
    assert (figures["hits"], figures["misses"], figures["entries"]) == (99, 1, 1)
    assert figures["hit_ratio"] == 0.99


@pytest.mark.parametrize(
    ("ttl_class", "ttl_s"), [("market", 5), ("news", 60), ("regime", 300)]
)
def test_a_value_lives_as_long_as_its_class(
    play: Play, ttl_class: str, ttl_s: float
) -> None:
    cache, load = Cache(), Loader(0)

    async def script() -> list[Any]:
        values = [await cache.get(ttl_class, "k", load)]
        await asyncio.sleep(ttl_s - 0.1)
        values.append(await cache.get(ttl_class, "k", load))
        await asyncio.sleep(0.2)
        values.append(await cache.get(ttl_class, "k", load))
        return values

    assert play(script) == [1, 1, 2]


def test_cancelling_the_leader_does_not_cancel_the_others(play: Play) -> None:
    cache, load = Cache(), Loader()

    async def script() -> Any:
        leader = asyncio.create_task(cache.get("market", "k", load))
        await asyncio.sleep(0.1)
        follower = asyncio.create_task(cache.get("market", "k", load))
        await asyncio.sleep(0.1)
        leader.cancel()
        return await follower

    assert play(script) == 1
    assert load.calls == 1


def test_a_failure_reaches_all_who_wait_and_is_not_remembered(play: Play) -> None:
    cache, load = Cache(), Loader(fails=1)

    async def script() -> list[Any]:
        first = await asyncio.gather(
            cache.get("market", "k", load),
            cache.get("market", "k", load),
            return_exceptions=True,
        )
        return [*first, await cache.get_or_load("market", "k", load)]

    first, second, third = play(script)
    assert isinstance(first, ConnectionError)
    assert first is second
    assert third == 2


def test_without_a_loader_an_absent_value_is_none_and_a_miss(play: Play) -> None:
    cache = Cache()

    async def script() -> list[Any]:
        before = await cache.get("news", "k")
        await cache.set("news", "k", "text")
        return [before, await cache.get("news", "k")]

    assert play(script) == [None, "text"]
    figures = cache.stats()["news"]
    assert (figures["hits"], figures["misses"]) == (1, 1)


def test_set_replaces_and_begins_a_new_lifetime(play: Play) -> None:
    cache = Cache()

    async def script() -> list[Any]:
        await cache.set("market", "k", 1)
        await asyncio.sleep(4)
        await cache.set("market", "k", 2)
        await asyncio.sleep(4)
        values = [await cache.get("market", "k")]
        await asyncio.sleep(2)
        return [*values, await cache.get("market", "k")]

    assert play(script) == [2, None]


def test_the_least_recently_used_goes_when_a_class_is_full(play: Play) -> None:
    cache = Cache(max_entries=2)

    async def script() -> list[Any]:
        for key in ("a", "b"):
            await cache.set("market", key, key)
        await cache.get("market", "a")
        await cache.set("market", "c", "c")
        return [await cache.get("market", key) for key in "abc"]

    assert play(script) == ["a", None, "c"]


def test_classes_may_be_added_and_are_named_when_unknown(play: Play) -> None:
    cache = Cache({"fees": 10.0, "market": 1.0})

    async def script() -> Any:
        await cache.set("fees", "k", 1)
        return await cache.get("markt", "k")

    with pytest.raises(
        ValueError, match=r"no cache class .markt.: .*fees, market, news"
    ):
        play(script)
    assert cache.stats()["market"]["ttl_s"] == 1.0


def test_invalidate_and_clear_forget(play: Play) -> None:
    cache = Cache()

    async def script() -> list[Any]:
        await cache.set("market", "k", 1)
        found = [cache.invalidate("market", "k"), cache.invalidate("market", "k")]
        await cache.set("market", "k", 1)
        cache.clear()
        return [*found, await cache.get("market", "k")]

    assert play(script) == [True, False, None]
    assert cache.stats()["market"]["misses"] == 1
