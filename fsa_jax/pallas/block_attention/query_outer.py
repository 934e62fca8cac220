"""Query-outer kernels (vanilla NSA): a program owns the G heads of a token and walks its blocks.

They are the baseline for the KV-outer kernels, and faster where G is large. There are no partial
results: the output, its logsumexp and dq are accumulated on chip. dK and dV come from
`kv_outer_key_gradients.py`.

Tiling: the G rows of a token are padded to at least 16, the minimum of a matrix unit. Flops, with
G' the padded G: forward 2 * T*K*S * G' * b * (D + E), dq 2 * T*K*S * G' * b * (2 D + E). Traffic
through L2, independent of G: T*K*S*b*(D+E) elements of K and V.

Shapes: B sequences, T tokens, N query heads, K key/value heads, G = N/K, S slots, b keys of a
block.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.block_attention.backward_inputs import BackwardInputs
from fsa_jax.pallas.intrinsics import call, dot, iota, load, split, store
from fsa_jax.pallas.online_softmax import Softmax, softmax_weights
from fsa_jax.pallas.tile_config import WIDEST
from fsa_jax.pallas.tile_sizes import tile_width
from fsa_jax.pallas.tiles import columns_of, each, load_tiles, product, programs_of, rows_mask


def attention(
    block_starts, query, key, value, offset, *, block, scale, tile, interpret,
    skip=None, out_buffers=None,
):  # fmt: skip
    """Attention of each query to its listed blocks.

    Args:
      block_starts: int32 [B, T, K, S], first token of each listed block, T at entries to ignore.
      query: [B, T, N, D].
      key: [B, T, K, D].
      value: [B, T, K, E].
      offset: int32 [1], position of query token 0 in the key sequence.
      block: b, a power of two.
      scale: factor of the logits.
      tile: `tile_config.Tile`; its `rows` are not used.
      interpret: run the kernel in interpret mode.
      skip: int32 [1] or None; if it is not 0, another kernel has already computed the results.
      out_buffers: the buffers (out, lse) that hold those results; they are then returned unchanged.

    Returns:
      out [B, T, N, E] in the dtype of `query` and lse float32 [B, T, N], natural logarithm.
    """
    given = () if skip is None or out_buffers is None else (skip, *out_buffers)
    softmax = Softmax(scale, exact=key.dtype == jnp.float32)

    tokens, heads = query.shape[1], key.shape[0] * key.shape[2]

    def query_outer_kernel(block_starts_ref, query_ref, key_ref, value_ref, offset_ref, *refs):
        out_ref, lse_ref = refs[-2:]
        batch, kv_head, query_head, in_bounds = _heads(query_ref, key_ref)

        def attend(token):
            columns, value_columns = (columns_of(x, WIDEST) for x in (key, value))
            queries = _load_rows(query_ref, batch, token, query_head, in_bounds, columns)

            def step(slot, state):
                column, seen = _block(
                    block_starts_ref, offset_ref, batch, token, kv_head, slot, block
                )
                keys = load_tiles(key_ref, batch, column, kv_head, columns, seen)
                values = load_tiles(value_ref, batch, column, kv_head, value_columns, seen)
                logits = softmax.signed(product(queries, keys))
                return softmax.attend(state, jnp.where(seen[None, :], logits, -jnp.inf), values)

            rows = query_head.size
            zeros = jnp.zeros((rows,), jnp.float32)
            out = [jnp.zeros((rows, e.size), jnp.float32) for e in value_columns]
            state = (zeros - jnp.inf, zeros, out)
            row_max, row_sum, out = jax.lax.fori_loop(0, block_starts_ref.shape[3], step, state)
            some = row_sum > 0
            row_sum = jnp.where(some, row_sum, 1.0)
            for e, x in zip(value_columns, out, strict=True):
                target = out_ref.at[batch, token, query_head[:, None], e[None, :]]
                mask = rows_mask(in_bounds, e, out_ref.shape[3])
                store(target, softmax.mean(x, row_sum).astype(out_ref.dtype), mask=mask)
            lse = jnp.where(some, softmax.lse(row_max, row_sum), -jnp.inf)
            store(lse_ref.at[batch, token, query_head], lse, mask=in_bounds)

        each(tokens, refs[0][0] == 0 if given else jnp.asarray(True), attend)

    return call(
        query_outer_kernel,
        block_starts,
        query,
        key,
        value,
        offset,
        *given,
        grid=(programs_of(tokens, heads), heads),
        out_shape=(
            jax.ShapeDtypeStruct((*query.shape[:3], value.shape[3]), query.dtype),
            jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
        ),
        aliases={6: 0, 7: 1} if given else None,
        interpret=interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def query_gradient(
    block_starts, inputs: BackwardInputs, offset, *, block, scale, tile, interpret,
    skip=None, out_buffers=None,
):  # fmt: skip
    """Gradient [B, T, N, D] of the queries; the other arguments are those of `attention`.

    If `skip`, int32 [1], is not 0, another kernel has already computed the gradient, and the buffer
    `out_buffers` that holds it is returned unchanged.
    """
    query, key, value, *_ = inputs
    given = () if skip is None else (skip, out_buffers)
    tokens, heads = query.shape[1], key.shape[0] * key.shape[2]

    def query_gradient_kernel(
        block_starts_ref, query_ref, key_ref, value_ref, dout_ref, lse_ref, delta_ref, offset_ref,
        *refs,
    ):  # fmt: skip
        dquery_ref = refs[-1]
        batch, kv_head, query_head, in_bounds = _heads(query_ref, key_ref)

        def differentiate(token):
            columns, value_columns = (columns_of(x, WIDEST) for x in (key, value))
            queries = _load_rows(query_ref, batch, token, query_head, in_bounds, columns)
            douts = _load_rows(dout_ref, batch, token, query_head, in_bounds, value_columns)
            lses = load(lse_ref.at[batch, token, query_head], mask=in_bounds)
            deltas = load(delta_ref.at[batch, token, query_head], mask=in_bounds)

            def step(slot, dquery):
                column, seen = _block(
                    block_starts_ref, offset_ref, batch, token, kv_head, slot, block
                )
                keys = load_tiles(key_ref, batch, column, kv_head, columns, seen)
                values = load_tiles(value_ref, batch, column, kv_head, value_columns, seen)
                p = softmax_weights(product(keys, queries), lses[None, :], scale, key_ref.dtype)
                p = jnp.where(seen[:, None] & in_bounds[None, :], p, 0.0)
                ds = (p * (product(values, douts) - deltas[None, :])).astype(key_ref.dtype)
                return [x + dot(k, ds, (0, 0)) for x, k in zip(dquery, keys, strict=True)]

            zeros = [jnp.zeros((d.size, query_head.size), jnp.float32) for d in columns]
            dquery = jax.lax.fori_loop(0, block_starts_ref.shape[3], step, zeros)
            for d, x in zip(columns, dquery, strict=True):
                target = dquery_ref.at[batch, token, query_head[None, :], d[:, None]]
                mask = rows_mask(in_bounds, d, dquery_ref.shape[3]).T
                store(target, (x * scale).astype(dquery_ref.dtype), mask=mask)

        each(tokens, refs[0][0] == 0 if given else jnp.asarray(True), differentiate)

    return call(
        query_gradient_kernel,
        block_starts,
        *inputs,
        offset,
        *given,
        grid=(programs_of(tokens, heads), heads),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        aliases={9: 0} if given else None,
        interpret=interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _heads(query_ref, key_ref):
    """Batch index and KV head of a program, its (padded) query heads, and which of them exist."""
    kv_heads = key_ref.shape[2]
    group = query_ref.shape[2] // kv_heads
    batch, kv_head = split(pl.program_id(1), kv_heads)
    g = iota(tile_width(group))
    return batch, kv_head, kv_head * group + g, g < group


def _block(block_starts_ref, offset_ref, batch, token, kv_head, slot, block):
    """Tokens of a listed block, and which of them the query attends to."""
    start = block_starts_ref[batch, token, kv_head, slot]
    column = start + iota(block)
    return column, column <= token + offset_ref[0]


def _load_rows(ref, batch, token, query_head, in_bounds, columns):
    """Loads the tiles [G', columns] of the heads of a token."""
    token = jnp.full(query_head.shape, token)
    return load_tiles(ref, batch, token, query_head, columns, in_bounds)
