"""Commands that run a desk: `run`, `demo`, `replay`.

Comes from: cli/app.py
Goes to: loading/, running.py, cli/live.py
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from cyclopts import Parameter

from nightdesk import loading
from nightdesk.cli.connection import DEMO_STATE
from nightdesk.cli.output import note, number, pairs, print_json
from nightdesk.config import Config, SourceConfig, StateConfig
from nightdesk.errors import CommandError
from nightdesk.telemetry import logs

if TYPE_CHECKING:
    from nightdesk.desk import TradingDesk

__all__ = ["demo", "replay", "run"]

_Config = Annotated[
    Path | None, Parameter(name=["--config", "-c", "--config-file", "-f"])
]
_State = Annotated[str | None, Parameter(name="--state")]
_Mode = Annotated[
    Literal["development", "production", "test"] | None,
    Parameter(name=["--mode", "-m"]),
]
_Level = Annotated[
    Literal["debug", "info", "warn", "error"] | None,
    Parameter(name=["--log-level", "-l"]),
]
_Flag = Annotated[bool, Parameter(negative="")]


def run(
    *,
    config: _Config = None,
    state: _State = None,
    mode: _Mode = None,
    log_level: _Level = None,
    allow_empty: _Flag = False,
    live: _Flag = False,
    no_console: Annotated[bool, Parameter(name="--no-console", negative="")] = False,
    no_moralis: Annotated[bool, Parameter(name="--no-moralis", negative="")] = False,
    chain: str | None = None,
    webhook_port: Annotated[
        int | None, Parameter(name=["--webhook-port", "-p"])
    ] = None,
    redis_url: Annotated[str | None, Parameter(name=["--redis-url", "-r"])] = None,
    no_redis: Annotated[bool, Parameter(name="--no-redis", negative="")] = False,
    no_database: Annotated[bool, Parameter(name="--no-database", negative="")] = False,
) -> int:
    """Run a desk until Ctrl-C, `nightdesk stop`, or the end of its recordings. Paper money unless --live.

    Args:
        config: Configuration. Default: desk.yaml.
        state: State directory, instead of `state.directory`.
        mode: Kind of operation.
        log_level: Least level that is logged.
        allow_empty: Start although no task is listed.
        live: Trade real money on venues that are not of type paper.
        no_console: Log lines instead of the live view.
        no_moralis: Leave out sources of type moralis.
        chain: Chains to watch, comma separated. Has no effect in this release.
        webhook_port: Port for webhooks. Has no effect in this release.
        redis_url: Redis for hot state. Has no effect in this release.
        no_redis: Nothing to switch off in this release.
        no_database: Nothing to switch off in this release.
    """
    later = {"--chain": chain, "--webhook-port": webhook_port, "--redis-url": redis_url}
    for flag, value in later.items():
        if value is not None:
            note(
                f"{flag} has no effect in this release: what it configures arrives with a later one."
            )
    flags = {
        "state.directory": state,
        "mode": mode,
        "log_level": log_level,
        "allow_empty": allow_empty or None,
        "live": live or None,
    }
    loaded = loading.load_config(config, environment=os.environ, flags=flags)
    if no_moralis:
        loaded = msgspec.structs.replace(
            loaded, sources=tuple(s for s in loaded.sources if s.type != "moralis")
        )
    _check_live(loaded)
    return _run(loaded, show=not no_console)


def demo(
    *,
    state: _State = None,
    log_level: _Level = None,
    no_console: Annotated[bool, Parameter(name="--no-console", negative="")] = False,
) -> int:
    """Run the demo desk: a simulated market, two paper venues, opportunities, large orders, tasks that learn.

    Args:
        state: State directory. Default: ./state/demo.
        log_level: Least level that is logged.
        no_console: Log lines instead of the live view.
    """
    flags = {
        "state.directory": state
        or os.environ.get("NIGHTDESK__STATE__DIRECTORY")
        or DEMO_STATE,
        "log_level": log_level,
    }
    with resources.as_file(
        resources.files("nightdesk.cli") / "templates" / "demo.yaml"
    ) as path:
        loaded = loading.load_config(path, environment=os.environ, flags=flags)
    return _run(
        msgspec.structs.replace(loaded, source_file="demo.yaml (packaged)"),
        show=not no_console,
    )


def _check_live(config: Config) -> None:
    """Nobody shall believe in real orders that are none, nor the other way round."""
    real = [venue.name for venue in config.venues if not venue.type.startswith("paper")]
    if config.live and not real:
        raise CommandError(
            "--live: every venue of this desk trades paper money. Leave the flag out, or add a real venue."
        )
    if real and not config.live:
        raise CommandError(
            f"{', '.join(real)} would trade real money: pass --live, or make its type paper."
        )


def _run(config: Config, *, show: bool) -> int:
    logs.hide(loading.secrets_of(config))
    terminal = sys.stdout.isatty()
    logs.set_console("text" if terminal else "json")
    from nightdesk.running import run as run_desk

    watch = (
        show
        and terminal
        and not config.virtual_time
        and os.environ.get("TERM") != "dumb"
    )
    try:
        return run_desk(config, view=live_view if watch else None)
    finally:
        logs.stop_logs()


async def live_view(desk: "TradingDesk") -> None:
    """Show the desk in the terminal until cancelled.

    Drawing costs tens of milliseconds of Python, and the interpreter lock would let it into every
    switch, so it happens in a process of its own that asks through the control socket.
    """
    process = _open_view(desk.directory)
    try:
        await asyncio.to_thread(process.wait)
    finally:
        process.terminate()
        await asyncio.to_thread(_wait_for, process)
        logs.set_console("text")


def _open_view(directory: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", "-m", "nightdesk.cli.live", str(directory)]
    logs.flush_logs()
    logs.set_console("off")
    # In a session of its own, so that Ctrl-C is the desk's alone.
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, close_fds=True
    )


def _wait_for(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def replay(
    *files: Path,
    config: _Config = None,
    state: _State = None,
    speed: str = "max",
    venue: str | None = None,
    symbol: str | None = None,
    log_level: _Level = "warn",
    json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Run a desk on recordings. At full speed it lives in virtual time: the same files and seed give the same fills.

    Args:
        files: Recordings: raw exchange messages, trades or candles; plain, gzip or zip.
        config: Desk whose tasks trade. Default: one iceberg of 0.5 BTC at one paper venue.
        state: State directory. Default: a new one under ./state/replay.
        speed: max, 1 as recorded, or N times as fast.
        venue: Venue that the recording is of. Default: the desk's only one.
        symbol: Instrument, where the recording does not name it.
        log_level: Least level that is logged.
        json: Print JSON.
    """
    if not files:
        raise CommandError("which recording? e.g. `nightdesk replay market.gz`.")
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise CommandError(f"no such file: {', '.join(missing)}.")
    loaded = _replay_config(config, log_level)
    name = venue or (loaded.venues[0].name if len(loaded.venues) == 1 else None)
    if name is None:
        raise CommandError(
            f"--venue is needed: one of {', '.join(v.name for v in loaded.venues) or 'none listed'}."
        )
    _check_instrument(loaded, name, symbol)
    options: dict[str, Any] = {
        "files": [str(file) for file in files],
        "venue": name,
        "speed": _speed(speed),
    }
    if symbol:
        options["symbol"] = symbol
    directory = state or _fresh_directory()
    loaded = msgspec.structs.replace(
        loaded,
        sources=(SourceConfig(name="replay", type="replay", options=options),),
        state=StateConfig(store="sqlite", directory=directory),
        virtual_time=speed == "max",
    )
    if not json:
        note(f"replaying {len(files)} file(s); state in {directory}")
    code = _run(loaded, show=not json)
    _summarise(Path(directory), json)
    return code


def _check_instrument(config: Config, venue: str, symbol: str | None) -> None:
    """A recording for a venue or an instrument that the desk does not have would reach nobody."""
    venues = {each.name: each for each in config.venues}
    if venue not in venues:
        raise CommandError(
            f"--venue is {venue!r}, expected one of {', '.join(venues)}."
        )
    listed = [
        each.get("symbol") for each in venues[venue].options.get("instruments", ())
    ]
    if symbol and listed and symbol not in listed:
        raise CommandError(
            f"--symbol is {symbol!r}, expected one that venue {venue} lists: {', '.join(listed)}."
        )


def _replay_config(config: Path | None, log_level: str | None) -> Config:
    flags = {"log_level": log_level}
    if config is not None:
        return loading.load_config(config, environment=os.environ, flags=flags)
    with resources.as_file(
        resources.files("nightdesk.cli") / "templates" / "replay.yaml"
    ) as path:
        return loading.load_config(path, environment=os.environ, flags=flags)


def _speed(text: str) -> float | Literal["max"]:
    if text == "max":
        return "max"
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed < 1e6:
        raise CommandError(f"--speed is {text!r}, expected max or a number above 0.")
    return speed


def _fresh_directory() -> str:
    from datetime import UTC, datetime

    base = Path("state") / "replay" / f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
    found, count = base, 1
    while found.exists():
        count += 1
        found = base.with_name(f"{base.name}-{count}")
    return str(found)


def _summarise(directory: Path, as_json: bool) -> None:
    """Print what was traded, from the state the run has left."""
    from decimal import Decimal

    from nightdesk.stores import _tools as tools

    records = [r for r in tools.export(directory) if isinstance(r.get("data"), dict)]
    fills = [r["data"] for r in records if r["kind"] == "fill"]
    tasks = {
        str(r["key"]): r["data"].get("state") for r in records if r["kind"] == "context"
    }
    quantity = sum((Decimal(str(f["quantity"])) for f in fills), Decimal(0))
    notional = sum(
        (Decimal(str(f["quantity"])) * Decimal(str(f["price"])) for f in fills),
        Decimal(0),
    )
    average = notional / quantity if quantity else None
    fees: dict[str, Decimal] = {}
    for fill in fills:
        asset = str(fill["fee_asset"])
        fees[asset] = fees.get(asset, Decimal(0)) + Decimal(str(fill["fee"]))
    positions = [_position(r["data"]) for r in records if r["kind"] == "position"]
    realized = sum((Decimal(str(p["realized_pnl"])) for p in positions), Decimal(0))
    if as_json:
        print_json(
            {
                "version": 1,
                "state_directory": str(directory),
                "tasks": tasks,
                "fills": fills,
                "filled_quantity": str(quantity),
                "average_price": None if average is None else str(average),
                "fees": {asset: str(fee) for asset, fee in fees.items()},
                "realized_pnl": f"{realized:f}",
                "positions": positions,
            }
        )
        return
    facts: dict[str, Any] = {f"task {name}": state for name, state in tasks.items()}
    facts |= {
        "fills": len(fills),
        "quantity": number(quantity),
        "average price": number(average, 4),
        "fees": ", ".join(f"{number(fee)} {asset}" for asset, fee in fees.items())
        or "none",
        "realized pnl": number(realized, 4),
    }
    for position in positions:
        facts[f"position {position['symbol']}@{position['venue']}"] = (
            f"{number(position['quantity'])} at {number(position['average_price'], 4)}"
        )
    pairs(facts)


def _position(saved: Mapping[str, Any]) -> dict[str, str | None]:
    """What a position's record says in the words of `positions`: it keeps cost and cash."""
    from decimal import Decimal

    quantity, cost, cash = (
        Decimal(str(saved[key])) for key in ("quantity", "cost", "cash")
    )
    return {
        "symbol": str(saved["symbol"]),
        "venue": str(saved["venue"]),
        "quantity": str(quantity),
        "average_price": str(cost / quantity) if quantity else None,
        "realized_pnl": f"{cash + cost:f}",
    }
