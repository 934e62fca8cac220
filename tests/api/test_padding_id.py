"""`padding_id`: documents may be numbered from 0, with another id for padding."""

import functools
import inspect
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from util import assert_close, assert_same_bits, normal

import fsa_jax
from fsa_jax.arguments import checks
from fsa_jax.semantics import segments

MOST = 2**31 - 1
WINDOWS: dict[str, Any] = {"kernel_size": 8, "kernel_stride": 4}
CONFIG = fsa_jax.NSAConfig(
    **WINDOWS, block_size=16, topk=3, init_blocks=1, local_blocks=1, window_size=7
)
#: Documents 0, 1 and 0 again, and padding between and behind them, marked by -1.
FROM_0 = np.repeat([[0, -1, 1, 0, -1], [-1, 0, 1, 2, 3]], [30, 3, 6, 17, 8], axis=1)
#: The same documents, numbered from 1, with 0 for padding.
FROM_1 = FROM_0 + 1


def documents(ids):
    """What the ids imply, as numpy arrays: start and end of each token's document, and padding."""
    rows = segments.describe_segments(ids, *ids.shape)
    return [np.asarray(x) for x in (rows.start, rows.end, rows.valid)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def described(ids, padding_id, shape):
    rows = segments.describe_segments(checks.ids(ids, shape, True, padding_id), *shape)
    return rows.start, rows.end, rows.valid


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.data())
def test_all_ids_stay_different(data):
    """Inside and outside jit: as counted on Python integers, for the extremes of every dtype."""
    padding_id = data.draw(st.sampled_from([-(2**31), -1, 0, 1, 7, MOST]))
    dtype = np.dtype(data.draw(st.sampled_from(["int8", "uint8", "int16", "int32", "uint32"])))
    most = int(np.iinfo(dtype).max)
    pool = {0, 1, 2, 7, most - 1, most, padding_id}
    pool = sorted(i for i in pool if np.iinfo(dtype).min <= i <= most)
    row = data.draw(st.lists(st.sampled_from(pool), min_size=8, max_size=8))
    ids = np.asarray([row], dtype)
    changes = [t for t in range(1, 8) if row[t] != row[t - 1]]
    wanted = [
        [[max([0, *(c for c in changes if c <= t)]) for t in range(8)]],
        [[min([8, *(c for c in changes if c > t)]) for t in range(8)]],
        [[i != padding_id for i in row]],
    ]
    if max(row) <= MOST:
        outside = checks.ids(ids, (1, 8), True, padding_id)
        assert outside is not None
        assert outside.dtype == jnp.int32
        for got, want in zip(documents(outside), wanted, strict=True):
            np.testing.assert_array_equal(got, want)
    if dtype == np.uint32 and padding_id < 0:  # 2**32 documents and padding do not fit
        with pytest.raises(ValueError, match=r"must have a signed dtype .*uint32"):
            described(ids, padding_id, (1, 8))
        return
    for got, want in zip(described(ids, padding_id, (1, 8)), wanted, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("padding_id", [-1, 3])
def test_inside_jit_other_negative_ids_are_padding(padding_id):
    ids = jnp.asarray([[0, -7, -7, 5, padding_id, -(2**31)]], jnp.int32)
    valid = described(ids, padding_id, (1, 6))[2]
    np.testing.assert_array_equal(valid, [[True, False, False, True, False, False]])


def test_wide_ids_inside_jit(x64):
    most = 2**63 - 1
    ids = jnp.asarray([[0, most, most - 1, -1, 2**32, 0]])
    for padding_id, padding in ((-1, [3]), (0, [0, 3, 5])):
        start, _, valid = described(ids, padding_id, (1, 6))
        np.testing.assert_array_equal(start, [range(6)])
        np.testing.assert_array_equal(valid, [[i not in padding for i in range(6)]])
    unsigned = jnp.asarray([[7, 2**64 - 1, 0, 2**63]], jnp.uint64)
    np.testing.assert_array_equal(described(unsigned, 7, (1, 4))[2], [[False, True, True, True]])


def arrays(batch=2, length=64):
    shapes = ((4, 8), (2, 8), (2, 8), (4, 3))
    query, key, value, gates = (normal(i, batch, length, *x) for i, x in enumerate(shapes))
    return query, key, value, jax.nn.sigmoid(gates)


def run_all(ids, implementation, padding_id, sequence_axis=None):
    """Every public function with segment ids, and gradients of the operators."""
    given = {"segment_ids": ids, "padding_id": padding_id}
    over = {**given, "sequence_axis": sequence_axis}
    query, key, value, gates = arrays()
    compress = functools.partial(fsa_jax.compress, **WINDOWS, method="mean", **over)
    operator = functools.partial(
        fsa_jax.native_sparse_attention, config=CONFIG, implementation=implementation, **over
    )
    causal = functools.partial(fsa_jax.causal_attention, implementation=implementation, **over)

    def both(function, *args):
        out, pullback = jax.vjp(function, *args)
        return out, pullback(jnp.ones_like(out))

    compressed = compress(key), compress(value)
    results = [
        compressed,
        both(operator, query, key, value, *compressed, gates),
        both(causal, query, key, value),
        fsa_jax.token_positions(ids, padding_id=padding_id, sequence_axis=sequence_axis),
        fsa_jax.window_positions(
            ids, **WINDOWS, padding_id=padding_id, sequence_axis=sequence_axis
        ),
    ]
    if sequence_axis is None:
        given |= {"implementation": implementation}
        residuals = {**given, "return_residuals": True}
        out, lse = fsa_jax.compressed_attention(query, *compressed, **WINDOWS, **residuals)
        indices = fsa_jax.select_blocks(query, compressed[0], lse, config=CONFIG, **given)
        results += [out, lse, indices]
        results += [fsa_jax.sliding_window_attention(query, key, value, window_size=7, **residuals)]
        results += [
            fsa_jax.selected_attention(query, key, value, indices, block_size=16, **residuals)
        ]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "reference", "triton_interpret"])
def test_ids_from_0_give_the_results_of_ids_from_1(implementation):
    """The same bits outside jit. Inside, the ids are mapped in the program, so XLA may fuse the
    dense definition and interpreted kernels otherwise, and round otherwise.
    """
    # padding with an id below, and with one above those of the documents
    cases = ((FROM_0.astype(np.int32), -1), (np.where(FROM_0 < 0, 9, FROM_0).astype(np.uint8), 9))
    run = jax.jit(run_all, static_argnums=(1, 2))
    outside = run_all(FROM_1, implementation, 0)
    inside = run(jnp.asarray(FROM_1, jnp.int32), implementation, 0)
    for ids, padding_id in cases:
        assert_same_bits(run_all(ids, implementation, padding_id), outside)
        got = run(jnp.asarray(ids), implementation, padding_id)
        if implementation == "xla":
            assert_same_bits(got, inside)
        else:
            assert_close(got, inside, 2e-6)


def test_outside_jit():
    run = functools.partial(fsa_jax.sliding_window_attention, *arrays()[:3], window_size=7)
    wanted = run(segment_ids=FROM_1)
    assert not np.asarray(wanted)[FROM_1 == 0].any()
    for ids in (FROM_0, FROM_0.tolist(), jnp.asarray(FROM_0, jnp.int32)):
        assert_same_bits(run(segment_ids=ids, padding_id=-1), wanted)
    assert_same_bits(run(segment_ids=FROM_0, padding_id=np.int64(-1)), wanted)


def test_unsigned_ids_have_no_negative_padding():
    """With a negative padding_id, ids of an unsigned dtype are all documents."""
    ids = np.repeat(np.asarray([[0, 255, 3]], np.uint8), [3, 2, 4], axis=1)
    wanted = [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    positions = functools.partial(fsa_jax.token_positions, padding_id=-1)
    for x in (ids, ids.astype(np.uint32)):
        np.testing.assert_array_equal(positions(x), wanted)
    np.testing.assert_array_equal(jax.jit(positions)(ids), wanted)
    keys = normal(0, 1, 9, 1, 8)
    out = jax.jit(functools.partial(fsa_jax.causal_attention, keys, keys, keys, padding_id=-1))(
        segment_ids=ids
    )
    assert np.asarray(out).any(axis=(2, 3)).all()


def test_vmap():
    query, key, value, _ = arrays()

    def run(padding_id, ids, *args):
        options = {"window_size": 7, "segment_ids": ids, "padding_id": padding_id}
        return fsa_jax.sliding_window_attention(*args, **options)

    args = (query, key, value)
    wanted = jax.jit(jax.vmap(functools.partial(run, 0)))(jnp.asarray(FROM_1, jnp.int32), *args)
    got = jax.jit(jax.vmap(functools.partial(run, -1)))(jnp.asarray(FROM_0, jnp.int32), *args)
    assert_same_bits(got, wanted)


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_over_a_mesh(axis_type):
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(axis_type,))

    def run(ids, padding_id):
        options = {"window_size": 7, "segment_ids": ids, "padding_id": padding_id}
        return fsa_jax.sliding_window_attention(*args, **options)

    with jax.set_mesh(mesh):
        where = jax.NamedSharding(mesh, jax.P("rows"))
        *args, ids, shifted = jax.device_put(
            (*arrays()[:3], np.int32(FROM_0), np.int32(FROM_1)), where
        )
        for jitted in (run, jax.jit(run, static_argnums=1)):
            assert_same_bits(jitted(ids, -1), jitted(shifted, 0))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_over_a_sequence_axis(axis_type):
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        run = jax.jit(run_all, static_argnums=(1, 2, 3))
        where = jax.NamedSharding(mesh, jax.P(None, "sequence"))
        ids, shifted = jax.device_put((np.int32(FROM_0), np.int32(FROM_1)), where)
        assert_same_bits(run(ids, "xla", -1, "sequence"), run(shifted, "xla", 0, "sequence"))


@pytest.mark.parametrize(
    ("ids", "padding_id", "message"),
    [
        (
            [0, -2, -1],
            -1,
            "segment_ids must be padding_id or at least 0, got -2 with padding_id",
        ),
        ([0, -1], 5, "segment_ids must be padding_id or at least 0, got -1 with padding_id=5"),
        ([0, -1], 0, r"segment_ids must be 0 \(padding\) or positive, got -1 with padding_id=0"),
        ([0, 2**31], -1, "segment_ids must hold integers that int32 holds, .* got 2147483648"),
        ([0, 1], 1.0, "padding_id must be an integer .* got 1.0"),
        ([0, 1], True, "padding_id must be an integer .* got True"),
        ([0, 1], 2**31, "padding_id must be an integer .* got 2147483648"),
        ([0, 1], -(2**31) - 1, "padding_id must be an integer .* got -2147483649"),
        ([0, 1], jnp.asarray(1), "padding_id must be an integer .* got an array int32"),
    ],
)
def test_bad_input(ids, padding_id, message):
    windows = functools.partial(fsa_jax.window_positions, **WINDOWS)
    for function in (fsa_jax.token_positions, windows):
        with pytest.raises(ValueError, match=message):
            function(ids, padding_id=padding_id)


def test_every_public_function_takes_it():
    """Each function refuses a bad `padding_id`, so none ignores it."""
    query, key, value, gates = arrays()
    short, indices = key[:, ::4], jnp.zeros((2, 64, 2, 1), jnp.int32)
    calls: dict[str, Any] = {
        "causal_attention": lambda **x: fsa_jax.causal_attention(query, key, value, **x),
        "compress": lambda **x: fsa_jax.compress(key, method="mean", **WINDOWS, **x),
        "compressed_attention": lambda **x: fsa_jax.compressed_attention(
            query, short, short, **WINDOWS, **x
        ),
        "native_sparse_attention": lambda **x: fsa_jax.native_sparse_attention(
            query, key, value, short, short, gates, config=CONFIG, **x
        ),
        "select_blocks": lambda **x: fsa_jax.select_blocks(
            query, short, query[..., 0], config=CONFIG, **x
        ),
        "selected_attention": lambda **x: fsa_jax.selected_attention(
            query, key, value, indices, block_size=16, **x
        ),
        "sliding_window_attention": lambda **x: fsa_jax.sliding_window_attention(
            query, key, value, window_size=7, **x
        ),
        "token_positions": fsa_jax.token_positions,
        "window_positions": lambda **x: fsa_jax.window_positions(**WINDOWS, **x),
    }
    functions = {name: getattr(fsa_jax, name) for name in fsa_jax.__all__}
    assert calls.keys() == {
        name
        for name, function in functions.items()
        if inspect.isfunction(function) and "segment_ids" in inspect.signature(function).parameters
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"padding_id must be an integer .*, got 'none'"):
            call(segment_ids=FROM_1, padding_id="none")
