"""The kernel of scores: ranks of all blocks for each query and KV head.

A program has R rows (token, head of the group; row r is head r % Gp of token r // Gp) and walks
tiles of BLOCKS blocks. Windows are aligned with blocks by strided loads: for each offset o, the
keys of windows r*j + o of all blocks j of the tile. p from the logsumexp, times the units that such
a window shares with its block, summed over offsets and heads. The last window of each block, if
windows are of two strides, hands the next block its share, through the place where the ranks will
be; others are computed again for each block that they touch. It writes ranks, int32 that order as
the scores do, and the largest rank of each tile.

Flops: T*N*D * M, times (r + q - 1) / r where q is not 2; no rank is computed of a block after the
query. Bytes: K once for each tile of rows, from L2.

Shapes: B rows of the batch, T tokens, N query heads, K key/value heads, G = N/K, Gp = G padded, M
window slots, J blocks of a row, Jp = J padded to BLOCKS; H heads and C tokens of a chunk. r strides
are a block, q a window.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.block_selection.plan import BLOCKS, num_tiles, tile_tokens
from fsa_jax.pallas.intrinsics import barrier, call, iota, load, multiply_add, split, store
from fsa_jax.pallas.online_softmax import softmax_weights
from fsa_jax.pallas.tile_sizes import LARGEST
from fsa_jax.pallas.tiles import columns_of, load_tiles, product, rows_mask

#: Widest tile of columns.
COLUMNS = 128


def rank_blocks(where, query, key, lse, own, first, visible, *, config, scale, plan, interpret):
    """Ranks of the blocks of a chunk.

    `where` int32 [2] is the first (row, KV head) and the first token of the chunk; `own`, `first`
    and `visible`, int32 [B, T], are the token's block, -1 at padding, the slot of the first window
    of its document, and how many windows from there on it sees. The other arguments are those of
    `passes.select_blocks`.

    Returns:
      ranks int32 [H, C, Jp] and the largest of each tile [H, C, Jp/BLOCKS]; -1 where a block is not
      free to be chosen or not to be. Unwritten for easy tokens, and in tiles after a token's last
      free block.
    """
    _, length, query_heads, _ = query.shape
    kv_heads = key.shape[2]
    group = query_heads // kv_heads
    tokens, padded_group = tile_tokens(plan.rows, group, config)
    rows = tokens * padded_group
    per_block = config.block_size // config.kernel_stride
    per_window = config.kernel_size // config.kernel_stride
    # The windows that share units with a block begin at offsets -before .. per_block - 1 from it;
    # of two strides, the one before the block is the last one of the block before.
    before = 0 if plan.hands_over else per_window - 1
    offsets = before + per_block

    def score_kernel(
        where_ref, query_ref, key_ref, lse_ref, own_ref, first_ref, visible_ref, ranks_ref, tops_ref
    ):  # fmt: skip
        # the last tokens have most windows behind them: they start first
        number = pl.num_programs(0) - 1 - pl.program_id(0)
        head = pl.program_id(1)
        batch, kv_head = split(where_ref[0] + head, kv_heads)

        def place(of_tile):
            """Token in the chunk, token in the row, block; that is -1 where there is no token."""
            of_chunk = number * tokens + of_tile
            token = where_ref[1] + of_chunk
            there = (of_chunk < plan.tokens) & (token < length)
            return of_chunk, token, load(own_ref.at[batch, token], mask=there, other=-1)

        # A live token stands at position topk * block_size of its document or behind, which is as
        # far as the tile is long: all live tokens are of one document.
        of_chunk, token, owns = place(iota(tokens))
        live = owns >= config.topk
        slot = jnp.max(load(first_ref.at[batch, token], mask=live))
        seen = load(visible_ref.at[batch, token], mask=live)
        most = jnp.max(seen)
        least = jnp.min(jnp.where(live, seen, LARGEST))
        top = jnp.max(jnp.where(live, owns - config.local_blocks, -1))  # the last free block
        tiles = (top + BLOCKS) // BLOCKS

        of_tile, g = split(iota(rows), padded_group)
        _, row_token, row_owns = place(of_tile)
        row_live = (row_owns >= config.topk) & (g < group)
        row_head = kv_head * group + g
        row_seen = load(visible_ref.at[batch, row_token], mask=row_live)
        lses = load(lse_ref.at[batch, row_token, row_head], mask=row_live)
        lses = jnp.where(lses == -jnp.inf, 0.0, lses)
        lses = jnp.where(row_live, lses, jnp.inf)  # idle rows have no weight: exp(0 - inf) = 0
        columns = columns_of(query, COLUMNS)
        queries = load_tiles(query_ref, batch, row_token, row_head, columns, row_seen > 0)

        def weights(block, offset, masked):
            """Softmax weights [R, BLOCKS] of the windows at an offset from the blocks."""
            window = block * per_block + offset
            inside = (window >= 0) & (window < most)
            at = slot + window
            keys = load_tiles(key_ref, batch, at, kv_head, columns, inside if masked else None)
            p = softmax_weights(product(queries, keys), lses[:, None], scale, query.dtype)
            if masked:
                p = jnp.where(inside[None, :] & (window[None, :] < row_seen[:, None]), p, 0.0)
            return p

        def of_tokens(x):
            """Sums over the heads of each token."""
            if padded_group == 1:
                return x
            return jnp.sum(x.reshape(tokens, padded_group, BLOCKS), axis=1)

        def hand_over(tile, share):
            """Puts the share [tokens, BLOCKS] of each block's last window where `taken` looks."""
            block = tile * BLOCKS + iota(BLOCKS)
            bits = jax.lax.bitcast_convert_type(share, jnp.int32)
            mask = rows_mask(live, block, ranks_ref.shape[2])
            store(ranks_ref.at[head, of_chunk[:, None], block[None, :]], bits, mask=mask)

        def taken(tile, carry):
            """What each block gets of the one before it; `carry` [tokens] is for the first one.

            Also the carry for the next tile.
            """
            barrier()
            of_tile = iota(BLOCKS)[None, :]
            first = tile * BLOCKS
            at = (head, of_chunk[:, None], first + of_tile - 1)
            bits = load(ranks_ref.at[*at], mask=live[:, None] & (of_tile > 0))
            moved = jax.lax.bitcast_convert_type(bits, jnp.float32)
            moved = jnp.where(of_tile == 0, carry[:, None], moved)
            bits = load(ranks_ref.at[head, of_chunk, first + BLOCKS - 1], mask=live)
            barrier()
            return moved, jax.lax.bitcast_convert_type(bits, jnp.float32)

        def finish(tile, score):
            """Stores the ranks of a tile, given the scores of its tokens."""
            block = tile * BLOCKS + iota(BLOCKS)
            # the bits of a float >= 0 order like the number; see `selection_rule.block_ranks`
            rank = jnp.clip(jax.lax.bitcast_convert_type(score, jnp.int32), 0, LARGEST - 1)
            free = block[None, :] <= owns[:, None] - config.local_blocks
            if config.init_blocks:
                free &= block[None, :] >= config.init_blocks
            rank = jnp.where(free, rank, -1)
            mask = rows_mask(live, block, ranks_ref.shape[2])
            store(ranks_ref.at[head, of_chunk[:, None], block[None, :]], rank, mask=mask)
            store(tops_ref.at[head, of_chunk, tile], jnp.max(rank, axis=1), mask=live)

        def walk(carry, count, tile_of, masked):
            """Scores of `count` tiles: one loop over tiles and offsets, so that loads run ahead."""

            def step(number, state):
                i, offset = split(number, offsets)
                tile, offset = tile_of(i), offset - before
                p = weights(tile * BLOCKS + iota(BLOCKS), offset, masked)
                shared = jnp.minimum(offset + per_window, per_block) - jnp.maximum(offset, 0)
                score, carry = state
                score = multiply_add(p, shared.astype(jnp.float32), score)

                def last(score, carry):
                    if plan.hands_over:  # first, since sums of p and of scores do not fit on chip
                        hand_over(tile, of_tokens(p))
                    total = of_tokens(score)
                    if plan.hands_over:
                        moved, carry = taken(tile, carry)
                        total += moved
                    finish(tile, total)
                    return jnp.zeros_like(score), carry

                whole = offset == per_block - 1
                return jax.lax.cond(whole, last, lambda *state: state, score, carry)

            score = jnp.zeros((rows, BLOCKS), jnp.float32)
            return jax.lax.fori_loop(0, count * offsets, step, (score, carry))[1]

        # Tiles begin .. end-1 hold windows that all live tokens see, and need no mask.
        begin = jnp.minimum(min(before, 1), tiles)
        end = jnp.clip(jax.lax.div(least, BLOCKS * per_block), begin, tiles)
        carry = jnp.zeros((tokens,), jnp.float32)
        carry = walk(carry, end - begin, lambda i: begin + i, masked=False)
        behind = lambda i: jnp.where(i < begin, i, end - begin + i)  # noqa: E731
        walk(carry, begin + tiles - end, behind, masked=True)

    tiles = num_tiles(query, key, config)
    return call(
        score_kernel,
        where,
        query,
        key,
        lse,
        own,
        first,
        visible,
        grid=(-(-plan.tokens // tokens), plan.heads),
        out_shape=(
            jax.ShapeDtypeStruct((plan.heads, plan.tokens, tiles * BLOCKS), jnp.int32),
            jax.ShapeDtypeStruct((plan.heads, plan.tokens, tiles), jnp.int32),
        ),
        interpret=interpret,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
