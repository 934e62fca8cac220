"""Decoding kernels: a few queries of each sequence attend to keys and values stored in pages.

Decoding is bound by memory bandwidth: every key and value that is attended to is read once from
device memory for the G query heads of its KV head, with G times less arithmetic than in training. A
program therefore takes all query heads of one KV head, and the keys and values are split over
enough programs to fill the GPU:

* `range_attention` and `block_attention` share one implementation. Its programs are (sequence, KV
  head) x splits: a split walks its share of the entries in tiles of b, each gathered through the
  page table with the loads of the next tiles in flight, and writes partial sums. The entries that
  are attended to are divided, not the capacity, so that a short sequence in a large cache also
  fills the GPU.
* `merge_splits_kernel` merges the partial sums of a row, all splits at once in a fixed tree.

Products use the matrix unit, with rows padded to 16: 16 flops per byte of 16-bit K and V, which is
77 TFLOP/s at 4.8 TB/s, a tenth of the throughput of an H200's matrix unit. In ordinary registers an
element would take a conversion and G multiplications, while 14 instructions can be issued in the
time that memory needs to deliver it: at G = 16 that uses up all of them, and addresses, masks and
sums over lanes also need some. No matrix unit multiplies float32 exactly, so float32 rows are
only padded to a power of two.

Entries to which no query attends are never loaded and may hold any value. Page numbers outside the
pool and blocks outside the page table are ignored.

Shapes: B sequences, n queries of each, N query heads, K key/value heads, G = N/K, D and E head
widths, P pages of p entries, J pages that a sequence may have, S listed blocks, b entries per tile.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from fsa_jax.pallas.intrinsics import call, dot, iota, load, split, store
from fsa_jax.pallas.online_softmax import Softmax, Sum
from fsa_jax.pallas.tile_config import padded_width
from fsa_jax.pallas.tile_sizes import LARGEST, next_power_of_two
from fsa_jax.pallas.tiles import columns_of, load_tiles, product, rows_mask

#: Programs that run concurrently: two on each of the 132 multiprocessors of an H100 or H200, each
#: with two tiles of K and V in flight. These are 17 MB, three times what 4.8 TB/s deliver in the
#: microsecond that a load takes.
PROGRAMS = 264
#: Most tiles of a split, as long as there are at most MOST_SPLITS: more splits than fill the GPU
#: cost little, and keep it filled if one sequence is much longer than the others.
SPLIT_TILES = 16
MOST_SPLITS = 128
#: Most bytes of K and V in a tile.
TILE_BYTES = 32768
#: Columns of a program of `merge_splits_kernel`: few, so that there are many programs.
MERGE_COLUMNS = 32
#: Widest tile of columns.
COLUMNS = 128


def range_attention(
    query: Float[Array, "B n N D"],
    key_pool: Float[Array, "P p K D"],
    value_pool: Float[Array, "P p K E"],
    pages: Int[Array, "B J"],
    low: Int[Array, "B n"],
    high: Int[Array, "B n"],
    *,
    scale: float,
    logits: bool = False,
    most: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B n N E"], Float[Array, "B n N"], Float[Array, "B n N J*p"] | None]:
    """Attention of each query to the entries low .. high-1 of its sequence.

    Entry e of a sequence is pool[pages[b, e // p], e % p]. Flops, with V the attended entries of
    all sequences: 2*V*N*(D + E) per query. Bytes: V*K*(D + E) elements of K and V, once if n*G is
    at most 64 (32 for wide heads, 16 for float32), else once for each group of as many rows;
    8*N*(E + 2) of partial results per split and query; 4*V*N of logits, if requested.

    Args:
      query: float16, bfloat16 or float32.
      key_pool: pages of keys.
      value_pool: pages of values.
      pages: page numbers of each sequence.
      low: int32, first entry of each query's range.
      high: int32, one past the last; the range is empty if `high` <= `low`.
      scale: factor of the logits.
      logits: whether to return the logits.
      most: upper bound on the entries that the queries of a sequence attend to together, if known:
        a window needs few splits. A wrong number affects only the speed.
      interpret: run the kernels in interpret mode.

    Returns:
      out in the dtype of `query`; lse float32, natural logarithm; and the scaled logits, float32,
      arbitrary at entries outside a query's range (None unless requested). out is 0 and lse is -inf
      for a query with an empty range.
    """
    entries = pages.shape[1] * key_pool.shape[1]
    positions = min(entries, most or entries)
    return _attention(
        query, key_pool, value_pool, pages, low, high, None,
        scale=scale, positions=positions, logits=logits, interpret=interpret,
    )  # fmt: skip


def block_attention(
    query: Float[Array, "B n N D"],
    key_pool: Float[Array, "P p K D"],
    value_pool: Float[Array, "P p K E"],
    pages: Int[Array, "B J"],
    blocks: Int[Array, "B n K S"],
    last: Int[Array, "B n"],
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B n N E"], Float[Array, "B n N"]]:
    """Attention of each query and KV head to the tokens up to `last` of its listed blocks.

    A page is a block: block j of a sequence is pool[pages[b, j]]. Flops: 2*B*n*N*S*p*(D + E).
    Bytes: B*n*K*S*p*(D + E) elements of K and V, each once, and 8*N*(E + 2) of partial
    results per split and query.

    Args:
      query: float16, bfloat16 or float32.
      key_pool: pages of keys.
      value_pool: pages of values.
      pages: page numbers of each sequence.
      blocks: int32, each block at most once in a list; -1 and other numbers outside the page table
        are ignored.
      last: int32, the last token that a query attends to; -1 for none.
      scale: factor of the logits.
      interpret: run the kernels in interpret mode.

    Returns:
      out in the dtype of `query` and lse float32, natural logarithm; 0 and -inf for a query that
      attends to no entry.
    """
    batch, tokens, heads, width = query.shape
    kv_heads, slots = blocks.shape[2:]
    # queries have different lists, so each becomes a sequence that shares the pages of its sequence
    high = last.reshape(-1, 1) + 1
    out, lse, _ = _attention(
        query.reshape(batch * tokens, 1, heads, width),
        key_pool, value_pool, pages, jnp.zeros_like(high), high,
        blocks.reshape(batch * tokens, kv_heads, slots),
        scale=scale, positions=slots * key_pool.shape[1], logits=False, interpret=interpret,
    )  # fmt: skip
    return out.reshape(batch, tokens, heads, -1), lse.reshape(batch, tokens, heads)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of the programs: rows and entries of a tile, splits, row tiles of a KV head."""

    rows: int
    entries: int
    splits: int
    row_tiles: int
    num_warps: int
    num_stages: int


def _make_plan(query, key, value, positions: int, listed: bool) -> _Plan:
    batch, tokens, heads, _ = query.shape
    kv_heads, itemsize = key.shape[2], key.dtype.itemsize
    exact = itemsize == 4
    widths = sum(padded_width(x.shape[3]) for x in (key, value))
    rows_of_head = tokens * (heads // kv_heads)
    # A matrix unit takes at least 16 rows; float32 does not use one and pays for every row. Rows
    # for which a program has no registers go to another program, which reads K and V from L2.
    least, most = (1, 16) if exact else (16, 64 if widths <= 256 else 32)
    rows = min(max(least, next_power_of_two(rows_of_head)), most)
    row_tiles = -(-rows_of_head // rows)
    fit = TILE_BYTES // (itemsize * next_power_of_two(widths))
    entries = max(16, min(fit, 64, next_power_of_two(positions)))
    tiles = -(-positions // entries) + (not listed)  # a range may start within a tile
    programs = batch * kv_heads * row_tiles
    splits = max(PROGRAMS // programs, min(-(-tiles // SPLIT_TILES), MOST_SPLITS), 1)
    return _Plan(
        rows=rows,
        entries=entries,
        splits=min(splits, tiles, MOST_SPLITS),
        row_tiles=row_tiles,
        num_warps=8 if exact else 4,
        num_stages=3,
    )


def _attention(
    query, key, value, pages, low, high, blocks, *, scale, positions, logits, interpret
):  # fmt: skip
    """Implements both functions: attends to the entries of listed `blocks`, or of ranges if None.

    `positions` is an upper bound on the number of entries. If `query` has more sequences than
    `pages`, consecutive sequences of `query` share the pages of one sequence.
    """
    plan = _make_plan(query, key, value, positions, blocks is not None)
    rows = query.shape[:3]
    softmax = Softmax(scale, exact=key.dtype == jnp.float32)

    def paged_range_kernel(query_ref, key_ref, value_ref, pages_ref, low_ref, high_ref, *refs):
        out_refs, logits_refs = refs[:3], refs[3:]
        queries = _Rows(plan, query_ref, low_ref, high_ref, key_ref, value_ref, pages_ref)
        entries = _Entries(plan, queries, pages_ref, key_ref)
        _walk(plan, softmax, queries, entries, positions, key_ref, value_ref, out_refs, logits_refs)

    def paged_block_kernel(query_ref, key_ref, value_ref, pages_ref, low_ref, high_ref, *refs):
        blocks_ref, *out_refs = refs
        queries = _Rows(plan, query_ref, low_ref, high_ref, key_ref, value_ref, pages_ref)
        entries = _ListedEntries(plan, queries, pages_ref, key_ref, blocks_ref)
        _walk(plan, softmax, queries, entries, positions, key_ref, value_ref, out_refs, ())

    shapes = [(plan.splits, *rows, value.shape[3]), *[(plan.splits, *rows)] * 2]
    shapes += [(*rows, pages.shape[1] * key.shape[1])] * logits
    part, row_max, row_sum, *found = call(
        paged_range_kernel if blocks is None else paged_block_kernel,
        query,
        key,
        value,
        pages,
        low,
        high,
        *(() if blocks is None else (blocks,)),
        grid=(query.shape[0] * key.shape[2] * plan.row_tiles, plan.splits),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        interpret=interpret,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    out, lse = _merge(part, row_max, row_sum, softmax, query.dtype, interpret)
    return out, lse, found[0] if logits else None


class _Rows:
    """The rows of a program, (query token, head) of one sequence and KV head, and their ranges.

    Attributes:
      row, kv_head: index of the sequence, and KV head.
      token, head: int32 [R], query token and query head of each row.
      in_bounds: bool [R], which rows exist.
      lows, highs: int32 [R], the range of entries of each row.
      first, end: bounds of the union of all ranges.
      queries: tiles [R, columns].
    """

    def __init__(self, plan, query_ref, low_ref, high_ref, key_ref, value_ref, pages_ref):
        self.batch, tokens, heads, _ = query_ref.shape
        _, page_size, kv_heads, _ = key_ref.shape
        number, row_tile = split(pl.program_id(0), plan.row_tiles)
        self.row, self.kv_head = split(number, kv_heads)
        self.share, self.tokens = pl.program_id(1), tokens
        group = heads // kv_heads
        self.token, g = split(row_tile * plan.rows + iota(plan.rows), group)
        self.in_bounds = self.token < tokens
        self.head = self.kv_head * group + g
        at = (self.row, self.token)
        self.lows = jnp.maximum(load(low_ref.at[*at], mask=self.in_bounds), 0)
        highs = load(high_ref.at[*at], mask=self.in_bounds)
        self.highs = jnp.minimum(highs, pages_ref.shape[1] * page_size)
        has_keys = self.highs > self.lows
        first = jnp.min(jnp.where(has_keys, self.lows, LARGEST))
        self.end = jnp.max(jnp.where(has_keys, self.highs, 0))
        self.first = jnp.minimum(first, self.end)
        self.columns, self.value_columns = (columns_of(x, COLUMNS) for x in (key_ref, value_ref))
        self.queries = load_tiles(
            query_ref, self.row, self.token, self.head, self.columns, has_keys
        )


class _Entries:
    """The entries that a program walks: position i of the walk is entry i."""

    def __init__(self, plan, rows, pages_ref, key_ref):
        self.size, self.rows, self.pages_ref = plan.entries, rows, pages_ref
        self.num_pages, self.page_size = key_ref.shape[:2]
        # several rows of queries share a row of the page table
        self.sharing = rows.batch // pages_ref.shape[0]

    def tiles(self, positions) -> Any:
        """The first tile to which any row attends, and one past the last."""
        del positions
        return jax.lax.div(self.rows.first, self.size), pl.cdiv(self.rows.end, self.size)

    def at(self, position):
        """The entry at each position, -1 if there is none."""
        return position

    def look_up(self, tile):
        """The entries of a tile and their pages; page -1 at entries outside every row's range."""
        entry = self.at(tile * self.size + iota(self.size))
        seen = (entry >= self.rows.first) & (entry < self.rows.end)
        at, _ = split(entry, self.page_size)
        page = load(self.pages_ref.at[self.rows.row // self.sharing, at], mask=seen, other=-1)
        return entry, jnp.where(page < self.num_pages, page, -1)


class _ListedEntries(_Entries):
    """The entries of listed blocks, in the order of the list."""

    def __init__(self, plan, rows, pages_ref, key_ref, blocks_ref):
        super().__init__(plan, rows, pages_ref, key_ref)
        self.blocks_ref = blocks_ref

    def tiles(self, positions) -> Any:
        return 0, -(-positions // self.size)

    def at(self, position):
        slot, offset = split(position, self.page_size)
        listed = slot < self.blocks_ref.shape[2]
        at = (self.rows.row, self.rows.kv_head, slot)
        block = load(self.blocks_ref.at[*at], mask=listed, other=-1)
        listed = (block >= 0) & (block < self.pages_ref.shape[1])
        return jnp.where(listed, block * self.page_size + offset, -1)


def _walk(plan, softmax, rows, entries, positions, key_ref, value_ref, out_refs, logits_refs):
    """Computes attention of the rows to this program's share of the entries; stores partial sums.

    `logits_refs` has the ref for the scaled logits if they are requested, else it is empty.
    """
    value_columns, b = rows.value_columns, plan.entries

    def step(tile, state):
        (entry, page), row_max, row_sum, out = state
        # page numbers are loaded one step ahead, so that the loads of keys need not wait for them
        following = entries.look_up(tile + 1)
        seen = page >= 0
        _, offset = split(entry, entries.page_size)
        visible = (entry[None, :] >= rows.lows[:, None]) & (entry[None, :] < rows.highs[:, None])
        visible &= seen[None, :]
        if rows.tokens > 1:  # there may be a gap between the ranges of two queries
            seen = jnp.max(visible.astype(jnp.int32), axis=0) > 0
        keys, values = (
            [
                load(
                    ref.at[page[:, None], offset[:, None], rows.kv_head, d[None, :]],
                    mask=rows_mask(seen, d, ref.shape[3]),
                )
                for d in cut
            ]
            for ref, cut in ((key_ref, rows.columns), (value_ref, value_columns))
        )
        products = product(rows.queries, keys)
        position = tile * b + iota(b)
        for ref in logits_refs:
            store(
                ref.at[rows.row, rows.token[:, None], rows.head[:, None], position[None, :]],
                products * softmax.scale,
                mask=visible,
            )
        products = jnp.where(visible, softmax.signed(products), -jnp.inf)
        row_max, p, decay = softmax.fold(row_max, products)
        p_cut = p.astype(value_ref.dtype)
        out = [
            x.add(dot(p_cut, v, (1, 0)), decay[:, None]) for x, v in zip(out, values, strict=True)
        ]
        return following, row_max, row_sum * decay + jnp.sum(p, axis=1), out

    # the tiles are divided into equal shares
    begin, tiles_end = entries.tiles(positions)
    each = pl.cdiv(tiles_end - begin, plan.splits)
    begin = begin + rows.share * each
    zeros = jnp.zeros((plan.rows,), jnp.float32)
    out = [Sum.zeros((plan.rows, e.size), softmax.exact) for e in value_columns]
    state = (entries.look_up(begin), zeros - jnp.inf, zeros, out)
    limit = jnp.minimum(begin + each, tiles_end)
    _, row_max, row_sum, out = jax.lax.fori_loop(begin, limit, step, state)
    out_ref, row_max_ref, row_sum_ref = out_refs
    at = (rows.share, rows.row)
    for e, x in zip(value_columns, out, strict=True):
        store(
            out_ref.at[*at, rows.token[:, None], rows.head[:, None], e[None, :]],
            x.total,
            mask=rows_mask(rows.in_bounds, e, value_ref.shape[3]),
        )
    store(row_max_ref.at[*at, rows.token, rows.head], row_max, mask=rows.in_bounds)
    store(row_sum_ref.at[*at, rows.token, rows.head], row_sum, mask=rows.in_bounds)


def _merge(part, row_max, row_sum, softmax: Softmax, dtype, interpret):
    """Merges partial sums [splits, B, n, N, E] of weighted values, and the sums of their weights.

    The weights of a split are relative to its largest exponent, `row_max`; storing a logsumexp
    instead would lose precision where logits are large. A program takes a few columns of one row
    and all splits at once, so that all loads are in flight together. Bytes: 4*splits*(E + 2) read
    per row.
    """
    splits, *rows, width = part.shape
    count = rows[0] * rows[1] * rows[2]

    def merge_splits_kernel(part_ref, row_max_ref, row_sum_ref, out_ref, lse_ref):
        row = pl.program_id(0)
        s = iota(next_power_of_two(splits))
        e = pl.program_id(1) * MERGE_COLUMNS + iota(MERGE_COLUMNS)
        in_bounds = s < splits
        row_maxes = load(row_max_ref.at[s, row], mask=in_bounds, other=-jnp.inf)
        row_sums = load(row_sum_ref.at[s, row], mask=in_bounds)
        parts = load(part_ref.at[s[:, None], row, e[None, :]], mask=rows_mask(in_bounds, e, width))
        row_max = jnp.max(row_maxes, keepdims=True)
        weight = softmax.decay(row_maxes, jnp.where(row_max == -jnp.inf, 0.0, row_max))
        row_sum = jnp.sum(row_sums * weight, keepdims=True)
        some = row_sum > 0
        row_sum = jnp.where(some, row_sum, 1.0)
        out = jnp.sum(parts * weight[:, None], axis=0) / row_sum
        store(out_ref.at[row, e], out.astype(dtype), mask=e < width)
        # every program of the row stores the same number
        store(lse_ref.at[row + iota(1)], jnp.where(some, softmax.lse(row_max, row_sum), -jnp.inf))

    out, lse = call(
        merge_splits_kernel,
        part.reshape(splits, count, width),
        row_max.reshape(splits, count),
        row_sum.reshape(splits, count),
        grid=(count, pl.cdiv(width, MERGE_COLUMNS)),
        out_shape=(
            jax.ShapeDtypeStruct((count, width), dtype),
            jax.ShapeDtypeStruct((count,), jnp.float32),
        ),
        interpret=interpret,
        num_warps=2,
        num_stages=1,
    )
    return out.reshape(*rows, width), lse.reshape(rows)
