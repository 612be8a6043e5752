"""Background hosts: child processes at idle priority, in which no task can harm the desk or, for long, another.

The pool spreads tasks over hosts and carries what they say to the desk and back. Each host is watched
from outside: when one is stuck, leaks or dies, the task whose code it ran is named, a fresh host starts,
and the others go on there from their last checkpoints. The named one comes back in a host of its own,
and after a second offence not at all.

Comes from: desk.py
Goes to: host.py, kernel/runner.py
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import msgspec

from nightdesk.abc import Clock, Observer
from nightdesk.errors import (
    CapacityError,
    CommandError,
    DuplicateTaskError,
    UnknownTaskError,
)
from nightdesk.kernel._hosted import HostCallbacks, Hosted, HostedTaskError, HostLimits
from nightdesk.kernel._link import HostLink
from nightdesk.kernel._warden import Warden
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
    Logged,
    Placement,
    Refused,
    Reported,
    Saved,
    Setup,
    Stopped,
    Subscribe,
    Succeeded,
    decode,
    decode_event,
    encode,
)
from nightdesk.model.events import Event, QuoteChanged
from nightdesk.model.health import TaskHealth
from nightdesk.model.instrument import instrument_key
from nightdesk.model.order import Order, OrderRequest
from nightdesk.model.position import Position

__all__ = ["HostCallbacks", "HostLimits", "HostPool", "HostedTask", "HostedTaskError"]

_PARK_NS = 1_000_000_000
_MAX_IN_FLIGHT = 256
_MAX_KEYS = 4096
_KEPT = ("paused", "stopped")
_NOTHING = msgspec.Raw(encode(None))


class HostPool:
    """The hosts of one desk, and the tasks in them.

    Args:
        config: How many hosts, how long one may stand still, how much memory one may hold.
        search_path: Directory from which the user's own dotted modules are imported.
        directory: The desk's state directory: hosts keep cached calendars there, nothing else.
        observers: Told of failures of hosted tasks.
        epoch: Fencing epoch of this start; stands in every context a host saves.
        successes: How often a task of the desk itself has succeeded, for hosted tasks that come
            after it; None for a task that will not run again.
        idle_priority: False lets hosts compete with the desk: for tests on a busy machine.
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
        log_level: str = "info",
        successes: Callable[[str], int | None] = lambda task_id: None,
        idle_priority: bool = True,
    ) -> None:
        self._clock = clock
        self._callbacks = callbacks
        self._observers = tuple(observers)
        self._successes = successes
        self._tasks: dict[str, Hosted] = {}
        self._by_number: dict[int, Hosted] = {}
        self._numbers = 0
        self._homeless: list[Hosted] = []
        self._kin: dict[str, set[str]] = {}
        self._routes: dict[type[Event], tuple[HostLink, ...]] = {}
        self._quotes: dict[str, QuoteChanged] = {}
        self._sent_positions: dict[tuple[str, str], Position] = {}
        self._warden = Warden(
            config=config,
            clock=clock,
            callbacks=callbacks,
            setup=Setup(
                search_path, seed, epoch, max_concurrent, str(directory), log_level
            ),
            on_frame=self._on_frame,
            by_number=self._by_number.get,
            tasks_of=lambda link: [
                self._tasks[name] for name in link.tasks if name in self._tasks
            ],
            place=self._place,
            on_look=self._on_look,
            on_routes=self._routes.clear,
            is_idle=idle_priority,
        )

    # --- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the hosts and the watch; returns before they are ready, since tasks can wait."""
        self._warden.start()

    async def stop(self, timeout_s: float) -> list[str]:
        """Let tasks end and save; return, sorted, the names of those that had to be killed."""
        return await self._warden.stop(timeout_s)

    # --- tasks -----------------------------------------------------------------------------------

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
        for name in spec.after:
            self._kin.setdefault(name, set()).add(spec.task_id)
        if spec.status == "quarantined":
            hosted.rest("quarantined", "before the desk was restarted")
        else:
            self._place(hosted)

    def knows(self, task_id: str) -> bool:
        """Return whether a task of this id is in a host, or was and is kept."""
        return task_id in self._tasks

    def _place(self, hosted: Hosted, link: HostLink | None = None) -> None:
        """Give `hosted` a host; without one it waits for the next look."""
        if self._warden.is_stopping or self._tasks.get(hosted.id) is not hosted:
            return
        link = link or self._link_for(hosted.task)
        hosted.link = link
        if link is None:
            hosted.rest("backoff", "waits for a background host to be started")
            self._homeless.append(hosted)
            return
        hosted.rest("", "")
        link.tasks[hosted.id] = None
        link.place(lambda: self._placement(hosted, link))

    def _placement(self, hosted: Hosted, link: HostLink) -> Placement:
        foreign = [name for name in hosted.task.after if name not in link.tasks]
        for name in foreign:
            link.follows.setdefault(name, 0)
        orders = self._callbacks.orders(hosted.id)
        return Placement(hosted.number, hosted.task, orders, foreign)

    def _link_for(self, task: HostedTask) -> HostLink | None:
        open_links = [
            link
            for link in self._warden.links
            if not link.is_doomed and not link.is_isolated
        ]
        for name in (*task.after, *self._kin.get(task.task_id, ())):
            kin = self._tasks.get(name)
            if kin is not None and kin.link in open_links:
                return kin.link
        return min(open_links, key=lambda link: len(link.tasks), default=None)

    def _on_look(self) -> None:
        homeless, self._homeless = self._homeless, []
        for hosted in homeless:
            self._place(hosted)
        for link in self._warden.links:
            if link.follows and link.is_ready:
                self._tell_successes(link)

    def _tell_successes(self, link: HostLink) -> None:
        """Tell a host which tasks elsewhere, that some of its own come after, succeeded again."""
        again, gone = [], []
        for name, before in link.follows.items():
            count = self._count_successes(name)
            if count is None:
                gone.append(name)
            elif count > before:
                again.append(name)
                link.follows[name] = count
        for name in gone:
            del link.follows[name]
        if again or gone:
            link.send(Succeeded(again, gone))

    def _count_successes(self, name: str) -> int | None:
        hosted = self._tasks.get(name)
        if hosted is None:
            return self._successes(name)
        if hosted.status == "completed":
            return None
        health = hosted.health()
        return health.runs - health.errors

    def _hosted(self, task_id: str) -> Hosted:
        hosted = self._tasks.get(task_id)
        if hosted is None:
            raise UnknownTaskError(task_id, self._tasks)
        return hosted

    async def remove(self, task_id: str) -> None:
        """Stop a task and forget it.

        Raises:
            UnknownTaskError: There is none.
            NightdeskError: Its host did not answer; the task will not come back all the same.
        """
        hosted = self._hosted(task_id)
        link = hosted.link
        del self._tasks[task_id]
        for name in hosted.task.after:
            self._kin.get(name, set()).discard(task_id)
        try:
            if link is not None and not await link.ask(
                "remove", task_id, timeout_s=8.0
            ):
                self._warden.replace_for(link, task_id)
        finally:
            self._by_number.pop(hosted.number, None)
            if link is not None:
                self._leave(link, task_id)

    def _leave(self, link: HostLink, task_id: str) -> None:
        link.tasks.pop(task_id, None)
        if link.is_isolated and not link.tasks:
            self._warden.close_empty(link)

    async def steer(self, verb: str, task_id: str) -> None:
        """Start, stop, pause, resume or trigger a task.

        A task in quarantine comes back, in a host of its own, by `start` or `resume`.

        Raises:
            UnknownTaskError: There is none.
            CommandError: It cannot be done to a task that stands where this one does.
            NightdeskError: Its host refused or did not answer.
        """
        hosted = self._hosted(task_id)
        status = {"pause": "paused", "stop": "stopped"}.get(verb, "")
        if hosted.link is not None:
            await hosted.link.ask(verb, task_id)
        elif verb in ("start", "resume") and hosted.status in (
            "quarantined",
            "completed",
        ):
            self._revive(hosted)
        elif hosted.status != "backoff":
            raise CommandError(
                f"task {task_id!r} is {hosted.status}; `nightdesk tasks resume {task_id}` first."
            )
        if verb != "trigger":
            hosted.change(status=status)

    def _revive(self, hosted: Hosted) -> None:
        hosted.leave()
        hosted.change(status="", streak=0)
        if hosted.status == "quarantined" and hosted.offences:
            self._warden.isolate(hosted)
        else:
            self._place(hosted)
        self._callbacks.on_health_changed(hosted.id, hosted.health())

    async def pause(self, task_id: str) -> None:
        await self.steer("pause", task_id)

    async def resume(self, task_id: str) -> None:
        await self.steer("resume", task_id)

    async def trigger(self, task_id: str) -> None:
        await self.steer("trigger", task_id)

    async def adjust(self, task_id: str, changes: dict[str, Any]) -> None:
        """Change interval, priority or timeout, as `nightdesk tasks adjust` names them.

        Raises:
            UnknownTaskError: There is none.
            NightdeskError: Its host refused or did not answer.
        """
        hosted = self._hosted(task_id)
        if hosted.link is not None:
            await hosted.link.ask("adjust", task_id, changes)
        hosted.change(adjustments={**hosted.task.adjustments, **changes})

    async def explain(self, task_id: str) -> dict[str, Any]:
        """Return `next_run_words`, when it runs next, and its `context`, asked of its host."""
        hosted = self._hosted(task_id)
        if hosted.link is None:
            return {"next_run_words": hosted.why}
        answer: dict[str, Any] = await hosted.link.ask(
            "explain", task_id, timeout_s=1.0
        )
        return answer

    # --- called by the switch: memory only, no system call ---------------------------------------

    def park(self) -> None:
        """Hold every hosted task back before its next callback, until `resume_all` or for a second."""
        until = self._clock.monotonic_ns() + _PARK_NS
        for link in self._warden.links:
            if link.is_open:
                link.process.page.park(until)

    def resume_all(self) -> None:
        """Let hosted tasks go on."""
        for link in self._warden.links:
            if link.is_open:
                link.process.page.park(0)

    # --- what hosts should know ------------------------------------------------------------------

    def push_quote(self, quote: QuoteChanged) -> None:
        """Pass a quote on to the hosts that look at its instrument, at most 20 times a second each."""
        key = instrument_key(quote.symbol, quote.venue)
        self._quotes[key] = quote
        for link in self._warden.links:
            if key in link.keys:
                link.push_quote(key, quote)
        self.push_event(quote)

    def push_event(self, event: Event) -> None:
        """Pass an event on to the hosts in which a task listens to its type."""
        route = self._routes.get(type(event))
        if route is None:
            names = {kind.__name__ for kind in type(event).__mro__}
            route = tuple(link for link in self._warden.links if link.events & names)
            self._routes[type(event)] = route
        for link in route:
            link.push_event(event)

    def push_order(self, order: Order) -> None:
        """Pass a changed order on to its task, which wakes, and positions that fills changed to all."""
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
        for link in self._warden.links if changed else ():
            link.push_positions(changed)

    # --- what hosts say --------------------------------------------------------------------------

    def _on_frame(self, link: HostLink, frame: Frame) -> None:
        try:
            _HANDLERS[type(frame)](self, link, frame)
        except Exception as error:
            # One frame that cannot be used must not end the conversation.
            text = f"a {type(frame).__name__} message of host {link.number} was dropped"
            self._callbacks.log("", "error", text, {"error": repr(error)})

    def _on_hello(self, link: HostLink, frame: Hello) -> None:
        link.is_ready = True

    def _on_saved(self, link: HostLink, frame: Saved) -> None:
        for saved in frame.contexts:
            hosted = self._tasks.get(saved.task_id)
            if hosted is not None:
                hosted.change(context=saved.data)
                self._callbacks.save_context(saved.task_id, saved.data, saved.shelf)

    def _on_subscribe(self, link: HostLink, frame: Subscribe) -> None:
        link.events.update(frame.events)
        self._routes.clear()

    def _subscribe_quotes(self, link: HostLink, keys: list[str]) -> list[QuoteChanged]:
        if len(link.keys) + len(keys) > _MAX_KEYS:
            consequence = "the new ones are not sent"
            raise CapacityError(
                "the list of quotes of one host", _MAX_KEYS, consequence
            )
        link.keys.update(keys)
        return [self._quotes[key] for key in keys if key in self._quotes]

    def _on_reported(self, link: HostLink, frame: Reported) -> None:
        for task_id, health in frame.health:
            hosted = self._tasks.get(task_id)
            if hosted is not None:
                hosted.report = health

    def _on_task_health_changed(self, link: HostLink, frame: HealthChanged) -> None:
        hosted = self._tasks.get(frame.health.task_id)
        if hosted is not None:
            hosted.report = msgspec.Raw(encode(frame.health))
            status = frame.health.status
            hosted.change(status=status if status in _KEPT else "")
            self._callbacks.on_health_changed(hosted.id, hosted.health())

    def _on_failed(self, link: HostLink, frame: Failed) -> None:
        error = HostedTaskError(frame.kind, frame.text)
        for observer in self._observers:
            observer.on_task_failed(frame.task_id, error, frame.consequence)

    def _on_finished(self, link: HostLink, frame: Finished) -> None:
        hosted = self._tasks.get(frame.health.task_id)
        if hosted is not None:
            hosted.report = msgspec.Raw(encode(frame.health))
            hosted.link = None
            hosted.rest("completed", frame.health.why)
            self._leave(link, hosted.id)
            self._callbacks.on_finished(hosted.id)

    def _on_refused(self, link: HostLink, frame: Refused) -> None:
        hosted = self._tasks.get(frame.task_id)
        if hosted is not None:
            hosted.link = None
            hosted.rest("quarantined", f"cannot be built: {frame.text}")
            self._leave(link, frame.task_id)
            self._callbacks.on_refused(frame.task_id, frame.text, frame.is_context)

    def _on_stopped(self, link: HostLink, frame: Stopped) -> None:
        link.stuck = frame.stuck

    def _on_ask(self, link: HostLink, frame: Ask) -> None:
        if sum(map(len, link.in_flight.values())) >= _MAX_IN_FLIGHT:
            what = "the list of requests of one background host"
            full = CapacityError(what, _MAX_IN_FLIGHT, "nothing was done; try again")
            link.send(Answer(frame.number, _NOTHING, Failure.of(full)))
            return
        flights = link.in_flight.setdefault(frame.task_id, set())
        flight = asyncio.get_running_loop().create_task(
            self._answer(link, frame), name=frame.task_id or "hosts"
        )
        flights.add(flight)

        def landed(flight: asyncio.Task[None]) -> None:
            flights.discard(flight)
            if not flights and link.in_flight.get(frame.task_id) is flights:
                del link.in_flight[frame.task_id]

        flight.add_done_callback(landed)

    async def _answer(self, link: HostLink, ask: Ask) -> None:
        try:
            body = await self._carry_out(link, ask)
        except Exception as error:
            link.send(Answer(ask.number, _NOTHING, Failure.of(error)))
        else:
            link.send(Answer(ask.number, msgspec.Raw(encode(body))))

    async def _carry_out(self, link: HostLink, ask: Ask) -> Any:
        callbacks, task_id = self._callbacks, ask.task_id
        match ask.verb:
            case "subscribe":
                return self._subscribe_quotes(link, decode(ask.body, type=list[str]))
            case "submit":
                request = decode(ask.body, type=OrderRequest)
                return await callbacks.submit(task_id, request)
            case "cancel":
                return await callbacks.cancel(task_id, decode(ask.body, type=str))
            case "save":
                key, data = decode(ask.body, type=tuple[str, bytes])
                return await callbacks.save_private(task_id, key, data)
            case "load":
                return await callbacks.load_private(task_id, decode(ask.body, type=str))
        raise CommandError(f"a background host cannot ask for {ask.verb!r}")

    # --- what an operator sees -------------------------------------------------------------------

    def health(self) -> list[TaskHealth]:
        """Return the last report of each task, a second old or so."""
        return [hosted.health() for hosted in self._tasks.values()]

    def task_ids(self) -> list[str]:
        """Return the ids of all tasks, in order of arrival."""
        return list(self._tasks)

    def health_of_one(self, task_id: str) -> TaskHealth:
        """Return the last report of one task.

        Raises:
            UnknownTaskError: There is none.
        """
        return self._hosted(task_id).health()

    def health_of(self, statuses: Collection[str]) -> list[TaskHealth]:
        """Return the health of the tasks that have one of `statuses`."""
        return [
            hosted.health()
            for hosted in self._tasks.values()
            if hosted.status_now() in statuses
        ]

    def count_by_status(self) -> Counter[str]:
        """Return how many tasks there are of each status."""
        return Counter(hosted.status_now() for hosted in self._tasks.values())

    def describe(self) -> list[dict[str, Any]]:
        """Return one line per host."""
        links = [*self._warden.links, *filter(None, (self._warden.spare,))]
        return [self._describe(link) for link in links]

    def _describe(self, link: HostLink) -> dict[str, Any]:
        alive_s = (self._clock.monotonic_ns() - link.started_ns) / 1e9
        return {
            "host": link.number,
            "pid": link.process.pid,
            "status": "ready" if link.is_ready else "starting",
            "isolated": link.is_isolated,
            "spare": link is self._warden.spare,
            "tasks": len(link.tasks),
            "alive_s": round(alive_s, 1),
            "still_s": round(link.process.still_s, 2),
            "resident_mb": link.process.resident_bytes() >> 20,
            "cpu_s": round(link.process.cpu_s(), 2),
            "backlog_bytes": link.backlog,
            "dropped_events": link.dropped,
            "restarts": self._warden.restarts,
        }


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
