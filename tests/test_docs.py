"""The examples of the README and of every docstring run as they stand."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import fsa_jax

ROOT = Path(__file__).parent.parent
README, GPUS = ROOT / "README.md", ROOT / "docs" / "multi-gpu.md"
BLOCKS = [
    block
    for page in (README, GPUS)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
]
PACKAGE = Path(fsa_jax.__file__).parent
MODULES = [
    ".".join(["fsa_jax", *path.relative_to(PACKAGE).with_suffix("").parts])
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings(module):
    tested = doctest.testmod(importlib.import_module(module))
    assert tested.attempted > 0
    assert tested.failed == 0


SHAPES = {
    "operator": ("out", (1, 4096, 8, 64)),
    "selected": ("out", (1, 256, 4, 64)),
    "layer": ("y", (2, 1024, 512)),
    "sequence": ("y", (1, 512, 32)),
}


@pytest.mark.parametrize(
    ("block", "result"), list(zip(BLOCKS, SHAPES.values(), strict=True)), ids=SHAPES
)
def test_examples_of_the_readme(block, result):
    names = {}
    exec(compile(block, str(README), "exec"), names)
    name, shape = result
    assert names[name].shape == shape
