"""What several tasks look up is fetched once: values by class of freshness, one flight per key.

The flights, the lifetimes and the bound are async-lru's: a caller that is cancelled leaves the
flight to the others who wait for it, and a loader that fails is not remembered.

Comes from: desk.py
Goes to: tasks/
"""

from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Any, TypeVar

from async_lru import alru_cache

__all__ = ["DEFAULT_TTLS_S", "Cache"]

T = TypeVar("T")
Loader = Callable[[], Awaitable[T]]

DEFAULT_TTLS_S: Mapping[str, float] = {"market": 5.0, "news": 60.0, "regime": 300.0}


class Cache:
    """A cache for the desk's process. Lifetimes follow the event loop's clock, also a virtual one.

    Args:
        ttls_s: Class to lifetime in seconds; adds to and overrides market 5, news 60, regime 300.
        max_entries: Bound of each class; the least recently used entry goes first.
    """

    def __init__(
        self, ttls_s: Mapping[str, float] | None = None, *, max_entries: int = 4096
    ) -> None:
        self._ttls_s = {**DEFAULT_TTLS_S, **(ttls_s or {})}
        self._max_entries = max_entries
        self._absent = dict.fromkeys(self._ttls_s, 0)
        self._shelves = {name: self._shelf(ttl) for name, ttl in self._ttls_s.items()}

    async def get(
        self, ttl_class: str, key: Hashable, loader: Loader[T] | None = None
    ) -> T | None:
        """Return the value of `key`, calling `loader` if there is none or it is too old.

        However many ask at once, one call of the loader is under way per key, and all get its
        value or its exception.

        Args:
            loader: Without one, a missing value is None and counts as a miss.

        Raises:
            ValueError: No such class.
            Exception: Whatever the loader raises.
        """
        shelf = self._of(ttl_class)
        if loader is None:
            if not shelf.cache_contains(key, None):
                self._absent[ttl_class] += 1
                return None
            loader = _never
        value: T = await shelf(key, loader)
        return value

    async def get_or_load(self, ttl_class: str, key: Hashable, loader: Loader[T]) -> T:
        """Return the value of `key`: `get` with a loader, and a result that is never None by absence."""
        value: T = await self._of(ttl_class)(key, loader)
        return value

    async def set(self, ttl_class: str, key: Hashable, value: Any) -> None:
        """Replace the value of `key`; its lifetime begins now."""
        shelf = self._of(ttl_class)
        shelf.cache_invalidate(key, None)

        async def ready() -> Any:
            return value

        await shelf(key, ready)
        self._absent[ttl_class] -= 1  # putting a value in is not a miss

    def invalidate(self, ttl_class: str, key: Hashable) -> bool:
        """Forget `key`; return whether it was there."""
        return bool(self._of(ttl_class).cache_invalidate(key, None))

    def clear(self) -> None:
        """Forget every value and every figure."""
        for shelf in self._shelves.values():
            shelf.cache_clear()
        self._absent = dict.fromkeys(self._ttls_s, 0)

    def stats(self) -> dict[str, dict[str, float]]:
        """Return per class: ttl_s, hits, misses, hit_ratio, entries, max_entries."""
        figures = {}
        for name, shelf in self._shelves.items():
            info = shelf.cache_info()
            misses = info.misses + self._absent[name]
            asked = info.hits + misses
            figures[name] = {
                "ttl_s": self._ttls_s[name],
                "hits": info.hits,
                "misses": misses,
                "hit_ratio": info.hits / asked if asked else 0.0,
                "entries": info.currsize,
                "max_entries": self._max_entries,
            }
        return figures

    def _of(self, ttl_class: str) -> Any:
        shelf = self._shelves.get(ttl_class)
        if shelf is None:
            raise ValueError(
                f"no cache class {ttl_class!r}: expected one of {', '.join(sorted(self._shelves))}"
            )
        return shelf

    def _shelf(self, ttl_s: float) -> Any:
        # The loader is an argument, not part of the key: otherwise each caller's closure would
        # be a key of its own and nothing would ever hit.
        @alru_cache(maxsize=self._max_entries, ttl=ttl_s, key=lambda key, loader: key)
        async def load(key: Hashable, loader: Loader[Any]) -> Any:
            return await loader()

        return load


async def _never() -> Any:
    raise AssertionError("the value was there a moment ago, and nothing ran since")
