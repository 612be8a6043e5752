"""The contracts between rooms. A room knows these, the nouns of `model`, and nothing of its neighbours."""

import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import msgspec

from nightdesk.model.context import (
    FINAL_STATES,
    TaskContext,
    TaskError,
    TaskExecutionResult,
    TradingStrategyState,
    state_name,
)
from nightdesk.model.events import Event, Opportunity, QuoteChanged
from nightdesk.model.health import SwitchTrace
from nightdesk.model.instrument import Instrument
from nightdesk.model.order import Fill, Order, OrderRequest, VenueOrder
from nightdesk.model.position import Position
from nightdesk.model.priority import Priority

__all__ = [
    "Alert",
    "Batch",
    "Clock",
    "Delete",
    "Desk",
    "Emit",
    "Observer",
    "OpportunityHandler",
    "Place",
    "Put",
    "Record",
    "Shelf",
    "Signal",
    "Source",
    "Store",
    "Task",
    "Venue",
]

ContextT = TypeVar("ContextT", bound=TaskContext)
Emit = Callable[[Event], None]
Place = Literal["desk", "background"]


# --- Time ---------------------------------------------------------------------------------------


class Clock(Protocol):
    """Wall time for calendars, monotonic time for intervals (R-27). The simulator brings its own."""

    def now_ns(self) -> int:
        """UTC, nanoseconds since 1970."""

    def monotonic_ns(self) -> int: ...

    async def sleep(self, seconds: float) -> None: ...


# --- State --------------------------------------------------------------------------------------

Shelf = Literal["active", "completed", "errored"]


class Put(msgspec.Struct, frozen=True):
    """Write one record. `kind` is a noun (`context`, `order`, `fill`, `cursor`, `halt`, `audit` ...)."""

    kind: str
    key: str
    data: bytes
    shelf: Shelf = "active"


class Delete(msgspec.Struct, frozen=True):
    kind: str
    key: str


Batch = Sequence[Put | Delete]


class Record(msgspec.Struct, frozen=True):
    """What a store gives back: the same bytes as were put, checked against their checksum."""

    kind: str
    key: str
    data: bytes
    shelf: Shelf = "active"
    epoch: int = 0
    sequence: int = 0


class Store(ABC):
    """Keeps records. Few verbs; a batch is atomic; durable when awaited.

    A store owns one directory (or database), which only one desk may open at a time:
    `start` takes the lock and a new fencing `epoch`, and writes it into every record.
    """

    epoch: int = 0

    @abstractmethod
    async def start(self) -> None:
        """Open, lock, and check.

        Raises:
            StateLockedError: Another desk owns it; names pid, host and start time.
            StateDamagedError: Acknowledged data is unreadable.
            StateNotWritableError: Read-only or full.
            NewerSchemaError: Written by a newer version.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Write what waits, close, release the lock."""

    @abstractmethod
    def save(self, batch: Batch) -> Awaitable[None]:
        """Queue `batch` for one atomic commit, in call order; awaiting it waits for durability.

        Not awaiting is allowed: the batch is committed with the next group. After a failed
        commit every later save fails too (R-17).

        Raises (when awaited):
            StateNotWritableError: The batch is not durable.
        """

    @abstractmethod
    async def load(self, kind: str, shelf: Shelf | None = None) -> list[Record]:
        """Return the records of one kind, ordered by sequence. Corrupt ones go to quarantine and are
        listed by `quarantined`."""

    @abstractmethod
    async def get(self, kind: str, key: str) -> Record | None: ...

    def quarantined(self) -> list[tuple[str, str, str]]:
        """`(kind, key, reason)` of records that could not be read since the start."""
        return []

    def stats(self) -> dict[str, Any]:
        """Counts and timings for `status`."""
        return {}


# --- Doors in and out -----------------------------------------------------------------------------


class Source(ABC):
    """Where events come from. Options of `desk.yaml` become keyword arguments of `__init__`."""

    name: str

    @abstractmethod
    async def start(self, emit: Emit, clock: Clock, random: random.Random) -> None:
        """Begin to call `emit`; return as soon as the source runs."""

    @abstractmethod
    async def stop(self) -> None: ...

    @property
    def finished(self) -> bool:
        """True when no event will ever follow (the end of a recording)."""
        return False


class Venue(ABC):
    """Where orders go. Everything it reports also comes back through `emit`, like any other event.

    Attributes:
        name: As in `desk.yaml` and in instrument keys.
        expiry_s: A request older than this is void at the venue (R-3).
        index_lag_s: How long a fresh order may be missing from look-ups (R-5).
    """

    name: str
    expiry_s: float = 5.0
    index_lag_s: float = 5.0

    @abstractmethod
    async def start(self, emit: Emit, clock: Clock, random: random.Random) -> None: ...

    @abstractmethod
    async def stop(self) -> None: ...

    @abstractmethod
    def instruments(self) -> Mapping[str, Instrument]:
        """Symbol to instrument."""

    @abstractmethod
    async def submit(self, order: Order) -> str:
        """Send `order` once and return the venue's order id. The caller emits `OrderAccepted`;
        fills, cancels and expiries arrive by the venue's own `emit`, possibly before this returns.

        Raises:
            VenueRejectedError: Proof that the venue did not accept it.
            OutcomeUnknownError: Anything else.
        """

    @abstractmethod
    async def cancel(self, order: Order) -> None:
        """Ask to cancel. The end is told by `OrderCanceled` or `OrderFilled`, never assumed.

        Raises:
            VenueRejectedError: The venue does not know it as open ("filled or unknown").
            OutcomeUnknownError: No usable reply.
        """

    @abstractmethod
    async def find_order(self, symbol: str, client_order_id: str) -> VenueOrder | None:
        """Return the order, or None if the venue answered that it knows none.

        Raises:
            QueryFailedError: No usable answer, which proves nothing.
        """

    @abstractmethod
    async def open_orders(self) -> list[VenueOrder]: ...

    @abstractmethod
    async def fills(self, since_ns: int) -> list[Fill]:
        """Return every own fill since `since_ns`, all pages, oldest first."""

    @abstractmethod
    async def balances(self) -> dict[str, Decimal]:
        """Return total balances by asset."""

    async def venue_time_ns(self) -> int:
        """Return the venue's clock; raises QueryFailedError."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        return {}


# --- Tasks ----------------------------------------------------------------------------------------


class Desk(Protocol):
    """The handle a task gets: the same in the desk, in a background host, and in the simulator."""

    task_id: str
    clock: Clock
    cache: Any

    @property
    def random(self) -> random.Random:
        """Seeded for this task alone."""

    @property
    def log(self) -> Any:
        """A structured log that names the task."""

    async def submit(self, request: OrderRequest) -> Order:
        """Pass the gate, make the intent durable, send once; return the order as it then stands.

        The order is returned whatever became of it: ACCEPTED, (PARTIALLY_)FILLED, REJECTED or UNKNOWN.

        Raises:
            OrderDeniedError: The gate refused; nothing was sent.
        """

    async def cancel(self, client_order_id: str) -> Order:
        """Ask the venue to cancel and return the order as it then stands; wait for its end by `orders()`."""

    def orders(self) -> list[Order]:
        """This task's orders, oldest first, from the ledger. **This is the truth about fills**: a context
        may be older than the last crash, the ledger never is."""

    def order(self, client_order_id: str) -> Order | None: ...

    def price(self, symbol: str, venue: str) -> QuoteChanged | None:
        """The newest quote, or None. Its age is `clock.now_ns() - quote.ts_received_ns`."""

    def instrument(self, symbol: str, venue: str) -> Instrument: ...

    def position(self, symbol: str, venue: str) -> Position: ...

    def positions(self) -> list[Position]: ...

    async def checkpoint(self) -> None:
        """Save the context if it changed and let the desk take over: the point where a task may be parked."""

    def emit(self, event: Event) -> None: ...

    def alert(self, level: str, text: str) -> None:
        """Tell the operator. `level` is info, warning or critical."""

    async def save(self, key: str, data: bytes) -> None:
        """Keep small private data of this task durably, beside its context (at most 1 MiB)."""

    async def load(self, key: str) -> bytes | None: ...


class Task(Generic[ContextT]):
    """A unit of work that outlives its process.

    The state-machine face: give each state a handler named `_handle_<state>` (or list it in
    `get_extended_state_handlers`), move by `_transition`, remember by `evolve_context`.
    The desk calls `step` once per cycle and saves the context whenever it changed.

    Class attributes:
        context_class: The struct that is saved.
        priority, runs_in: Defaults; `desk.yaml` may say otherwise.
        listens: Event types that wake the task at once; `wants` filters them.
        schema_version: Raise it together with a function in `migrations`.
        migrations: From old version to a function that turns the old mapping into the next version's.
    """

    context_class: ClassVar[type[TaskContext]] = TaskContext
    priority: ClassVar[Priority] = Priority.NORMAL
    runs_in: ClassVar[Place] = "desk"
    listens: ClassVar[tuple[type[Event], ...]] = ()
    schema_version: ClassVar[int] = 1
    migrations: ClassVar[Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {}

    desk: Desk

    def __init__(self, context: ContextT) -> None:
        self.context = context
        self._next_delay = 0.1
        extended = {
            state_name(s): method
            for s, method in self.get_extended_state_handlers().items()
        }
        self._state_handlers: dict[str, str] = extended

    # What a task may override ------------------------------------------------

    def keys(self) -> tuple[str, ...]:
        """Instrument keys that this task touches; cycles with a common key never overlap."""
        return ()

    def watches(self) -> tuple[str, ...] | None:
        """Instrument keys whose events concern this task; None: all that it listens to.

        Where thousands of tasks run, this spares every quote the question to each of them.
        """
        return None

    def wants(self, event: Event) -> bool:
        """Return whether an event of `listens` concerns this task. Must be quick and must not await."""
        return True

    def get_extended_state_handlers(self) -> Mapping[Any, str]:
        """State (string or enum member) to the name of its handler method."""
        return {}

    async def start(self) -> None:
        """Called once before the first step, also after a recovery. `self.desk` is there."""

    async def stop(self) -> None:
        """Called once after the last step; open orders stay as they are."""

    def resume(self) -> None:
        """Called when an operator resumes the task: leave a pause that the task had entered by itself."""
        if self.context.state == TradingStrategyState.PAUSED:
            self._transition(TradingStrategyState.EXECUTING)

    async def _handle_not_started(self) -> None:
        self._transition(TradingStrategyState.IDLE)

    async def _handle_idle(self) -> None:
        self._transition(TradingStrategyState.EXECUTING)

    async def _handle_executing(self) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} has no handler for the state EXECUTING"
        )

    async def _handle_paused(self) -> None:
        self._next_delay = 1.0

    # What a task calls -------------------------------------------------------

    def evolve_context(self, **changes: Any) -> None:
        """Change the context: `field=value`, or `field__key=value` for one key of a mapping."""
        self.context = self.context.evolve(**changes)

    def _transition(self, state: Any) -> None:
        """Go to `state`; its handler runs in the next cycle, at once unless `wait` says otherwise."""
        name = state_name(state)
        if name != self.context.state:
            self.context = self.context.evolve(state=name)
            self._next_delay = 0.0

    def wait(self, seconds: float) -> None:
        """Rest at most `seconds` before the next cycle; an event in `listens` ends it earlier."""
        self._next_delay = seconds

    # What the desk calls -----------------------------------------------------

    async def step(self) -> TaskExecutionResult:
        """Run the handler of the current state once.

        Raises:
            Exception: Whatever the handler raises; the supervisor answers it.
        """
        state = self.context.state
        self._next_delay = 0.1
        handler = self._state_handlers.get(state) or f"_handle_{state.lower()}"
        if state not in FINAL_STATES:
            method = getattr(self, handler, None)
            if method is None:
                raise NotImplementedError(
                    f"{type(self).__name__} has no handler for the state {state}"
                )
            await method()
        return TaskExecutionResult(
            task_id=self.context.task_id,
            context=self.context,
            should_continue=self.context.state not in FINAL_STATES,
            next_delay=self._next_delay,
            state=self.context.state,
            error=self.context.error,
        )

    def fail(self, error: BaseException, when_ns: int = 0) -> None:
        """Go to ERROR and keep what happened."""
        self.context = self.context.evolve(
            state=TradingStrategyState.ERROR,
            error=TaskError.from_exception(error, when_ns),
        )


class OpportunityHandler(Task[ContextT]):
    """A task that the switch may let in before everything else."""

    handles: ClassVar[tuple[type[Event], ...]] = ()
    deadline_s: float = 1.0

    def assess(self, event: Event) -> int | None:
        """Return the net edge of `event` in ppm of notional, or None if it is no opportunity.

        Called on the way of every event in `handles`: quick, no await, no raise.
        """
        return None

    async def handle(self, opportunity: Opportunity) -> None:
        """Act on it. The background is parked while this runs."""
        raise NotImplementedError


class Signal(ABC):
    """What a task asks before it decides."""

    @abstractmethod
    def update(self, event: Event) -> Decimal | float | None:
        """Take one event in; return the new value, or None while there is too little data."""


# --- Watching ---------------------------------------------------------------------------------------


class Observer:
    """Watches the kernel. Every method is optional, must be quick, and cannot change anything."""

    def on_switch(self, trace: SwitchTrace) -> None: ...

    def on_step(
        self, task_id: str, started_ns: int, duration_ns: int, lag_ns: int
    ) -> None: ...

    def on_task_failed(
        self, task_id: str, error: BaseException, consequence: str
    ) -> None: ...

    def on_event(self, event: Event, disposition: str) -> None: ...

    def on_order(self, order: Order, event: Event) -> None: ...

    def on_alert(self, level: str, source: str, text: str) -> None: ...


class Alert(ABC):
    """A channel to the operator."""

    @abstractmethod
    async def send(self, level: str, source: str, text: str) -> None: ...
