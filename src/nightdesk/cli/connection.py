"""Which desk a command means, and a question to it.

Comes from: cli/looking.py, cli/acting.py
Goes to: control.py
"""

import getpass
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

__all__ = ["Target", "actor", "ask", "state_directory"]

DEMO_STATE = "state/demo"


@Parameter(name="*")
@dataclass(frozen=True)
class Target:
    """Which desk."""

    state: Annotated[Path | None, Parameter(name="--state")] = None
    "State directory of the desk. Default: that of desk.yaml, else ./state, else ./state/demo."
    config: Annotated[
        Path | None, Parameter(name=["--config", "-c", "--config-file", "-f"])
    ] = None
    "Configuration whose desk is meant."
    json: Annotated[bool, Parameter(name="--json", negative="")] = False
    "Print JSON."


def state_directory(target: Target) -> Path:
    """Return the state directory that is meant: flag, environment, file, and then where a desk is listening."""
    if target.state is not None:
        return target.state
    from_environment = os.environ.get("NIGHTDESK__STATE__DIRECTORY")
    if from_environment:
        return Path(from_environment)
    file = target.config or Path("desk.yaml")
    if target.config is not None or file.exists():
        configured = Path(_configured(file))
        if target.config is not None or _has_desk(configured):
            return configured
    else:
        configured = Path("state")
    candidates = (configured, Path("state"), Path(DEMO_STATE))
    running = [directory for directory in candidates if _has_desk(directory)]
    known = [
        directory for directory in candidates if (directory / "log.jsonl").exists()
    ]
    return [*running, *known, configured][0]


def _has_desk(directory: Path) -> bool:
    return (directory / "control.sock").exists() or (
        directory / "control.path"
    ).exists()


def _configured(file: Path) -> str:
    """Read the one key; a desk must be reachable even while its configuration is being edited."""
    from nightdesk.errors import ConfigError
    from nightdesk.loading.document import read_file
    from nightdesk.loading.tree import Problems

    try:
        section = read_file(file, Problems(str(file))).value.get("state")
    except ConfigError:
        if not file.exists():
            raise
        return "state"
    found = section.get("directory") if isinstance(section, Mapping) else None
    return found if isinstance(found, str) else "state"


def actor() -> str:
    """Return who commands, for the audit trail."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def ask(
    target: Target,
    verb: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    reason: str = "",
    timeout_s: float = 10.0,
) -> Any:
    """Return the desk's reply.

    Raises:
        DeskNotRunningError: None runs there.
        DeskSilentError: It does not answer.
        RemoteError: It refused.
    """
    from nightdesk.control import ControlClient

    with ControlClient(state_directory(target), timeout_s) as client:
        return client.ask(verb, arguments, actor=actor(), reason=reason)
