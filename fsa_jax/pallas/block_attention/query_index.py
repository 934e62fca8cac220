"""The query index: the queries that selected each block of keys, as lists split into work items.

Dataflow, for c chunks of H heads and C tokens with P = C*S (token, slot) pairs per head:

1. Sort the pairs by (chunk, head, block): one stable radix sort of c*H*P small numbers.
2. Find the first pair of each block by binary search.
3. Split the pairs of each block into work items of at most `pairs` pairs. An item is the work of
   one program of a KV-outer kernel; a hot block becomes many items rather than a long one.

The index depends on the lists alone, so the forward and backward pass share it. Sizes are static:
the sum over blocks of ceil(n / pairs) is at most P // pairs plus the number of blocks. Memory is
linear in the number of pairs; there is no tokens-by-blocks table.

Blocks are numbered by their possible starts, which are `spacing` tokens apart. In a sequence that
is one document, `spacing` is the block size; in packed sequences a block may start at any token, so
`spacing` is 1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from fsa_jax.pallas.intrinsics import call, iota, load, store
from fsa_jax.semantics.segments import SegmentInfo

#: Number of values that one program of the binary search looks up.
SEARCH_TILE = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Index:
    """Gather lists of the chunks, and the work items that they are split into; all int32.

    Attributes:
      order: pairs (token * S + slot), ordered by head, then by block, then ascending; invalid pairs
        come last within their head.
      start: first token of the item's block.
      stop: one past the last token of the block's document.
      head: head of the chunk.
      first: position of the item's first pair in `order`.
      count: number of pairs; 0 for the unused items, which come last.
      begins: 1 for the first item of a block, 0 for the others.
      split: -1 for the only item of a block; the items of split blocks are numbered 0, 1, ... in
        each chunk.
      block_items: number of items of each block.
      block_split: `split` of the first item of a split block.
      items: number of items in use.
      programs: number of programs of the kernels that share out the items of a chunk.
    """

    order: Int[Array, "c HP"]
    start: Int[Array, "c I"]
    stop: Int[Array, "c I"]
    head: Int[Array, "c I"]
    first: Int[Array, "c I"]
    count: Int[Array, "c I"]
    begins: Int[Array, "c I"]
    split: Int[Array, "c I"]
    block_items: Int[Array, "c HJ"]
    block_split: Int[Array, "c HJ"]
    items: Int[Array, "c 1"]
    programs: int = dataclasses.field(metadata={"static": True})

    @property
    def shared(self) -> bool:
        """Whether a program may have to process several items."""
        return self.programs < self.start.shape[-1]


def index_shape(
    shape: tuple[int, ...], length: int, *, spacing: int, block: int, pairs: int
) -> Index:
    """Shapes and dtypes of the index that `build_index` makes of lists [c, H, C, S].

    Args:
      shape: shape of the lists.
      length: T, tokens of a key sequence.
      spacing: as in `build_index`.
      block: likewise.
      pairs: likewise.
    """
    chunks, heads, tokens, num_selected = shape
    of_head, blocks = tokens * num_selected, -(-length // spacing)
    cut = heads * of_head // pairs
    bound = heads * min(blocks, of_head) + cut

    def of_chunks(size: int) -> Any:
        return jax.ShapeDtypeStruct((chunks, size), jnp.int32)

    sizes = {name: bound for name in ("start", "stop", "head", "first", "count", "begins", "split")}
    sizes |= {"block_items": heads * blocks, "block_split": heads * blocks, "items": 1}
    return Index(
        order=of_chunks(heads * of_head),
        **{name: of_chunks(size) for name, size in sizes.items()},
        # In packed sequences a block may start at any token, but few do: documents of one block on
        # average have two blocks per `block` tokens. An idle program costs 13 ns.
        programs=min(bound, 2 * heads * -(-length // block) + cut),
    )


def num_splits(pairs_of_chunk: int, pairs: int) -> int:
    """Upper bound on the number of work items of a chunk that belong to split blocks.

    A block of n > pairs pairs has ceil(n / pairs) items, which is at most twice n // pairs.
    """
    return 2 * (pairs_of_chunk // pairs)


def build_index(
    where: Int[Array, "c 2"],
    block_starts: Int[Array, "c H C S"],
    segments: SegmentInfo,
    *,
    kv_heads: int,
    spacing: int,
    block: int,
    pairs: int,
    interpret: bool,
) -> Index:
    """Sorts the pairs of each chunk by block and splits them into work items.

    Args:
      where: first (sequence, KV head) pair and first token of each chunk.
      block_starts: first token of each listed block in its sequence, T at entries to ignore.
      segments: the documents of the sequences.
      kv_heads: K.
      spacing: every block starts at a multiple of this number.
      block: tokens of a block.
      pairs: the most pairs of a work item.
      interpret: run the kernel in interpret mode.
    """
    chunks, heads, tokens, num_selected = block_starts.shape
    length = segments.start.shape[1]
    blocks = -(-length // spacing)
    of_head = tokens * num_selected
    shape = index_shape(block_starts.shape, length, spacing=spacing, block=block, pairs=pairs)
    # 1. sort
    number = jnp.where(block_starts < length, block_starts // spacing, blocks).reshape(-1, of_head)
    group = jnp.arange(chunks * heads, dtype=jnp.int32)[:, None]
    key = (number + group * (blocks + 1)).reshape(-1)
    if chunks * heads * (blocks + 1) <= 2**16:
        key = key.astype(jnp.uint16)  # half the passes of the radix sort
    pair = iota(of_head)[None] + jnp.repeat(where[:, 1] * num_selected, heads)[:, None]
    key, order = jax.lax.sort((key, pair.reshape(-1)), num_keys=1, is_stable=True)
    # 2. the pairs of each block
    limits = search(key, iota(chunks * heads * (blocks + 1)), interpret=interpret)
    limits = limits.reshape(chunks, heads, blocks + 1)
    limits -= jnp.arange(chunks, dtype=jnp.int32)[:, None, None] * (heads * of_head)
    begin, end = (x.reshape(chunks, heads * blocks) for x in (limits[..., :-1], limits[..., 1:]))
    # 3. cut
    needed = (end - begin + pairs - 1) // pairs
    both = jnp.stack([needed, jnp.where(needed > 1, needed, 0)])
    ends = jnp.cumsum(both.reshape(2, -1), axis=1, dtype=jnp.int32).reshape(both.shape)
    before = jnp.concatenate([jnp.zeros((2, 1), jnp.int32), ends[:, :-1, -1]], axis=1)
    # number of each item among the items of all chunks
    number = before[0][:, None] + iota(shape.start.shape[1])[None]
    found = search(ends[0].reshape(-1), number.reshape(-1) + 1, interpret=interpret)
    found = found.reshape(number.shape) - iota(chunks)[:, None] * (heads * blocks)
    active = found < heads * blocks
    found = jnp.where(active, found, 0)
    block_split = ends[1] - both[1] - before[1][:, None]
    of_item = lambda x: jnp.take_along_axis(x, found, axis=1)  # noqa: E731
    ordinal = number - of_item(ends[0] - needed)
    first = of_item(begin) + ordinal * pairs
    start, head = found % blocks * spacing, found // blocks
    return Index(
        order=order.reshape(chunks, heads * of_head),
        start=start,
        stop=segments.end[(where[:, :1] + head) // kv_heads, start],
        head=head,
        first=jnp.where(active, first, 0),
        count=jnp.where(active, jnp.minimum(of_item(end) - first, pairs), 0),
        begins=(ordinal == 0).astype(jnp.int32),
        split=jnp.where(active & (of_item(needed) > 1), of_item(block_split) + ordinal, -1),
        block_items=needed,
        block_split=block_split,
        items=ends[0][:, -1:] - before[0][:, None],
        programs=shape.programs,
    )


def only_if(wanted: Bool[Array, "1"], index: Index) -> Index:
    """The index unchanged if `wanted`, bool [1], is true, else an index without items."""
    return dataclasses.replace(
        index,
        items=jnp.where(wanted, index.items, 0),
        count=jnp.where(wanted, index.count, 0),
        split=jnp.where(wanted, index.split, -1),
        block_items=jnp.where(wanted, index.block_items, 0),
    )


def search(
    ascending: Int[Array, " n"], wanted: Int[Array, " m"], *, interpret: bool
) -> Int[Array, " m"]:
    """For each value in `wanted`, the number of values in `ascending` that are smaller.

    The kernel reads m * log2(n) numbers and writes m.
    """
    (size,), (count,) = ascending.shape, wanted.shape

    def search_kernel(ascending_ref, wanted_ref, result_ref):
        at = pl.program_id(0) * SEARCH_TILE + iota(SEARCH_TILE)
        inside = at < count
        number = load(wanted_ref.at[at], mask=inside)

        def halve(_, bounds):
            low, high = bounds  # the answer is in low .. high
            middle = (low + high) // 2
            middle_value = load(ascending_ref.at[middle], mask=middle < high).astype(jnp.int32)
            smaller = (low < high) & (middle_value < number)
            return jnp.where(smaller, middle + 1, low), jnp.where(smaller, high, middle)

        low = jnp.zeros((SEARCH_TILE,), jnp.int32)
        low, _ = jax.lax.fori_loop(0, size.bit_length(), halve, (low, low + size))
        store(result_ref.at[at], low, mask=inside)

    return call(
        search_kernel,
        ascending,
        wanted,
        grid=(-(-count // SEARCH_TILE),),
        out_shape=jax.ShapeDtypeStruct((count,), jnp.int32),
        interpret=interpret,
        num_warps=SEARCH_TILE // 32,
        num_stages=1,
    )
