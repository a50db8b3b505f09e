"""The rooms of the package: which exist, and that imports lead down only."""

import ast
from collections import Counter
from functools import cache
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
    "model.": [
        {"streamed"},
        {"packed"},
        {"parallel"},
        {"sharding", "mtp_head", "dflash", "reading"},
        {"qwen3_next", "capacity"},
        {"gated_delta_net", "quantized_kv", "layouts"},
        {"cache", "config"},
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
    "bench.": [
        {"__main__"},
        {"command"},
        {"comparison"},
        {"tables"},
        {"models"},
        {"graph", "machine", "on_metal", "plots", "prompts", "shapes", "traffic"},
    ],
}
ROOMS = set().union(*FLOORS[""])
KNOWN = {  # some imports that there are
    "": {("decoding", "model"), ("model", "compute"), ("convert", "checkpoint")},
    "model.": {("streamed", "packed"), ("packed", "qwen3_next")},
    "server.": {("http", "requests"), ("engine", "answers")},
    "bench.": {("comparison", "tables"), ("models", "shapes")},
}


@cache
def modules():
    """Module name -> file, without the package's name."""
    files = {file: file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py")}
    for room in ("convert", "metal_kernels"):  # installed under the package's name
        files |= {f: f.relative_to(PACKAGE.parent) for f in (PACKAGE.parent / room).rglob("*.py")}
    return {".".join(name.with_suffix("").parts): file for file, name in files.items()}


@cache
def imports():
    """Pairs of a module and a module that it imports, lazy imports and those for types included."""
    known, pairs = modules(), set()
    for name, file in known.items():
        package = f"mlx_qwen3next.{name}".rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package)
                for full in (f"{base}.{alias.name}" for alias in node.names):
                    found = [full, base, f"{base}.__init__"]
                    found = [m.removeprefix("mlx_qwen3next.") for m in found]
                    pairs |= {(name, m) for m in found if m in known and m != name}
    return pairs


@pytest.mark.parametrize("house", FLOORS)
def test_a_room_imports_only_rooms_below_it(house):
    floor = {room: i for i, rooms in enumerate(FLOORS[house]) for room in rooms}
    pairs = {
        tuple(name.removeprefix(house).partition(".")[0] for name in pair)
        for pair in imports()
        if all(name.startswith(house) for name in pair)
    }
    pairs = {pair for pair in pairs if "__init__" not in pair}
    wrong = {(a, b) for a, b in pairs if a != b and floor[a] >= floor[b]}
    assert not wrong
    assert KNOWN[house] <= pairs


def test_there_is_no_circle():
    graph = {}
    for a, b in imports():
        if not a.endswith("__init__"):
            graph.setdefault(a, set()).add(b)
    assert len([*TopologicalSorter(graph).static_order()]) > 60  # raises CycleError


def test_the_top_is_small_and_no_room_crowded():
    top = {name for name in modules() if "." not in name}
    assert top == {"__init__", "cli", "errors", "generate", "terminal"}
    rooms = {name.partition(".")[0] for name in modules()} - top
    assert rooms == ROOMS - top | {"bundled"}
    files = Counter(name.rpartition(".")[0] for name in modules() if "__init__" not in name)
    assert {room: n for room, n in files.items() if n > 20} == {}


def test_no_file_is_long():
    names = "convert", "examples", "metal_kernels", "mlx_qwen3next", "tests"
    files = [file for name in names for file in (PACKAGE.parent / name).rglob("*")]
    sources = [file for file in files if file.suffix in {".py", ".cpp", ".h", ".metal"}]
    lengths = {str(file): len(file.read_text().splitlines()) for file in sources}
    assert len(lengths) > 400 and {name: n for name, n in lengths.items() if n > 450} == {}
