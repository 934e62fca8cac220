"""The kernel whose programs own keys: dK and dV of attention to contiguous ranges of keys.

The tokens that attend to a key also form a contiguous range, so a program walks the rows from the
first to the last token that attends to any of its keys. The rows of a step are as in
`query_kernels.py`: row r is query head r % G of token r // G. Scores are [b, rows], so that p and
ds stay in registers for the products that accumulate dK [b, D] and dV [b, E]; these products also
sum over the G heads of a group.

Many more rows attend to early keys than to late ones. The rows of each key tile are therefore
divided into `splits` even parts, one program each; the partial sums are added in order afterwards.

Flops, with V the visible (row, key) pairs: 2*V*(2*D + 2*E). Bytes: q and dout once for each key
tile, from L2; with more than one split, 4*splits*M*(D + E) bytes of partial sums, written and read.

Shapes: B sequences, T tokens, N query heads, K key/value heads, G = N/K, M keys, D and E head
widths, R rows and b keys of a tile.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.intrinsics import call, dot, iota, load, split, store
from fsa_jax.pallas.online_softmax import Sum, softmax_weights
from fsa_jax.pallas.tiles import columns_of, fold_tiles, load_tiles, product, rows_mask


def key_gradients(
    query, key, value, query_range, lse, delta, dout, *, plan, scale, interpret
):  # fmt: skip
    """Gradients dK [B, M, K, D] and dV [B, M, K, E] in the dtypes of key and value.

    The arguments are those of `query_kernels.query_gradient`, without `visible`.
    """
    _, keys, kv_heads, _ = key.shape
    tile, block = plan.key_gradient, plan.key_gradient.keys
    exact = key.dtype == jnp.float32

    def range_key_gradient_kernel(
        query_ref, key_ref, value_ref, low_ref, high_ref, lse_ref, delta_ref, dout_ref,
        dkey_ref, dvalue_ref,
    ):  # fmt: skip
        mine = _Keys(tile, query_ref, key_ref, value_ref, low_ref, high_ref)

        def step(number, sums, masked):
            step = mine.rows(number, masked, lse_ref)
            queries = load_tiles(query_ref, *step.at, mine.columns, step.active)
            douts = load_tiles(dout_ref, *step.at, mine.value_columns, step.active)
            deltas = load(delta_ref.at[*step.at], mask=step.active)
            dkeys, dvalues = sums
            logits = product(mine.keys, queries)
            p = softmax_weights(logits, step.lses[None, :], scale, key_ref.dtype)
            if masked:
                p = jnp.where(mine.sees(number), p, 0.0)
            p_cut = p.astype(dout_ref.dtype)
            dvalues = [
                x.add(dot(p_cut, y, (1, 0))).await_mma()
                for x, y in zip(dvalues, douts, strict=True)
            ]
            dp = product(mine.values, douts)
            ds = (p * (dp - deltas[None, :])).astype(key_ref.dtype)
            dkeys = [
                x.add(dot(ds, y, (1, 0))).await_mma() for x, y in zip(dkeys, queries, strict=True)
            ]
            return dkeys, dvalues

        steps = mine.steps(plan.splits)
        sums = tuple(
            [Sum.zeros((block, d.size), exact) for d in cut]
            for cut in (mine.columns, mine.value_columns)
        )
        dkeys, dvalues = fold_tiles(step, sums, *steps)
        mine.store(dkey_ref, mine.columns, dkeys, scale)
        mine.store(dvalue_ref, mine.value_columns, dvalues, 1.0)

    dtype = key.dtype if plan.splits == 1 else jnp.float32
    parts = call(
        range_key_gradient_kernel,
        query,
        key,
        value,
        *query_range,
        lse,
        delta,
        dout,
        grid=(-(-keys // block), plan.splits, query.shape[0] * kv_heads),
        out_shape=tuple(jax.ShapeDtypeStruct((plan.splits, *x.shape), dtype) for x in (key, value)),
        interpret=interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return tuple(jnp.sum(x, axis=0).astype(key.dtype) for x in parts)


@dataclasses.dataclass(frozen=True)
class _Step:
    """Rows of a step: their indices, their logsumexps, and which are active; None means all."""

    at: tuple[Any, Any, Any]
    lses: jax.Array
    active: jax.Array | None


class _Keys:
    """The keys of a program, and the rows that attend to them.

    Attributes:
      columns, value_columns: column numbers of the key tiles and value tiles.
      keys, values: tiles [b, columns]; 0 at keys that no query attends to.
    """

    def __init__(self, tile, query_ref, key_ref, value_ref, low_ref, high_ref):
        self.tile, kv_heads = tile, key_ref.shape[2]
        self.group = query_ref.shape[2] // kv_heads
        # most rows attend to the first keys, so their programs come first
        self.column = pl.program_id(0) * tile.keys + iota(tile.keys)
        self.part = pl.program_id(1)
        self.batch, self.kv_head = split(pl.program_id(2), kv_heads)
        self.in_bounds = self.column < key_ref.shape[1]
        self.low = load(low_ref.at[self.batch, self.column], mask=self.in_bounds)
        self.high = load(high_ref.at[self.batch, self.column], mask=self.in_bounds)
        self.seen = self.high > self.low
        self.columns, self.value_columns = (columns_of(x, 128) for x in (key_ref, value_ref))
        self.keys, self.values = (
            load_tiles(ref, self.batch, self.column, self.kv_head, cut, self.seen)
            for ref, cut in ((key_ref, self.columns), (value_ref, self.value_columns))
        )
        # the tokens from the first to the last that attends to any of the keys
        self.first = jnp.min(jnp.where(self.seen, self.low, 2**30))
        self.last = jnp.max(jnp.where(self.seen, self.high, 0))

    def rows(self, number, masked, lse_ref):
        """The rows of a step; in a step that needs no mask, all rows are active."""
        row = self.first * self.group + number * self.tile.rows + iota(self.tile.rows)
        token, g = split(row, self.group)
        head = self.kv_head * self.group + g
        inside = token < self.last if masked else None
        lses = load(lse_ref.at[self.batch, token, head], mask=inside, other=-jnp.inf)
        active = None
        if masked:  # a row with an empty range may hold any value, and gets weights of 0
            active = lses > -jnp.inf
            lses = jnp.where(active, lses, jnp.inf)
        return _Step((self.batch, token, head), lses, active)

    def sees(self, number):
        """Mask, bool [b, R]: which rows of a step attend to each key."""
        # compares rows, not tokens, since row numbers within the tile take no registers
        base = self.first * self.group + number * self.tile.rows
        row = iota(self.tile.rows)[None, :]
        return (row >= (self.low * self.group - base)[:, None]) & (
            row < (self.high * self.group - base)[:, None]
        )

    def steps(self, splits):
        """Bounds of this part's steps for `fold_tiles`; rows of inner steps attend to all keys."""
        first, last, group, rows = self.first, self.last, self.group, self.tile.rows
        steps = pl.cdiv(jnp.maximum(last - first, 0) * group, rows)
        share = pl.cdiv(steps, splits)
        begin = jnp.minimum(self.part * share, steps)
        end = jnp.minimum(begin + share, steps)
        all_low = jnp.max(jnp.where(self.seen, self.low, 0))
        all_high = jnp.min(jnp.where(self.seen, self.high, last))
        inner_begin = pl.cdiv(jnp.maximum(all_low - first, 0) * group, rows)
        inner_end = jnp.maximum(all_high - first, 0) * group // rows
        inner_begin = jnp.clip(inner_begin, begin, end)
        return begin, inner_begin, jnp.clip(inner_end, inner_begin, end), end

    def store(self, ref, columns, sums, factor):
        """Stores the tiles of a sum, multiplied by a factor."""
        for d, x in zip(columns, sums, strict=True):
            store(
                ref.at[self.part, self.batch, self.column[:, None], self.kv_head, d[None, :]],
                jnp.where(self.seen[:, None], x.total * factor, 0.0).astype(ref.dtype),
                mask=rows_mask(self.in_bounds, d, ref.shape[4]),
            )
