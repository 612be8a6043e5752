"""Every command: its name, where it lives, and what it does, in one table that costs nothing to import.

Comes from: cli/__init__.py
Goes to: cli/app.py
"""

from typing import NamedTuple

__all__ = ["COMMANDS", "LATER", "Command", "overview"]


class Command(NamedTuple):
    """`name` may have two words (`tasks show`); `target` is `module:function` inside `nightdesk.cli`."""

    name: str
    target: str
    summary: str
    group: str


_TABLE = {
    "Start": (
        (
            "demo",
            "start:demo",
            "Run the demo desk: simulated market, paper venues, no keys.",
        ),
        ("run", "start:run", "Run the desk of desk.yaml until Ctrl-C."),
        (
            "replay",
            "start:replay",
            "Run a desk on recorded market data, as fast as it goes.",
        ),
        ("new-config", "prepare:new_config", "Write a commented desk.yaml."),
        (
            "init",
            "prepare:init",
            "Make a directory with a desk and a task of your own.",
        ),
        (
            "check-config",
            "prepare:check_config",
            "Check desk.yaml without starting anything.",
        ),
        (
            "doctor",
            "doctor:doctor",
            "Check this machine, its state directory and a running desk.",
        ),
    ),
    "Look": (
        ("status", "looking:status", "Show how the desk is."),
        ("tasks list", "looking:tasks", "List the tasks; plain `tasks` does the same."),
        (
            "tasks show",
            "looking:show",
            "Show one task: health, context, history, where it waits.",
        ),
        ("orders", "looking:orders", "List orders."),
        ("fills", "looking:fills", "List fills."),
        ("trades", "looking:trades", "List trades: fills as the ledger booked them."),
        ("positions", "looking:positions", "List positions with their result."),
        (
            "opportunities",
            "looking:opportunities",
            "List switches: what came, what became of it, how fast.",
        ),
        ("performance", "looking:performance", "Show equity, result and fees."),
        ("logs", "looking:logs", "Show the newest log lines, all or of one task."),
        ("workers status", "looking:workers", "Show the background hosts."),
    ),
    "Steer": (
        ("tasks start", "acting:start", "Start a stopped task."),
        ("tasks stop", "acting:stop_task", "Stop a task; its orders stay."),
        ("tasks pause", "acting:pause", "Pause a task, also over a restart."),
        ("tasks resume", "acting:resume", "Resume a paused or quarantined task."),
        ("tasks trigger", "acting:trigger", "Run a task now."),
        (
            "tasks adjust",
            "acting:adjust",
            "Change interval, priority or timeout of a task.",
        ),
        (
            "halt",
            "acting:halt",
            "Stop trading; --cancel orders, --flatten positions. Works with a stuck desk.",
        ),
        (
            "resume-trading",
            "acting:resume_trading",
            "Allow trading again; needs --reason.",
        ),
        ("reconcile", "acting:reconcile", "Compare orders with the venues now."),
        ("recover", "acting:recover", "Show what the next start would do (--dry-run)."),
        ("stop", "acting:stop", "Stop the desk."),
    ),
    "Keep and measure": (
        (
            "state inspect",
            "state:inspect",
            "Show what the state directory holds, and whether it is sound.",
        ),
        ("state export", "state:export", "Write every record as a JSON line."),
        (
            "state backup",
            "state:backup",
            "Copy the state into one file, also while a desk runs.",
        ),
        (
            "state restore",
            "state:restore",
            "Put a backup in the place of the state, which is kept aside.",
        ),
        (
            "state migrate",
            "state:migrate",
            "Bring old state to this version; a backup is made first.",
        ),
        (
            "bench",
            "bench:bench",
            "Measure switch, commit, schedule, recover or path beside a baseline.",
        ),
    ),
}

COMMANDS = tuple(Command(*row, group) for group, rows in _TABLE.items() for row in rows)

LATER = {
    "exchange": "the paper venue as a server of its own",
    "console": "the dashboard",
    "ingress": "more receiving processes",
    "keys": "API keys",
    "db": "the agents' database",
    "simulate": "the whole desk under a seed",
    "venues": "real venues",
    "deploy": "units for systemd and containers",
}
"""Names that are reserved and arrive with a later release."""

_EXIT_CODES = (
    "Exit codes: 0 done or stopped cleanly, 1 unexpected, 2 bad configuration or usage, 3 nothing to run or\n"
    "no desk running, 4 state in use by another desk, 5 state damaged or not writable, 6 halted at start."
)


def overview() -> str:
    """Return what `nightdesk --help` prints."""
    width = max(len(command.name) for command in COMMANDS) + 2
    lines = [
        "Usage: nightdesk COMMAND [OPTIONS]",
        "",
        "The runtime of a trading desk that never sleeps.",
    ]
    for group in _TABLE:
        lines += ["", f"{group}:"]
        lines += [
            f"  {command.name:<{width}}{command.summary}"
            for command in COMMANDS
            if command.group == group
        ]
    lines += [
        "",
        "`nightdesk COMMAND --help` shows the options of one command; every reading command takes --json.",
        "New here? `nightdesk demo`, then in a second terminal `nightdesk status`.",
        "",
        _EXIT_CODES,
    ]
    return "\n".join(lines)
