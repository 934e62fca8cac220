"""The dense reference against plain loops (tests/loop_oracle.py) and hand-computed cases."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_oracle import compress, documents, pack
from util import assert_close, lists, normal, segmentations

import fsa_jax
from fsa_jax import NSAConfig

LENGTH, WIDTH, VALUE_WIDTH = 26, 4, 3
CONFIG = NSAConfig(
    kernel_size=4,
    kernel_stride=2,
    block_size=4,
    topk=4,
    init_blocks=1,
    local_blocks=2,
    window_size=5,
)
SIZE: dict[str, Any] = {"kernel_size": CONFIG.kernel_size, "kernel_stride": CONFIG.kernel_stride}


def operator(query, key, value, segment_ids, indices, implementation):
    """Returns all parts of the operator, in the format of `loop_oracle.pack`."""
    common = {"segment_ids": segment_ids, "implementation": implementation}
    both = {**common, "return_residuals": True}
    ck, cv = (
        fsa_jax.compress(x, **SIZE, method="mean", segment_ids=segment_ids) for x in (key, value)
    )
    compressed = fsa_jax.compressed_attention(query, ck, cv, **SIZE, **both)
    return {
        "compressed": compressed,
        "indices": fsa_jax.select_blocks(query, ck, compressed[1], config=CONFIG, **common),
        "selected": fsa_jax.selected_attention(
            query, key, value, indices, block_size=CONFIG.block_size, **both
        ),
        "window": fsa_jax.sliding_window_attention(
            query, key, value, window_size=CONFIG.window_size, **both
        ),
    }


@functools.cache
def compiled(implementation):
    return jax.jit(functools.partial(operator, implementation=implementation))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@settings(deadline=None, max_examples=25)
@given(segmentations(1, LENGTH), st.integers(0, 2**31))
def test_any_packed_row_is_what_loops_over_its_documents_give(
    implementation, kv_heads, segment_ids, seed
):
    query = normal(seed, LENGTH, 2, WIDTH, dtype=jnp.float64)
    key = normal(seed + 1, LENGTH, kv_heads, WIDTH, dtype=jnp.float64)
    value = normal(seed + 2, LENGTH, kv_heads, VALUE_WIDTH, dtype=jnp.float64)
    indices = lists(seed, 1, LENGTH, kv_heads, CONFIG.topk, LENGTH // CONFIG.block_size)[0]
    got = compiled(implementation)(query, key, value, segment_ids[0], indices)
    q, k, v = (np.asarray(x) for x in (query, key, value))
    phi = functools.partial(np.mean, axis=0)
    wanted = pack(segment_ids[0], q, k, v, CONFIG, WIDTH**-0.5, phi, np.asarray(indices))
    np.testing.assert_array_equal(got.pop("indices"), wanted.pop("indices"))
    assert_close(got, wanted)


def test_selection_worked_out_on_paper():
    """There are eight tokens, blocks of 2 and windows of 2 tokens, so score[j] is p of window j."""
    config = NSAConfig(
        kernel_size=2, kernel_stride=2, block_size=2, topk=3, init_blocks=1, local_blocks=1
    )
    key = jnp.asarray([0.0, 1.0, 3.0, 2.0])[None, :, None, None]
    query = jnp.ones((1, 8, 1, 1))
    lse = jnp.zeros((1, 8, 1))
    chosen = fsa_jax.select_blocks(query, key, lse, config=config, implementation="reference")
    # In the last list, blocks 0 and 3 are forced, and block 2 scores higher than block 1.
    assert chosen[0, :, 0].tolist() == [
        [0, -1, -1],
        [0, -1, -1],
        [0, 1, -1],
        [0, 1, -1],
        [0, 1, 2],
        [0, 1, 2],
        [0, 2, 3],
        [0, 2, 3],
    ]


def test_equal_scores_go_to_the_lower_block_and_the_group_is_summed():
    config = NSAConfig(
        kernel_size=2, kernel_stride=2, block_size=2, topk=2, init_blocks=0, local_blocks=0
    )
    # Head 0 prefers window 1 and head 1 prefers window 2 by the same margin, so both sums are best.
    key = jnp.asarray([[-9.0, -9.0], [1.0, 0.0], [0.0, 1.0], [-9.0, -9.0]])[None, :, None]
    query = jnp.broadcast_to(jnp.eye(2)[None, None], (1, 8, 2, 2))
    lse = jnp.zeros((1, 8, 2))
    for implementation in ("reference", "xla"):
        chosen = fsa_jax.select_blocks(
            query, key, lse, config=config, scale=1.0, implementation=implementation
        )
        assert chosen[0, 7, 0].tolist() == [1, 2]
        one = fsa_jax.select_blocks(
            query,
            key,
            lse,
            config=NSAConfig(**{**vars(config), "topk": 1}),
            scale=1.0,
            implementation=implementation,
        )
        assert one[0, 7, 0].tolist() == [1]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("block", "window", "weight"),
    [(1, 3, 1), (1, 4, 2), (1, 5, 2), (1, 6, 2), (1, 7, 1), (0, 0, 2), (0, 1, 2), (0, 2, 2)],
)
def test_window_weights_of_the_paper(implementation, block, window, weight):
    """With b=64, l=32, d=16, block j weights the windows 4j-1 .. 4j+3 by 1 2 2 2 1."""
    config = NSAConfig(topk=1, init_blocks=0, local_blocks=0)

    def best(rival):  # p is 1 at `window`; window 13 gives block 3 the score 2 * rival
        logits = np.full(16, -60.0, np.float32)
        logits[window], logits[13] = 0, math.log(rival)
        return fsa_jax.select_blocks(
            jnp.ones((1, 256, 1, 1)),
            jnp.asarray(logits)[None, :, None, None],
            jnp.zeros((1, 256, 1)),
            config=config,
            scale=1.0,
            implementation=implementation,
        )[0, -1, 0, 0]

    # A window across two blocks counts for both, and the lower block wins ties.
    assert best(0.999 * weight / 2) == (0 if window == 3 else block)
    assert best(1.001 * weight / 2) == 3


@pytest.mark.parametrize("method", ["linear", "weighted", "mean", "mlp"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.usefixtures("x64")
def test_compression_is_phi_of_each_window(method, packed, with_positions):
    heads, width, size, stride, hidden = 2, 3, 6, 2, 5
    ids = np.asarray([1] * 9 + [2] * 4 + [0] * 3 + [3] * 14 + [1] * 1, np.int32)
    x = normal(0, len(ids), heads, width, dtype=jnp.float64)
    positions = normal(1, heads, size, width, dtype=jnp.float64) if with_positions else None
    weights = {
        "linear": normal(2, heads, size * width, width, dtype=jnp.float64),
        "weighted": normal(3, heads, size, dtype=jnp.float64),
        "mean": None,
        "mlp": (
            normal(4, heads, size * width, hidden, dtype=jnp.float64),
            normal(5, heads, hidden, width, dtype=jnp.float64),
        ),
    }[method]

    def phi(window):  # maps [l, K, D] to [K, D]
        if positions is not None:
            window = window + np.asarray(positions).swapaxes(0, 1)
        flat = window.swapaxes(0, 1).reshape(heads, -1)
        if method == "mean":
            return window.mean(axis=0)
        if method == "weighted":
            return np.einsum("lkd,kl->kd", window, weights)
        if method == "linear":
            return np.einsum("ki,kid->kd", flat, weights)
        inner = jax.nn.gelu(jnp.einsum("ki,kih->kh", flat, weights[0]))
        return np.einsum("kh,khd->kd", inner, weights[1])

    spans = documents(ids) if packed else [(0, len(ids))]
    wanted = np.concatenate([compress(np.asarray(x)[a:b], size, stride, phi) for a, b in spans])
    got = fsa_jax.compress(
        x,
        kernel_size=size,
        kernel_stride=stride,
        method=method,
        weights=weights,
        positions=positions,
        segment_ids=jnp.asarray(ids) if packed else None,
    )
    assert len(got) == len(ids) // stride
    assert_close(got[: len(wanted)], wanted)
    assert not np.any(got[len(wanted) :])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_sees_nothing_is_zero_and_minus_infinity(implementation):
    query, key = normal(0, 1, 12, 2, 4), normal(1, 1, 12, 1, 4)
    none = jnp.full((1, 12, 1, 3), -1, jnp.int32)
    short = fsa_jax.compress(key[:, :1], method="mean", **SIZE)
    assert short.shape == (1, 0, 1, 4)
    common: dict[str, Any] = {"implementation": implementation, "return_residuals": True}
    for out, lse in (
        fsa_jax.selected_attention(query, key, key, none, block_size=4, **common),
        fsa_jax.compressed_attention(query[:, :1], short, short, **SIZE, **common),
        fsa_jax.sliding_window_attention(
            query, key, key, window_size=3, segment_ids=jnp.zeros((1, 12), jnp.int32), **common
        ),
    ):
        assert not np.any(out)
        assert np.isneginf(lse).all()
    chosen = fsa_jax.select_blocks(
        query[:, :1], short, lse[:, :1], config=CONFIG, implementation=implementation
    )
    assert chosen.tolist() == [[[[0, -1, -1, -1]]]]
