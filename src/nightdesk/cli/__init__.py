"""The command line. `main` knows every command by name; what a command needs is imported when it runs.

Comes from: control.py
Goes to: loading/, running.py, control.py
"""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words in (["-h"], ["--help"], ["help"]):
        # By far the most frequent call, and it must not wait for the libraries of the others.
        from nightdesk.cli.commands import overview

        return _say(overview())
    if words == ["--version"]:
        from nightdesk import __version__

        return _say(f"nightdesk {__version__}")
    from nightdesk.cli.app import run

    return run(words)


def _say(text: str) -> int:
    from nightdesk.cli.output import guarded

    with guarded():
        print(text)
    return 0
