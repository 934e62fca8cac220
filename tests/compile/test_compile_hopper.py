"""The Mosaic GPU kernels compile for Hopper and are chosen only there; nothing is run."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from compile.programs import MOSAIC, TRITON
from fsa_jax.bench.ahead_of_time import compile_for, custom_calls, operator_gradients
from fsa_jax.bench.shapes import KERNELS

pytestmark = pytest.mark.compile
#: Long enough for the kernels to be profitable.
LONG = dataclasses.replace(KERNELS["main"], length=8192)


def calls(device, shape, **arguments):
    return custom_calls(compile_for(device, *operator_gradients(shape, **arguments)).as_text())


@pytest.mark.essential_cases("True")
@pytest.mark.parametrize("packed", [False, True])
def test_both_branches_compile(packed):
    """Each branch has three kernels; selection and selected attention use Triton."""
    found = calls("H200", LONG, implementation="mosaic_gpu", packed=packed)
    assert set(found) == {TRITON, MOSAIC}
    assert found.count(MOSAIC) == 6


@pytest.mark.usefixtures("empty_kernels")
@pytest.mark.parametrize("packed", [False, True])
def test_both_branches_take_the_kernels_by_themselves(packed):
    found = calls("H200", LONG, packed=packed)
    assert set(found) == {TRITON, MOSAIC}
    assert found.count(MOSAIC) == 6


@pytest.mark.essential_cases("A100-shape3-arguments3")
@pytest.mark.usefixtures("empty_kernels")
@pytest.mark.parametrize(
    ("device", "shape", "arguments"),
    [
        ("H200", LONG, {"implementation": "triton"}),
        ("H200", LONG, {"dtype": jnp.float32}),
        ("H200", dataclasses.replace(LONG, length=512), {}),
        ("A100", LONG, {}),
        ("B200", LONG, {}),
    ],
)
def test_others_are_in_triton(device, shape, arguments):
    assert set(calls(device, shape, **arguments)) == {TRITON}


def test_a_name_that_cannot_serve_says_why():
    for device, width, why in (
        ("A100", 128, r"need compute capability 9\.0, the GPU has 8\.0"),
        ("H200", 64, "head widths must be 128, got 64"),
    ):
        shape = dataclasses.replace(LONG, width=width, value_width=width)
        with pytest.raises(NotImplementedError, match=f"mosaic_gpu.*{why}"):
            compile_for(device, *operator_gradients(shape, implementation="mosaic_gpu"))


#: Bytes that each thread may spill, by group. They are addresses of many concurrent copies.
SPILLS = {1: 0, 2: 0, 4: 32, 8: 96, 16: 0, 32: 0}

PROGRAM = """
import sys
sys.path[:0] = [{tests!r}]
from compile.programs import compile_branch
compile_branch({group})
"""


@pytest.mark.parametrize("group", SPILLS)
def test_products_run_side_by_side_and_registers_suffice(group, tmp_path):
    """Reads the assembler's reports, which must be requested before jax is imported."""
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]), group=group)
    environment = os.environ | {"MOSAIC_GPU_DUMP_TO": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    reports = {path.stem: path.read_text() for path in tmp_path.glob("*.ptxas")}
    assert len(reports) == 3
    for report in reports.values():
        assert "serialized" not in report
        spilled = re.findall(r"(\d+) bytes spill stores", report)
        assert spilled
        assert all(int(size) <= SPILLS[group] for size in spilled), report
