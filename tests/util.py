"""Inputs, runners and the error bound that the tests share."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import fsa_jax

IMPLEMENTATIONS = ("reference", "xla")


def python_of(page: Path) -> list[str]:
    """The Python blocks of a page in Markdown."""
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def normal(seed, *shape, dtype=jnp.float32):
    """Standard normal numbers, which are the same for every dtype except for rounding."""
    return jnp.asarray(numbers(seed, *shape), dtype)


def attention_inputs(shape, dtype=jnp.float32, seed=0):
    """Query, key and value of a `Shape`."""
    kinds = (shape.query, shape.key, shape.value)
    return tuple(normal(seed + i, *kind, dtype=dtype) for i, kind in enumerate(kinds))


def lists(seed, batch, length, kv_heads, slots, blocks):
    """Block lists with -1, repeated, future and out-of-range entries; some lists are empty."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(-2, blocks + 2, (batch, length, kv_heads, slots))
    indices[rng.random((batch, length, kv_heads)) < 0.1] = -1
    wild = rng.random(indices.shape) < 0.03
    indices[wild] = rng.choice([2**31 - 1, -(2**31), 2**30], wild.sum())
    return jnp.asarray(indices, jnp.int32)


@st.composite
def segmentations(draw, batch, length):
    """Segment ids [batch, length]: documents of any length, ids that recur, and padding."""
    rows = []
    for _ in range(batch):
        row = []
        while len(row) < length:
            size = draw(st.one_of(st.integers(1, 4), st.integers(1, length)))
            row += [draw(st.integers(0, 3))] * size
        rows.append(row[:length])
    return np.asarray(rows, np.int32)


def value_and_gradients(function, cotangent_seed, *args):
    """The outputs of a function, and the gradients of a random linear form of the outputs."""
    return value_and_vjp(function, cotangent_seed)(*args)


def value_and_vjp(function, cotangent_seed):
    """The jitted function that `value_and_gradients` calls once."""

    @jax.jit
    def run(*args):
        out, pullback = jax.vjp(function, *args)
        leaves, tree = jax.tree.flatten(out)
        cotangents = []
        for i, x in enumerate(leaves):
            # multiples of 1/64 below 4: the same numbers in every dtype
            exact = np.clip(np.round(64 * numbers(cotangent_seed + i, *x.shape)), -255, 255)
            cotangents.append(jnp.where(jnp.isfinite(x), jnp.asarray(exact / 64, x.dtype), 0))
        return out, pullback(jax.tree.unflatten(tree, cotangents))

    return run


def assert_close(got, wanted, tolerance=1e-10):
    """Asserts that all arrays of two trees agree, relative to the largest number of each array."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        finite = np.isfinite(b)
        size = max(1.0, np.abs(b[finite]).max(initial=0.0))
        np.testing.assert_allclose(a[finite], b[finite], rtol=0, atol=tolerance * size)


def assert_same_bits(got, wanted):
    leaves = jax.tree_util.tree_leaves_with_path(got)
    for (path, a), b in zip(leaves, jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype, path
        assert a.tobytes() == b.tobytes(), path


def assert_poison_changes_no_bit(run, arrays, unseen):
    """Asserts that NaN and infinity at the masked places `unseen` change no bit of the results.

    `run` returns results and gradients.
    """
    wanted = run(*arrays)
    for poison in (jnp.nan, jnp.inf):
        dirty = (jnp.where(mask, poison, x) for mask, x in zip(unseen, arrays, strict=True))
        assert_same_bits(run(*dirty), wanted)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in wanted[1])


def selected(
    block_indices,
    block_size,
    segment_ids=None,
    implementation: fsa_jax.Implementation | None = "xla",
    scale=None,
    tuning=None,
):
    """Returns `selected_attention` with residuals as a function of query, key and value."""
    return lambda query, key, value: fsa_jax.selected_attention(
        query,
        key,
        value,
        block_indices,
        block_size=block_size,
        segment_ids=segment_ids,
        scale=scale,
        implementation=implementation,
        return_residuals=True,
        tuning=tuning,
    )


def assert_errors_are_at_most_twice_those_of_dense(ours, dense, exact):
    """The error bound: the largest and the mean error of each array against float64."""
    leaves = (jax.tree.leaves(x) for x in (ours, dense, exact))
    for number, (a, b, c) in enumerate(zip(*leaves, strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        finite = np.isfinite(c)
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(c))
        for norm in (np.max, np.mean):
            error = norm(np.abs(a[finite] - c[finite]))
            bound = 2 * norm(np.abs(b[finite] - c[finite])) + 1e-7 * np.abs(c[finite]).max()
            assert error <= bound, (number, norm.__name__, error / bound * 2)
