"""One line per thing that happened: JSON in `<state>/log.jsonl`, words in the terminal, the newest in memory.

The loop only builds a mapping and puts it into a queue; a thread of the standard library's own
`QueueListener` formats and writes, so that a slow disk or a stopped terminal holds up nobody.

Comes from: kernel/, tasks/
Goes to: operations.py (the newest lines), alerts/log.py
"""

import atexit
import base64
import contextlib
import logging
import os
import queue
import sys
import threading
import urllib.parse
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import msgspec

from nightdesk.abc import Clock
from nightdesk.telemetry._structlog import structlog
from nightdesk.telemetry.words import sayable, visible

__all__ = [
    "LogSettings",
    "configure_logs",
    "flush_logs",
    "hide",
    "log_scope",
    "recent_logs",
    "set_console",
    "stop_logs",
]

Console = Literal["off", "quiet", "text", "json"]
Entry = MutableMapping[str, Any]

_LEVELS = {
    "debug": 10,
    "info": 20,
    "warn": 30,
    "warning": 30,
    "error": 40,
    "critical": 50,
}
_FILE_BYTES = 10 * 1024 * 1024
_FILES_KEPT = 5
_QUEUE = 20_000
_NEWEST = 5_000
_TEXT_LIMIT = 8_000
_STORM_AFTER = 20
_STORM_WINDOW_NS = 60_000_000_000
_SECRET_KEYS = (
    "secret",
    "passw",
    "token",
    "api_key",
    "apikey",
    "private",
    "mnemonic",
    "credential",
)
_COLOURS = {
    "debug": "2",
    "info": "0",
    "warning": "33",
    "error": "31",
    "critical": "1;31",
}


class LogSettings(Protocol):
    """What the logs need of the configuration."""

    @property
    def log_level(self) -> str: ...
    @property
    def state(self) -> Any:
        """With `store` and `directory`; the store `memory` writes no file."""


class _Logs:
    """The one set of logs of this process; `configure_logs` points it somewhere."""

    def __init__(self) -> None:
        self.newest: deque[dict[str, Any]] = deque(maxlen=_NEWEST)
        self.level = 20
        self.console: Console = "quiet"
        self.dropped = 0
        self.hidden: tuple[str, ...] = ()
        self.clock: Clock | None = None
        self._queue: queue.Queue[Any] = queue.Queue(_QUEUE)
        self._listener: QueueListener | None = None
        self._storms: dict[tuple[str, str], tuple[int, int]] = {}
        self._lock = threading.Lock()

    # --- one entry ------------------------------------------------------------------------------------

    def take(self, entry: Entry) -> None:
        """Take one finished entry in; never raises and never waits."""
        level = str(entry.get("level", "info"))
        number = _LEVELS.get(level, 20)
        if number < self.level or self._is_storm(entry):
            return
        entry = self._cleaned(entry)
        self.newest.append(entry)
        record = logging.makeLogRecord(
            {"levelno": number, "levelname": level, "msg": entry}
        )
        if self._listener is None:
            if self.console != "off" and number >= 30:
                _ConsoleHandler(self).emit(record)
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += (
                1  # told by `recent_logs` and by the next line that gets through
            )

    def _is_storm(self, entry: Entry) -> bool:
        """The first lines of a kind in a minute pass, then each 2^n-th with its count (R-25)."""
        key = (str(entry.get("event")), str(entry.get("task", "")))
        now = self.clock.monotonic_ns() if self.clock else 0
        with self._lock:
            since, count = self._storms.get(key, (now, 0))
            if now - since > _STORM_WINDOW_NS:
                since, count = now, 0
            count += 1
            if len(self._storms) > 4096:
                self._storms.clear()
            self._storms[key] = (since, count)
        if count <= _STORM_AFTER or self.level <= 10:
            return False
        if count & (count - 1):
            return True
        entry["repeated"] = count
        return False

    def _cleaned(self, entry: Entry) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in entry.items():
            if _is_secret(key):
                found[sayable(key)] = "***"
            elif isinstance(value, (int, float, bool)) or value is None:
                found[key] = value
            elif isinstance(value, str):
                found[key] = self._without_secrets(value)[:_TEXT_LIMIT]
            else:
                found[sayable(key)] = self._plain(value)
        return found

    def _plain(self, value: Any) -> Any:
        try:
            plain = self._masked(
                msgspec.to_builtins(value, enc_hook=str, str_keys=True)
            )
            text = msgspec.json.encode(plain).decode()
        except (
            Exception
        ):  # whatever a task logs, and however it fails to describe itself
            try:
                return self._without_secrets(str(value))[:_TEXT_LIMIT]
            except Exception:
                return f"({type(value).__name__})"
        return plain if len(text) <= _TEXT_LIMIT else text[:_TEXT_LIMIT]

    def _masked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._without_secrets(value)
        if isinstance(value, dict):
            return {
                sayable(key): "***" if _is_secret(key) else self._masked(each)
                for key, each in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._masked(each) for each in value]
        return value

    def _without_secrets(self, text: str) -> str:
        text = sayable(text)
        for secret in self.hidden:
            if secret in text:
                text = text.replace(secret, "***")
        return text

    # --- where entries go -------------------------------------------------------------------------------

    def open(self, settings: LogSettings, clock: Clock) -> None:
        self.close()
        self.clock = clock
        self.level = _LEVELS.get(settings.log_level, 20)
        self._storms.clear()
        handlers: list[logging.Handler] = [_ConsoleHandler(self)]
        if settings.state.store != "memory":
            handlers.insert(
                0, _FileHandler(Path(settings.state.directory) / "log.jsonl")
            )
        self._queue = queue.Queue(_QUEUE)
        self._listener = QueueListener(self._queue, *handlers)
        self._listener.start()

    def close(self) -> None:
        listener, self._listener = self._listener, None
        if listener is None:
            return
        listener.stop()
        for handler in listener.handlers:
            handler.close()

    def flush(self, timeout_s: float = 2.0) -> None:
        """Wait until what was logged before is written."""
        if self._listener is None:
            return
        done = threading.Event()
        with contextlib.suppress(queue.Full):
            self._queue.put(logging.makeLogRecord({"msg": done}), timeout=timeout_s)
            done.wait(timeout_s)


class _FileHandler(RotatingFileHandler):
    """`log.jsonl`, private, rotated; made at the first line, so a desk that may not start leaves no trace."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path,
            maxBytes=_FILE_BYTES,
            backupCount=_FILES_KEPT,
            encoding="utf-8",
            delay=True,
        )
        self._failed = False

    def _open(self) -> Any:
        path = Path(self.baseFilename)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(
            path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        return os.fdopen(descriptor, "a", encoding="utf-8")

    def format(self, record: logging.LogRecord) -> str:
        return _as_json(record)

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, threading.Event):
            return
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """A full or read-only disk costs the file, not the desk; said once."""
        if not self._failed:
            self._failed = True
            with contextlib.suppress(OSError, ValueError):
                print(
                    f"nightdesk: {self.baseFilename} cannot be written: {sys.exc_info()[1]}",
                    file=sys.stderr,
                )


class _ConsoleHandler(logging.Handler):
    """Lines for a person or for a collector, on standard output; a closed one is no error."""

    def __init__(self, logs: _Logs) -> None:
        super().__init__()
        self._logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.msg, threading.Event):
            record.msg.set()
            return
        mode = self._logs.console
        if mode == "off" or (mode == "quiet" and record.levelno < 30):
            return
        stream = sys.stderr if mode == "quiet" else sys.stdout
        line = (
            _as_json(record)
            if mode == "json"
            else _as_text(record, _wants_colour(stream))
        )
        try:
            try:
                stream.write(line + "\n")
            except UnicodeEncodeError:  # a terminal that knows no UTF-8
                stream.write(ascii(line)[1:-1] + "\n")
            stream.flush()
        except (OSError, ValueError):
            self._logs.console = "off"


def _is_secret(key: str) -> bool:
    return any(word in key.lower() for word in _SECRET_KEYS)


def _as_json(record: logging.LogRecord) -> str:
    return msgspec.json.encode(record.msg).decode()


def _as_text(record: logging.LogRecord, colour: bool) -> str:
    entry = dict(cast(Mapping[str, Any], record.msg))
    when = str(entry.pop("at", ""))[11:23]
    level = str(entry.pop("level", ""))
    text = visible(str(entry.pop("event", "")))
    trouble = entry.pop("exception", None)
    rest = " ".join(f"{key}={_word(value)}" for key, value in entry.items())
    head = f"{when} {level:<8} {text}"
    if colour:
        head = f"\x1b[2m{when}\x1b[0m \x1b[{_COLOURS.get(level, '0')}m{level:<8}\x1b[0m {text}"
        rest = f"\x1b[2m{rest}\x1b[0m" if rest else ""
    line = f"{head}  {rest}".rstrip()
    if not trouble:
        return line
    return line + "\n" + visible(str(trouble), keep="\n\t")


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    is_word = text and text.isprintable() and not any(c.isspace() for c in text)
    return text if is_word else repr(text)


def _wants_colour(stream: Any) -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(getattr(stream, "isatty", lambda: False)())


_logs = _Logs()
atexit.register(_logs.close)


# --- the two ways in: structlog, and the standard library's loggers ------------------------------------------


def _stamp(_: Any, method: str, entry: Entry) -> Entry:
    level = (
        "warning" if method == "warn" else "error" if method == "exception" else method
    )
    now = (
        _logs.clock.now_ns()
        if _logs.clock
        else int(datetime.now(UTC).timestamp() * 1e9)
    )
    when = (
        datetime.fromtimestamp(now / 1e9, UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )
    return {"at": when, "level": level, "event": entry.pop("event", ""), **entry}


def _finish(_: Any, __: str, entry: Entry) -> Any:
    _logs.take(entry)
    raise structlog.DropEvent


class _StandardHandler(logging.Handler):
    """Libraries log through `logging`; their lines join ours."""

    def emit(self, record: logging.LogRecord) -> None:
        entry: Entry = {"event": record.getMessage(), "logger": record.name}
        if record.exc_info and record.exc_info[1] is not None:
            entry["exception"] = logging.Formatter().formatException(record.exc_info)
        _logs.take(
            _stamp(
                None,
                record.levelname.lower(),
                {**entry, **structlog.contextvars.get_contextvars()},
            )
        )


def configure_logs(settings: LogSettings, clock: Clock) -> Any:
    """Point this process's logs at a desk's state directory and return its logger.

    The file is `<state>/log.jsonl`, rotated at 10 MiB, five old ones kept. Calling it
    again moves the logs; the newest lines stay.
    """
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            _stamp,
            _finish,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            _LEVELS.get(settings.log_level, 20)
        ),
        logger_factory=structlog.ReturnLoggerFactory(),
        cache_logger_on_first_use=False,
    )
    _logs.open(settings, clock)
    ours = logging.getLogger("nightdesk")
    for logger in (ours, logging.getLogger("asyncio")):
        for handler in [h for h in logger.handlers if isinstance(h, _StandardHandler)]:
            logger.removeHandler(handler)
        logger.addHandler(_StandardHandler())
        logger.setLevel(_logs.level)
    return structlog.get_logger()


def set_console(mode: Console) -> None:
    """Choose what the terminal sees: `text`, `json` lines, warnings only (`quiet`, on standard error), or nothing."""
    _logs.console = mode


def hide(secrets: Iterable[str]) -> None:
    """Replace these values by `***` in everything that is logged, also where they stand encoded."""
    forms: dict[str, None] = {}
    for secret in secrets:
        if len(secret) >= 6:
            forms[secret] = None
            forms[base64.b64encode(secret.encode()).decode()] = None
            forms[urllib.parse.quote(secret, safe="")] = None
    _logs.hidden = tuple(sorted({*_logs.hidden, *forms}, key=len, reverse=True))


@contextmanager
def log_scope(**ids: str) -> Iterator[None]:
    """Give every line inside these fields, in whatever library it is written: `log_scope(task="sell-btc")`."""
    with structlog.contextvars.bound_contextvars(**ids):
        yield


def recent_logs(
    *, task_id: str | None = None, level: str | None = None, limit: int = 100
) -> list[dict[str, Any]]:
    """Return the newest lines, oldest first.

    Args:
        task_id: Only of this task.
        level: Only of this level and above.
        limit: At most so many.
    """
    least = _LEVELS.get((level or "debug").lower(), 10)
    found: list[dict[str, Any]] = []
    for entry in reversed(list(_logs.newest)):
        if len(found) >= limit:
            break
        if _LEVELS.get(str(entry.get("level")), 20) >= least and _belongs(
            entry, task_id
        ):
            found.append(dict(entry))
    return found[::-1]


def _belongs(entry: Mapping[str, Any], task_id: str | None) -> bool:
    return task_id is None or task_id in (
        entry.get("task"),
        entry.get("task_id"),
        entry.get("source"),
    )


def flush_logs() -> None:
    """Wait until everything logged so far is in the file and on the terminal."""
    _logs.flush()


def stop_logs() -> None:
    """Write what waits and close the file."""
    _logs.close()
