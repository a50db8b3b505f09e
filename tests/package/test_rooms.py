"""The rooms of the package: which exist, and that imports lead down only."""

import ast
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import mlx_qwen3next

PACKAGE = Path(mlx_qwen3next.__file__).parent
# By house, from the top down; the rooms of a line do not import each other.
FLOORS = {
    "": [
        {"convert", "bench", "server", "launch", "generate"},
        {"terminal"},
        {"cli"},
        {"decoding"},
        {"prompt_cache"},
        {"checkpoint"},
        {"model"},
        {"compute", "group"},
        {"metal_kernels", "storage", "errors"},
    ],
    "server.": [
        {"__main__"},
        {"command"},
        {"flags"},
        {"http"},
        {"protocols", "engine"},
        {"requests"},
        {"grammars"},
        {"answers"},
    ],
}
ROOMS = set().union(*FLOORS[""])


def modules():
    """Module name -> file, without the package's name."""
    files = {file: file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py")}
    for room in ("convert", "metal_kernels"):  # installed under the package's name
        files |= {f: f.relative_to(PACKAGE.parent) for f in (PACKAGE.parent / room).rglob("*.py")}
    return {".".join(name.with_suffix("").parts): file for file, name in files.items()}


def imports(known):
    """Pairs of a module and a module that it imports, lazy imports and those for types included."""
    for name, file in known.items():
        package = f"mlx_qwen3next.{name}".rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package)
                for full in (f"{base}.{alias.name}" for alias in node.names):
                    found = [full, base]
                    found = [m.removeprefix("mlx_qwen3next.") for m in found]
                    yield from ((name, m) for m in found if m in known and m != name)


@pytest.mark.parametrize("house", FLOORS)
def test_a_room_imports_only_rooms_below_it(house):
    floor = {room: i for i, rooms in enumerate(FLOORS[house]) for room in rooms}
    pairs = {
        tuple(name.removeprefix(house).partition(".")[0] for name in pair)
        for pair in imports(modules())
        if all(name.startswith(house) for name in pair)
    }
    pairs -= {("__init__", room) for room in floor}
    wrong = {(a, b) for a, b in pairs if a != b and floor[a] >= floor[b]}
    assert not wrong
    known = {("decoding", "model"), ("model", "compute"), ("convert", "checkpoint")}
    assert pairs >= (known if house == "" else {("http", "requests"), ("engine", "answers")})


def test_there_is_no_circle():
    graph = {}
    for a, b in imports(modules()):
        if not a.endswith("__init__"):
            graph.setdefault(a, set()).add(b)
    assert len([*TopologicalSorter(graph).static_order()]) > 60  # raises CycleError


def test_the_top_is_small_and_no_file_is_long():
    top = {name for name in modules() if "." not in name}
    assert top == {"__init__", "cli", "errors", "generate", "terminal"}
    rooms = {name.partition(".")[0] for name in modules()} - top
    assert rooms == ROOMS - top | {"bundled"}
    lengths = {name: len(file.read_text().splitlines()) for name, file in modules().items()}
    assert {name: n for name, n in lengths.items() if n > 450} == {}
