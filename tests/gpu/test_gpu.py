"""Tests on an NVIDIA GPU: error bounds, reruns, dirty memory.

Run them with `JAX_PLATFORMS=cuda python -m pytest -m gpu`.
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
    lists,
    normal,
    selected,
    value_and_gradients,
    value_and_vjp,
)

import fsa_jax
from fsa_jax.pallas import SelectedTuning, Tile
from gpu.shared import dirty_memory, pytestmark, segments

__all__ = ["dirty_memory", "pytestmark"]  # used by pytest

LENGTH = 1024


def case(group, dtype, *, kv_heads=2, widths=(128, 128), block_size=64, slots=16, length=LENGTH):
    width, value_width = widths
    query = normal(0, 1, length, group * kv_heads, width, dtype=dtype)
    key = normal(1, 1, length, kv_heads, width, dtype=dtype)
    value = normal(2, 1, length, kv_heads, value_width, dtype=dtype)
    indices = lists(3, 1, length, kv_heads, slots, -(-length // block_size))
    return (query, key, value), indices, block_size


CASES = {
    "g1": {"group": 1},
    "g2": {"group": 2},
    "g3_wide": {"group": 3, "widths": (192, 128)},
    "g4": {"group": 4},
    "g5_small_blocks": {"group": 5, "block_size": 16, "slots": 40},
    "g6_widest": {"group": 6, "widths": (256, 256), "block_size": 32},
    "g7_narrow": {"group": 7, "widths": (80, 96), "block_size": 128, "slots": 5},
    "g8": {"group": 8, "widths": (64, 64)},
    "g12": {"group": 12, "widths": (32, 32)},
    "g16": {"group": 16},
    "g32": {"group": 32, "kv_heads": 1, "widths": (96, 80)},
    "odd_length": {"group": 2, "length": 1237},
}
TUNINGS = {
    "default": None,
    "kv_outer": SelectedTuning(method="kv_outer"),
    "query_outer": SelectedTuning(method="query_outer"),
    "query_tile": SelectedTuning(method="query_tile"),
    "chunks": SelectedTuning(method="kv_outer", scratch_bytes=2**21, pairs=48),
}


@pytest.mark.parametrize(
    ("name", "dtype", "tuning", "packed"),
    [
        *((name, "bfloat16", "default", False) for name in CASES),
        *((name, "bfloat16", "default", True) for name in ("g1", "g3_wide", "g4", "g16")),
        *((name, "float16", "default", True) for name in ("g1", "g5_small_blocks", "g8", "g16")),
        *((name, "float32", "default", False) for name in ("g1", "g4", "g6_widest", "g16")),
        *(("g4", "bfloat16", tuning, True) for tuning in TUNINGS if tuning != "default"),
        ("g16", "bfloat16", "kv_outer", False),
        *(("g4", "float32", f"query_{name}", True) for name in ("outer", "tile")),
        ("g4", "float32", "chunks", True),
    ],
)
def test_error_is_at_most_twice_that_of_dense_attention(name, dtype, tuning, packed):
    """Dense attention has the same dtype; errors of outputs and gradients are against float64."""
    args, indices, block_size = case(dtype=jnp.dtype(dtype), **CASES[name])
    ids = segments(args[0].shape[1]) if packed else None
    make = functools.partial(selected, indices, block_size, ids)
    ours = value_and_gradients(make("triton", tuning=TUNINGS[tuning]), 7, *args)
    dense = value_and_gradients(make("reference"), 7, *args)
    with jax.enable_x64(True):
        wide = (x.astype(jnp.float64) for x in args)
        exact = jax.tree.map(np.asarray, value_and_gradients(make("reference"), 7, *wide))
    assert_errors_are_at_most_twice_those_of_dense(ours, dense, exact)


@pytest.mark.parametrize("tuning", ["kv_outer", "query_outer", "query_tile", "chunks"])
def test_a_hundred_reruns_give_the_same_bits(tuning):
    args, indices, block_size = case(4, jnp.bfloat16)
    ids = segments(LENGTH)
    run = value_and_vjp(selected(indices, block_size, ids, "triton", tuning=TUNINGS[tuning]), 5)
    first = jax.tree.map(np.asarray, run(*args))
    for _ in range(100):
        assert_same_bits(run(*args), first)


def test_poison_that_nobody_sees_changes_no_bit():
    """Puts NaN into padding and into blocks that no query selects."""
    (query, key, value), _, block_size = case(2, jnp.bfloat16)
    ids = np.ones((1, LENGTH), np.int32)
    ids[:, 500:512] = 0
    ids[:, 512:] = 2
    chosen = np.random.default_rng(0).choice([0, 1, 3, 5, 7], (1, LENGTH, 2, 6))
    position = np.where(ids[0] == 2, np.arange(LENGTH) - 512, np.arange(LENGTH))
    unseen = (ids[0] == 0) | ~np.isin(position // block_size, [0, 1, 3, 5, 7])
    attend = selected(jnp.asarray(chosen, jnp.int32), block_size, jnp.asarray(ids), "triton")
    run = value_and_vjp(attend, 3)
    mask = jnp.asarray(unseen)[None, :, None, None]
    padding = jnp.asarray(ids[0] == 0)[None, :, None, None]
    assert_poison_changes_no_bit(run, (query, key, value), (padding, mask, mask))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits(size):
    (query, key, value), indices, block_size = case(4, jnp.bfloat16)
    query = jnp.where(jnp.arange(LENGTH)[None, :, None, None] % 2 == 0, size, -size)
    query = jnp.broadcast_to(query, (1, LENGTH, 8, 128)).astype(jnp.bfloat16)
    key = jnp.full_like(key, 1 / 128)
    attend = selected(indices, block_size, None, "triton", scale=1.0)
    (out, lse), gradients = value_and_gradients(attend, 3, query, key, value)
    wanted, wanted_lse = selected(indices, block_size, None, "reference", scale=1.0)(
        *(x.astype(jnp.float32) for x in (query, key, value))
    )
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted, atol=2e-2)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in gradients)


def test_none_takes_the_kernels_and_vmap_works():
    args, indices, block_size = case(2, jnp.bfloat16, length=512)
    assert fsa_jax.explain()["selected_attention"][0] == "triton"
    two = tuple(jnp.stack([x, x[:, ::-1]]) for x in (*args, indices))

    def loss(implementation, query, key, value, indices):
        out, _ = selected(indices, block_size, None, implementation)(query, key, value)
        return jnp.mean(out.astype(jnp.float32) ** 2)

    def mean(*arrays):
        return jnp.mean(jax.vmap(functools.partial(loss, None))(*arrays))

    def looped(*arrays):
        return (
            loss("triton", *(x[0] for x in arrays)) + loss("triton", *(x[1] for x in arrays))
        ) / 2

    got, wanted = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*two) for f in (mean, looped))
    assert_same_bits(got, wanted)
    compiled = str(jax.jit(mean).lower(*two).compile().as_text())
    assert "forward_kernel" in compiled


def test_a_buffer_of_more_than_two_to_the_31_elements():
    """Queries and partial results exceed 32-bit offsets, with two chunk sizes."""
    length, heads, width = 2**18, 72, 128  # 2.4e9 elements
    query = jnp.zeros((1, length, heads, width), jnp.bfloat16)
    query = query.at[:, -1].set(normal(0, 1, heads, width, dtype=jnp.bfloat16))
    key = normal(1, 1, length, 2, width, dtype=jnp.bfloat16)
    value = normal(2, 1, length, 2, width, dtype=jnp.bfloat16)
    blocks = jnp.asarray([0, 100, length // 64 - 1], jnp.int32)
    indices = jnp.broadcast_to(blocks, (1, length, 2, 3))
    tail = 4
    for tuning in (SelectedTuning(method="kv_outer"), SelectedTuning(scratch_bytes=2**36)):
        tuned = SelectedTuning(
            method="kv_outer", scratch_bytes=tuning.scratch_bytes, backward=Tile(num_stages=2)
        )
        attend = jax.jit(selected(indices, 64, None, "triton", tuning=tuned))
        out, lse = (x[:, -tail:] for x in attend(query, key, value))
        seen = jnp.concatenate(
            [jnp.arange(b * 64, b * 64 + 64) for b in (0, 100, length // 64 - 1)]
        )
        logits = (
            jnp.einsum(
                "thd,shd->hts",
                query[0, -tail:].astype(jnp.float32),
                jnp.repeat(key[0, seen].astype(jnp.float32), heads // 2, axis=1),
                precision="highest",
            )
            * width**-0.5
        )
        visible = seen[None] <= jnp.arange(length - tail, length)[:, None]
        logits = jnp.where(visible[None], logits, -jnp.inf)
        p = jax.nn.softmax(logits, axis=-1)
        wanted = jnp.einsum(
            "hts,shd->thd",
            p,
            jnp.repeat(value[0, seen].astype(jnp.float32), heads // 2, axis=1),
            precision="highest",
        )
        np.testing.assert_allclose(np.asarray(out[0], np.float32), wanted, atol=1e-2)
        np.testing.assert_allclose(
            lse[0], jax.scipy.special.logsumexp(logits, axis=-1).T, atol=1e-3
        )
