"""Compressed attention and the selection in one pass, in interpret mode, against float64."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from util import assert_close, normal

from fsa_jax import NSAConfig, reference
from fsa_jax.ops.range_attention import Ranges
from fsa_jax.pallas.compressed_selection import choose_kernel, fold_kernel, passes, plan
from fsa_jax.pallas.compressed_selection.fold import EDGES, column_of_block
from fsa_jax.pallas.range_attention import hopper_pipeline
from fsa_jax.pallas.support import supported
from fsa_jax.semantics import segments
from fsa_jax.semantics.selection_rule import _fold

SCALE = 0.2
SIZES = {"init_blocks": 1, "local_blocks": 1, "window_size": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Queries of T tokens over compressed keys, and the sizes of windows and blocks."""

    sizes: tuple[int, int, int] = (8, 4, 16)  # of a window, its stride, a block
    length: int = 150
    group: int = 4
    kv_heads: int = 1
    documents: tuple[int, ...] = ()  # lengths; negative: padding
    scale: float = SCALE
    keys: str = "random"
    topk: int = 3

    @property
    def config(self) -> NSAConfig:
        names = ("kernel_size", "kernel_stride", "block_size")
        return NSAConfig(**dict(zip(names, self.sizes, strict=True)), topk=self.topk, **SIZES)

    def segment_ids(self):
        if not self.documents:
            return None
        numbers = [i + 1 if n > 0 else 0 for i, n in enumerate(self.documents)]
        ids = np.repeat(numbers, np.abs(self.documents)).astype(np.int32)
        assert ids.size == self.length
        return jnp.asarray(ids)[None]

    def arrays(self, dtype=jnp.bfloat16):
        slots = self.length // self.sizes[1]
        query = normal(0, 1, self.length, self.group * self.kv_heads, 128, dtype=dtype)
        key, value = (normal(i, 1, slots, self.kv_heads, 128, dtype=dtype) for i in (1, 2))
        slot = jnp.arange(slots, dtype=jnp.float32)[None, :, None, None]
        match self.keys:
            case "equal":
                key = jnp.ones_like(key)
            case "rising":  # the largest logit of each row grows from tile to tile
                query, key = jnp.ones_like(query), (slot / slots).astype(dtype) + key / 64
            case "one_hot":  # one window has nearly all the weight
                query, key = (
                    jnp.ones_like(query),
                    jnp.where(slot == 9, jnp.asarray(8, dtype), key / 16),
                )
            case "huge":  # logits of +-1e4
                query, key = 30 * query, 30 * key
        return query, key, value


CASES = {
    "plain": Case(),
    "two_tiles": Case(length=1100, sizes=(8, 4, 16), group=1),
    "packed": Case(documents=(23, 90, -7, 30)),
    "two_long": Case(documents=(5, 61, 70, 14), group=16, sizes=(8, 4, 8)),
    "no_overlap": Case(sizes=(4, 4, 8), group=2, kv_heads=2),
    "three_strides": Case(sizes=(12, 4, 16), documents=(70, 80)),
    "whole_block": Case(sizes=(8, 8, 8), group=8),
    "whole_block_packed": Case(sizes=(4, 4, 4), group=8, length=512, documents=(256, 256)),
    "five_strides": Case(sizes=(20, 4, 16), length=160),
    "negative": Case(scale=-0.3, group=32, length=100),
    "many": Case(topk=24, sizes=(8, 4, 8), length=500, group=1),
    "equal": Case(keys="equal", length=400, group=2),
    "rising": Case(keys="rising", length=1100, group=1),
    "one_hot": Case(keys="one_hot", group=8),
    "huge": Case(keys="huge", group=4, documents=(90, 60)),
}


def run(case, arrays, races=False, scratch_bytes=None):
    """The segments, and what `attend_and_choose` returns."""
    config = case.config
    info = segments.describe_segments(case.segment_ids(), 1, case.length)

    def attend(query, key, value):
        windows = segments.describe_windows(info, config.kernel_size, config.kernel_stride)
        low, high = Ranges.of_windows(info, windows, config.kernel_size).queries
        sizes = {"packed": info.packed, "scratch_bytes": scratch_bytes}
        made = supported(plan.make_plan(query, key, value, config, **sizes))
        static = {"config": config, "scale": case.scale, "plan": made}
        interpret = InterpretGPUParams(detect_races=races)
        return passes.attend_and_choose(
            query, key, value, low < high, info, windows, **static, interpret=interpret
        )

    return info, jax.tree.map(np.asarray, jax.jit(attend)(*arrays))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Two programs, so that each has several work items."""
    for module in (hopper_pipeline, fold_kernel, choose_kernel):
        monkeypatch.setattr(module, "PROGRAMS", 2)


def scores_of(case, found):
    """The scores [T, K, blocks] of the tokens that need them, from what was left behind."""
    _, base, begin, count, own, first, fold, edges, sums = found
    config = case.config
    blocks = config.num_blocks(case.length)
    scores = np.full((case.length, case.kv_heads, blocks), np.nan)
    tokens = 64 // case.group  # of a warpgroup
    numbers = begin.shape[1]
    of_block = column_of_block(np.arange(fold.shape[3]), config.block_size // config.kernel_stride)
    for token in np.flatnonzero(own[0] >= config.topk):
        number, part, place = token // (2 * tokens), token // tokens % 2, token % tokens
        for head in range(case.kv_heads):
            start = base[(numbers - 1 - number) * case.kv_heads + head]
            assert start >= 0
            total = np.zeros(fold.shape[3] * (count[0, number] + 1))
            for g in range(case.group):
                row = g * tokens + place if case.group <= 8 else place * case.group + g
                row_max, inverse = sums[0, head, number, part, :, row]
                for tile in range(count[0, number]):
                    step = start + tile
                    top, carry = edges[step // EDGES, part, row, step % EDGES].astype(np.float64)
                    factor = np.exp2(top - row_max) * inverse
                    at = tile * fold.shape[3]
                    total[at : at + fold.shape[3]] += (
                        factor * fold[start + tile, part, row][of_block]
                    )
                    total[at + fold.shape[3]] += factor * carry
            from_first = total[first[0, token] - begin[0, number] * fold.shape[3] :][:blocks]
            scores[token, head, : from_first.size] = from_first
    return scores


def wanted_scores(case, info, query, key):
    """The scores [T, K, blocks] by the definition, in float64."""
    config = case.config
    windows = segments.describe_windows(info, config.kernel_size, config.kernel_stride)
    first, visible = (np.asarray(x)[0] for x in (windows.first, windows.visible))
    heads = (case.length, case.kv_heads, case.group, 128)
    query = np.asarray(query, np.float64).reshape(heads)
    key = np.asarray(key, np.float64)[0]
    logits = np.einsum("tkgd,mkd->tkgm", query, key) * case.scale
    slot = np.arange(key.shape[0])
    sees = (slot >= first[:, None]) & (slot < (first + visible)[:, None])
    logits = np.where(sees[:, None, None], logits, -np.inf)
    p = np.exp(logits - np.maximum(logits.max(axis=3, keepdims=True), -1e300))
    p = (p / np.maximum(p.sum(axis=3, keepdims=True), 1e-300)).sum(axis=2)
    blocks = config.num_blocks(case.length)
    with jax.enable_x64(True):
        shifted = np.stack(
            [np.pad(x[:, f:], ((0, 0), (0, f))) for x, f in zip(p, first, strict=True)]
        )
        return np.asarray(_fold(jnp.asarray(shifted)[None].swapaxes(1, 2), blocks, config))[
            0
        ].swapaxes(0, 1)


@pytest.mark.fast_cases("packed")
@pytest.mark.parametrize("name", CASES)
def test_scores_and_attention_are_those_of_the_definition(name, monkeypatch):
    """Scores to float32's precision; attention like the kernel without the fold."""
    case = CASES[name]
    query, key, value = case.arrays()
    left = []

    def keep(*arrays, **_):
        jax.debug.callback(lambda *x: left.append(x), *arrays[:-1])
        return arrays[-1]

    monkeypatch.setattr(passes, "choose_blocks", keep)
    info, (out, lse, _) = run(case, (query, key, value), races=True)
    jax.effects_barrier()
    (found,) = left  # all in one chunk
    assert not gpu_callbacks.get_races().races_found
    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    config = case.config
    windows = {"kernel_size": config.kernel_size, "kernel_stride": config.kernel_stride}
    wanted = reference.compressed_attention(*wide, segments=info, scale=case.scale, **windows)
    assert_close((out, lse), jax.tree.map(np.asarray, wanted), 3e-2)
    got, wanted = (
        scores_of(case, jax.tree.map(np.asarray, found)),
        wanted_scores(case, info, query, key),
    )
    scored = ~np.isnan(got)
    assert scored.any()
    error = np.abs(got - wanted)[scored]
    assert error.max() <= (3e-6 if case.keys != "huge" else 3e-3) * case.group, error.max()


@pytest.mark.fast_cases("3-two_long")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunks", [1, 3])
def test_lists_are_those_of_the_definition(name, chunks):
    """The same blocks wherever scores differ by more than their rounding."""
    case = CASES[name]
    query, key, value = case.arrays()
    whole = supported(plan.make_plan(query, key, value, case.config, packed=bool(case.documents)))
    assert whole.chunks == 1
    size = whole.most_tiles + -(-whole.chunk_steps // chunks)
    scratch_bytes = size * plan.step_bytes(case.config)
    info, (_, _, found) = run(case, (query, key, value), scratch_bytes=scratch_bytes)
    check_lists(case, info, found[0], wanted_scores(case, info, query, key))


def check_lists(case, info, lists, scores):
    config, margin = case.config, 1e-5 if case.keys != "huge" else 1e-2
    position, valid = np.asarray(info.position)[0], np.asarray(info.valid)[0]
    own = np.where(valid, position // config.block_size, -1)
    for token in range(case.length):
        for head in range(case.kv_heads):
            found, last = lists[token, head], own[token]
            if last < config.topk:
                wanted = np.where(np.arange(config.topk) <= last, np.arange(config.topk), -1)
                np.testing.assert_array_equal(found, wanted)
                continue
            assert (np.diff(found) > 0).all(), (token, found)
            forced = [*range(config.init_blocks), *range(last - config.local_blocks + 1, last + 1)]
            assert set(forced) <= set(found)
            free = np.arange(config.init_blocks, last - config.local_blocks + 1)
            score = scores[token, head, free]
            least = np.sort(score)[::-1][config.topk - len(forced) - 1]
            taken = np.isin(free, found)
            assert (score[taken] >= least - margin * least).all(), (token, found, score)
            assert (score[~taken] <= least + margin * least).all(), (token, found, score)


def test_equal_scores_go_to_the_lower_blocks():
    """There are more of them than places for candidates, so that the last rank is searched for."""
    case = dataclasses.replace(CASES["equal"], length=1100)
    query, key, value = case.arrays()
    _, (_, _, lists) = run(case, (query, key, value))
    own = np.arange(case.length) // case.config.block_size
    wanted = np.stack([np.zeros_like(own), np.ones_like(own), own], axis=1)
    many = own > case.config.topk
    np.testing.assert_array_equal(lists[0, many, 0], wanted[many])


def test_what_it_serves():
    array = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
    sizes = NSAConfig()
    assert plan.unsupported_reason(array, key, key, sizes) is None
    odd = jax.ShapeDtypeStruct((1, 4096, 6, 128), jnp.bfloat16)
    for query, config, why in (
        (odd, sizes, "query heads per key head must divide 64, got 3"),
        (array, NSAConfig(kernel_size=96), "kernel_size must be at most .* got 96, 64 and 16"),
        (array, NSAConfig(topk=36), "topk - init_blocks - local_blocks must be .* 32, got 33"),
        (array, NSAConfig(block_size=48), "block_size / kernel_stride must divide 32, got 3"),
    ):
        reason = plan.unsupported_reason(query, key, key, config)
        assert re.search(why, str(reason)), reason
