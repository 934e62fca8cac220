"""The portable implementation: plain XLA for any device, with memory linear in the tokens.

Dataflow. Every function works on one flat axis H of (sequence, KV head) pairs. Two loops do the
work, and each has a backward pass that recomputes the softmax:

* `range_attention`: each query sees one contiguous range of keys (compressed windows, or the
  tokens of a sliding window). Each tile of queries loops over the tiles of keys that any of its
  queries sees.
* `block_attention`: each query sees a list of blocks. The (query, block) pairs are sorted by block
  and divided into tiles of one block each. A tile gathers its queries and merges its result into
  the running maxima, sums and outputs of these queries. No tile holds a query twice, and the tiles
  run one after another, so sums have a fixed order and no partial result is stored.

`xla_tiles.py` holds the arithmetic of one tile.

Shapes: B batch, T tokens, N query heads, K key/value heads, G = N/K, H = B*K, D and E head widths,
M keys, S listed blocks, P = T*S pairs, R pairs of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float, Int

from fsa_jax.config import NSAConfig
from fsa_jax.semantics.precision import accumulation_dtype, einsum
from fsa_jax.semantics.segments import SegmentInfo, Windows
from fsa_jax.semantics.selection_rule import block_ranks, group_weights, take_best
from fsa_jax.xla_tiles import empty_state, finish, merge, merge_delta, row_numbers, tile_gradients

# Tile sizes: large enough that the matmuls outweigh the loop overhead, small enough that a tile
# stays in cache and most masked pairs are skipped. These were the fastest of a few powers of two on
# two CPU cores, at 512 to 8192 tokens.
QUERY_TILE = 128
KEY_TILE = 64
PAIR_TILE = 128


def range_attention(query, key, value, visible, *, scale):
    """Attention of each query to the keys low .. high-1, where `visible` = (low, high) [B, T].

    There must be at least one key.

    Returns:
      out [B, T, N, E] in the dtype of `query` and lse [B, T, N].
    """
    kv_heads = key.shape[2]
    flat = _flatten(kv_heads, query, key, value, *visible)
    out, lse = _range_forward(scale, *flat)
    return _unflatten(kv_heads, out), _unflatten(kv_heads, lse)


def range_gradients(query, key, value, visible, lse, delta, dout, dlse, *, scale):
    """(dq, dk, dv) of `range_attention`, given delta = sum(out * dout) - dlse.

    In float32 and float64, delta is recomputed with `dlse`; see `xla_tiles.row_numbers`.
    """
    kv_heads = key.shape[2]
    flat = _flatten(kv_heads, query, key, value, *visible)
    rest = _flatten_heads(kv_heads, lse, delta, dout, dlse)
    dquery, *dkeys = _range_backward(scale, *flat, *rest)
    return _unflatten(kv_heads, dquery), *(_keys_back(kv_heads, x) for x in dkeys)


def block_attention(query, key, value, block_starts, offset, *, block_size, scale):
    """Attention of each query to the blocks that start at the tokens `block_starts` [B, T, K, S].

    Query t is token offset[0] + t of the key sequence. The results are as in `range_attention`.
    """
    kv_heads = key.shape[2]
    query, key, value = _flatten(kv_heads, query, key, value)
    block_starts = rearrange(block_starts, "b t k s -> (b k) t s")
    out, lse = _block_forward(block_size, scale, query, key, value, block_starts, offset[0])
    return _unflatten(kv_heads, out), _unflatten(kv_heads, lse)


def block_gradients(
    query, key, value, block_starts, offset, lse, delta, dout, dlse, *, block_size, scale
):  # fmt: skip
    """(dq, dk, dv) of `block_attention`; the arguments are as in `range_gradients`."""
    kv_heads = key.shape[2]
    query, key, value = _flatten(kv_heads, query, key, value)
    block_starts = rearrange(block_starts, "b t k s -> (b k) t s")
    rest = _flatten_heads(kv_heads, lse, delta, dout, dlse)
    dquery, *dkeys = _block_backward(
        block_size, scale, query, key, value, block_starts, offset[0], *rest
    )
    return _unflatten(kv_heads, dquery), *(_keys_back(kv_heads, x) for x in dkeys)


def select_blocks(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B M K D"],
    lse: Float[Array, "B T N"],
    segments: SegmentInfo,
    windows: Windows,
    *,
    config: NSAConfig,
    scale: float,
) -> Int[Array, "B T K S"]:
    """See fsa_jax.select_blocks. Scores are held for one tile of queries at a time.

    `segments` and `windows` describe the queries, which may be only part of the sequence.
    """
    length, kv_heads, slots = query.shape[1], key.shape[2], key.shape[1]
    # a sequence with M windows has fewer than M + 1 strides of tokens
    blocks = config.num_blocks((slots + 1) * config.kernel_stride - 1)
    wide = accumulation_dtype(query)
    tile = min(QUERY_TILE, length)

    def one_tile(xs):
        query, lse, first, visible, position, valid = xs
        window = jnp.arange(slots, dtype=jnp.int32)[None, None]
        logits = scale * einsum("bqkgd,bmkd->bkgqm", query, key)
        lse = rearrange(lse, "b q k g -> b k g q").astype(wide)
        # Slot s holds window s - first of the query's document. The windows are aligned to the
        # document, then those of other documents are masked.
        sees = (window >= first[..., None]) & (window < (first + visible)[..., None])
        p = group_weights(logits, lse, sees)
        if segments.packed:
            slot = jnp.minimum(first[..., None] + window, slots - 1)
            p = jnp.take_along_axis(p, slot[:, None], axis=-1)
            p = jnp.where((window < visible[..., None])[:, None], p, 0)
        own = jnp.where(valid, position // config.block_size, -1)[:, None]
        best = take_best(block_ranks(p, own, blocks, config), config.topk)
        return rearrange(best, "b k q s -> b q k s")

    query = rearrange(query, "b t (k g) d -> b t k g d", k=kv_heads)
    lse = rearrange(lse, "b t (k g) -> b t k g", k=kv_heads)
    tokenwise = (query, lse, windows.first, windows.visible, segments.position, segments.valid)
    tiles = jax.lax.map(one_tile, tuple(_tiles(x, tile) for x in tokenwise))
    return rearrange(tiles, "n b q k s -> b (n q) k s")[:, :length]


def _flatten(kv_heads, query, key, value, *ranges):
    """Returns query [H, T, G, D], key and value [H, M, D or E], and arrays [B, T] as [H, T]."""
    keys = (rearrange(x, "b m k d -> (b k) m d") for x in (key, value))
    ranges = (repeat(x, "b t -> (b k) t", k=kv_heads) for x in ranges)
    return *_flatten_heads(kv_heads, query), *keys, *ranges


def _flatten_heads(kv_heads, *arrays):
    """Reshapes [B, T, N, ...] to [H, T, G, ...]."""
    return tuple(rearrange(x, "b t (k g) ... -> (b k) t g ...", k=kv_heads) for x in arrays)


def _unflatten(kv_heads, x):
    return rearrange(x, "(b k) t g ... -> b t (k g) ...", k=kv_heads)


def _keys_back(kv_heads, x):
    return rearrange(x, "(b k) m d -> b m k d", k=kv_heads)


def _pad_tokens(x: Array, missing: int) -> Array:
    """Appends `missing` zeros to axis 1."""
    return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))


def _tiles(x: Array, tile: int) -> Array:
    """Reshapes [B, T, ...] to [T/tile, B, tile, ...], with the last tile padded by zeros."""
    return rearrange(_pad_tokens(x, -x.shape[1] % tile), "b (n q) ... -> n b q ...", q=tile)


def _untile(x: Array, length: int) -> Array:
    return rearrange(x, "n b q ... -> b (n q) ...")[:, :length]


# Attention to a contiguous range of keys


def _range_forward(
    scale: float,
    query: Float[Array, "H T G D"],
    key: Float[Array, "H M D"],
    value: Float[Array, "H M E"],
    low: Int[Array, "H T"],
    high: Int[Array, "H T"],
) -> tuple[Float[Array, "H T G E"], Float[Array, "H T G"]]:
    """Softmax attention of each query to keys low .. high-1."""
    length = query.shape[1]
    tile = min(QUERY_TILE, length)
    key_tile = min(KEY_TILE, key.shape[1])
    key, value = (_pad_tokens(x, -x.shape[1] % key_tile) for x in (key, value))

    def one_tile(xs):
        query, low, high = xs

        def step(index, state):
            keys, values, visible = _key_tile(index, key_tile, key, value, low, high)
            return merge(state, query, keys, values, visible, scale)

        first, last = _key_tile_range(low, high, key_tile)
        state = empty_state(query, value.shape[-1])
        top, total, out = jax.lax.fori_loop(first, last, step, state)
        return finish(top, total, out, query.dtype)

    out, lse = jax.lax.map(one_tile, tuple(_tiles(x, tile) for x in (query, low, high)))
    return _untile(out, length), _untile(lse, length)


def _range_backward(scale, query, key, value, low, high, lse, delta, dout, dlse):
    """Gradients (dq, dk, dv)."""
    length, keys = query.shape[1], key.shape[1]
    tile, key_tile = min(QUERY_TILE, length), min(KEY_TILE, keys)
    padded_key, padded_value = (_pad_tokens(x, -x.shape[1] % key_tile) for x in (key, value))

    def one_tile(carry, xs):
        query, low, high, lse, delta, dout, dlse = xs
        tiles = _key_tile_range(low, high, key_tile)

        def read(index):
            keys, values, visible = _key_tile(index, key_tile, padded_key, padded_value, low, high)
            return (query, keys, values, dout), visible

        def fold(index, state):
            arrays, visible = read(index)
            return merge_delta(state, *arrays, visible, scale)

        def step(index, state):
            dq, dk, dv = state
            arrays, visible = read(index)
            parts = tile_gradients(*arrays, rows, visible, scale)
            at = index * key_tile
            return dq + parts[0], _add_slice(dk, parts[1], at), _add_slice(dv, parts[2], at)

        recompute = functools.partial(jax.lax.fori_loop, *tiles, fold)
        rows = row_numbers(query, lse, delta, dlse, recompute)
        dq = jnp.zeros_like(query, lse.dtype, shape=query.shape)
        dq, dk, dv = jax.lax.fori_loop(*tiles, step, (dq, *carry))
        return (dk, dv), dq.astype(query.dtype)

    zeros = tuple(
        jnp.zeros_like(query, lse.dtype, shape=x.shape) for x in (padded_key, padded_value)
    )
    tokenwise = (query, low, high, lse, delta, dout, dlse)
    (dk, dv), dq = jax.lax.scan(one_tile, zeros, tuple(_tiles(x, tile) for x in tokenwise))
    dk, dv = dk[:, :keys].astype(key.dtype), dv[:, :keys].astype(value.dtype)
    return _untile(dq, length), dk, dv


def _key_tile_range(low, high, key_tile):
    """The first and one past the last key tile that any query of the query tile sees."""
    some = high > low
    first = jnp.min(jnp.where(some, low, jnp.iinfo(low.dtype).max)) // key_tile
    last = (jnp.max(jnp.where(some, high, 0)) + key_tile - 1) // key_tile
    return first, last


def _key_tile(index, key_tile, key, value, low, high):
    start = index * key_tile
    keys, values = (jax.lax.dynamic_slice_in_dim(x, start, key_tile, axis=1) for x in (key, value))
    column = (start + jnp.arange(key_tile, dtype=jnp.int32))[None, None]
    return keys, values, (column >= low[..., None]) & (column < high[..., None])


def _add_slice(total: Array, part: Array, start) -> Array:
    """Computes total[:, start : start + size] += part in place."""
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis=1)


# Attention to listed blocks


def _block_forward(
    block_size: int,
    scale: float,
    query: Float[Array, "H T G D"],
    key: Float[Array, "H M D"],
    value: Float[Array, "H M E"],
    block_starts: Int[Array, "H T S"],
    offset: Int[Array, ""],
) -> tuple[Float[Array, "H T G E"], Float[Array, "H T G"]]:
    """Attention of query t to tokens up to offset + t in the blocks starting at block_starts[t]."""
    count, read_tile = _block_tiles(block_starts, offset, key.shape[1], block_size)
    # The padding lets the last block extend past the end of the sequence, and provides the block
    # that an empty tile reads.
    key, value = (_pad_tokens(x, block_size) for x in (key, value))

    def step(index, state):
        token, start, visible = read_tile(index)
        keys, values = (_read_block(x, start, block_size) for x in (key, value))
        part = tuple(_gather(x, token) for x in state)
        merged = merge(part, _gather(query, token), keys, values, visible, scale)
        return tuple(_scatter(x, token, new) for x, new in zip(state, merged, strict=True))

    state = empty_state(query, value.shape[-1])
    top, total, out = jax.lax.fori_loop(0, count, step, state)
    return finish(top, total, out, query.dtype)


def _block_backward(
    block_size, scale, query, key, value, block_starts, offset, lse, delta, dout, dlse
):
    """Gradients (dq, dk, dv)."""
    length = key.shape[1]
    count, read_tile = _block_tiles(block_starts, offset, length, block_size)
    padded_key, padded_value = (_pad_tokens(x, block_size) for x in (key, value))

    def read(index):
        token, start, visible = read_tile(index)
        keys, values = (_read_block(x, start, block_size) for x in (padded_key, padded_value))
        arrays = (_gather(query, token), keys, values, _gather(dout, token))
        return token, start, arrays, visible

    def fold(index, state):
        token, _, arrays, visible = read(index)
        merged = merge_delta(tuple(_gather(x, token) for x in state), *arrays, visible, scale)
        return tuple(_scatter(x, token, new) for x, new in zip(state, merged, strict=True))

    def step(index, state):
        dq, dk, dv = state
        token, start, arrays, visible = read(index)
        parts = tile_gradients(*arrays, [_gather(x, token) for x in rows], visible, scale)
        dq = _scatter(dq, token, _gather(dq, token) + parts[0])
        dk = _write_block(dk, start, _read_block(dk, start, block_size) + parts[1])
        dv = _write_block(dv, start, _read_block(dv, start, block_size) + parts[2])
        return dq, dk, dv

    recompute = functools.partial(jax.lax.fori_loop, 0, count, fold)
    rows = row_numbers(query, lse, delta, dlse, recompute)
    shapes = (query.shape, padded_key.shape, padded_value.shape)
    zeros = tuple(jnp.zeros_like(query, lse.dtype, shape=shape) for shape in shapes)
    dq, dk, dv = jax.lax.fori_loop(0, count, step, zeros)
    dk, dv = dk[:, :length].astype(key.dtype), dv[:, :length].astype(value.dtype)
    return dq.astype(query.dtype), dk, dv


def _block_tiles(
    block_starts: Int[Array, "H T S"], offset: Int[Array, ""], length: int, block_size: int
):
    """Sorts the (query, block) pairs by block and divides the pairs of each block into tiles.

    Returns:
      The largest number of tiles that any head has, and a function that maps the number of a tile
      to its query tokens [H, R] (T where the tile has no more pairs), the first token of its block
      [H] and the visibility mask [H, R, block_size].
    """
    heads, tokens, num_selected = block_starts.shape
    pairs = tokens * num_selected
    tile = min(PAIR_TILE, pairs)
    index = jnp.broadcast_to(jnp.arange(pairs, dtype=jnp.int32)[None], (heads, pairs))
    start, order = jax.lax.sort(
        (block_starts.reshape(heads, pairs), index), dimension=1, is_stable=True, num_keys=1
    )
    token = order // num_selected
    opens = jnp.concatenate([jnp.ones((heads, 1), bool), start[:, 1:] != start[:, :-1]], axis=1)
    run = jax.lax.cummax(jnp.where(opens, index, 0), axis=1)
    cuts = (start < length) & ((index - run) % tile == 0)
    number = jnp.cumsum(cuts, axis=1, dtype=jnp.int32) - 1
    # Every tile is full except the last of each block, and at most as many blocks as tokens are
    # chosen.
    bound = pairs // tile + min(length, pairs)
    first = jnp.full((heads, bound), pairs, jnp.int32)
    target = jnp.where(cuts, number, bound)
    first = jax.vmap(lambda f, i, p: f.at[i].set(p, mode="drop"))(first, target, index)

    def read_tile(number):
        pair = first[:, number][:, None] + jnp.arange(tile, dtype=jnp.int32)[None]
        base = _gather(start, pair, fill=length)
        live = (base == base[:, :1]) & (base < length)
        rows = jnp.where(live, _gather(token, pair), tokens)
        column = base[:, :1, None] + jnp.arange(block_size, dtype=jnp.int32)[None, None]
        visible = live[..., None] & (column <= (rows + offset)[..., None])
        return rows, base[:, 0], visible

    return jnp.max(number[:, -1]) + 1, read_tile


def _gather(x: Array, index: Int[Array, "H R"], fill=0) -> Array:
    read = lambda row, i: row.at[i].get(mode="fill", fill_value=fill)  # noqa: E731
    return jax.vmap(read)(x, index)


def _scatter(x: Array, index: Int[Array, "H R"], new: Array) -> Array:
    """Overwrites rows of `x`. The indices of one tile differ; those past the end are dropped."""
    write = lambda row, i, n: row.at[i].set(n, mode="drop")  # noqa: E731
    return jax.vmap(write)(x, index, new)


def _read_block(x: Array, start: Int[Array, " H"], block_size: int) -> Array:
    read = lambda row, s: jax.lax.dynamic_slice_in_dim(row, s, block_size)  # noqa: E731
    return jax.vmap(read)(x, start)


def _write_block(x: Array, start: Int[Array, " H"], new: Array) -> Array:
    write = lambda row, s, n: jax.lax.dynamic_update_slice_in_dim(row, n, s, axis=0)  # noqa: E731
    return jax.vmap(write)(x, start, new)
