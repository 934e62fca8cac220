"""The examples of the README and of every docstring run as they stand."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import fsa_jax

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
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


@pytest.mark.parametrize("block", BLOCKS, ids=["operator", "layer"])
def test_examples_of_the_readme(block):
    names = {}
    exec(compile(block, str(README), "exec"), names)
    if "out" in names:
        assert names["out"].shape == (1, 4096, 8, 64)
    else:
        assert names["y"].shape == (2, 1024, 512)


def test_pictures_and_results_of_the_readme_exist():
    text = README.read_text(encoding="utf-8")
    paths = re.findall(r"\]\(((?:docs|benchmarks)/[^)]+)\)", text)
    assert paths
    for path in paths:
        assert (README.parent / path).is_file()
