"""The switch: drops the background within a slice when an opportunity comes, and takes it up again after.

    stamp -> close the lanes -> swap the changed contexts and hand them to the store -> run the handler -> reopen

Comes from: kernel/inbox.py
Goes to: tasks/ (opportunity handlers), stores/, telemetry/
"""

import asyncio
from bisect import insort
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from contextvars import Context, copy_context
from typing import Any, Literal, Protocol

from nightdesk.abc import Batch, Clock, Observer
from nightdesk.kernel.loop import LANE, OWNER, Lane, run_in_desk_lane
from nightdesk.model.events import Opportunity
from nightdesk.model.health import SwitchTrace

__all__ = ["Handle", "Switch", "SwitchLoop"]

Handle = Callable[[Opportunity], Awaitable[None]]
Durability = Literal["sync", "async"]

_SECOND_NS = 1_000_000_000
_MAX_RECEIPT_AGE_NS = 60 * _SECOND_NS
_KEPT_TRACES = 1024
_NOT_DURABLE = (
    "contexts parked by the switch are not durable; the opportunity is handled"
)


class SwitchLoop(Protocol):
    """What the switch needs of the loop beyond asyncio; `kernel.loop.LaneLoop` has it."""

    @property
    def queued(self) -> int: ...

    def close_lanes(self) -> None: ...

    def open_lanes(self) -> None: ...

    def create_task(
        self, coro: Any, *, name: str, context: Context
    ) -> asyncio.Task[None]: ...

    def call_soon(
        self, callback: Any, *args: Any, context: Context
    ) -> asyncio.Handle: ...

    def call_later(
        self, delay: float, callback: Any, *args: Any
    ) -> asyncio.TimerHandle: ...

    def call_exception_handler(self, context: dict[str, Any]) -> None: ...


class _Run:
    """One opportunity on its way through the switch, with its stamps in monotonic nanoseconds."""

    closed_ns = snapshot_ns = handler_ns = done_ns = reopened_ns = 0
    parked = 0
    outcome = "handled"
    holds = True
    saved: "asyncio.Future[None] | None" = None
    task: "asyncio.Task[None]"
    timers: tuple[asyncio.TimerHandle, ...] = ()

    def __init__(
        self,
        opportunity: Opportunity,
        handle: Handle,
        received_ns: int,
        decided_ns: int,
    ) -> None:
        self.opportunity = opportunity
        self.handle = handle
        self.received_ns = received_ns
        self.decided_ns = decided_ns


class _Standby:
    """The task of a handler's next run, made before it is needed, that `go` steps at once.

    A task that is made when the opportunity comes starts an iteration of the loop later, behind
    whatever else is ready; and making it costs as much as the rest of the switch. This one already
    waits, for this object, which behaves towards it as a future does. Its steps are ordinary
    steps of a task: `asyncio.timeout`, `current_task` and cancellation work from the first line.
    """

    _asyncio_future_blocking = False

    def __init__(
        self,
        loop: SwitchLoop,
        name: str,
        drive: Callable[["_Standby"], Coroutine[Any, Any, None]],
    ) -> None:
        self._loop = loop
        self._run: _Run | None = None
        self._wakeup: Callable[[_Standby], None] | None = None
        self._context = copy_context()
        self._context.run(LANE.set, Lane.DESK)
        self._context.run(OWNER.set, name)
        self.task = loop.create_task(drive(self), name=name, context=self._context)

    def go(self, run: _Run) -> None:
        """Hand `run` to the task and let it take its first step before this returns."""
        self._run = run
        run.task = self.task
        wakeup, self._wakeup = self._wakeup, None
        if (
            wakeup is None
        ):  # made in this very iteration: it takes `run` when it gets here
            return
        loop: Any = self._loop
        outer = asyncio.current_task(loop)
        if outer is None:
            self._context.run(wakeup, self)
            return
        asyncio.tasks._leave_task(loop, outer)
        try:
            self._context.run(wakeup, self)
        finally:
            asyncio.tasks._enter_task(loop, outer)

    # The part of a future, as a task sees it.

    def __await__(self) -> Generator[Any, None, _Run]:
        if self._run is None:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    def result(self) -> _Run:
        if self._run is None:
            raise asyncio.CancelledError
        return self._run

    def get_loop(self) -> SwitchLoop:
        return self._loop

    def add_done_callback(
        self, wakeup: Callable[["_Standby"], None], *, context: Context
    ) -> None:
        self._wakeup = wakeup

    def cancel(self, msg: object = None) -> bool:
        wakeup, self._wakeup = self._wakeup, None
        if wakeup is None:
            return False
        self._loop.call_soon(wakeup, self, context=self._context)
        return True


class Switch:
    """Lets opportunities in before everything else.

    The handler's first step runs inside `on_opportunity`, as a task of the desk's lane: no iteration of
    the loop, and so no other socket or timer, comes between the event and its first line. With `async`
    durability the store gets the contexts after that step, so that an intent which the step saves is the first
    to be durable, and waking the store's thread costs the opportunity nothing.

    Args:
        snapshot: Returns the contexts that changed, already encoded; it only swaps a pointer.
        save: Hands a batch to the store; awaited when it is durable.
        durability: `sync` makes the handler wait until the parked contexts are durable.
        max_park_s: A handler that takes longer goes on while the background runs in its gaps.
        queue_limit: Opportunities that may wait; when full, the one with the least edge is dropped.
        park, resume: Tell background hosts. `park` is called after the handler's first step, and only
            if the handler then waits for something.
        timeout_s: A handler that takes longer is cancelled, and no longer waited for.
        max_handlers: Handlers that may be under way at once.

    Attributes:
        traces: The last switches, oldest first.
    """

    def __init__(
        self,
        loop: SwitchLoop,
        clock: Clock,
        *,
        snapshot: Callable[[], Batch] = tuple,
        save: Callable[[Batch], Awaitable[None]] | None = None,
        durability: Durability = "async",
        max_park_s: float = 0.05,
        queue_limit: int = 256,
        observers: Iterable[Observer] = (),
        park: Callable[[], None] | None = None,
        resume: Callable[[], None] | None = None,
        timeout_s: float = 30.0,
        max_handlers: int = 1,
    ) -> None:
        self.traces: deque[SwitchTrace] = deque(maxlen=_KEPT_TRACES)
        self.park = park
        self.resume = resume
        self._loop = loop
        self._clock = clock
        self._now_ns = clock.now_ns
        self._stamp = clock.monotonic_ns
        self._snapshot = snapshot
        self._save = save
        self._durability: Durability = durability
        self._waits_for_save = durability == "sync"
        self._max_park_s = max_park_s
        self._queue_limit = queue_limit
        self._observers = tuple(observers)
        self._timeout_s = timeout_s
        self._max_handlers = max_handlers
        self._handlers: dict[str, Handle] = {}
        self._standbys: dict[str, _Standby] = {}
        self._active: list[_Run] = []
        self._waiting: list[_Run] = []
        self._ended: list[_Run] = []
        self._serving = False
        self._outcomes: Counter[str] = Counter()
        self._dropped = 0
        self._hosts_parked = False
        self._stopping = False

    def set_handler(self, name: str, handle: Handle) -> None:
        """Run `handle` for the opportunities that the inbox raises in this name. Call it in the loop's thread."""
        self._handlers[name] = handle
        if name not in self._standbys:
            self._stand_by(name)

    def remove_handler(self, name: str) -> None:
        """Forget a handler; what waits for it is dropped and counted."""
        self._handlers.pop(name, None)
        standby = self._standbys.pop(name, None)
        if standby is not None:
            standby.task.cancel()
        kept = [run for run in self._waiting if run.opportunity.handler != name]
        self._dropped += len(self._waiting) - len(kept)
        self._waiting = kept

    def _stand_by(self, name: str) -> None:
        self._standbys[name] = _Standby(self._loop, name, self._drive)

    # --- In -------------------------------------------------------------------------------------

    def on_opportunity(self, opportunity: Opportunity) -> None:
        """Act on `opportunity` now, or when the handler under way has ended."""
        if LANE.get():
            run_in_desk_lane(self.on_opportunity, opportunity)
            return
        decided_ns = self._stamp()
        now_ns = self._now_ns()
        handle = self._handlers.get(opportunity.handler)
        if handle is None or self._stopping:
            self._dropped += 1
            return
        # Receipt is stamped in UTC, like all events; the trace counts in monotonic time.
        age_ns = now_ns - opportunity.ts_received_ns
        received_ns = (
            decided_ns - age_ns if 0 <= age_ns < _MAX_RECEIPT_AGE_NS else decided_ns
        )
        run = _Run(opportunity, handle, received_ns, decided_ns)
        if len(self._active) < self._max_handlers:
            self._begin(run, now_ns)
            return
        insort(self._waiting, run, key=_edge)
        if len(self._waiting) > self._queue_limit:
            del self._waiting[0]
            self._dropped += 1

    def _begin(self, run: _Run, now_ns: int) -> None:
        if now_ns > run.opportunity.deadline_ns:
            self._refuse(run)
            return
        loop, stamp = self._loop, self._stamp
        loop.close_lanes()
        run.closed_ns = stamp()
        batch: Batch = ()
        try:
            batch = self._snapshot()
        except Exception as error:
            self._report(
                "switch",
                error,
                "contexts were not saved at this switch; the opportunity is handled",
            )
        if batch and self._waits_for_save:
            run.saved = self._hand_over(batch)
        run.snapshot_ns = stamp()
        self._active.append(run)
        try:
            self._standbys[run.opportunity.handler].go(run)
        finally:
            if batch and not self._waits_for_save:
                self._hand_over(batch)
            self._after_first_step(run)

    def _after_first_step(self, run: _Run) -> None:
        run.parked = self._loop.queued
        self._stand_by(run.opportunity.handler)
        if run.task.done():
            self._end(run)
            return
        run.task.add_done_callback(lambda _: self._end(run))
        run.timers = (
            self._loop.call_later(self._max_park_s, self._let_go, run),
            self._loop.call_later(self._timeout_s, self._give_up, run),
        )
        if self.park is not None and not self._hosts_parked:
            self._hosts_parked = True
            self._call(self.park)

    def _hand_over(self, batch: Batch) -> "asyncio.Future[None] | None":
        """Give the contexts to the store. A failure is reported, and does not cost the opportunity."""
        if self._save is None:
            return None
        try:
            saved = asyncio.ensure_future(self._save(batch))
        except Exception as error:
            self._report("switch", error, _NOT_DURABLE)
            return None
        saved.add_done_callback(self._after_save)
        return saved

    def _after_save(self, saved: "asyncio.Future[None]") -> None:
        if not saved.cancelled() and (error := saved.exception()) is not None:
            self._report("switch", error, _NOT_DURABLE)

    async def _drive(self, standby: _Standby) -> None:
        run = await standby
        try:
            if run.saved is not None:
                await asyncio.shield(run.saved)
                if self._now_ns() > run.opportunity.deadline_ns:
                    run.outcome = "late"
                    return
            run.handler_ns = self._stamp()
            await run.handle(run.opportunity)
        except asyncio.CancelledError:
            if run.outcome == "handled":
                run.outcome = "failed"
            raise
        except Exception as error:
            run.outcome = "failed"
            self._report(
                run.opportunity.handler,
                error,
                "this opportunity is given up; the background goes on",
            )
        finally:
            run.done_ns = run.done_ns or self._stamp()

    # --- Out ------------------------------------------------------------------------------------

    def _let_go(self, run: _Run) -> None:
        """The handler waits for the network: let the background run in the gaps."""
        run.holds = False
        self._reopen_unless_held()
        run.reopened_ns = self._stamp()

    def _give_up(self, run: _Run) -> None:
        run.outcome = "timeout"
        run.done_ns = self._stamp()
        run.task.cancel()
        # A handler that swallows the cancellation must not keep the next opportunity waiting.
        self._end(run)

    def _end(self, run: _Run) -> None:
        if run not in self._active:
            return
        self._active.remove(run)
        self._ended.append(run)
        for timer in run.timers:
            timer.cancel()
        run.holds = False
        self._serve_next()

    def _serve_next(self) -> None:
        """Begin what waits, best edge first; the lanes stay closed from one to the next."""
        if self._serving:  # a handler without any wait ends inside `_begin`, below
            return
        self._serving = True
        try:
            while self._waiting and len(self._active) < self._max_handlers:
                self._begin(self._waiting.pop(), self._now_ns())
        finally:
            self._serving = False
        self._reopen_unless_held()
        ended, self._ended = self._ended, []
        for run in ended:
            self._record(run)

    def _refuse(self, run: _Run) -> None:
        run.outcome = "late"
        run.closed_ns = run.snapshot_ns = run.handler_ns = run.done_ns = (
            run.reopened_ns
        ) = self._stamp()
        self._record(run)

    def _reopen_unless_held(self) -> None:
        if any(run.holds for run in self._active):
            return
        self._loop.open_lanes()
        if self._hosts_parked:
            self._hosts_parked = False
            if self.resume is not None:
                self._call(self.resume)

    # --- Reports --------------------------------------------------------------------------------

    def _record(self, run: _Run) -> None:
        opportunity = run.opportunity
        done_ns = run.done_ns or self._stamp()
        trace = SwitchTrace(
            handler=opportunity.handler,
            key=_key(opportunity),
            edge_ppm=opportunity.edge_ppm,
            received_ns=run.received_ns,
            decided_ns=run.decided_ns,
            closed_ns=run.closed_ns,
            snapshot_ns=run.snapshot_ns,
            handler_ns=run.handler_ns or done_ns,
            done_ns=done_ns,
            reopened_ns=run.reopened_ns or self._stamp(),
            parked=run.parked,
            outcome=run.outcome,
            durability=self._durability,
            ts_event_ns=opportunity.ts_event_ns,
        )
        self.traces.append(trace)
        self._outcomes[run.outcome] += 1
        for observer in self._observers:
            self._call(observer.on_switch, trace)

    def _report(self, name: str, error: BaseException, consequence: str) -> None:
        for observer in self._observers:
            self._call(observer.on_task_failed, name, error, consequence)

    def _call(self, hook: Callable[..., object], *args: object) -> None:
        """Call what others gave us; its failure is told to the loop's exception handler and goes no further."""
        try:
            hook(*args)
        except Exception as error:
            self._loop.call_exception_handler(
                {"message": f"the switch's hook {hook!r} failed", "exception": error}
            )

    def stats(self) -> dict[str, Any]:
        """Return counts by outcome, and percentiles of `switch_us` over the kept traces that reached their handler."""
        reached = sorted(t.switch_us for t in self.traces if t.outcome != "late")
        return {
            "switches": sum(self._outcomes.values()),
            "outcomes": dict(self._outcomes),
            "dropped": self._dropped,
            "waiting": len(self._waiting),
            "active": [run.opportunity.handler for run in self._active],
            "p50_us": _percentile(reached, 0.5),
            "p99_us": _percentile(reached, 0.99),
            "p999_us": _percentile(reached, 0.999),
            "max_us": reached[-1] if reached else 0.0,
        }

    async def stop(self, timeout_s: float = 5.0) -> None:
        """Take no more opportunities, wait for the handlers under way, and cancel what is left."""
        self._stopping = True
        self._dropped += len(self._waiting)
        self._waiting.clear()
        tasks = [run.task for run in self._active]
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=timeout_s)
            for task in left:
                task.cancel()
        for standby in self._standbys.values():
            standby.task.cancel()
        self._loop.open_lanes()


def _edge(run: _Run) -> int:
    return run.opportunity.edge_ppm


def _key(opportunity: Opportunity) -> str:
    """Return what the opportunity is about, as an operator would say it."""
    cause = opportunity.cause
    symbol = (
        getattr(cause, "symbol", None)
        or getattr(cause, "pair", None)
        or type(cause).__name__
    )
    place = getattr(cause, "venue", None) or getattr(cause, "chain", None)
    return f"{symbol}@{place}" if place else str(symbol)


def _percentile(ordered: list[float], share: float) -> float:
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
