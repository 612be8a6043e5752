"""Watches over the hosts: names who harms one, replaces it, and decides what becomes of the offender.

Comes from: kernel/hosts.py
Goes to: kernel/hosts.py
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from nightdesk.abc import Clock
from nightdesk.kernel._hosted import HostCallbacks, Hosted, HostLimits
from nightdesk.kernel._link import HostLink
from nightdesk.kernel._process import spawn
from nightdesk.kernel._wire import Frame, Instruments, Setup, Stop
from nightdesk.kernel.loop import Lane, lane

__all__ = ["Warden"]

_LOOK_S = 0.1
_START_S = 60.0
_MEMORY_EVERY = 5
_OPEN_EVERY = 10
_LINES_PER_LOOK = 20
_LIVED_S = 120.0
_MAX_BACKOFF_S = 60.0
_FIRST_BACKOFF_S = 1.0
_REPEAT_NS = 3_600_000_000_000
_MAX_ISOLATED = 4
_INSTRUMENTS_PER_FRAME = 500
_CLEAR_SHARE = 20
_AT_ONCE = 100
# Signals by which somebody outside ends a process: whoever ran just then is not to blame.
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)


class Warden:
    """The hosts of one pool.

    Args:
        on_frame: Takes what a host says.
        by_number: The number in a host's page to its task.
        tasks_of: The tasks that live in a host.
        place: Gives a task a host, or the best there is.
        on_look: Called ten times a second, after every host was looked at.
        on_routes: The hosts have changed.
    """

    def __init__(
        self,
        *,
        config: HostLimits,
        clock: Clock,
        callbacks: HostCallbacks,
        setup: Setup,
        on_frame: Callable[[HostLink, Frame], None],
        by_number: Callable[[int], Hosted | None],
        tasks_of: Callable[[HostLink], list[Hosted]],
        place: Callable[[Hosted, HostLink | None], None],
        on_look: Callable[[], None],
        on_routes: Callable[[], None],
        is_idle: bool = True,
    ) -> None:
        self.links: list[HostLink] = []
        self.spare: HostLink | None = None
        self.restarts = 0
        self.is_stopping = False
        self._config = config
        self._clock = clock
        self._callbacks = callbacks
        self._setup = setup
        self._on_frame = on_frame
        self._by_number = by_number
        self._tasks_of = tasks_of
        self._place = place
        self._on_look = on_look
        self._on_routes = on_routes
        self._is_idle = is_idle
        self._notice_s = min(0.5, config.stall_s / 2)
        self._memory_bytes = config.memory_mb * 1024 * 1024
        self._chores: set[asyncio.Task[None]] = set()
        self._numbers = 0
        self._looks = 0

    # --- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the hosts and the watch; tasks can be placed before the hosts are ready."""
        for _ in range(max(1, self._config.hosts)):
            self.open()
        self._chore(self._watch())

    async def stop(self, timeout_s: float) -> list[str]:
        """End every host; return the tasks that had to be killed."""
        self.is_stopping = True
        for chore in list(self._chores):
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        links = [*self.links, *filter(None, (self.spare,))]
        stuck = await asyncio.gather(*(self._close(link, timeout_s) for link in links))
        self.links, self.spare = [], None
        return sorted({name for names in stuck for name in names})

    async def _close(self, link: HostLink, timeout_s: float) -> list[str]:
        link.is_doomed = True
        link.process.page.park(0)
        link.send(Stop(timeout_s * 0.8))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await link.closed.wait()
        stuck = link.stuck
        if stuck == []:
            await link.process.gone(1.0)  # it ends by itself
        if stuck is None:  # silent to the end: whoever holds it is the reason
            owner = self._by_number(link.process.page.owner)
            stuck = [owner.id] if owner else []
        for task_id in stuck:
            detail = "killed with its host; its last checkpoint is kept"
            self._callbacks.on_offender(task_id, "ignores stop", detail, "")
        await link.end()
        return stuck

    def _chore(self, work: Coroutine[Any, Any, None]) -> None:
        with lane(Lane.HIGH):
            chore = asyncio.get_running_loop().create_task(work, name="hosts")
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    def open(self, *, is_isolated: bool = False, failures: int = 0) -> HostLink | None:
        """Start a host; None if the machine refuses, then the watch tries again."""
        try:
            link = self._spawn(is_isolated, failures)
        except OSError as error:
            text = f"no background host can be started: {error}; trying again"
            self._callbacks.alert("", "critical", text)
            return None
        self._admit(link)
        return link

    def _admit(self, link: HostLink) -> None:
        self.links.append(link)
        self._on_routes()

    def _spawn(self, is_isolated: bool = False, failures: int = 0) -> HostLink:
        process, sock = spawn(self._clock, is_idle=self._is_idle)
        self._numbers += 1
        link = HostLink(
            self._numbers,
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

    # --- the watch -------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(_LOOK_S)
            self._looks += 1
            for link in list(self.links):
                if not link.is_doomed:
                    self._examine(link)
            if self._looks % _OPEN_EVERY == 0 and not self._shared():
                self.open()
            self._on_look()

    def _shared(self) -> list[HostLink]:
        return [link for link in self.links if not link.is_isolated]

    def _examine(self, link: HostLink) -> None:
        process, config = link.process, self._config
        process.look()
        self._pass_output_on(link)
        code = process.exit_code()
        if code is not None:
            self._on_death(link, code)
            return
        if not link.is_ready:
            if (self._clock.monotonic_ns() - link.started_ns) / 1e9 > _START_S:
                self._replace(link, "stuck", 0, f"did not start within {_START_S:g} s")
            return
        owner, still_s, grace_s = (
            process.page.owner,
            process.still_s,
            process.page.grace_s,
        )
        if still_s > max(config.stall_s, grace_s):
            self._replace(link, "stuck", owner, f"held its host for {still_s:.1f} s")
        elif link.blocked_s() > 2 * config.stall_s:
            self._replace(link, "stuck", owner, "its host takes no messages any more")
        elif still_s > self._notice_s and not grace_s:
            self._notice(link, still_s)
        elif self._looks % _MEMORY_EVERY == 0:
            self._weigh(link)

    def _pass_output_on(self, link: HostLink) -> None:
        for line in link.process.read_output()[-_LINES_PER_LOOK:]:
            if line.strip():
                fields = {"host": link.number}
                self._callbacks.log("", "info", line[:1000], fields)

    def _notice(self, link: HostLink, still_s: float) -> None:
        """Name who holds the host before its time is over, and get a fresh host ready."""
        page = link.process.page
        if not page.owner or link.named_since_ns == page.since_ns:
            return
        link.named_since_ns = page.since_ns
        detail = f"holds its host for {still_s:.1f} s"
        self._chore(self._name(link, self._by_number(page.owner), detail))
        if self.spare is None and not link.is_isolated:
            with contextlib.suppress(OSError):
                self.spare = self._spawn()

    async def _name(self, link: HostLink, hosted: Hosted | None, detail: str) -> None:
        if hosted is None:
            return
        if not hosted.stack:
            # Once only: the signal that asks for the stack cuts short what a task waits for in native
            # code, and one that is poked every time would never be found to be stuck.
            hosted.stack = await link.process.stack() or "(it did not answer in time)"
        self._callbacks.on_offender(hosted.id, "slow", detail, hosted.stack)

    def _weigh(self, link: HostLink) -> None:
        link.resident = link.process.resident_bytes()
        if link.resident > self._memory_bytes:
            held = f"its host held {link.resident >> 20} MB of {self._config.memory_mb}"
            grown = link.process.page.leader[1] >> 20
            detail = f"{held}, some {grown} MB of them by this task"
            self._replace(link, "leaks", self._leaker(link), detail)

    def _leaker(self, link: HostLink) -> int:
        """Return the task that the samples accuse; 0 if they accuse nobody clearly."""
        leader, grown = link.process.page.leader
        return leader if grown > self._memory_bytes / _CLEAR_SHARE else 0

    def _on_death(self, link: HostLink, code: int) -> None:
        kind, owner = "crashes", link.process.page.owner
        words = f"exited with code {code}"
        if code < 0:
            words = f"was ended by signal {-code} ({signal.strsignal(-code)})"
        if code in _FROM_OUTSIDE:
            owner = 0
            if (
                link.resident > self._memory_bytes * 0.8
            ):  # by the system, for want of memory
                kind, owner = "leaks", self._leaker(link)
        self._replace(link, kind, owner, f"its host {words}")

    # --- replacing a host ------------------------------------------------------------------------

    def _replace(self, link: HostLink, kind: str, owner: int, detail: str) -> None:
        link.is_doomed = True
        self._chore(self._replace_slowly(link, kind, self._by_number(owner), detail))

    async def _replace_slowly(
        self, link: HostLink, kind: str, offender: Hosted | None, detail: str
    ) -> None:
        """Kill a host, name the offender, and give the others a new one."""
        stack = ""
        if link.process.exit_code() is not None:
            stack = link.process.last_words()
        elif kind == "stuck":
            stack = await link.process.stack() or (offender.stack if offender else "")
        await link.end()
        self.links.remove(link)
        self._on_routes()
        self.restarts += 1
        why = f"its host is being replaced: {detail}"
        orphans: list[Hosted] = []
        async for hosted in _in_portions(self._tasks_of(link)):
            if hosted.lose_host(why):
                orphans.append(hosted)
        self._report(link, kind, offender, detail, stack)
        if offender is not None and offender in orphans:
            orphans.remove(offender)
            self._punish(offender, kind, detail, stack, link)
        if not link.is_isolated or (orphans and offender is None):
            await self._renew(link, orphans, is_named=offender is not None)

    def _report(
        self,
        link: HostLink,
        kind: str,
        offender: Hosted | None,
        detail: str,
        stack: str,
    ) -> None:
        if offender is not None:
            self._callbacks.on_offender(offender.id, kind, detail, stack)
            return
        words = f"background host {link.number} is replaced, no task could be named: {detail}"
        last = stack[-1000:] or "nothing"
        self._callbacks.alert("", "warning", f"{words}. Its last words: {last}")

    async def _renew(
        self, old: HostLink, orphans: list[Hosted], *, is_named: bool
    ) -> None:
        failures = 0
        if not is_named:
            lived_s = (self._clock.monotonic_ns() - old.started_ns) / 1e9
            failures = 1 if lived_s > _LIVED_S else old.failures + 1
            # There is nobody to keep away from the new host, so it may die as fast as the old one.
            await self._clock.sleep(min(_MAX_BACKOFF_S, 2.0 ** (failures - 1)))
        fresh, self.spare = (
            (None, self.spare) if old.is_isolated else (self.spare, None)
        )
        if fresh is not None and fresh.process.exit_code() is None:
            fresh.failures = failures
            self._admit(fresh)
        else:
            if fresh is not None:
                await fresh.end()
            fresh = self.open(is_isolated=old.is_isolated, failures=failures)
        async for hosted in _in_portions(orphans):
            self._resume(
                hosted, old, None if fresh is None or fresh.is_doomed else fresh
            )

    def _resume(self, hosted: Hosted, old: HostLink, fresh: HostLink | None) -> None:
        """Place a task again, after every request that it had under way has come to its end.

        Otherwise it could look at its orders before an intent of its former self is in the ledger,
        and send the same order again.
        """
        flights = old.in_flight.get(hosted.id)
        if not flights:
            self._place(hosted, fresh)
            return

        async def later() -> None:
            await asyncio.wait(flights)
            self._place(hosted, None if fresh is None or fresh.is_doomed else fresh)

        self._chore(later())

    def _punish(
        self, hosted: Hosted, kind: str, detail: str, stack: str, old: HostLink
    ) -> None:
        now = self._clock.monotonic_ns()
        is_repeated = hosted.offences and now - hosted.offended_ns < _REPEAT_NS
        hosted.offended_ns = now
        hosted.offences += 1
        isolated = sum(link.is_isolated for link in self.links)
        if is_repeated or isolated >= _MAX_ISOLATED:
            times = (
                f"offence {hosted.offences}"
                if is_repeated
                else "no host of its own is free"
            )
            why = f"{kind}: {detail} ({times})"
            if stack:
                why += f". It stood at:\n{stack[:600]}"
            hosted.rest("quarantined", why)
            self._callbacks.on_health_changed(hosted.id, hosted.health())
            return
        why = f"{kind}: {detail}; comes back in a host of its own"
        hosted.rest("backoff", why)

        async def later() -> None:
            await self._clock.sleep(_FIRST_BACKOFF_S)
            flights = old.in_flight.get(hosted.id)
            if flights:
                await asyncio.wait(flights)
            self.isolate(hosted)

        self._chore(later())

    def isolate(self, hosted: Hosted) -> None:
        """Run a task in a host of its own, where it can harm nobody else."""
        link = self.open(is_isolated=True)
        if link is not None:
            self._place(hosted, link)
        else:
            why = "no host of its own could be started; `nightdesk tasks resume` tries again"
            hosted.rest("quarantined", why)

    def close_empty(self, link: HostLink) -> None:
        """End an isolated host whose only task has left it."""
        if link in self.links and link.is_isolated and not link.tasks:
            self.links.remove(link)
            self._on_routes()
            self._chore(self._let_go(link))

    async def _let_go(self, link: HostLink) -> None:
        await self._close(link, 2.0)

    def replace_for(self, link: HostLink, task_id: str) -> None:
        """Replace a host in which a removed task goes on although it was cancelled."""
        if not link.is_doomed:
            detail = "was removed and goes on although it was cancelled; its host is replaced"
            self._callbacks.on_offender(task_id, "ignores stop", detail, "")
            link.is_doomed = True
            self._chore(self._replace_slowly(link, "ignores stop", None, detail))


async def _in_portions(tasks: Sequence[Hosted]) -> AsyncIterator[Hosted]:
    """Yield tasks with a pause after every hundred: 10,000 in one go would hold up the desk."""
    for number, hosted in enumerate(tasks, 1):
        yield hosted
        if not number % _AT_ONCE:
            await asyncio.sleep(0)
