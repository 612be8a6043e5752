"""Collection by plan: rarely, in the lowest lane, and back to automatic at the end."""

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest

from nightdesk.kernel.loop import in_lanes, new_event_loop
from nightdesk.kernel.memory import Collector
from nightdesk.simulation.virtual import VirtualLoop


@pytest.fixture(autouse=True)
def automatic_again() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_it_takes_the_place_of_automatic_collection_and_gives_it_back() -> None:
    loop = new_event_loop()
    collector = Collector(loop)

    collector.start()
    assert not gc.isenabled()
    assert gc.get_freeze_count() > 0
    collector.stop()
    collector.stop()
    loop.close()

    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_cycles_are_freed_although_automatic_collection_is_off() -> None:
    """Under the virtual clock a collection takes no time, so one is due at each look."""
    loop = in_lanes(VirtualLoop)(1)
    collector = Collector(loop, look_s=1.0)

    class Node:
        freed = 0
        other: Any

        def __del__(self) -> None:
            Node.freed += 1

    async def main() -> None:
        collector.start()
        for _ in range(100):
            node = Node()
            node.other = node
        del node
        assert Node.freed == 0
        await asyncio.sleep(20)
        collector.stop()

    loop.run_until_complete(main())
    loop.close()

    assert Node.freed == 100
    assert collector.stats()["collections"] in (19, 20)


def test_a_slow_collection_is_followed_by_a_pause_that_keeps_its_share() -> None:
    class SlowlyCollecting(VirtualLoop):
        """Each question for the time costs 5 ms, so that a collection seems to take them."""

        slow = False

        def time(self) -> float:
            if self.slow:
                self._now_ns += 5_000_000
            return super().time()

    loop = SlowlyCollecting(1)
    collector = Collector(loop, share=0.001, look_s=1.0)

    async def main() -> None:
        loop.slow = True
        collector.start()
        collector._collect()
        loop.slow = False
        before = collector.stats()["collections"]
        await asyncio.sleep(4)
        assert collector.stats()["collections"] == before
        await asyncio.sleep(3)
        assert collector.stats()["collections"] > before
        collector.stop()

    loop.run_until_complete(main())
    loop.close()

    assert collector.stats()["worst_ms"] == 5.0


def test_many_new_objects_do_not_wait_for_their_share() -> None:
    loop = VirtualLoop(1)
    collector = Collector(loop, max_young=1_000)

    async def main() -> None:
        collector.start()
        collector._due_s = 1e9
        kept = [[] for _ in range(5_000)]
        await asyncio.sleep(1.5)
        collector.stop()
        assert len(kept) == 5_000

    loop.run_until_complete(main())
    loop.close()

    assert collector.stats()["collections"] == 1
