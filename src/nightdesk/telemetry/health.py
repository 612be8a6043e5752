"""Is the desk well? One judgement from one snapshot, the same for `status`, the live view and alerts.

Comes from: reports.py
Goes to: cli/
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

__all__ = ["Health", "judge"]

Level = Literal["well", "degraded", "halted", "starting"]
_SWITCH_BAR_US = 1400


class Health(msgspec.Struct, frozen=True):
    """`level` in one word, and every reason for it, worst first, in words an operator can act on."""

    level: Level
    reasons: tuple[str, ...] = ()


def judge(status: Mapping[str, Any]) -> Health:
    """Return the health that a reply to `status` describes."""
    trading = status.get("trading") or {}
    reasons = [*_money(status), *_work(status)]
    state = str(trading.get("state", "ACTIVE"))
    if state != "ACTIVE":
        who = f" by {trading['actor']}" if trading.get("actor") else ""
        why = f": {trading['reason']}" if trading.get("reason") else ""
        return Health("halted", (f"trading is {state}{who}{why}", *reasons))
    if not status.get("ready", True):
        return Health("starting", ("the desk is up but does not trade yet", *reasons))
    return Health("degraded" if reasons else "well", tuple(reasons))


def _money(status: Mapping[str, Any]) -> list[str]:
    reasons = []
    unknown = (status.get("orders") or {}).get("unknown") or 0
    if unknown:
        reasons.append(
            f"{unknown} orders with an unknown outcome; they count as working until the venue proves otherwise"
        )
    damaged = status.get("quarantined") or []
    if damaged:
        names = ", ".join(str(each.get("key", "?")) for each in damaged[:3])
        reasons.append(
            f"{len(damaged)} saved records cannot be read ({names}); see `nightdesk state inspect`"
        )
    return reasons


def _work(status: Mapping[str, Any]) -> list[str]:
    reasons = []
    kept = (status.get("store") or {}).get("state", "ok")
    if kept != "ok":
        reasons.append(
            f"state cannot be written (the store is {kept}); `df` and `nightdesk doctor` show why"
        )
    if status.get("degraded"):
        reasons.append("the loop stood still for more than a second; see the offenders")
    by_status = (status.get("tasks") or {}).get("by_status") or {}
    for name in ("quarantined", "backoff"):
        if by_status.get(name):
            reasons.append(f"{by_status[name]} tasks in {name}; see `nightdesk tasks`")
    slow = (status.get("switch") or {}).get("p999_us")
    if isinstance(slow, (int, float)) and slow > _SWITCH_BAR_US:
        reasons.append(
            f"switches take up to {slow / 1000:.1f} ms (p99.9), expected at most {_SWITCH_BAR_US / 1000:.1f} ms"
        )
    return reasons
