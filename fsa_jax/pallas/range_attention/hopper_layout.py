"""In which order the kernels for Hopper take rows, and how arrays of queries are laid out for it.

TMA copies strips of rows that lie one stride apart in memory. So the order of the 64 rows of a
warpgroup is by head, then token, for groups of up to 8 heads, else by token, then head.

Shapes: B rows of the batch, T tokens, N query heads, K key/value heads, G = N/K, D head width, I
items of a key head.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

#: Head width; rows of a warpgroup, which one wgmma takes; warpgroups of an item.
WIDTH, ROWS, WARPGROUPS = 128, 64, 2


def strips(array_ref, shared_ref, row, kv_head, number, group):
    """Pairs (part of [B, T, N, D], part of the shared memory) of the 64 rows of a number."""
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
    """Strips of a warpgroup's rows that TMA copies in one go: the tokens of a head, or the heads
    of a token, whichever are 8 or more, a whole tile of the layout in shared memory.
    """
    return group if group <= 8 else ROWS // group


def rows_of_tokens(x, group):
    """[B, I, tokens] to [B, I, 2, 64] of rows."""
    x = x.reshape(*x.shape[:2], WARPGROUPS, ROWS // group)
    return jnp.tile(x, group) if group <= 8 else jnp.repeat(x, group, axis=3)


def rows_of_heads(x, kv_heads):
    """[B, T, N] to [B, K, tiles, 64] of rows."""
    batch, _, heads = x.shape
    group = heads // kv_heads
    x = x.reshape(batch, -1, ROWS // group, kv_heads, group)
    x = x.transpose((0, 3, 1, 4, 2) if group <= 8 else (0, 3, 1, 2, 4))
    return x.reshape(batch, kv_heads, -1, ROWS)


def heads_of_rows(x, group):
    """[B, K, I, 2, 64] of rows to [B, T, N]."""
    batch, kv_heads = x.shape[:2]
    tokens = ROWS // group
    if group <= 8:
        x = x.reshape(batch, kv_heads, -1, group, tokens).swapaxes(3, 4)
    x = x.reshape(batch, kv_heads, -1, group).swapaxes(1, 2)
    return x.reshape(batch, -1, kv_heads * group)


def pad(x, multiple, value=0.0):
    """Numbers behind axis 1, up to a multiple."""
    missing = -x.shape[1] % multiple
    widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=jnp.asarray(value, x.dtype)) if missing else x


def bounds_of_items(low, high, keys):
    """Tiles of keys of each item, int32 [B, I, 4]: begin, inner begin, inner end, end.

    The inner ones are those that all rows which see anything see whole.
    """
    sighted = high > low
    first = jnp.min(jnp.where(sighted, low, 2**30), axis=2)
    last = jnp.max(jnp.where(sighted, high, 0), axis=2)
    all_low = jnp.max(jnp.where(sighted, low, 0), axis=2)
    all_high = jnp.min(jnp.where(sighted, high, 2**30), axis=2)
    end = jnp.maximum(-(-last // keys), 1)  # one masked tile where nobody sees anything
    begin = jnp.minimum(first // keys, end - 1)
    inner_begin = jnp.clip(-(-all_low // keys), begin, end)
    inner_end = jnp.clip(all_high // keys, inner_begin, end)
    return jnp.stack((begin, inner_begin, inner_end, end), axis=2).astype(jnp.int32)
