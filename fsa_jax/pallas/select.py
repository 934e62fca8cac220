"""Block selection from kernels: scores of the blocks, then the best of them.

A query takes the first `init_blocks` and the last `local_blocks` blocks of its document whatever
they score, and free = topk - init_blocks - local_blocks more by score. If it has no more than topk
blocks it takes them all: such an easy query needs no scores. Any other has all the forced blocks,
and they do not overlap, so `free` is one number for all.

Dataflow, for each chunk of (row, KV head) pairs and tokens:

1. `score_kernel`. A program has R rows (token, head of the group; row r is head r % Gp of token
   r // Gp) and walks tiles of BLOCKS blocks. Windows are aligned with blocks by strided loads: for
   each offset o, the keys of windows r*j + o of all blocks j of the tile. p from the logsumexp,
   times the units that such a window shares with its block, summed over offsets and heads. The
   last window of each block, if windows are of two strides, hands the next block its share, through
   the place where the ranks will be; others are computed again for each block that they touch. It
   writes ranks, int32 that order as the scores do, and the largest rank of each tile.
2. `choose_kernel`. A program has some tokens, and keeps the largest ranks of their tiles on chip.
   It takes the best block `free` times: the best tile, then the best block in it, by loading just
   that tile again. Blocks go in the order of (rank descending, number ascending).

Flops: T*N*D * M, times (r + q - 1) / r where q is not 2; no rank is computed of a block after the
query. Bytes: K once for each tile of rows, from L2; ranks: written once, 4 * T*K * J/2, and free *
BLOCKS of J read again.

Shapes: B rows of the batch, T tokens, N query heads, K key/value heads, G = N/K, Gp = G padded, M
window slots, J blocks of a row, Jp = J padded to BLOCKS; H heads and C tokens of a chunk. r strides
are a block, q a window.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from fsa_jax.config import NSAConfig
from fsa_jax.pallas import tile_tables as tuned
from fsa_jax.pallas.common import (
    barrier,
    call,
    columns_of,
    iota,
    load,
    load_tiles,
    multiply_add,
    next_power_of_two,
    product,
    rows_mask,
    softmax_weights,
    split,
    store,
)
from fsa_jax.pallas.tuning import Tile, padded_width, shared_memory
from fsa_jax.semantics.segments import Rows, Windows

#: Blocks of a tile.
BLOCKS = 64
#: Widest tile of columns.
COLUMNS = 128
#: Above every rank and every block number.
LARGEST = 2**31 - 1
#: Most programs of the second axis of a grid.
MOST_HEADS = 65535


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectPlan:
    """Everything static about a call of the kernels.

    Attributes:
      rows: R, a power of two from 16 on, at least G.
      num_warps, num_stages: of the score kernel.
      hands_over: whether a window that two blocks share is computed once, see above.
      heads, tokens: H and C of a chunk.
      choose_tokens: tokens of a program of the second kernel, a power of two.
      choose_warps: its warps.
    """

    rows: int
    num_warps: int
    num_stages: int
    hands_over: bool
    heads: int
    tokens: int
    choose_tokens: int
    choose_warps: int


def make_plan(
    query,
    key,
    config: NSAConfig,
    scratch_bytes: int = 2**29,
    capability: int = 90,
    table: str | None = None,
) -> SelectPlan | None:
    """Sizes from shapes, dtypes, the most bytes of ranks at a time, and the device's capability.

    None if heads are too wide, in groups too large, for the device's shared memory.

    Raises:
      ValueError: `scratch_bytes` does not hold the ranks of one tile of rows.
    """
    batch, length, query_heads, _ = query.shape
    kv_heads = key.shape[2]
    sizes = _tile_sizes(query, key, config, capability)
    if sizes is None:
        return None
    tile = Tile(
        rows=sizes[0],
        num_warps=8 if sizes[0] >= (32 if query.dtype.itemsize == 4 else 128) else 4,
        num_stages=sizes[1],
    )
    tile = tuned.choose("score", table, tile, query, key, key)
    rows = tile.rows
    step = _tile_tokens(rows, query_heads // kv_heads, config)[0]
    tiles = _tiles(query, key, config)
    heads, tokens = _chunk(
        min(scratch_bytes, 2**32),  # offsets of ranks have 32 bits
        batch * kv_heads,
        length,
        step,
        4 * tiles * (BLOCKS + 1),
    )
    # on chip: the largest ranks of all tiles, and a tile of ranks
    choose_tokens = min(16, max(1, 2048 // max(next_power_of_two(tiles), BLOCKS)))
    return SelectPlan(
        rows=rows,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        hands_over=config.kernel_size == 2 * config.kernel_stride,
        heads=heads,
        tokens=tokens,
        choose_tokens=choose_tokens,
        choose_warps=4,
    )


def select_blocks(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B M K D"],
    lse: Float[Array, "B T N"],
    rows: Rows,
    windows: Windows,
    *,
    config: NSAConfig,
    scale: float,
    plan: SelectPlan,
    interpret: bool,
) -> Int[Array, "B T K topk"]:
    """The topk blocks of each query and KV head.

    Args:
      query: float16, bfloat16 or float32.
      key: the compressed keys, M >= 1.
      lse: float32, natural logarithm, of the compressed attention; -inf where no window is seen.
      rows: the documents.
      windows: their compressed windows.
      config: what is selected.
      scale: factor of the logits.
      plan: `make_plan`.
      interpret: run the kernels in interpret mode.

    Returns:
      Block numbers, counted in the query's document, ascending, -1 at the tail and at padding.
    """
    batch, length, _, _ = query.shape
    kv_heads = key.shape[2]
    own = jnp.where(rows.valid, rows.position // config.block_size, -1)
    tokenwise = (own, windows.first, windows.visible)
    static = {"config": config, "plan": plan, "interpret": interpret}

    def step(lists, where):
        ranks, tops = _rank(where, query, key, lse, *tokenwise, scale=scale, **static)
        return _choose(where, own, ranks, tops, lists, **static), None

    lists = jnp.full((batch, length, kv_heads, config.topk), -1, jnp.int32)
    where = jnp.mgrid[0 : batch * kv_heads : plan.heads, 0 : length : plan.tokens]
    where = where.astype(jnp.int32).reshape(2, -1).T
    if where.shape[0] == 1:
        return step(lists, where[0])[0]
    return jax.lax.scan(step, lists, where)[0]


def _rank(where, query, key, lse, own, first, visible, *, config, scale, plan, interpret):
    """Ranks of the blocks of a chunk.

    `where` int32 [2] is the first (row, KV head) and the first token of the chunk; `own`, `first`
    and `visible`, int32 [B, T], are the token's block, -1 at padding, the slot of the first window
    of its document, and how many windows from there on it sees. Others as in `select_blocks`.

    Returns:
      ranks int32 [H, C, Jp] and the largest of each tile [H, C, Jp/BLOCKS]; -1 where a block is not
      free to be chosen or not to be. Unwritten for easy tokens, and in tiles after a token's last
      free block.
    """
    _, length, query_heads, _ = query.shape
    kv_heads = key.shape[2]
    group = query_heads // kv_heads
    tokens, padded_group = _tile_tokens(plan.rows, group, config)
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
            # the bits of a float >= 0 order like the number; see xla.block_ranks
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

    tiles = _tiles(query, key, config)
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


def _choose(where, own, ranks, tops, lists, *, config, plan, interpret):
    """Writes the lists of a chunk into `lists` [B, T, K, topk], in place; others as in `_rank`."""
    _, length, kv_heads, topk = lists.shape
    tokens = plan.choose_tokens
    free = topk - config.init_blocks - config.local_blocks

    def choose_kernel(where_ref, own_ref, ranks_ref, tops_ref, _lists, lists_ref):
        head = pl.program_id(1)
        batch, kv_head = split(where_ref[0] + head, kv_heads)
        of_chunk = pl.program_id(0) * tokens + iota(tokens)
        token = where_ref[1] + of_chunk
        there = (of_chunk < plan.tokens) & (token < length)
        owns = load(own_ref.at[batch, token], mask=there, other=-1)
        live = owns >= topk
        # all blocks of an easy token, the forced ones of the others
        s = iota(next_power_of_two(topk))[None, :]
        forced = (s < config.init_blocks) | (s >= topk - config.local_blocks)
        last = jnp.where(s < config.init_blocks, s, owns[:, None] - (topk - 1 - s))
        number = jnp.where(live[:, None], last, jnp.where(s <= owns[:, None], s, -1))
        mask = there[:, None] & (s < topk) & (forced | ~live[:, None])
        store(lists_ref.at[batch, token[:, None], kv_head, s], number, mask=mask)
        if not free:
            return

        tile = iota(next_power_of_two(tops.shape[2]))[None, :]
        # the last free block is in tile `ends`; easy tokens have no tiles
        ends = jnp.where(live, jax.lax.div(owns - config.local_blocks, BLOCKS), -1)
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
            # the lowest tile that holds the best rank that is left, its lowest such block
            best = jnp.max(tops, axis=1)
            at = jnp.min(jnp.where(tops == best[:, None], tile, LARGEST), axis=1)
            block = (at * BLOCKS)[:, None] + iota(BLOCKS)[None, :]
            rank = load(
                ranks_ref.at[head, of_chunk[:, None], block],
                mask=live[:, None] & (block >= 0),
                other=-1,
            )
            # What is above `best` is taken. Of what equals it, all up to the last block taken.
            left = (block > last[:, None]) | (last_rank != best)[:, None]
            equal = (rank == best[:, None]) & left
            new = jnp.min(jnp.where(equal, block, LARGEST), axis=1)
            left = (rank < best[:, None]) | (equal & (block > new[:, None]))
            rest = jnp.max(jnp.where(left, rank, -1), axis=1)
            tops = jnp.where(tile == at[:, None], rest[:, None], tops)
            # insert: those chosen before that are larger move up by one
            below = jnp.sum((chosen < new[:, None]).astype(jnp.int32), axis=1)
            position += (chosen > new[:, None]).astype(jnp.int32)
            position = jnp.where(s == i, below[:, None], position)
            chosen = jnp.where(s == i, new[:, None], chosen)
            return tops, best, new, chosen, position

        rounds = free * (jnp.max(owns) >= topk).astype(jnp.int32)
        *_, chosen, position = jax.lax.fori_loop(0, rounds, take, (*state, chosen, position))
        position += config.init_blocks
        store(
            lists_ref.at[batch, token[:, None], kv_head, position],
            chosen,
            mask=live[:, None] & (s < free),
        )

    return call(
        choose_kernel,
        where,
        own,
        ranks,
        tops,
        lists,
        grid=(-(-plan.tokens // tokens), plan.heads),
        out_shape=jax.ShapeDtypeStruct(lists.shape, lists.dtype),
        aliases={4: 0},
        interpret=interpret,
        num_warps=plan.choose_warps,
        num_stages=1,
    )


def _tiles(query, key, config: NSAConfig) -> int:
    """Tiles of BLOCKS blocks of a row."""
    length, stride = query.shape[1], config.kernel_stride
    if length // stride != key.shape[1]:
        # The queries are part of the row: that of M windows has less than M + 1 strides.
        length = (key.shape[1] + 1) * stride - 1
    return -(-config.num_blocks(length) // BLOCKS)


def _tile_tokens(rows: int, group: int, config: NSAConfig) -> tuple[int, int]:
    """Tokens of a tile of rows, and rows of a token.

    No more than topk * block_size tokens: then those that need scores are of one document.
    """
    padded_group = next_power_of_two(group)
    tokens = max(1, rows // padded_group)
    while tokens > config.topk * config.block_size:
        tokens //= 2
    return tokens, max(padded_group, 16 // tokens)  # matrix units take at least 16 rows


def _tile_sizes(query, key, config, capability) -> tuple[int, int] | None:
    """Rows of a tile and stages of its pipeline: the most that fit on chip; None if none do."""
    group, itemsize = query.shape[2] // key.shape[2], query.dtype.itemsize
    width = padded_width(key.shape[3])
    least = max(16, next_power_of_two(group))
    # float32 is multiplied without the matrix unit, and holds more registers a row
    most = max(least, 64 if itemsize == 4 else 128)
    # Hopper keeps a buffer more; with 2 stages it has registers for two programs at a time
    for stages in (2, 1) if capability >= 90 else (3, 2, 1):
        for rows in (r for r in (128, 64, 32, 16) if least <= r <= most):
            # q, keys, and ranks on their way from the layout of the matrix unit to device memory
            used = itemsize * width * (rows + stages * BLOCKS)
            used += 4 * BLOCKS * _tile_tokens(rows, group, config)[0] + 1024
            if used <= shared_memory(capability):
                return rows, stages
    return None


def _chunk(budget: int, heads: int, length: int, step: int, token_bytes: int) -> tuple[int, int]:
    """Heads and tokens of a chunk: whole heads where they fit, else part of one head's tokens."""
    whole = -(-length // step) * step
    fit = min(MOST_HEADS, budget // (whole * token_bytes))
    if fit:
        # the largest divisor of the number of heads that fits
        return max(h for h in range(1, fit + 1) if heads % h == 0), whole
    most = budget // (step * token_bytes)  # steps of a chunk
    if not most:
        raise ValueError(
            f"scratch_bytes must hold the ranks of {step} tokens, {step * token_bytes}, "
            f"got {budget}"
        )
    chunks = -(-(whole // step) // most)
    return 1, -(-(whole // step) // chunks) * step
