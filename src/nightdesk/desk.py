"""The house, built and wired: rooms are introduced to each other here, and at run time nothing passes through.

Comes from: config.py, loading/
Goes to: kernel/, orders/, risk/, venues/, sources/, stores/
"""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from nightdesk import operations, wiring
from nightdesk.abc import (
    Clock,
    Observer,
    Put,
    Source,
    Store,
    Venue,
)
from nightdesk.config import Config
from nightdesk.contexts import Checkpoints
from nightdesk.errors import (
    DeskHaltedError,
    NightdeskError,
    NoTasksError,
    OrderDeniedError,
)
from nightdesk.kernel.cache import Cache
from nightdesk.kernel.clock import SystemClock
from nightdesk.kernel.hours import Calendars
from nightdesk.kernel.inbox import Inbox
from nightdesk.kernel.loop import Lane, lane
from nightdesk.kernel.memory import Collector, uncollected
from nightdesk.kernel.plain import lanes_of
from nightdesk.kernel.recovery import RecoveryReport
from nightdesk.kernel.scheduler import Scheduler
from nightdesk.kernel.switch import Switch
from nightdesk.kernel.watchdog import Watchdog
from nightdesk.model.events import (
    BookChanged,
    Event,
    OrderEvent,
    QuoteChanged,
    TradePrinted,
)
from nightdesk.model.health import SwitchTrace, TaskHealth
from nightdesk.model.instrument import Instrument, instrument_key
from nightdesk.model.order import Order, OrderRequest, OrderType, Side
from nightdesk.orders.protocol import OrderProtocol
from nightdesk.portfolio.positions import Positions
from nightdesk.risk.gate import Gate
from nightdesk.roster import Roster
from nightdesk.storage import StorageGuard
from nightdesk.telemetry.logs import configure_logs

__all__ = ["TradingDesk"]

_RECENT = 200
MARKET_EVENTS = (QuoteChanged, TradePrinted, BookChanged)


class TradingDesk(Observer):
    """One desk: every room, built from a `Config`.

    Used by `run` below, by the command line, and as a library by `manager.TaskManager`.
    `start` is the only way in, after a crash as on the first day (R-9).
    """

    def __init__(
        self,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        clock: Clock | None = None,
    ) -> None:
        self.config = config
        self.loop = loop
        self.lanes = lanes_of(loop)
        self.clock: Clock = clock or SystemClock()
        self.random = random.Random(config.seed)
        self.log = configure_logs(config, self.clock)
        self.directory = Path(config.state.directory)
        self.quotes: dict[str, QuoteChanged] = {}
        self.venues: dict[str, Venue] = {}
        self.sources: dict[str, Source] = {}
        self.alerts: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self.offenders: dict[tuple[str, str], dict[str, Any]] = {}
        self.ready = False
        self.has_acted = False
        self.started_ns = 0
        self.exit_code = 0
        self.left_behind: list[str] = []
        self.recovery: RecoveryReport | None = None
        self.stopping = asyncio.Event()
        self._chores: set[asyncio.Task[None]] = set()
        self.storage = StorageGuard(self)
        self._build()

    # --- building ----------------------------------------------------------------------------------

    def _build(self) -> None:
        config = self.config
        self.store: Store = wiring.build_store(
            config, self.clock, on_failure=self._on_store_failure
        )
        self.calendars = Calendars(cache_dir=self.directory / "calendars")
        self.cache = Cache()
        self.inbox = Inbox(
            self.clock,
            observers=(self,),
            opportunity_limit=config.kernel.opportunity_queue,
        )
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
        self.gate.on_state_changed = self.inbox.emit
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
            self.lanes,
            self.clock,
            snapshot=self.checkpoints.swap,
            save=self.checkpoints.write,
            durability=config.kernel.durability,
            max_park_s=config.kernel.max_park_s,
            queue_limit=config.kernel.opportunity_queue,
            observers=(self,),
        )
        self.inbox.on_opportunity = self.switch.on_opportunity
        self.roster = Roster(self)
        self.watchdog: Watchdog | None = None
        self.collector: Collector | None = None

    async def _build_doors(self) -> None:
        """Venues and sources; a venue in a process of its own is started here if it does not run."""
        for venue_config in self.config.venues:
            venue = await wiring.build_venue(venue_config, self.config, self.directory)
            self.venues[venue.name] = venue
            on_market = getattr(venue, "on_market", None)
            if on_market is not None:
                self.inbox.subscribe(MARKET_EVENTS, _for_venue(venue.name, on_market))
        for source_config in self.config.sources:
            self.sources[source_config.name] = wiring.build_source(
                source_config, self.config
            )

    # --- starting and stopping -----------------------------------------------------------------------

    async def start(self) -> RecoveryReport:
        """Take the state, prove what the venues hold, put the tasks back where they stood, open the doors.

        Raises:
            NoTasksError: Nothing would ever run.
            NightdeskError: Anything else that keeps a desk from starting; see its `exit_code`.
        """
        with uncollected():
            return await self._start()

    async def _start(self) -> RecoveryReport:
        self.started_ns = self.clock.now_ns()
        laps = _Laps(self.clock)
        entries = [entry for entry in self.config.tasks if entry.enabled]
        if not entries and not self.config.allow_empty:
            raise NoTasksError(self.config.source_file)
        await self.store.start()
        laps.end("store")
        await self.gate.load()
        await self.gate.check_flag_file(self.directory / "HALT")
        await self._build_doors()
        self.inbox.subscribe((QuoteChanged,), self._on_quote)
        self.inbox.subscribe((OrderEvent,), self.orders.on_event)
        for venue in self.venues.values():
            await venue.start(
                self.inbox.emit,
                self.clock,
                random.Random(f"{self.config.seed}:{venue.name}"),
            )
        laps.end("venues")
        self.recovery = await self.orders.recover()
        laps.end("orders")
        for line in self.recovery.lines():
            self.log.info("recovery", step=line)
        if self.recovery.differences:
            self.exit_code = DeskHaltedError.exit_code
            self.alert(
                "critical", "recovery", str(DeskHaltedError(self.recovery.differences))
            )
        await self.roster.restore(entries)
        laps.end("tasks")
        await self.scheduler.start()
        laps.end("scheduler")
        await self.orders.start()
        for source in self.sources.values():
            await source.start(
                self.inbox.emit,
                self.clock,
                random.Random(f"{self.config.seed}:{source.name}"),
            )
        if not self.config.virtual_time:
            self._start_watching()
        laps.end("sources")
        self.ready = True
        self.log.info(
            "desk ready",
            start_s=round(sum(laps.took_ms.values()) / 1000, 3),
            took_ms=laps.took_ms,
            tasks=len(self.config.tasks),
            venues=len(self.venues),
            trading=self.gate.state,
            epoch=self.store.epoch,
        )
        return self.recovery

    async def stop(self) -> list[str]:
        """Stop in the reverse order; return the tasks that would not stop, by name.

        Open orders stay at their venues: the next start adopts them.
        """
        self.ready = False
        # Before the tasks: nobody would be there to repair what a handler leaves, and a venue in a
        # process of its own goes on showing its market.
        await self.switch.stop()
        for source in self.sources.values():
            await source.stop()
        stuck = await self.roster.stop(self.config.kernel.stop_timeout_s)
        await self.orders.stop()
        for venue in self.venues.values():
            await venue.stop()
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        if self.watchdog is not None:
            self.watchdog.stop()
        if self.collector is not None:
            self.collector.stop()
        try:
            await self.checkpoints.drain()
        except NightdeskError as error:
            self.log.error("last checkpoint not saved", error=str(error))
        await self.store.stop()
        for task_id in stuck:
            self.log.error(
                "task would not stop",
                task=task_id,
                consequence="left behind; its last checkpoint is kept",
            )
        self.log.info("desk stopped", stuck=stuck)
        return stuck

    async def abandon(self) -> None:
        """Undo a start that failed half-way, as far as it came; the state stays as it was."""
        doors: list[Source | Venue] = [*self.sources.values(), *self.venues.values()]
        undo = [
            *(door.stop for door in doors),
            lambda: self.roster.stop(1.0),
            self.orders.stop,
            self.store.stop,
        ]
        for step in undo:
            try:
                await step()
            except Exception as error:
                self.log.debug("abandoned start", error=str(error))

    def look_at_flag_file(self) -> None:
        """Check the kill switch's flag file now instead of at the next tick."""
        self._chore(self._look_for_flag())

    def _start_watching(self) -> None:
        self.watchdog = Watchdog(
            self.lanes,
            lag_ms=self.config.kernel.watchdog_lag_ms,
            on_stall=self._on_stall,
            clock=self.clock,
        )
        self.watchdog.start()
        self._chore(self._reconcile_often())
        self._chore(self._watch_safety())
        self._chore(self.storage.watch())
        self.collector = Collector(self.loop)
        self.collector.start()

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
            except Exception as error:
                self.log.warning("sweep failed", error=str(error), next="again in 15 s")

    async def _watch_safety(self) -> None:
        """Obey the kill switch that needs no control socket (S-14), and the daily loss without an order."""
        while True:
            for _ in range(10):
                await self.clock.sleep(0.1)
                await self._look_for_flag()
            self.gate.check_losses()

    async def _look_for_flag(self) -> None:
        """A halt that is in force but not durable is told, and must not end the watch for the next one."""
        try:
            await self.gate.check_flag_file(self.directory / "HALT")
        except (NightdeskError, OSError) as error:
            self.alert("critical", "flag file", f"the HALT file: {error}")

    # --- what the rooms report ---------------------------------------------------------------------

    def _on_quote(self, event: Event) -> None:
        assert isinstance(event, QuoteChanged)
        self.quotes[instrument_key(event.symbol, event.venue)] = event

    def _on_order_changed(self, order: Order, event: Event) -> None:
        self.roster.wake_owner(order)

    def _on_health_changed(self, task_id: str, health: TaskHealth) -> None:
        """Pauses and quarantines survive a restart."""
        self.checkpoints.put(Put("health", task_id, msgspec.json.encode(health)))

    def _on_store_failure(self, error: Exception) -> None:
        """No durable intent, no order (R-17): opening stops at once, and the operator is told."""
        self.loop.call_soon_threadsafe(self.storage.on_failure, str(error))

    def note_first_action(self, task_id: str) -> None:
        """Log how long it took from the process's start until a task could act: the cost of a crash."""
        self.has_acted = True
        if not self.config.virtual_time:
            with lane(Lane.LOW):  # the action itself does not wait for its report
                self.loop.call_soon(
                    self._report_first_action, task_id, self.clock.now_ns()
                )

    def _report_first_action(self, task_id: str, now_ns: int) -> None:
        import psutil

        since_s = now_ns / 1e9 - psutil.Process().create_time()
        self.log.info(
            "first action", task=task_id, since_process_start_s=round(since_s, 3)
        )

    def _on_stall(self, owner: str, lag_s: float, stack: str) -> None:
        """From the watchdog's thread: a task holds the loop (R-24)."""
        self.loop.call_soon_threadsafe(self._note_stall, owner, lag_s, stack)

    def _note_stall(self, owner: str, lag_s: float, stack: str) -> None:
        is_task = self.roster.knows(owner)
        self.note_offender(
            owner if is_task else "(the desk itself)",
            "blocks the loop",
            f"{lag_s:.2f} s{'' if is_task or not owner else f' in {owner}'}",
            stack,
        )

    def note_offender(
        self, task_id: str, kind: str, detail: str, stack: str = ""
    ) -> None:
        """Remember a task that harms its neighbours; `status --json` names it."""
        if len(self.offenders) >= _RECENT and (task_id, kind) not in self.offenders:
            del self.offenders[next(iter(self.offenders))]
        known = self.offenders.setdefault(
            (task_id, kind),
            {"task_id": task_id, "kind": kind, "count": 0, "detail": "", "stack": ""},
        )
        known.update(
            count=known["count"] + 1,
            detail=detail,
            last_ns=self.clock.now_ns(),
            stack=stack[-4000:],
        )
        if (
            known["count"] & (known["count"] - 1) == 0
        ):  # the first, then every 2^n: no log storm
            self.log.warning(
                "offender", task=task_id, kind=kind, detail=detail, count=known["count"]
            )

    def alert(self, level: str, source: str, text: str) -> None:
        """Tell the operator, by log and by the alert channels."""
        self.alerts.append(
            {
                "level": level,
                "source": source,
                "text": text,
                "ts_ns": self.clock.now_ns(),
            }
        )
        write = {"info": self.log.info, "warning": self.log.warning}.get(
            level, self.log.error
        )
        write(text, alert=level, source=source)

    def on_task_failed(
        self, task_id: str, error: BaseException, consequence: str
    ) -> None:
        self.log.warning(
            "task failed",
            task=task_id,
            error=f"{type(error).__name__}: {error}",
            consequence=consequence,
        )

    def on_alert(self, level: str, source: str, text: str) -> None:
        self.alert(level, source, text)

    def on_switch(self, trace: SwitchTrace) -> None:
        self.log.debug(
            "switch",
            handler=trace.handler,
            outcome=trace.outcome,
            switch_us=round(trace.switch_us, 1),
        )

    def instrument(self, symbol: str, venue: str) -> Instrument | None:
        """Return the instrument, or None if no such venue lists it."""
        found = self.venues.get(venue)
        return found.instruments().get(symbol) if found else None

    def symbols_of(self, venue: str) -> list[str]:
        found = self.venues.get(venue)
        return list(found.instruments()) if found else []

    # --- what an operator may do ------------------------------------------------------------------

    async def command(
        self, verb: str, arguments: dict[str, Any], actor: str, reason: str = ""
    ) -> Any:
        """Carry out one operator's command; the control socket and the live view call this."""
        return await operations.perform(self, verb, arguments, actor, reason)

    async def audit(
        self, what: str, actor: str, reason: str, details: dict[str, Any]
    ) -> None:
        """Write who did what and why, durably, before the command is answered."""
        now = self.clock.now_ns()
        entry = {
            "what": what,
            "actor": actor,
            "reason": reason,
            "details": details,
            "ts_ns": now,
        }
        await self.store.save(
            [Put("audit", f"{now}-{what}", msgspec.json.encode(entry), "completed")]
        )
        self.log.info("command", what=what, actor=actor, reason=reason, **details)

    async def flatten(self) -> list[str]:
        """Close every position by a reduce-only market order; return the client order ids sent."""
        sent: list[str] = []
        for position in self.positions.all():
            instrument = self.instrument(position.symbol, position.venue)
            left = abs(position.quantity) if instrument else Decimal(0)
            while instrument and (
                quantity := instrument.floor_quantity(
                    min(left, instrument.max_quantity)
                )
            ):
                left -= quantity
                request = OrderRequest(
                    symbol=position.symbol,
                    venue=position.venue,
                    side=Side.SELL if position.quantity > 0 else Side.BUY,
                    quantity=quantity,
                    type=OrderType.MARKET,
                    reduce_only=True,
                )
                if not await self._close(request, sent):
                    break
        return sent

    async def _close(self, request: OrderRequest, sent: list[str]) -> bool:
        """Send one closing order and note its id in `sent`; False, and an alert, if nobody took it."""
        try:
            order = await self.orders.submit("operator", request)
        except OrderDeniedError as error:
            refused = str(error)
        else:
            refused = (order.reason or "") if order.status == "REJECTED" else ""
            if not refused:
                sent.append(order.client_order_id)
                return True
        text = f"{request.symbol}@{request.venue} was not flattened: {refused}"
        self.alert("critical", "operator", text)
        return False

    @property
    def inputs_finished(self) -> bool:
        """True when no event will ever come again (every recording has ended)."""
        return bool(self.sources) and all(
            source.finished for source in self.sources.values()
        )

    def lane_stats(self) -> dict[str, Any]:
        return dict(self.lanes.lane_stats())


class _Laps:
    """How long each part of a start took: where a slow one spends its time."""

    def __init__(self, clock: Clock) -> None:
        self.took_ms: dict[str, float] = {}
        self._stamp = clock.monotonic_ns
        self._last_ns = self._stamp()

    def end(self, name: str) -> None:
        now_ns = self._stamp()
        self.took_ms[name] = round((now_ns - self._last_ns) / 1e6, 1)
        self._last_ns = now_ns


def _for_venue(
    name: str, on_market: Callable[[Event], None]
) -> Callable[[Event], None]:
    def deliver(event: Event) -> None:
        if event.venue == name:  # type: ignore[attr-defined]
            on_market(event)

    return deliver
