"""The kernels compiled for a GPU are the same with and without `jax_enable_x64`."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from compile.programs import MOSAIC, TRITON, compile_branch
from fsa_jax.bench.ahead_of_time import (
    compile_for,
    custom_calls,
    decode_step,
    lower_for,
    operator_gradients,
)
from fsa_jax.bench.shapes import KERNELS

pytestmark = pytest.mark.compile


def compiled_text(program, x64):
    with jax.enable_x64(x64):
        text = compile_for("H200", *program).as_text()
    assert text is not None
    return text


def kernels(text):
    """Returns a program's kernels, with their operands and results but without names."""
    lines = [line for line in text.splitlines() if TRITON in line]
    return Counter(re.sub(r"%[\w.-]+|, metadata=\{.*?\}", "", line).strip() for line in lines)


PROGRAMS = {
    "operator": operator_gradients(KERNELS["g2"], packed=True),
    "decode": decode_step(length=4096, heads=8, kv_heads=2),
}


@pytest.mark.essential_cases("decode")
@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_are_the_same(name):
    """Covers the automatic choice and the decoding kernels."""
    without, with_x64 = (compiled_text(PROGRAMS[name], x64) for x64 in (False, True))
    assert kernels(with_x64)
    assert kernels(with_x64) == kernels(without)
    assert set(custom_calls(with_x64)) == {TRITON}
    # Only scalars may have 64 bits.
    assert not re.search(r"\b[sfu]64\[\d", with_x64)


@pytest.mark.usefixtures("x64")
def test_kernels_for_hopper_compile():
    assert custom_calls(compile_branch(4).as_text()).count(MOSAIC) == 3


@pytest.mark.usefixtures("x64")
def test_float64_takes_the_portable_implementation():
    program = operator_gradients(KERNELS["g2"], dtype=jnp.float64)
    assert not {TRITON, MOSAIC} & set(custom_calls(lower_for("H200", *program).as_text()))
    named = operator_gradients(KERNELS["g2"], dtype=jnp.float64, implementation="triton")
    with pytest.raises(NotImplementedError, match=r"the dtype must be.*got float64"):
        lower_for("H200", *named)
