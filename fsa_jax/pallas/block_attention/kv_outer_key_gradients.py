"""KV-outer kernel for dK and dV only, for groups so large that other kernels compute dq.

Work items and the order of summation are the same as in `kv_outer_backward.py`. Scores, however,
are [b, rows], as in `key_kernel.py`: p and ds stay in registers for the products that accumulate
dV [b, E] and dK [b, D], and only q and dout are read from shared memory, in the layout in which
they were copied there.

Flops: 4 * 2 * P * G * b * D (D = E). Device memory: q and dout are gathered once per pair,
P*G*(D+E) elements; dK and dV are written, b*(D+E) per item, and also read where they are added to
float32 sums.

Shapes: P pairs of a head, G query heads per key head, b keys of a block, D and E head widths, R
rows of a step, X work items of split blocks.
"""

import jax
import jax.numpy as jnp

from fsa_jax.pallas.block_attention.backward_inputs import BackwardInputs
from fsa_jax.pallas.block_attention.kv_outer_backward import call_on_items, store_block
from fsa_jax.pallas.block_attention.work_item import Chunk, WorkItem, each_item
from fsa_jax.pallas.block_attention.work_item import arrays as item_arrays
from fsa_jax.pallas.intrinsics import dot, load
from fsa_jax.pallas.online_softmax import Sum, softmax_weights
from fsa_jax.pallas.tiles import columns_of, product

#: Widest tile of columns.
COLUMNS = 128


def key_gradients(chunk: Chunk, inputs: BackwardInputs, sums, *, tile):
    """Key and value gradients of the pairs of a chunk.

    Arguments and results are those of `kv_outer_backward.partial_gradients`, without dq.
    """
    query, key, value, *_ = inputs
    block, scale, sizes = chunk.block, chunk.scale, chunk.sizes(query, key)
    group = sizes["group"]
    items = item_arrays(chunk)

    def block_key_gradient_kernel(*refs):
        item_refs, refs = refs[: len(items)], refs[len(items) :]
        query_ref, key_ref, value_ref, dout_ref, lse_ref, delta_ref, _dkey, _dvalue, *refs = refs

        def work(number):
            item = WorkItem(item_refs, number, rows=tile.rows, **sizes)
            columns, value_columns = (columns_of(x, COLUMNS) for x in (key, value))
            keys = item.load_block(key_ref, columns)
            values = item.load_block(value_ref, value_columns)

            def step(at, sums, masked):
                dkeys, dvalues = sums
                rows = item.step(at)
                active, token, query_head, _ = rows
                queries = item.load_rows(query_ref, rows, columns)
                douts = item.load_rows(dout_ref, rows, value_columns)
                lses = load(lse_ref.at[item.batch, token, query_head], mask=active)
                p = softmax_weights(product(keys, queries), lses[None, :], scale, key_ref.dtype)
                # idle rows attend to all keys, but their dout and delta are 0, so they add 0
                if masked:
                    p = jnp.where(item.seen_by(token), p, 0.0)
                p_cut = p.astype(dout_ref.dtype)
                dvalues = [
                    x.add(dot(p_cut, y, (1, 0))).await_mma()
                    for x, y in zip(dvalues, douts, strict=True)
                ]
                deltas = load(delta_ref.at[item.batch, token, query_head], mask=active)
                ds = (p * (product(values, douts) - deltas[None, :])).astype(key_ref.dtype)
                dkeys = [
                    x.add(dot(ds, y, (1, 0))).await_mma()
                    for x, y in zip(dkeys, queries, strict=True)
                ]
                return dkeys, dvalues

            sums = tuple(
                [Sum.zeros((block, d.size), exact=False) for d in cut]
                for cut in (columns, value_columns)
            )
            steps = item.steps()
            # steps that need no mask get a second loop if the registers suffice for two loops
            edge = steps if group < 8 or tile.rows % group else item.steps_at_edge()
            sums = jax.lax.fori_loop(0, edge, lambda i, x: step(i, x, True), sums)
            if edge is not steps:
                sums = jax.lax.fori_loop(edge, steps, lambda i, x: step(i, x, False), sums)
            # reloaded: keeping the item's fields alive over the loop would cost registers
            item = WorkItem(item_refs, number + item.zero(), rows=tile.rows, **sizes)
            for (sum_ref, split_ref), d, parts, factor in (
                (refs[::2], columns, sums[0], scale),
                (refs[1::2], value_columns, sums[1], 1.0),
            ):
                store_block(item, sum_ref, split_ref, d, [x.total * factor for x in parts], axis=0)

        each_item(item_refs, chunk.index, work)

    return call_on_items(block_key_gradient_kernel, chunk, items, inputs, sums, tile)
