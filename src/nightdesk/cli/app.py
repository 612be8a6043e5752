"""From words to a command, and from whatever it raises to one line and an exit code.

Comes from: cli/__init__.py
Goes to: cli/commands.py
"""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App
from cyclopts.exceptions import CycloptsError, UnusedCliTokensError

from nightdesk import __version__
from nightdesk.cli.commands import COMMANDS, LATER
from nightdesk.cli.output import complain, guarded, say_anything
from nightdesk.errors import NightdeskError

__all__ = ["build", "run"]

_DEFAULTS = {"tasks": "list", "workers": "status"}


def build() -> App:
    """Return the command tree. The functions are named, not imported."""
    app = App(
        name="nightdesk",
        help="The runtime of a trading desk that never sleeps.",
        version=__version__,
        suppress_keyboard_interrupt=False,
    )
    groups: dict[str, App] = {}
    for command in COMMANDS:
        parent, _, name = command.name.rpartition(" ")
        into = app
        if parent:
            if parent not in groups:
                groups[parent] = App(
                    name=parent, help=f"See `nightdesk {parent} COMMAND --help`."
                )
                app.command(groups[parent])
            into = groups[parent]
        into.command(
            f"nightdesk.cli.{command.target}",
            name=name or command.name,
            help=command.summary,
        )
    return app


def run(words: Sequence[str]) -> int:
    """Carry out one command line; never raises."""
    say_anything()
    words = _with_default(list(words))
    debug = "debug" in words or os.environ.get("NIGHTDESK__LOG_LEVEL") == "debug"
    if words[0] in LATER:
        complain(
            f"`nightdesk {words[0]}` ({LATER[words[0]]}) arrives with a later release."
        )
        return 2
    try:
        with guarded():
            result = build()(
                words,
                exit_on_error=False,
                print_error=False,
                result_action="return_value",
            )
            return result if isinstance(result, int) else 0
    except UnusedCliTokensError as error:
        given = " ".join(error.unused_tokens or ())
        hint = (
            f" Did you mean `-c {given}`?" if given.endswith((".yaml", ".yml")) else ""
        )
        complain(
            f"{given!r} is one word too many.{hint} See `nightdesk {' '.join(_command_of(words))} --help`."
        )
        return 2
    except CycloptsError as error:
        complain(
            f"{error} See `nightdesk {' '.join(_command_of(words))} --help`.".replace(
                "  ", " "
            )
        )
        return 2
    except NightdeskError as error:
        if debug:
            traceback.print_exc()
        complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        complain(
            f"unexpected {type(error).__name__}: {error}. The details are in {_crash_report(words)}."
        )
        return 1


def _with_default(words: list[str]) -> list[str]:
    """`tasks` alone, or with options, is `tasks list`."""
    default = _DEFAULTS.get(words[0])
    if default and not (
        len(words) > 1
        and (not words[1].startswith("-") or words[1] in ("-h", "--help"))
    ):
        return [words[0], default, *words[1:]]
    return words


def _command_of(words: list[str]) -> list[str]:
    """The words that name a command, for the hint behind an error."""
    for length in (2, 1):
        name = words[:length]
        if any(command.name == " ".join(name) for command in COMMANDS):
            return name
    return []


def _crash_report(words: list[str]) -> str:
    """Write what happened where an operator finds it; a read-only place falls back to the temporary directory."""
    import platform
    import tempfile
    from datetime import UTC, datetime

    now = datetime.now(UTC)
    # Values of options may be secrets (a URL with a password), so only the names are kept.
    named = [word.split("=")[0] for word in words if word.startswith("-")]
    text = (
        f"nightdesk {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"{now.isoformat()}  command: {' '.join([*_command_of(words), *named])}\n\n{traceback.format_exc()}"
    )
    name = f"nightdesk-crash-{now:%Y%m%dT%H%M%S}-{os.getpid()}.txt"
    for directory in (Path("state"), Path(tempfile.gettempdir())):
        try:
            if directory.is_dir():
                descriptor = os.open(
                    directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600
                )
                with os.fdopen(
                    descriptor, "w", encoding="utf-8", errors="backslashreplace"
                ) as file:
                    file.write(text)
                return str(directory / name)
        except OSError:
            continue
    sys.stderr.write(text)
    return "the lines above"
