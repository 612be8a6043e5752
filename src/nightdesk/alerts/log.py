"""Alerts into the log: the channel that needs nothing and is always there.

Comes from: desk.py
Goes to: telemetry/logs.py (as log lines)
"""

from typing import Any

import structlog

from nightdesk.abc import Alert

__all__ = ["LogAlert"]

_METHODS = {"info": "info", "warning": "warning", "critical": "critical"}


class LogAlert(Alert):
    """Writes each alert as one log line with `alert` and `source`.

    Args:
        log: A structured logger; None takes the process's own.
    """

    def __init__(self, log: Any = None) -> None:
        self._log = log

    async def send(self, level: str, source: str, text: str) -> None:
        log = self._log or structlog.get_logger()
        getattr(log, _METHODS.get(level, "error"))(text, alert=level, source=source)
