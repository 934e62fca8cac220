"""KV-outer backward: one pass, five matmuls, dK and dV on chip.

The tiling is the same as in `kv_outer_forward.py`. The rows of a step are the longer side of every
product: scores are [rows, b], and dK and dV accumulate as [D, b] and [E, b] in float32 registers
over the steps of a work item. Every product is therefore wide enough for the matrix unit, and p and
ds pass through shared memory once, without a transpose.

Dataflow of a step: gather q, dout, lse and delta of the pairs; p = 2^(q k^T - lse);
dV^T += dout^T p; ds = p * (dout v^T - delta); dK^T += q^T ds. The partial dq, ds k, is stored in
the slot of the pair, and `merge_partials.sum_gradients` adds the S slots of each token. Partial dq
are scaled by a power of two for each query (`inverse_units`), so that float16 holds them with 11
bits: bfloat16 would round each of the S terms of a sum to 8 bits and double the error of dq.

If a block has a single work item, that item adds its dK and dV to the result. A hot block is split
into several items: each of them writes to a separate buffer, and `sum_blocks` adds these partial
sums in a fixed order. The result is deterministic and needs no atomics.

Flops: 5 * 2 * P * G * b * D (D = E). Device memory: q and dout are gathered once per pair,
P*G*(D+E) elements; partial dq are written, P*G*D; dK and dV are written, b*(D+E) per item, and also
read where they are added to float32 sums.

Shapes: H heads and C tokens of a chunk, P = C*S pairs of a head, G query heads per key head, b keys
of a block, D and E head widths, I work items, X of which belong to split blocks.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.block_attention.backward_inputs import BackwardInputs
from fsa_jax.pallas.block_attention.work_item import Chunk, WorkItem, each_item
from fsa_jax.pallas.block_attention.work_item import arrays as item_arrays
from fsa_jax.pallas.intrinsics import call, dot, iota, load, split, store
from fsa_jax.pallas.online_softmax import softmax_weights
from fsa_jax.pallas.tile_sizes import tile_width
from fsa_jax.pallas.tiles import columns_of, product, rows_mask

#: Widest tile of columns.
COLUMNS = 64
#: Rows of a Hopper matrix product, which leaves fewer registers than one of older matrix units.
WIDE = 64
#: Tokens whose gradients one program of `sum_blocks` writes.
SUM_ROWS = 16
#: Work items of a block whose loads are in flight together: a hot block has many of them in a row.
IN_FLIGHT = 4


def inverse_units(key, value, dout, delta, key_valid, valid):
    """Factor that keeps each query's partial dq / scale within the range of float16.

    |sum over j of p_j (dout . v_j - delta) k_j| <= (|dout|_1 max|v| + |delta|) max|k|, since the
    p_j add up to at most 1. The factor moves this bound to between 2^14 and 2^15. Typical partial
    results are about 2^12 times smaller than the bound; float16 keeps 11 bits for numbers up to
    2^29 times smaller. The factor is a power of two, so it does not change how numbers are rounded:
    it is harmless that keys outside every query's view may determine it.

    Args:
      key: [B, T, K, D].
      value: [B, T, K, E].
      dout: [B, T, N, E].
      delta: float32 [B, T, N].
      key_valid: bool [B, T], False at padding, which may hold any value.
      valid: the same mask for the queries, which may be a part of the sequence.

    Returns:
      float32 [B, T, N]; 0 where the bound is 0, since dq is then 0; NaN where it is not finite.
    """

    def largest(x):
        size = jnp.abs(x.astype(jnp.float32))
        size = jnp.where(jnp.isfinite(size) & key_valid[:, :, None, None], size, 0)
        return jnp.repeat(size.max(axis=(1, 3)), dout.shape[2] // x.shape[2], axis=1)[:, None]

    size = jnp.sum(jnp.abs(dout.astype(jnp.float32)), axis=-1)
    bound = (size * largest(value) + jnp.abs(delta)) * largest(key)
    # clearing the mantissa of a float32 rounds it down to a power of two
    exponent = jax.lax.bitcast_convert_type(bound, jnp.int32) & 0x7F800000
    power = jax.lax.bitcast_convert_type(exponent, jnp.float32)
    inverse = jnp.where(power > 0, 2.0**14 / jnp.where(power > 0, power, 1), 0)
    inverse = jnp.where(jnp.isfinite(bound), inverse, jnp.nan)
    return jnp.where(valid[:, :, None], inverse, 0)


def partial_gradients(chunk: Chunk, inputs: BackwardInputs, inverse, sums, *, tile, partial_dtype):
    """Gradients of the (query, block) pairs of a chunk.

    Args:
      chunk: the heads and tokens to process.
      inputs: the arrays of the backward pass.
      inverse: result of `inverse_units`, float32 [B, T, N].
      sums: dkey [B, T, K, D] and dvalue [B, T, K, E], updated in place for the blocks that have a
        single work item. float32 buffers are added to, so that a head may span several chunks;
        buffers of other dtypes are overwritten.
      tile: `tile_config.Tile`.
      partial_dtype: dtype of the partial dq.

    Returns:
      dkey and dvalue; float32 dK [X*b, D] and dV [X*b, E] of split blocks, unwritten where there
      is no such item; and dq / scale * inverse, [H, P*G, D], unwritten at invalid pairs.
    """
    query, key, value, *_ = inputs
    width, block, scale = key.shape[3], chunk.block, chunk.scale
    sizes = chunk.sizes(query, key) | {"tokens": chunk.tokens}
    group = sizes["group"]
    items, arrays = item_arrays(chunk), (*inputs, inverse)

    def backward_kernel(*refs):
        item_refs, refs = refs[: len(items)], refs[len(items) :]
        query_ref, key_ref, value_ref, dout_ref, lse_ref, delta_ref, inverse_ref, *refs = refs
        _dkey, _dvalue, *refs, part_ref = refs

        def work(number):
            item = WorkItem(item_refs, number, rows=tile.rows, **sizes)
            columns, value_columns = (columns_of(x, COLUMNS) for x in (key, value))
            keys = item.load_block(key_ref, columns)
            values = item.load_block(value_ref, value_columns)

            def step(at, sums):
                dkeys, dvalues = sums
                rows = item.step(at)
                active, token, query_head, slot = rows
                queries = item.load_rows(query_ref, rows, columns)
                douts = item.load_rows(dout_ref, rows, value_columns)
                lses = load(lse_ref.at[item.batch, token, query_head], mask=active)
                deltas = load(delta_ref.at[item.batch, token, query_head], mask=active)
                # This order of the products is the fastest of those that spill no registers.
                dp = product(douts, values)
                p = softmax_weights(product(queries, keys), lses[:, None], scale, key_ref.dtype)
                # Idle rows attend to all keys, but their dout and delta are 0, so they add 0. (A
                # separate loop for the steps that need no mask would spill registers.)
                p = jnp.where(item.sees(token), p, 0.0)
                p_cut = p.astype(dout_ref.dtype)
                dvalues = [x + dot(do, p_cut, (0, 0)) for x, do in zip(dvalues, douts, strict=True)]
                ds = (p * (dp - deltas[:, None])).astype(key_ref.dtype)
                if tile.rows % group and tile.rows >= WIDE:
                    # recomputed: keeping them alive since the loads would cost registers
                    active, token, query_head, slot = item.step(at + item.zero())
                inverses = load(inverse_ref.at[item.batch, token, query_head], mask=active)
                for d, tile_keys in zip(columns, keys, strict=True):
                    part = dot(ds, tile_keys, (1, 0)) * inverses[:, None]
                    store(
                        part_ref.at[slot[:, None], d[None, :]],
                        part.astype(part_ref.dtype),
                        mask=rows_mask(active, d, width),
                    )
                dkeys = [x + dot(q, ds, (0, 0)) for x, q in zip(dkeys, queries, strict=True)]
                return dkeys, dvalues

            zeros = tuple(
                [jnp.zeros((d.size, block), jnp.float32) for d in cut]
                for cut in (columns, value_columns)
            )
            dkeys, dvalues = jax.lax.fori_loop(0, item.steps(), step, zeros)
            # reloaded: keeping the item's fields alive over the loop would cost registers
            item = WorkItem(item_refs, number + item.zero(), rows=tile.rows, **sizes)
            for (sum_ref, split_ref), d, parts, factor in (
                (refs[::2], columns, dkeys, scale),
                (refs[1::2], value_columns, dvalues, 1.0),
            ):
                store_block(item, sum_ref, split_ref, d, [x * factor for x in parts], axis=1)

        each_item(item_refs, chunk.index, work)

    count = chunk.heads * chunk.tokens * chunk.num_selected * group
    part = jax.ShapeDtypeStruct((count, width), partial_dtype)
    *sums, part = call_on_items(backward_kernel, chunk, items, arrays, sums, tile, part)
    return *sums, part.reshape(chunk.heads, -1, width)


def call_on_items(kernel, chunk: Chunk, items, inputs, sums, tile, *more):
    """Calls a kernel in which each program owns a work item.

    Args:
      kernel: takes refs of the item arrays, the inputs, the sums and the results, in this order.
      chunk: the chunk that the items belong to.
      items: the arrays that `work_item.arrays` returns.
      inputs: other input arrays.
      sums: dkey and dvalue, updated in place.
      tile: `tile_config.Tile`.
      *more: shapes of further results.

    Returns:
      The sums, the partial sums of split blocks, float32 [X*b, width], and the further results.
    """
    rows = max(1, chunk.splits) * chunk.block
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sums]
    shapes += [jax.ShapeDtypeStruct((rows, x.shape[3]), jnp.float32) for x in sums]
    before = len(items) + len(inputs)
    return call(
        kernel,
        *items,
        *inputs,
        *sums,
        grid=(chunk.index.programs,),
        out_shape=(*shapes, *more),
        aliases={before: 0, before + 1: 1},
        interpret=chunk.interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def store_block(item, sum_ref, split_ref, columns, sums, axis):
    """Stores an item's dK or dV tiles: in the result if the block is not split, else in its buffer.

    Keys run along axis `axis` of the tiles, columns along the other axis.
    """

    def keys(x):
        return jnp.expand_dims(x, 1 - axis)

    def place(head, d):
        cells = rows_mask(head, d, sum_ref.shape[3])
        return jnp.expand_dims(d, axis), cells if axis == 0 else cells.T

    row = item.split * item.block + iota(item.block)
    for d, part in zip(columns, sums, strict=True):
        d, cut = place(jnp.full(row.shape, item.split >= 0), d)
        store(split_ref.at[keys(row), d], part, mask=cut)
    for d, part in zip(columns, sums, strict=True):
        d, alone = place(item.inside & (item.split < 0), d)
        target = sum_ref.at[item.batch, keys(item.column), item.kv_head, d]
        total = part
        if sum_ref.dtype == jnp.float32:
            total += load(target, mask=alone)
        store(target, total.astype(sum_ref.dtype), mask=alone)


def sum_blocks(chunk: Chunk, token_block_start, dkey_parts, dvalue_parts, sums, *, spacing):
    """Adds up the dK and dV of the work items of split blocks, in item order.

    Args:
      chunk: the chunk that the items belong to.
      token_block_start: int32 [B, T], first token of the block that contains each token; T at
        padding.
      dkey_parts: the float32 dK of split blocks that `partial_gradients` returns.
      dvalue_parts: likewise for dV.
      sums: as in `partial_gradients`, which has already processed the other blocks.
      spacing: as in `query_index.build_index`.

    Bytes: reads the partial sums once, reads the sums if float32, writes the sums; hot blocks only.
    """
    _, length, kv_heads, _ = sums[0].shape
    index, block = chunk.index, chunk.block
    blocks = -(-length // spacing)
    heads = index.block_items.size // blocks

    def sum_blocks_kernel(
        where_ref, items_ref, split_ref, start_ref, dkey_parts_ref, dvalue_parts_ref,
        _dkey, _dvalue, *sum_refs,
    ):  # fmt: skip
        head = pl.program_id(1)
        batch, kv_head = split(where_ref[0] + head, kv_heads)
        token = pl.program_id(0) * SUM_ROWS + iota(SUM_ROWS)
        in_bounds = token < length
        start = load(start_ref.at[batch, token], mask=in_bounds)
        inside = in_bounds & (start < length)
        at = head * blocks + split(start, spacing)[0]
        items = load(items_ref.at[at], mask=inside)
        hot = items > 1
        first_row = load(split_ref.at[at], mask=inside) * block + token - start
        widths = [ref.shape[3] for ref in sum_refs]
        columns = [iota(tile_width(width)) for width in widths]

        def parts(row, active):
            return [
                load(ref.at[row[:, None], d[None, :]], mask=rows_mask(active, d, width))
                for ref, d, width in zip(
                    (dkey_parts_ref, dvalue_parts_ref), columns, widths, strict=True
                )
            ]

        def add(i, totals):
            several = [i * IN_FLIGHT + j for j in range(IN_FLIGHT)]
            for more in [parts(first_row + j * block, hot & (j < items)) for j in several]:
                totals = [total + part for total, part in zip(totals, more, strict=True)]
            return totals

        totals = [jnp.zeros((SUM_ROWS, d.size), jnp.float32) for d in columns]
        most = jnp.max(jnp.where(hot, items, 0))
        totals = jax.lax.fori_loop(0, pl.cdiv(most, IN_FLIGHT), add, totals)
        for ref, d, width, total in zip(sum_refs, columns, widths, totals, strict=True):
            target = ref.at[batch, token[:, None], kv_head, d[None, :]]
            mask = rows_mask(hot, d, width)
            if ref.dtype == jnp.float32:
                total += load(target, mask=mask)
            store(target, total.astype(ref.dtype), mask=mask)

    return call(
        sum_blocks_kernel,
        chunk.where,
        index.block_items,
        index.block_split,
        token_block_start,
        dkey_parts,
        dvalue_parts,
        *sums,
        grid=(-(-length // SUM_ROWS), heads),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sums),
        aliases={6: 0, 7: 1},
        interpret=chunk.interpret,
        num_stages=1,
    )
