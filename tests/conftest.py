"""Test set-up: 8 CPU devices, strict dtypes and ranks, shape checks of the internal functions."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Runs of the tests keep no programs among the user's.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Most of the time of the tests is compilation, and most of that an MLIR pipeline for a fusion.
    # What runs on a GPU or is compiled for one (ahead_of_time.py) is optimised all the same.
    + (
        " --xla_backend_optimization_level=0"
        " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    )
    * (os.environ["JAX_PLATFORMS"] == "cpu")
)

from jaxtyping import install_import_hook

# The public functions have their own checks, which must meet bad input first.
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
# The hook says nothing of a module that has gone elsewhere: its checks would be gone too.
for name in INTERNAL:
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"the shape checks of tests name a module that does not exist: {name}")
install_import_hook(INTERNAL, "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402
from tiers import (  # noqa: E402, F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_pycollect_makeitem,
)

from fsa_jax.bench import ahead_of_time  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# On a GPU, the projections of the layers would otherwise be cut to tf32: right, but not comparable.
jax.config.update("jax_default_matmul_precision", "highest")


#: Linux lets a process have 65,530 maps of memory. Every compiled program takes some, and XLA
#: crashes when none are left.
MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Lets go of the compiled programs of former files, once there are many."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 45_000:
        jax.clear_caches()


@pytest.fixture
def empty_kernels():
    """Kernels that do nothing, for one test of programs that are compiled and not run."""
    with ahead_of_time.empty_kernels():
        yield


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield
