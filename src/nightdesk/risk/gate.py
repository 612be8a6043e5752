"""The only door to a venue: every order is checked on reserved exposure, and reserved in the same step.

Comes from: orders/protocol.py
Goes to: orders/protocol.py

Nothing here awaits between a check and its reservation, so 100 tasks that ask in the same instant
are answered one after the other, each seeing what the others were given (S-12).
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

import msgspec

from nightdesk.abc import Clock, Observer, Put, Store
from nightdesk.errors import NightdeskError, OrderDeniedError
from nightdesk.model.events import QuoteChanged, TradingStateChanged
from nightdesk.model.instrument import Instrument, instrument_key
from nightdesk.model.order import Order, OrderRequest, OrderStatus, Side, VenueOrder
from nightdesk.model.position import Position
from nightdesk.risk.exposure import Exposure, Reservation
from nightdesk.risk.halt import KillSwitch, TradingState
from nightdesk.risk.limits import Limits, QuoteLookup, check_grid, check_value, price_of

__all__ = ["Gate", "PositionsLike"]

_ZERO = Decimal(0)
_DAY_NS = 86_400 * 1_000_000_000
_EXTERNAL = "external|"
_LOSS = "daily loss"


class PositionsLike(Protocol):
    """What the gate asks of the positions."""

    def of(self, symbol: str, venue: str) -> Position: ...
    def all(self) -> list[Position]: ...
    def equity(self, starting: Decimal, quote: QuoteLookup) -> Decimal | None: ...


class _Day(msgspec.Struct, frozen=True):
    """The equity from which the daily loss counts; `number` is days since 1970, UTC."""

    number: int
    equity: Decimal


class Gate:
    """Checks, reserves, halts. Synchronous where orders pass; asynchronous where something must be durable.

    Args:
        limits: The section `risk` of desk.yaml.
        instruments: `(symbol, venue)` to the instrument, or None.
        quote: `(symbol, venue)` to the newest quote, or None.
        alert: `(level, source, text)`; without it the observers are told.

    Attributes:
        on_state_changed: Called at each change of the trading state, e.g. the inbox's `emit`.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        clock: Clock,
        store: Store,
        instruments: Callable[[str, str], Instrument | None],
        positions: PositionsLike,
        quote: Callable[[str, str], QuoteChanged | None],
        observers: Sequence[Observer] = (),
        alert: Callable[[str, str, str], None] | None = None,
    ) -> None:
        self.limits = limits
        self.exposure = Exposure()
        self.on_state_changed: Callable[[TradingStateChanged], None] | None = None
        self._clock = clock
        self._store = store
        self._instruments = instruments
        self._positions = positions
        self._quote = quote
        self._observers = tuple(observers)
        self._alert = alert or self._tell_observers
        self._switch = KillSwitch(store, clock, self._on_change)
        self._sent_ns: deque[int] = deque()
        self._external: dict[str, set[str]] = {}
        self._day: _Day | None = None
        self._denied: dict[str, int] = {}

    async def load(self) -> None:
        """Take up the kill switch and the day's first equity from before the restart."""
        await self._switch.load()
        record = await self._store.get("risk", "day")
        if record is not None:
            try:
                self._day = msgspec.json.decode(record.data, type=_Day)
            except msgspec.MsgspecError as error:
                self.halt_now(
                    f"the record of the day's first equity is unreadable: {error}",
                    "start",
                )

    # --- the way of an order --------------------------------------------------------------------------

    def reserve(
        self, task_id: str, request: OrderRequest, client_order_id: str
    ) -> Reservation:
        """Check `request` and take its share of every limit, in one step.

        Raises:
            OrderDeniedError: With the code of the first rule broken; nothing is reserved.
        """
        try:
            price = self._check(request)
        except OrderDeniedError as denied:
            self._denied[denied.code] = self._denied.get(denied.code, 0) + 1
            raise
        return self.exposure.add(task_id, request, client_order_id, price)

    def why_stopped(self, request: OrderRequest) -> str | None:
        """Return why an order that is reserved already must not be sent any more, or None."""
        try:
            key = instrument_key(request.symbol, request.venue)
            self._check_state(request, key, _ZERO)
        except OrderDeniedError as denied:
            return denied.reason
        return None

    def release(self, client_order_id: str) -> None:
        """Give a reservation back: the order was never sent, or has ended."""
        self.exposure.remove(client_order_id)

    def update(self, order: Order) -> None:
        """Follow an order: the reservation shrinks by its fills and ends with it."""
        if not order.status.is_open:
            self.exposure.remove(order.client_order_id)
        else:
            reservation = self.exposure.get(order.client_order_id) or self.exposure.add(
                order.task_id, order.request, order.client_order_id, order.request.price
            )
            self.exposure.resize(reservation, order.remaining_quantity)
            self.exposure.mark_unknown(reservation, order.status is OrderStatus.UNKNOWN)
        if self.limits.max_daily_loss is not None and order.filled_quantity:
            self.check_losses()

    def restore(self, orders: Iterable[Order]) -> None:
        """Reserve for orders of an earlier run; limits hold from the first instant after a crash."""
        for order in orders:
            self.update(order)

    def set_external(self, venue: str, orders: Iterable[VenueOrder]) -> None:
        """Count working orders of others on the account against the limits (T-23)."""
        for name in self._external.pop(venue, set()):
            self.exposure.remove(name)
        names = self._external.setdefault(venue, set())
        for order in orders:
            name = f"{_EXTERNAL}{venue}|{order.venue_order_id}"
            request = OrderRequest(
                symbol=order.symbol,
                venue=venue,
                side=order.side,
                quantity=order.quantity - order.filled_quantity,
                type=order.type,
                price=order.price,
            )
            self.exposure.add("external", request, name, order.price)
            names.add(name)

    def _check(self, request: OrderRequest) -> Decimal | None:
        """Cheapest and most telling first; the rate last, so that only what is sent counts against it."""
        key = instrument_key(request.symbol, request.venue)
        limits = self.limits
        if limits.max_daily_loss is not None:
            self.check_losses()
        self._check_state(request, key, request.quantity)
        instrument = check_grid(
            request, self._instruments(request.symbol, request.venue), limits
        )
        quote = self._quote(request.symbol, request.venue)
        price = price_of(request, quote, self._clock, limits)
        if price is not None:
            check_value(request, price, instrument, quote, limits)
        held = self._positions.of(request.symbol, request.venue).quantity
        if request.reduce_only:
            self._check_reduces(request, key, held)
        else:
            self._check_resolved(key)
            assert price is not None  # only reduce-only orders may go without
            self._check_exposure(request, key, held, price)
        self._take_rate()
        return price

    def _check_state(self, request: OrderRequest, key: str, more: Decimal) -> None:
        """Ask the kill switch; `more` is what `request` adds to what is reserved."""
        if request.reduce_only:
            return
        switch = self._switch
        if switch.state is TradingState.HALTED:
            raise OrderDeniedError(
                "TRADING_HALTED",
                f"trading is halted by {switch.actor}: {switch.reason}",
            )
        if switch.state is TradingState.REDUCING and not self._shrinks(
            request, key, more
        ):
            raise OrderDeniedError(
                "TRADING_REDUCING",
                f"only orders that shrink a position pass, set by {switch.actor}: {switch.reason}",
            )
        halted = switch.symbols.get(key)
        if halted is not None:
            raise OrderDeniedError(
                "SYMBOL_HALTED", f"{key} is halted by {halted.actor}: {halted.reason}"
            )

    def _shrinks(self, request: OrderRequest, key: str, more: Decimal) -> bool:
        held = self._positions.of(request.symbol, request.venue).quantity
        return (
            more + self.exposure.working(key, request.side) <= -held * request.side.sign
        )

    def _check_reduces(self, request: OrderRequest, key: str, held: Decimal) -> None:
        reserved = self.exposure.reducing(key, request.side)
        if request.quantity + reserved > -held * request.side.sign:
            others = f" with {reserved} in other reduce-only orders" if reserved else ""
            raise OrderDeniedError(
                "REDUCE_ONLY_WOULD_INCREASE_POSITION",
                f"reduce-only {request.side} of {request.quantity}{others} exceeds position {held}",
            )

    def _check_resolved(self, key: str) -> None:
        for client_order_id in self.exposure.unresolved(key):
            raise OrderDeniedError(
                "SYMBOL_UNRESOLVED",
                f"{key} waits until the venue proves what became of order {client_order_id}",
            )

    def _check_exposure(
        self, request: OrderRequest, key: str, held: Decimal, price: Decimal
    ) -> None:
        limits = self.limits
        if limits.max_position_notional is None and limits.max_gross_notional is None:
            return
        now = self.exposure.worst_quantity(key, held, request.side)
        then = self.exposure.worst_quantity(key, held, request.side, request.quantity)
        if then <= now:
            return
        value = then * price
        most = limits.max_position_notional
        if most is not None and value > most:
            raise OrderDeniedError(
                "POSITION_LIMIT_EXCEEDED",
                f"position notional {value} exceeds limit {most}",
            )
        most = limits.max_gross_notional
        if most is not None:
            gross = value + self._gross_without(key)
            if gross > most:
                raise OrderDeniedError(
                    "GROSS_LIMIT_EXCEEDED",
                    f"gross notional {gross} exceeds limit {most}",
                )

    def _gross_without(self, key: str) -> Decimal:
        """Return what all other instruments could come to, each at its worst."""
        positions = {
            instrument_key(p.symbol, p.venue): p for p in self._positions.all()
        }
        gross = _ZERO
        for other in {
            **dict.fromkeys(positions),
            **dict.fromkeys(self.exposure.keys()),
        }:
            if other == key:
                continue
            symbol, _, venue = other.rpartition("@")
            position = positions.get(other)
            quantity = self.exposure.worst_quantity(
                other, position.quantity if position else _ZERO, Side.BUY
            )
            if quantity:
                gross += quantity * self._mark(symbol, venue, other, position)
        return gross

    def _mark(
        self, symbol: str, venue: str, key: str, position: Position | None
    ) -> Decimal:
        quote = self._quote(symbol, venue)
        if quote is not None:
            return quote.ask
        return self.exposure.price(key) or (
            position.average_price if position else _ZERO
        )

    def _take_rate(self) -> None:
        now, sent, most = (
            self._clock.monotonic_ns(),
            self._sent_ns,
            self.limits.max_orders_per_s,
        )
        while sent and now - sent[0] >= 1_000_000_000:
            sent.popleft()
        if len(sent) >= most:
            raise OrderDeniedError(
                "RATE_LIMIT_EXCEEDED",
                f"{len(sent) + 1} orders within one second exceed limit {most}",
            )
        sent.append(now)

    # --- daily loss (T-25) ------------------------------------------------------------------------------

    def check_losses(self) -> None:
        """Halt if the day's loss, with fees and unrealised, exceeds its limit. Cheap; call it at any time.

        Without a quote for something that is held nothing is known, and nothing is decided.
        """
        most = self.limits.max_daily_loss
        if most is None:
            return
        equity = self._positions.equity(self.limits.starting_equity, self._quote)
        if equity is None:
            return
        today = self._clock.now_ns() // _DAY_NS
        if self._day is None or self._day.number != today:
            # A desk's first day counts from what it was given, each later day from where it stands.
            first = self.limits.starting_equity if self._day is None else equity
            self._begin_day(today, first)
        assert self._day is not None
        loss = self._day.equity - equity
        if loss > most and self._switch.state is not TradingState.HALTED:
            self.halt_now(f"{_LOSS} {loss} exceeds limit {most}", "gate")

    def _begin_day(self, number: int, equity: Decimal) -> None:
        self._day = _Day(number, equity)
        self._save_soon([Put("risk", "day", msgspec.json.encode(self._day))])

    # --- the kill switch ----------------------------------------------------------------------------------

    @property
    def state(self) -> TradingState:
        return self._switch.state

    @property
    def halted_by(self) -> str:
        """Who halted trading; "" while it is not halted."""
        is_halted = self._switch.state is TradingState.HALTED
        return self._switch.actor if is_halted else ""

    async def halt(self, reason: str, actor: str, mode: str = "pause") -> None:
        """Stop every order that is not marked reduce-only: in force at once, durable when this returns.

        `mode` is what the operator wants done beyond that; cancelling and flattening is the desk's work.

        Raises:
            StateNotWritableError: In force, but a restart would not know of it.
        """
        await self._switch.move(TradingState.HALTED, reason, actor, mode)

    def halt_now(self, reason: str, actor: str) -> None:
        """Like `halt` for callers that cannot wait; durable with the next commit."""
        try:
            self._switch.move(TradingState.HALTED, reason, actor)
        except NightdeskError as error:
            self._alert(
                "critical",
                "gate",
                f"the halt is in force, but a restart would not know of it: {error}",
            )

    async def reduce(self, reason: str, actor: str) -> None:
        """Let only orders pass that shrink a position."""
        await self._switch.move(TradingState.REDUCING, reason, actor)

    async def resume(self, reason: str, actor: str) -> None:
        """Trade again, also in halted instruments.

        After a halt for the daily loss the loss counts anew from here: who resumes has accepted what is lost.
        """
        if self._switch.reason.startswith(_LOSS):
            equity = self._positions.equity(self.limits.starting_equity, self._quote)
            if equity is not None:
                self._begin_day(self._clock.now_ns() // _DAY_NS, equity)
        await self._switch.move(TradingState.ACTIVE, reason, actor)

    def lift(self, reason: str, actor: str) -> bool:
        """Take back the halt that `actor` made, and no other; instruments that are halted stay so.

        For halts whose cause can be seen to be gone. Returns whether there was such a halt.
        """
        if self.halted_by != actor:
            return False
        try:
            self._switch.move(TradingState.ACTIVE, reason, actor, keep_symbols=True)
        except NightdeskError as error:
            text = f"trading goes on, but a restart would be halted: {error}"
            self._alert("warning", "gate", text)
        return True

    async def halt_symbol(
        self, symbol: str, venue: str, reason: str, actor: str = "orders"
    ) -> None:
        """Stop opening in one instrument until trading is resumed; durable when this returns."""
        await self._switch.halt_symbol(instrument_key(symbol, venue), reason, actor)

    def halt_symbol_now(
        self, symbol: str, venue: str, reason: str, actor: str = "orders"
    ) -> None:
        """Like `halt_symbol` for callers that cannot wait."""
        try:
            self._switch.halt_symbol(instrument_key(symbol, venue), reason, actor)
        except NightdeskError as error:
            self._alert(
                "critical",
                "gate",
                f"the halt is in force, but a restart would not know of it: {error}",
            )

    async def check_flag_file(self, path: Path) -> None:
        """Halt if the flag file is there: the kill switch that needs no running control socket (S-14).

        As long as it lies there, trading cannot be resumed for longer than one check.
        """
        if self._switch.state is TradingState.HALTED:
            return
        reason = _read_flag(path)
        if reason is not None:
            await self.halt(
                f"flag file {path} is there{reason}; `nightdesk resume-trading --reason TEXT` takes it away",
                "flag file",
            )

    def describe(self) -> dict[str, Any]:
        """Return what `status` shows."""
        switch = self._switch
        return {
            "state": str(switch.state),
            "reason": switch.reason,
            "actor": switch.actor,
            "mode": switch.mode,
            "since_ns": switch.since_ns,
            "halted_symbols": {
                key: saved.reason for key, saved in sorted(switch.symbols.items())
            },
            "reservations": len(self.exposure),
            "denied": dict(sorted(self._denied.items())),
            "day_equity": self._day.equity if self._day else None,
        }

    # --- telling ---------------------------------------------------------------------------------------

    def _on_change(
        self, level: str, text: str, state: TradingState, reason: str, actor: str
    ) -> None:
        self._alert(level, "gate", text)
        if self.on_state_changed is not None:
            now = self._clock.now_ns()
            self.on_state_changed(
                TradingStateChanged(
                    state=str(state),
                    reason=reason,
                    actor=actor,
                    ts_event_ns=now,
                    ts_received_ns=now,
                )
            )

    def _tell_observers(self, level: str, source: str, text: str) -> None:
        for observer in self._observers:
            observer.on_alert(level, source, text)

    def _save_soon(self, batch: list[Put]) -> None:
        try:
            self._store.save(batch)
        except NightdeskError as error:
            self._alert("critical", "gate", f"not saved: {error}")


def _read_flag(path: Path) -> str | None:
    """Return what the flag file says, `""` if nothing, or None if there is none. One `stat` when absent."""
    if not path.exists():
        return None
    try:
        # Whatever lies there halts, also a pipe that nobody writes to, and the desk goes on meanwhile.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            text = os.read(descriptor, 800).decode(errors="replace")[:200].strip()
        finally:
            os.close(descriptor)
    except OSError:
        return ""
    return f" ({text})" if text else ""
