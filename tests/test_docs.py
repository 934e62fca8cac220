"""The examples in the README and in all docstrings run as written."""

import doctest
import importlib
from pathlib import Path

import jax
import pytest
from util import python_of

import fsa_jax

ROOT = Path(__file__).parent.parent
README, GPUS, INFERENCE, PRETRAINED, TRAINING = (
    ROOT / path
    for path in (
        "README.md",
        "docs/multi-gpu.md",
        "docs/inference.md",
        "docs/pretrained.md",
        "docs/training.md",
    )
)

BLOCKS = [block for page in (README, GPUS, TRAINING) for block in python_of(page)]
PACKAGE = Path(fsa_jax.__file__).parent
#: The code blocks of these pages build on one another, so those of a page form one example. The
#: one that needs transformers is run by tests/pretrained/test_transformers.py.
BLOCKS.append("\n".join(python_of(INFERENCE)))
BLOCKS.append("\n".join(x for x in python_of(PRETRAINED) if "import transformers" not in x))
MODULES = [
    ".".join(["fsa_jax", *path.relative_to(PACKAGE).with_suffix("").parts])
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


#: Modules whose examples take seconds.
SLOW = {"fsa_jax.generation", "fsa_jax.layers", "fsa_jax.transformer"}
assert {*MODULES} >= SLOW


@pytest.mark.parametrize(
    "module", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in MODULES]
)
def test_examples_of_docstrings(module):
    tested = doctest.testmod(importlib.import_module(module))
    assert tested.attempted > 0
    assert tested.failed == 0


SHAPES = {
    "operator": ("out", (1, 4096, 8, 64)),
    "selected": ("out", (1, 256, 4, 64)),
    "causal": ("out", (1, 1024, 8, 64)),
    "layer": ("y", (2, 1024, 512)),
    "hybrid": ("hybrid_logits", (1, 128, 512)),
    "generation": ("texts", [8, 8]),
    "sequence": ("y", (1, 512, 32)),
    "training": ("value", ()),
    "warm-up": ("sparse", (1, 128, 64)),
    "inference": ("logits", (2, 8, 257)),
    "pretrained": ("logits", (2, 150, 512)),
}


@pytest.mark.essential  # whoever edits the README sees at once what no longer runs
@pytest.mark.fast_cases("selected", "causal")
@pytest.mark.parametrize(
    ("block", "result"), list(zip(BLOCKS, SHAPES.values(), strict=True)), ids=SHAPES
)
def test_examples_of_the_readme(block, result, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    # optax relies on JAX's default, which users of the page have.
    with jax.numpy_dtype_promotion("standard" if "import optax" in block else "strict"):
        exec(compile(block, str(README), "exec"), names)
    name, shape = result
    got = names[name]
    assert (list(map(len, got)) if isinstance(got, list) else got.shape) == shape
