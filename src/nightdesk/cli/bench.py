"""`nightdesk bench`: each promise of the README, measured beside its baseline in the same run.

Comes from: cli/app.py
Goes to: bench/
"""

import inspect
from collections.abc import Mapping
from importlib import import_module, util
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from nightdesk.cli.output import note, pairs, print_json
from nightdesk.errors import CommandError

__all__ = ["bench"]

Name = Literal["switch", "commit", "schedule", "recover", "path", "hours"]


def bench(
    name: Name = "switch",
    *,
    json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    set: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
) -> int:
    """Measure one promise and print p50, p99, p99.9, max, counts and versions.

    Args:
        name: Which.
        json: Print JSON.
        set: An option of the benchmark as `name=value`, e.g. `--set events=1000`; repeat it for more.
    """
    if util.find_spec(f"nightdesk.bench.{name}") is None:
        raise CommandError(f"the benchmark {name!r} is not part of this installation.")
    module = import_module(f"nightdesk.bench.{name}")
    options = _options(module.run, set or [])
    if not json:
        note(
            f"measuring {name}; other work on this machine disturbs it. Ctrl-C ends it."
        )
    result = module.run(**options)
    if json:
        print_json({"version": 1, "benchmark": name, **result})
        return 0
    report = getattr(module, "render", None) or getattr(module, "report", None)
    if report is not None:
        print(report(result))
    else:
        pairs(_flat(result))
    return 0


def _options(function: Any, given: list[str]) -> dict[str, Any]:
    from nightdesk.loading.tree import plain_scalar

    known = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is not p.VAR_POSITIONAL
    ]
    found = {}
    for text in given:
        key, separator, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not separator or key not in known:
            raise CommandError(
                f"--set {text!r}: expected name=value with one of {', '.join(known) or 'no options at all'}."
            )
        found[key] = plain_scalar(value)
    return found


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found |= _flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found
