"""On an NVIDIA GPU, CUDA's compute-sanitizer finds no out-of-bounds access in any kernel."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sanitized import CASES

pytestmark = pytest.mark.gpu
FOUND = 99


@pytest.fixture
def alone():
    """Runs one case at a time: alone each takes seconds, but several at once take many minutes."""
    with open(Path(tempfile.gettempdir()) / "fsa_jax_sanitizer.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", CASES)
def test_no_access_outside_an_array(name):
    tool = shutil.which("compute-sanitizer")
    assert tool is not None, "needs compute-sanitizer, a part of the CUDA toolkit, on the PATH"
    done = subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), sys.executable,
         str(Path(__file__).parents[1] / "sanitized.py"), name],
        # Launch kernels one by one: the tool takes minutes to trace a recorded graph.
        env=os.environ
        | {
            "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
            "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer=",
        },
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    output = done.stdout[:3000] + done.stderr[-1000:]
    if name == "planted":
        assert done.returncode != 0, output
        assert "Invalid __global__ read" in output, output
    else:
        assert done.returncode == 0, output
