"""Runs cycles: who may run, in which lane, for how long, and that nothing stays behind when it ends.

A pool of persistent workers per priority runs cycles inside themselves. A cycle that does not wait
for anything costs neither an asyncio task nor a timer; the first step of each is sent by hand, so
that a worker knows when a cycle suspends and only then has another worker go on with the rest.

Comes from: kernel/scheduler.py
Goes to: kernel/scheduler.py (finished cycles), tasks/
"""

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import Any

from nightdesk.abc import Clock
from nightdesk.kernel.entries import (
    DONE,
    Entry,
    Outcome,
    Pool,
    Registration,
    Stage,
    Worker,
)
from nightdesk.kernel.locks import KeyQueues
from nightdesk.kernel.loop import OWNER, Lane, lane
from nightdesk.kernel.triggers import Trigger
from nightdesk.model.priority import Priority

__all__ = ["DONE", "Registration", "Runner"]

_SLICE_NS = 70_000  # a worker lets the loop look at its sockets after so long
_GRACE_NS = 2_000_000_000  # from cancelling a cycle until it counts as ignoring that
_SWEEP_GAP_NS = 10_000_000
_IDLE_WORKERS = 16

# Module names, because looking a member up in its enum costs more than the comparison.
_IDLE, _READY, _KEYS, _RUNNING = Stage.IDLE, Stage.READY, Stage.KEYS, Stage.RUNNING


class Runner:
    """Pools of workers, one per priority and one for spare time.

    Args:
        max_concurrent: Cycles under way at once. Each priority below critical leaves a sixteenth
            more of them to the more urgent ones, so that slow background work cannot fill all.
        capacities: Keys that several cycles may hold at once (`group:<name>`).
        on_ran: Called after each good cycle, with everything released: its outcome, and whether it
            never suspended.
        on_failed: The same after a failed one; with None if it was merely cancelled by us.
        on_stuck: Called when a cycle goes on although it was cancelled.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        max_concurrent: int,
        capacities: dict[str, int],
        on_ran: Callable[[Entry, Outcome, bool], None],
        on_failed: Callable[[Entry, BaseException | None, bool], None],
        on_stuck: Callable[[Entry], None],
    ) -> None:
        self._monotonic = clock.monotonic_ns
        self._on_ran = on_ran
        self._on_failed = on_failed
        self._on_stuck = on_stuck
        self.max_concurrent = max_concurrent
        share = max_concurrent // 16
        self.pools = [
            Pool(rank, Lane(rank + 1), max_concurrent - rank * share)
            for rank in range(4)
        ]
        # Continuous tasks: behind everybody else, in the lane that waits longest.
        self.spare = Pool(4, Lane.LOW, max_concurrent - 4 * share)
        self._all = [*self.pools, self.spare]
        self.keys = KeyQueues(self._granted, capacities)
        self.running = 0
        self._waiting_for_keys: dict[str, Entry] = {}
        self._suspended: dict[Worker, None] = {}
        self._zombies: dict[Worker, None] = {}
        self._starved = False
        self._stopping = False
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._sweep_ns = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._workers: dict[Worker, None] = {}

    # --- What the scheduler calls ----------------------------------------------------------------

    def pool_of(self, priority: Priority, trigger: Trigger) -> Pool:
        """Return where a task of this priority and trigger runs."""
        return self.spare if trigger.kind == "continuous" else self.pools[priority.rank]

    def start(self) -> None:
        """Begin to run what is ready, also after a `stop`."""
        self._loop = asyncio.get_running_loop()
        self._stopping = False
        for pool in self._all:
            self._kick(pool)

    def enqueue(self, entry: Entry) -> None:
        """Run `entry` as soon as its keys and a slot are free."""
        entry.stage = _READY
        pool = entry.pool
        pool.ready.append(entry)
        if not pool.awake:
            self._kick(pool)

    def withdraw(self, entry: Entry) -> None:
        """Take an entry that does not run yet out of every queue."""
        if entry.stage is _RUNNING:
            return
        if entry.claims:
            self._waiting_for_keys.pop(entry.id, None)
            self.keys.release(entry.id)
            entry.granted = False
        entry.stage = _IDLE  # its place in the ready queue is skipped

    def cancel(self, entry: Entry) -> bool:
        """Cancel the cycle that `entry` is in; return whether there is one to wait for.

        A cycle that calls this on itself is not cancelled: it is about to end.
        """
        worker = entry.worker
        if worker is None:
            return False
        if worker.awake:
            return worker.task is not asyncio.current_task()
        worker.cancel("stop")
        worker.deadline_ns = self._monotonic() + _GRACE_NS
        self._sweep_at(worker.deadline_ns)
        return True

    def busy(self) -> list[Entry]:
        """Return the entries whose cycle is under way, also those that ignore their cancellation."""
        return [worker.entry for worker in self._workers if worker.entry is not None]

    async def stop(self, timeout_s: float) -> list[str]:
        """Let cycles end for half of `timeout_s`, cancel the rest, and return who still goes on."""
        self._stopping = True
        await self._idle(timeout_s / 2)
        for worker in self._workers:
            if worker.entry is not None and not worker.awake:
                worker.cancel("stop")
        await self._idle(timeout_s / 2)
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        stuck = sorted(entry.id for entry in self.busy())
        resting = [w.task for w in self._workers if w.entry is None]
        for task in resting:
            task.cancel()
        await asyncio.gather(*resting, return_exceptions=True)
        return stuck

    async def _idle(self, timeout_s: float) -> None:
        """Wait until no cycle is under way, at most `timeout_s`.

        Those that have ignored a cancellation already are not waited for: they would ignore this one too.
        """
        assert self._loop is not None
        end = self._loop.time() + timeout_s
        pause = 0.001
        while any(
            w.entry is not None
            and not w.abandoned
            and w.task is not asyncio.current_task()
            for w in self._workers
        ):
            left = end - self._loop.time()
            if left <= 0:
                return
            await asyncio.sleep(min(pause, left))
            pause = min(0.05, pause * 2)

    # --- Waking workers ----------------------------------------------------------------------------

    def _kick(self, pool: Pool) -> None:
        """Have a worker look at `pool`, unless one is about to or no slot is free."""
        if pool.awake or not pool.ready or self._loop is None or self._stopping:
            return
        if self.running >= pool.limit:
            self._starved = True
            return
        pool.awake += 1
        if pool.idle:
            worker = pool.idle.pop()
            worker.awake = True
            assert worker.gate is not None
            if not worker.gate.done():
                worker.gate.set_result(None)
            return
        worker = Worker(pool)
        pool.size += 1
        self._workers[worker] = None
        with lane(pool.lane):
            worker.task = self._loop.create_task(
                self._work(worker), name=f"worker {pool.lane.name.lower()}"
            )
        worker.task.add_done_callback(lambda task: self._worker_ended(worker, task))

    def _serve_starved(self, but: Pool | None = None) -> None:
        """A slot came free, or a worker has nothing to do: the most urgent pool gets its chance first."""
        self._starved = any(pool.ready for pool in self._all)
        for pool in self._all:
            if pool.ready and pool is not but:
                self._kick(pool)

    def _worker_ended(self, worker: Worker, task: asyncio.Task[None]) -> None:
        pool = worker.pool
        pool.size -= 1
        if worker.awake:
            pool.awake -= 1
        if worker in pool.idle:
            pool.idle.remove(worker)
        self._workers.pop(worker, None)
        if task.cancelled():
            return  # with its loop: nobody replaces it
        error = task.exception()
        if isinstance(error, Exception):
            task.get_loop().call_exception_handler(
                {"message": "a worker of the scheduler broke", "exception": error}
            )
        self._kick(pool)

    def _granted(self, owner: str) -> None:
        entry = self._waiting_for_keys.pop(owner)
        entry.granted = True
        entry.stage = _READY
        entry.pool.ready.appendleft(entry)  # it has waited already
        self._kick(entry.pool)

    # --- The workers --------------------------------------------------------------------------------

    async def _work(self, worker: Worker) -> None:
        pool, monotonic = worker.pool, self._monotonic
        spare = pool is self.spare
        now = slice_ns = monotonic()
        while True:
            entry = self._next(pool)
            if entry is None:
                if not await self._rest(worker):
                    return
                now = slice_ns = monotonic()
                continue
            suspended = self._begin(worker, entry, now)
            if suspended is not None:
                await self._go_on(worker, entry, *suspended)
                if worker.abandoned:
                    return
            now = monotonic() if suspended is not None else entry.ended_ns
            if spare or now - slice_ns > _SLICE_NS:
                await asyncio.sleep(0)
                now = slice_ns = monotonic()

    def _next(self, pool: Pool) -> Entry | None:
        """Take the next entry that may run now."""
        ready = pool.ready
        if self._stopping or not ready:
            return None
        if self._starved and any(other.ready for other in self._all[: pool.rank]):
            return None
        while ready:
            if self.running >= pool.limit:
                self._starved = True
                return None
            entry = ready.popleft()
            if entry.stage is not _READY:
                continue  # withdrawn meanwhile
            if entry.claims and not entry.granted:
                if not self.keys.acquire(entry.id, entry.claims, pool.rank):
                    entry.stage = _KEYS
                    self._waiting_for_keys[entry.id] = entry
                    continue
                entry.granted = True
            return entry
        return None

    def _begin(
        self, worker: Worker, entry: Entry, now: int
    ) -> tuple[Coroutine[Any, Any, Outcome], Any] | None:
        """Take the first step of a cycle; return what it waits for, or None if that was all of it."""
        entry.stage = _RUNNING
        entry.worker = worker
        entry.started_ns = now
        worker.entry = entry
        self.running += 1
        OWNER.set(entry.id)
        try:
            coroutine = entry.cycle()
            return coroutine, entry.enter(coroutine.send, None)
        except StopIteration as stop:
            outcome: Outcome = stop.value
        except BaseException as error:
            self._end_badly(worker, entry, error, blocked=True)
            return None
        entry.ended_ns = self._monotonic()
        self._release(worker, entry)
        self._on_ran(entry, outcome, True)
        return None

    async def _go_on(
        self,
        worker: Worker,
        entry: Entry,
        coroutine: Coroutine[Any, Any, Outcome],
        awaited: Any,
    ) -> None:
        """Run the rest of a cycle that suspended."""
        try:
            outcome = await self._drive(worker, entry, coroutine, awaited)
        except GeneratorExit:
            raise  # the loop is gone, and the worker with it
        except BaseException as error:
            self._end_badly(worker, entry, error, blocked=False)
            return
        if worker.cause:
            self._end_badly(worker, entry, None, blocked=False)
            return
        entry.ended_ns = self._monotonic()
        self._release(worker, entry)
        self._on_ran(entry, outcome, False)

    def _end_badly(
        self,
        worker: Worker,
        entry: Entry,
        error: BaseException | None,
        *,
        blocked: bool,
    ) -> None:
        """Release what a failed or cancelled cycle held; `Exception` is for the supervisor to answer,
        the rest goes on upwards from here."""
        entry.ended_ns = self._monotonic()
        failure, upwards = self._sort_out(worker, entry, error)
        self._release(worker, entry)
        self._on_failed(entry, failure, blocked)
        if upwards is not None:
            raise upwards

    def _release(self, worker: Worker, entry: Entry) -> None:
        worker.entry = None
        worker.cause = ""
        entry.worker = None
        entry.stage = _IDLE
        if worker.abandoned:
            self._zombies.pop(worker, None)
        else:
            self.running -= 1
        if entry.granted:
            entry.granted = False
            self.keys.release(entry.id)
        if self._starved:
            self._serve_starved()

    def _sort_out(
        self, worker: Worker, entry: Entry, failure: BaseException | None
    ) -> tuple[BaseException | None, BaseException | None]:
        """Return what the task has to answer for, and what must go on upwards."""
        cause = worker.cause
        cancels, worker.cancels = worker.cancels, 0
        for _ in range(cancels):
            worker.task.uncancel()
        if cause == "timeout":
            limit = entry.timeout_ns / 1e9
            error = TimeoutError(f"a cycle took longer than its timeout of {limit:g} s")
            if failure is not None and not isinstance(failure, asyncio.CancelledError):
                error.__cause__ = failure
            return error, None
        if isinstance(failure, asyncio.CancelledError):
            if cause == "stop":
                return None, None
            if worker.task.cancelling():
                return None, failure  # the whole worker is cancelled, with its loop
            # Nobody cancelled the worker: the cycle let the cancellation of something else out.
            leak = RuntimeError("something that the cycle awaited was cancelled")
            leak.__cause__ = failure
            return leak, None
        if failure is not None and not isinstance(failure, Exception):
            return failure, failure
        return (None if cause == "stop" else failure), None

    @types.coroutine
    def _drive(
        self,
        worker: Worker,
        entry: Entry,
        coroutine: Coroutine[Any, Any, Outcome],
        awaited: Any,
    ) -> Generator[Any, Any, Outcome]:
        """Go on with a cycle that suspended, handing each thing it waits for to the event loop."""
        pool, enter = worker.pool, entry.enter
        self._suspended[worker] = None
        if entry.timeout_ns:
            worker.deadline_ns = entry.started_ns + entry.timeout_ns
            self._sweep_at(worker.deadline_ns)
        else:
            worker.deadline_ns = 0
        try:
            while True:
                pool.awake -= 1
                worker.awake = False
                if pool.ready:
                    self._kick(pool)
                try:
                    value = yield awaited
                except GeneratorExit:
                    coroutine.close()
                    raise
                except BaseException as error:
                    pool.awake += 1
                    worker.awake = True
                    awaited = enter(coroutine.throw, error)
                else:
                    pool.awake += 1
                    worker.awake = True
                    awaited = enter(coroutine.send, value)
        except StopIteration as stop:
            outcome: Outcome = stop.value
            return outcome
        finally:
            self._suspended.pop(worker, None)

    async def _rest(self, worker: Worker) -> bool:
        """Wait to be woken; False if there are enough who wait."""
        pool = worker.pool
        pool.awake -= 1
        worker.awake = False
        enough = len(pool.idle) >= _IDLE_WORKERS or self._stopping
        if not enough:
            assert self._loop is not None
            worker.gate = self._loop.create_future()
            pool.idle.append(worker)
        if self._starved:
            self._serve_starved(but=pool)
        if enough or worker.gate is None:
            return False
        OWNER.set("")
        await worker.gate
        return True

    # --- Timeouts -----------------------------------------------------------------------------------

    def _sweep_at(self, when_ns: int) -> None:
        if self._sweep_timer is not None:
            if self._sweep_ns <= when_ns:
                return
            self._sweep_timer.cancel()
        assert self._loop is not None
        self._sweep_ns = when_ns
        delay_s = max(0, when_ns - self._monotonic()) / 1e9
        # The desk's own lane: closing or crowding a lane must not lift the timeouts in it.
        self._sweep_timer = self._loop.call_later(
            delay_s, self._sweep, context=Context()
        )

    def _sweep(self) -> None:
        """Cancel the cycles that are over their time, and give up those that ignored that."""
        self._sweep_timer = None
        now = self._monotonic()
        for worker in list(self._suspended):
            if not worker.deadline_ns or worker.deadline_ns > now + 50_000:
                continue
            if worker.cause:
                self._abandon(worker)
            else:
                worker.cancel("timeout")
                worker.deadline_ns = now + _GRACE_NS
        deadlines = [w.deadline_ns for w in self._suspended if w.deadline_ns]
        if deadlines and not self._stopping:
            self._sweep_at(max(min(deadlines), now + _SWEEP_GAP_NS))

    def _abandon(self, worker: Worker) -> None:
        """Take the slot back. The keys stay held: the cycle still runs, and may still act on them."""
        entry = worker.entry
        worker.deadline_ns = 0
        if entry is None or worker.abandoned:
            return
        worker.abandoned = True
        self._zombies[worker] = None
        self.running -= 1
        self._on_stuck(entry)
        if self._starved:
            self._serve_starved()

    def stats(self) -> dict[str, int]:
        """Return how many cycles run, are ready, wait for keys, or ignore their cancellation."""
        return {
            "running": self.running,
            "ready": sum(len(pool.ready) for pool in self._all),
            "waiting_for_keys": len(self._waiting_for_keys),
            "workers": len(self._workers),
            "stuck": len(self._zombies),
        }
