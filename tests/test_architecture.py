"""Imports go one way: programs import layers, then functions, then kernels, then semantics."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

import fsa_jax

PACKAGE = Path(fsa_jax.__file__).parent
#: The layers of the package, lowest first; each entry is a module or a package. An entry may
#: import itself and the entries of earlier lines. A module that is listed apart from its package
#: is an entry of its own.
ORDER = (
    {"lazy", "messages", "versions", "arguments.types", "arguments.scalars"},
    {"config", "partitioning"},
    {"semantics"},
    {"pallas"},
    {"arguments", "reference", "xla_tiles"},
    {"xla", "rope_scaling"},
    {"rope"},
    {"ops"},
    {"sequence_parallel"},
    {"positions"},
    {"api", "losses"},
    {"inference"},
    {"nn"},
    {"layers"},
    {"transformer_config"},
    {"transformer_block"},
    {"transformer"},
    {"generation", "pretrained"},
    {"training"},
    {"evaluation"},
    {"bench"},
    {"cli"},
)
RANKS = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
#: Entries that, like users, import only the public names of `fsa_jax`.
PROGRAMS = {"training", "bench", "cli"}
#: The entries that kernels may import, apart from other kernels.
BELOW_KERNELS = {"semantics", "config", "arguments.scalars", "arguments.types"}


def module_of(path: Path) -> str:
    """Returns the dotted module name of a file below the package, or "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str | None:
    """Returns the longest entry of `ORDER` that is a prefix of the module name."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in RANKS), None)


def imports_of(module: str) -> set[str]:
    """Returns the modules that a module imports anywhere in its file, with "" for public names."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "fsa_jax":
                below = ".".join(rest)
                found.add(below if below in MODULES else ".".join(rest[:-1]))
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_go_down(module):
    room = room_of(module)
    assert room is not None, f"{module} has no place in ORDER"
    for other in imports_of(module):
        if not other:
            assert room in PROGRAMS, f"{module} imports a public name"
            continue
        below = room_of(other)
        assert below is not None
        assert below == room or RANKS[below] < RANKS[room], f"{module} imports {other}, above it"
        if room == "pallas":
            assert below in {room, *BELOW_KERNELS}, f"{module} imports {other}, no rule of kernels"


def test_every_room_is_there():
    assert set(RANKS) == {room_of(module) for module in MODULES if module}


def test_no_modules_import_one_another():
    # packages re-export names
    packages = {name for name, path in MODULES.items() if path.stem == "__init__"}
    graph = {name: imports_of(name) for name in MODULES if name not in packages}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_architecture_page_names_files_that_exist():
    root = PACKAGE.parent
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {path.relative_to(root).as_posix() for top in ("fsa_jax", "tests", "benchmarks")
             for path in (root / top).rglob("*.py")}  # fmt: skip
    named = set(re.findall(r"\w[\w/]*\.py\b", text))
    assert named
    assert not [name for name in named if not any(f"/{x}".endswith(f"/{name}") for x in files)]
