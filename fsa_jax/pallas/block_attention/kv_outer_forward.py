"""KV-outer forward: a program owns a block of keys and walks the queries that selected it.

Tiling. A step takes `rows // G` (query, block) pairs; the G heads of a pair are adjacent rows of
one [rows, D] tile, so that all but the last rows % G rows are used for any G. K and V of the block
stay on chip for all steps of a work item. Head widths are split into power-of-two tiles.

Dataflow of a step: order -> token -> gather q [rows, D] -> q K^T -> softmax within the block ->
p V -> the normalised partial output and its logsumexp, stored in the slot of the pair. No two
programs write the same slot. `merge_partials.py` reads each slot once.

Flops: 2 * P * G * b * (D + E). Device memory, besides K and V once per item: q is gathered once per
pair, P*G*D elements (from L2 where a chunk's queries fit), and partial outputs are written, P*G*E.

Shapes: H heads and C tokens of a chunk, P = C*S pairs of a head, G query heads per key head, b keys
of a block, D and E head widths, I work items.
"""

import jax
import jax.numpy as jnp

from fsa_jax.pallas.block_attention.work_item import Chunk, WorkItem, each_item
from fsa_jax.pallas.block_attention.work_item import arrays as item_arrays
from fsa_jax.pallas.intrinsics import call, dot, store
from fsa_jax.pallas.online_softmax import Softmax
from fsa_jax.pallas.tiles import columns_of, fold_tiles, product, rows_mask

#: Widest tile of columns.
COLUMNS = 128


def partial_attention(chunk: Chunk, query, key, value, *, tile, partial_dtype):
    """Attention of each (query, block) pair of a chunk, restricted to that block.

    Args:
      chunk: the heads and tokens to process.
      query: [B, T, N, D].
      key: [B, T, K, D].
      value: [B, T, K, E].
      tile: `tile_config.Tile`.
      partial_dtype: dtype of the partial outputs.

    Returns:
      out [H, P*G, E] and lse float32 [H, P*G]; head g of a pair is row pair*G + g. Both are
      unwritten at invalid pairs.
    """
    value_width = value.shape[3]
    sizes = chunk.sizes(query, key) | {"tokens": chunk.tokens}
    softmax = Softmax(chunk.scale, exact=key.dtype == jnp.float32)

    def forward_kernel(*refs):
        *item_refs, query_ref, key_ref, value_ref, out_ref, lse_ref = refs

        def work(number):
            item = WorkItem(item_refs, number, rows=tile.rows, **sizes)
            columns, value_columns = (columns_of(x, COLUMNS) for x in (key, value))
            keys = item.load_block(key_ref, columns)
            values = item.load_block(value_ref, value_columns)

            def step(at, _, masked):
                rows = item.step(at)
                active, token, _, slot = rows
                queries = item.load_rows(query_ref, rows, columns)
                logits = softmax.signed(product(queries, keys))
                if masked:
                    logits = jnp.where(item.sees(token), logits, -jnp.inf)
                row_max = softmax.row_max(logits)
                p = softmax.weights(logits, row_max[:, None])
                row_sum = jnp.sum(p, axis=1)
                p = p.astype(value_ref.dtype)
                for e, tile_values in zip(value_columns, values, strict=True):
                    out = softmax.mean(dot(p, tile_values, (1, 0)), row_sum)
                    store(
                        out_ref.at[slot[:, None], e[None, :]],
                        out.astype(out_ref.dtype),
                        mask=rows_mask(active, e, value_width),
                    )
                store(lse_ref.at[slot], softmax.lse(row_max, row_sum), mask=active)
                return ()

            steps = item.steps()
            fold_tiles(step, (), 0, item.steps_at_edge(), steps, steps)

        each_item(item_refs, chunk.index, work)

    slots_of_all = chunk.heads * chunk.tokens * chunk.num_selected * sizes["group"]
    out, lse = call(
        forward_kernel,
        *item_arrays(chunk),
        query,
        key,
        value,
        grid=(chunk.index.programs,),
        out_shape=(
            jax.ShapeDtypeStruct((slots_of_all, value_width), partial_dtype),
            jax.ShapeDtypeStruct((slots_of_all,), jnp.float32),
        ),
        interpret=chunk.interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out.reshape(chunk.heads, -1, value_width), lse.reshape(chunk.heads, -1)
