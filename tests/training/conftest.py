"""Runs that the tests of the trainer share. Each is made once, and a test changes only a copy."""

import shutil
from pathlib import Path

import pytest

from fsa_jax.training import train
from training.runs import DENSE, tiny


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """Returns a folder of 30 short documents."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"{i} bottles of beer on the wall. " * (1 + i % 4))
    return folder


@pytest.fixture(scope="session")
def straight(texts, tmp_path_factory) -> Path:
    """Returns the folder of a finished run of six steps."""
    out = tmp_path_factory.mktemp("straight")
    train(tiny(texts, out))
    return out


@pytest.fixture(scope="session")
def dense(texts, tmp_path_factory) -> Path:
    """Returns the folder of a finished run with full attention, which compiles faster."""
    out = tmp_path_factory.mktemp("dense")
    train(tiny(texts, out, model=DENSE))
    return out


@pytest.fixture
def run(dense, tmp_path) -> Path:
    """Returns a copy of the dense run, which the test may change."""
    return shutil.copytree(dense, tmp_path / "run")
