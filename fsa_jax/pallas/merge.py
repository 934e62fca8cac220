"""The segmented reduction: merges the S partial results of each token, with online softmax.

A program takes a tile of rows (token, head of the group) of one KV head and walks their slots,
SLOTS at a time: that many loads are in flight at once, which is what a kernel needs that only
moves bytes. The S*G*E partial results of a token are contiguous, and each is read once. Bytes: read
P*G*E partials and their logsumexp, write C*G*E results a head; arithmetic does not count.

Shapes: H heads of a chunk, C tokens of it, S slots, P = C*S, G query heads of a key head, E width.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.common import (
    LOG2_E,
    call,
    exp2,
    iota,
    load,
    next_power_of_two,
    rows_mask,
    split,
    store,
)

#: Slots whose loads are in flight together.
SLOTS = 16


def merge_outputs(
    where, starts, part, part_lse, out, lse, done, *, kv_heads, elements, interpret
):  # fmt: skip
    """Merges outputs: lse = log(sum of exp(lse_s)), out = sum of exp(lse_s - lse) out_s.

    Args:
      where: int32 [2], first (row, KV head) and first token of the chunk.
      starts: int32 [H, C, S], the lists; entries of T and more do not count.
      part: [H, P*G, E], as `forward.partial_attention` gives it.
      part_lse: [H, P*G], likewise.
      out: [B, T, N, E], updated in place at the chunk's tokens and heads; 0 where nothing counts.
      lse: float32 [B, T, N], likewise, natural logarithm; -inf where nothing counts.
      done: int32 [1]; where it is not 0, nothing is written.
      kv_heads: K.
      elements: size of a program's tile of results.
      interpret: run the kernel in interpret mode.
    """

    def merge_kernel(
        where_ref, starts_ref, part_ref, part_lse_ref, _out, _lse, done_ref, out_ref, lse_ref
    ):  # fmt: skip
        place = _Place(where_ref, starts_ref, out_ref, kv_heads, elements)
        wanted = done_ref[0] == 0
        place.there &= wanted
        e = iota(next_power_of_two(place.width))

        def add(state, slots):
            top, total, result = state
            lses = [
                jnp.where(live, load(part_lse_ref.at[place.head, at], mask=live), -jnp.inf)
                for at, live in slots
            ]
            new_top = top
            for lse in lses:
                new_top = jnp.maximum(new_top, lse)
            # before the first slot that counts, weights and decay are 2^-inf = 0
            safe = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            decay = exp2((top - safe) * LOG2_E)
            total, result = total * decay, result * decay[:, None]
            for (at, live), lse in zip(slots, lses, strict=True):
                weight = exp2((lse - safe) * LOG2_E)
                total += weight
                result += weight[:, None] * place.part(part_ref, at, live, e)
            return new_top, total, result

        zeros = jnp.zeros((place.rows,), jnp.float32)
        state = (zeros - jnp.inf, zeros, jnp.zeros((place.rows, e.size), jnp.float32))
        top, total, result = jax.lax.cond(
            wanted, lambda state: place.walk(add, state), lambda state: state, state
        )
        some = total > 0
        total = jnp.where(some, total, 1.0)
        place.store(out_ref, result / total[:, None], e)
        result_lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
        store(lse_ref.at[*place.target], result_lse, mask=place.there)

    return call(
        merge_kernel,
        where,
        starts,
        part,
        part_lse,
        out,
        lse,
        done,
        grid=_grid(starts, out, kv_heads, elements),
        out_shape=(
            jax.ShapeDtypeStruct(out.shape, out.dtype),
            jax.ShapeDtypeStruct(lse.shape, lse.dtype),
        ),
        aliases={4: 0, 5: 1},
        interpret=interpret,
        num_stages=1,
    )


def sum_gradients(
    where, starts, part, inverse, dquery, done, *, scale, kv_heads, elements, interpret
):  # fmt: skip
    """Sums the partial gradients of the queries of a chunk into dquery [B, T, N, D], in place.

    `part` [H, P*G, D] is what `backward.partial_gradients` gives, in the unit that `inverse`
    [B, T, N] says; the other arguments are those of `merge_outputs`.
    """

    def sum_gradients_kernel(
        where_ref, starts_ref, part_ref, inverse_ref, _dquery, done_ref, dquery_ref
    ):  # fmt: skip
        place = _Place(where_ref, starts_ref, dquery_ref, kv_heads, elements)
        wanted = done_ref[0] == 0
        place.there &= wanted
        d = iota(next_power_of_two(place.width))

        def add(total, slots):
            for at, live in slots:
                total += place.part(part_ref, at, live, d)
            return total

        inverses = load(inverse_ref.at[*place.target], mask=place.there)
        unit = jnp.where(inverses == 0, 0.0, scale / inverses)
        zeros = jnp.zeros((place.rows, d.size), jnp.float32)
        total = jax.lax.cond(wanted, lambda x: place.walk(add, x), lambda x: x, zeros)
        place.store(dquery_ref, total * unit[:, None], d)

    return call(
        sum_gradients_kernel,
        where,
        starts,
        part,
        inverse,
        dquery,
        done,
        grid=_grid(starts, dquery, kv_heads, elements),
        out_shape=jax.ShapeDtypeStruct(dquery.shape, dquery.dtype),
        aliases={4: 0},
        interpret=interpret,
        num_stages=1,
    )


def _rows(width, elements):
    """Rows of a program's tile."""
    return max(1, elements // next_power_of_two(width))


def _grid(starts, result, kv_heads, elements):
    heads, tokens, _ = starts.shape
    rows = tokens * (result.shape[2] // kv_heads)
    return (-(-rows // _rows(result.shape[3], elements)), heads)


class _Place:
    """What a program works on: rows of one head of the chunk, their slots and their results."""

    def __init__(self, where_ref, starts_ref, result_ref, kv_heads, elements):
        _, self.tokens, self.slots = starts_ref.shape
        _, self.length, query_heads, self.width = result_ref.shape
        self.group = query_heads // kv_heads
        self.rows = _rows(self.width, elements)
        self.starts_ref = starts_ref
        self.head = pl.program_id(1)
        self.token, self.g = split(pl.program_id(0) * self.rows + iota(self.rows), self.group)
        batch, kv_head = split(where_ref[0] + self.head, kv_heads)
        self.there = (self.token < self.tokens) & (where_ref[1] + self.token < self.length)
        self.target = (batch, where_ref[1] + self.token, kv_head * self.group + self.g)

    def walk(self, add, state):
        """Folds `add(state, [(row of the partials, does it count), ...])` over the slots."""

        def some(first, count, state):
            slots = []
            for slot in (first + i for i in range(count)):
                listed = self.there & (slot < self.slots)
                start = load(self.starts_ref.at[self.head, self.token, slot], mask=listed)
                at = (self.token * self.slots + slot) * self.group + self.g
                slots.append((at, listed & (start < self.length)))
            return add(state, slots)

        if self.slots <= SLOTS:
            return some(0, self.slots, state)
        step = lambda i, state: some(i * SLOTS, SLOTS, state)  # noqa: E731
        return jax.lax.fori_loop(0, -(-self.slots // SLOTS), step, state)

    def part(self, part_ref, at, live, e):
        """Columns `e` of the partial results of one slot, 0 where it does not count."""
        mask = rows_mask(live, e, self.width)
        return load(part_ref.at[self.head, at[:, None], e[None, :]], mask=mask).astype(jnp.float32)

    def store(self, result_ref, result, e):
        batch, token, query_head = self.target
        store(
            result_ref.at[batch, token[:, None], query_head[:, None], e[None, :]],
            result.astype(result_ref.dtype),
            mask=rows_mask(self.there, e, self.width),
        )
