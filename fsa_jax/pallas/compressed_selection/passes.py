"""Compressed attention and the selection of blocks, chunk by chunk.

The logits of the compressed keys serve both: `fold_kernel` leaves the weights of each row, summed
over the windows of each block, and `choose_kernel` rescales them by the logsumexp, sums them over
the heads and takes the best. Bytes: 4 * T*N * J/2 are written once and read once, with J blocks of
a sequence, in chunks of at most 1 GiB: see `plan.make_plan`.

Shapes: B sequences, T tokens, N query heads, K key/value heads, M window slots.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.config import NSAConfig
from fsa_jax.pallas.compressed_selection import fold_kernel
from fsa_jax.pallas.compressed_selection.choose_kernel import choose_blocks
from fsa_jax.pallas.compressed_selection.fold import KEYS
from fsa_jax.pallas.compressed_selection.placement import Chunks, place_windows
from fsa_jax.pallas.range_attention.hopper_layout import (
    ROWS,
    WARPGROUPS,
    bounds_of_items,
    heads_of_rows,
    pad,
    rows_of_tokens,
)
from fsa_jax.semantics.segments import SegmentInfo, Windows


def attend_and_choose(
    query, key, value, seen, segments: SegmentInfo, windows: Windows, *,
    config: NSAConfig, scale: float, plan, interpret=None,
):  # fmt: skip
    """Out [B, T, N, D], lse float32 [B, T, N] and the lists of blocks int32 [B, T, K, topk].

    Args:
      query: [B, T, N, D], float16 or bfloat16.
      key: the compressed keys [B, M, K, D]; those that no query sees may hold any value.
      value: the compressed values, likewise.
      seen: bool [B, M], whether any query sees a window.
      segments: the documents of the sequences.
      windows: the compressed windows of the documents.
      config: the sizes.
      scale: factor of the logits.
      plan: `FoldPlan`.
      interpret: `InterpretGPUParams` of Pallas Mosaic GPU, to run on a CPU.
    """
    batch, length, heads, _ = query.shape
    kv_heads, tokens = key.shape[2], WARPGROUPS * ROWS * key.shape[2] // heads
    group = heads // kv_heads
    per_block, per_window = (
        x // config.kernel_stride for x in (config.block_size, config.kernel_size)
    )
    places = place_windows(segments, windows, key.shape[1], config)
    query = pad(query, tokens)
    low, high = places.first, places.first + windows.visible
    low, high = (pad(x, tokens).reshape(batch, -1, tokens) for x in (low, high))
    own = pad(places.own, tokens, -1).reshape(batch, -1, tokens)
    bounds = bounds_of_items(low, high, KEYS)
    scored = jnp.any(own >= config.topk, axis=2)
    chunks = Chunks.of(bounds, scored, kv_heads, plan.chunks, plan.chunk_steps)
    # keys that nobody sees may hold any value: they are zeroed, since 0 times NaN is NaN
    seen = seen[:, :, None, None]
    read = jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=0))
    key, value = (read(jnp.where(seen, x, 0), places.slot) for x in (key, value))
    tables = bounds, *(rows_of_tokens(x, group) for x in (low, high))

    def run(refs):
        *attended, lists_ref = refs

        def step(block_indices, chunk):
            fold, edges, sums = fold_kernel.attend(
                chunk, (query, key, value), tables, chunks.base, attended,
                steps=plan.steps, sizes=(per_block, per_window), scale=scale, interpret=interpret,
            )  # fmt: skip
            begin, _, _, end = jnp.unstack(bounds, axis=2)
            return choose_blocks(
                chunk, chunks.base, begin, end - begin, places.own, places.first // per_block,
                fold, edges, sums, block_indices,
                config=config, plan=plan.choose, interpret=interpret is not None,
            ), None  # fmt: skip

        if plan.chunks == 1:
            lists_ref[...], _ = step(lists_ref[...], chunks.spans[0])
        else:
            lists_ref[...], _ = jax.lax.scan(step, lists_ref[...], chunks.spans)

    out = jax.lax.empty(query.shape, query.dtype)
    lse = jax.lax.empty((batch, kv_heads, bounds.shape[1], WARPGROUPS, ROWS), jnp.float32)
    lists = jnp.full((batch, length, kv_heads, config.topk), -1, jnp.int32)
    out, lse, lists = pl.run_state(run)((out, lse, lists))
    return out[:, :length], heads_of_rows(lse, group)[:, :length], lists
