"""Score kernel: computes the ranks of all blocks for each query and KV head.

A program has R rows (token, head of the group; row r is head r % Gp of token r // Gp) and walks
tiles of BLOCKS blocks. Strided loads align windows with blocks: for each offset o, the program
loads the keys of the windows r*j + o of all blocks j of the tile. It recomputes p from the
logsumexp, multiplies it by the number of strides that such a window shares with its block, and sums
over offsets and heads. If a window is two strides long, the last window of each block is computed
once and its share is passed to the next block, through the memory in which the ranks will be
stored; otherwise windows are recomputed for each block that they overlap. The kernel writes ranks,
which are int32 numbers in the same order as the scores, and the largest rank of each tile.

Flops: T*N*D * M, times (r + q - 1) / r if q is not 2; blocks after the query are not ranked. Bytes:
K once for each row tile, from L2.

Shapes: B sequences, T tokens, N query heads, K key/value heads, G = N/K, Gp = G padded, M window
slots, J blocks of a sequence, Jp = J padded to BLOCKS; H heads and C tokens of a chunk. A block is
r strides long, a window q strides.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.config import NSAConfig
from fsa_jax.pallas.block_selection.plan import BLOCKS, SelectPlan, num_tiles, tile_tokens
from fsa_jax.pallas.intrinsics import barrier, call, iota, load, multiply_add, split, store
from fsa_jax.pallas.online_softmax import softmax_weights
from fsa_jax.pallas.tile_sizes import LARGEST
from fsa_jax.pallas.tiles import columns_of, load_tiles, product, rows_mask

#: Widest tile of columns.
COLUMNS = 128


def rank_blocks(where, query, key, lse, own, first, visible, *, config, scale, plan, interpret):
    """Computes the ranks of the blocks of a chunk.

    `where` int32 [2] is the first (sequence, KV head) pair and the first token of the chunk. `own`,
    `first` and `visible`, int32 [B, T], are the token's block (-1 at padding), the slot of the
    first window of its document, and the number of windows from there on that it attends to. The
    other arguments are those of `passes.select_blocks`.

    Returns:
      ranks int32 [H, C, Jp] and the largest rank of each tile [H, C, Jp/BLOCKS]; -1 at blocks that
      are not candidates because they are forced or after the query. Both are unwritten for tokens
      with at most topk blocks, and in tiles after a token's last free block.
    """
    sizes = _Sizes(config, plan, query.shape, key.shape[2], scale)

    def score_kernel(*refs):
        program = _Program(sizes, *refs)
        # All active tokens attend to all windows of tiles begin .. end-1, which need no mask.
        tiles = program.tiles
        begin = jnp.minimum(min(sizes.before, 1), tiles)
        end = jnp.clip(jax.lax.div(program.least, BLOCKS * sizes.per_block), begin, tiles)
        carry = jnp.zeros((sizes.tokens,), jnp.float32)
        carry = program.walk(carry, end - begin, lambda i: begin + i, masked=False)
        behind = lambda i: jnp.where(i < begin, i, end - begin + i)  # noqa: E731
        program.walk(carry, begin + tiles - end, behind, masked=True)

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
        grid=(-(-plan.tokens // sizes.tokens), plan.heads),
        out_shape=(
            jax.ShapeDtypeStruct((plan.heads, plan.tokens, tiles * BLOCKS), jnp.int32),
            jax.ShapeDtypeStruct((plan.heads, plan.tokens, tiles), jnp.int32),
        ),
        interpret=interpret,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Static sizes of a program."""

    config: NSAConfig
    plan: SelectPlan
    query_shape: tuple[int, ...]
    kv_heads: int
    scale: float

    @property
    def group(self) -> int:
        return self.query_shape[2] // self.kv_heads

    @property
    def tokens(self) -> int:
        """Number of tokens of a program."""
        return tile_tokens(self.plan.rows, self.group, self.config)[0]

    @property
    def padded_group(self) -> int:
        """Number of rows of a token."""
        return tile_tokens(self.plan.rows, self.group, self.config)[1]

    @property
    def rows(self) -> int:
        return self.tokens * self.padded_group

    @property
    def per_block(self) -> int:
        """Number of strides of a block."""
        return self.config.block_size // self.config.kernel_stride

    @property
    def per_window(self) -> int:
        """Number of strides of a window."""
        return self.config.kernel_size // self.config.kernel_stride

    @property
    def before(self) -> int:
        """Windows that overlap a block begin at offsets -before .. per_block - 1 from it.

        This is 0 for windows of two strides, since the previous block then hands over the share of
        its last window.
        """
        return 0 if self.plan.hands_over else self.per_window - 1


class _Program:
    """The rows of a program, and the operations on a tile of blocks.

    An active token is one that needs scores: it is at position topk * block_size of its document or
    later. A row tile has at most that many tokens, so all its active tokens belong to one document.

    Attributes:
      tiles: number of tiles that contain blocks from which an active token may choose.
      least, most: smallest and largest number of windows that an active token attends to.
    """

    def __init__(
        self, sizes, where_ref, query_ref, key_ref, lse_ref, own_ref, first_ref, visible_ref,
        ranks_ref, tops_ref,
    ):  # fmt: skip
        self.sizes, config = sizes, sizes.config
        self.where_ref, self.own_ref, self.key_ref = where_ref, own_ref, key_ref
        self.ranks_ref, self.tops_ref = ranks_ref, tops_ref
        # the last tokens have the most windows before them, so their programs start first
        self.number = pl.num_programs(0) - 1 - pl.program_id(0)
        self.head = pl.program_id(1)
        self.batch, self.kv_head = split(where_ref[0] + self.head, sizes.kv_heads)

        self.of_chunk, token, self.owns = self._place(iota(sizes.tokens))
        self.active = self.owns >= config.topk
        self.slot = jnp.max(load(first_ref.at[self.batch, token], mask=self.active))
        seen = load(visible_ref.at[self.batch, token], mask=self.active)
        self.most = jnp.max(seen)
        self.least = jnp.min(jnp.where(self.active, seen, LARGEST))
        # the last free block
        top = jnp.max(jnp.where(self.active, self.owns - config.local_blocks, -1))
        self.tiles = (top + BLOCKS) // BLOCKS

        of_tile, g = split(iota(sizes.rows), sizes.padded_group)
        _, row_token, row_owns = self._place(of_tile)
        row_active = (row_owns >= config.topk) & (g < sizes.group)
        row_head = self.kv_head * sizes.group + g
        self.row_seen = load(visible_ref.at[self.batch, row_token], mask=row_active)
        lses = load(lse_ref.at[self.batch, row_token, row_head], mask=row_active)
        lses = jnp.where(lses == -jnp.inf, 0.0, lses)
        # idle rows get weights of exp(0 - inf) = 0
        self.lses = jnp.where(row_active, lses, jnp.inf)
        self.columns = columns_of(query_ref, COLUMNS)
        self.queries = load_tiles(
            query_ref, self.batch, row_token, row_head, self.columns, self.row_seen > 0
        )

    def _place(self, of_tile):
        """Token within the chunk, token within the sequence, and its block; -1 without a token."""
        of_chunk = self.number * self.sizes.tokens + of_tile
        token = self.where_ref[1] + of_chunk
        in_bounds = (of_chunk < self.sizes.plan.tokens) & (token < self.sizes.query_shape[1])
        return of_chunk, token, load(self.own_ref.at[self.batch, token], mask=in_bounds, other=-1)

    def weights(self, block, offset, masked):
        """Softmax weights [R, BLOCKS] of the windows at an offset from the blocks."""
        window = block * self.sizes.per_block + offset
        inside = (window >= 0) & (window < self.most)
        at = self.slot + window
        keys = load_tiles(
            self.key_ref, self.batch, at, self.kv_head, self.columns, inside if masked else None
        )
        p = softmax_weights(
            product(self.queries, keys), self.lses[:, None], self.sizes.scale, self.key_ref.dtype
        )
        if masked:
            p = jnp.where(inside[None, :] & (window[None, :] < self.row_seen[:, None]), p, 0.0)
        return p

    def of_tokens(self, x):
        """Sums x [R, BLOCKS] over the heads of each token."""
        if self.sizes.padded_group == 1:
            return x
        return jnp.sum(x.reshape(self.sizes.tokens, self.sizes.padded_group, BLOCKS), axis=1)

    def hand_over(self, tile, share):
        """Stores the share [tokens, BLOCKS] of each block's last window, for `taken` to load."""
        block = tile * BLOCKS + iota(BLOCKS)
        bits = jax.lax.bitcast_convert_type(share, jnp.int32)
        mask = rows_mask(self.active, block, self.ranks_ref.shape[2])
        at = (self.head, self.of_chunk[:, None], block[None, :])
        store(self.ranks_ref.at[*at], bits, mask=mask)

    def taken(self, tile, carry):
        """The share that each block takes over from the previous block, and the next tile's carry.

        `carry` [tokens] is the share of the first block of the tile.
        """
        barrier()
        of_tile = iota(BLOCKS)[None, :]
        first = tile * BLOCKS
        at = (self.head, self.of_chunk[:, None], first + of_tile - 1)
        bits = load(self.ranks_ref.at[*at], mask=self.active[:, None] & (of_tile > 0))
        moved = jax.lax.bitcast_convert_type(bits, jnp.float32)
        moved = jnp.where(of_tile == 0, carry[:, None], moved)
        at = (self.head, self.of_chunk, first + BLOCKS - 1)
        bits = load(self.ranks_ref.at[*at], mask=self.active)
        barrier()
        return moved, jax.lax.bitcast_convert_type(bits, jnp.float32)

    def finish(self, tile, score):
        """Stores the ranks of a tile, given its scores [tokens, BLOCKS]."""
        config = self.sizes.config
        block = tile * BLOCKS + iota(BLOCKS)
        # the bits of floats >= 0 have the order of the floats; see `selection_rule.block_ranks`
        rank = jnp.clip(jax.lax.bitcast_convert_type(score, jnp.int32), 0, LARGEST - 1)
        free = block[None, :] <= self.owns[:, None] - config.local_blocks
        if config.init_blocks:
            free &= block[None, :] >= config.init_blocks
        rank = jnp.where(free, rank, -1)
        mask = rows_mask(self.active, block, self.ranks_ref.shape[2])
        at = (self.head, self.of_chunk[:, None], block[None, :])
        store(self.ranks_ref.at[*at], rank, mask=mask)
        top_ref = self.tops_ref.at[self.head, self.of_chunk, tile]
        store(top_ref, jnp.max(rank, axis=1), mask=self.active)

    def walk(self, carry, count, tile_of, masked):
        """Scores `count` tiles, in one loop over tiles and offsets so that loads are pipelined."""
        sizes = self.sizes
        offsets = sizes.before + sizes.per_block

        def step(number, state):
            i, offset = split(number, offsets)
            tile, offset = tile_of(i), offset - sizes.before
            p = self.weights(tile * BLOCKS + iota(BLOCKS), offset, masked)
            shared = jnp.minimum(offset + sizes.per_window, sizes.per_block)
            shared -= jnp.maximum(offset, 0)
            score, carry = state
            score = multiply_add(p, shared.astype(jnp.float32), score)

            def last(score, carry):
                if sizes.plan.hands_over:  # before the sum of scores: both do not fit on chip
                    self.hand_over(tile, self.of_tokens(p))
                total = self.of_tokens(score)
                if sizes.plan.hands_over:
                    moved, carry = self.taken(tile, carry)
                    total += moved
                self.finish(tile, total)
                return jnp.zeros_like(score), carry

            whole = offset == sizes.per_block - 1
            return jax.lax.cond(whole, last, lambda *state: state, score, carry)

        score = jnp.zeros((sizes.rows, BLOCKS), jnp.float32)
        return jax.lax.fori_loop(0, count * offsets, step, (score, carry))[1]
