"""Make candles of trades, and keep visible what is missing.

Comes from: sources/
Goes to: kernel/inbox.py (CandleClosed)
"""

from collections import deque
from decimal import Decimal
from typing import ClassVar

import msgspec

from nightdesk.abc import Place, Task
from nightdesk.model.context import TaskContext
from nightdesk.model.events import CandleClosed, Event, TradePrinted
from nightdesk.model.instrument import instrument_key
from nightdesk.model.priority import Priority
from nightdesk.tasks._execution import ZERO, check, seconds

__all__ = ["Bar", "CandlesContext", "CandlesTask", "Hole", "timeframe_ns"]

IDLE_S = 1.0
MAX_WAITING = 10_000
MAX_HOLES = 200
_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def timeframe_ns(timeframe: str) -> int:
    """Return the length of `1m`, `5m`, `15s`, `1h` ... in nanoseconds.

    Raises:
        ValueError: It is no such text.
    """
    number, unit = timeframe[:-1], timeframe[-1:]
    if not number.isdigit() or int(number) < 1 or unit not in _UNITS_S:
        raise ValueError(
            f"no timeframe {timeframe!r}: expected a number and one of s, m, h, d, e.g. 5m"
        )
    return int(number) * _UNITS_S[unit] * 1_000_000_000


class Bar(msgspec.Struct):
    """A candle in the making. `partial`: trades of it may have been missed."""

    open_ns: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal = ZERO
    trades: int = 0
    partial: bool = False


class Hole(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch without candles. `reason`: `no_trades`, or `partial` where the desk saw only a part."""

    key: str
    timeframe: str
    from_ns: int
    to_ns: int
    reason: str


class CandlesContext(TaskContext, kw_only=True):
    """Which candles to make, and those in the making.

    Attributes:
        instruments: `BTC/USDT@binance` ...; empty takes all that trade.
        timeframes: Lengths of the candles.
        grace_s: A quiet market's candle is closed so long after its end.
        max_instruments: Trades of further ones are counted in `ignored`.
        bars: Candles in the making by `key|timeframe`.
        emitted, late, ignored, holes_total: Counts; `late` trades belong to candles already closed.
        holes: The newest stretches without candles.
    """

    instruments: tuple[str, ...] = ()
    timeframes: tuple[str, ...] = ("1m", "5m")
    grace_s: float = 2.0
    max_instruments: int = 256
    bars: dict[str, Bar] = msgspec.field(default_factory=dict)
    emitted: int = 0
    late: int = 0
    ignored: int = 0
    holes_total: int = 0
    holes: list[Hole] = msgspec.field(default_factory=list)


class CandlesTask(Task[CandlesContext]):
    """Builds candles by the time of the trades, not of their arrival.

    A candle of which a part was missed (the first one, or the one during a restart) is not emitted
    but listed as a hole, and a stretch without trades is a hole too: no number is made up.
    """

    context_class: ClassVar[type[TaskContext]] = CandlesContext
    priority: ClassVar[Priority] = Priority.NORMAL
    runs_in: ClassVar[Place] = "background"
    listens: ClassVar[tuple[type[Event], ...]] = (TradePrinted,)

    def __init__(self, context: CandlesContext) -> None:
        super().__init__(context)
        check(
            f"CandlesTask {context.task_id!r}",
            {
                "timeframes": (
                    bool(context.timeframes),
                    context.timeframes,
                    "at least one",
                ),
                "grace_s": (context.grace_s >= 0, context.grace_s, "0 or more"),
                "max_instruments": (
                    context.max_instruments >= 1,
                    context.max_instruments,
                    "at least 1",
                ),
            },
        )
        self._frames = tuple((name, timeframe_ns(name)) for name in context.timeframes)
        self._wanted = frozenset(context.instruments)
        self._known: dict[tuple[str, str], str | None] = {}
        # Trades between the last checkpoint and now are unknown, so restored bars are partial.
        self._bars: dict[tuple[str, str], Bar] = {
            _split(name): msgspec.structs.replace(bar, partial=True)
            for name, bar in context.bars.items()
        }
        self._done_ns: dict[tuple[str, str], int] = {}
        self._closed: deque[CandleClosed] = deque(maxlen=MAX_WAITING)
        self._holes: deque[Hole] = deque(maxlen=MAX_HOLES)
        self._late = self._ignored = self._holes_total = 0
        self._newest_ns = 0
        self._local_ns = self._seen_at_ns = 0
        self._last: Event | None = None

    def wants(self, event: Event) -> bool:
        """Take a trade in; wake the task only when a candle is finished."""
        assert isinstance(event, TradePrinted)
        if event is self._last:
            return False
        self._last = event
        key = self._key_of(event)
        if key is None:
            self._ignored += 1
            return False
        for name, length in self._frames:
            self._take(event, key, name, length)
        self._newest_ns = max(self._newest_ns, event.ts_event_ns)
        return bool(self._closed)

    async def _handle_executing(self) -> None:
        self.wait(IDLE_S)
        self._close_overdue()
        emitted = 0
        while self._closed:
            self.desk.emit(self._closed.popleft())
            emitted += 1
            if emitted % 256 == 0:
                await self.desk.checkpoint()
        self._remember(emitted)

    def _key_of(self, trade: TradePrinted) -> str | None:
        pair = (trade.symbol, trade.venue)
        if pair not in self._known:
            key: str | None = instrument_key(*pair)
            full = len(self._known) >= self.context.max_instruments
            if self._wanted and key not in self._wanted:
                key = None
            if full:
                return None
            self._known[pair] = key
        return self._known[pair]

    def _take(self, trade: TradePrinted, key: str, name: str, length: int) -> None:
        open_ns = trade.ts_event_ns - trade.ts_event_ns % length
        bar = self._bars.get((key, name))
        if bar is None or open_ns > bar.open_ns:
            if open_ns < self._done_ns.get((key, name), 0):
                self._late += 1
                return
            if bar is not None:
                self._close(key, name, length, bar)
            bar = self._begin(trade, key, name, open_ns)
        elif open_ns < bar.open_ns:
            self._late += 1
            return
        price = trade.price
        if price > bar.high:
            bar.high = price
        if price < bar.low:
            bar.low = price
        bar.close = price
        bar.volume += trade.quantity
        bar.trades += 1

    def _begin(self, trade: TradePrinted, key: str, name: str, open_ns: int) -> Bar:
        done_ns = self._done_ns.get((key, name))
        if done_ns is not None and open_ns > done_ns:
            self._note_hole(key, name, done_ns, open_ns, "no_trades")
        price = trade.price
        bar = Bar(open_ns, price, price, price, price, partial=done_ns is None)
        self._bars[key, name] = bar
        return bar

    def _close(self, key: str, name: str, length: int, bar: Bar) -> None:
        end_ns = bar.open_ns + length
        del self._bars[key, name]
        self._done_ns[key, name] = end_ns
        if bar.partial:
            self._note_hole(key, name, bar.open_ns, end_ns, "partial")
            return
        symbol, _, venue = key.rpartition("@")
        self._closed.append(
            CandleClosed(
                ts_event_ns=end_ns,
                symbol=symbol,
                venue=venue,
                timeframe=name,
                ts_open_ns=bar.open_ns,
                open=bar.open,
                high=bar.high,
                low=bar.low,
                close=bar.close,
                volume=bar.volume,
            )
        )

    def _close_overdue(self) -> None:
        """Close candles of markets that went quiet.

        Their end is measured on the clock of the trades, moved on by our own: a recording may be
        years old and a feed's clock may be off.
        """
        now = self.desk.clock.now_ns()
        if self._newest_ns > self._local_ns:
            self._local_ns, self._seen_at_ns = self._newest_ns, now
        if not self._newest_ns:
            return
        market_ns = self._newest_ns + now - self._seen_at_ns
        lengths = dict(self._frames)
        grace_ns = seconds(self.context.grace_s)
        for (key, name), bar in sorted(self._bars.items()):
            length = lengths.get(name)
            if length is None:
                del self._bars[key, name]  # the configuration no longer asks for it
            elif market_ns >= bar.open_ns + length + grace_ns:
                self._close(key, name, length, bar)

    def _note_hole(
        self, key: str, name: str, from_ns: int, to_ns: int, reason: str
    ) -> None:
        self._holes_total += 1
        self._holes.append(
            Hole(key=key, timeframe=name, from_ns=from_ns, to_ns=to_ns, reason=reason)
        )

    def _remember(self, emitted: int) -> None:
        c = self.context
        bars = {
            f"{k}|{n}": msgspec.structs.replace(b) for (k, n), b in self._bars.items()
        }
        if bars == c.bars and not (
            emitted or self._late or self._ignored or self._holes
        ):
            return
        self.evolve_context(
            bars=bars,
            emitted=c.emitted + emitted,
            late=c.late + self._late,
            ignored=c.ignored + self._ignored,
            holes_total=c.holes_total + self._holes_total,
            holes=[*c.holes, *self._holes][-MAX_HOLES:],
        )
        self._holes.clear()
        self._late = self._ignored = self._holes_total = 0


def _split(name: str) -> tuple[str, str]:
    key, _, timeframe = name.rpartition("|")
    return key, timeframe
