"""Row order of the Hopper kernels, and the layout of per-query arrays that matches it.

TMA copies strips of rows that are one fixed stride apart in memory. The 64 rows of a warpgroup are
therefore ordered by head, then token, for groups of up to 8 heads, and by token, then head, for
larger groups.

Shapes: B sequences, T tokens, N query heads, K key/value heads, G = N/K, D head width, I work items
of a key head.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

#: Head width; rows of a warpgroup, which one wgmma takes; compute warpgroups of a work item.
WIDTH, ROWS, WARPGROUPS = 128, 64, 2


def strips(array_ref, shared_ref, row, kv_head, number, group):
    """Pairs (part of [B, T, N, D], part of shared memory) that copy the 64-row tile `number`."""
    token, head = number * (ROWS // group), kv_head * group
    count = num_strips(group)
    rows = ROWS // count
    for i in range(count):
        if group <= 8:
            part = array_ref.at[row, pl.ds(token, rows), head + i]
        else:
            part = array_ref.at[row, token + i, pl.ds(head, rows)]
        yield part, shared_ref.at[pl.ds(i * rows, rows)]


def num_strips(group):
    """Number of strips of a warpgroup's rows; TMA copies a strip at a time.

    A strip holds the tokens of a head, or the heads of a token, whichever are at least 8: a whole
    tile of the layout in shared memory.
    """
    return group if group <= 8 else ROWS // group


def rows_of_tokens(x, group):
    """Rearranges values of tokens, [B, I, tokens], into values of rows, [B, I, 2, 64]."""
    x = x.reshape(*x.shape[:2], WARPGROUPS, ROWS // group)
    return jnp.tile(x, group) if group <= 8 else jnp.repeat(x, group, axis=3)


def rows_of_heads(x, kv_heads):
    """Rearranges values of query heads, [B, T, N], into values of rows, [B, K, tiles, 64]."""
    batch, _, heads = x.shape
    group = heads // kv_heads
    x = x.reshape(batch, -1, ROWS // group, kv_heads, group)
    x = x.transpose((0, 3, 1, 4, 2) if group <= 8 else (0, 3, 1, 2, 4))
    return x.reshape(batch, kv_heads, -1, ROWS)


def heads_of_rows(x, group):
    """Rearranges values of rows, [B, K, I, 2, 64], into values of query heads, [B, T, N]."""
    batch, kv_heads = x.shape[:2]
    tokens = ROWS // group
    if group <= 8:
        x = x.reshape(batch, kv_heads, -1, group, tokens).swapaxes(3, 4)
    x = x.reshape(batch, kv_heads, -1, group).swapaxes(1, 2)
    return x.reshape(batch, -1, kv_heads * group)


def pad(x, multiple, value=0.0):
    """Pads axis 1 with `value` up to a multiple of `multiple`."""
    missing = -x.shape[1] % multiple
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=jnp.asarray(value, x.dtype)) if missing else x


def bounds_of_items(low, high, keys):
    """Key tiles of each work item, int32 [B, I, 4]: begin, inner begin, inner end, end.

    All keys of the inner tiles are in the range of every row whose range is not empty.
    """
    has_keys = high > low
    first = jnp.min(jnp.where(has_keys, low, 2**30), axis=2)
    last = jnp.max(jnp.where(has_keys, high, 0), axis=2)
    all_low = jnp.max(jnp.where(has_keys, low, 0), axis=2)
    all_high = jnp.min(jnp.where(has_keys, high, 2**30), axis=2)
    end = jnp.maximum(-(-last // keys), 1)  # one masked tile if the ranges of all rows are empty
    begin = jnp.minimum(first // keys, end - 1)
    inner_begin = jnp.clip(-(-all_low // keys), begin, end)
    inner_end = jnp.clip(all_high // keys, inner_begin, end)
    return jnp.stack((begin, inner_begin, inner_end, end), axis=2).astype(jnp.int32)
