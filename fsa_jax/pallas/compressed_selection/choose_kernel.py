"""Chooses blocks by what the pass over the compressed keys left behind.

A warp takes one token and one key head at a time. It walks over the segments of 128 blocks from
which the token may choose, and sums the folded weights of the group's heads, rescaled by their
logsumexps, into scores, whose ranks it keeps in scratch memory. Then it looks for the best `free`
blocks:

1. Each lane knows the best of its ranks. The `free`-th largest of these is a lower bound on the
   rank of the last chosen block.
2. The candidates that reach the bound, usually not many more than `free`, move together.
3. A candidate is chosen if fewer than `free` others have a larger rank.

If there are more candidates than places, or several of the rank of the last chosen block, then that
rank is found by bisection, and of the blocks that have it the first ones are candidates.

Flops: 2 * T*N * J/2. Bytes: 4 * T*N * J/2 of the fold, read once, where J is the number of blocks
of a sequence.

Shapes: B sequences, T tokens, K key/value heads, G query heads of a key head, I work items of a key
head, BT blocks of a tile of keys.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.config import NSAConfig
from fsa_jax.pallas.compressed_selection.fold import EDGES, KEYS, MOST_STORED, column_of_block
from fsa_jax.pallas.intrinsics import barrier, call, exp2, iota, load, multiply_add, split, store
from fsa_jax.pallas.range_attention.hopper_layout import ROWS, WARPGROUPS
from fsa_jax.pallas.range_attention.hopper_pipeline import PROGRAMS
from fsa_jax.pallas.tile_sizes import LARGEST, next_power_of_two

#: A warp's lanes, and blocks that follow one another in a lane.
LANES, EACH = 32, MOST_STORED
SEGMENT = LANES * EACH
#: The most programs of a multiprocessor, as many as it runs at once, and the most bytes of the
#: scratch memory of all of them.
RESIDENT, SCRATCH_BYTES = 32, 2**27
#: The most heads whose weights are loaded at once.
HEADS = 8
#: The most by which a tile's row_max may be below that of the tile before, so that what the latter
#: hands over can be rescaled to it in float32.
NEAR = 64
#: Ranks and numbers of blocks are below 2 to these powers.
RANK_BITS, BLOCK_BITS = 31, 24


@dataclasses.dataclass(frozen=True)
class ChoosePlan:
    """Sizes of the kernel.

    Attributes:
      group: G.
      resident: programs of a multiprocessor.
      at_once: segments whose weights are loaded at once.
      blocks: the most blocks that a work item sees, a multiple of SEGMENT.
      candidates: places for candidates, a power of two.
    """

    group: int
    resident: int
    at_once: int
    blocks: int
    candidates: int


def make_plan(group: int, most_tiles: int, config: NSAConfig) -> ChoosePlan:
    """Sizes for work items of at most `most_tiles` tiles."""
    blocks = most_tiles * (KEYS * config.kernel_stride // config.block_size)
    blocks = -(-blocks // SEGMENT) * SEGMENT
    free = config.topk - config.init_blocks - config.local_blocks
    numbers = blocks + 2 * group * most_tiles  # in the scratch memory of a program
    return ChoosePlan(
        group=group,
        resident=max(1, min(RESIDENT, SCRATCH_BYTES // (4 * PROGRAMS * numbers))),
        at_once=2 if group == 1 else 1,
        blocks=blocks,
        candidates=max(LANES, next_power_of_two(2 * free)),
    )


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
      edges: float32 [steps / EDGES, 2, 64, EDGES, 2], likewise.
      sums: float32 [B, K, I, 2, 2, 64], likewise.
      block_indices: int32 [B, T, K, topk].
      config: the sizes of the selection.
      plan: `ChoosePlan`.
      interpret: run the kernel in interpret mode.

    Returns:
      The new `block_indices`.
    """
    arrays = (chunk, base, begin, count, own, first, fold, edges, sums, block_indices)
    programs = PROGRAMS * plan.resident
    # the last segments of a list may be beyond those that it has
    blocks = plan.blocks + plan.at_once * SEGMENT
    tiles = (-(-blocks // fold.shape[3] // LANES) + 1) * LANES
    scratch = [
        jax.ShapeDtypeStruct((programs, blocks), jnp.int32),
        # twice the places, since lanes without a candidate need one more
        jax.ShapeDtypeStruct((programs, 2 * plan.candidates), jnp.int32),
        jax.ShapeDtypeStruct((programs, 2 * plan.group + 1, tiles), jnp.float32),
    ]

    def compressed_choose_kernel(*refs):
        program = _Program(refs, config, plan)
        units = (program.chunk_ref[1] - program.chunk_ref[0]) * program.of_item
        count = jax.lax.div(units - program.number + programs - 1, programs)

        def step(i, state):
            program.unit(program.number + i * programs)
            return state

        jax.lax.fori_loop(0, count, step, ())

    return call(
        compressed_choose_kernel,
        *arrays,
        grid=(PROGRAMS, plan.resident),
        out_shape=(jax.ShapeDtypeStruct(block_indices.shape, jnp.int32), *scratch),
        aliases={len(arrays) - 1: 0},
        interpret=interpret,
        num_warps=1,
        num_stages=1,
    )[0]


class _Program:
    """A program: a warp, and the work on a unit, a token of a work item."""

    def __init__(self, refs, config, plan):
        *refs, self.rank_ref, self.block_ref, self.factor_ref = refs
        *refs, _, self.indices_ref = refs
        self.chunk_ref, self.base_ref, self.begin_ref, self.count_ref, *refs = refs
        self.own_ref, self.first_ref, self.fold_ref, self.edge_ref, self.sum_ref = refs
        self.config, self.plan = config, plan
        # programs of a multiprocessor take tokens that follow one another: they read the same lines
        self.number = pl.program_id(0) * plan.resident + pl.program_id(1)
        _, self.length, self.kv_heads, self.topk = self.indices_ref.shape
        self.free = config.topk - config.init_blocks - config.local_blocks
        self.per_tile = self.fold_ref.shape[3]
        self.of_item = WARPGROUPS * ROWS // plan.group
        # each lane has EACH blocks: then the scatter of candidates exchanges nothing between lanes
        self.of_lane = iota(EACH)[:, None] + (iota(LANES) * EACH)[None, :]

    def unit(self, number):
        """Writes the list of a unit."""
        item, of_item = split(number, self.of_item)
        item += self.chunk_ref[0]
        back, rest = split(item, self.begin_ref.shape[0] * self.kv_heads)
        batch, kv_head = split(rest, self.kv_heads)
        index = self.begin_ref.shape[1] - 1 - back
        token = index * self.of_item + of_item
        inside = token < self.length
        own = load(self.own_ref.at[batch, token], mask=inside, other=-1)
        into = batch, token, kv_head
        self._store_forced(into, own, inside)
        if not self.free:
            return

        def choose(_, state):
            step = self.base_ref[item] - self.chunk_ref[2]
            where = _Place(self, batch, kv_head, index, step, token, of_item, own)
            self._choose(into, where, self._rank(where))
            return state

        jax.lax.fori_loop(0, (own >= self.topk).astype(jnp.int32), choose, ())

    def _store_forced(self, into, own, inside):
        """The whole list of a token with at most topk blocks, the forced blocks of other tokens."""
        config, topk = self.config, self.topk
        s = iota(next_power_of_two(topk))
        forced = (s < config.init_blocks) | (s >= topk - config.local_blocks)
        last = jnp.where(s < config.init_blocks, s, own - (topk - 1 - s))
        active = own >= topk
        number = jnp.where(active, last, jnp.where(s <= own, s, -1))
        store(self.indices_ref.at[*into, s], number, mask=inside & (s < topk) & (forced | ~active))

    def _rank(self, where):
        """Keeps the ranks of all segments; returns the best rank in each place [EACH, LANES]."""
        where.keep_factors()
        barrier()

        (begin, end), at_once = where.segments, self.plan.at_once

        def some(i, best):
            segments = [begin + i * at_once + j for j in range(at_once)]
            # all are loaded before the first is stored
            for segment, rank in zip(segments, [where.ranks(x) for x in segments], strict=True):
                store(self.rank_ref.at[self.number, segment * SEGMENT + self.of_lane], rank)
                best = jnp.maximum(best, rank)
            return best

        none = jnp.full((EACH, LANES), -1, jnp.int32)
        best = jax.lax.fori_loop(0, jax.lax.div(end - begin + at_once - 1, at_once), some, none)
        barrier()
        return best

    def _choose(self, into, where, best):
        """Stores the best `free` blocks in ascending order."""

        def attempt(bound, last):
            """Numbers of the candidates, which of them are chosen, and how many candidates."""
            count = self._gather(where, bound, last)
            barrier()
            one = iota(self.plan.candidates)
            block = load(self.block_ref.at[self.number, one], mask=one < count, other=0)
            rank = load(self.rank_ref.at[self.number, block], mask=one < count, other=-1)
            # sums over the first axis are within a thread
            larger = jnp.sum((rank[:, None] > rank[None, :]).astype(jnp.int32), axis=0)
            chosen = (larger < self.free) & (one < count)
            barrier()
            return block, chosen.astype(jnp.int32), count

        block, chosen, count = attempt(self._lower_bound(best) - 1, jnp.int32(-1))
        # too many, or several of the rank of the last chosen one
        again = (count > self.plan.candidates) | (jnp.sum(chosen) != self.free)
        block, chosen, _ = jax.lax.cond(
            again, lambda: attempt(*self._exact(where)), lambda: (block, chosen, count)
        )
        place = self.config.init_blocks + jnp.cumsum(chosen) - 1
        # idle lanes point outside, since interpret mode lets them write what is there
        place = jnp.where(chosen > 0, place, self.topk)
        store(self.indices_ref.at[*into, place], block + where.first, mask=chosen > 0)

    def _lower_bound(self, best):
        """A rank that at least `free` blocks reach."""
        if 2 * self.free > LANES:
            return _bisect(RANK_BITS, lambda x: jnp.sum((best >= x).astype(jnp.int32)) >= self.free)
        best = jnp.max(best, axis=0)
        larger = jnp.sum((best[:, None] > best[None, :]).astype(jnp.int32), axis=0)
        return jnp.maximum(jnp.min(jnp.where(larger < self.free, best, LARGEST)), 0)

    def _gather(self, where, bound, last):
        """Keeps the numbers of the candidates in ascending order; returns how many there are.

        These are the blocks of a higher rank than `bound`, and those of this rank up to the number
        `last`. Numbers count from the first block of the item; those without a place are only
        counted.
        """
        places = self.plan.candidates

        def move(segment, count):
            block = segment * SEGMENT + self.of_lane
            rank = load(self.rank_ref.at[self.number, block])
            taken = ((rank > bound) | ((rank == bound) & (block <= last))).astype(jnp.int32)
            of_lane = jnp.sum(taken, axis=0)
            first = count + jnp.cumsum(of_lane) - of_lane
            at = first[None, :] + jnp.cumsum(taken, axis=0) - taken
            # idle lanes point to a place of their own, since interpret mode lets them write there
            at = jnp.where(taken > 0, jnp.minimum(at, places), places)
            store(self.block_ref.at[self.number, at], block, mask=at < places)
            return count + jnp.sum(of_lane)

        return where.over_segments(move, jnp.int32(0))

    def _exact(self, where):
        """The rank of the last chosen block, and its number from the first block of the item."""

        def counted(test):
            """The number of blocks of which `test` of rank and number is true."""

            def step(segment, count):
                block = segment * SEGMENT + self.of_lane
                rank = load(self.rank_ref.at[self.number, block])
                return count + jnp.sum(test(rank, block).astype(jnp.int32))

            return where.over_segments(step, jnp.int32(0))

        bound = _bisect(RANK_BITS, lambda x: counted(lambda rank, _: rank >= x) >= self.free)
        missing = self.free - counted(lambda rank, _: rank > bound)
        last = _bisect(
            BLOCK_BITS,
            lambda x: counted(lambda rank, block: (rank == bound) & (block < x)) < missing,
        )
        return bound, last


class _Place:
    """Where a unit's weights are, and the blocks from which its token may choose.

    Attributes:
      segments: the first segment of the item that has such blocks, and one past the last.
    """

    def __init__(self, program, batch, kv_head, index, step, token, of_item, own):
        self.program, self.step, self.own = program, step, own
        warpgroup, of_group = split(of_item, ROWS // program.plan.group)
        self.sums = batch, kv_head, index, warpgroup
        self.count = program.count_ref[batch, index]
        self.warpgroup, self.of_group = warpgroup, of_group
        # number, within the document, of the first block of the item's tiles
        begin = program.begin_ref[batch, index] * program.per_tile
        self.first = begin - program.first_ref[batch, token]
        least = program.config.init_blocks - self.first
        last = own - program.config.local_blocks - self.first
        self.segments = jax.lax.div(jnp.maximum(least, 0), SEGMENT), jax.lax.div(last, SEGMENT) + 1

    def over_segments(self, step, state):
        """Runs step(segment, state) for the segments in turn."""
        begin, end = self.segments
        return jax.lax.fori_loop(begin, end, step, state)

    def keep_factors(self):
        """Keeps the factors of each head's tiles, and what each tile hands over to the next one."""
        program, group, factor_ref = self.program, self.program.plan.group, self.program.factor_ref
        of_segment = SEGMENT // program.per_tile
        begin, end = (x * of_segment for x in self.segments)

        def some_tiles(i, state):
            tile = i * LANES + iota(LANES)
            exists, before = tile < self.count, (tile > 0) & (tile <= self.count)

            def add(head, handed):
                row = self._row(head)
                row_max, inverse = (program.sum_ref[*self.sums, i, row] for i in range(2))

                def edge(step, which, mask, other):
                    many, rest = split(step, EDGES)
                    ref = program.edge_ref.at[many, self.warpgroup, row, rest, which]
                    return load(ref, mask=mask, other=other)

                step = self.step + tile
                top, above = edge(step, 0, exists, -jnp.inf), edge(step - 1, 0, before, -jnp.inf)
                carry = edge(step - 1, 1, before, 0)
                factor = exp2(top - row_max) * inverse
                store(factor_ref.at[program.number, head, tile], factor)
                # Added before they are multiplied, equal scores stay equal. That cannot be if the
                # tile's row_max is far below (masked tiles come first, so it need not rise), nor
                # one past the last tile, which has none.
                near = above - top <= NEAR
                share = jnp.where(near, exp2(above - top), 0.0) * carry
                share = jnp.where(carry > 0, share, 0.0)
                store(factor_ref.at[program.number, group + head, tile], share)
                far = jnp.where(near, 0.0, exp2(above - row_max) * inverse * carry)
                return handed + jnp.where(carry > 0, far, 0.0)

            handed = _over_heads(group, add, jnp.zeros((LANES,), jnp.float32))
            store(factor_ref.at[program.number, 2 * group, tile], handed)
            return state

        begin, end = jax.lax.div(begin, LANES), jax.lax.div(end + LANES - 1, LANES)
        jax.lax.fori_loop(begin, end, some_tiles, ())

    def ranks(self, segment):
        """Ranks [EACH, LANES] of the blocks of a segment; -1 where one cannot be chosen."""
        program, config, group = self.program, self.program.config, self.program.plan.group
        tile, block = split(iota(LANES) * EACH, program.per_tile)
        tile += segment * (SEGMENT // program.per_tile)
        exists = (tile < self.count)[None, :]
        # the compiler must see that it is a multiple of EACH to load a lane's blocks at once
        column = column_of_block(block, KEYS // program.per_tile)
        column = (jax.lax.div(column, EACH) * EACH)[None, :] + iota(EACH)[:, None]
        step = (self.step + tile)[None, :]

        first = (block == 0)[None, :] & (iota(EACH) == 0)[:, None]

        def kept(row):
            return load(program.factor_ref.at[program.number, row, tile])[None, :]

        def add(head, score):
            ref = program.fold_ref.at[step, self.warpgroup, self._row(head), column]
            fold = load(ref, mask=jnp.broadcast_to(exists, column.shape), other=0)
            fold += jnp.where(first, kept(group + head), 0.0)
            return multiply_add(fold, kept(head), score)

        score = jnp.where(first, kept(2 * group), 0.0)
        score = _over_heads(group, add, score)
        # the bits of floats >= 0 have the order of the floats; see `selection_rule.block_ranks`
        rank = jnp.maximum(jax.lax.bitcast_convert_type(score, jnp.int32), 0)
        block = self.first + segment * SEGMENT + program.of_lane
        can = (block >= config.init_blocks) & (block <= self.own - config.local_blocks)
        return jnp.where(can, rank, -1)

    def _row(self, head):
        """The row of a head within the warpgroup's rows; see `hopper_layout`."""
        group = self.program.plan.group
        return (
            head * (ROWS // group) + self.of_group if group <= 8 else self.of_group * group + head
        )


def _over_heads(group, add, state):
    """Runs add(head, state) for the heads of a group in turn, some of them at once."""
    at_once = min(HEADS, group)

    def some(i, state):
        for head in range(at_once):
            state = add(i * at_once + head, state)
        return state

    return jax.lax.fori_loop(0, group // at_once, some, state)


def _bisect(bits, enough):
    """The largest number below 2**bits for which `enough` is true, as for all numbers below it."""

    def step(i, bound):
        higher = bound + jnp.left_shift(jnp.int32(1), bits - 1 - i)
        return jnp.where(enough(higher), higher, bound)

    return jax.lax.fori_loop(0, bits, step, jnp.int32(0))
