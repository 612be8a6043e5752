"""The kill switch: who stopped trading, when and why; durable, and in force before it is durable (S-14).

Comes from: risk/gate.py, operations.py
Goes to: stores/
"""

from collections.abc import Awaitable, Callable
from enum import StrEnum

import msgspec

from nightdesk.abc import Clock, Delete, Put, Store

__all__ = ["HALT_MODES", "KillSwitch", "TradingState"]

HALT_MODES = ("pause", "cancel", "flatten")
_KIND = "halt"
_WHOLE = "state"
_SYMBOL = "symbol|"


class TradingState(StrEnum):
    """ACTIVE: all within the limits. REDUCING: only orders that shrink a position.
    HALTED: only orders that are marked reduce-only. Cancels always pass."""

    ACTIVE = "ACTIVE"
    REDUCING = "REDUCING"
    HALTED = "HALTED"


class _Saved(msgspec.Struct, frozen=True, kw_only=True):
    state: TradingState = TradingState.ACTIVE
    reason: str = ""
    actor: str = ""
    mode: str = "pause"
    since_ns: int = 0


class KillSwitch:
    """The trading state of the desk, and of single instruments.

    Args:
        on_change: Called with the level, a text for the operator, the state, reason and actor at each change.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        on_change: Callable[[str, str, TradingState, str, str], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._on_change = on_change
        self._saved = _Saved()
        self.symbols: dict[str, _Saved] = {}

    @property
    def state(self) -> TradingState:
        return self._saved.state

    @property
    def reason(self) -> str:
        return self._saved.reason

    @property
    def actor(self) -> str:
        return self._saved.actor

    @property
    def mode(self) -> str:
        return self._saved.mode

    @property
    def since_ns(self) -> int:
        return self._saved.since_ns

    async def load(self) -> None:
        """Take up what was in force when the last desk ended. What cannot be read counts as halted."""
        for record in await self._store.load(_KIND):
            try:
                saved = msgspec.json.decode(record.data, type=_Saved)
            except msgspec.MsgspecError as error:
                self.move(
                    TradingState.HALTED,
                    f"the record of the kill switch ({record.key}) is unreadable: {error}",
                    "start",
                )
                continue
            if record.key == _WHOLE:
                self._saved = saved
            elif record.key.startswith(_SYMBOL):
                self.symbols[record.key.removeprefix(_SYMBOL)] = saved
        damaged = [key for kind, key, _ in self._store.quarantined() if kind == _KIND]
        if damaged and self.state is not TradingState.HALTED:
            self.move(
                TradingState.HALTED,
                f"the record of the kill switch is damaged: {', '.join(damaged)}",
                "start",
            )

    def move(
        self,
        state: TradingState,
        reason: str,
        actor: str,
        mode: str = "pause",
        *,
        keep_symbols: bool = False,
    ) -> Awaitable[None]:
        """Change the state now; awaiting the result waits until the change is durable.

        In force first, durable second: the other way round, orders could pass while the disk is slow.
        """
        if mode not in HALT_MODES:
            raise ValueError(
                f"halt mode is {mode!r}, expected one of {', '.join(HALT_MODES)}"
            )
        before = self._saved
        self._saved = _Saved(
            state=state,
            reason=reason,
            actor=actor,
            mode=mode,
            since_ns=self._clock.now_ns(),
        )
        level = "info" if state is TradingState.ACTIVE else "critical"
        self._on_change(
            level,
            f"trading {before.state} -> {state} by {actor}: {reason}",
            state,
            reason,
            actor,
        )
        batch: list[Put | Delete] = [
            Put(_KIND, _WHOLE, msgspec.json.encode(self._saved))
        ]
        if state is TradingState.ACTIVE and not keep_symbols:
            batch += [Delete(_KIND, _SYMBOL + key) for key in self.symbols]
            self.symbols.clear()
        return self._save(
            batch, before.state, f"trading.{state.lower()}", {"mode": mode}
        )

    def halt_symbol(self, key: str, reason: str, actor: str) -> Awaitable[None]:
        """Stop opening in one instrument until trading is resumed."""
        saved = _Saved(
            state=TradingState.HALTED,
            reason=reason,
            actor=actor,
            since_ns=self._clock.now_ns(),
        )
        self.symbols[key] = saved
        self._on_change(
            "critical", f"{key} halted by {actor}: {reason}", self.state, reason, actor
        )
        put = Put(_KIND, _SYMBOL + key, msgspec.json.encode(saved))
        return self._save(
            [put], TradingState.ACTIVE, "trading.symbol_halted", {"key": key}, saved
        )

    def _save(
        self,
        batch: list[Put | Delete],
        before: TradingState,
        what: str,
        details: dict[str, str],
        saved: _Saved | None = None,
    ) -> Awaitable[None]:
        saved = saved or self._saved
        entry = {
            "what": what,
            "actor": saved.actor,
            "reason": saved.reason,
            "details": {"from": before, "to": saved.state, **details},
            "ts_ns": saved.since_ns,
        }
        batch.append(
            Put(
                "audit",
                f"{saved.since_ns}-{what}",
                msgspec.json.encode(entry),
                "completed",
            )
        )
        return self._store.save(batch)
