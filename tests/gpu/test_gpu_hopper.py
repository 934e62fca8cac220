"""Tests on an NVIDIA GPU of compressed, window and dense causal attention in Mosaic GPU.

`JAX_PLATFORMS=cuda python -m pytest -m gpu`; see test_gpu.py. Other GPUs than Hopper must refuse.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import (
    assert_errors_are_at_most_twice_those_of_dense,
    assert_poison_changes_no_bit,
    assert_same_bits,
    normal,
    value_and_gradients,
    value_and_vjp,
)

import fsa_jax
from fsa_jax.pallas import support
from fsa_jax.pallas.range_attention import hopper_pipeline
from gpu.shared import dirty_memory, pytestmark, segments

__all__ = ["dirty_memory", "pytestmark"]  # used by pytest
#: Token counts: most queries attend to several key tiles, of which the last one is partial.
LENGTH = {"compressed": 6000, "window": 1500, "causal": 1500}
FUNCTIONS = {
    "compressed": functools.partial(fsa_jax.compressed_attention, kernel_size=32, kernel_stride=16),
    "window": functools.partial(fsa_jax.sliding_window_attention, window_size=400),
    "causal": fsa_jax.causal_attention,
}
BRANCHES = pytest.mark.parametrize("branch", FUNCTIONS)
SHAPES = {"g1": (1, 3), "g4": (4, 2), "g8": (8, 1), "g16": (16, 2), "g64": (64, 1)}
#: Only for dense causal attention: such a group is split into several powers of two.
ODD_SHAPES = {"g3": (3, 2), "g5": (5, 2), "g7": (7, 1)}


def attend(branch, implementation, segment_ids=None, scale=None):
    return functools.partial(
        FUNCTIONS[branch],
        scale=scale,
        segment_ids=segment_ids,
        implementation=implementation,
        return_residuals=True,
    )


def inputs(branch, shape, dtype):
    (group, kv_heads), length = (SHAPES | ODD_SHAPES)[shape], LENGTH[branch]
    keys = length // 16 if branch == "compressed" else length
    shapes = [(length, group * kv_heads)] + [(keys, kv_heads)] * 2
    return [normal(i, 1, *x, hopper_pipeline.WIDTH, dtype=dtype) for i, x in enumerate(shapes)]


@pytest.fixture(autouse=True)
def refused():
    """Returns whether this GPU lacks the kernels; if so, requesting them by name must raise."""
    if support.hopper_reason() is None:
        return False
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0"):
        attend("compressed", "mosaic_gpu")(*inputs("compressed", "g1", jnp.bfloat16))
    return True


_CALLS = [
    *((shape, "bfloat16", False, None) for shape in SHAPES),
    *((shape, "float16", True, None) for shape in ("g1", "g4", "g8", "g16")),
    ("g4", "bfloat16", True, -0.1),
    ("g4", "bfloat16", False, 0.0),
]


@pytest.mark.parametrize(
    ("branch", "shape", "dtype", "packed", "scale"),
    [
        *((branch, *call) for branch in FUNCTIONS for call in _CALLS),
        *(("causal", shape, "bfloat16", True, None) for shape in ODD_SHAPES),
    ],
)
def test_error_is_at_most_twice_that_of_dense_attention(
    branch, shape, dtype, packed, scale, refused
):
    """Dense attention has the same dtype; errors of outputs and gradients are against float64."""
    if refused:
        return
    args = inputs(branch, shape, jnp.dtype(dtype))
    ids = segments(LENGTH[branch]) if packed else None
    ours, dense = (
        value_and_gradients(attend(branch, name, ids, scale), 7, *args)
        for name in ("mosaic_gpu", "reference")
    )
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in args]
        exact = value_and_gradients(attend(branch, "reference", ids, scale), 7, *wide)
        exact = jax.tree.map(np.asarray, exact)
    assert_errors_are_at_most_twice_those_of_dense(ours, dense, exact)


@BRANCHES
@pytest.mark.parametrize("shape", ["g4", "g16"])
def test_a_hundred_reruns_give_the_same_bits(branch, shape, refused):
    if refused:
        return
    args = inputs(branch, shape, jnp.bfloat16)
    run = value_and_vjp(attend(branch, "mosaic_gpu", segments(LENGTH[branch])), 5)
    first = jax.tree.map(np.asarray, run(*args))
    for _ in range(100):
        assert_same_bits(run(*args), first)


@BRANCHES
def test_poison_that_nobody_sees_changes_no_bit(branch, refused):
    if refused:
        return
    query, key, value = inputs(branch, "g4", jnp.bfloat16)
    length = LENGTH[branch]
    ids = np.ones((1, length), np.int32)
    ids[:, 500:516] = 0
    run = value_and_vjp(attend(branch, "mosaic_gpu", jnp.asarray(ids)), 3)
    padding = unseen = jnp.asarray(ids == 0)[..., None, None]
    if branch == "compressed":
        windows = (500 - 32) // 16 + 1 + (length - 516 - 32) // 16 + 1
        unseen = (jnp.arange(key.shape[1]) >= windows)[None, :, None, None]
    assert_poison_changes_no_bit(run, (query, key, value), (padding, unseen, unseen))


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand(sign, refused):
    """Each query must get the value of the one key that has all its weight."""
    if refused:
        return
    query, key, value = inputs("compressed", "g4", jnp.bfloat16)
    large = jnp.where(jnp.arange(key.shape[1]) % 2 == 0, 1e4, -1e4)[None, :, None, None] * sign
    query, key = jnp.ones_like(query), (jnp.zeros_like(key).at[..., :1].set(1) * large)
    key = key.astype(jnp.bfloat16)
    wanted = attend("compressed", "reference", scale=1.0)(query, key, value)
    got = attend("compressed", "mosaic_gpu", scale=1.0)(query, key, value)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=1e-2
        )


def test_none_takes_them_where_there_is_much_to_do(refused):
    query, key = (jnp.zeros((1, n, h, 128), jnp.bfloat16) for n, h in ((32768, 32), (2048, 2)))
    text = str(jax.jit(attend("compressed", None)).lower(query, key, key).compile().as_text())
    assert ("hopper_forward_kernel" in text) == (not refused)
    text = str(jax.jit(attend("compressed", "triton")).lower(query, key, key).compile().as_text())
    assert "hopper_forward_kernel" not in text


def test_cudnn_by_name():
    """Where jax supports cuDNN, results match the kernels'; with documents, cuDNN refuses."""
    args = inputs("causal", "g4", jnp.bfloat16)
    got, wanted = (
        value_and_gradients(
            functools.partial(fsa_jax.causal_attention, implementation=name), 3, *args
        )
        for name in ("cudnn", None)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= 1e-2 * np.abs(b).max()
    with pytest.raises(NotImplementedError, match="cannot serve segment_ids"):
        fsa_jax.causal_attention(*args, implementation="cudnn", segment_ids=segments(1500))


def test_full_attention_never_takes_the_quadratic_path():
    """On 65,536 tokens in two documents, a score matrix would take 16 GiB per head."""
    query, key = (normal(0, 1, 65536, heads, 128, dtype=jnp.bfloat16) for heads in (4, 1))
    ids = (jnp.arange(65536, dtype=jnp.int32) // 40000 + 1)[None]
    attend = lambda q, k, v: fsa_jax.causal_attention(q, k, v, segment_ids=ids).sum()  # noqa: E731
    program = jax.jit(jax.grad(attend, (0, 1, 2))).lower(query, key, key).compile()
    found = program.memory_analysis()
    assert found is not None
    assert found.temp_size_in_bytes < 2**30
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in program(query, key, key))
