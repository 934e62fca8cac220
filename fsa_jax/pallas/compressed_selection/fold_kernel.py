"""Attention to the compressed keys that also leaves behind what the selection needs.

The forward kernel of `hopper_query_kernels`, with keys ordered as `fold` needs them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fsa_jax.pallas.compressed_selection import fold
from fsa_jax.pallas.range_attention.hopper_layout import ROWS, WARPGROUPS
from fsa_jax.pallas.range_attention.hopper_pipeline import PROGRAMS, call, run_program
from fsa_jax.pallas.range_attention.hopper_query_kernels import FORWARD, Forward


class Folding(Forward):
    """The forward pass, which also writes the fold of each tile to scratch memory."""

    def __init__(self, refs, *, sizes, first_step, **shared):
        super().__init__(refs, **shared)
        self.sizes, self.first_step = sizes, first_step

    def key_of_column(self, column):
        return fold.window_of_column(column)

    def begin(self, item):
        _, _, base_ref, *_ = self.refs
        base = base_ref[item.index]
        self.stored = base >= 0
        self.base = jnp.where(self.stored, base - self.first_step, 0) - item.tiles.begin

    def weigh(self, item, number, p, row_max):
        _, _, _, fold_ref, edge_ref, _ = self.refs
        step = self.base + item.tiles.tile(number)
        many, rest = lax.div(step, jnp.int32(fold.EDGES)), lax.rem(step, jnp.int32(fold.EDGES))
        into = fold_ref.at[step, self.warpgroup], edge_ref.at[many, self.warpgroup, :, rest]
        if not self.exact:
            stored = self.stored.astype(jnp.int32)
            return fold.fold_in_registers(p, row_max, stored, *into, *self.sizes)
        folded, carry = fold.fold_by_columns(p, *self.sizes)

        @pl.when(self.stored)
        def _():
            into[0][...] = folded
            into[1][...] = jnp.stack((row_max, carry), axis=1)

        return (jnp.sum(folded, axis=1) + carry) / self.sizes[1]

    def finished(self, item, row_max, row_sum):
        *_, sum_ref = self.refs
        for i, x in enumerate((row_max, 1.0 / row_sum)):
            self.at(sum_ref, item).at[i][...] = x


def attend(chunk, arrays, tables, base, results, *, steps, sizes, scale, interpret):
    """Attention of the queries of some work items.

    Args:
      chunk: int32 [3], the first item, one past the last, and the number of the first step.
      arrays: query [B, T', N, D], key and value [B, M', K, D], padded to whole items and tiles;
        keys and values in the order of `fold`.
      tables: bounds int32 [B, I, 4] of the items and (low, high), int32 [B, I, 2, 64]: see
        `hopper_layout`.
      base: int32 [I*B*K], the number of an item's first step; negative: it leaves nothing behind.
      results: refs of out [B, T', N, D] and lse float32 [B, K, I, 2, 64], written for these items.
      steps: tiles in the scratch memory.
      sizes: (r, q): strides of a block and of a window.
      scale: factor of the logits.
      interpret: `InterpretGPUParams` of Pallas Mosaic GPU, to run on a CPU.

    Returns:
      fold float32 [steps, 2, 64, KEYS / r], edges float32 [steps / EDGES, 2, 64, EDGES, 2] and
      sums float32 [B, K, I, 2, 2, 64], each written only for the tiles and rows of the items. The
      weights of a row are relative to 2**row_max: edges has, for each tile, its row_max so far
      and what the tile hands over; sums the last row_max and 1 over the sum of all weights.
    """
    query, key, _ = arrays
    batch, _, heads, _ = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    numbers = tables[0].shape[1]
    rows = (WARPGROUPS, ROWS)
    shapes = [
        jax.ShapeDtypeStruct((steps, *rows, fold.KEYS // sizes[0]), jnp.float32),
        jax.ShapeDtypeStruct((-(-steps // fold.EDGES), *rows, fold.EDGES, 2), jnp.float32),
        jax.ShapeDtypeStruct((batch, kv_heads, numbers, WARPGROUPS, 2, ROWS), jnp.float32),
    ]

    def compressed_fold_kernel(*refs):
        chunk_ref, query_ref, key_ref, value_ref, bounds_ref, low_ref, high_ref, *refs = refs
        base_ref, out_ref, lse_ref, fold_ref, edge_ref, sum_ref = refs
        refs = low_ref, high_ref, out_ref, lse_ref, base_ref, fold_ref, edge_ref, sum_ref
        make: Any = functools.partial(
            Folding, refs, sizes=sizes, first_step=chunk_ref[2], ring=FORWARD, scale=scale,
            exact=interpret is not None,
        )  # fmt: skip
        span = chunk_ref[0], chunk_ref[1]
        arrays = [query_ref], key_ref, value_ref
        run_program(make, arrays, bounds_ref, kv_heads, group, FORWARD, span)

    arrays = (chunk, *arrays, *tables, base, *results)
    return call(
        compressed_fold_kernel, *arrays,
        grid={"program": PROGRAMS}, out_shape=shapes, interpret=interpret,
    )  # fmt: skip
