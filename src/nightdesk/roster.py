"""Who works at the desk: tasks are restored, added, steered and dismissed here.

Comes from: desk.py
Goes to: kernel/scheduler.py, kernel/hosts.py, contexts.py
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nightdesk import loading
from nightdesk.abc import Delete, OpportunityHandler, Put, Record, Task
from nightdesk.config import TaskEntry
from nightdesk.errors import (
    CommandError,
    DuplicateTaskError,
    NightdeskError,
    UnknownTaskError,
)
from nightdesk.handle import LocalDesk
from nightdesk.kernel.runner import DONE, Registration
from nightdesk.model.context import FINAL_STATES
from nightdesk.model.events import Event, Opportunity, QuoteChanged
from nightdesk.model.health import TaskHealth
from nightdesk.model.order import Order
from nightdesk.model.priority import Priority
from nightdesk.model.serializer import decode_context, peek_meta

if TYPE_CHECKING:
    from nightdesk.desk import TradingDesk
    from nightdesk.kernel.hosts import HostPool

__all__ = ["LocalTask", "Roster"]

_MAX_ID = 210  # as in desk.yaml, and the number of a copy
_HISTORY = 50
_KEPT = ("paused", "stopped", "quarantined")
Recover = Callable[[Record, str], Awaitable[Task[Any] | None]]


class LocalTask(msgspec.Struct):
    """A task in the desk's own process, with what is known of it beyond its health.

    Attributes:
        history: `(UTC nanoseconds, state)` of its last changes of state.
        handling: Its opportunity handler is at work.
        step: The coroutine of the cycle under way.
    """

    task: Task[Any]
    entry: TaskEntry
    type: str
    history: deque[tuple[int, str]]
    handling: bool = False
    step: Any = None

    @property
    def id(self) -> str:
        return self.entry.id

    def waits_at(self) -> list[str]:
        """Return where its cycle waits, outermost first: `_tend (iceberg.py:68)`; empty between cycles."""
        frames = []
        inner = self.step
        while inner is not None:
            frame = getattr(inner, "cr_frame", None) or getattr(inner, "gi_frame", None)
            if frame is not None:
                code = frame.f_code
                frames.append(
                    f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
                )
            inner = getattr(inner, "cr_await", None) or getattr(
                inner, "gi_yieldfrom", None
            )
        return frames


class Roster:
    """The tasks of one desk, wherever they run.

    Attributes:
        local: Tasks in the desk's process, finished ones included.
        hosts: The background hosts; None until the first task needs one.
        recover: Turns a saved record into a task; None recovers only the types Nightdesk ships.
    """

    def __init__(self, desk: "TradingDesk") -> None:
        self._desk = desk
        self.local: dict[str, LocalTask] = {}
        self.hosts: HostPool | None = None
        self.recover: Recover | None = None
        self._last_health: dict[str, TaskHealth] = {}
        self._targets: dict[str, Any] = {}

    # --- coming -------------------------------------------------------------------------------------

    async def restore(self, entries: list[TaskEntry]) -> None:
        """Put every task back where it stood; a task without a saved context begins afresh."""
        store = self._desk.store
        saved = {record.key: record for record in await store.load("context")}
        for record in await store.load("health"):
            self._remember(record)
        for entry in _in_order(entries):
            await self._add_entry(entry, saved.pop(entry.id, None))
        for record in saved.values():
            if record.shelf == "active":
                await self._restore_unlisted(record)

    def _remember(self, record: Record) -> None:
        """Take up whether a task was paused, stopped or quarantined."""
        try:
            health = msgspec.json.decode(record.data, type=TaskHealth)
        except (msgspec.MsgspecError, ValueError) as error:
            text = f"its saved health cannot be read, so it runs even if it was paused: {error}"
            self._desk.alert("warning", record.key, text)
        else:
            self._last_health[record.key] = health

    def _target(self, type_name: str) -> Any:
        """Return what a type means; looked up once, since thousands of tasks may share it."""
        if type_name not in self._targets:
            self._targets[type_name] = loading.load_task(type_name, self._desk.config)
        return self._targets[type_name]

    async def _add_entry(self, entry: TaskEntry, record: Record | None) -> None:
        target = self._target(entry.type)
        is_task = isinstance(target, type) and issubclass(target, Task)
        if self._belongs_in_host(entry, getattr(target, "runs_in", "desk")):
            await self._host(entry, record)
        elif not is_task:
            self.add_function(entry, target)
        elif record is None:
            await self.add(loading.make_task(target, entry, self._desk.config), entry)
        else:
            await self._add_saved(entry, target, record)

    async def _add_saved(
        self, entry: TaskEntry, kind: type[Task[Any]], record: Record
    ) -> None:
        try:
            context = decode_context(
                record.data,
                kind.context_class,
                migrations=kind.migrations,
                schema=kind.schema_version,
            )
            task = kind(context)
        except (
            Exception
        ) as error:  # its class may be the user's, and its bytes anything
            await self._quarantine(record, error)
        else:
            await self.add(task, entry, is_saved=True)

    async def _restore_unlisted(self, record: Record) -> None:
        """Bring back a task that the configuration does not list: it was added while the desk ran."""
        try:
            type_name = str(peek_meta(record.data).get("type", ""))
            entry = TaskEntry(id=record.key, type=type_name)
            if self.recover is not None:
                task = await self.recover(record, type_name)
                if task is not None:
                    await self.add(task, entry)
            elif "." in type_name:
                # S-8: no module is ever imported by a name found in data.
                self._desk.alert(
                    "warning",
                    record.key,
                    f"saved task of type {type_name!r} is not in the configuration; kept, not run",
                )
            else:
                kind = loading.load_class(
                    "task", type_name, self._desk.config.search_path
                )
                await self._add_saved(entry, kind, record)
        except NightdeskError as error:
            await self._quarantine(record, error)

    async def _quarantine(self, record: Record, error: Exception) -> None:
        """Keep the bytes of a context nobody can read; the other tasks still run (T-8)."""
        await self._desk.store.save(
            [
                Put("quarantine", record.key, record.data, "errored"),
                Delete("context", record.key),
            ]
        )
        self._desk.alert(
            "critical",
            record.key,
            f"its saved context cannot be used, its bytes are kept in quarantine: {error}",
        )

    async def add(
        self,
        task: Task[Any],
        entry: TaskEntry,
        *,
        start: bool = True,
        is_saved: bool = False,
    ) -> str:
        """Run `task` by `entry`; one in a final state is kept but not run.

        Args:
            start: False if its `start` has been awaited already.
            is_saved: Its context is what the store holds, so that there is nothing to save yet.

        Raises:
            DuplicateTaskError: The id is taken.
            CommandError: It cannot be an id.
        """
        desk = self._desk
        _check_id(entry.id)
        if self.knows(entry.id):
            raise DuplicateTaskError(entry.id)
        if task.context.task_id != entry.id:
            task.context = task.context.evolve(task_id=entry.id)
        local = LocalTask(
            task=task, entry=entry, type=entry.type, history=deque(maxlen=_HISTORY)
        )
        local.history.append((desk.clock.now_ns(), task.context.state))
        self.local[entry.id] = local
        task.desk = LocalDesk(desk, entry.id, partial(self._checkpoint, local))
        if is_saved:
            desk.checkpoints.remember(task.context)
        else:
            self._checkpoint(local)
        if task.context.state in FINAL_STATES:
            return entry.id
        self._register(
            entry,
            cycle=partial(self._cycle, local),
            start=task.start if start else None,
            priority=Priority.parse(entry.priority or task.priority),
            keys=task.keys(),
        )
        self._listen(local)
        return entry.id

    def add_function(self, entry: TaskEntry, function: Callable[..., Any]) -> str:
        """Run a plain function by `entry`: the function face of a task (design 004).

        Raises:
            DuplicateTaskError: The id is taken.
            CommandError: It cannot be an id.
        """
        _check_id(entry.id)
        handle = LocalDesk(self._desk, entry.id, lambda: None)
        self._register(
            entry,
            cycle=loading.function_cycle(function, handle, entry.params),
            priority=Priority.parse(entry.priority or Priority.NORMAL),
        )
        return entry.id

    def _register(self, entry: TaskEntry, **how: Any) -> None:
        was = self._last_health.get(entry.id)
        self._desk.scheduler.add(
            Registration(
                task_id=entry.id,
                type=entry.type,
                schedule=entry.schedule,
                group=entry.group,
                after=entry.after,
                timeout_s=entry.timeout_s,
                **how,
            ),
            status=was,
        )

    # --- working ------------------------------------------------------------------------------------

    async def _cycle(self, local: LocalTask) -> Any:
        if (
            local.handling
        ):  # the opportunity handler is at work; the task's own step waits for its end
            return 0.05
        if not self._desk.has_acted:
            self._desk.note_first_action(local.id)
        task = local.task
        state = task.context.state
        local.step = task.step()
        try:
            result = await local.step
        finally:
            local.step = None
        if task.context.state != state:
            local.history.append((self._desk.clock.now_ns(), task.context.state))
        self._checkpoint(local)
        if result.should_continue:
            return None if local.entry.schedule is not None else result.next_delay
        self._unlisten(local)
        await task.stop()
        self._desk.log.info("task finished", task=local.id, state=task.context.state)
        return DONE

    def _checkpoint(self, local: LocalTask) -> None:
        if self.local.get(local.id) is not local:
            return  # removed: what still runs of it must not bring its context back
        self._desk.checkpoints.mark(local.task, local.type, self._desk.store.epoch)

    def _listen(self, local: LocalTask) -> None:
        desk, task = self._desk, local.task
        if task.listens:
            desk.inbox.subscribe(
                task.listens,
                self._wake_by_event(local),
                owner=local.id,
                instruments=task.watches(),
            )
        if isinstance(task, OpportunityHandler):
            desk.inbox.add_handler(
                local.id, task.handles, self._assessor(local, task), task.deadline_s
            )
            desk.switch.set_handler(local.id, self._handler(local, task))

    def _unlisten(self, local: LocalTask) -> None:
        self._desk.inbox.unsubscribe(local.id)
        self._desk.switch.remove_handler(local.id)

    def _wake_by_event(self, local: LocalTask) -> Callable[[Event], None]:
        task, task_id, wake = local.task, local.id, self._desk.scheduler.wake

        def deliver(event: Event) -> None:
            if task.wants(event):
                wake(task_id)

        return deliver

    def _assessor(
        self, local: LocalTask, task: OpportunityHandler[Any]
    ) -> Callable[[Event], int | None]:
        """A task that was paused, stopped or quarantined, or waits after a failure, takes no opportunity:
        its cycle, which repairs what a handler leaves, does not run either."""
        assess, is_active, task_id = (
            task.assess,
            self._desk.scheduler.is_active,
            local.id,
        )

        def judge(event: Event) -> int | None:
            edge_ppm = assess(event)
            return edge_ppm if edge_ppm is not None and is_active(task_id) else None

        return judge

    def _handler(
        self, local: LocalTask, task: OpportunityHandler[Any]
    ) -> Callable[[Opportunity], Awaitable[None]]:
        async def handle(opportunity: Opportunity) -> None:
            if not self._desk.scheduler.is_active(local.id):
                return  # set aside while the opportunity waited for its turn
            local.handling = True
            try:
                await task.handle(opportunity)
            finally:
                local.handling = False
                self._checkpoint(local)
                if self._desk.scheduler.knows(local.id):
                    self._desk.scheduler.wake(local.id)

        return handle

    def wake_owner(self, order: Order) -> None:
        """Tell the task that owns `order` that something happened to it."""
        if self._desk.scheduler.knows(order.task_id):
            self._desk.scheduler.wake(order.task_id)
        elif self.hosts is not None and self.hosts.knows(order.task_id):
            self.hosts.push_order(order)

    # --- background hosts ---------------------------------------------------------------------------

    def _belongs_in_host(self, entry: TaskEntry, usual: str) -> bool:
        config = self._desk.config
        if config.virtual_time or not config.background.hosts:
            return False
        return (entry.runs_in or usual) == "background"

    async def _host(self, entry: TaskEntry, record: Record | None) -> None:
        if record is not None and record.shelf != "active":
            return
        # Only a desk that has such tasks pays for what the hosts import.
        from nightdesk.kernel.hosts import HostedTask

        if self.hosts is None:
            self.hosts = await self._open_hosts()
        was = self._last_health.get(entry.id)
        await self.hosts.run_task(
            HostedTask(
                task_id=entry.id,
                type=entry.type,
                params=entry.params,
                context=record.data if record is not None else None,
                schedule=entry.schedule,
                priority=entry.priority,
                timeout_s=entry.timeout_s,
                group=entry.group,
                after=entry.after,
                status=was.status if was is not None and was.status in _KEPT else "",
            )
        )

    async def _open_hosts(self) -> "HostPool":
        from nightdesk.hosting import HostService
        from nightdesk.kernel.hosts import HostPool

        desk = self._desk
        hosts = HostPool(
            config=desk.config.background,
            clock=desk.clock,
            search_path=desk.config.search_path,
            directory=desk.directory,
            callbacks=HostService(desk),
            observers=(desk,),
            seed=desk.config.seed,
            epoch=desk.store.epoch,
            max_concurrent=desk.config.kernel.max_concurrent,
            log_level=desk.config.log_level,
            successes=desk.scheduler.successes,
        )
        await hosts.start()

        def show(event: Event) -> None:
            if isinstance(event, QuoteChanged):
                hosts.push_quote(event)
            else:
                hosts.push_event(event)

        desk.inbox.subscribe((Event,), show, owner="background hosts")
        desk.switch.park, desk.switch.resume = hosts.park, hosts.resume_all
        return hosts

    # --- steering and leaving -----------------------------------------------------------------------

    def knows(self, task_id: str) -> bool:
        return (
            task_id in self.local
            or self._desk.scheduler.knows(task_id)
            or (self.hosts is not None and self.hosts.knows(task_id))
        )

    async def steer(self, verb: str, task_id: str) -> None:
        """Start, stop, pause, resume or trigger a task, wherever it runs.

        Raises:
            UnknownTaskError: There is none, or it has finished.
        """
        if self.hosts is not None and self.hosts.knows(task_id):
            await self.hosts.steer(verb, task_id)
            return
        scheduler = self._desk.scheduler
        if not scheduler.knows(task_id):
            raise UnknownTaskError(task_id, self.local)
        if verb == "resume" and task_id in self.local:
            self.local[task_id].task.resume()
        method = {"start": "start_task", "stop": "stop_task"}.get(verb, verb)
        result = getattr(scheduler, method)(task_id)
        if asyncio.iscoroutine(result):
            await result

    async def adjust(self, task_id: str, changes: dict[str, Any]) -> None:
        """Change interval, priority or timeout of a running task.

        Raises:
            UnknownTaskError: There is none.
            CommandError: A change makes no sense.
        """
        understood = loading.adjustments(
            changes
        )  # here, so that a host never sees nonsense
        if self.hosts is not None and self.hosts.knows(task_id):
            await self.hosts.adjust(task_id, changes)
        elif self._desk.scheduler.knows(task_id):
            self._desk.scheduler.adjust(task_id, **understood)
        else:
            raise UnknownTaskError(task_id, self.local)

    async def remove(self, task_id: str) -> bool:
        """Stop a task and forget it; False: there is none.

        Its finished orders go to the archive, so that a new task of the same id does not take them for
        its own. Open ones stay at their venue and in the ledger, and the operator is told of them.
        """
        desk, hosts = self._desk, self.hosts
        if not self.knows(task_id):
            return False
        local = self.local.pop(task_id, None)
        if hosts is not None and hosts.knows(task_id):
            try:
                await hosts.remove(task_id)
            except NightdeskError as error:
                desk.alert("warning", task_id, f"removed, but its host says: {error}")
        if desk.scheduler.knows(task_id):
            await desk.scheduler.remove(task_id)
        if local is not None:
            self._unlisten(local)
            await self._say_goodbye(local)
        self._last_health.pop(task_id, None)
        await desk.checkpoints.delete(task_id)
        still_open = [o for o in desk.orders.orders_of(task_id) if o.status.is_open]
        if still_open:
            names = ", ".join(o.client_order_id for o in still_open[:20])
            desk.alert(
                "warning", task_id, f"removed; nobody looks after its orders {names}"
            )
        await desk.orders.forget(task_id)
        return True

    async def stop(self, timeout_s: float) -> list[str]:
        """Stop every task; return the names of those that would not."""
        # At the same time: one after the other they might take twice as long as an operator waits.
        stops = [self._desk.scheduler.stop(timeout_s)]
        if self.hosts is not None:
            stops.append(self.hosts.stop(timeout_s))
        stuck = [task_id for names in await asyncio.gather(*stops) for task_id in names]
        for local in self.local.values():
            if local.id not in stuck and local.task.context.state not in FINAL_STATES:
                await self._say_goodbye(local)
        return stuck

    async def _say_goodbye(self, local: LocalTask) -> None:
        try:
            await local.task.stop()
        except Exception as error:
            self._desk.on_task_failed(local.id, error, "ignored: it is being stopped")
        self._checkpoint(local)


def _check_id(task_id: str) -> None:
    """An id that no store takes as a key would take the contexts of other tasks with it when they are saved."""
    if not (0 < len(task_id) <= _MAX_ID and task_id.isprintable()):
        raise CommandError(
            f"{task_id[:60]!a} cannot be the id of a task: expected 1 to {_MAX_ID} printable characters"
        )


def _in_order(entries: list[TaskEntry]) -> list[TaskEntry]:
    """Return `entries` so that each stands after those it waits for; a circle is left for the scheduler to name."""
    placed: dict[str, TaskEntry] = {}
    waiting = list(entries)
    names = {entry.id for entry in entries}
    while waiting:
        ready = [
            e for e in waiting if all(a in placed or a not in names for a in e.after)
        ]
        if not ready:
            break
        placed.update((entry.id, entry) for entry in ready)
        waiting = [entry for entry in waiting if entry.id not in placed]
    return [*placed.values(), *waiting]
