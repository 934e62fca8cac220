"""Top-k kernel: selects the best blocks of each query and KV head by their ranks.

A program has several tokens and keeps the largest rank of each of their tiles on chip. It selects
the best block `free` times: it finds the best tile, reloads only that tile, and takes the best
block in it. Blocks are ordered by (rank descending, number ascending).

Shapes: B sequences, T tokens, K key/value heads; see `score_kernel`.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.block_selection.plan import BLOCKS
from fsa_jax.pallas.intrinsics import call, iota, load, split, store
from fsa_jax.pallas.tile_sizes import LARGEST, next_power_of_two


def choose_blocks(where, own, ranks, tops, block_indices, *, config, plan, interpret):
    """Writes the lists of a chunk into `block_indices` [B, T, K, topk], in place.

    The other arguments are those of `score_kernel.rank_blocks` and its results.
    """
    _, length, kv_heads, topk = block_indices.shape
    tokens = plan.choose_tokens
    free = topk - config.init_blocks - config.local_blocks

    def choose_kernel(where_ref, own_ref, ranks_ref, tops_ref, _block_indices, block_indices_ref):
        head = pl.program_id(1)
        batch, kv_head = split(where_ref[0] + head, kv_heads)
        of_chunk = pl.program_id(0) * tokens + iota(tokens)
        token = where_ref[1] + of_chunk
        in_bounds = (of_chunk < plan.tokens) & (token < length)
        owns = load(own_ref.at[batch, token], mask=in_bounds, other=-1)
        active = owns >= topk
        # all blocks of a token that has at most topk blocks, the forced blocks of other tokens
        s = iota(next_power_of_two(topk))[None, :]
        forced = (s < config.init_blocks) | (s >= topk - config.local_blocks)
        last = jnp.where(s < config.init_blocks, s, owns[:, None] - (topk - 1 - s))
        number = jnp.where(active[:, None], last, jnp.where(s <= owns[:, None], s, -1))
        mask = in_bounds[:, None] & (s < topk) & (forced | ~active[:, None])
        store(block_indices_ref.at[batch, token[:, None], kv_head, s], number, mask=mask)
        if not free:
            return

        tile = iota(next_power_of_two(tops.shape[2]))[None, :]
        # the last free block is in tile `ends`; tokens with at most topk blocks have no tiles
        ends = jnp.where(active, jax.lax.div(owns - config.local_blocks, BLOCKS), -1)
        state = (
            load(tops_ref.at[head, of_chunk[:, None], tile], mask=tile <= ends[:, None], other=-1),
            jnp.full((tokens,), -1, jnp.int32),
            jnp.full((tokens,), -1, jnp.int32),
        )
        s = iota(next_power_of_two(free))[None, :]
        chosen = jnp.full((tokens, s.size), LARGEST, jnp.int32)
        position = jnp.broadcast_to(s, chosen.shape)

        def take(i, state):
            tops, last_rank, last, chosen, position = state
            # the first tile that contains the best remaining rank, and its first such block
            best = jnp.max(tops, axis=1)
            at = jnp.min(jnp.where(tops == best[:, None], tile, LARGEST), axis=1)
            block = (at * BLOCKS)[:, None] + iota(BLOCKS)[None, :]
            rank = load(
                ranks_ref.at[head, of_chunk[:, None], block],
                mask=active[:, None] & (block >= 0),
                other=-1,
            )
            # Blocks ranked above `best` are taken, as are equal ones up to the last block taken.
            left = (block > last[:, None]) | (last_rank != best)[:, None]
            equal = (rank == best[:, None]) & left
            new = jnp.min(jnp.where(equal, block, LARGEST), axis=1)
            left = (rank < best[:, None]) | (equal & (block > new[:, None]))
            rest = jnp.max(jnp.where(left, rank, -1), axis=1)
            tops = jnp.where(tile == at[:, None], rest[:, None], tops)
            # insertion: blocks chosen earlier with a larger number move up by one
            below = jnp.sum((chosen < new[:, None]).astype(jnp.int32), axis=1)
            position += (chosen > new[:, None]).astype(jnp.int32)
            position = jnp.where(s == i, below[:, None], position)
            chosen = jnp.where(s == i, new[:, None], chosen)
            return tops, best, new, chosen, position

        rounds = free * (jnp.max(owns) >= topk).astype(jnp.int32)
        *_, chosen, position = jax.lax.fori_loop(0, rounds, take, (*state, chosen, position))
        position += config.init_blocks
        store(
            block_indices_ref.at[batch, token[:, None], kv_head, position],
            chosen,
            mask=active[:, None] & (s < free),
        )

    return call(
        choose_kernel,
        where,
        own,
        ranks,
        tops,
        block_indices,
        grid=(-(-plan.tokens // tokens), plan.heads),
        out_shape=jax.ShapeDtypeStruct(block_indices.shape, block_indices.dtype),
        aliases={4: 0},
        interpret=interpret,
        num_warps=plan.choose_warps,
        num_stages=1,
    )
