"""Tests on an NVIDIA GPU of compressed and window attention, selection, gates, operator, layer.

`JAX_PLATFORMS=cuda python -m pytest -m gpu`; see test_gpu.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ops.test_gating import (
    test_branches_get_what_their_gradients_subtract,
    test_error_is_at_most_twice_that_of_the_plain_sum,
)
from util import (
    assert_errors_are_at_most_twice_those_of_dense,
    assert_poison_changes_no_bit,
    assert_same_bits,
    normal,
    value_and_gradients,
    value_and_vjp,
)

import fsa_jax
from fsa_jax.layers import NativeSparseAttention
from gpu.shared import dirty_memory, pytestmark, segments

__all__ = [  # used by pytest
    "dirty_memory",
    "pytestmark",
    "test_branches_get_what_their_gradients_subtract",
    "test_error_is_at_most_twice_that_of_the_plain_sum",
]
LENGTH = 1024
WINDOWS: dict[str, Any] = {"kernel_size": 32, "kernel_stride": 16}
FUNCTIONS = {
    "compressed": functools.partial(fsa_jax.compressed_attention, **WINDOWS),
    "window": functools.partial(fsa_jax.sliding_window_attention, window_size=200),
}
SHAPES = {
    "g1": (1, 2, (128, 128)),
    "g3_wide": (3, 2, (192, 128)),
    "g4": (4, 2, (128, 128)),
    "g5_narrow": (5, 2, (80, 96)),
    "g8_widest": (8, 1, (256, 256)),
    "g16": (16, 1, (64, 64)),
}


def attend(branch, implementation, segment_ids=None):
    return functools.partial(
        FUNCTIONS[branch],
        segment_ids=segment_ids,
        implementation=implementation,
        return_residuals=True,
    )


def inputs(branch, shape, dtype):
    group, kv_heads, (width, value_width) = SHAPES[shape]
    keys = LENGTH // 16 if branch == "compressed" else LENGTH
    shapes = ((LENGTH, group * kv_heads, width), (keys, kv_heads, width))
    shapes += ((keys, kv_heads, value_width),)
    return [normal(i, 1, *x, dtype=dtype) for i, x in enumerate(shapes)]


@pytest.mark.parametrize("branch", FUNCTIONS)
@pytest.mark.parametrize(
    ("shape", "dtype", "packed"),
    [
        *((shape, "bfloat16", False) for shape in SHAPES),
        *((shape, "bfloat16", True) for shape in ("g1", "g5_narrow")),
        *((shape, "float16", True) for shape in ("g4", "g16")),
        *((shape, "float32", False) for shape in ("g1", "g4", "g8_widest")),
    ],
)
def test_error_is_at_most_twice_that_of_dense_attention(branch, shape, dtype, packed):
    """Dense attention has the same dtype; errors of outputs and gradients are against float64."""
    args = inputs(branch, shape, jnp.dtype(dtype))
    ids = segments(LENGTH) if packed else None
    ours, dense = (
        value_and_gradients(attend(branch, name, ids), 7, *args) for name in ("triton", "reference")
    )
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in args]
        exact = value_and_gradients(attend(branch, "reference", ids), 7, *wide)
        exact = jax.tree.map(np.asarray, exact)
    assert_errors_are_at_most_twice_those_of_dense(ours, dense, exact)


@pytest.mark.parametrize("branch", FUNCTIONS)
def test_a_hundred_reruns_give_the_same_bits(branch):
    args = inputs(branch, "g4", jnp.bfloat16)
    run = value_and_vjp(attend(branch, "triton", segments(LENGTH)), 5)
    first = jax.tree.map(np.asarray, run(*args))
    for _ in range(100):
        assert_same_bits(run(*args), first)


@pytest.mark.parametrize("branch", FUNCTIONS)
def test_poison_that_nobody_sees_changes_no_bit(branch):
    query, key, value = inputs(branch, "g4", jnp.bfloat16)
    ids = np.ones((1, LENGTH), np.int32)
    ids[:, 500:516] = 0
    run = value_and_vjp(attend(branch, "triton", jnp.asarray(ids)), 3)
    padding = jnp.asarray(ids == 0)[..., None, None]
    unseen = padding
    if branch == "compressed":  # the two documents have this many windows
        windows = (500 - 32) // 16 + 1 + (508 - 32) // 16 + 1
        unseen = (jnp.arange(key.shape[1]) >= windows)[None, :, None, None]
    assert_poison_changes_no_bit(run, (query, key, value), (padding, unseen, unseen))


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_selection_is_that_of_the_portable_implementation(group, packed):
    """Lists agree where the last chosen block scores clearly higher than the first one left out."""
    length, config = 4096, fsa_jax.NSAConfig(topk=8)
    query = normal(0, 1, length, 2 * group, 128, dtype=jnp.bfloat16)
    key = normal(1, 1, length // 16, 2, 128, dtype=jnp.bfloat16)
    ids = segments(length) if packed else None
    _, lse = fsa_jax.compressed_attention(
        query, key, key, **WINDOWS, segment_ids=ids, implementation="triton", return_residuals=True
    )
    choose = functools.partial(
        fsa_jax.select_blocks, query, key, lse, config=config, segment_ids=ids
    )
    ours, again, portable = (
        np.asarray(choose(implementation=name)) for name in ("triton", "triton", "xla")
    )
    np.testing.assert_array_equal(ours, again)
    same = (ours == portable).all(axis=-1)
    assert same.mean() > 0.998
    # With equal scores, exactly the lower blocks must be chosen.
    tied = jnp.zeros_like(key)
    _, lse = fsa_jax.compressed_attention(
        query, tied, tied, **WINDOWS, segment_ids=ids, implementation="xla", return_residuals=True
    )
    choose = functools.partial(
        fsa_jax.select_blocks, query, tied, lse, config=config, segment_ids=ids
    )
    ours, portable = (np.asarray(choose(implementation=name)) for name in ("triton", "xla"))
    assert (ours == portable).all(axis=-1).mean() > 0.998


def test_the_layer_takes_the_kernels_and_repeats_its_bits():
    layer = NativeSparseAttention(
        8, 512, num_kv_heads=2, head_dim=64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    assert fsa_jax.explain()["native_sparse_attention"][0] == "triton"
    x, ids = normal(0, 1, LENGTH, 512, dtype=jnp.bfloat16), segments(LENGTH)
    graph, state = nnx.split(layer)

    @jax.jit
    def run(state, x):
        def loss(state, x):
            return jnp.mean(nnx.merge(graph, state)(x, ids).astype(jnp.float32) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(state, x)

    first = jax.tree.map(np.asarray, run(state, x))
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(first))
    for _ in range(20):
        assert_same_bits(run(state, x), first)
