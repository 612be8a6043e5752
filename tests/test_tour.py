"""Every room has two signposts, and they lead somewhere."""

import ast
import re
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "nightdesk"
ROOMS = sorted(
    p for p in SOURCE.iterdir() if p.is_dir() and (p / "__init__.py").exists()
)


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def test_each_room_says_where_one_comes_from_and_where_one_goes() -> None:
    bare = [
        room.name
        for room in ROOMS
        if not {"Comes from:", "Goes to:"}
        <= set(re.findall(r"Comes from:|Goes to:", docstring(room / "__init__.py")))
    ]

    assert bare == []


def test_the_signposts_lead_somewhere() -> None:
    lost = []
    for path in sorted(SOURCE.rglob("*.py")):
        for line in re.findall(
            r"^(?:Comes from|Goes to): (.*)$", docstring(path), re.MULTILINE
        ):
            for target in re.findall(
                r"[a-z_]+(?:/[a-z_]*)*(?:\.py)?", re.sub(r"\([^)]*\)", "", line)
            ):
                if ("/" in target or target.endswith(".py")) and not (
                    SOURCE / target
                ).exists():
                    lost.append(f"{path.relative_to(SOURCE)}: {target}")

    assert lost == []


def test_every_module_has_a_docstring() -> None:
    silent = [
        str(p.relative_to(SOURCE))
        for p in sorted(SOURCE.rglob("*.py"))
        if not docstring(p)
    ]

    assert silent == []
