"""Durable execution tasks as design 001 names them: `TaskManager`, `BaseTradingTask`, `IcebergTask` and their kin.

What that design had as traps is mended here, not imitated (docs/decisions/0003): states are
names, errors are structs, money is `Decimal`, and an order's intent is durable before it is sent.
"""

import asyncio
import json
from collections.abc import Mapping
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
import structlog

from nightdesk.abc import Record, Task
from nightdesk.config import (
    BackgroundConfig,
    Config,
    RiskConfig,
    SourceConfig,
    StateConfig,
    TaskEntry,
    VenueConfig,
)
from nightdesk.desk import TradingDesk
from nightdesk.errors import RecordCorruptError
from nightdesk.model.context import (
    FINAL_STATES,
    TaskContext,
    TaskExecutionResult,
    TradingStrategyState,
)
from nightdesk.model.order import Side
from nightdesk.model.serializer import TaskSerializer, decode_context
from nightdesk.reports import health
from nightdesk.tasks import delta_neutral, iceberg

__all__ = [
    "BaseTradingTask",
    "DeltaNeutralTask",
    "DeltaNeutralTaskContext",
    "Direction",
    "ExchangeEnum",
    "IcebergTask",
    "IcebergTaskContext",
    "Side",
    "Symbol",
    "TaskContext",
    "TaskExecutionResult",
    "TaskManager",
    "TaskPersistenceManager",
    "TaskRecovery",
    "TaskSerializer",
    "TradingStrategyState",
    "get_hft_logger",
]

ContextT = TypeVar("ContextT", bound=TaskContext)
StateT = TypeVar("StateT", bound=Enum)

PRICES = {"BTC": "60000", "ETH": "3000", "BNB": "550"}
"""Where the simulated market of a `TaskManager` starts, in USDT; anything else starts at 100."""


class Symbol(msgspec.Struct, frozen=True):
    """A pair, `Symbol(base="BTC", quote="USDT")`; its text is the ccxt form `BTC/USDT`."""

    base: str
    quote: str

    def __str__(self) -> str:
        return f"{self.base}/{self.quote}"


class ExchangeEnum(StrEnum):
    """Exchanges by name; the value is the venue's name in a desk."""

    BINANCE = "binance"
    BYBIT = "bybit"
    GATEIO = "gateio"
    KUCOIN = "kucoin"
    MEXC = "mexc"
    OKX = "okx"


class Direction(StrEnum):
    NONE = "NONE"
    LONG = "LONG"
    SHORT = "SHORT"


def get_hft_logger(name: str) -> Any:
    """Return a structured logger: `logger.info("text", key=value)`."""
    return structlog.get_logger(name)


class _Exchange:
    """What `_load_exchange` gives: a venue, under the names of design 001."""

    def __init__(self, task: Task[Any], name: str) -> None:
        self._task, self.name = task, str(name)

    async def initialize(self, symbols: list[Any]) -> None:
        """Nothing to open: the desk holds the connection for every task."""

    async def close(self) -> None:
        """Nothing to close: the connection belongs to the desk."""

    def quote(self, symbol: Any) -> Any:
        return self._task.desk.price(str(symbol), self.name)

    def symbol_info(self, symbol: Any) -> Any:
        return self._task.desk.instrument(str(symbol), self.name)


_TYPES: dict[str, type[Task[Any]]] = {}


class BaseTradingTask(Task[ContextT], Generic[ContextT, StateT]):
    """Base of a task of your own: `class MyTask(BaseTradingTask[MyContext, MyState])`.

    Defining the class is all that recovery needs: it is found again by its `name`.
    """

    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        declared = cls.__dict__.get("context_class")
        if isinstance(declared, property) and declared.fget is not None:
            # Design 001 makes it a property of the instance; recovery needs it before there is one.
            cls.context_class = declared.fget(cls.__new__(cls))
        cls.name = cls.__dict__.get("name") or cls.__name__
        _TYPES[cls.name] = cls

    def __init__(self, logger: Any, context: ContextT, **kwargs: Any) -> None:
        super().__init__(context)
        self.logger = logger
        self._tag = ""
        self._was_started = False
        self._build_tag()

    def _build_tag(self) -> None:
        self._tag = self.name

    async def start(self, **kwargs: Any) -> None:
        self._was_started = True

    async def stop(self) -> None:
        await self.cleanup()

    async def cleanup(self) -> None:
        """Release what the task holds."""

    def _load_exchange(self, name: Any) -> Any:
        return _Exchange(self, str(name))

    def restore_from_json(self, json_data: str) -> None:
        """Take over a saved context.

        Raises:
            RecordCorruptError: It cannot be decoded.
        """
        self.context = TaskSerializer.deserialize_context(json_data, self.context_class)  # type: ignore[assignment]


class IcebergTaskContext(iceberg.IcebergContext, kw_only=True):
    """`exchange_name` is the venue."""

    symbol: Any
    exchange_name: ExchangeEnum | None = None
    venue: str = ""

    def __post_init__(self) -> None:
        self.symbol = str(self.symbol)
        self.venue = self.venue or str(self.exchange_name or "")
        super().__post_init__()


class IcebergTask(iceberg.IcebergTask):
    """The iceberg, constructed as in design 001: `IcebergTask(logger, context)`."""

    context_class = IcebergTaskContext
    name = "IcebergTask"

    def __init__(self, logger: Any, context: IcebergTaskContext, **kwargs: Any) -> None:
        super().__init__(context)
        self.logger = logger

    async def start(self, **kwargs: Any) -> None:
        if hasattr(self, "desk"):
            await super().start()


class DeltaNeutralTaskContext(delta_neutral.DeltaNeutralContext, kw_only=True):
    """`exchange_names` are the venues of both sides."""

    symbol: Any
    exchange_names: dict[Side, ExchangeEnum] = {}
    venues: dict[Side, str] = {}
    direction: Direction = Direction.NONE

    def __post_init__(self) -> None:
        self.symbol = str(self.symbol)
        if not self.venues:
            self.venues = {
                side: str(name) for side, name in self.exchange_names.items()
            }
        super().__post_init__()


class DeltaNeutralTask(delta_neutral.DeltaNeutralTask):
    context_class = DeltaNeutralTaskContext
    name = "DeltaNeutralTask"

    def __init__(
        self, logger: Any, context: DeltaNeutralTaskContext, **kwargs: Any
    ) -> None:
        super().__init__(context)
        self.logger = logger

    async def start(self, **kwargs: Any) -> None:
        if hasattr(self, "desk"):
            await super().start()


_TYPES.update({"IcebergTask": IcebergTask, "DeltaNeutralTask": DeltaNeutralTask})


class TaskManager:
    """A desk as a library: paper venues on a simulated market, state in `base_path`, on the running loop.

    Pass a `Config` to trade elsewhere. Tasks may be added before or after `start`.
    """

    def __init__(
        self,
        logger: Any = None,
        base_path: str = "task_data",
        config: Config | None = None,
    ) -> None:
        self.logger = logger or get_hft_logger("task_manager")
        self.base_path = Path(base_path)
        self._config = config
        self._waiting: list[Task[Any]] = []
        self._desk: TradingDesk | None = None
        self._serial = 0

    async def add_task(self, task: Task[Any]) -> str:
        """Take over a task and return its id; it runs as soon as the manager does."""
        if not task.context.task_id:
            self._serial += 1
            symbol = str(getattr(task.context, "symbol", "")).replace("/", "")
            name = getattr(task, "name", type(task).__name__)
            task.context = task.context.evolve(
                task_id=f"{name}_{symbol}_{_stamp()}_{self._serial}"
            )
        if self._desk is None:
            self._waiting.append(task)
        else:
            await self._attach(task)
        return str(task.context.task_id)

    async def remove_task(self, task_id: str) -> bool:
        """Stop and forget a task; False if there is none."""
        if self._desk is None:
            before = len(self._waiting)
            self._waiting = [
                task for task in self._waiting if task.context.task_id != task_id
            ]
            return len(self._waiting) < before
        return await self._desk.roster.remove(task_id)

    async def start(self, recover_tasks: bool = False) -> None:
        """Start the desk; with `recover_tasks` unfinished tasks of an earlier run go on.

        Raises:
            NightdeskError: See `TradingDesk.start`.
        """
        loop = asyncio.get_running_loop()
        self._desk = TradingDesk(self._config or self._paper_config(), loop)
        self._desk.roster.recover = self._recover if recover_tasks else _leave
        await self._desk.start()
        for task in self._waiting:
            await self._attach(task)
        self._waiting.clear()

    async def stop(self) -> None:
        """Save everything and stop; open orders stay at their venues for the next start."""
        if self._desk is not None:
            await self._desk.stop()
            self._desk = None

    def get_task(self, task_id: str) -> Task[Any] | None:
        if self._desk is None:
            return next(
                (task for task in self._waiting if task.context.task_id == task_id),
                None,
            )
        local = self._desk.roster.local.get(task_id)
        return local.task if local else None

    @property
    def task_count(self) -> int:
        """Tasks that have not reached a final state."""
        if self._desk is None:
            return len(self._waiting)
        return sum(
            local.task.context.state not in FINAL_STATES
            for local in self._desk.roster.local.values()
        )

    def get_status(self) -> dict[str, Any]:
        """Return counts, and for each task its id, state and the seconds until its next execution."""
        lines = health(self._desk) if self._desk else []
        now = self._desk.clock.now_ns() if self._desk else 0
        return {
            "running": self._desk is not None,
            "active_tasks": self.task_count,
            "total_executions": sum(line.runs for line in lines),
            "tasks": [
                {
                    "task_id": line.task_id,
                    "state": line.state,
                    "next_execution": max(0.0, (line.next_run_ns - now) / 1e9)
                    if line.next_run_ns
                    else 0.0,
                    "runs": line.runs,
                    "errors": line.errors,
                }
                for line in lines
            ],
            "persistence_stats": self.get_persistence_stats(),
        }

    def get_persistence_stats(self) -> dict[str, int]:
        """Return how many contexts stand on each shelf of the store."""
        return TaskPersistenceManager(self.base_path).statistics()

    def cleanup_persistence(self, max_age_hours: float = 24) -> int:
        """Remove completed contexts older than `max_age_hours`; return how many."""
        return TaskPersistenceManager(self.base_path).cleanup_completed(max_age_hours)

    async def _attach(self, task: Task[Any]) -> None:
        assert self._desk is not None
        name = getattr(task, "name", type(task).__name__)
        already = bool(getattr(task, "_was_started", False))
        await self._desk.roster.add(
            task, TaskEntry(id=task.context.task_id, type=name), start=not already
        )

    async def _recover(self, record: Record, type_name: str) -> Task[Any]:
        kind = _TYPES.get(type_name)
        if kind is None:
            raise RecordCorruptError(
                "context",
                record.key,
                f"its task type {type_name!r} is not defined in this program; import its module first",
            )
        context = decode_context(
            record.data,
            kind.context_class,
            migrations=kind.migrations,
            schema=kind.schema_version,
        )
        return kind(self.logger, context)  # type: ignore[call-arg]

    def _paper_config(self) -> Config:
        symbols = {f"{base}/USDT" for base in PRICES}
        symbols |= {
            str(task.context.symbol)
            for task in self._waiting
            if getattr(task.context, "symbol", "")
        }
        markets = {
            symbol: {"price": PRICES.get(symbol.split("/")[0], "100")}
            for symbol in sorted(symbols)
        }
        venues = [str(exchange) for exchange in ExchangeEnum]
        return Config(
            name="task_manager",
            allow_empty=True,
            source_file="TaskManager",
            state=StateConfig(store="files", directory=str(self.base_path)),
            background=BackgroundConfig(hosts=0),
            risk=RiskConfig(
                max_notional_per_order=None,
                max_position_notional=None,
                price_collar_ppm=None,
            ),
            venues=tuple(
                VenueConfig(
                    name=name, type="paper", options=_paper_options(sorted(symbols))
                )
                for name in venues
            ),
            sources=(
                SourceConfig(
                    name="market",
                    type="simulated",
                    options={"venues": venues, "markets": markets, "seed": 1},
                ),
            ),
        )


def _paper_options(symbols: list[str]) -> dict[str, Any]:
    return {
        "instruments": [
            {
                "symbol": symbol,
                "tick_size": "0.01",
                "lot_size": "0.0001",
                "min_quantity": "0.0001",
                "min_notional": "5",
                "maker_fee": "0.0002",
                "taker_fee": "0.0005",
            }
            for symbol in symbols
        ],
        "balances": {
            "USDT": "100000000",
            **{symbol.split("/")[0]: "100000" for symbol in symbols},
        },
    }


async def _leave(record: Record, type_name: str) -> None:
    """Started without recovery: saved tasks stay where they are."""


def _stamp() -> str:
    from nightdesk.kernel.clock import SystemClock

    return str(SystemClock().now_ns() // 1_000_000)


class TaskPersistenceManager:
    """The folders of a `files` store: `active/`, `completed/`, `errored/`."""

    def __init__(self, base_path: str | Path = "task_data") -> None:
        self.base_path = Path(base_path)

    def statistics(self) -> dict[str, int]:
        """Return how many contexts stand in each folder."""
        return {
            shelf: len(self._files(shelf))
            for shelf in ("active", "completed", "errored")
        }

    def load_active_tasks(self) -> list[tuple[str, str]]:
        """Return `(task_id, json)` of every unfinished task."""
        found = []
        for path in self._files("active"):
            text = path.read_text()
            found.append(
                (
                    TaskSerializer.extract_task_metadata(text).get("task_id")
                    or path.stem,
                    text,
                )
            )
        return found

    def cleanup_completed(self, max_age_hours: float = 24) -> int:
        """Remove completed contexts that were saved longer ago than `max_age_hours`; return how many."""
        from nightdesk.kernel.clock import SystemClock

        oldest_s = SystemClock().now_ns() / 1e9 - max_age_hours * 3600
        old = [
            path for path in self._files("completed") if path.stat().st_mtime < oldest_s
        ]
        for path in old:
            path.unlink()
        return len(old)

    def _files(self, shelf: str) -> list[Path]:
        folder = self.base_path / shelf
        return sorted(path for path in folder.glob("*.json")) if folder.is_dir() else []


class TaskRecovery:
    """Looks at what could be recovered, without starting it."""

    def __init__(
        self, logger: Any, persistence_manager: TaskPersistenceManager
    ) -> None:
        self.logger, self._persistence = logger, persistence_manager

    async def recover_all_tasks(self) -> list[tuple[str, str]]:
        """Return `(task_id, json)` of every unfinished task whose record can be read."""
        readable = []
        for task_id, text in self._persistence.load_active_tasks():
            try:
                json.loads(text)
            except ValueError as error:
                self.logger.error(
                    "record cannot be read", task_id=task_id, error=str(error)
                )
            else:
                readable.append((task_id, text))
        return readable

    def known_types(self) -> Mapping[str, type[Task[Any]]]:
        """Return the task types this program can bring back, by name."""
        return dict(_TYPES)
