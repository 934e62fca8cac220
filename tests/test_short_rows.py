"""Sequences of every length up to a window plus one token: results, gradients, jit or not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import assert_close, normal, value_and_vjp

import fsa_jax
from fsa_jax import reference
from fsa_jax.semantics import segments

WINDOWS = {"kernel_size": 4, "kernel_stride": 2}
CONFIG = fsa_jax.NSAConfig(
    **WINDOWS, block_size=2, topk=2, init_blocks=1, local_blocks=1, window_size=3
)
LENGTHS = range(1, WINDOWS["kernel_size"] + 2)
TOLERANCE = 2e-6


def documents(length, packed):
    """Returns None, or ids of a one-token document, one padding token, and a second document."""
    ids = np.full((1, length), 2, np.int32)
    ids[:, :2] = [1, 0][:length]
    return jnp.asarray(ids) if packed else None


def arrays(length):
    """Returns query, key, value and gates."""
    shapes = ((2, 4), (1, 4), (1, 4), (2, 3))
    return [normal(i, 1, length, *shape) for i, shape in enumerate(shapes)]


def compressions(ids, function, x, positions, *weights):
    """Compresses keys by every method."""
    run = functools.partial(function, x, positions=positions, **WINDOWS)
    linear, weighted, *mlp = weights
    kinds = {"linear": linear, "weighted": weighted, "mlp": tuple(mlp), "mean": None}
    return [run(**ids, method=method, weights=given) for method, given in kinds.items()]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_compress(length, packed):
    shapes = ((1, length, 1, 4), (1, 4, 4), (1, 16, 4), (1, 4), (1, 16, 3), (1, 3, 4))
    args = [normal(i, *shape) for i, shape in enumerate(shapes)]
    ids = documents(length, packed)
    segment_info = segments.describe_segments(ids, 1, length)
    ours = functools.partial(compressions, {"segment_ids": ids}, fsa_jax.compress)
    defined = functools.partial(compressions, {"segments": segment_info}, reference.compress)
    got = value_and_vjp(ours, 3)(*args)
    assert_close(got, value_and_vjp(defined, 3)(*args), TOLERANCE)
    if length < WINDOWS["kernel_size"]:  # there is no complete window
        assert not any(np.any(x) for x in jax.tree.leaves(got))
    if packed and length == 1:
        one = functools.partial(fsa_jax.compress, **WINDOWS, method="mean", segment_ids=ids)
        out, pullback = jax.vjp(one, args[0])
        assert not np.any(pullback(out)[0])


def branches(indices, ids, implementation, query, key, value):
    """Returns each branch alone, and the blocks that the first one selects."""
    run = {"segment_ids": ids, "implementation": implementation}
    slots = slice(query.shape[1] // WINDOWS["kernel_stride"])
    arrays = (query, key[:, slots], value[:, slots])
    out, lse = fsa_jax.compressed_attention(*arrays, **WINDOWS, **run, return_residuals=True)
    blocks = fsa_jax.select_blocks(*arrays[:2], lse, config=CONFIG, **run)
    selected = fsa_jax.selected_attention(query, key, value, indices, block_size=2, **run)
    window = fsa_jax.sliding_window_attention(query, key, value, window_size=3, **run)
    return out, lse, selected, window, blocks.astype(out.dtype)


@pytest.mark.fast_cases("4")
@pytest.mark.parametrize("length", LENGTHS)
def test_branches(length):
    ids, (*args, _) = documents(length, packed=True), arrays(length)
    blocks = np.random.default_rng(0).integers(-1, 3, (1, length, 1, 2))
    indices = jnp.asarray(blocks, jnp.int32)
    ours, defined = (
        functools.partial(branches, indices, ids, name) for name in ("xla", "reference")
    )
    got = value_and_vjp(ours, 3)(*args)
    assert_close(got, value_and_vjp(defined, 3)(*args), TOLERANCE)
    if length == 1:
        out, pullback = jax.vjp(ours, *args)
        assert_close(out, got[0], TOLERANCE)
        zeros = jax.tree.map(jnp.zeros_like, out)
        assert_close(pullback(zeros), jax.tree.map(jnp.zeros_like, got[1]))


@pytest.mark.parametrize(("length", "packed"), [(1, True), (4, False)])
def test_the_operator(length, packed):
    ids = documents(length, packed)

    def operator(implementation, query, key, value, gates):
        compress = functools.partial(fsa_jax.compress, **WINDOWS, method="mean", segment_ids=ids)
        given = (query, key, value, compress(key), compress(value), gates)
        run = {"segment_ids": ids, "implementation": implementation}
        return fsa_jax.native_sparse_attention(*given, config=CONFIG, **run)

    got, wanted = (
        value_and_vjp(functools.partial(operator, name), 3)(*arrays(length))
        for name in ("xla", "reference")
    )
    assert_close(got, wanted, TOLERANCE)
