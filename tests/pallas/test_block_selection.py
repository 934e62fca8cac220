"""The Pallas-Triton kernels of block selection in interpret mode, against scores in float64.

A list is right if it contains the forced blocks, has the right length, and no block outside it has
a higher score than a block in it, up to rounding. Tie-breaking is tested on exact ties. Interpret
mode fills unwritten elements with large negative numbers, which rank last.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from util import normal, segmentations

from fsa_jax import NSAConfig, xla
from fsa_jax.pallas.block_selection.plan import make_plan
from fsa_jax.pallas.support import Unsupported, supported
from fsa_jax.semantics.segments import describe_segments, describe_windows
from pallas.selection import SCALE, kernel


def inputs(config, length, group, width, *, batch=1, kv_heads=2, dtype=jnp.float32, seed=0):
    query = normal(seed, batch, length, group * kv_heads, width, dtype=dtype)
    key = normal(seed + 1, batch, length // config.kernel_stride, kv_heads, width, dtype=dtype)
    return query, key


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def describe(segment_ids, batch, length, config):
    segments = describe_segments(segment_ids, batch, length)
    return segments, describe_windows(segments, config.kernel_size, config.kernel_stride)


def exact(query, key, segment_ids, config):
    """Float64 lse [B, T, N] and scores [B, T, K, J], and the block of each token [B, T]."""
    batch, length, heads, _ = query.shape
    slots, kv_heads = key.shape[1:3]
    segments, windows = describe(segment_ids, batch, length, config)
    first, visible, position, valid = map(
        np.asarray, (windows.first, windows.visible, segments.position, segments.valid)
    )
    query = np.asarray(query, np.float64).reshape(batch, length, kv_heads, -1, query.shape[3])
    key = np.asarray(key, np.float64)
    logits = SCALE * np.einsum("btkgd,bmkd->btkgm", query, key, optimize=True)
    window = np.arange(slots) - first[..., None]
    sees = ((window >= 0) & (window < visible[..., None]))[:, :, None, None]
    logits = np.where(sees, logits, -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(logits).sum(-1))
    p = np.exp(np.where(sees, logits - np.where(np.isinf(lse), 0, lse)[..., None], -np.inf))
    # window i covers strides i .. i+q-1 of its document, block j covers strides j*r .. (j+1)*r-1
    per_window = config.kernel_size // config.kernel_stride
    per_block = config.block_size // config.kernel_stride
    score = np.zeros((batch, length, kv_heads, config.num_blocks(length)))
    begin = np.arange(score.shape[-1]) * per_block
    for slot in np.unique(first):
        unit, document = (np.arange(slots) - slot)[:, None], first == slot
        shared = np.minimum(unit + per_window, begin + per_block) - np.maximum(unit, begin)
        score[document] = p.sum(3)[document] @ np.maximum(shared, 0)
    own = np.where(valid, position // config.block_size, -1)
    return lse.reshape(batch, length, heads), score, own


def assert_best(lists, score, own, config):
    """Asserts that every list has the forced blocks and the best others, ascending, then -1."""
    lists, own = np.asarray(lists), own[:, :, None, None]
    blocks, count = score.shape[-1], np.minimum(own + 1, config.topk)
    s = np.arange(config.topk)
    assert lists.shape == (*score.shape[:3], config.topk)
    assert lists.dtype == np.int32
    assert (np.where(s < count, (lists >= 0) & (lists <= own), lists == -1)).all()
    assert (np.diff(lists, axis=-1) > 0)[np.broadcast_to(s[1:] < count, lists[..., 1:].shape)].all()
    chosen = (lists[..., None] == np.arange(blocks)).any(axis=-2)
    forced = (np.arange(blocks) < config.init_blocks) | (
        np.arange(blocks) > own - config.local_blocks
    )
    candidate = np.arange(blocks) <= own
    assert (chosen | ~(forced & candidate)).all()
    worst = np.where(chosen & ~forced, score, np.inf).min(-1)
    best = np.where(candidate & ~chosen, score, -np.inf).max(-1)
    assert (worst >= best - 1e-5 * score.max(-1)).all()


def jitted(segment_ids, config, **sizes):
    function = functools.partial(kernel, segment_ids=segment_ids, config=config, **sizes)
    return jax.jit(function)


def run(config, length, group, width, segment_ids=None, sizes=None, **kinds):
    query, key = inputs(config, length, group, width, **kinds)
    lse, score, own = exact(query, key, segment_ids, config)
    lse = jnp.asarray(lse, jnp.float32)
    lists = jitted(segment_ids, config, **(sizes or {}))(query, key, lse)
    assert_best(lists, score, own, config)
    return lists


DEFAULT = NSAConfig(kernel_size=8, kernel_stride=4, block_size=16, topk=6)
PAPER = NSAConfig(topk=5)
LONG_WINDOW = NSAConfig(kernel_size=16, kernel_stride=4, block_size=8, topk=5)
LONGEST_WINDOW = NSAConfig(
    kernel_size=24, kernel_stride=4, block_size=4, topk=2, init_blocks=0, local_blocks=0
)
SAME = NSAConfig(kernel_size=16, kernel_stride=16, block_size=16, topk=4, local_blocks=1)
UNITS = NSAConfig(kernel_size=1, kernel_stride=1, block_size=2, topk=7, init_blocks=2)
TILES = NSAConfig(kernel_size=4, kernel_stride=2, block_size=4, topk=16)
FREE = dataclasses.replace(TILES, init_blocks=0, local_blocks=0)
FORCED = dataclasses.replace(DEFAULT, topk=5, init_blocks=2, local_blocks=3)
FEW_BLOCKS = dataclasses.replace(DEFAULT, topk=100, init_blocks=3)
OFFSETS = NSAConfig(
    kernel_size=8, kernel_stride=2, block_size=32, topk=3, init_blocks=0, local_blocks=0
)

# Together these cover every group, width and kind of config that the kernels support.
CASES = {
    "g1": (LONGEST_WINDOW, 151, 1, 5, {"batch": 2}),
    "g2": (PAPER, 700, 2, 128, {}),
    "g3": (LONG_WINDOW, 203, 3, 80, {}),
    "g4": (DEFAULT, 333, 4, 128, {"dtype": jnp.bfloat16}),
    "g5": (SAME, 251, 5, 32, {"dtype": jnp.float16}),
    "g8": (OFFSETS, 330, 8, 80, {"dtype": jnp.bfloat16}),
    "g16": (FEW_BLOCKS, 180, 16, 32, {}),
    "g128": (DEFAULT, 150, 128, 16, {"kv_heads": 1, "dtype": jnp.bfloat16}),
    "wide_and_all_forced": (FORCED, 180, 2, 256, {}),
    "many_chosen": (dataclasses.replace(FREE, topk=100), 500, 1, 16, {}),
    "several_tiles": (TILES, 601, 3, 32, {"batch": 2}),
    "one_token": (NSAConfig(kernel_size=1, kernel_stride=1, block_size=1), 1, 1, 32, {}),
}


@pytest.mark.fast_cases("g2", "g4", "g128", "one_token")
@pytest.mark.parametrize("case", CASES)
def test_the_best_blocks(case):
    config, length, group, width, kinds = CASES[case]
    run(config, length, group, width, **kinds)


# All windows of the candidate blocks are entirely visible, so that equal sums have equal terms.
TIES = {
    "paper": TILES,
    "units": UNITS,
    "long_window": dataclasses.replace(LONG_WINDOW, topk=8, init_blocks=2, local_blocks=3),
    "no_init": NSAConfig(
        kernel_size=4, kernel_stride=4, block_size=8, topk=2, init_blocks=0, local_blocks=1
    ),
}


@pytest.mark.fast_cases("long_window", "no_init")
@pytest.mark.parametrize("name", TIES)
def test_equal_scores_go_to_the_lower_numbers(name):
    config = TIES[name]
    length = 70 * config.block_size
    query, key = inputs(config, length, 3, 16)
    key = jnp.zeros_like(key) + key[:, :1]
    lse = jnp.asarray(exact(query, key, None, config)[0], jnp.float32)
    lists = np.asarray(jitted(None, config)(query, key, lse))
    own, s = np.arange(length)[:, None, None] // config.block_size, np.arange(config.topk)
    lower = np.where(s < config.topk - config.local_blocks, s, own - (config.topk - 1) + s)
    wanted = np.where(own < config.topk, np.where(s <= own, s, -1), lower)
    np.testing.assert_array_equal(lists, np.broadcast_to(wanted, lists.shape))


def test_scores_of_zero_are_ties():
    """Far from the maximum, p is 0 in float32, so blocks with only such windows are tied."""
    query, key = inputs(TILES, 400, 2, 16, seed=3)
    key = key.at[:, 150].set(0) * 1e3
    lse = jnp.asarray(exact(query / 1e3, key, None, TILES)[0] * 1e3, jnp.float32)
    described = describe(None, 1, 400, TILES)
    lists = jitted(None, TILES)(query, key, lse)
    wanted = xla.select_blocks(query, key, lse, *described, config=TILES, scale=SCALE)
    np.testing.assert_array_equal(lists, wanted)


@functools.cache
def lists_of_chunks(**sizes):
    ids = np.repeat([[1, 2, 0, 3], [4, 0, 4, 5]], [120, 60, 20, 40], axis=1)
    config = dataclasses.replace(TILES, topk=5)
    return run(config, 240, 3, 16, jnp.asarray(ids, jnp.int32), sizes, batch=2)


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 2, "tokens": 96},
        {"heads": 1, "tokens": 35, "choose_tokens": 2},
        {"heads": 4, "tokens": 300, "rows": 16, "choose_tokens": 64},
    ],
    ids=str,
)
def test_chunks_and_tiles_change_no_list(sizes):
    np.testing.assert_array_equal(lists_of_chunks(**sizes), lists_of_chunks())


@functools.cache
def compiled(config):
    return jax.jit(functools.partial(kernel, config=config))


@pytest.mark.parametrize(
    "config", [dataclasses.replace(FREE, topk=1), dataclasses.replace(TILES, topk=4)], ids=str
)
@settings(deadline=None, max_examples=15)
@given(segmentations(2, 90), st.integers(0, 2**31))
def test_any_segmentation(config, segment_ids, seed):
    """Includes documents of one token, and NaN in padding and in slots without a window."""
    query, key = inputs(config, 90, 3, 16, batch=2, seed=seed)
    lse, score, own = exact(query, key, segment_ids, config)
    segments, windows = describe(segment_ids, 2, 90, config)
    key = jnp.where((windows.start < 90)[:, :, None, None], key, jnp.nan)
    query = jnp.where(segments.valid[:, :, None, None], query, jnp.nan)
    lse = jnp.where(segments.valid[:, :, None], jnp.asarray(lse, jnp.float32), jnp.nan)
    lists = compiled(config)(query, key, lse, segment_ids)
    assert_best(lists, score, own, config)


def test_keys_of_later_windows_are_never_used():
    """The last window of the second tile is NaN; tokens before and after it share a program."""
    config, length, cut = dataclasses.replace(FREE, topk=5), 540, 2 * 128 - 1
    query, key = inputs(config, length, 2, 16)
    lse, score, own = exact(query, key, None, config)
    key = key.at[:, cut:].set(jnp.nan)
    last = int((describe(None, 1, length, config)[1].visible[0] <= cut).sum())
    lists = jitted(None, config)(query, key, jnp.asarray(lse, jnp.float32))
    assert_best(lists[:, :last], score[:, :last], own[:, :last], config)


@pytest.mark.parametrize("scratch_mib", [4, 256])
@pytest.mark.parametrize("length", [1000, 2**16, 2**20])
def test_a_chunk_fits_the_scratch_budget(length, scratch_mib):
    query = jax.ShapeDtypeStruct((3, length, 12, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((3, length // 16, 4, 128), jnp.bfloat16)
    plan = supported(make_plan(query, key, NSAConfig(), scratch_mib * 2**20))
    blocks = -(-length // 64 // 64) * 64
    used = 4 * plan.heads * plan.tokens * (blocks + blocks // 64)
    assert used <= scratch_mib * 2**20
    assert 12 % plan.heads == 0
    # no more chunks than needed: a larger chunk would not fit, or this one is everything
    assert plan.heads == 12 or 2.1 * used >= scratch_mib * 2**20
    chunks = -(-length // plan.tokens)
    assert chunks * plan.tokens < length + 64 * chunks


def test_what_does_not_fit():
    query = jax.ShapeDtypeStruct((1, 2**20, 4, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 2**16, 4, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="must hold the ranks of 128 tokens, 8519680, got 1048576"):
        make_plan(query, key, NSAConfig(), 2**20)
    query, key = (jax.ShapeDtypeStruct((1, 64, n, 256), jnp.float32) for n in (128, 1))
    refusal = make_plan(query, key, NSAConfig(), capability=86)
    assert isinstance(refusal, Unsupported)
    assert "head width 256 of float32 needs more shared memory" in refusal.reason
