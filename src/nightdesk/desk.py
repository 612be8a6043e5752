"""The house, built and wired: rooms are introduced to each other here, and at run time nothing passes through.

Comes from: config.py, loading.py
Goes to: kernel/, orders/, risk/, venues/, sources/, stores/
"""

import asyncio
import gc
import random
from collections import deque
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from nightdesk import loading, operations, wiring
from nightdesk.abc import (
    Clock,
    Delete,
    Observer,
    OpportunityHandler,
    Put,
    Record,
    Source,
    Store,
    Task,
    Venue,
)
from nightdesk.config import Config, TaskEntry
from nightdesk.contexts import Checkpoints
from nightdesk.errors import DuplicateTaskError, NightdeskError, NoTasksError, StateNotWritableError, UnknownTaskError
from nightdesk.handle import LocalDesk
from nightdesk.kernel.cache import Cache
from nightdesk.kernel.clock import SystemClock
from nightdesk.kernel.hosts import HostPool
from nightdesk.kernel.hours import Calendars
from nightdesk.kernel.inbox import Inbox
from nightdesk.kernel.loop import Lane, lane, new_event_loop
from nightdesk.kernel.recovery import RecoveryReport
from nightdesk.kernel.runner import DONE, Registration
from nightdesk.kernel.scheduler import Scheduler
from nightdesk.kernel.switch import Switch
from nightdesk.kernel.watchdog import Watchdog
from nightdesk.model.context import FINAL_STATES
from nightdesk.model.events import BookChanged, Event, Opportunity, OrderEvent, QuoteChanged, TradePrinted
from nightdesk.model.health import SwitchTrace, TaskHealth
from nightdesk.model.instrument import Instrument, instrument_key
from nightdesk.model.order import Order, OrderRequest, OrderType, Side
from nightdesk.model.priority import Priority
from nightdesk.model.serializer import decode_context, peek_meta
from nightdesk.orders.protocol import OrderProtocol
from nightdesk.portfolio.positions import Positions
from nightdesk.risk.gate import Gate
from nightdesk.telemetry.logs import configure_logs, recent_logs

__all__ = ["LocalTask", "TradingDesk"]

_RECENT = 200
MARKET_EVENTS = (QuoteChanged, TradePrinted, BookChanged)


class LocalTask(msgspec.Struct):
    """A task that runs in the desk's process, with what the desk knows of it beyond its health."""

    task: Task[Any]
    entry: TaskEntry
    type: str
    history: deque[tuple[int, str]]
    handling: bool = False


class TradingDesk(Observer):
    """One desk: every room, built from a `Config`.

    Used by `run` below, by the command line, and as a library by `manager.TaskManager`.
    `start` is the only way in, after a crash as on the first day (R-9).
    """

    def __init__(self, config: Config, loop: asyncio.AbstractEventLoop, clock: Clock | None = None) -> None:
        self.config = config
        self.loop = loop
        self.clock: Clock = clock or SystemClock()
        self.random = random.Random(config.seed)
        self.log = configure_logs(config, self.clock)
        self.directory = Path(config.state.directory)
        self.quotes: dict[str, QuoteChanged] = {}
        self.tasks: dict[str, LocalTask] = {}
        self.venues: dict[str, Venue] = {}
        self.sources: dict[str, Source] = {}
        self.alerts: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self.offenders: dict[tuple[str, str], dict[str, Any]] = {}
        self.ready = False
        self.started_ns = 0
        self.exit_code = 0
        self.left_behind: list[str] = []
        self.hosts: HostPool | None = None
        self.recover_record: Callable[[Record, str], Awaitable[Task[Any] | None]] | None = None
        self.recovery: RecoveryReport | None = None
        self.stopping = asyncio.Event()
        self._listeners: dict[str, list[LocalTask]] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._build()

    # --- building ----------------------------------------------------------------------------------

    def _build(self) -> None:
        config = self.config
        self.store: Store = wiring.build_store(config, self.clock, on_failure=self._on_store_failure)
        self.calendars = Calendars(cache_dir=self.directory / "calendars")
        self.cache = Cache()
        self.inbox = Inbox(self.clock, observers=(self,), opportunity_limit=config.kernel.opportunity_queue)
        self.positions = Positions()
        self.gate = Gate(
            config.risk,
            clock=self.clock,
            store=self.store,
            instruments=self.instrument,
            positions=self.positions,
            quote=lambda symbol, venue: self.quotes.get(instrument_key(symbol, venue)),
            observers=(self,),
            alert=self.alert,
        )
        self.orders = OrderProtocol(
            code=config.code,
            gate=self.gate,
            venues=self.venues,
            store=self.store,
            clock=self.clock,
            random=self.random,
            emit=self.inbox.emit,
            positions=self.positions,
            instruments=self.instrument,
            observers=(self,),
        )
        self.orders.on_order_changed = self._on_order_changed
        self.scheduler = Scheduler(
            clock=self.clock,
            random=random.Random(config.seed + 1),
            observers=(self,),
            max_concurrent=config.kernel.max_concurrent,
            calendars=self.calendars,
            on_change=self._on_health_changed,
            place="desk",
        )
        self.checkpoints = Checkpoints(self.clock, self.store.save)
        self.switch = Switch(
            self.loop,
            self.clock,
            snapshot=self.checkpoints.swap,
            save=self.store.save,
            durability=config.kernel.durability,
            max_park_s=config.kernel.max_park_s,
            queue_limit=config.kernel.opportunity_queue,
            observers=(self,),
        )
        self.inbox.on_opportunity = self.switch.on_opportunity
        self.watchdog: Watchdog | None = None

    async def _build_doors(self) -> None:
        """Venues and sources; a venue in a process of its own is started here if it does not run."""
        for venue_config in self.config.venues:
            venue = await wiring.build_venue(venue_config, self.config, self.directory)
            self.venues[venue.name] = venue
            on_market = getattr(venue, "on_market", None)
            if on_market is not None:
                self.inbox.subscribe(MARKET_EVENTS, _for_venue(venue.name, on_market))
        for source_config in self.config.sources:
            self.sources[source_config.name] = wiring.build_source(source_config, self.config)

    # --- starting and stopping -----------------------------------------------------------------------

    async def start(self) -> RecoveryReport:
        """Take the state, prove what the venues hold, put the tasks back where they stood, open the doors.

        Raises:
            NoTasksError: Nothing would ever run.
            NightdeskError: Anything else that keeps a desk from starting; see its `exit_code`.
        """
        self.started_ns = self.clock.now_ns()
        entries = [entry for entry in self.config.tasks if entry.enabled]
        if not entries and not self.config.allow_empty:
            raise NoTasksError(self.config.source_file)
        await self.store.start()
        await self.gate.load()
        await self._build_doors()
        self.inbox.subscribe((QuoteChanged,), self._on_quote)
        self.inbox.subscribe((OrderEvent,), self.orders.on_event)
        for venue in self.venues.values():
            await venue.start(self.inbox.emit, self.clock, random.Random(f"{self.config.seed}:{venue.name}"))
        self.recovery = await self.orders.recover()
        for line in self.recovery.lines():
            self.log.info("recovery", step=line)
        await self._restore_tasks(entries)
        await self.scheduler.start()
        await self.orders.start()
        for source in self.sources.values():
            await source.start(self.inbox.emit, self.clock, random.Random(f"{self.config.seed}:{source.name}"))
        if not self.config.virtual_time:
            self._start_watching()
        self.ready = True
        self.log.info(
            "desk ready", tasks=len(self.tasks), venues=len(self.venues), trading=self.gate.state, epoch=self.store.epoch
        )
        return self.recovery

    async def stop(self) -> list[str]:
        """Stop in the reverse order; return the tasks that would not stop, by name.

        Open orders stay at their venues: the next start adopts them.
        """
        self.ready = False
        for source in self.sources.values():
            await source.stop()
        stuck = await self.scheduler.stop(self.config.kernel.stop_timeout_s)
        for local in self.tasks.values():
            if local.entry.id in stuck:
                continue
            await self._stop_task(local)
        await self.orders.stop()
        for venue in self.venues.values():
            await venue.stop()
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        if self.watchdog is not None:
            self.watchdog.stop()
        try:
            await self.checkpoints.drain()
        except NightdeskError as error:
            self.log.error("last checkpoint not saved", error=str(error))
        await self.store.stop()
        for task_id in stuck:
            self.log.error("task would not stop", task=task_id, consequence="left behind; its last checkpoint is kept")
        self.log.info("desk stopped", stuck=stuck)
        return stuck

    async def abandon(self) -> None:
        """Undo a start that failed half-way, as far as it came; the state stays as it was."""
        for part in (*self.sources.values(), *self.venues.values(), self.store):
            try:
                await part.stop()
            except Exception as error:
                self.log.debug("abandoned start", part=type(part).__name__, error=str(error))

    def look_at_flag_file(self) -> None:
        """Check the kill switch's flag file now instead of at the next tick."""
        self._chore(self.gate.check_flag_file(self.directory / "HALT"))

    def _start_watching(self) -> None:
        self.watchdog = Watchdog(
            self.loop, lag_ms=self.config.kernel.watchdog_lag_ms, on_stall=self._on_stall, clock=self.clock
        )
        self.watchdog.start()
        self._chore(self._reconcile_often())
        self._chore(self._watch_flag_file())
        # What the start allocated lives as long as the desk: out of the collector's sight,
        # a full collection no longer stands between an event and its handler.
        gc.collect()
        gc.freeze()

    def _chore(self, work: Awaitable[None]) -> None:
        with lane(Lane.NORMAL):
            chore = asyncio.ensure_future(work)
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    async def _reconcile_often(self) -> None:
        while True:
            await self.clock.sleep(15.0)
            try:
                await self.orders.sweep()
            except NightdeskError as error:
                self.log.warning("sweep failed", error=str(error), next="again in 15 s")

    async def _watch_flag_file(self) -> None:
        """The kill switch that needs no control socket (S-14)."""
        while True:
            await self.clock.sleep(0.1)
            await self.gate.check_flag_file(self.directory / "HALT")

    # --- tasks ---------------------------------------------------------------------------------------

    async def _restore_tasks(self, entries: list[TaskEntry]) -> None:
        saved = {record.key: record for record in await self.store.load("context")}
        for entry in entries:
            await self._add_entry(entry, saved.pop(entry.id, None))
        for record in saved.values():
            if record.shelf == "active":
                await self._restore_record(record)

    async def _restore_record(self, record: Record) -> None:
        """Bring back a task that the configuration does not list: it was added while the desk ran."""
        type_name = str(peek_meta(record.data).get("type", ""))
        try:
            if self.recover_record is not None:
                task = await self.recover_record(record, type_name)
            else:
                task = self._recover_shipped(record, type_name)
        except NightdeskError as error:
            await self._quarantine(record, error)
            return
        if task is not None:
            await self.add_task(task, TaskEntry(id=record.key, type=type_name))

    def _recover_shipped(self, record: Record, type_name: str) -> Task[Any] | None:
        """Only types that Nightdesk ships: no module is ever imported by a name found in data (S-8)."""
        if "." in type_name:
            self.alert("warning", record.key, f"saved task of type {type_name!r} is no longer in the configuration; it is kept, not run")
            return None
        kind = loading.load_class("task", type_name, self.config.search_path)
        context = decode_context(record.data, kind.context_class, migrations=kind.migrations, schema=kind.schema_version)
        return kind(context)

    async def _add_entry(self, entry: TaskEntry, record: Record | None = None) -> None:
        """Give one entry of the configuration (or one record of the store) a running task."""
        try:
            target = loading.load_task(entry.type, self.config)
            if not (isinstance(target, type) and issubclass(target, Task)):
                self.add_function(entry, target)
                return
            context = self._context_of(entry, target, record)
        except NightdeskError as error:
            if record is None:
                raise
            await self._quarantine(record, error)
            return
        await self.add_task(target(context), entry)

    def _context_of(self, entry: TaskEntry, kind: type[Task[Any]], record: Record | None) -> Any:
        if record is None:
            return wiring.make_context(kind, entry, self.config)
        return decode_context(
            record.data, kind.context_class, migrations=kind.migrations, schema=kind.schema_version
        )

    async def _quarantine(self, record: Record, error: NightdeskError) -> None:
        """Keep the bytes of a context nobody can read; the other tasks still run (T-8)."""
        await self.store.save([Put("quarantine", record.key, record.data, "errored"), Delete("context", record.key)])
        self.alert("critical", record.key, f"its saved context cannot be used and was quarantined: {error}")

    async def add_task(self, task: Task[Any], entry: TaskEntry, *, start: bool = True) -> str:
        """Attach `task` to this desk and run it by `entry`; a finished context is kept but not run.

        Raises:
            DuplicateTaskError: The id is taken.
        """
        task_id = entry.id
        if task_id in self.tasks or self.scheduler.knows(task_id):
            raise DuplicateTaskError(task_id)
        task.context = task.context.evolve(task_id=task_id)
        local = LocalTask(task=task, entry=entry, type=entry.type, history=deque(maxlen=50))
        local.history.append((self.clock.now_ns(), task.context.state))
        self.tasks[task_id] = local
        task.desk = LocalDesk(self, task_id, lambda: self._checkpoint(local))
        if task.context.state in FINAL_STATES:
            return task_id
        self.scheduler.add(
            Registration(
                task_id=task_id,
                type=local.type,
                cycle=lambda: self._cycle(local),
                start=task.start if start else None,
                schedule=entry.schedule,
                priority=Priority.parse(entry.priority or task.priority),
                keys=task.keys(),
                group=entry.group,
                after=entry.after,
                timeout_s=entry.timeout_s,
            )
        )
        self._listen(local)
        self._checkpoint(local)
        return task_id

    def add_function(self, entry: TaskEntry, function: Callable[..., Any]) -> str:
        """Run a plain function by `entry`: the function face of a task (design 004)."""
        if self.scheduler.knows(entry.id):
            raise DuplicateTaskError(entry.id)
        handle = LocalDesk(self, entry.id, lambda: None)
        self.scheduler.add(
            Registration(
                task_id=entry.id,
                type=entry.type,
                cycle=wiring.function_cycle(function, handle),
                schedule=entry.schedule,
                priority=Priority.parse(entry.priority or "normal"),
                group=entry.group,
                after=entry.after,
                timeout_s=entry.timeout_s,
            )
        )
        return entry.id

    async def remove_task(self, task_id: str) -> bool:
        """Stop a task and forget it; its open orders stay with the ledger. False: there is none."""
        local = self.tasks.pop(task_id, None)
        known = self.scheduler.knows(task_id)
        if known:
            await self.scheduler.remove(task_id)
        if local is not None:
            self._unlisten(local)
            await self._stop_task(local)
            await self.checkpoints.delete(task_id)
        return known or local is not None

    async def _cycle(self, local: LocalTask) -> Any:
        if local.handling:  # the opportunity handler is at work; its own repair step waits
            return 0.05
        state = local.task.context.state
        result = await local.task.step()
        if local.task.context.state != state:
            local.history.append((self.clock.now_ns(), local.task.context.state))
        self._checkpoint(local)
        if result.should_continue:
            return None if local.entry.schedule is not None else result.next_delay
        self._unlisten(local)
        await local.task.stop()
        return DONE

    def _checkpoint(self, local: LocalTask) -> None:
        self.checkpoints.mark(local.task, local.type, self.store.epoch)

    def _listen(self, local: LocalTask) -> None:
        task = local.task
        for kind in task.listens:
            self.inbox.subscribe((kind,), self._wake_by_event(local), owner=local.entry.id)
        if isinstance(task, OpportunityHandler):
            self.inbox.add_handler(local.entry.id, task.handles, task.assess, task.deadline_s)
            self.switch.set_handler(local.entry.id, self._handler(local, task))

    def _unlisten(self, local: LocalTask) -> None:
        self.inbox.unsubscribe(local.entry.id)

    def _wake_by_event(self, local: LocalTask) -> Callable[[Event], None]:
        task, task_id, wake = local.task, local.entry.id, self.scheduler.wake

        def deliver(event: Event) -> None:
            if task.wants(event):
                wake(task_id)

        return deliver

    def _handler(self, local: LocalTask, task: OpportunityHandler[Any]) -> Callable[[Opportunity], Awaitable[None]]:
        async def handle(opportunity: Opportunity) -> None:
            local.handling = True
            try:
                await task.handle(opportunity)
            finally:
                local.handling = False
                self._checkpoint(local)
                self.scheduler.wake(local.entry.id)

        return handle

    async def _stop_task(self, local: LocalTask) -> None:
        try:
            await local.task.stop()
        except Exception as error:
            self.on_task_failed(local.entry.id, error, "ignored: the desk is stopping")
        self.checkpoints.mark(local.task, local.type, self.store.epoch)

    # --- what the rooms report ---------------------------------------------------------------------

    def _on_quote(self, event: Event) -> None:
        assert isinstance(event, QuoteChanged)
        self.quotes[instrument_key(event.symbol, event.venue)] = event

    def _on_order_changed(self, order: Order, event: Event) -> None:
        if self.scheduler.knows(order.task_id):
            self.scheduler.wake(order.task_id)

    def _on_health_changed(self, task_id: str, health: TaskHealth) -> None:
        """Pauses and quarantines survive a restart."""
        self.checkpoints.put(Put("health", task_id, msgspec.json.encode(health)))

    def _on_store_failure(self, error: Exception) -> None:
        """No durable intent, no order (R-17): opening stops at once, and the operator is told."""
        self.loop.call_soon_threadsafe(self._halt_for_storage, str(error))

    def _halt_for_storage(self, text: str) -> None:
        self.gate.halt_now(f"state cannot be written: {text}", actor="store")
        self.alert("critical", "store", f"state cannot be written, trading halted: {text}")

    def _on_stall(self, owner: str, lag_s: float, stack: str) -> None:
        """From the watchdog's thread: a task holds the loop (R-24)."""
        self.loop.call_soon_threadsafe(self.note_offender, owner or "(the desk itself)", "blocks the loop", f"{lag_s:.2f} s", stack)

    def note_offender(self, task_id: str, kind: str, detail: str, stack: str = "") -> None:
        """Remember a task that harms its neighbours; `status --json` names it."""
        known = self.offenders.setdefault(
            (task_id, kind), {"task_id": task_id, "kind": kind, "count": 0, "detail": "", "stack": ""}
        )
        known.update(count=known["count"] + 1, detail=detail, last_ns=self.clock.now_ns(), stack=stack[-4000:])
        if known["count"] & (known["count"] - 1) == 0:  # the first, then every 2^n: no log storm
            self.log.warning("offender", task=task_id, kind=kind, detail=detail, count=known["count"])

    def alert(self, level: str, source: str, text: str) -> None:
        """Tell the operator, by log and by the alert channels."""
        self.alerts.append({"level": level, "source": source, "text": text, "ts_ns": self.clock.now_ns()})
        write = {"info": self.log.info, "warning": self.log.warning}.get(level, self.log.error)
        write(text, alert=level, source=source)

    def on_task_failed(self, task_id: str, error: BaseException, consequence: str) -> None:
        self.log.warning("task failed", task=task_id, error=f"{type(error).__name__}: {error}", consequence=consequence)

    def on_switch(self, trace: SwitchTrace) -> None:
        self.log.debug("switch", handler=trace.handler, outcome=trace.outcome, switch_us=round(trace.switch_us, 1))

    def instrument(self, symbol: str, venue: str) -> Instrument | None:
        """Return the instrument, or None if no such venue lists it."""
        found = self.venues.get(venue)
        return found.instruments().get(symbol) if found else None

    def symbols_of(self, venue: str) -> list[str]:
        found = self.venues.get(venue)
        return list(found.instruments()) if found else []

    # --- what an operator may do ------------------------------------------------------------------

    async def command(self, verb: str, arguments: dict[str, Any], actor: str, reason: str = "") -> Any:
        """Carry out one operator's command; the control socket and the live view call this."""
        return await operations.perform(self, verb, arguments, actor, reason)

    async def steer(self, verb: str, task_id: str) -> None:
        """Start, stop, pause, resume or trigger a task, wherever it runs."""
        if self.hosts is not None and self.hosts.knows(task_id):
            await self.hosts.steer(verb, task_id)
            return
        if not self.scheduler.knows(task_id):
            raise UnknownTaskError(task_id, [*self.tasks, *(h.task_id for h in self.scheduler.health_all())])
        method = {"start": "start_task", "stop": "stop_task"}.get(verb, verb)
        result = getattr(self.scheduler, method)(task_id)
        if asyncio.iscoroutine(result):
            await result

    async def adjust(self, task_id: str, changes: dict[str, Any]) -> None:
        """Change interval, priority or timeout of a running task."""
        if self.hosts is not None and self.hosts.knows(task_id):
            await self.hosts.adjust(task_id, changes)
        elif self.scheduler.knows(task_id):
            self.scheduler.adjust(task_id, **wiring.adjustments(changes))
        else:
            raise UnknownTaskError(task_id, list(self.tasks))

    async def audit(self, what: str, actor: str, reason: str, details: dict[str, Any]) -> None:
        """Write who did what and why, durably, before the command is answered."""
        now = self.clock.now_ns()
        entry = {"what": what, "actor": actor, "reason": reason, "details": details, "ts_ns": now}
        await self.store.save([Put("audit", f"{now}-{what}", msgspec.json.encode(entry), "completed")])
        self.log.info("command", what=what, actor=actor, reason=reason, **details)

    async def flatten(self) -> list[str]:
        """Close every position by a reduce-only market order; return the client order ids sent."""
        sent = []
        for position in self.positions.all():
            instrument = self.instrument(position.symbol, position.venue)
            quantity = instrument.floor_quantity(abs(position.quantity)) if instrument else Decimal(0)
            if not quantity:
                continue
            request = OrderRequest(
                symbol=position.symbol,
                venue=position.venue,
                side=Side.SELL if position.quantity > 0 else Side.BUY,
                quantity=quantity,
                type=OrderType.MARKET,
                reduce_only=True,
            )
            try:
                sent.append((await self.orders.submit("operator", request)).client_order_id)
            except OrderDeniedError as error:
                self.alert("critical", "operator", f"{position.symbol}@{position.venue} was not flattened: {error}")
        return sent

    @property
    def inputs_finished(self) -> bool:
        """True when no event will ever come again (every recording has ended)."""
        return bool(self.sources) and all(source.finished for source in self.sources.values())

    def lane_stats(self) -> dict[str, Any]:
        stats = getattr(self.loop, "lane_stats", None)
        return stats() if stats is not None else {}


def _for_venue(name: str, on_market: Callable[[Event], None]) -> Callable[[Event], None]:
    def deliver(event: Event) -> None:
        if event.venue == name:  # type: ignore[attr-defined]
            on_market(event)

    return deliver
