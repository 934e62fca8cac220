"""Chooses blocks by what the pass over the compressed keys left behind.

A program takes some tokens of a work item and one key head at a time. It sums the folded weights of
the group's heads, rescaled by their logsumexps, into the scores [R, J] of the sequence's blocks
that the item may see. Then it looks for the best `free` blocks of each token:

1. The `free`-th largest of the maxima of `GROUPS` groups of blocks is a lower bound on the score of
   the last chosen block.
2. The candidates that reach the bound, usually not many more than `free`, move to memory, in the
   order of the blocks.
3. A candidate is chosen if fewer than `free` others have a larger score, or the same and a lower
   number.

If a token has more candidates than fit, for example because many scores are equal, the bound is the
score of the last chosen block itself, found by bisection, and of the blocks that just reach it the
first are candidates.

Flops: 2 * T*N * J/2. Bytes: 4 * T*N * J/2 of the fold, read once.

Shapes: B sequences, T tokens, K key/value heads, G query heads of a key head, I work items of a key
head, R tokens of a program, n tiles of BT blocks, J = n * BT.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.config import NSAConfig
from fsa_jax.pallas.compressed_selection.fold import KEYS, MOST_STORED
from fsa_jax.pallas.intrinsics import barrier, call, exp2, iota, load, split, store
from fsa_jax.pallas.range_attention.hopper_layout import ROWS, WARPGROUPS
from fsa_jax.pallas.tile_sizes import LARGEST, next_power_of_two

#: Scores of a warp.
_OF_WARP = 1024
#: Groups of blocks whose maxima bound the scores of the chosen ones.
_GROUPS = 32
#: A block's number in its document is below 2 to this power.
_BLOCK_BITS = 24
#: Programs: several for each multiprocessor.
PROGRAMS = 132 * 8


@dataclasses.dataclass(frozen=True)
class ChoosePlan:
    """Sizes of the kernel.

    Attributes:
      group: G.
      tokens: R, a power of two.
      tiles: n, a power of two.
      num_warps: warps of a program.
      candidates: places for the candidates of a token.
    """

    group: int
    tokens: int
    tiles: int
    num_warps: int
    candidates: int


def make_plan(group: int, most_tiles: int, config: NSAConfig) -> ChoosePlan:
    """Sizes for work items of at most `most_tiles` tiles."""
    tiles = next_power_of_two(most_tiles)
    blocks = tiles * (KEYS * config.kernel_stride // config.block_size)
    tokens = max(1, min(WARPGROUPS * ROWS // group, 4 * _OF_WARP // blocks))
    num_warps = max(1, min(32, tokens * blocks // _OF_WARP))
    free = config.topk - config.init_blocks - config.local_blocks
    return ChoosePlan(group, tokens, tiles, num_warps, max(32, next_power_of_two(2 * free)))


def choose_blocks(
    chunk, base, begin, count, own, first, fold, edges, sums, block_indices, *,
    config, plan, interpret,
):  # fmt: skip
    """Writes the lists of the tokens of a chunk into `block_indices`, in place.

    Args:
      chunk: int32 [3], the first work item, one past the last, and the number of the first step.
      base: int32 [I*B*K], the number of the first step of each item; negative if none of its tokens
        needs scores.
      begin: int32 [B, I], the first tile of keys that an item sees.
      count: int32 [B, I], the number of tiles from there on.
      own: int32 [B, T], the block of each token in its document, -1 at padding.
      first: int32 [B, T], the block of the sequence with which the token's document begins.
      fold: float32 [steps, 2, 64, BT], see `fold_kernel.attend`; unwritten parts may be anything.
      edges: float32 [steps, 2, 64, 2], likewise.
      sums: float32 [B, K, I, 2, 2, 64], likewise.
      block_indices: int32 [B, T, K, topk].
      config: the sizes of the selection.
      plan: `ChoosePlan`.
      interpret: run the kernel in interpret mode.

    Returns:
      The new `block_indices`.
    """
    arrays = (chunk, base, begin, count, own, first, fold, edges, sums, block_indices)
    scratch = jax.ShapeDtypeStruct((PROGRAMS, plan.tokens, 2 * plan.candidates), jnp.int32)

    def compressed_choose_kernel(*refs):
        program = _Program(refs, config, plan)
        units = (refs[0][1] - refs[0][0]) * program.parts
        number = jax.lax.div(units - program.number + PROGRAMS - 1, PROGRAMS)

        def step(i, _):
            program.unit(program.number + i * PROGRAMS)
            return ()

        jax.lax.fori_loop(0, number, step, ())

    return call(
        compressed_choose_kernel,
        *arrays,
        grid=(PROGRAMS,),
        out_shape=(
            jax.ShapeDtypeStruct(block_indices.shape, block_indices.dtype),
            scratch,
            scratch,
        ),
        aliases={len(arrays) - 1: 0},
        interpret=interpret,
        num_warps=plan.num_warps,
        num_stages=2,
    )[0]


class _Program:
    """A program and the work on a unit: R tokens of a work item."""

    def __init__(self, refs, config, plan):
        *refs, _, self.indices_ref, self.rank_ref, self.block_ref = refs
        self.chunk_ref, self.base_ref, self.begin_ref, self.count_ref, *refs = refs
        self.own_ref, self.first_ref, self.fold_ref, self.edge_ref, self.sum_ref = refs
        self.config, self.plan, self.number = config, plan, pl.program_id(0)
        _, self.length, self.kv_heads, self.topk = self.indices_ref.shape
        self.free = config.topk - config.init_blocks - config.local_blocks
        self.per_tile = self.fold_ref.shape[3]
        self.of_item = WARPGROUPS * ROWS // plan.group
        self.parts = self.of_item // plan.tokens

    def unit(self, number):
        """Writes the lists of a unit."""
        item, part = split(number, self.parts)
        item += self.chunk_ref[0]
        back, rest = split(item, self.begin_ref.shape[0] * self.kv_heads)
        batch, kv_head = split(rest, self.kv_heads)
        index = self.begin_ref.shape[1] - 1 - back
        of_item = part * self.plan.tokens + iota(self.plan.tokens)
        token = index * self.of_item + of_item
        inside = token < self.length
        own = load(self.own_ref.at[batch, token], mask=inside, other=-1)
        active = own >= self.topk
        self._store_forced(batch, token, kv_head, own, inside)
        base = self.base_ref[item]
        if not self.free:
            return

        def choose(_, state):
            place = batch, kv_head, index, base - self.chunk_ref[2]
            rank, block = self._ranks(place, token, of_item, own, active)
            self._choose(batch, token, kv_head, active, rank, block)
            return state

        jax.lax.fori_loop(0, (base >= 0).astype(jnp.int32), choose, ())

    def _store_forced(self, batch, token, kv_head, own, inside):
        """The whole list of a token with at most topk blocks, the forced blocks of other tokens."""
        config, topk = self.config, self.topk
        s = iota(next_power_of_two(topk))[None, :]
        forced = (s < config.init_blocks) | (s >= topk - config.local_blocks)
        last = jnp.where(s < config.init_blocks, s, own[:, None] - (topk - 1 - s))
        active = own[:, None] >= topk
        number = jnp.where(active, last, jnp.where(s <= own[:, None], s, -1))
        mask = inside[:, None] & (s < topk) & (forced | ~active)
        store(self.indices_ref.at[batch, token[:, None], kv_head, s], number, mask=mask)

    def _ranks(self, place, token, of_item, own, active):
        """Ranks and numbers of the blocks, int32 [R, J]; rank -1 for those that cannot be chosen.

        The blocks of a tile are in the order of the columns of the fold.
        """
        batch, kv_head, index, step = place
        begin, count = self.begin_ref[batch, index], self.count_ref[batch, index]
        warpgroup, of_group = split(of_item, ROWS // self.plan.group)
        tile, column = iota(self.plan.tiles), iota(self.per_tile)
        exists = active[:, None] & (tile < count)[None, :]
        before = active[:, None] & ((tile > 0) & (tile <= count))[None, :]
        at = step + tile

        def add(head, state):
            """Adds a head's weights to the scores, and to what the tiles hand over."""
            score, carried = state
            row = head * (ROWS // self.plan.group) + of_group
            if self.plan.group > 8:
                row = of_group * self.plan.group + head
            of_row = (batch, kv_head, index, warpgroup)
            row_max = load(self.sum_ref.at[*of_row, 0, row], mask=active)[:, None]
            row_sum = load(self.sum_ref.at[*of_row, 1, row], mask=active, other=1)[:, None]

            def edge(step, which, mask, other):
                ref = self.edge_ref.at[step[None, :], warpgroup[:, None], row[:, None], which]
                return load(ref, mask=mask, other=other)

            factor = exp2(edge(at, 0, exists, -jnp.inf) - row_max) / row_sum
            moved = exp2(edge(at - 1, 0, before, -jnp.inf) - row_max) / row_sum
            carried += moved * edge(at - 1, 1, before, 0)
            ref = self.fold_ref.at[
                at[None, :, None],
                warpgroup[:, None, None],
                row[:, None, None],
                column[None, None, :],
            ]
            fold = load(ref, mask=exists[:, :, None], other=0)
            return score + factor[:, :, None] * fold, carried

        zeros = jnp.zeros((self.plan.tokens, self.plan.tiles), jnp.float32)
        score = jnp.zeros((*zeros.shape, self.per_tile), jnp.float32)
        score, carried = jax.lax.fori_loop(0, self.plan.group, add, (score, zeros))
        score += jnp.where((column == 0)[None, None, :], carried[:, :, None], 0.0)
        # the bits of floats >= 0 have the order of the floats; see `selection_rule.block_ranks`
        rank = jnp.clip(jax.lax.bitcast_convert_type(score, jnp.int32), 0, LARGEST - 1)
        first = load(self.first_ref.at[batch, token], mask=active)
        block = (begin + tile)[:, None] * self.per_tile + self._block_of_column(column)[None, :]
        block = block[None] - first[:, None, None]
        last = jnp.where(active, own - self.config.local_blocks, -1)
        can = (block >= self.config.init_blocks) & (block <= last[:, None, None])
        shape = self.plan.tokens, self.plan.tiles * self.per_tile
        return jnp.where(can, rank, -1).reshape(shape), block.reshape(shape)

    def _block_of_column(self, column):
        """The inverse of `fold.column_of_block`."""
        of_thread = self.per_tile // 4
        step = min(MOST_STORED, of_thread)
        high, rest = split(column, 4 * step)
        thread, low = split(rest, step)
        return thread * of_thread + high * step + low

    def _choose(self, batch, token, kv_head, active, rank, block):
        """Stores the best `free` blocks of each token in ascending order."""
        free, places = self.free, self.plan.candidates
        bound = self._lower_bound(rank)
        mask = (rank >= bound[:, None]).astype(jnp.int32)
        most = jnp.max(jnp.sum(mask, axis=1))
        mask = jax.lax.cond(most > places, lambda: self._exact(rank, block), lambda: mask)
        # idle lanes point to a place of their own, since interpret mode lets them write what is there
        position = jnp.where(mask > 0, jnp.cumsum(mask, axis=1) - 1, places)
        of_unit = iota(self.plan.tokens)
        at = (self.number, of_unit[:, None], position)
        barrier()  # the program has read the candidates of its previous unit
        store(self.rank_ref.at[*at], rank, mask=mask > 0)
        store(self.block_ref.at[*at], block, mask=mask > 0)
        barrier()
        count = jnp.sum(mask, axis=1)

        def candidates(ref, at, other):
            """Candidates of all tokens at [R, ...] places."""
            lead = (slice(None), *(None,) * (at.ndim - 1))
            where = ref.at[self.number, of_unit[lead], at]
            return load(where, mask=at < count[lead], other=other)

        one, two = iota(places)[None, :], iota(places)[None, None, :]
        mine, number = candidates(self.rank_ref, one, -1), candidates(self.block_ref, one, -1)
        others = candidates(self.rank_ref, two, -1)
        numbers = candidates(self.block_ref, two, LARGEST)
        equal = (others == mine[:, :, None]) & (numbers < number[:, :, None])
        better = (others > mine[:, :, None]) | equal
        chosen = (jnp.sum(better.astype(jnp.int32), axis=2) < free) & (mine >= 0)
        barrier()
        at = self.block_ref.at[self.number, of_unit[:, None], one]
        store(at, jnp.where(chosen, number, LARGEST), mask=one < count[:, None])
        barrier()
        numbers = candidates(self.block_ref, two, LARGEST)
        place = jnp.sum((numbers < number[:, :, None]).astype(jnp.int32), axis=2)
        place = jnp.where(chosen, place + self.config.init_blocks, self.topk)
        ref = self.indices_ref.at[batch, token[:, None], kv_head, place]
        store(ref, number, mask=active[:, None] & chosen)

    def _lower_bound(self, rank):
        """A rank that at least `free` blocks of each token reach, int32 [R]."""
        tokens, blocks = rank.shape
        groups = min(_GROUPS, blocks)
        if self.free > groups:
            return jnp.zeros((tokens,), jnp.int32)
        best = jnp.max(rank.reshape(tokens, blocks // groups, groups), axis=1)
        larger = (best[:, None, :] > best[:, :, None]).astype(jnp.int32)
        among = jnp.sum(larger, axis=2) < self.free
        return jnp.maximum(jnp.min(jnp.where(among, best, LARGEST), axis=1), 0)

    def _exact(self, rank, block):
        """Marks exactly the best `free` blocks of each token that has as many."""

        def bisect(bits, enough):
            def step(i, bound):
                higher = bound + jnp.left_shift(jnp.int32(1), bits - 1 - i)
                return jnp.where(enough(higher[:, None]), higher, bound)

            return jax.lax.fori_loop(0, bits, step, jnp.zeros(rank.shape[:1], jnp.int32))

        def count(mask):
            return jnp.sum(mask.astype(jnp.int32), axis=1)

        bound = bisect(31, lambda x: count(rank >= x) >= self.free)[:, None]
        equal, missing = rank == bound, self.free - count(rank > bound)
        last = bisect(_BLOCK_BITS, lambda x: count(equal & (block < x)) < missing)[:, None]
        return ((rank > bound) | (equal & (block <= last))).astype(jnp.int32)
