"""The documentation leads somewhere: links, commands and paths that it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]


def test_every_relative_link_leads_to_a_file() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")

    assert broken == []


def test_every_command_that_the_documentation_shows_exists() -> None:
    from nightdesk.cli.commands import COMMANDS, LATER

    known = {command.name.split()[0] for command in COMMANDS} | set(LATER)
    unknown = []
    for page in PAGES:
        for name in re.findall(r"`nightdesk ([a-z][a-z-]+)", page.read_text()):
            if name not in known:
                unknown.append(f"{page.relative_to(ROOT)}: nightdesk {name}")

    assert unknown == []


def test_every_make_target_that_the_documentation_shows_exists() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    named = {
        name
        for page in PAGES
        for name in re.findall(r"`make ([a-z-]+)", page.read_text())
    }

    assert named <= targets


def test_source_paths_in_the_explanations_exist() -> None:
    lost = []
    for page in PAGES:
        for path in re.findall(
            r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|yaml|sh))`", page.read_text()
        ):
            if not any(
                (base / path).exists()
                for base in (ROOT, ROOT / "src" / "nightdesk", page.parent)
            ):
                lost.append(f"{page.relative_to(ROOT)}: {path}")

    assert lost == []
