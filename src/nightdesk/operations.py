"""What an operator may ask or order: one function per verb, the same for the CLI, the live view and tests.

Comes from: control.py, cli/
Goes to: desk.py
"""

import asyncio
import contextlib
import traceback
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec

from nightdesk import reports
from nightdesk.errors import CommandError, NightdeskError, UnknownTaskError
from nightdesk.model.order import Order, Side
from nightdesk.reports import iso
from nightdesk.telemetry.logs import recent_logs

if TYPE_CHECKING:
    from nightdesk.desk import TradingDesk

__all__ = ["VERSION", "perform", "verbs"]

VERSION = 1
"""Version of every reply's shape; raised when a field changes its meaning."""

_LINES_AT_ONCE = 20
_CANCEL_S = 5.0
_CANCELS_AT_ONCE = 32
Verb = Callable[["TradingDesk", dict[str, Any], str, str], Awaitable[Any]]
_VERBS: dict[str, Verb] = {}


def _verb(function: Verb) -> Verb:
    _VERBS[function.__name__.removeprefix("_do_").replace("__", ".")] = function
    return function


def verbs() -> list[str]:
    """Return the names of all verbs."""
    return sorted(_VERBS)


async def perform(
    desk: "TradingDesk", verb: str, arguments: dict[str, Any], actor: str, reason: str
) -> dict[str, Any]:
    """Carry out `verb` and return its reply, JSON-able.

    Raises:
        CommandError: No such verb, or its arguments make no sense.
        NightdeskError: Whatever the command itself raises.
    """
    function = _VERBS.get(verb)
    if function is None:
        raise CommandError(f"no command {verb!r}. Known: {', '.join(verbs())}.")
    reply = await function(desk, arguments, actor, reason)
    return {"version": VERSION, **_plain(reply)}


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value, enc_hook=str)


def _limit(arguments: dict[str, Any], default: int = 50) -> int:
    try:
        return max(1, min(int(arguments.get("limit") or default), 10_000))
    except (TypeError, ValueError):
        raise CommandError(
            f"limit is {arguments.get('limit')!r}, expected a number from 1 to 10000"
        ) from None


# --- looking ------------------------------------------------------------------------------------------


@_verb
async def _do_status(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    return reports.snapshot(desk)


@_verb
async def _do_tasks(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    lines = []
    for number, health in enumerate(reports.each_health(desk), 1):
        lines.append(_task_line(desk, health))
        if not number % _LINES_AT_ONCE:
            await asyncio.sleep(0)
    return {"tasks": lines}


def _task_line(desk: "TradingDesk", health: Any) -> dict[str, Any]:
    line: dict[str, Any] = msgspec.to_builtins(health)
    local = desk.roster.local.get(health.task_id)
    if local is not None:
        line["state"] = local.task.context.state
    line["next_run"] = iso(health.next_run_ns)
    line["last_run"] = iso(health.last_run_ns)
    line["next_run_words"] = reports.next_run_words(desk, health.task_id)
    return line


@_verb
async def _do_task__show(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    task_id = _task_id(arguments)
    for health in reports.health(desk):
        if health.task_id == task_id:
            line = _task_line(desk, health)
            break
    else:
        raise UnknownTaskError(task_id, [h.task_id for h in reports.health(desk)])
    local = desk.roster.local.get(task_id)
    if local is not None:
        line["context"] = msgspec.to_builtins(local.task.context, enc_hook=str)
        line["history"] = [
            {"at": iso(ns), "state": state} for ns, state in local.history
        ]
        line["orders"] = [
            _order_line(order) for order in desk.orders.orders_of(task_id)[-20:]
        ]
    elif desk.roster.hosts is not None and desk.roster.hosts.knows(task_id):
        # A host that is stuck or just restarting must not keep the rest from being shown.
        with contextlib.suppress(NightdeskError):
            line |= await desk.roster.hosts.explain(task_id)
    line["waits_at"] = local.waits_at() if local is not None else []
    return line


def _order_line(order: Order) -> dict[str, Any]:
    request = order.request
    return {
        "client_order_id": order.client_order_id,
        "venue_order_id": order.venue_order_id,
        "task_id": order.task_id,
        "symbol": request.symbol,
        "venue": request.venue,
        "side": request.side,
        "type": request.type,
        "quantity": request.quantity,
        "price": request.price,
        "status": order.status,
        "filled_quantity": order.filled_quantity,
        "average_price": order.average_price,
        "fees": order.fees,
        "reason": order.reason,
        "created_at": iso(order.created_ns),
        "updated_at": iso(order.updated_ns),
    }


@_verb
async def _do_orders(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    found = (
        desk.orders.open_orders()
        if arguments.get("open_only")
        else desk.orders.recent(_limit(arguments))
    )
    return {"orders": [_order_line(order) for order in found[-_limit(arguments) :]]}


@_verb
async def _do_fills(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    fills = desk.orders.fills(_limit(arguments))
    return {
        "fills": [
            {**msgspec.to_builtins(fill), "at": iso(fill.ts_event_ns)} for fill in fills
        ]
    }


@_verb
async def _do_trades(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    return {"trades": (await _do_fills(desk, arguments, actor, reason))["fills"]}


@_verb
async def _do_positions(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    lines = []
    for position in desk.positions.all():
        quote = desk.quotes.get(f"{position.symbol}@{position.venue}")
        mark = None
        if quote is not None:
            mark = quote.bid if position.quantity >= 0 else quote.ask
        lines.append(
            {
                **msgspec.to_builtins(position),
                "mark_price": mark,
                "unrealized_pnl": position.unrealized_pnl(mark)
                if mark is not None
                else None,
            }
        )
    return {"positions": lines}


@_verb
async def _do_opportunities(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    traces = list(desk.switch.traces)[-_limit(arguments) :]
    return {
        "opportunities": [
            {
                **msgspec.to_builtins(trace),
                "switch_us": round(trace.switch_us, 1),
                "at": iso(trace.ts_event_ns),
            }
            for trace in traces
        ]
    }


@_verb
async def _do_performance(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    return reports.money(desk)


@_verb
async def _do_logs(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    return {
        "logs": recent_logs(
            task_id=arguments.get("task_id"),
            level=arguments.get("level"),
            limit=_limit(arguments, default=100),
        )
    }


@_verb
async def _do_workers(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    return {"hosts": desk.roster.hosts.describe() if desk.roster.hosts else []}


# --- tasks --------------------------------------------------------------------------------------------


def _task_id(arguments: dict[str, Any]) -> str:
    task_id = arguments.get("task_id")
    if not isinstance(task_id, str) or not task_id:
        raise CommandError(
            "this command needs a task, e.g. `nightdesk tasks show sell-btc`"
        )
    return task_id


def _steer(name: str) -> None:
    async def act(
        desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
    ) -> Any:
        task_id = _task_id(arguments)
        await desk.roster.steer(name, task_id)
        await desk.audit(f"task.{name}", actor, reason, {"task_id": task_id})
        return {"task_id": task_id, "done": name}

    act.__name__ = f"_do_task__{name}"
    _verb(act)


for _name in ("start", "stop", "pause", "resume", "trigger"):
    _steer(_name)


@_verb
async def _do_task__adjust(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    task_id = _task_id(arguments)
    changes = {
        name: value
        for name, value in arguments.items()
        if name != "task_id" and value is not None
    }
    if not changes:
        raise CommandError("nothing to adjust: pass --every, --priority or --timeout")
    await desk.roster.adjust(task_id, changes)
    await desk.audit("task.adjust", actor, reason, {"task_id": task_id, **changes})
    return {"task_id": task_id, "done": "adjust", **changes}


# --- money --------------------------------------------------------------------------------------------


@_verb
async def _do_halt(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    mode = str(arguments.get("mode") or "pause")
    if mode not in ("pause", "cancel", "flatten"):
        raise CommandError(f"halt mode is {mode!r}, expected pause, cancel or flatten")
    await desk.gate.halt(reason or "no reason given", actor, mode=mode)
    ended: list[str] = []
    flattened: list[str] = []
    if mode in ("cancel", "flatten"):
        ended = await _cancel_all(desk)
    still_open = [order.client_order_id for order in desk.orders.open_orders()]
    if still_open and mode != "pause":
        text = f"orders still open {_CANCEL_S:g} s after `halt --{mode}`: {', '.join(still_open[:20])}; give it again"
        desk.alert("critical", "operator", text)
    if mode == "flatten":
        flattened = await desk.flatten()
    return {
        "state": str(desk.gate.state),
        "mode": mode,
        "cancelled": ended,
        "still_open": still_open,
        "flattened": flattened,
    }


async def _cancel_all(desk: "TradingDesk") -> list[str]:
    """Cancel until nothing is open, at most `_CANCEL_S`; return what ended otherwise than filled.

    An order on its way to the venue cannot be cancelled there yet, so each is asked for again whenever
    its status has changed; and what it executes until its end is still to be flattened.
    """
    asked: dict[str, str] = {}
    deadline_ns = desk.clock.monotonic_ns() + round(_CANCEL_S * 1e9)
    while open_orders := desk.orders.open_orders():
        due = [o for o in open_orders if asked.get(o.client_order_id) != o.status]
        for start in range(0, len(due), _CANCELS_AT_ONCE):
            some = due[start : start + _CANCELS_AT_ONCE]
            found = await asyncio.gather(
                *(desk.orders.cancel(o.client_order_id) for o in some)
            )
            # A cancel that overtook its order was refused, and counts for the status it was asked in.
            asked |= {
                now.client_order_id: (
                    now.status if now.status == "PENDING_CANCEL" else before.status
                )
                for before, now in zip(some, found, strict=True)
            }
        if desk.clock.monotonic_ns() >= deadline_ns:
            break
        await desk.clock.sleep(0.02)
    ended = (desk.orders.order(client_order_id) for client_order_id in asked)
    return [
        order.client_order_id
        for order in ended
        if order is not None and order.status in ("CANCELED", "EXPIRED")
    ]


@_verb
async def _do_resume_trading(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    if not reason:
        raise CommandError(
            "resume-trading needs a reason: nightdesk resume-trading --reason 'positions compared, all equal'"
        )
    await desk.gate.resume(reason, actor)
    return {"state": str(desk.gate.state)}


@_verb
async def _do_reconcile(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    report = await desk.orders.sweep()
    await desk.audit("reconcile", actor, reason, {})
    return {"report": report}


@_verb
async def _do_stop(
    desk: "TradingDesk", arguments: dict[str, Any], actor: str, reason: str
) -> Any:
    await desk.audit("stop", actor, reason, {})
    desk.stopping.set()
    return {"stopping": True}


def describe_error(error: BaseException) -> str:
    """Return an error with its place, for the crash report."""
    return "".join(traceback.format_exception(error))


def closing_side(quantity: Decimal) -> Side:
    """Return the side that shrinks a position of `quantity`."""
    return Side.SELL if quantity > 0 else Side.BUY
