"""Segmented reduction: merges the S partial results of each token with an online softmax.

A tile consists of several rows (token, head of the group) of one KV head. A program walks the slots
of a tile, SLOTS at a time, so that as many loads are in flight at once; the kernel is bound by
memory bandwidth. The S*G*E partial results of a token are contiguous, and each is read once. Bytes
per head: P*G*E partial results and their logsumexp are read, C*G*E results are written; the cost of
the arithmetic is negligible.

Shapes: H heads and C tokens of a chunk, S slots, P = C*S, G query heads per key head, E head width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.intrinsics import LOG2_E, call, exp2, iota, load, split, store
from fsa_jax.pallas.tile_sizes import next_power_of_two
from fsa_jax.pallas.tiles import each, programs_of, rows_mask

#: Slots whose loads are in flight together.
SLOTS = 16
#: Enough programs to balance the load on any GPU; the programs of these kernels are short.
ENOUGH_PROGRAMS = 4096


def merge_outputs(
    where, block_starts, part, part_lse, out, lse, skip, *, kv_heads, elements, interpret
):  # fmt: skip
    """Merges outputs: lse = log(sum of exp(lse_s)), out = sum of exp(lse_s - lse) out_s.

    Args:
      where: int32 [2], first (sequence, KV head) pair and first token of the chunk.
      block_starts: int32 [H, C, S], the block lists; entries >= T are ignored.
      part: [H, P*G, E], partial outputs of `kv_outer_forward.partial_attention`.
      part_lse: [H, P*G], their logsumexp.
      out: [B, T, N, E], updated in place at the chunk's tokens and heads; 0 for a query without
        valid entries.
      lse: float32 [B, T, N], natural logarithm, likewise; -inf for a query without valid entries.
      skip: int32 [1]; if it is not 0, nothing is written.
      kv_heads: K.
      elements: number of results in the tile of a program.
      interpret: run the kernel in interpret mode.
    """
    tiles, heads = _tiles(block_starts, out, kv_heads, elements)

    def merge_kernel(
        where_ref, block_starts_ref, part_ref, part_lse_ref, _out, _lse, skip_ref, out_ref, lse_ref
    ):  # fmt: skip
        head, e = pl.program_id(1), iota(next_power_of_two(out.shape[3]))

        def merge(number):
            place = _Place(where_ref, block_starts_ref, out_ref, kv_heads, elements, number, head)
            zeros = jnp.zeros((place.rows,), jnp.float32)
            state = (zeros - jnp.inf, zeros, jnp.zeros((place.rows, e.size), jnp.float32))
            row_max, row_sum, result = place.walk(functools.partial(add, place), state)
            some = row_sum > 0
            row_sum = jnp.where(some, row_sum, 1.0)
            place.store(out_ref, result / row_sum[:, None], e)
            result_lse = jnp.where(some, row_max + jnp.log(row_sum), -jnp.inf)
            store(lse_ref.at[*place.target], result_lse, mask=place.in_bounds)

        def add(place, state, slots):
            row_max, row_sum, result = state
            lses = [
                jnp.where(active, load(part_lse_ref.at[place.head, at], mask=active), -jnp.inf)
                for at, active in slots
            ]
            new_max = row_max
            for lse in lses:
                new_max = jnp.maximum(new_max, lse)
            # before the first valid slot, weights and decay are 2^-inf = 0
            safe = jnp.where(new_max == -jnp.inf, 0.0, new_max)
            decay = exp2((row_max - safe) * LOG2_E)
            row_sum, result = row_sum * decay, result * decay[:, None]
            for (at, active), lse in zip(slots, lses, strict=True):
                weight = exp2((lse - safe) * LOG2_E)
                row_sum += weight
                result += weight[:, None] * place.part(part_ref, at, active, e)
            return new_max, row_sum, result

        each(tiles, skip_ref[0] == 0, merge)

    return call(
        merge_kernel,
        where,
        block_starts,
        part,
        part_lse,
        out,
        lse,
        skip,
        grid=(programs_of(tiles, heads, ENOUGH_PROGRAMS), heads),
        out_shape=(
            jax.ShapeDtypeStruct(out.shape, out.dtype),
            jax.ShapeDtypeStruct(lse.shape, lse.dtype),
        ),
        aliases={4: 0, 5: 1},
        interpret=interpret,
        num_stages=1,
    )


def sum_gradients(
    where, block_starts, part, inverse, dquery, skip, *, scale, kv_heads, elements, interpret
):  # fmt: skip
    """Sums the partial query gradients of a chunk into dquery [B, T, N, D], in place.

    `part` [H, P*G, D] holds the partial dq of `kv_outer_backward.partial_gradients`, scaled by
    `inverse` [B, T, N] / scale; the other arguments are those of `merge_outputs`.
    """
    tiles, heads = _tiles(block_starts, dquery, kv_heads, elements)

    def sum_gradients_kernel(
        where_ref, block_starts_ref, part_ref, inverse_ref, _dquery, skip_ref, dquery_ref
    ):  # fmt: skip
        head, d = pl.program_id(1), iota(next_power_of_two(dquery.shape[3]))

        def add(place, total, slots):
            for at, active in slots:
                total += place.part(part_ref, at, active, d)
            return total

        def merge(number):
            place = _Place(
                where_ref, block_starts_ref, dquery_ref, kv_heads, elements, number, head
            )
            inverses = load(inverse_ref.at[*place.target], mask=place.in_bounds)
            unit = jnp.where(inverses == 0, 0.0, scale / inverses)
            zeros = jnp.zeros((place.rows, d.size), jnp.float32)
            total = place.walk(functools.partial(add, place), zeros)
            place.store(dquery_ref, total * unit[:, None], d)

        each(tiles, skip_ref[0] == 0, merge)

    return call(
        sum_gradients_kernel,
        where,
        block_starts,
        part,
        inverse,
        dquery,
        skip,
        grid=(tiles, heads),  # several tiles per program are 8% slower
        out_shape=jax.ShapeDtypeStruct(dquery.shape, dquery.dtype),
        aliases={4: 0},
        interpret=interpret,
        num_stages=1,
    )


def _rows(width, elements):
    """Rows of a program's tile."""
    return max(1, elements // next_power_of_two(width))


def _tiles(block_starts, result, kv_heads, elements):
    """Number of tiles of a head, and number of heads of the chunk."""
    heads, tokens, _ = block_starts.shape
    rows = tokens * (result.shape[2] // kv_heads)
    return -(-rows // _rows(result.shape[3], elements)), heads


class _Place:
    """A tile: several rows of one head of the chunk, with their slots and results."""

    def __init__(self, where_ref, block_starts_ref, result_ref, kv_heads, elements, number, head):
        _, self.tokens, self.num_selected = block_starts_ref.shape
        _, self.length, query_heads, self.width = result_ref.shape
        self.group = query_heads // kv_heads
        self.rows = _rows(self.width, elements)
        self.block_starts_ref = block_starts_ref
        self.head = head
        self.token, self.g = split(number * self.rows + iota(self.rows), self.group)
        batch, kv_head = split(where_ref[0] + self.head, kv_heads)
        self.in_bounds = (self.token < self.tokens) & (where_ref[1] + self.token < self.length)
        self.target = (batch, where_ref[1] + self.token, kv_head * self.group + self.g)

    def walk(self, add, state):
        """Folds `add(state, [(row of the partial results, is it valid), ...])` over the slots."""

        def some(first, count, state):
            slots = []
            for slot in (first + i for i in range(count)):
                listed = self.in_bounds & (slot < self.num_selected)
                start = load(self.block_starts_ref.at[self.head, self.token, slot], mask=listed)
                at = (self.token * self.num_selected + slot) * self.group + self.g
                slots.append((at, listed & (start < self.length)))
            return add(state, slots)

        if self.num_selected <= SLOTS:
            return some(0, self.num_selected, state)
        step = lambda i, state: some(i * SLOTS, SLOTS, state)  # noqa: E731
        return jax.lax.fori_loop(0, -(-self.num_selected // SLOTS), step, state)

    def part(self, part_ref, at, active, e):
        """Columns `e` of the partial results of one slot, 0 where the slot is invalid."""
        mask = rows_mask(active, e, self.width)
        return load(part_ref.at[self.head, at[:, None], e[None, :]], mask=mask).astype(jnp.float32)

    def store(self, result_ref, result, e):
        batch, token, query_head = self.target
        store(
            result_ref.at[batch, token[:, None], query_head[:, None], e[None, :]],
            result.astype(result_ref.dtype),
            mask=rows_mask(self.in_bounds, e, self.width),
        )
