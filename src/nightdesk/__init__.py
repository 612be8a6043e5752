"""Nightdesk: the runtime of a trading desk that never sleeps.

The names a first desk needs are here and load on first use, so that
`import nightdesk` stays cheap.

Comes from: cli/
Goes to: desk.py, compat/
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Desk": "nightdesk.abc",
    "OpportunityHandler": "nightdesk.abc",
    "Task": "nightdesk.abc",
    "Config": "nightdesk.config",
    "Fill": "nightdesk.model.order",
    "Instrument": "nightdesk.model.instrument",
    "Order": "nightdesk.model.order",
    "OrderRequest": "nightdesk.model.order",
    "OrderStatus": "nightdesk.model.order",
    "OrderType": "nightdesk.model.order",
    "Priority": "nightdesk.model.priority",
    "Schedule": "nightdesk.model.schedule",
    "Side": "nightdesk.model.order",
    "TaskContext": "nightdesk.model.context",
    "TaskExecutionResult": "nightdesk.model.context",
    "TimeInForce": "nightdesk.model.order",
    "TradingStrategyState": "nightdesk.model.context",
    "TaskConfig": "nightdesk.compat.registration",
    "TaskManager": "nightdesk.compat.execution",
}

__all__ = [
    "Config",
    "Desk",
    "Fill",
    "Instrument",
    "OpportunityHandler",
    "Order",
    "OrderRequest",
    "OrderStatus",
    "OrderType",
    "Priority",
    "Schedule",
    "Side",
    "Task",
    "TaskConfig",
    "TaskContext",
    "TaskExecutionResult",
    "TaskManager",
    "TimeInForce",
    "TradingStrategyState",
    "__version__",
]

if TYPE_CHECKING:
    from nightdesk.abc import Desk, OpportunityHandler, Task
    from nightdesk.compat.execution import TaskManager
    from nightdesk.compat.registration import TaskConfig
    from nightdesk.config import Config
    from nightdesk.model.context import (
        TaskContext,
        TaskExecutionResult,
        TradingStrategyState,
    )
    from nightdesk.model.instrument import Instrument
    from nightdesk.model.order import (
        Fill,
        Order,
        OrderRequest,
        OrderStatus,
        OrderType,
        Side,
        TimeInForce,
    )
    from nightdesk.model.priority import Priority
    from nightdesk.model.schedule import Schedule


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nightdesk' has no attribute {name!r}")
