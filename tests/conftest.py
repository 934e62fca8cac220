"""Test setup: eight CPU devices, strict dtypes and ranks, shape checks of internal functions.

Also the fixtures of several folders, among them what the tests of the command line share.
"""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Keep the programs that tests compile out of the user's compilation cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Most test time is compilation, and most of that is an MLIR pipeline for each fusion. Programs
    # that run on a GPU or are compiled for one (ahead_of_time.py) are still optimised.
    + (
        " --xla_backend_optimization_level=0"
        " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    )
    * (os.environ["JAX_PLATFORMS"] == "cpu")
)

from jaxtyping import install_import_hook

# Public functions are excluded, because their own checks must be the first to see bad input.
INTERNAL = [
    f"fsa_jax.{name}"
    for name in (
        "semantics.segments",
        "semantics.selection_rule",
        "reference",
        "ops.compression",
        "xla",
        "xla_tiles",
    )
]
# The hook silently ignores missing modules, so a moved module would lose its checks unnoticed.
for name in INTERNAL:
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"the shape checks of tests name a module that does not exist: {name}")
install_import_hook(INTERNAL, "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402
from command_line import TEXT, train_words  # noqa: E402
from tiers import (  # noqa: E402, F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_pycollect_makeitem,
)

from fsa_jax.bench import ahead_of_time  # noqa: E402
from fsa_jax.cli import main  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Otherwise the projections of the layers would use tf32 on a GPU: correct, but not comparable.
jax.config.update("jax_default_matmul_precision", "highest")


#: Linux limits a process to 65,530 memory maps. Every compiled program takes some, and XLA crashes
#: when none are left.
MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Clears the compiled programs of previous test files once there are many."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 45_000:
        jax.clear_caches()


@pytest.fixture
def empty_kernels():
    """Replaces kernels by empty ones, for a test that compiles programs without running them."""
    with ahead_of_time.empty_kernels():
        yield


@pytest.fixture
def x64():
    """Enables `jax_enable_x64` for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Returns a folder of four documents and a binary file."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(4):
        (folder / f"{i}.txt").write_text(TEXT * (i + 1))
    (folder / "numbers.dat").write_bytes(b"\0\1\2")
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory) -> Path:
    """Returns the folder of a run that the command `train` has finished."""
    out = tmp_path_factory.mktemp("trained")
    assert main(train_words(data, out)) == 0
    return out


@pytest.fixture
def elsewhere(tmp_path_factory, monkeypatch):
    """Runs a command in a temporary folder, so that it does not write into the project."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture
def configs(monkeypatch):
    """Collects the configs that the command `train` passes on, without training."""
    # Imported here, because it takes long and most tests do not need it.
    import fsa_jax.training

    seen = []

    def record(config):
        seen.append(config)
        return fsa_jax.training.TrainResult(
            step=1, val_loss=1.25, unigram_loss=3.5, files=(Path("a/b.png"),)
        )

    monkeypatch.setattr(fsa_jax.training, "train", record)
    return seen
