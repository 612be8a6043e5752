"""Background hosts: child processes at idle priority, in which no task can harm the desk or, for long, another.

The pool spreads tasks over hosts, watches each host from outside, and when one is stuck, leaks or dies
it names the task whose code it ran, starts a fresh host, and lets the others go on from their last
checkpoints. The named one comes back in a host of its own, and after a second offence not at all.

Comes from: desk.py
Goes to: host.py, kernel/runner.py
"""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from nightdesk.abc import Clock, Observer, Shelf
from nightdesk.errors import CapacityError, DuplicateTaskError, UnknownTaskError
from nightdesk.kernel._hosted import Hosted
from nightdesk.kernel._link import HostLink
from nightdesk.kernel._process import spawn
from nightdesk.kernel._wire import (
    Alerted,
    Answer,
    Ask,
    Emitted,
    Failed,
    Failure,
    Finished,
    Frame,
    HealthChanged,
    Hello,
    HostedTask,
    Instruments,
    Logged,
    Placement,
    Refused,
    Reported,
    Saved,
    Setup,
    Stop,
    Stopped,
    Subscribe,
    decode,
    decode_event,
    encode,
)
from nightdesk.kernel.loop import Lane, lane
from nightdesk.model.events import Event, QuoteChanged
from nightdesk.model.health import TaskHealth
from nightdesk.model.instrument import Instrument, instrument_key
from nightdesk.model.order import Order, OrderRequest
from nightdesk.model.position import Position

__all__ = ["HostCallbacks", "HostLimits", "HostPool", "HostedTask", "HostedTaskError"]

_LOOK_S = 0.1
_PARK_NS = 1_000_000_000
_START_S = 60.0
_MAX_BACKOFF_S = 60.0
_LIVED_S = 120.0
_REPEAT_NS = 3_600_000_000_000
_MAX_ISOLATED = 4
_MAX_IN_FLIGHT = 256
_MAX_KEYS = 4096
_LINES_PER_LOOK = 20
_INSTRUMENTS_PER_FRAME = 500
_MEMORY_EVERY = 5


class HostLimits(Protocol):
    """`background` of `desk.yaml`."""

    @property
    def hosts(self) -> int: ...
    @property
    def stall_s(self) -> float: ...
    @property
    def memory_mb(self) -> int: ...


class HostCallbacks(Protocol):
    """What hosted tasks need of the desk. `submit` and the other coroutines may take their time; the rest must be quick."""

    async def submit(self, task_id: str, request: OrderRequest) -> Order: ...
    async def cancel(self, task_id: str, client_order_id: str) -> Order: ...
    async def save_private(self, task_id: str, key: str, data: bytes) -> None: ...
    async def load_private(self, task_id: str, key: str) -> bytes | None: ...
    def save_context(self, task_id: str, data: bytes, shelf: Shelf) -> None: ...
    def orders(self, task_id: str) -> list[Order]: ...
    def positions(self) -> list[Position]: ...
    def instruments(self) -> Iterable[Instrument]: ...
    def emit(self, task_id: str, event: Event) -> None: ...
    def alert(self, task_id: str, level: str, text: str) -> None: ...
    def log(
        self, task_id: str, level: str, text: str, fields: dict[str, Any]
    ) -> None: ...

    def on_offender(self, task_id: str, kind: str, detail: str, stack: str) -> None:
        """A task harmed its host. `kind`: `slow` (a first warning), `stuck`, `leaks`, `crashes`,
        `ignores stop`."""

    def on_refused(self, task_id: str, text: str, is_context: bool) -> None:
        """A task cannot be built in its host; `is_context` says that its saved context is the reason."""

    def on_health_changed(self, task_id: str, health: TaskHealth) -> None:
        """A pause, a quarantine, or the end of one: what must survive a restart of the desk."""

    def on_finished(self, task_id: str) -> None:
        """A task reached a final state; its last context came by `save_context` before."""


class HostedTaskError(Exception):
    """What a hosted task raised, as observers see it: the exception itself stays in its process."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind, self.text = kind, text
        super().__init__(f"{kind}: {text}")


class HostPool:
    """The hosts of one desk, and the tasks in them.

    Args:
        config: How many hosts, how long one may stand still, how much memory one may hold.
        search_path: Directory from which the user's own dotted modules are imported.
        directory: The desk's state directory: hosts keep cached calendars there, nothing else.
        epoch: Fencing epoch of this start; stands in every context a host saves.
        observers: Told of failures of hosted tasks.
    """

    def __init__(
        self,
        *,
        config: HostLimits,
        clock: Clock,
        search_path: str,
        directory: Path,
        callbacks: HostCallbacks,
        observers: Iterable[Observer] = (),
        seed: int = 1,
        epoch: int = 0,
        max_concurrent: int = 1000,
    ) -> None:
        self._config = config
        self._clock = clock
        self._callbacks = callbacks
        self._observers = tuple(observers)
        self._setup = Setup(search_path, seed, epoch, max_concurrent, str(directory))
        self._notice_s = min(0.5, config.stall_s / 2)
        self._tasks: dict[str, Hosted] = {}
        self._by_number: dict[int, Hosted] = {}
        self._links: list[HostLink] = []
        self._spare: HostLink | None = None
        self._routes: dict[type[Event], tuple[HostLink, ...]] = {}
        self._quotes: dict[str, QuoteChanged] = {}
        self._sent_positions: dict[tuple[str, str], Position] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._numbers = 0
        self._host_numbers = 0
        self._looks = 0
        self._restarts = 0
        self._is_stopping = False

    # --- life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the hosts and the watch over them; returns before they are ready, since tasks can wait."""
        for _ in range(max(1, self._config.hosts)):
            self._open()
        self._chore(self._watch())

    async def stop(self, timeout_s: float) -> list[str]:
        """Let tasks end and save; return, sorted, the names of those that had to be killed."""
        self._is_stopping = True
        for chore in list(self._chores):
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        links = self._links + ([self._spare] if self._spare else [])
        self._links, self._spare, self._routes = [], None, {}
        self.resume_all()
        stuck = await asyncio.gather(*(self._close(link, timeout_s) for link in links))
        return sorted(name for names in stuck for name in names)

    async def _close(self, link: HostLink, timeout_s: float) -> list[str]:
        link.is_doomed = True
        link.process.page.park(0)
        link.send(Stop(timeout_s * 0.8))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await link.closed.wait()
        stuck = link.stuck
        if stuck is None:  # silent to the end: whoever holds it is the reason
            owner = self._by_number.get(link.process.page.owner)
            stuck = [owner.task.task_id] if owner else []
            if not owner and link.is_ready:
                self._callbacks.log(
                    "",
                    "warning",
                    f"background host {link.number} did not stop and was killed",
                    {},
                )
        for task_id in stuck:
            detail = "would not stop; killed with its host, its last checkpoint is kept"
            self._callbacks.on_offender(task_id, "ignores stop", detail, "")
        await link.end()
        return stuck

    def _chore(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        with lane(Lane.HIGH):
            chore = asyncio.get_running_loop().create_task(
                work, name="background hosts"
            )
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)
        return chore

    def _open(self, *, is_isolated: bool = False, failures: int = 0) -> HostLink | None:
        """Start a host; None if the machine refuses, then the watch tries again."""
        try:
            link = self._spawn(is_isolated, failures)
        except OSError as error:
            self._callbacks.alert(
                "",
                "critical",
                f"no background host can be started: {error}; trying again",
            )
            return None
        self._links.append(link)
        return link

    def _spawn(self, is_isolated: bool = False, failures: int = 0) -> HostLink:
        process, sock = spawn(self._clock)
        self._host_numbers += 1
        link = HostLink(
            self._host_numbers,
            process,
            sock,
            self._clock,
            self._on_frame,
            is_isolated=is_isolated,
            failures=failures,
        )
        link.send(self._setup)
        instruments = list(self._callbacks.instruments())
        for at in range(0, len(instruments), _INSTRUMENTS_PER_FRAME):
            link.send(Instruments(instruments[at : at + _INSTRUMENTS_PER_FRAME]))
        link.push_positions(self._callbacks.positions())
        return link

    # --- tasks --------------------------------------------------------------------------------------

    async def run_task(self, spec: HostedTask) -> None:
        """Run a task in the host with the fewest, or in that of the tasks it comes after.

        Raises:
            DuplicateTaskError: The id is taken.
        """
        if spec.task_id in self._tasks:
            raise DuplicateTaskError(spec.task_id)
        self._numbers += 1
        hosted = Hosted(spec, self._numbers)
        self._tasks[spec.task_id] = hosted
        self._by_number[hosted.number] = hosted
        self._place(hosted)

    def knows(self, task_id: str) -> bool:
        return task_id in self._tasks

    def _place(self, hosted: Hosted, link: HostLink | None = None) -> None:
        """Give `hosted` a host; without one it waits for the watch to open one."""
        if self._is_stopping or self._tasks.get(hosted.task.task_id) is not hosted:
            return
        link = link or self._link_for(hosted.task)
        hosted.link = link
        if link is None:
            hosted.rest(
                "backoff", "no background host could be started yet; trying again"
            )
            return
        hosted.status = ""
        link.tasks.add(hosted.task.task_id)
        link.place(
            lambda: Placement(
                hosted.number, hosted.task, self._callbacks.orders(hosted.task.task_id)
            )
        )

    def _link_for(self, task: HostedTask) -> HostLink | None:
        open_links = [
            link for link in self._links if not link.is_doomed and not link.is_isolated
        ]
        for name in task.after:
            before = self._tasks.get(name)
            if before is not None and before.link in open_links:
                return before.link
        return min(open_links, key=lambda link: len(link.tasks), default=None)

    def _hosted(self, task_id: str) -> Hosted:
        hosted = self._tasks.get(task_id)
        if hosted is None:
            raise UnknownTaskError(task_id, self._tasks)
        return hosted

    async def remove(self, task_id: str) -> None:
        """Stop a task and forget it.

        Raises:
            UnknownTaskError: There is none.
        """
        hosted = self._hosted(task_id)
        self._forget(hosted)
        if hosted.link is not None:
            await hosted.link.ask("remove", task_id)

    def _forget(self, hosted: Hosted) -> None:
        del self._tasks[hosted.task.task_id]
        del self._by_number[hosted.number]
        if hosted.link is not None:
            hosted.link.tasks.discard(hosted.task.task_id)

    async def steer(self, verb: str, task_id: str) -> None:
        """Start, stop, pause, resume or trigger a task.

        A task in quarantine comes back, in a host of its own, by `start`, `resume` or `trigger`.

        Raises:
            UnknownTaskError: There is none.
            NightdeskError: Its host refused or did not answer.
        """
        hosted = self._hosted(task_id)
        if verb in ("pause", "stop"):
            hosted.task = msgspec.structs.replace(hosted.task, paused=True)
        elif verb in ("resume", "start"):
            hosted.task = msgspec.structs.replace(hosted.task, paused=False)
        if hosted.link is not None:
            await hosted.link.ask(verb, task_id)
        elif hosted.status == "quarantined" and verb in ("start", "resume", "trigger"):
            hosted.rest("waiting", "on its way to a host of its own")
            self._isolate(hosted)
            self._callbacks.on_health_changed(task_id, hosted.health())

    async def pause(self, task_id: str) -> None:
        await self.steer("pause", task_id)

    async def resume(self, task_id: str) -> None:
        await self.steer("resume", task_id)

    async def trigger(self, task_id: str) -> None:
        await self.steer("trigger", task_id)

    async def adjust(self, task_id: str, changes: dict[str, Any]) -> None:
        """Change interval, priority or timeout, as `nightdesk tasks adjust` names them; kept over restarts of a host."""
        hosted = self._hosted(task_id)
        if hosted.link is not None:
            await hosted.link.ask("adjust", task_id, changes)
        hosted.task = msgspec.structs.replace(
            hosted.task, adjustments={**hosted.task.adjustments, **changes}
        )

    async def explain(self, task_id: str) -> dict[str, Any]:
        """Return `waits_at` (its await stack) and `next_run_words`, asked of its host."""
        hosted = self._hosted(task_id)
        if hosted.link is None:
            return {"waits_at": [], "next_run_words": hosted.why}
        answer: dict[str, Any] = await hosted.link.ask(
            "explain", task_id, timeout_s=1.0
        )
        return answer

    # --- called by the switch: memory only, no system call ----------------------------------------------

    def park(self) -> None:
        """Hold every hosted task back before its next callback, until `resume_all` or for a second."""
        until = self._clock.monotonic_ns() + _PARK_NS
        for link in self._links:
            link.process.page.park(until)

    def resume_all(self) -> None:
        """Let hosted tasks go on."""
        for link in self._links:
            link.process.page.park(0)

    # --- what hosts should know -------------------------------------------------------------------------

    def push_quote(self, quote: QuoteChanged) -> None:
        """Pass a quote on to the hosts that look at its instrument, at most 20 times a second each."""
        key = instrument_key(quote.symbol, quote.venue)
        self._quotes[key] = quote
        for link in self._links:
            if key in link.keys:
                link.push_quote(key, quote)

    def push_event(self, event: Event) -> None:
        """Pass an event on to the hosts in which a task listens to its type."""
        route = self._routes.get(type(event))
        if route is None:
            names = {kind.__name__ for kind in type(event).__mro__}
            route = tuple(link for link in self._links if link.events & names)
            self._routes[type(event)] = route
        for link in route:
            link.push_event(event)

    def push_order(self, order: Order) -> None:
        """Pass a changed order on to its task, which wakes, and the positions that its fills changed to all."""
        hosted = self._tasks.get(order.task_id)
        if hosted is not None and hosted.link is not None:
            hosted.link.push_order(order)
        if order.filled_quantity:
            self._push_positions()

    def _push_positions(self) -> None:
        changed = []
        for position in self._callbacks.positions():
            place = (position.symbol, position.venue)
            if self._sent_positions.get(place) != position:
                self._sent_positions[place] = position
                changed.append(position)
        if changed:
            for link in self._links:
                link.push_positions(changed)

    # --- what hosts say -----------------------------------------------------------------------------------

    def _on_frame(self, link: HostLink, frame: Frame) -> None:
        try:
            _HANDLERS[type(frame)](self, link, frame)
        except Exception as error:
            # One frame that cannot be used must not end the conversation.
            text = f"a {type(frame).__name__} message of host {link.number} was dropped: {error}"
            self._callbacks.log("", "error", text, {})

    def _on_hello(self, link: HostLink, frame: Hello) -> None:
        link.is_ready = True

    def _on_saved(self, link: HostLink, frame: Saved) -> None:
        for saved in frame.contexts:
            hosted = self._tasks.get(saved.task_id)
            if hosted is not None:
                hosted.task = msgspec.structs.replace(hosted.task, context=saved.data)
                self._callbacks.save_context(saved.task_id, saved.data, saved.shelf)

    def _on_subscribe(self, link: HostLink, frame: Subscribe) -> None:
        for key in frame.keys[: _MAX_KEYS - len(link.keys)]:
            link.keys.add(key)
            if key in self._quotes:
                link.push_quote(key, self._quotes[key])
        if frame.events:
            link.events.update(frame.events)
            self._routes.clear()

    def _on_reported(self, link: HostLink, frame: Reported) -> None:
        for task_id, health in frame.health:
            hosted = self._tasks.get(task_id)
            if hosted is not None:
                hosted.report = health

    def _on_task_health_changed(self, link: HostLink, frame: HealthChanged) -> None:
        hosted = self._tasks.get(frame.health.task_id)
        if hosted is not None:
            hosted.report = msgspec.Raw(encode(frame.health))
            self._callbacks.on_health_changed(frame.health.task_id, hosted.health())

    def _on_failed(self, link: HostLink, frame: Failed) -> None:
        error = HostedTaskError(frame.type, frame.text)
        for observer in self._observers:
            observer.on_task_failed(frame.task_id, error, frame.consequence)

    def _on_finished(self, link: HostLink, frame: Finished) -> None:
        hosted = self._tasks.get(frame.task_id)
        if hosted is not None:
            self._forget(hosted)
            self._callbacks.on_finished(frame.task_id)

    def _on_refused(self, link: HostLink, frame: Refused) -> None:
        hosted = self._tasks.get(frame.task_id)
        if hosted is not None:
            link.tasks.discard(frame.task_id)
            hosted.leave()
            hosted.rest("quarantined", f"cannot be built: {frame.text}")
            self._callbacks.on_refused(frame.task_id, frame.text, frame.is_context)

    def _on_stopped(self, link: HostLink, frame: Stopped) -> None:
        link.stuck = frame.stuck

    def _on_ask(self, link: HostLink, frame: Ask) -> None:
        flights = link.in_flight.setdefault(frame.task_id, set())
        if sum(map(len, link.in_flight.values())) >= _MAX_IN_FLIGHT:
            full = CapacityError(
                "the list of requests of one background host",
                _MAX_IN_FLIGHT,
                "try again later",
            )
            link.send(Answer(frame.number, _NOTHING, Failure.of(full)))
            return
        flight = asyncio.get_running_loop().create_task(
            self._answer(link, frame), name=frame.task_id
        )
        flights.add(flight)

        def landed(flight: asyncio.Task[None]) -> None:
            flights.discard(flight)
            if not flights and link.in_flight.get(frame.task_id) is flights:
                del link.in_flight[frame.task_id]

        flight.add_done_callback(landed)

    async def _answer(self, link: HostLink, ask: Ask) -> None:
        try:
            body = await self._carry_out(ask)
        except Exception as error:
            link.send(Answer(ask.number, _NOTHING, Failure.of(error)))
        else:
            link.send(Answer(ask.number, msgspec.Raw(encode(body))))

    async def _carry_out(self, ask: Ask) -> Any:
        callbacks, task_id = self._callbacks, ask.task_id
        match ask.verb:
            case "submit":
                return await callbacks.submit(
                    task_id, decode(ask.body, type=OrderRequest)
                )
            case "cancel":
                return await callbacks.cancel(task_id, decode(ask.body, type=str))
            case "save":
                key, data = decode(ask.body, type=tuple[str, bytes])
                return await callbacks.save_private(task_id, key, data)
            case "load":
                return await callbacks.load_private(task_id, decode(ask.body, type=str))
        raise CapacityError(
            f"what a host may ask for: {ask.verb!r}", 4, "nothing was done"
        )

    # --- the watch -------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(_LOOK_S)
            self._looks += 1
            for link in list(self._links):
                if not link.is_doomed:
                    self._examine(link)
            self._fill_up()

    def _fill_up(self) -> None:
        """Open what could not be opened before, and place what waits for it."""
        homeless = [
            task
            for task in self._tasks.values()
            if task.link is None and task.status == "backoff"
        ]
        if (
            not any(not link.is_isolated for link in self._links)
            and self._looks % 10 == 0
        ):
            self._open()
        for hosted in homeless:
            if hosted.resumes_ns <= self._clock.monotonic_ns():
                self._place(hosted)

    def _examine(self, link: HostLink) -> None:
        process, config = link.process, self._config
        process.look()
        for line in process.read_output()[-_LINES_PER_LOOK:]:
            self._callbacks.log(f"host-{link.number}", "info", line[:1000], {})
        code = process.exit_code()
        if code is not None:
            self._on_death(link, code)
            return
        if not link.is_ready:
            if (self._clock.monotonic_ns() - link.started_ns) / 1e9 > _START_S:
                self._replace(link, "stuck", 0, f"did not start within {_START_S:g} s")
            return
        still_s, limit_s = process.still_s, max(config.stall_s, process.page.grace_s)
        if still_s > limit_s:
            self._replace(
                link, "stuck", process.page.owner, f"held its host for {still_s:.1f} s"
            )
        elif link.blocked_s() > 2 * config.stall_s:
            self._replace(
                link, "stuck", process.page.owner, "its host takes no messages any more"
            )
        elif still_s > self._notice_s and not process.page.grace_s:
            self._notice(link, still_s)
        elif self._looks % _MEMORY_EVERY == 0:
            self._weigh(link)

    def _notice(self, link: HostLink, still_s: float) -> None:
        """Name who holds the host before its time is over, and get a fresh host ready."""
        owner = link.process.page.owner
        if not owner or link.named_owner == link.process.page.since_ns:
            return
        link.named_owner = link.process.page.since_ns
        self._chore(self._name(link, owner, f"holds its host for {still_s:.1f} s"))
        if self._spare is None and not link.is_isolated:
            with contextlib.suppress(OSError):
                self._spare = self._spawn()

    async def _name(self, link: HostLink, owner: int, detail: str) -> None:
        stack = await link.process.stack()
        hosted = self._by_number.get(owner)
        if hosted is not None:
            self._callbacks.on_offender(hosted.task.task_id, "slow", detail, stack)

    def _weigh(self, link: HostLink) -> None:
        resident = link.process.resident_bytes()
        link.resident = resident
        if resident > self._config.memory_mb * 1024 * 1024:
            leader, grown = link.process.page.leader
            detail = f"its host held {resident >> 20} MB of {self._config.memory_mb}, of which {grown >> 20} MB came with it"
            self._replace(link, "leaks", leader, detail)

    def _on_death(self, link: HostLink, code: int) -> None:
        owner = link.process.page.owner
        words = f"exited with code {code}"
        if code < 0:
            words = f"was ended by signal {-code} ({signal.strsignal(-code)})"
        kind = "crashes"
        if code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
            # From outside. Whoever ran just then is not to blame; if memory was scarce, the leader is.
            owner = 0
            if link.resident > self._config.memory_mb * 1024 * 1024 * 0.8:
                kind, owner = "leaks", link.process.page.leader[0]
        self._replace(link, kind, owner, f"its host {words}")

    # --- replacing a host --------------------------------------------------------------------------------

    def _replace(self, link: HostLink, kind: str, owner: int, detail: str) -> None:
        link.is_doomed = True
        self._chore(
            self._replace_slowly(link, kind, self._by_number.get(owner), detail)
        )

    async def _replace_slowly(
        self, link: HostLink, kind: str, offender: Hosted | None, detail: str
    ) -> None:
        """Kill a host, name the offender, and give the others a new one."""
        died = link.process.exit_code() is not None
        stack = link.process.last_words() if died else await link.process.stack()
        await link.end()
        self._links.remove(link)
        self._routes.clear()
        self._restarts += 1
        orphans = [
            self._tasks[task_id]
            for task_id in sorted(link.tasks)
            if task_id in self._tasks
        ]
        for hosted in orphans:
            hosted.leave()
            hosted.rest("backoff", f"its host is being replaced: {detail}")
        self._report(link, kind, offender, detail, stack, len(orphans))
        if offender in orphans:
            orphans.remove(offender)
            self._punish(offender, kind, detail, stack, link)
        if not link.is_isolated:
            await self._renew(link, orphans, named=offender is not None)

    def _report(
        self,
        link: HostLink,
        kind: str,
        offender: Hosted | None,
        detail: str,
        stack: str,
        tasks: int,
    ) -> None:
        if offender is not None:
            self._callbacks.on_offender(offender.task.task_id, kind, detail, stack)
            return
        text = f"background host {link.number} was replaced, no task could be named: {detail}"
        self._callbacks.alert(
            "",
            "warning",
            f"{text}; {tasks} tasks resume. Its last words: {stack[-1000:] or 'none'}",
        )

    async def _renew(
        self, link: HostLink, orphans: list[Hosted], *, named: bool
    ) -> None:
        failures = 0
        if not named:
            lived_s = (self._clock.monotonic_ns() - link.started_ns) / 1e9
            failures = 1 if lived_s > _LIVED_S else link.failures + 1
            # Nobody to keep away from the new host, so it may die as fast: not in a tight circle.
            await self._clock.sleep(min(_MAX_BACKOFF_S, 2.0 ** (failures - 1)))
        fresh, self._spare = self._spare, None
        if fresh is not None and fresh.process.exit_code() is None:
            fresh.failures = failures
            self._links.append(fresh)
        else:
            fresh = self._open(failures=failures)
        for hosted in orphans:
            self._resume(hosted, link, fresh)

    def _resume(self, hosted: Hosted, old: HostLink, fresh: HostLink | None) -> None:
        """Place a task again, after every request it had under way has come to its end.

        Otherwise it could look at its orders before an intent of its former self is in the ledger,
        and send the same order again.
        """
        flights = old.in_flight.get(hosted.task.task_id)
        if not flights:
            self._place(hosted, fresh)
            return

        async def later() -> None:
            await asyncio.wait(flights)
            self._place(hosted, fresh if fresh and not fresh.is_doomed else None)

        hosted.resumes_ns = 1 << 62
        self._chore(later())

    def _punish(
        self, hosted: Hosted, kind: str, detail: str, stack: str, old: HostLink
    ) -> None:
        now = self._clock.monotonic_ns()
        repeated = hosted.offended_ns and now - hosted.offended_ns < _REPEAT_NS
        hosted.offended_ns = now
        hosted.offences += 1
        if repeated or self._isolated() >= _MAX_ISOLATED:
            why = f"{kind}: {detail}, for the {_ordinal(hosted.offences)} time"
            hosted.rest("quarantined", f"{why}. Last seen at:\n{stack[-600:]}")
            self._callbacks.on_health_changed(hosted.task.task_id, hosted.health())
            return
        hosted.rest(
            "backoff", f"{kind}: {detail}; comes back in a host of its own in 1 s"
        )
        hosted.resumes_ns = 1 << 62

        async def later() -> None:
            await self._clock.sleep(1.0)
            flights = old.in_flight.get(hosted.task.task_id)
            if flights:
                await asyncio.wait(flights)
            self._isolate(hosted)

        self._chore(later())

    def _isolated(self) -> int:
        return sum(link.is_isolated for link in self._links)

    def _isolate(self, hosted: Hosted) -> None:
        """Run a task in a host of its own, where it can harm nobody else."""
        if self._tasks.get(hosted.task.task_id) is not hosted:
            return
        link = self._open(is_isolated=True)
        if link is not None:
            self._place(hosted, link)
        else:
            hosted.rest(
                "quarantined",
                "no host of its own could be started. `nightdesk tasks resume` tries again",
            )

    # --- what an operator sees -----------------------------------------------------------------------------

    def health(self) -> list[TaskHealth]:
        """Return the last report of each task, the newest a second old or so."""
        return [hosted.health() for hosted in self._tasks.values()]

    def describe(self) -> list[dict[str, Any]]:
        """Return one line per host."""
        return [
            self._describe(link)
            for link in [*self._links, *filter(None, (self._spare,))]
        ]

    def _describe(self, link: HostLink) -> dict[str, Any]:
        alive_s = (self._clock.monotonic_ns() - link.started_ns) / 1e9
        return {
            "host": link.number,
            "pid": link.process.pid,
            "status": "ready" if link.is_ready else "starting",
            "isolated": link.is_isolated,
            "spare": link is self._spare,
            "tasks": len(link.tasks),
            "alive_s": round(alive_s, 1),
            "still_s": round(link.process.still_s, 2),
            "resident_mb": link.process.resident_bytes() >> 20,
            "cpu_s": round(link.process.cpu_s(), 2),
            "backlog_bytes": link.backlog,
            "dropped_events": link.dropped,
            "restarts": self._restarts,
        }


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


_NOTHING = msgspec.Raw(encode(None))
_HANDLERS: dict[type[Frame], Callable[[HostPool, HostLink, Any], None]] = {
    Hello: HostPool._on_hello,
    Saved: HostPool._on_saved,
    Subscribe: HostPool._on_subscribe,
    Reported: HostPool._on_reported,
    HealthChanged: HostPool._on_task_health_changed,
    Failed: HostPool._on_failed,
    Finished: HostPool._on_finished,
    Refused: HostPool._on_refused,
    Stopped: HostPool._on_stopped,
    Ask: HostPool._on_ask,
    Answer: lambda pool, link, frame: link.on_answer(frame),
    Emitted: lambda pool, link, frame: pool._callbacks.emit(
        frame.task_id, decode_event(frame.event)
    ),
    Alerted: lambda pool, link, frame: pool._callbacks.alert(
        frame.task_id, frame.level, frame.text
    ),
    Logged: lambda pool, link, frame: pool._callbacks.log(
        frame.task_id, frame.level, frame.text, frame.fields
    ),
}
