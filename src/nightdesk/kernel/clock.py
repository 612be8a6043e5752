"""The one place that asks the machine what time it is (R-27).

Comes from: kernel/loop.py
Goes to: kernel/inbox.py, kernel/switch.py
"""

import asyncio
import time

__all__ = ["SystemClock", "cpu_time_ns", "monotonic_s"]

# What `loop.time()` returns: bound here so that no other room imports `time`.
monotonic_s = time.monotonic
cpu_time_ns = time.process_time_ns


class SystemClock:
    """The machine's clock; its monotonic side is the one the event loop counts by."""

    now_ns = staticmethod(time.time_ns)
    monotonic_ns = staticmethod(time.monotonic_ns)

    async def sleep(self, seconds: float) -> None:
        """Rest for `seconds`; 0 lets every other ready callback run once."""
        await asyncio.sleep(seconds)
