"""Kernels whose programs own query rows: attention to one contiguous range of keys, and its dq.

They serve compressed attention (the keys are the compressed windows that end before a query) and
the sliding window. Row r of a key head is query head r % G of token r // G, so that R consecutive
rows fill a tile for any G, and the heads of a token share every key that is loaded.

Dataflow of a program: R rows of q stay on chip while the program walks the tiles of b keys from the
first to the last key that any row attends to. Tiles to which all rows attend entirely need no mask;
tiles at the edges of the ranges are masked. Tiles to which no row attends are never loaded.

Flops, with V the visible (row, key) pairs: forward 2*V*(D + E), dq 2*V*(2*D + E). Bytes: q, dout
and the result once; K and V once for each row tile, from L2.

Shapes: B sequences, T tokens, N query heads, K key/value heads, G = N/K, M keys, D and E head
widths, R rows and b keys of a tile.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.intrinsics import call, dot, iota, load, split, store
from fsa_jax.pallas.online_softmax import Softmax, Sum, softmax_weights
from fsa_jax.pallas.tiles import columns_of, fold_tiles, load_tiles, product, rows_mask


def attention(query, key, value, visible, query_range, *, plan, scale, interpret):
    """Attention of each query to keys low .. high-1.

    Args:
      query: [B, T, N, D].
      key: [B, M, K, D].
      value: [B, M, K, E].
      visible: (low, high), int32 [B, T]; low >= high is an empty range.
      query_range: (first, end) of the tokens that attend to each key, int32 [B, M]; empty if none.
      plan: `passes.Plan`.
      scale: factor of the logits.
      interpret: run the kernel in interpret mode.

    Returns:
      out [B, T, N, E] in the dtype of `query` and lse float32 [B, T, N], natural logarithm; 0 and
      -inf for a query with an empty range.
    """
    tile = plan.forward
    exact = key.dtype == jnp.float32
    softmax = Softmax(scale, exact)

    def range_forward_kernel(
        query_ref, key_ref, value_ref, low_ref, high_ref, *refs
    ):  # fmt: skip
        query_range_refs, (out_ref, lse_ref) = refs[:2], refs[2:]
        rows = _Rows(query_ref, key_ref, low_ref, high_ref, tile)
        columns, value_columns = (columns_of(x, 128) for x in (key, value))
        queries = rows.load(query_ref, columns)

        def step(start, state, masked):
            row_max, row_sum, out = state
            keys, values = rows.load_keys(
                start, (key_ref, value_ref), (columns, value_columns), query_range_refs, masked
            )
            logits = softmax.signed(product(queries, keys))
            if masked:
                logits = jnp.where(rows.sees(start), logits, -jnp.inf)
            row_max, p, decay = softmax.fold(row_max, logits, whole=not masked)
            p_cut = p.astype(value_ref.dtype)
            out = [
                x.add(dot(p_cut, v, (1, 0)), decay[:, None])
                for x, v in zip(out, values, strict=True)
            ]
            return row_max, row_sum * decay + jnp.sum(p, axis=1), out

        zeros = jnp.zeros((tile.rows,), jnp.float32)
        out = [Sum.zeros((tile.rows, e.size), exact) for e in value_columns]
        row_max, row_sum, out = rows.walk(step, (zeros - jnp.inf, zeros, out))
        row_sum = jnp.where(rows.has_keys, row_sum, 1.0)
        for e, x in zip(value_columns, out, strict=True):
            rows.store(out_ref, softmax.mean(x.total, row_sum), e)
        lse = jnp.where(rows.has_keys, softmax.lse(row_max, row_sum), -jnp.inf)
        store(lse_ref.at[*rows.target], lse, mask=rows.in_bounds)

    return call(
        range_forward_kernel,
        query,
        key,
        value,
        *visible,
        *query_range,
        grid=_grid(query, key, tile.rows),
        out_shape=(
            jax.ShapeDtypeStruct((*query.shape[:3], value.shape[3]), query.dtype),
            jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
        ),
        interpret=interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def query_gradient(
    query, key, value, visible, query_range, lse, delta, dout, *, plan, scale, interpret
):  # fmt: skip
    """Gradient [B, T, N, D] of the queries.

    `lse` is float32 [B, T, N], `delta` = sum(out * dout) - dlse likewise, `dout` [B, T, N, E]; the
    other arguments are those of `attention`.
    """
    tile = plan.query_gradient
    exact = key.dtype == jnp.float32

    def range_query_gradient_kernel(
        query_ref, key_ref, value_ref, low_ref, high_ref, *refs
    ):  # fmt: skip
        query_range_refs, (lse_ref, delta_ref, dout_ref, dquery_ref) = refs[:2], refs[2:]
        rows = _Rows(query_ref, key_ref, low_ref, high_ref, tile)
        columns, value_columns = (columns_of(x, 128) for x in (key, value))
        queries, douts = rows.load(query_ref, columns), rows.load(dout_ref, value_columns)
        lses = load(lse_ref.at[*rows.target], mask=rows.has_keys)
        deltas = load(delta_ref.at[*rows.target], mask=rows.has_keys)

        def step(start, dquery, masked):
            keys, values = rows.load_keys(
                start, (key_ref, value_ref), (columns, value_columns), query_range_refs, masked
            )
            p = softmax_weights(product(queries, keys), lses[:, None], scale, key_ref.dtype)
            if masked:
                p = jnp.where(rows.sees(start), p, 0.0)
            ds = (p * (product(douts, values) - deltas[:, None])).astype(key_ref.dtype)
            return [x.add(dot(ds, k, (1, 0))) for x, k in zip(dquery, keys, strict=True)]

        zeros = [Sum.zeros((tile.rows, d.size), exact) for d in columns]
        for d, x in zip(columns, rows.walk(step, zeros), strict=True):
            rows.store(dquery_ref, x.total * scale, d)

    return call(
        range_query_gradient_kernel,
        query,
        key,
        value,
        *visible,
        *query_range,
        lse,
        delta,
        dout,
        grid=_grid(query, key, tile.rows),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        interpret=interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _grid(query, key, rows):
    batch, length, heads, _ = query.shape
    kv_heads = key.shape[2]
    return (-(-length * (heads // kv_heads) // rows), batch * kv_heads)


class _Rows:
    """The rows of a program.

    Attributes:
      in_bounds: bool [R], which rows exist.
      target: batch index, token [R] and query head [R].
      low, high: int32 [R], the key range of each row.
      has_keys: bool [R], which rows have a non-empty range.
    """

    def __init__(self, query_ref, key_ref, low_ref, high_ref, tile):
        _, length, heads, _ = query_ref.shape
        _, self.keys, kv_heads, _ = key_ref.shape
        self.block = tile.keys
        group = heads // kv_heads
        # the last rows have the most keys, so their programs start first
        number = pl.num_programs(0) - 1 - pl.program_id(0)
        token, g = split(number * tile.rows + iota(tile.rows), group)
        self.batch, self.kv_head = split(pl.program_id(1), kv_heads)
        self.in_bounds = token < length
        self.target = (self.batch, token, self.kv_head * group + g)
        self.low = load(low_ref.at[self.batch, token], mask=self.in_bounds)
        self.high = load(high_ref.at[self.batch, token], mask=self.in_bounds)
        self.has_keys = self.high > self.low

    def load(self, ref, columns):
        """Tiles [R, columns] of the rows, 0 for rows with an empty range."""
        return load_tiles(ref, *self.target, columns, self.has_keys)

    def store(self, ref, x, columns):
        """Stores a tile [R, columns] of results; 0 for rows with an empty range."""
        batch, token, head = self.target
        store(
            ref.at[batch, token[:, None], head[:, None], columns[None, :]],
            jnp.where(self.has_keys[:, None], x, 0.0).astype(ref.dtype),
            mask=rows_mask(self.in_bounds, columns, ref.shape[3]),
        )

    def walk(self, step, state):
        """Folds `step(first key, state, masked)` over the key tiles to which any row attends.

        `masked` is False in tiles that are entirely in every non-empty range; the results of rows
        with an empty range are then arbitrary.
        """
        lows = jnp.where(self.has_keys, self.low, self.keys)
        highs = jnp.where(self.has_keys, self.high, 0)
        first, last = jnp.min(lows), jnp.max(highs)
        all_low = jnp.max(jnp.where(self.has_keys, self.low, 0))
        all_high = jnp.min(jnp.where(self.has_keys, self.high, last))
        begin, end = jnp.minimum(first, last) // self.block, pl.cdiv(last, self.block)
        inner_begin = pl.cdiv(all_low, self.block)
        inner_end = jnp.maximum(all_high // self.block, inner_begin)

        def tile(number, state, masked):
            return step(number * self.block, state, masked)

        return fold_tiles(tile, state, begin, inner_begin, inner_end, end)

    def sees(self, start):
        column = (start + iota(self.block))[None, :]
        return (column >= self.low[:, None]) & (column < self.high[:, None])

    def load_keys(self, start, refs, columns, query_range_refs, masked):
        """Tiles [b, columns] of keys and of values; 0 at keys outside the ranges of all queries."""
        column = start + iota(self.block)
        seen = None
        if masked:
            inside = column < self.keys
            from_token, to_token = (
                load(x.at[self.batch, column], mask=inside) for x in query_range_refs
            )
            seen = inside & (from_token < to_token)
        return [
            load_tiles(ref, self.batch, column, self.kv_head, cut, seen)
            for ref, cut in zip(refs, columns, strict=True)
        ]
