"""What a program of a KV-outer kernel works on: an item of the query index.

Shared by `kv_outer_forward.py`, `kv_outer_backward.py` and `kv_outer_key_gradients.py`: which keys,
which queries in which step, how to load them.

Shapes: b keys of a block, R rows (query token, head of its group) of a step, S slots, G heads of a
group. Row r of a step is head r % G of pair r // G; the last R % G rows of a step are idle.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.block_attention.query_index import Index, num_pieces
from fsa_jax.pallas.intrinsics import iota, load, split
from fsa_jax.pallas.tiles import load_tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of the (row, KV head) pairs and of the tokens of all queries, for a KV-outer kernel.

    Attributes:
      where: int32 [3], first (row, KV head) and first token of the chunk, and the token of the
        keys' row that query token 0 is.
      lists: the index of its queries.
      heads: H, (row, KV head) pairs.
      tokens: C.
      slots: S, entries of a list.
      block: b, keys of a block, a power of two.
      pairs: the most pairs of an item.
      scale: factor of the logits.
      interpret: run the kernels in interpret mode.
    """

    where: jax.Array
    lists: Index
    heads: int
    tokens: int
    slots: int
    block: int
    pairs: int
    scale: float
    interpret: bool

    @property
    def pieces(self) -> int:
        """How many items can be of blocks that are cut."""
        return num_pieces(self.heads * self.tokens * self.slots, self.pairs)

    def sizes(self, query, key) -> dict[str, Any]:
        """What `Item` has to know of the chunk and of arrays [B, T, N, D] and [B, M, K, D]."""
        return {
            "length": key.shape[1],
            "group": query.shape[2] // key.shape[2],
            "kv_heads": key.shape[2],
            "slots": self.slots,
            "block": self.block,
            "pairs": self.pairs,
            "partial": query.shape[1] != key.shape[1],
        }


def arrays(chunk: Chunk):
    """The arrays that `Item` reads, in its order: where the chunk is, and those of its index."""
    where, lists = chunk.where, chunk.lists
    return (
        where,
        lists.start,
        lists.stop,
        lists.head,
        lists.first,
        lists.count,
        lists.begins,
        lists.piece,
        lists.order,
        lists.items,
    )


def each_item(refs, lists, work) -> None:
    """Calls `work(number)` for the items of this program: one, or a share of those of packed rows.

    `refs` are those of `arrays`.
    """
    first, items = pl.program_id(0), refs[-1]
    if not lists.shared:
        return work(first)

    def step(number):
        work(number)
        return number + lists.programs

    # Programs that run at the same time are at neighbouring items. How many there are is read again
    # for each item: kept meanwhile, it would cost a register.
    jax.lax.while_loop(lambda number: number < items[0], step, first)


class Item:
    """An item, by its number in the chunk.

    Attributes:
      head: head of the chunk; `batch` and `kv_head` are where it is in the arrays.
      count: number of pairs.
      begins: whether it is the first item of its block.
      piece: -1 for the only item of its block, else its number.
      column: int32 [b], tokens of the block.
      inside: bool [b], which of them are in the block's document.
      query_column: the same counted from query token 0, if the queries are part of the row.
    """

    def __init__(
        self, refs, item, *, length, group, kv_heads, slots, block, pairs, partial, rows, tokens=0
    ):
        where, start, stop, head, first, count, begins, piece, self.order, _ = refs
        self.length, self.group, self.slots, self.rows = length, group, slots, rows
        self.block, self.pairs = block, pairs
        self.head, self.first, self.count = head[item], first[item], count[item]
        self.begins, self.piece = begins[item] > 0, piece[item]
        self.batch, self.kv_head = split(where[0] + self.head, kv_heads)
        # From a slot of a head's row to one of all heads of the chunk, of C = tokens (for nothing
        # else are they needed): as one number, it costs one register.
        self.base = self.head * (tokens * slots * group) - where[1] * (slots * group)
        # the first key, counted from query token 0, if the queries are part of the row
        self.start = start[item] - where[2] if partial else start[item]
        self.column, self.query_column = start[item] + iota(block), self.start + iota(block)
        self.inside = (self.column < stop[item]) & (self.count > 0)
        # Keys after the item's last query are seen by nobody: they may hold anything.
        last, _ = split(self.order[self.first + jnp.maximum(self.count - 1, 0)], slots)
        self.visible = self.inside & (self.query_column <= last)

    def zero(self):
        """A 0 that the compiler does not know: what is added to it stays where it is."""
        return jnp.minimum(self.count, 0)

    def sees(self, token):
        """Bool [R, b], which keys of the block come before or at each query."""
        # compared so, the keys need no register each: their numbers are the same in every item
        return iota(self.block)[None, :] <= (token - self.start)[:, None]

    def seen_by(self, token):
        """Bool [b, R], the same; here the queries are those that would need registers."""
        return self.query_column[:, None] <= token[None, :]

    def load_block(self, ref, columns):
        """Tiles [b, columns] of the block's keys or values, 0 where nobody sees them."""
        return load_tiles(ref, self.batch, self.column, self.kv_head, columns, self.visible)

    def steps(self):
        return pl.cdiv(self.count, self.rows // self.group)

    def steps_at_edge(self):
        """How many steps need a mask, the first ones; the queries of the others see all keys.

        Queries that do not see the whole block are in it: fewer than b, and its first pairs.
        """
        some = jnp.minimum(pl.cdiv(self.block - 1, self.rows // self.group), self.steps())
        others = 0 if self.pairs >= self.block else self.steps()  # of other items of the block
        return jnp.where(self.begins, some, others)

    def step(self, number):
        """Rows of a step: do they exist, their token, query head and slot of H*P*G; [R] each.

        Idle rows stand at token T, behind all others: they see every key, and their slot is unused.
        """
        pairs, row = self.rows // self.group, iota(self.rows)
        if self.rows % self.group == 0:
            of_step, g = split(row, self.group)
            at = number * pairs + of_step
            live = at < self.count
        else:
            # divided anew in every step: kept over the loop, the results would cost registers, and
            # so would the rows, kept from item to item
            row += self.zero()
            row += number * (pairs * self.group)
            at, g = split(row, self.group)
            live = row < jnp.minimum(self.count, (number + 1) * pairs) * self.group
        pair = load(self.order.at[self.first + at], mask=live, other=self.length * self.slots)
        token, _ = split(pair, self.slots)
        return live, token, self.kv_head * self.group + g, pair * self.group + (g + self.base)

    def load_rows(self, ref, step, columns):
        """Tiles [R, columns] of a step's queries or their cotangents, 0 where there is none."""
        live, token, query_head, _ = step
        return load_tiles(ref, self.batch, token, query_head, columns, live)
