"""The kernel whose programs own keys: dK and dV of attention to contiguous ranges of keys.

The tokens that see a key are a contiguous range, too, so a program walks the rows from the first to
the last token that sees any of its keys. Rows of steps are as in `query_kernels.py`: query head r %
G of token r // G. Scores are [b, rows], so that p and ds stay in registers for the products that
add to dK [b, D] and dV [b, E]; the G heads of a group are added up with them.

Early keys are seen by many more rows than late ones. So the rows of each tile of keys are cut into
`splits` even parts, a program each; the parts are added in their order afterwards.

Flops, with V the visible (row, key) pairs: 2*V*(2*D + 2*E). Bytes: q and dout once for each tile of
keys, from L2; with more than one split, 4*splits*M*(D + E) bytes of parts, written and read.

Shapes: B rows of the batch, T tokens, N query heads, K key/value heads, G = N/K, M keys, D and E
head widths, R rows and b keys of a tile.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.intrinsics import call, dot, iota, load, split, store
from fsa_jax.pallas.online_softmax import Sum, softmax_weights
from fsa_jax.pallas.tiles import columns_of, fold_tiles, load_tiles, product, rows_mask


def key_gradients(
    query, key, value, seers, lse, delta, dout, *, plan, scale, interpret
):  # fmt: skip
    """Gradients dK [B, M, K, D] and dV [B, M, K, E] in the dtypes of key and value.

    Args are those of `query_kernels.query_gradient`.
    """
    _, keys, kv_heads, _ = key.shape
    batch, _, heads, _ = query.shape
    group = heads // kv_heads
    tile, block = plan.key_gradient, plan.key_gradient.keys
    exact = key.dtype == jnp.float32

    def range_key_gradient_kernel(
        query_ref, key_ref, value_ref, low_ref, high_ref, lse_ref, delta_ref, dout_ref,
        dkey_ref, dvalue_ref,
    ):  # fmt: skip
        # the first keys are seen by most rows: they come first
        column = pl.program_id(0) * block + iota(block)
        part = pl.program_id(1)
        row_of_batch, kv_head = split(pl.program_id(2), kv_heads)
        there = column < keys
        low = load(low_ref.at[row_of_batch, column], mask=there)
        high = load(high_ref.at[row_of_batch, column], mask=there)
        seen = high > low
        columns, value_columns = (columns_of(x, 128) for x in (key, value))
        tiles, value_tiles = (
            load_tiles(ref, row_of_batch, column, kv_head, cut, seen)
            for ref, cut in ((key_ref, columns), (value_ref, value_columns))
        )
        first, last = jnp.min(jnp.where(seen, low, 2**30)), jnp.max(jnp.where(seen, high, 0))

        def step(number, sums, masked):
            token, g = split(first * group + number * tile.rows + iota(tile.rows), group)
            head = kv_head * group + g
            inside = token < last if masked else None
            lses = load(lse_ref.at[row_of_batch, token, head], mask=inside, other=-jnp.inf)
            live = None
            if masked:  # what sees nothing may hold anything, and has no weights
                live = lses > -jnp.inf
                lses = jnp.where(live, lses, jnp.inf)
            at = (row_of_batch, token, head)
            queries = load_tiles(query_ref, *at, columns, live)
            douts = load_tiles(dout_ref, *at, value_columns, live)
            deltas = load(delta_ref.at[*at], mask=live)
            dkeys, dvalues = sums
            p = softmax_weights(product(tiles, queries), lses[None, :], scale, key_ref.dtype)
            if masked:
                # rows, not tokens: their numbers in the tile take no registers
                base, row = first * group + number * tile.rows, iota(tile.rows)[None, :]
                sees = (row >= (low * group - base)[:, None]) & (
                    row < (high * group - base)[:, None]
                )
                p = jnp.where(sees, p, 0.0)
            p_cut = p.astype(dout_ref.dtype)
            dvalues = [
                x.add(dot(p_cut, y, (1, 0))).settled() for x, y in zip(dvalues, douts, strict=True)
            ]
            dp = product(value_tiles, douts)
            ds = (p * (dp - deltas[None, :])).astype(key_ref.dtype)
            dkeys = [
                x.add(dot(ds, y, (1, 0))).settled() for x, y in zip(dkeys, queries, strict=True)
            ]
            return dkeys, dvalues

        # steps that this part takes, and of those the ones whose rows see all of the keys
        steps = pl.cdiv(jnp.maximum(last - first, 0) * group, tile.rows)
        share = pl.cdiv(steps, plan.splits)
        begin = jnp.minimum(part * share, steps)
        end = jnp.minimum(begin + share, steps)
        all_low, all_high = (
            jnp.max(jnp.where(seen, low, 0)),
            jnp.min(jnp.where(seen, high, last)),
        )
        inner_begin = pl.cdiv(jnp.maximum(all_low - first, 0) * group, tile.rows)
        inner_end = jnp.maximum(all_high - first, 0) * group // tile.rows
        inner_begin = jnp.clip(inner_begin, begin, end)
        inner_end = jnp.clip(inner_end, inner_begin, end)

        sums = tuple(
            [Sum.zeros((block, d.size), exact) for d in cut] for cut in (columns, value_columns)
        )
        dkeys, dvalues = fold_tiles(step, sums, begin, inner_begin, inner_end, end)
        for ref, cut, total, factor in (
            (dkey_ref, columns, dkeys, scale),
            (dvalue_ref, value_columns, dvalues, 1.0),
        ):
            for d, x in zip(cut, total, strict=True):
                store(
                    ref.at[part, row_of_batch, column[:, None], kv_head, d[None, :]],
                    jnp.where(seen[:, None], x.total * factor, 0.0).astype(ref.dtype),
                    mask=rows_mask(there, d, ref.shape[4]),
                )

    dtype = key.dtype if plan.splits == 1 else jnp.float32
    parts = call(
        range_key_gradient_kernel,
        query,
        key,
        value,
        *seers,
        lse,
        delta,
        dout,
        grid=(-(-keys // block), plan.splits, batch * kv_heads),
        out_shape=tuple(jax.ShapeDtypeStruct((plan.splits, *x.shape), dtype) for x in (key, value)),
        interpret=interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return tuple(jnp.sum(x, axis=0).astype(key.dtype) for x in parts)
