"""Commands before the first run: `new-config`, `init`, `check-config`.

Comes from: cli/app.py
Goes to: loading/
"""

import os
from importlib import resources
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nightdesk.cli.output import print_json
from nightdesk.errors import CommandError

__all__ = ["check_config", "init", "new_config"]

_Flag = Annotated[bool, Parameter(negative="")]

_OWN_TASK = """
  - id: hello
    type: my_desk.hello      # my_desk/hello.py, beside this file
    symbol: BTC/USDT
    venue: alpha
"""


def new_config(
    path: Path = Path("desk.yaml"),
    *,
    force: _Flag = False,
    show: Annotated[bool, Parameter(name="--print", negative="")] = False,
) -> int:
    """Write a commented desk.yaml that runs as it is.

    Args:
        path: Where to.
        force: Replace an existing file.
        show: Print it instead.
    """
    from nightdesk.loading import sample_config

    text = sample_config()
    if show:
        print(text, end="")
        return 0
    _write(path, text, force)
    print(
        f"Wrote {path}. Next: `nightdesk check-config{'' if path.name == 'desk.yaml' else f' {path}'}`, then `nightdesk run`."
    )
    return 0


def init(directory: Path, *, force: _Flag = False) -> int:
    """Make a directory with a desk and a task of your own that runs in it.

    Args:
        directory: Made if it does not exist.
        force: Replace existing files.
    """
    from nightdesk.loading import sample_config

    hello = (
        resources.files("nightdesk.cli")
        .joinpath("templates/hello.py.txt")
        .read_text(encoding="utf-8")
    )
    files = {
        "desk.yaml": sample_config() + _OWN_TASK,
        "my_desk/__init__.py": '"""Tasks of this desk."""\n',
        "my_desk/hello.py": hello,
        ".gitignore": "state/\n__pycache__/\n",
    }
    existing = [name for name in files if (directory / name).exists()]
    if existing and not force:
        raise CommandError(
            f"{directory} has {', '.join(existing)} already. Choose another directory, or pass --force."
        )
    for name, text in files.items():
        _write(directory / name, text, force=True)
    print(
        f"Made {directory} with a desk and a task of your own (my_desk/hello.py).\nNext: cd {directory} && nightdesk run"
    )
    return 0


def _write(path: Path, text: str, force: bool) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise CommandError(
            f"{path} exists. Choose another name, or pass --force."
        ) from None
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}.") from None


def check_config(
    path: Path | None = None,
    *,
    config: Annotated[
        Path | None, Parameter(name=["--config", "-c", "--config-file", "-f"])
    ] = None,
    json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Check a configuration without starting anything; every problem is told at once.

    Args:
        path: The file. Default: desk.yaml.
        config: The same.
        json: Print JSON.
    """
    from nightdesk import loading

    file = path or config or Path(loading.DEFAULT_FILE)
    found = loading.check_config(file, os.environ)
    warnings = [
        line.removeprefix("warning: ") for line in found if line.startswith("warning: ")
    ]
    problems = [line for line in found if not line.startswith("warning: ")]
    if json:
        print_json(
            {
                "version": 1,
                "file": str(file),
                "ok": not problems,
                "problems": problems,
                "warnings": warnings,
            }
        )
    else:
        for line in found:
            print(line)
        count = len(problems)
        print(
            f"{file}: {f'{count} problem' + 's' * (count > 1) if count else 'sound'}."
        )
    return 2 if problems else 0
