"""The house keeps its walls: a room imports the ground floor and itself, nothing else."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "nightdesk"
GROUND = {"model", "abc", "errors"}
TOP = {
    "__init__", "__main__", "bench", "cli", "compat", "config", "contexts", "control", "desk", "exchange", "handle",
    "host", "hosting", "loading", "operations", "reports", "roster", "running", "storage", "wiring",
}  # fmt: skip
COLLECTIONS = {
    "sources": "Source",
    "tasks": "Task",
    "venues": "Venue",
    "stores": "Store",
    "alerts": "Alert",
    "signals": "Signal",
}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole path"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("nightdesk."):
                rooms.add(name.split(".")[1])
    return rooms


def test_a_room_imports_only_the_ground_floor_and_itself() -> None:
    walls_broken = [
        f"{path.relative_to(SOURCE)} imports {room}"
        for path in modules()
        if room_of(path) not in TOP | GROUND
        for room in sorted(imported_rooms(path))
        if room not in GROUND | {room_of(path)}
    ]

    assert walls_broken == []


def test_the_ground_floor_knows_no_room() -> None:
    broken = [
        f"{path.relative_to(SOURCE)} imports {room}"
        for path in modules()
        if room_of(path) in GROUND
        for room in sorted(imported_rooms(path))
        if room not in GROUND
    ]

    assert broken == []


def test_each_file_of_a_collection_defines_exactly_one_class_of_its_contract() -> None:
    wrong = []
    for folder, contract in COLLECTIONS.items():
        for path in sorted((SOURCE / folder).glob("[!_]*.py")):
            classes = [
                node
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.ClassDef)
            ]
            ending = {"Task": ("Task", "OpportunityHandler")}.get(contract, (contract,))
            matching = [
                c.name
                for c in classes
                if not c.name.startswith("_")
                and any(
                    ast.unparse(base).split("[")[0].split(".")[-1].endswith(ending)
                    for base in c.bases
                )
            ]
            if len(matching) != 1:
                wrong.append(f"{folder}/{path.name}: {matching}")

    assert wrong == []


def test_no_import_circle() -> None:
    graph: dict[str, set[str]] = {}
    names = {
        ".".join(
            ("nightdesk", *p.relative_to(SOURCE).with_suffix("").parts)
        ).removesuffix(".__init__")
        for p in modules()
    }
    for path in modules():
        name = ".".join(
            ("nightdesk", *path.relative_to(SOURCE).with_suffix("").parts)
        ).removesuffix(".__init__")
        edges = graph.setdefault(name, set())
        for node in ast.parse(
            path.read_text()
        ).body:  # imports inside functions run later
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.startswith("nightdesk")
            ):
                edges |= {
                    target
                    for alias in node.names
                    for target in (f"{node.module}.{alias.name}", node.module)
                    if target in names and target != name
                }
    seen: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert seen.get(name) != 1, f"import circle: {' -> '.join((*trail, name))}"
        if name in seen:
            return
        seen[name] = 1
        for target in sorted(graph.get(name, ())):
            visit(target, (*trail, name))
        seen[name] = 2

    for name in sorted(graph):
        visit(name, ())


def test_public_modules_name_what_they_offer() -> None:
    missing = [
        str(path.relative_to(SOURCE))
        for path in modules()
        if path.name not in ("__init__.py", "__main__.py")
        and not path.name.startswith("_")
        and "__all__" not in path.read_text()
    ]

    assert missing == []
