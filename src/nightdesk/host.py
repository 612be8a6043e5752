"""A background host: the process in which background tasks run, with the handle they would have in the desk.

Started by the desk as `python -m nightdesk.host --fd N ...`; it lives no longer than its desk does.

Comes from: kernel/hosts.py
Goes to: kernel/runner.py, tasks/
"""

import argparse
import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import random
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from pathlib import Path
from typing import Any

import msgspec

from nightdesk import loading
from nightdesk.abc import Batch, Clock, Observer, Put, Task
from nightdesk.config import Config, TaskEntry
from nightdesk.contexts import Checkpoints
from nightdesk.errors import (
    CapacityError,
    NewerSchemaError,
    NightdeskError,
    RecordCorruptError,
)
from nightdesk.kernel._child import die_with, make_idle
from nightdesk.kernel._pulse import HostLoop, Pulse, new_host_loop
from nightdesk.kernel._remote import DeskLine, ForwardingHandler, RemoteDesk
from nightdesk.kernel._wire import (
    AddTasks,
    Answer,
    Ask,
    Failure,
    Finished,
    Frame,
    Happened,
    HealthChanged,
    Hello,
    HostedTask,
    Placement,
    Refused,
    Reported,
    Saved,
    SavedContext,
    Setup,
    Stop,
    Stopped,
    Subscribe,
    Succeeded,
    decode,
    decode_event,
    encode,
)
from nightdesk.kernel.clock import SystemClock
from nightdesk.kernel.hours import Calendars
from nightdesk.kernel.loop import Lane, lane
from nightdesk.kernel.runner import DONE, Registration
from nightdesk.kernel.scheduler import Scheduler
from nightdesk.model.context import FINAL_STATES
from nightdesk.model.events import Event, QuoteChanged
from nightdesk.model.health import TaskHealth
from nightdesk.model.priority import Priority
from nightdesk.model.schedule import Schedule
from nightdesk.model.serializer import decode_context

__all__ = ["Host", "main"]

_BEAT_S = 0.05
_PARK_POLL_S = 0.001
_IMPORT_S = 30
_REPORT_S = 1.0
_REPORTS_PER_S = 2000
_REPORTS_PER_FRAME = 100
_BUSY_BYTES = 1024 * 1024
_MAX_THREADS = 4
_NOTHING = msgspec.Raw(encode(None))
_STAND_IN = "elsewhere:"

Work = Callable[[], Coroutine[Any, Any, Any]]


class _Resident:
    """A task that lives here; `task` is None for a plain function."""

    def __init__(self, number: int, spec: HostedTask) -> None:
        self.number, self.spec = number, spec
        self.id = spec.task_id
        self.task: Task[Any] | None = None


class Host(Observer):
    """The child's side: takes tasks from the desk, runs them, reports.

    Args:
        sock: Our end of the socket to the desk.
        pulse: The shared page.
        numbers: Task id to number, the same mapping that `pulse` looks into.
    """

    setup: Setup
    scheduler: Scheduler

    def __init__(
        self,
        loop: HostLoop,
        sock: socket.socket,
        pulse: Pulse,
        numbers: dict[str, int],
        clock: Clock | None = None,
    ) -> None:
        self._clock: Clock = clock or SystemClock()
        self._loop = loop
        self._pulse = pulse
        self._numbers = numbers
        self._types: dict[str, Any] = {}
        self._residents: dict[str, _Resident] = {}
        self._listening: list[tuple[type[Event], _Resident]] = []
        self._arrivals: deque[Placement] = deque()
        self._held_back: list[Registration] = []
        self._admitting: asyncio.Task[None] | None = None
        self._pending: dict[str, Put] = {}
        self._reported: dict[str, bytes] = {}
        self._is_parked = False
        self._is_stopping = False
        self._ended = asyncio.Event()
        self._checkpoints = Checkpoints(self._clock, self._send_contexts)
        self.line = DeskLine(
            loop,
            sock,
            self._clock,
            on_frame=self._on_frame,
            on_order=self._wake,
            on_closed=self._ended.set,
            on_drained=self._send_pending,
        )

    # --- life ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until the desk says stop, or is gone."""
        self._beat()
        self.line.send(Hello(os.getpid()))
        reporting = self.line.chore(self._report_often())
        await self._ended.wait()
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)
        self.line.close()

    def _beat(self) -> None:
        self._pulse.beat()
        if not self._ended.is_set():
            self._loop.call_later(_BEAT_S, self._beat, context=Context())

    def on_parked(self) -> None:
        """The desk needs the machine: run no task until it says so, or its word runs out."""
        if not self._is_parked:
            self._is_parked = True
            self._loop.close_lanes()
            self._stay_parked()

    def _stay_parked(self) -> None:
        if self._pulse.parked_until_ns > self._clock.monotonic_ns():
            self._loop.call_later(_PARK_POLL_S, self._stay_parked, context=Context())
        else:
            self._is_parked = False
            self._loop.open_lanes()

    def stop_soon(self, timeout_s: float = 5.0) -> None:
        """End gracefully: let cycles end, save, say who would not."""
        if not self._is_stopping:
            self._is_stopping = True
            self.line.chore(self._stop(timeout_s))

    async def _stop(self, timeout_s: float) -> None:
        if self._admitting is not None:
            self._admitting.cancel()
        stuck: list[str] = []
        if hasattr(self, "scheduler"):
            stuck = await self.scheduler.stop(timeout_s * 0.7)
        ending = [r for r in self._residents.values() if r.id not in stuck]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s * 0.2):
                await asyncio.gather(*map(self._end_task, ending))
        self._send_contexts_now()
        self.line.send(Stopped(stuck))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s * 0.1):
                await self.line.drained()
        self._ended.set()

    async def _end_task(self, resident: _Resident) -> None:
        if resident.task is None:
            return
        try:
            await resident.task.stop()
        except Exception as error:
            self.on_task_failed(resident.id, error, "ignored: it is being stopped")
        self.checkpoint(resident)

    # --- what the desk sends ---------------------------------------------------------------------

    def _on_frame(self, frame: Frame) -> None:
        match frame:
            case Setup():
                self._on_setup(frame)
            case AddTasks():
                self._on_add(frame)
            case Happened():
                self._on_happened(frame)
            case Succeeded():
                self._on_succeeded(frame)
            case Ask():
                self.line.chore(self._answer(frame))
            case Stop():
                self.stop_soon(frame.timeout_s)

    def _on_setup(self, frame: Setup) -> None:
        self.setup = frame
        self.line.seed = frame.seed
        self.line.wants_debug = frame.log_level == "debug"
        self._config = Config(search_path=frame.search_path, seed=frame.seed)
        self.scheduler = Scheduler(
            clock=self._clock,
            random=random.Random(f"{frame.seed}:host"),
            calendars=Calendars(cache_dir=Path(frame.directory) / "calendars"),
            observers=(self,),
            max_concurrent=frame.max_concurrent,
            on_change=self._on_health_changed,
            place="background",
        )

    def _on_happened(self, frame: Happened) -> None:
        for raw in frame.events:
            event = decode_event(raw)
            if isinstance(event, QuoteChanged):
                self.line.take_quotes([event])
            self.scheduler.on_event_type(type(event).__name__)
            for kind, resident in self._listening:
                if isinstance(event, kind):
                    self._offer(resident, event)

    def _offer(self, resident: _Resident, event: Event) -> None:
        assert resident.task is not None
        try:
            with self._pulse.owned(resident.number):
                wanted = resident.task.wants(event)
        except Exception as error:
            consequence = "its `wants` raised; the event did not wake it"
            self.on_task_failed(resident.id, error, consequence)
        else:
            if wanted:
                self._wake(resident.id)

    def _wake(self, task_id: str) -> None:
        if self.scheduler.knows(task_id):
            self.scheduler.wake(task_id)

    def _on_succeeded(self, frame: Succeeded) -> None:
        for name in frame.names:
            self._wake(_stand_in(name))
        for name in frame.gone:
            if self.scheduler.knows(_stand_in(name)):
                self.line.chore(self.scheduler.remove(_stand_in(name)))

    async def _answer(self, ask: Ask) -> None:
        try:
            body = await self._carry_out(ask.verb, ask.task_id, decode(ask.body))
        except Exception as error:
            self.line.send(Answer(ask.number, _NOTHING, Failure.of(error)))
        else:
            self.line.send(Answer(ask.number, msgspec.Raw(encode(body))))

    async def _carry_out(self, verb: str, task_id: str, body: Any) -> Any:
        if self._admitting is not None:
            await asyncio.wait([self._admitting])  # it may be about to arrive
        match verb:
            case "remove":
                return await self._remove(task_id)
            case "adjust":
                return self.scheduler.adjust(task_id, **loading.adjustments(body))
            case "explain":
                return self._explain(task_id)
            case "pause" | "resume" | "trigger" | "start" | "stop":
                method = {"start": "start_task", "stop": "stop_task"}.get(verb, verb)
                return getattr(self.scheduler, method)(task_id)
        raise NightdeskError(f"a background host cannot {verb!r}")

    def _explain(self, task_id: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "next_run_words": self.scheduler.next_run_in_words(task_id)
        }
        resident = self._residents.get(task_id)
        if resident is not None and resident.task is not None:
            found["context"] = msgspec.to_builtins(resident.task.context, enc_hook=str)
        return found

    # --- tasks come and go -----------------------------------------------------------------------

    def _on_add(self, frame: AddTasks) -> None:
        self._arrivals.extend(frame.tasks)
        if self._admitting is None or self._admitting.done():
            self._admitting = self.line.chore(self._admit())

    async def _admit(self) -> None:
        await self.scheduler.start()
        while self._arrivals:
            placement = self._arrivals[0]
            registration = self._build(placement)
            if registration is not None:
                await self.line.subscribe(registration.keys)
                self._register(registration, placement.task)
            self._arrivals.popleft()
            await asyncio.sleep(0)
        held, self._held_back = self._held_back, []
        for registration in held:
            self._register(registration, self._residents[registration.task_id].spec)

    def _build(self, placement: Placement) -> Registration | None:
        spec = placement.task
        self._numbers[spec.task_id] = placement.number
        self.line.orders[spec.task_id] = {
            o.client_order_id: o for o in placement.orders
        }
        try:
            with self._pulse.owned(placement.number, grace_s=_IMPORT_S):
                return self._registration(placement)
        except Exception as error:
            self._refuse(spec, error)
            return None

    def _refuse(self, spec: HostedTask, error: Exception) -> None:
        """Nothing of it ran, and nothing of it stays."""
        is_context = isinstance(error, RecordCorruptError | NewerSchemaError)
        self._forget(spec.task_id)
        text = f"{type(error).__name__}: {error}"[:4000]
        self.line.send(Refused(spec.task_id, text, is_context))

    def _registration(self, placement: Placement) -> Registration | None:
        """Make the task, and what the scheduler must know of it; None if it has ended before."""
        spec = placement.task
        target = self._types.get(spec.type)
        if target is None:
            target = self._types[spec.type] = loading.load_task(spec.type, self._config)
        resident = _Resident(placement.number, spec)
        self._residents[spec.task_id] = resident
        desk = RemoteDesk(self.line, spec.task_id, lambda: self.checkpoint(resident))
        if spec.schedule is not None and spec.schedule.on:
            self.line.send(Subscribe(list(spec.schedule.on)))
        if not (isinstance(target, type) and issubclass(target, Task)):
            cycle = loading.function_cycle(target, desk, spec.params)
            return self._registered(placement, resident, cycle)
        task = target(self._context_of(target, spec))
        task.context = task.context.evolve(task_id=spec.task_id)
        task.desk = desk
        resident.task = task
        if task.context.state in FINAL_STATES:
            self._finish(resident, _ended_before(spec))
            return None
        for kind in task.listens:
            self._listening.append((kind, resident))
        if task.listens:
            self.line.send(Subscribe([kind.__name__ for kind in task.listens]))
        self.checkpoint(resident)
        return self._registered(
            placement, resident, lambda: self._cycle(resident, task), task
        )

    def _registered(
        self,
        placement: Placement,
        resident: _Resident,
        cycle: Callable[[], Any],
        task: Task[Any] | None = None,
    ) -> Registration:
        spec = placement.task
        foreign = placement.foreign
        return Registration(
            task_id=spec.task_id,
            type=spec.type,
            cycle=self._owned(resident, cycle),
            start=self._owned(resident, task.start) if task else None,
            schedule=spec.schedule,
            priority=Priority.parse(
                spec.priority or (task.priority if task else "normal")
            ),
            keys=task.keys() if task else (),
            group=spec.group,
            after=tuple(_stand_in(n) if n in foreign else n for n in spec.after),
            timeout_s=spec.timeout_s,
            runs_in="background",
            on_final=lambda health: self._finish(resident, health),
        )

    def _context_of(self, kind: type[Task[Any]], spec: HostedTask) -> Any:
        if spec.context is None:
            entry = TaskEntry(id=spec.task_id, type=spec.type, params=spec.params)
            return loading.make_context(kind, entry, self._config)
        return decode_context(
            spec.context,
            kind.context_class,
            migrations=kind.migrations,
            schema=kind.schema_version,
        )

    def _register(self, registration: Registration, spec: HostedTask) -> None:
        """Hand a task to the scheduler; hold it back while one that it comes after has not arrived."""
        for name in registration.after:
            if name.startswith(_STAND_IN):
                self._ensure_stand_in(name)
            elif not self.scheduler.knows(name) and len(self._arrivals) > 1:
                self._held_back.append(registration)
                return
        try:
            self.scheduler.add(
                registration, status=spec.status or None, streak=spec.streak
            )
            if spec.adjustments:
                changes = loading.adjustments(spec.adjustments)
                self.scheduler.adjust(spec.task_id, **changes)
        except Exception as error:
            self._refuse(spec, error)

    def _ensure_stand_in(self, name: str) -> None:
        """A task elsewhere that others come after: here it runs empty, each time it succeeded there."""
        if self.scheduler.knows(name):
            return

        async def nothing() -> None:
            return None

        never = Schedule(on=("(it runs elsewhere)",))
        self.scheduler.add(
            Registration(task_id=name, type="stand-in", cycle=nothing, schedule=never)
        )

    def _owned(self, resident: _Resident, work: Callable[[], Any]) -> Work:
        """Let the page name this task from the first instant of `work`.

        The loop's own note would come too late: one callback of a worker may run many cycles.
        """
        enter, number = self._pulse.enter, resident.number

        async def run() -> Any:
            enter(number)
            try:
                return await work()
            except SystemExit as error:
                raise RuntimeError(
                    f"it called sys.exit({error.code!r}), which would end its host; end in a final state"
                ) from error
            finally:
                enter(0)

        return run

    async def _cycle(self, resident: _Resident, task: Task[Any]) -> Any:
        result = await task.step()
        self.checkpoint(resident)
        if result.should_continue:
            return None if resident.spec.schedule is not None else result.next_delay
        await task.stop()
        self.checkpoint(resident)
        return DONE

    async def _remove(self, task_id: str) -> bool:
        ended = await self.scheduler.remove(task_id, timeout_s=2.0)
        resident = self._residents.get(task_id)
        if ended and resident is not None:
            await self._end_task(resident)
        self._forget(task_id)
        return ended

    def _forget(self, task_id: str) -> None:
        resident = self._residents.pop(task_id, None)
        self._listening = [pair for pair in self._listening if pair[1] is not resident]
        self.line.orders.pop(task_id, None)
        self._checkpoints.forget(task_id)
        self._pending.pop(task_id, None)
        self._reported.pop(task_id, None)
        number = self._numbers.pop(task_id, None)
        if number is not None:
            self._pulse.forget(number)

    def _finish(self, resident: _Resident, health: TaskHealth) -> None:
        self._send_contexts_now()
        self.line.send(Finished(self._with_state(health)))
        self.line.chore(self._forget_finished(resident))

    async def _forget_finished(self, resident: _Resident) -> None:
        if self._residents.get(resident.id) is resident:
            if self.scheduler.knows(resident.id):
                await self.scheduler.remove(resident.id)
            self._forget(resident.id)

    # --- contexts --------------------------------------------------------------------------------

    def checkpoint(self, resident: _Resident) -> None:
        """Send the task's context, within 20 ms, if it changed."""
        if resident.task is not None:
            with lane(Lane.DESK):  # its timer must not queue behind the tasks
                self._checkpoints.mark(
                    resident.task, resident.spec.type, self.setup.epoch
                )

    async def _send_contexts(self, batch: Batch) -> None:
        self._keep(batch)
        self._send_pending()

    def _send_contexts_now(self) -> None:
        self._keep(self._checkpoints.swap())
        self._send_pending(limit=1 << 62)

    def _keep(self, batch: Batch) -> None:
        self._pending.update({r.key: r for r in batch if isinstance(r, Put)})

    def _send_pending(self, limit: int = _BUSY_BYTES) -> None:
        """Send contexts as long as the desk reads; newer ones replace those that wait."""
        while self._pending and self.line.backlog < limit:
            batch: list[SavedContext] = []
            size = 0
            while self._pending and size < _BUSY_BYTES:
                put = self._pending.pop(next(iter(self._pending)))
                size += len(put.data)
                batch.append(SavedContext(put.key, put.shelf, put.data))
            try:
                self.line.send(Saved(batch))
            except CapacityError as error:
                text = f"its context was not saved: {error}"
                self.line.say("error", batch[-1].task_id, text)

    # --- reports ---------------------------------------------------------------------------------

    async def _report_often(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            await self._report_all()

    async def _report_all(self) -> None:
        """Report who changed. 10,000 tasks take five seconds once round, and little of a core."""
        names = list(self._residents)
        for at in range(0, len(names), _REPORTS_PER_FRAME):
            some = names[at : at + _REPORTS_PER_FRAME]
            changed = [line for name in some if (line := self._report(name))]
            if changed:
                self.line.send(Reported(changed))
            if at + _REPORTS_PER_FRAME < len(names):
                await asyncio.sleep(_REPORTS_PER_FRAME / _REPORTS_PER_S)

    def _report(self, task_id: str) -> tuple[str, msgspec.Raw] | None:
        if task_id not in self._residents or not self.scheduler.knows(task_id):
            return None
        data = encode(self._with_state(self.scheduler.health(task_id)))
        if self._reported.get(task_id) == data:
            return None
        self._reported[task_id] = data
        return task_id, msgspec.Raw(data)

    def _with_state(self, health: TaskHealth) -> TaskHealth:
        resident = self._residents.get(health.task_id)
        if resident is not None and resident.task is not None:
            health.state = resident.task.context.state
        return health

    def _on_health_changed(self, task_id: str, health: TaskHealth) -> None:
        if not task_id.startswith(_STAND_IN):
            self.line.send(HealthChanged(self._with_state(health)))

    def on_task_failed(
        self, task_id: str, error: BaseException, consequence: str
    ) -> None:
        self.line.report_failure(task_id, error, consequence)


def _stand_in(name: str) -> str:
    return f"{_STAND_IN}{name}"


def _ended_before(spec: HostedTask) -> TaskHealth:
    return TaskHealth(
        task_id=spec.task_id,
        type=spec.type,
        priority=spec.priority or "normal",
        status="completed",
        why="it had ended before",
    )


# --- The process ------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one host until its desk stops it or is gone; return the exit code."""
    parser = argparse.ArgumentParser(prog="nightdesk.host", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="socket to the desk")
    parser.add_argument("--page", type=int, required=True, help="the shared page")
    parser.add_argument("--stack", type=int, required=True, help="file for stacks")
    parser.add_argument("--parent", type=int, required=True, help="pid of the desk")
    parser.add_argument("--no-idle", action="store_true", help="usual priority")
    options = parser.parse_args(arguments)
    die_with(options.parent)
    if not options.no_idle:
        make_idle()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable(options.stack)
    faulthandler.register(signal.SIGUSR2, options.stack)
    return serve(socket.socket(fileno=options.fd), options.page)


def serve(sock: socket.socket, page: int) -> int:
    """Run a host on a loop of its own."""
    loop = new_host_loop()
    asyncio.set_event_loop(loop)
    loop.set_default_executor(ThreadPoolExecutor(_MAX_THREADS))
    numbers: dict[str, int] = {}
    hosts: list[Host] = []
    pulse = Pulse(page, numbers, lambda: hosts[0].on_parked())
    loop.pulse = pulse

    async def live() -> None:
        host = Host(loop, sock, pulse, numbers)
        hosts.append(host)
        logging.getLogger().addHandler(ForwardingHandler(host.line, loop))
        loop.add_signal_handler(signal.SIGTERM, host.stop_soon)
        gc.freeze()
        await host.run()

    loop.run_until_complete(live())
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if asyncio.all_tasks(loop):
        # Cycles that ignore their cancellation, or a desk that died: everything worth keeping is
        # with the desk, and waiting for these would be waiting for ever.
        os._exit(0)
    loop.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
