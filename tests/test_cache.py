"""Layers with a cache: the training forward's outputs, in any chunks; pages; bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_layers import CONFIG, perturbed

from fsa_jax.cache import NSACache, OutOfPages, PageAllocator
from fsa_jax.layers import NativeSparseAttention

LENGTH, BATCH = 40, 2
#: Tokens that each sequence gets in each call: long chunks, single tokens, none at all.
CALLS = [(16, 9), (1, 1), (0, 1), (1, 16), (16, 3), (1, 0), (5, 10)]


def make(**options):
    options = {"num_kv_heads": 2, "head_dim": 8, "config": CONFIG} | options
    layer = NativeSparseAttention(4, 16, implementation="xla", rngs=nnx.Rngs(0), **options)
    return perturbed(layer)


def inputs():
    return jax.random.normal(jax.random.key(7), (BATCH, LENGTH, 16))


@nnx.jit
def extend(layer, x, cache, num_tokens):
    return layer.extend(x, cache, num_tokens)


def run(layer, x, cache, calls):
    """The outputs of all tokens, given in those calls; what is not there is NaN."""
    at, out = np.zeros(BATCH, int), np.zeros(x.shape, np.float32)
    for counts in calls:
        rows = np.full((BATCH, 1 if max(counts) == 1 else 16, 16), np.nan, np.float32)
        for row, count in enumerate(counts):
            rows[row, :count] = x[row, at[row] : at[row] + count]
        y, cache = extend(layer, jnp.asarray(rows), cache, jnp.asarray(counts, jnp.int32))
        for row, count in enumerate(counts):
            out[row, at[row] : at[row] + count] = y[row, :count]
            assert not np.any(y[row, count:])
        at += counts
    np.testing.assert_array_equal(cache.lengths, at)
    return out


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "mlp", "kv_per_branch": True, "gate": "token", "num_kv_heads": 4}],
    ids=["default", "per_branch"],
)
def test_any_chunks_give_the_training_forward(options):
    layer, x = make(**options), inputs()
    want = nnx.jit(lambda layer, x: layer(x))(layer, x)
    got = run(layer, x, layer.init_cache(BATCH, LENGTH), CALLS)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_freed_pages_are_never_read_again():
    """Sequences in pages that others have left, all full of NaN, in an order of no meaning."""
    layer, x = make(), inputs()
    cache = layer.init_cache(BATCH, LENGTH, num_pages=2 * LENGTH // CONFIG.block_size)
    allocator = PageAllocator(cache)
    for row in (1, 0):
        cache = allocator.reserve(cache, row, LENGTH)
    for row in (0, 1):
        cache = allocator.release(cache, row)
    poison = {
        name: jnp.full_like(getattr(cache, name), jnp.nan)
        for name in ("key", "value", "compressed_key", "compressed_value", "tail_key", "tail_value")
    }
    cache = dataclasses.replace(cache, **poison)
    for length in range(8, LENGTH + 1, 8):
        for row in (0, 1):
            cache = allocator.reserve(cache, row, length)
    want = nnx.jit(lambda layer, x: layer(x))(layer, x)
    np.testing.assert_allclose(run(layer, x, cache, CALLS), want, atol=1e-5)


def test_out_of_pages_changes_nothing():
    cache = make().init_cache(BATCH, LENGTH, num_pages=9)
    allocator = PageAllocator(cache)
    cache = allocator.reserve(cache, 1, LENGTH)
    with pytest.raises(OutOfPages, match="needs 5 more pages for 40 tokens, 4 of 9 are free"):
        allocator.reserve(cache, 0, LENGTH)
    with pytest.raises(ValueError, match=r"length must be in 0 .. 40, got 41"):
        allocator.reserve(cache, 0, LENGTH + 1)
    assert allocator.reserve(cache, 0, LENGTH - 8).room.tolist() == [32, 40]
    assert allocator.free_pages == 0


def test_bad_input():
    layer, x = make(), inputs()
    cache = layer.init_cache(BATCH, LENGTH)
    with pytest.raises(ValueError, match=r"room for 40 tokens of sequence 0, which holds 0 .* 41"):
        layer.extend(jnp.zeros((BATCH, 41, 16)), cache)
    with pytest.raises(ValueError, match="the cache has 2 sequences, got x of shape"):
        layer.extend(x[:1], cache)
    other = NSACache.init(
        BATCH,
        LENGTH,
        config=dataclasses.replace(CONFIG, window_size=7),
        num_kv_heads=2,
        head_dim=8,
    )
    with pytest.raises(ValueError, match=r"window_size=6.*window_size=7"):
        layer.extend(x, other)
