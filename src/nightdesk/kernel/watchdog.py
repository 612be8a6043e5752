"""A thread that notices when the loop stands still, and names who holds it (R-24).

Comes from: kernel/loop.py
Goes to: telemetry/, alerts/
"""

import sys
import threading
import traceback
from collections.abc import Callable
from typing import Protocol

import msgspec

from nightdesk.abc import Clock
from nightdesk.kernel.clock import SystemClock, cpu_time_ns
from nightdesk.kernel.loop import run_in_desk_lane

__all__ = ["Offender", "Watchdog", "WatchedLoop"]

OnStall = Callable[[str, float, str], None]

_MS = 1_000_000
_SECOND_NS = 1_000_000_000
_MAX_OFFENDERS = 256
_STACK_LIMIT = 40


class WatchedLoop(Protocol):
    """What the watchdog needs of the loop; `kernel.loop.LaneLoop` has it."""

    def call_later(
        self, delay: float, callback: Callable[[], None]
    ) -> "_Cancellable": ...

    def current_owner(self) -> str: ...


class _Cancellable(Protocol):
    def cancel(self) -> None: ...


class Offender(msgspec.Struct):
    """What is known of one owner that held the loop."""

    count: int = 0
    worst_s: float = 0.0
    last_stack: str = ""


class Watchdog:
    """Reports each stall of the loop once, while it lasts.

    The loop writes a stamp every `interval_s`; the thread compares. When the thread itself overslept, the
    process was paused (a debugger, a suspended machine), which is nobody's fault, or native code
    held the interpreter so that the thread could not run either. The two differ in the processor time
    that went by meanwhile.

    Args:
        lag_ms: Report a stall beyond this.
        degraded_s: A stall beyond this marks the desk degraded, for as long as it lasts and `recovery_s` more.
        on_stall: Called with owner, lag in seconds and stack, **in the watchdog's thread**.
        cpu_ns: Processor time of this process.

    Attributes:
        offenders: Owner to what it did; "" is code that belongs to no task.
        stalls: Stalls reported so far.
    """

    def __init__(
        self,
        loop: WatchedLoop,
        *,
        lag_ms: float = 250.0,
        degraded_s: float = 1.0,
        recovery_s: float = 60.0,
        interval_s: float = 0.05,
        on_stall: OnStall | None = None,
        clock: Clock | None = None,
        cpu_ns: Callable[[], int] = cpu_time_ns,
    ) -> None:
        self.offenders: dict[str, Offender] = {}
        self.stalls = 0
        self.pauses = 0
        self._loop = loop
        self._lag_ns = round(lag_ms * _MS)
        self._degraded_ns = round(degraded_s * _SECOND_NS)
        self._recovery_ns = round(recovery_s * _SECOND_NS)
        self._interval_s = interval_s
        self._interval_ns = round(interval_s * _SECOND_NS)
        self._on_stall = on_stall
        self._stamp = (clock or SystemClock()).monotonic_ns
        self._cpu_ns = cpu_ns
        self._beat_ns = 0
        self._looked_ns = 0
        self._looked_cpu_ns = 0
        self._forgiven_ns = 0
        self._degraded_until_ns = 0
        self._reported: Offender | None = None
        self._loop_thread = 0
        self._timer: _Cancellable | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch; call it in the loop's thread."""
        self.attach()
        self._ended.clear()
        self._thread = threading.Thread(
            target=self._watch, name="nightdesk-watchdog", daemon=True
        )
        self._thread.start()

    def attach(self) -> None:
        """Take this thread for the loop's and begin the heartbeat, without a thread that watches."""
        self._loop_thread = threading.get_ident()
        self._looked_ns = self._stamp()
        self._looked_cpu_ns = self._cpu_ns()
        run_in_desk_lane(self._beat)  # a parked heartbeat would look like a stall

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)
        self._thread = None

    @property
    def degraded(self) -> bool:
        """Whether the loop stood still for longer than `degraded_s`, now or a short while ago."""
        return self._stamp() < self._degraded_until_ns

    def _beat(self) -> None:
        self._beat_ns = self._stamp()
        self._timer = self._loop.call_later(self._interval_s, self._beat)

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            self.look()

    def look(self) -> None:
        """Compare the heartbeat with the time: what the thread does every `interval_s`."""
        now_ns, cpu_ns = self._stamp(), self._cpu_ns()
        overslept_ns = now_ns - self._looked_ns - self._interval_ns
        worked_ns = cpu_ns - self._looked_cpu_ns
        self._looked_ns, self._looked_cpu_ns = now_ns, cpu_ns
        if overslept_ns > self._lag_ns:
            if worked_ns * 2 > overslept_ns:
                self._note(
                    overslept_ns,
                    "(native code held the interpreter; the stack is what followed)\n",
                )
            else:
                self.pauses += 1
            self._forgiven_ns = now_ns
            return
        lag_ns = now_ns - max(self._beat_ns, self._forgiven_ns) - self._interval_ns
        if lag_ns > self._lag_ns:
            self._note(lag_ns)
        else:
            self._reported = None

    def _note(self, lag_ns: int, remark: str = "") -> None:
        if lag_ns > self._degraded_ns:
            self._degraded_until_ns = self._stamp() + self._recovery_ns
        lag_s = lag_ns / _SECOND_NS
        if self._reported is not None:  # the same stall goes on
            self._reported.worst_s = max(self._reported.worst_s, lag_s)
            return
        owner = self._loop.current_owner()
        stack = remark + self._stack()
        if owner not in self.offenders and len(self.offenders) >= _MAX_OFFENDERS:
            owner = "(others)"
        offender = self.offenders.setdefault(owner, Offender())
        offender.count += 1
        offender.worst_s = max(offender.worst_s, lag_s)
        offender.last_stack = stack
        self.stalls += 1
        # A stall that is over when it is noticed leaves nothing to follow.
        self._reported = None if remark else offender
        if self._on_stall is not None:
            self._on_stall(owner, lag_s, stack)

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._loop_thread)
        if frame is None:
            return "(the loop's thread has ended)\n"
        return "".join(traceback.format_stack(frame, limit=_STACK_LIMIT))
