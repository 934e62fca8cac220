"""On an NVIDIA GPU, the kernels give the same bits with and without `jax_enable_x64`.

`JAX_PLATFORMS=cuda python -m pytest -m gpu`; see test_gpu.py and test_x64.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_x64 import (
    bits_without_and_with,
    test_a_step_of_decoding_is_bitwise_the_same,
    test_texts_are_the_same,
)
from util import assert_same_bits, normal, value_and_vjp

import fsa_jax
from fsa_jax.pallas import support
from gpu.shared import dirty_memory, pytestmark, segments

__all__ = [  # used by pytest
    "dirty_memory",
    "pytestmark",
    "test_a_step_of_decoding_is_bitwise_the_same",
    "test_texts_are_the_same",
]
LENGTH = 2048


@pytest.mark.parametrize(
    ("implementation", "dtype", "packed"),
    [
        (None, "bfloat16", True),
        ("triton", "float32", False),
        ("triton", "float16", True),
        ("mosaic_gpu", "bfloat16", True),
        ("mosaic_gpu", "float16", False),
    ],
)
@pytest.mark.parametrize("group", [1, 4, 16])
def test_the_operator_and_its_gradients_are_bitwise_the_same(implementation, dtype, packed, group):
    if implementation == "mosaic_gpu" and support.hopper_reason():
        implementation = "triton"
    shapes = [(LENGTH, 2 * group), *[(LENGTH, 2)] * 2, *[(LENGTH // 16, 2)] * 2]
    arrays = [normal(i, 1, *x, 128, dtype=jnp.dtype(dtype)) for i, x in enumerate(shapes)]
    gates = jax.nn.sigmoid(normal(9, 1, LENGTH, 2 * group, 3, dtype=jnp.dtype(dtype)))
    attend = functools.partial(
        fsa_jax.native_sparse_attention,
        config=fsa_jax.NSAConfig(),
        segment_ids=segments(LENGTH) if packed else None,
        implementation=implementation,
    )
    without, with_x64 = bits_without_and_with(value_and_vjp(attend, 7), *arrays, gates)
    assert_same_bits(with_x64, without)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(with_x64))


@pytest.mark.usefixtures("x64")
def test_the_default_takes_the_kernels():
    query, key = (jnp.ones((1, 1024, heads, 128), jnp.bfloat16) for heads in (8, 2))
    attend = functools.partial(fsa_jax.sliding_window_attention, window_size=256)
    text = str(jax.jit(attend).lower(query, key, key).compile().as_text())
    assert "range_forward_kernel" in text or "hopper_forward_kernel" in text
