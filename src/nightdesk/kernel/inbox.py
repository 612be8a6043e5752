"""The one door: every event enters the desk here, whoever sent it.

Comes from: sources/, venues/, handle.py
Goes to: kernel/switch.py (opportunities), portfolio/positions.py (fills), market/
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import copy_context
from itertools import count
from typing import Any

from msgspec.structs import force_setattr

from nightdesk.abc import Clock, Observer
from nightdesk.errors import CapacityError
from nightdesk.kernel.loop import LANE, OWNER, Lane, run_in_desk_lane
from nightdesk.model.events import Event, Opportunity
from nightdesk.model.instrument import instrument_key

__all__ = ["Assess", "EventCallback", "Inbox"]

EventCallback = Callable[[Any], object]
Assess = Callable[[Any], int | None]

_SECOND_NS = 1_000_000_000
# Events that callbacks emit while one event is delivered. Only a callback that answers its own
# events without end comes near it.
_MAX_NESTED = 100_000
# Where an event says who sent it, in order of preference.
_SENDER_FIELDS = ("venue", "chain", "source")


class _Handler:
    __slots__ = ("assess", "deadline_ns", "handles", "name")

    def __init__(
        self,
        name: str,
        handles: tuple[type[Event], ...],
        assess: Assess,
        deadline_s: float,
    ) -> None:
        self.name = name
        self.handles = handles
        self.assess = assess
        self.deadline_ns = round(deadline_s * _SECOND_NS)


class _Subscriber:
    __slots__ = ("callback", "deliver", "mailbox", "owner", "types")

    def __init__(
        self,
        types: tuple[type[Event], ...],
        callback: EventCallback,
        owner: str,
        mailbox: "_Mailbox | None",
    ) -> None:
        self.types = types
        self.callback = callback
        self.owner = owner
        self.mailbox = mailbox
        self.deliver: EventCallback = callback if mailbox is None else mailbox.put


class _Mailbox:
    """Waiting events of one conflated subscriber, in order of arrival.

    A newer event takes the place of the waiting one with the same conflation key. Full: the oldest is dropped.
    """

    def __init__(
        self,
        callback: EventCallback,
        owner: str,
        lane: Lane,
        limit: int,
        report: Callable[[str, str, BaseException], None],
    ) -> None:
        self.conflated = 0
        self.dropped = 0
        self.closed = False
        self._callback = callback
        self._owner = owner
        self._limit = limit
        self._report = report
        self._waiting: OrderedDict[str | int, Event] = OrderedDict()
        self._number = count()
        self._drain_due = False
        self._context = copy_context()
        self._context.run(LANE.set, lane)
        self._context.run(OWNER.set, owner)

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, event: Event) -> None:
        key = event.conflation_key
        waiting = self._waiting
        if key is not None and key in waiting:
            waiting[key] = event
            self.conflated += 1
            return
        if len(waiting) >= self._limit:
            waiting.popitem(last=False)
            self.dropped += 1
        waiting[next(self._number) if key is None else key] = event
        if not self._drain_due:
            self._drain_due = True
            asyncio.get_running_loop().call_soon(self._drain, context=self._context)

    def _drain(self) -> None:
        self._drain_due = False
        waiting, self._waiting = self._waiting, OrderedDict()
        for event in waiting.values():
            if self.closed:
                return
            try:
                self._callback(event)
            except Exception as error:
                self._report("subscriber", self._owner, error)


class _Route:
    """What is done with the events of one type: looked up once, so that the way of an event is short."""

    __slots__ = (
        "counts",
        "handlers",
        "has_instrument",
        "has_key",
        "max_age_ns",
        "sender",
        "subscribers",
    )

    def __init__(
        self,
        subscribers: tuple[tuple[EventCallback, str], ...],
        handlers: tuple[_Handler, ...],
        has_key: bool,
        has_instrument: bool,
        max_age_ns: int | None,
        sender: str | None,
        counts: dict[str, int],
    ) -> None:
        self.subscribers = subscribers
        self.handlers = handlers
        self.has_key = has_key
        self.has_instrument = has_instrument
        self.max_age_ns = max_age_ns
        self.sender = sender
        self.counts = counts


class Inbox:
    """Takes every event in: drops duplicates and stale ones, delivers the rest, finds opportunities.

    **Order.** An event that a subscriber emits while it is called waits until the current one has reached
    every subscriber. All of them see the same order, and a cause always comes before its effect.

    **Age.** `ts_received_ns - ts_event_ns` compares two clocks. `set_clock_offset_ns` tells how far a sender's
    is ahead, as measured; without it the age is only as good as both clocks. Real feeds show ages of -1.27 s.
    A negative age proves nothing but a wrong clock: such an event is neither dropped nor taken as proof that
    its sender's events are fresh. It is delivered, counted as `negative_age` with the largest lead seen, and
    the operator is told once per sender, who can then have the offset measured.

    Args:
        seen_capacity: Duplicate keys remembered; the least recently seen is forgotten first.
        opportunity_limit: Opportunities that one event, with all it causes, may raise; beyond it the least edge is dropped.
        max_age_s: Events of these types (and their subtypes) are dropped when older.
        observers: Told of each event with its disposition: accepted, duplicate, stale.
        persist: Called with each new duplicate key before the event is delivered.
        mailbox_limit: Events that may wait for one conflated subscriber.

    Attributes:
        on_opportunity: Called for each opportunity, best edge first: the switch.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        seen_capacity: int = 100_000,
        opportunity_limit: int = 256,
        max_age_s: Mapping[type[Event], float] | None = None,
        observers: Iterable[Observer] = (),
        persist: Callable[[str], None] | None = None,
        mailbox_limit: int = 10_000,
    ) -> None:
        self.on_opportunity: Callable[[Opportunity], None] | None = None
        self._clock = clock
        self._now_ns = clock.now_ns
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._seen_capacity = seen_capacity
        self._opportunity_limit = opportunity_limit
        self._max_age_ns = {
            kind: round(age * _SECOND_NS) for kind, age in (max_age_s or {}).items()
        }
        self._observers = tuple(observers)
        # An observer that does not override `on_event` costs nothing on the way of an event.
        self._watchers = tuple(
            o.on_event
            for o in self._observers
            if type(o).on_event is not Observer.on_event
        )
        self._persist = persist
        self._mailbox_limit = mailbox_limit
        self._offsets_ns: dict[str, int] = {}
        self._leads_ns: dict[str, int] = {}
        self._subscribers: list[_Subscriber] = []
        # By instrument, and by owner: with 10,000 tasks a quote must not ask each whether it is concerned.
        self._narrow: dict[str, dict[_Subscriber, None]] = {}
        self._narrow_of: dict[str, list[tuple[str, _Subscriber]]] = {}
        self._handlers: dict[str, _Handler] = {}
        self._routes: dict[type[Event], _Route] = {}
        self._counts: dict[str, dict[str, int]] = {}
        self._failures: dict[str, int] = {}
        self._raised = 0
        self._opportunities_dropped = 0
        self._delivering = False
        self._nested: deque[Event] = deque()
        self._nested_count = 0
        self._found: list[Opportunity] = []

    # --- Who gets what --------------------------------------------------------------------------

    def subscribe(
        self,
        types: Sequence[type[Event]],
        callback: EventCallback,
        *,
        owner: str = "",
        conflated: bool = False,
        lane: Lane = Lane.DESK,
        instruments: Iterable[str] | None = None,
    ) -> None:
        """Call `callback` with every event of `types` and their subtypes, in order of subscription.

        Args:
            owner: Names the subscriber in reports; `unsubscribe(owner)` ends it.
            instruments: Only events of these, after those who asked for all; on the way of others it costs nothing.
            conflated: Deliver once per loop iteration, in `lane`, the newest event of each conflation key.
                Otherwise the callback runs at once, on the way of the event: it must be quick.
        """
        owner = owner or getattr(callback, "__qualname__", repr(callback))
        mailbox = (
            _Mailbox(callback, owner, lane, self._mailbox_limit, self._note_failure)
            if conflated
            else None
        )
        subscriber = _Subscriber(tuple(types), callback, owner, mailbox)
        if instruments is None:
            self._subscribers.append(subscriber)
            self._routes.clear()
            return
        for instrument in dict.fromkeys(instruments):
            self._narrow.setdefault(instrument, {})[subscriber] = None
            self._narrow_of.setdefault(owner, []).append((instrument, subscriber))

    def unsubscribe(self, owner: str) -> None:
        """End every subscription, and the opportunity handler, of `owner`. Harmless if there is none."""
        ended = [s for s in self._subscribers if s.owner == owner]
        for instrument, subscriber in self._narrow_of.pop(owner, ()):
            ended.append(subscriber)
            del self._narrow[instrument][subscriber]
            if not self._narrow[instrument]:
                del self._narrow[instrument]
        for subscriber in ended:
            if subscriber.mailbox is not None:
                subscriber.mailbox.closed = True
        self._subscribers = [s for s in self._subscribers if s.owner != owner]
        self._handlers.pop(owner, None)
        self._routes.clear()

    def add_handler(
        self,
        name: str,
        handles: Sequence[type[Event]],
        assess: Assess,
        deadline_s: float = 1.0,
    ) -> None:
        """Ask `assess` for the edge, in ppm, of every event of `handles`; None means no opportunity."""
        self._handlers[name] = _Handler(name, tuple(handles), assess, deadline_s)
        self._routes.clear()

    def remember(self, keys: Iterable[str]) -> None:
        """Take duplicate keys of an earlier run as seen, oldest first."""
        for key in keys:
            self._has_seen(key)

    def set_clock_offset_ns(self, sender: str, offset_ns: int) -> None:
        """Say by how much the clock of a venue, chain or source is ahead of ours, as measured."""
        self._offsets_ns[sender] = offset_ns

    # --- The way of an event --------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Take one event in. It has been delivered when this returns, unless a subscriber called it.

        Raises:
            CapacityError: Subscribers answer each other's events without end.
        """
        if self._delivering:
            self._nested_count += 1
            if self._nested_count > _MAX_NESTED:
                raise CapacityError(
                    "the inbox",
                    _MAX_NESTED,
                    "refused: its emitter answers its own events without end",
                )
            self._nested.append(event)
            return
        # What subscribers start must not be parked because a background task emitted the event.
        if LANE.get():
            run_in_desk_lane(self.emit, event)
            return
        self._delivering = True
        self._nested_count = 0
        try:
            self._take(event)
            while self._nested:
                self._take(self._nested.popleft())
        finally:
            self._delivering = False
        if self._found:
            self._raise_found()

    def _take(self, event: Event) -> None:
        route = self._routes.get(type(event)) or self._make_route(type(event))
        if not event.ts_received_ns:
            force_setattr(event, "ts_received_ns", self._now_ns())
        disposition = "accepted"
        if route.has_key and self._is_repeated(event.duplicate_key):
            disposition = "duplicate"
        elif route.max_age_ns is not None:
            disposition = self._judge_age(event, route, route.max_age_ns)
        route.counts[disposition] += 1
        if self._watchers:
            self._show(event, disposition)
        if disposition != "accepted":
            return
        for deliver, owner in route.subscribers:
            try:
                deliver(event)
            except Exception as error:
                self._note_failure("subscriber", owner, error)
        if self._narrow and route.has_instrument:
            self._deliver_narrowly(event)
        for handler in route.handlers:
            self._assess(handler, event)

    def _deliver_narrowly(self, event: Any) -> None:
        found = self._narrow.get(instrument_key(event.symbol, event.venue))
        for subscriber in tuple(found or ()):
            if not isinstance(event, subscriber.types):
                continue
            try:
                subscriber.deliver(event)
            except Exception as error:
                self._note_failure("subscriber", subscriber.owner, error)

    def _show(self, event: Event, disposition: str) -> None:
        for watch in self._watchers:
            try:
                watch(event, disposition)
            except Exception as error:
                self._note_failure(
                    "observer", type(getattr(watch, "__self__", watch)).__name__, error
                )

    def _is_repeated(self, key: str | None) -> bool:
        if key is None:
            return False
        if self._has_seen(key):
            return True
        if self._persist is not None:
            self._persist(key)
        return False

    def _has_seen(self, key: str) -> bool:
        seen = self._seen
        if key in seen:
            seen.move_to_end(key)
            return True
        seen[key] = None
        if len(seen) > self._seen_capacity:
            seen.popitem(last=False)
        return False

    def _judge_age(self, event: Event, route: _Route, max_age_ns: int) -> str:
        if not event.ts_event_ns:
            return "accepted"  # nothing is known of its age
        sender = getattr(event, route.sender) if route.sender else ""
        age_ns = (
            event.ts_received_ns - event.ts_event_ns + self._offsets_ns.get(sender, 0)
        )
        if age_ns > max_age_ns:
            return "stale"
        if age_ns < 0:
            self._note_negative_age(sender, -age_ns, route)
        return "accepted"

    def _note_negative_age(self, sender: str, lead_ns: int, route: _Route) -> None:
        route.counts["negative_age"] += 1
        if sender not in self._leads_ns:
            self._alert(
                "warning",
                sender or "inbox",
                f"an event of {sender or 'an unnamed sender'} is {lead_ns / _SECOND_NS:.3f} s younger than now: its "
                "clock is ahead of ours, so its ages cannot be trusted until the clock offset is measured and set",
            )
        self._leads_ns[sender] = max(lead_ns, self._leads_ns.get(sender, 0))

    def _make_route(self, kind: type[Event]) -> _Route:
        ages = [
            self._max_age_ns[base] for base in kind.__mro__ if base in self._max_age_ns
        ]
        fields = kind.__struct_fields__
        route = _Route(
            subscribers=tuple(
                (s.deliver, s.owner)
                for s in self._subscribers
                if issubclass(kind, s.types)
            ),
            handlers=tuple(
                h for h in self._handlers.values() if issubclass(kind, h.handles)
            ),
            has_key=kind.duplicate_key is not Event.duplicate_key,
            has_instrument="symbol" in fields and "venue" in fields,
            max_age_ns=ages[0] if ages else None,
            sender=next((name for name in _SENDER_FIELDS if name in fields), None),
            counts=self._counts.setdefault(
                kind.__name__,
                {"accepted": 0, "duplicate": 0, "stale": 0, "negative_age": 0},
            ),
        )
        self._routes[kind] = route
        return route

    # --- Opportunities --------------------------------------------------------------------------

    def _assess(self, handler: _Handler, event: Event) -> None:
        try:
            edge_ppm = handler.assess(event)
        except Exception as error:
            self._note_failure("handler", handler.name, error)
            return
        if edge_ppm is None:
            return
        self._found.append(
            Opportunity(
                ts_event_ns=event.ts_event_ns,
                ts_received_ns=event.ts_received_ns,
                handler=handler.name,
                edge_ppm=edge_ppm,
                deadline_ns=event.ts_received_ns + handler.deadline_ns,
                cause=event,
            )
        )

    def _raise_found(self) -> None:
        found, self._found = self._found, []
        if len(found) > 1:
            found.sort(key=_edge, reverse=True)
            self._opportunities_dropped += max(0, len(found) - self._opportunity_limit)
            del found[self._opportunity_limit :]
        self._raised += len(found)
        if self.on_opportunity is not None:
            for opportunity in found:
                try:
                    self.on_opportunity(opportunity)
                except Exception as error:
                    self._note_failure("switch for handler", opportunity.handler, error)

    # --- Reports ----------------------------------------------------------------------------------

    def _note_failure(self, kind: str, name: str, error: BaseException) -> None:
        times = self._failures[name] = self._failures.get(name, 0) + 1
        if times & (times - 1) == 0:  # the first, then every 2^n: no log storm
            self._alert(
                "warning",
                name,
                f"{kind} {name!r} raised {type(error).__name__}: {error} on an event ({times} times so far); "
                "the event went on to the others",
            )

    def _alert(self, level: str, source: str, text: str) -> None:
        for observer in self._observers:
            observer.on_alert(level, source, text)

    def stats(self) -> dict[str, Any]:
        """Return counts by event type and disposition, and what was conflated, dropped or failed."""
        narrow = (s for each in self._narrow_of.values() for _, s in each)
        everybody = dict.fromkeys((*self._subscribers, *narrow))
        mailboxes = [s.mailbox for s in everybody if s.mailbox is not None]
        return {
            "events": {
                kind: dict(counts) for kind, counts in sorted(self._counts.items())
            },
            "seen_keys": len(self._seen),
            "waiting": sum(len(m) for m in mailboxes),
            "conflated": sum(m.conflated for m in mailboxes),
            "dropped": sum(m.dropped for m in mailboxes),
            "opportunities": self._raised,
            "opportunities_dropped": self._opportunities_dropped,
            "failures": dict(self._failures),
            "clock_lead_s": {
                sender: lead / _SECOND_NS for sender, lead in self._leads_ns.items()
            },
        }


def _edge(opportunity: Opportunity) -> int:
    return opportunity.edge_ppm
