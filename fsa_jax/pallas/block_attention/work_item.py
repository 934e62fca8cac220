"""The unit of work of a KV-outer kernel's program: a work item of the query index.

`kv_outer_forward.py`, `kv_outer_backward.py` and `kv_outer_key_gradients.py` share this code, which
determines the keys of a work item and the queries of each step, and loads them.

Shapes: b keys of a block, R rows (query token, head of its group) of a step, S slots, G query heads
per key head. Row r of a step is head r % G of pair r // G; the last R % G rows of a step are idle.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.block_attention.query_index import Index, num_splits
from fsa_jax.pallas.intrinsics import iota, load, split
from fsa_jax.pallas.tiles import load_tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some of the (sequence, KV head) pairs and some of the tokens, for a KV-outer kernel.

    Attributes:
      where: int32 [3], first (sequence, KV head) pair and first token of the chunk, and the
        position of query token 0 in the key sequence.
      index: the index of the chunk's queries.
      heads: H, number of (sequence, KV head) pairs.
      tokens: C.
      num_selected: S, entries of a list.
      block: b, keys of a block, a power of two.
      pairs: the most pairs of a work item.
      scale: factor of the logits.
      interpret: run the kernels in interpret mode.
    """

    where: jax.Array
    index: Index
    heads: int
    tokens: int
    num_selected: int
    block: int
    pairs: int
    scale: float
    interpret: bool

    @property
    def splits(self) -> int:
        """Upper bound on the number of work items that belong to split blocks."""
        return num_splits(self.heads * self.tokens * self.num_selected, self.pairs)

    def sizes(self, query, key) -> dict[str, Any]:
        """Static arguments of `WorkItem`, from the chunk and arrays [B, T, N, D], [B, M, K, D]."""
        return {
            "length": key.shape[1],
            "group": query.shape[2] // key.shape[2],
            "kv_heads": key.shape[2],
            "num_selected": self.num_selected,
            "block": self.block,
            "pairs": self.pairs,
            "partial": query.shape[1] != key.shape[1],
        }


def arrays(chunk: Chunk):
    """The arrays that `WorkItem` reads, in order: the chunk's origin, then the index's arrays."""
    where, index = chunk.where, chunk.index
    return (
        where,
        index.start,
        index.stop,
        index.head,
        index.first,
        index.count,
        index.begins,
        index.split,
        index.order,
        index.items,
    )


def each_item(refs, index, work) -> None:
    """Calls `work(number)` for each work item of this program.

    A program has one item, or a share of all items if sequences are packed. `refs` are the refs of
    `arrays`.
    """
    first, items = pl.program_id(0), refs[-1]
    if not index.shared:
        return work(first)

    def step(number):
        work(number)
        return number + index.programs

    # Programs that run concurrently process neighbouring items. The number of items is reloaded for
    # each item, since keeping it would cost a register.
    jax.lax.while_loop(lambda number: number < items[0], step, first)


class WorkItem:
    """A work item, identified by its number in the chunk.

    Attributes:
      head: head of the chunk; `batch` and `kv_head` are its indices in the arrays.
      count: number of pairs.
      begins: whether this is the first item of its block.
      split: -1 for the only item of a block, else its number among the items of split blocks.
      column: int32 [b], tokens of the block.
      inside: bool [b], which of these tokens are in the block's document.
      query_column: `column` counted from query token 0, if the queries are a part of the sequence.
    """

    def __init__(
        self, refs, item, *, length, group, kv_heads, num_selected, block, pairs, partial, rows,
        tokens=0,
    ):  # fmt: skip
        where, start, stop, head, first, count, begins, number_of_split, self.order, _ = refs
        self.length, self.group, self.num_selected, self.rows = length, group, num_selected, rows
        self.block, self.pairs = block, pairs
        self.head, self.first, self.count = head[item], first[item], count[item]
        self.begins, self.split = begins[item] > 0, number_of_split[item]
        self.batch, self.kv_head = split(where[0] + self.head, kv_heads)
        # Offset from a slot number within a head to one within the chunk; `tokens` (C) is needed
        # only here. A single number costs a single register.
        self.base = self.head * (tokens * num_selected * group) - where[1] * (num_selected * group)
        # the first key, counted from query token 0 if the queries are a part of the sequence
        self.start = start[item] - where[2] if partial else start[item]
        self.column, self.query_column = start[item] + iota(block), self.start + iota(block)
        self.inside = (self.column < stop[item]) & (self.count > 0)
        # No query attends to keys after the item's last query, so those may hold any value.
        last, _ = split(self.order[self.first + jnp.maximum(self.count - 1, 0)], num_selected)
        self.visible = self.inside & (self.query_column <= last)

    def zero(self):
        """An opaque zero: keeps the compiler from hoisting what is added to it."""
        return jnp.minimum(self.count, 0)

    def sees(self, token):
        """Causal mask, bool [R, b]: which keys of the block are at or before each query."""
        # in this form the keys' numbers are the same for every item and need no registers
        return iota(self.block)[None, :] <= (token - self.start)[:, None]

    def seen_by(self, token):
        """The same mask transposed, bool [b, R]; here the queries would be what needs registers."""
        return self.query_column[:, None] <= token[None, :]

    def load_block(self, ref, columns):
        """Tiles [b, columns] of the block's keys or values, 0 where no query attends to them."""
        return load_tiles(ref, self.batch, self.column, self.kv_head, columns, self.visible)

    def steps(self):
        return pl.cdiv(self.count, self.rows // self.group)

    def steps_at_edge(self):
        """Number of leading steps that need a causal mask; later queries attend to all keys.

        Queries that do not attend to the whole block lie within it: there are fewer than b of them,
        and they are the first pairs of the block.
        """
        some = jnp.minimum(pl.cdiv(self.block - 1, self.rows // self.group), self.steps())
        others = 0 if self.pairs >= self.block else self.steps()  # for the block's later items
        return jnp.where(self.begins, some, others)

    def step(self, number):
        """Rows of a step: active or idle, token, query head, and slot of H*P*G; [R] each.

        Idle rows have token T, after all others: they attend to all keys, and their slot is unused.
        """
        pairs, row = self.rows // self.group, iota(self.rows)
        if self.rows % self.group == 0:
            of_step, g = split(row, self.group)
            at = number * pairs + of_step
            active = at < self.count
        else:
            # The division is repeated in every step, since keeping its results over the loop would
            # cost registers; so would keeping the row numbers from item to item.
            row += self.zero()
            row += number * (pairs * self.group)
            at, g = split(row, self.group)
            active = row < jnp.minimum(self.count, (number + 1) * pairs) * self.group
        pair = load(
            self.order.at[self.first + at], mask=active, other=self.length * self.num_selected
        )
        token, _ = split(pair, self.num_selected)
        return active, token, self.kv_head * self.group + g, pair * self.group + (g + self.base)

    def load_rows(self, ref, step, columns):
        """Tiles [R, columns] of a step's queries or their cotangents, 0 at idle rows."""
        active, token, query_head, _ = step
        return load_tiles(ref, self.batch, token, query_head, columns, active)
