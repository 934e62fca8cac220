"""The portable implementation against the dense reference: numbers, gradients, robustness."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from util import (
    IMPLEMENTATIONS,
    assert_close,
    assert_errors_are_at_most_twice_those_of_dense,
    assert_same_bits,
    attention_inputs,
    lists,
    normal,
    segmentations,
    selected,
    value_and_gradients,
    value_and_vjp,
)

import fsa_jax
from fsa_jax.bench.shapes import SMALL, Shape

WINDOWS: dict[str, Any] = {"kernel_size": 8, "kernel_stride": 4}


def some_segments(shape, seed=0):
    """Returns ids of long and short documents and padding."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((shape.batch, shape.length), np.int32)
    for row in ids:
        at = 0
        while at < shape.length:
            size = int(rng.choice([1, 3, 20, 100]))
            row[at : at + size] = rng.integers(0, 4)
            at += size
    return jnp.asarray(ids)


def compressed(segment_ids, implementation):
    """Returns `compressed_attention` with residuals, after compressing keys and values."""
    return lambda query, key, value: fsa_jax.compressed_attention(
        query,
        key,
        value,
        **WINDOWS,
        segment_ids=segment_ids,
        implementation=implementation,
        return_residuals=True,
    )


def window(segment_ids, implementation, window_size=7):
    return lambda query, key, value: fsa_jax.sliding_window_attention(
        query,
        key,
        value,
        window_size=window_size,
        segment_ids=segment_ids,
        implementation=implementation,
        return_residuals=True,
    )


@pytest.mark.fast_cases(
    "compressed-g2_batch-True",
    "compressed-g3_odd-False",
    "selected-g2_batch-False",
    "selected-g5-True",
    "selected-many_slots-True",
    "selected-one_token-False",
    "window-many_tiles-True",
    "window-g3_odd-False",
)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("branch", ["compressed", "selected", "window"])
def test_values_and_gradients_are_those_of_the_reference(branch, name, packed):
    shape = SMALL[name]
    segment_ids = some_segments(shape) if packed else None
    args = attention_inputs(shape, jnp.float64)
    if branch == "selected":
        indices = lists(1, *shape.indices, shape.blocks)
        make = functools.partial(selected, indices, shape.block_size, segment_ids)
    elif branch == "window":
        make = functools.partial(window, segment_ids)
    else:
        make = functools.partial(compressed, segment_ids)
        slots = shape.length // WINDOWS["kernel_stride"]
        args = (args[0], args[1][:, :slots], args[2][:, :slots])
        if slots == 0:  # there is nothing to differentiate; test_reference covers this case
            shape = SMALL["mha"]
            args = (args[0][:, :1], args[1][:, :0], args[2][:, :0])
    got, wanted = (
        value_and_gradients(make(implementation), 7, *args)
        for implementation in ("xla", "reference")
    )
    assert_close(got, wanted)


CASE = SMALL["g2_batch"]


@functools.cache
def compiled_selected(implementation):
    def run(indices, segment_ids, *args):
        attend = selected(indices, CASE.block_size, segment_ids, implementation)
        return value_and_gradients(attend, 3, *args)

    return jax.jit(run)


@pytest.mark.usefixtures("x64")
@settings(deadline=None, max_examples=40)
@given(segmentations(CASE.batch, CASE.length), st.integers(0, 2**31))
def test_any_segmentation_and_any_lists(segment_ids, seed):
    indices = lists(seed, *CASE.indices, CASE.blocks)
    args = (indices, segment_ids, *attention_inputs(CASE, jnp.float64))
    assert_close(compiled_selected("xla")(*args), compiled_selected("reference")(*args))


SHAPES = st.builds(
    lambda kv_heads, group, **sizes: Shape(kv_heads=kv_heads, heads=kv_heads * group, **sizes),
    batch=st.integers(1, 2),
    length=st.integers(1, 40),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 6),
    width=st.integers(1, 9),
    value_width=st.integers(1, 9),
    block_size=st.integers(1, 12),
    slots=st.integers(1, 6),
)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@settings(deadline=None, max_examples=8)  # each example compiles both implementations
@given(SHAPES, st.data(), st.integers(0, 2**31))
def test_any_shape_and_group(shape, data, seed):
    segment_ids = jnp.asarray(data.draw(segmentations(shape.batch, shape.length)))
    indices = lists(seed, *shape.indices, blocks=shape.blocks)
    query, key, value = attention_inputs(shape, jnp.float64, seed)
    make = functools.partial(selected, indices, shape.block_size, segment_ids)
    got, wanted = (
        value_and_gradients(make(name), 3, query, key, value) for name in ("xla", "reference")
    )
    assert_close(got, wanted)


CONFIG = fsa_jax.NSAConfig(
    **WINDOWS, block_size=8, topk=4, init_blocks=1, local_blocks=2, window_size=9
)


def operator(implementation, segment_ids, query, key, value, gates):
    packed = {"segment_ids": segment_ids}
    ck, cv = (fsa_jax.compress(x, **WINDOWS, method="mean", **packed) for x in (key, value))
    return fsa_jax.native_sparse_attention(
        query, key, value, ck, cv, gates, config=CONFIG, implementation=implementation, **packed
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(segmentations(1, 48))
def test_a_packed_row_is_its_documents_one_by_one(implementation, segment_ids):
    shapes = ((48, 4, 6), (48, 2, 6), (48, 2, 6), (48, 4, 3))
    args = [normal(i, *shape, dtype=jnp.float64) for i, shape in enumerate(shapes)]
    ids = segment_ids[0]
    packed = jax.jit(functools.partial(operator, implementation))
    whole = packed(jnp.asarray(ids), *args)
    wanted = np.zeros(whole.shape)
    for start in np.flatnonzero(np.diff(ids, prepend=-1)):
        end = start + 1
        while end < 48 and ids[end] == ids[start]:
            end += 1
        if ids[start]:
            # Reuse one compiled program: place the document at the start of a padded sequence.
            alone = np.zeros(48, np.int32)
            alone[: end - start] = 1
            moved = [jnp.roll(x, -start, axis=0) for x in args]
            wanted[start:end] = packed(jnp.asarray(alone), *moved)[: end - start]
    assert_close(whole, wanted)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_document_alone_needs_no_segment_ids(implementation):
    shapes = ((40, 4, 6), (40, 2, 6), (40, 2, 6), (40, 4, 3))
    args = [normal(i, *shape, dtype=jnp.float64) for i, shape in enumerate(shapes)]
    run = jax.jit(functools.partial(operator, implementation))
    assert_close(run(jnp.full(40, 9, jnp.int32), *args), run(None, *args))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gate_heads", [1, 4])
def test_gradients_of_the_operator(gate_heads):
    """Gradients pass through gates, compression and all three branches; the reference is exact."""
    shapes = ((45, 4, 6), (45, 2, 6), (45, 2, 6), (45, gate_heads, 3))
    args = [normal(i, *shape, dtype=jnp.float64) for i, shape in enumerate(shapes)]
    ids = jnp.asarray([1] * 30 + [0] * 2 + [2] * 13, jnp.int32)
    got, wanted = (
        value_and_gradients(functools.partial(operator, name, ids), 5, *args)
        for name in ("xla", "reference")
    )
    assert_close(got, wanted)


@pytest.mark.fast_cases("compressed-xla", "selected-xla", "window-xla")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("branch", ["compressed", "selected", "window"])
def test_finite_differences(branch, implementation):
    """Covers the output and lse, which are both differentiable."""
    query, key, value = (normal(i, 1, 12, n, 3, dtype=jnp.float64) for i, n in enumerate((2, 1, 1)))
    if branch == "selected":
        attend = selected(lists(0, 1, 12, 1, 2, 3), 4, None, implementation)
    elif branch == "window":
        attend = window(None, implementation, window_size=4)
    else:
        attend = compressed(None, implementation)
        key, value = key[:, :3], value[:, :3]

    def finite(*args):
        out, lse = attend(*args)
        return out, jnp.where(jnp.isfinite(lse), lse, 0)

    check_grads(finite, (query, key, value), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.fast_cases("window-triton_interpret-bfloat16", "selected-xla-float32")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("implementation", ["xla", "triton_interpret"])
@pytest.mark.parametrize("branch", ["compressed", "window", "selected"])
def test_error_is_at_most_twice_that_of_dense_attention(branch, implementation, dtype):
    """Dense attention has the same dtype; errors of outputs and gradients are against float64."""
    length, slots = 300, 75
    query, key, value = (normal(i, 1, length, n, 32, dtype=dtype) for i, n in enumerate((8, 2, 2)))
    segment_ids = jnp.asarray([[1] * 200 + [2] * 90 + [0] * 10], jnp.int32)
    if branch == "selected":
        indices = jnp.asarray(
            np.random.default_rng(0).integers(0, 13, (1, length, 2, 8)), jnp.int32
        )
        make = functools.partial(selected, indices, 16, segment_ids)
    elif branch == "window":
        make = functools.partial(window, segment_ids, window_size=64)
    else:
        make = functools.partial(compressed, segment_ids)
        key, value = key[:, :slots], value[:, :slots]
    ours, dense = (
        value_and_gradients(make(implementation=i), 7, query, key, value)
        for i in (implementation, "reference")
    )
    with jax.enable_x64(True):
        wide = (x.astype(jnp.float64) for x in (query, key, value))
        exact = jax.tree.map(
            np.asarray, value_and_gradients(make(implementation="reference"), 7, *wide)
        )
    assert_errors_are_at_most_twice_those_of_dense(ours, dense, exact)


SEEDS, TOKENS, WIDTH = 16, 72, 24


def dense_gradients(sees, query, key, value, dout):
    """Returns (dq, dk, dv) of masked softmax attention; queries without keys get 0."""
    some, groups = sees.any(axis=-1, keepdims=True), query.shape[2] // key.shape[2]

    def attend(query, key, value):
        key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
        logits = jnp.einsum("btnd,bsnd->bnts", query, key) * query.shape[-1] ** -0.5
        hidden = jnp.where(some, -jnp.inf, 0).astype(logits.dtype)
        p = jax.nn.softmax(jnp.where(sees, logits, hidden), axis=-1)
        return jnp.einsum("bnts,bsne->btne", jnp.where(some, p, 0), value)

    return jax.vjp(attend, query, key, value)[1](dout)


@pytest.mark.parametrize("branch", ["compressed", "window", "selected"])
def test_float32_gradients_are_as_exact_as_those_of_dense_attention(branch):
    """Uses many random inputs, one for each sequence of a batch, because one could pass by luck."""
    slots = TOKENS // 4 if branch == "compressed" else TOKENS
    shapes = ((TOKENS, 6, 16), (slots, 2, 16), (slots, 2, 48), (TOKENS, 6, 48))
    *args, dout = (normal(i, SEEDS, *shape) for i, shape in enumerate(shapes))
    token, column = np.arange(TOKENS)[:, None], np.arange(slots)[None]
    if branch == "selected":
        listed = np.stack([np.random.default_rng(i).choice(9, 3, False) for i in range(TOKENS)])
        indices = np.broadcast_to(listed[None, :, None], (SEEDS, TOKENS, 2, 3))
        attend = selected(jnp.asarray(indices, jnp.int32), 8)
        sees = (column <= token) & (column[:, None] // 8 == listed[:, :, None]).any(axis=1)
    elif branch == "window":
        attend = window(None, "xla", WIDTH)
        sees = (column <= token) & (column > token - WIDTH)
    else:
        attend = compressed(None, "xla")
        sees = (column * 4 + 7 <= token) & (column < slots - 1)
    sees = sees[None, None]
    ours = jax.jit(lambda *args: jax.vjp(lambda *x: attend(*x)[0], *args[:3])[1](args[3]))
    dense = jax.jit(dense_gradients)
    got, usual = ours(*args, dout), dense(sees, *args, dout)
    with jax.enable_x64(True):
        exact = dense(sees, *(jnp.asarray(np.asarray(x, np.float64)) for x in (*args, dout)))
    for name, *arrays in zip(("dq", "dk", "dv"), got, usual, exact, strict=True):
        a, b, c = (np.asarray(x, np.float64).reshape(SEEDS, -1) for x in arrays)
        largest, mean_square = (
            norm(np.abs(a - c), axis=1) / norm(np.abs(b - c), axis=1)
            for norm in (np.max, lambda x, axis: np.sqrt(np.mean(x**2, axis=axis)))
        )
        assert largest.mean() <= 1.25, (name, largest)
        assert largest.max() <= 2, (name, largest)
        assert mean_square.max() <= 1.15, (name, mean_square)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "triton_interpret"])
@pytest.mark.parametrize("branch", ["selected", "window"])
def test_nan_and_infinity_in_what_nobody_sees_change_no_bit(branch, implementation):
    """Fills keys and values of unselected blocks and of padding, padded queries and cotangents."""
    ids = np.asarray([[1] * 50 + [0] * 7 + [2] * 90 + [0] * 13], np.int32)
    length = ids.size
    padding = unseen = ids[0] == 0
    segment_ids = jnp.asarray(ids)
    if branch == "selected":
        # No query selects blocks 2 and 4; blocks 3 and 5 are selected and end in padding.
        chosen = np.random.default_rng(0).choice([0, 1, 3, 5], (1, length, 1, 3))
        attend = selected(jnp.asarray(chosen, jnp.int32), 16, segment_ids, implementation)
        position = np.where(ids[0] == 2, np.arange(length) - 57, np.arange(length))
        unseen = padding | np.isin(position // 16, (2, 4))
    else:
        attend = window(segment_ids, implementation)

    @jax.jit
    def run(query, key, value, cotangent):
        (out, lse), pullback = jax.vjp(attend, query, key, value)
        return out, lse, pullback((cotangent, cotangent[..., 0]))

    clean = [normal(i, 1, length, n, 8) for i, n in enumerate((2, 1, 1, 2))]
    wanted = run(*clean)
    for poison in (np.nan, np.inf, -np.inf):
        masks = (padding, unseen, unseen, padding)
        dirty = [
            jnp.where(jnp.asarray(mask)[None, :, None, None], poison, x)
            for mask, x in zip(masks, clean, strict=True)
        ]
        assert_same_bits(run(*dirty), wanted)
    assert all(np.isfinite(x).all() and np.any(x) for x in wanted[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_of_padding_alone_is_zero_with_zero_gradients(implementation):
    args = [normal(i, 2, 40, *tail) for i, tail in enumerate([(4, 6), (2, 6), (2, 6), (4, 3)])]
    ids = jnp.asarray([[0] * 40, [1] * 40], jnp.int32)
    run = functools.partial(operator, implementation, ids)
    out, gradients = value_and_gradients(run, 3, *args)
    for x in (out, *gradients):
        assert not np.any(x[0])
        assert np.isfinite(x).all()
        assert np.any(x[1])


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "triton_interpret"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_of_ten_thousand(dtype, implementation):
    """Each query has its own maximum, so logits of 1e4 do not affect queries at -1e4."""
    length = 64
    direction = jnp.ones((1, length, 1, 4), dtype)
    size = jnp.where(jnp.arange(length) % 2 == 0, 1e4, -1e4).astype(dtype)[None, :, None, None]
    query, key = size * direction, direction
    value = normal(0, 1, length, 1, 4, dtype=dtype)
    indices = jnp.zeros((1, length, 1, 1), jnp.int32)
    attend = selected(indices, 16, None, implementation, scale=0.25)
    (out, lse), gradients = value_and_gradients(attend, 1, query, key, value)
    seen = np.minimum(np.arange(length), 15) + 1
    wanted = np.cumsum(np.asarray(value, np.float64)[0, :, 0], axis=0)[seen - 1] / seen[:, None]
    np.testing.assert_allclose(np.asarray(out, np.float64)[0, :, 0], wanted, atol=2e-2, rtol=2e-2)
    large = np.asarray(size, np.float64)[0, :, 0, 0]
    np.testing.assert_allclose(lse[0, :, 0], large + np.log(seen), rtol=1e-6)
    assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in gradients)


@pytest.mark.slow
def test_bitwise_the_same_on_every_rerun():
    shape = SMALL["many_tiles"]
    args = attention_inputs(shape)
    gates = normal(9, shape.batch, shape.length, shape.heads, 3)
    run = value_and_vjp(functools.partial(operator, "xla", some_segments(shape)), 5)
    first = run(*args, gates)
    for _ in range(10):
        assert_same_bits(run(*args, gates), first)


def test_all_queries_on_one_block_or_each_on_its_own():
    """Skew costs time, but not memory or correctness."""
    shape = SMALL["many_tiles"]
    hot = jnp.zeros(shape.indices, jnp.int32)
    own = jnp.broadcast_to(
        (jnp.arange(shape.length, dtype=jnp.int32) // 16)[None, :, None, None], shape.indices
    )
    args = attention_inputs(shape)
    for indices in (hot, own):
        got, wanted = (
            value_and_gradients(selected(indices, 16, None, name), 2, *args)
            for name in ("xla", "reference")
        )
        assert_close(got, wanted, 1e-5)
