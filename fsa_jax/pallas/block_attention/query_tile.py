"""Query-tile kernels: a program owns the heads of neighbouring tokens and walks all their blocks.

Neighbouring queries select mostly the same blocks. A program therefore takes as many tokens as fill
the rows of a matrix unit, and loads each block that any of them selected once for all of them; a
mask hides the block from the tokens that did not select it. As in the query-outer kernels there are
no partial results, but K and V cross L2 once per tile and no rows are padding. In the worst case,
when the tokens share no block, these kernels move as many bytes as the query-outer kernels and
perform `tokens` times as many multiplications.

Dataflow: `merge_lists` holds the lists of a tile's tokens in registers, extracts the blocks in
ascending order, and writes each with the set of tokens that selected it. The main kernels differ
from those of `query_kernels.py` only in the blocks that they load and in the mask.

Flops, with U the number of blocks of all tiles: forward 2*U*R*b*(D + E), dq 2*U*R*b*(2*D + E).
Bytes: q, dout and the result once, U*b*(D + E) elements of K and V from L2; 8*T*K*S bytes reserved
for merged lists, of which the U entries are written and read.

Shapes: B sequences, T tokens, N query heads, K key/value heads, G = N/K, S slots, n tokens and
R >= n*G rows of a tile, b keys of a block, D and E head widths.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from fsa_jax.pallas.block_attention.backward_inputs import BackwardInputs
from fsa_jax.pallas.intrinsics import call, dot, iota, load, split, store
from fsa_jax.pallas.online_softmax import Softmax, softmax_weights
from fsa_jax.pallas.tile_config import Tile
from fsa_jax.pallas.tile_sizes import next_power_of_two
from fsa_jax.pallas.tiles import columns_of, each, load_tiles, product, programs_of, rows_mask

#: Most tokens of a tile: a set of tokens is a 16-bit mask, which float32 represents exactly.
MOST_TOKENS = 16
#: List entries that a program of `merge_lists` holds; it takes several tiles if these are small.
MERGED = 4096
#: Most comparisons of two list entries of a tile, to estimate whether this kernel is profitable.
COMPARED = 2**24
#: Widest tile of columns.
COLUMNS = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MergedLists:
    """The blocks of all tiles; int32.

    Attributes:
      start: first token of each block of a tile, ascending; unwritten after the last block.
      members: bit i is set if token i of the tile selected the block.
      count: number of blocks of a tile.
    """

    start: Int[Array, "B K M nS"]
    members: Int[Array, "B K M nS"]
    count: Int[Array, "B K M"]


def tile_tokens(tile: Tile, group: int) -> int:
    """Number of tokens of a tile."""
    return min(tile.rows // group, MOST_TOKENS)


def is_profitable(
    block_starts: Int[Array, "B T K S"], end: int, pairs: float, tile: Tile, group: int
) -> Int[Array, "1"]:
    """Whether neighbouring queries share so many blocks that the query-tile kernel is faster.

    It is if a tile's block costs less than the (query, block) pairs that it replaces. If there are
    many tiles, only a sample is inspected, as large as `COMPARED` comparisons of entries allow.

    Args:
      block_starts: first token of each listed block.
      end: marks the entries of `block_starts` to ignore.
      pairs: number of (query, block) pairs that the other kernel processes in the time that this
        one needs for a block of a tile.
      tile: tile of the query-tile kernel in question.
      group: query heads per key head.

    Returns:
      int32 [1], 1 or 0.
    """
    batch, length, kv_heads, num_selected = block_starts.shape
    tokens = min(tile_tokens(tile, group), length)
    tiles = length // tokens
    asked = COMPARED // (batch * kv_heads * (tokens * num_selected) ** 2)
    apart = -(-tiles // max(asked, 1))
    several = tiles // apart
    block_starts = rearrange(
        block_starts[:, : several * apart * tokens],
        "b (m n t) k s -> b m n k t s",
        n=apart,
        t=tokens,
    )
    listed = rearrange(block_starts[:, :, apart // 2], "b m k t s -> b m k (t s)")
    same = listed[..., :, None] == listed[..., None, :]
    entry, other = (jax.lax.broadcasted_iota(jnp.int32, same.shape, axis) for axis in (3, 4))
    again = jnp.any(same & (other < entry), axis=-1)
    counts = listed < end
    entries, blocks = (jnp.sum(x.astype(jnp.float32)) for x in (counts, counts & ~again))
    return (blocks * pairs < entries).astype(jnp.int32)[None]


def merge_lists(
    block_starts: Int[Array, "B T K S"],
    end: int,
    tile: Tile,
    group: int,
    wanted=None,
    *,
    interpret: bool,
) -> MergedLists:
    """Merges the block lists of the tokens of each tile, with `group` query heads per key head.

    `block_starts` holds the first token of each listed block, or `end` at entries to ignore. If
    `wanted`, int32 [1], is 0, the merged lists are empty.
    """
    batch, length, kv_heads, num_selected = block_starts.shape
    tokens = tile_tokens(tile, group)
    tiles = -(-length // tokens)
    width = next_power_of_two(num_selected)
    entries = next_power_of_two(tokens) * width
    merged = max(1, MERGED // entries)

    def merge_lists_kernel(block_starts_ref, *refs):
        start_ref, members_ref, count_ref = refs[-3:]
        row, kv_head = split(pl.program_id(1), kv_heads)
        number_of_tile = pl.program_id(0) * merged + iota(merged)
        of_tile, slot = (x[None, :] for x in split(iota(entries), width))
        token = number_of_tile[:, None] * tokens + of_tile
        in_bounds = (token < length) & (of_tile < tokens) & (slot < num_selected)
        if wanted is not None:
            in_bounds &= refs[0][0] > 0
        listed = load(block_starts_ref.at[row, token, kv_head, slot], mask=in_bounds, other=end)
        bits = jnp.left_shift(jnp.ones_like(of_tile), of_tile)

        def more(state):
            _, first = state
            return jnp.min(first) < end

        def step(state):
            number, first = state
            active = first < end
            at = (row, kv_head, number_of_tile, number)
            store(start_ref.at[*at], first, mask=active)
            # the entries of a list are distinct, so each bit is added at most once
            members = jnp.sum(jnp.where(listed == first[:, None], bits, 0), axis=1)
            store(members_ref.at[*at], members, mask=active)
            later = jnp.min(jnp.where(listed > first[:, None], listed, end), axis=1)
            return number + active.astype(jnp.int32), later

        state = (jnp.zeros((merged,), jnp.int32), jnp.min(listed, axis=1))
        count, _ = jax.lax.while_loop(more, step, state)
        store(count_ref.at[row, kv_head, number_of_tile], count, mask=number_of_tile < tiles)

    narrow = jax.ShapeDtypeStruct((batch, kv_heads, tiles), jnp.int32)
    wide = jax.ShapeDtypeStruct((*narrow.shape, tokens * num_selected), jnp.int32)
    return MergedLists(
        *call(
            merge_lists_kernel,
            block_starts,
            *(() if wanted is None else (wanted,)),
            grid=(-(-tiles // merged), batch * kv_heads),
            out_shape=(wide, wide, narrow),
            interpret=interpret,
            num_warps=4,
            num_stages=1,
        )
    )


def attention(
    lists: MergedLists, query, key, value, offset, enabled, *, block, scale, tile, interpret
):  # fmt: skip
    """Attention of each query to its listed blocks.

    Args:
      lists: the merged lists that `merge_lists` returns.
      query: [B, T, N, D].
      key: [B, T, K, D].
      value: [B, T, K, E].
      offset: int32 [1], position of query token 0 in the key sequence.
      enabled: int32 [1]; if it is 0, nothing is computed, and the results are unwritten.
      block: b, a power of two.
      scale: factor of the logits.
      tile: `tile_config.Tile`.
      interpret: run the kernel in interpret mode.

    Returns:
      out [B, T, N, E] in the dtype of `query` and lse float32 [B, T, N], natural logarithm.
    """
    softmax = Softmax(scale, exact=key.dtype == jnp.float32)
    tiles, heads = _sizes(lists)

    def query_tile_kernel(query_ref, key_ref, value_ref, *refs):
        *list_refs, out_ref, lse_ref = refs
        head = pl.program_id(1)

        def attend(number):
            rows = _Rows(list_refs, query_ref, key_ref, block, tile, number, head)
            columns, value_columns = (columns_of(x, COLUMNS) for x in (key, value))
            queries = load_tiles(query_ref, *rows.target, columns, rows.in_bounds)

            def step(number, state):
                keys, values, seen = rows.load_block(
                    number, (key_ref, value_ref), (columns, value_columns)
                )
                logits = jnp.where(seen, softmax.signed(product(queries, keys)), -jnp.inf)
                return softmax.attend(state, logits, values)

            zeros = jnp.zeros((tile.rows,), jnp.float32)
            out = [jnp.zeros((tile.rows, e.size), jnp.float32) for e in value_columns]
            state = (zeros - jnp.inf, zeros, out)
            row_max, row_sum, out = jax.lax.fori_loop(0, rows.count, step, state)
            some = row_sum > 0
            row_sum = jnp.where(some, row_sum, 1.0)
            for e, x in zip(value_columns, out, strict=True):
                rows.store(out_ref, softmax.mean(x, row_sum), e)
            lse = jnp.where(some, softmax.lse(row_max, row_sum), -jnp.inf)
            store(lse_ref.at[*rows.target], lse, mask=rows.in_bounds)

        each(tiles, list_refs[-1][0] > 0, attend)

    return call(
        query_tile_kernel,
        query,
        key,
        value,
        *_list_arrays(lists, offset, enabled),
        grid=(programs_of(tiles, heads), heads),
        out_shape=(
            jax.ShapeDtypeStruct((*query.shape[:3], value.shape[3]), query.dtype),
            jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
        ),
        interpret=interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def query_gradient(
    lists: MergedLists, inputs: BackwardInputs, offset, enabled, *, block, scale, tile, interpret
):  # fmt: skip
    """Gradient [B, T, N, D] of the queries; the other arguments are those of `attention`."""
    query, key, value, *of_queries = inputs
    tiles, heads = _sizes(lists)

    def query_tile_gradient_kernel(query_ref, key_ref, value_ref, *refs):
        *list_refs, dout_ref, lse_ref, delta_ref, dquery_ref = refs
        head = pl.program_id(1)

        def differentiate(number):
            rows = _Rows(list_refs, query_ref, key_ref, block, tile, number, head)
            columns, value_columns = (columns_of(x, COLUMNS) for x in (key, value))
            lses = load(lse_ref.at[*rows.target], mask=rows.in_bounds, other=-jnp.inf)
            active = lses > -jnp.inf  # a row that attends to no key may hold any value
            queries = load_tiles(query_ref, *rows.target, columns, active)
            douts = load_tiles(dout_ref, *rows.target, value_columns, active)
            deltas = load(delta_ref.at[*rows.target], mask=active)

            def step(number, dquery):
                keys, values, seen = rows.load_block(
                    number, (key_ref, value_ref), (columns, value_columns)
                )
                p = softmax_weights(product(queries, keys), lses[:, None], scale, key_ref.dtype)
                p = jnp.where(seen, p, 0.0)
                ds = (p * (product(douts, values) - deltas[:, None])).astype(key_ref.dtype)
                return [x + dot(ds, k, (1, 0)) for x, k in zip(dquery, keys, strict=True)]

            zeros = [jnp.zeros((tile.rows, d.size), jnp.float32) for d in columns]
            for d, x in zip(columns, jax.lax.fori_loop(0, rows.count, step, zeros), strict=True):
                rows.store(dquery_ref, x * scale, d)

        each(tiles, list_refs[-1][0] > 0, differentiate)

    return call(
        query_tile_gradient_kernel,
        query,
        key,
        value,
        *_list_arrays(lists, offset, enabled),
        *of_queries,
        grid=(programs_of(tiles, heads), heads),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        interpret=interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _list_arrays(lists, offset, enabled):
    """The arrays that `_Rows` reads, in its order."""
    return lists.start, lists.members, lists.count, offset, enabled


def _sizes(lists):
    """Number of tiles of a sequence, and number of (sequence, key head) pairs."""
    batch, kv_heads, tiles = lists.count.shape
    return tiles, batch * kv_heads


class _Rows:
    """The rows of a tile: row r is query head r % G of token r // G of the tile.

    Attributes:
      count: number of blocks of the tile.
      in_bounds: bool [R], which rows exist.
      target: batch index, token [R] and query head [R].
      column: int32 [R], position of each row's token in the key sequence.
    """

    def __init__(self, list_refs, query_ref, key_ref, block, tile, number, head):
        _, length, heads, _ = query_ref.shape
        kv_heads = key_ref.shape[2]
        group = heads // kv_heads
        tokens = tile_tokens(tile, group)
        self.start_ref, self.members_ref, count_ref, offset_ref, _ = list_refs
        self.tile, self.block = number, block
        self.batch, self.kv_head = split(head, kv_heads)
        self.count = count_ref[self.batch, self.kv_head, self.tile]
        self.of_tile, g = split(iota(tile.rows), group)
        token = self.tile * tokens + self.of_tile
        self.in_bounds = (self.of_tile < tokens) & (token < length)
        self.target = (self.batch, token, self.kv_head * group + g)
        # positions of the tile and of its queries in the key sequence
        self.first = self.tile * tokens + offset_ref[0]
        self.column = token + offset_ref[0]

    def load_block(self, number, refs, columns):
        """Tiles [b, columns] of a block's keys and values, and the attention mask, bool [R, b]."""
        at = (self.batch, self.kv_head, self.tile, number)
        column = self.start_ref[*at] + iota(self.block)
        members = self.members_ref[*at]
        chosen = (jnp.right_shift(jnp.full_like(self.of_tile, members), self.of_tile) & 1) > 0
        # the highest set bit is the last token that selected the block: the exponent of the float32
        exponent = jax.lax.bitcast_convert_type(members.astype(jnp.float32), jnp.int32) >> 23
        # keys that no query of the tile attends to may hold any value, so they are not loaded
        visible = column <= self.first + exponent - 127
        tiles = (
            load_tiles(ref, self.batch, column, self.kv_head, cut, visible)
            for ref, cut in zip(refs, columns, strict=True)
        )
        last = jnp.where(chosen, self.column, -1)
        return *tiles, column[None, :] <= last[:, None]

    def store(self, ref, x, columns):
        """Stores a tile [R, columns] of results."""
        batch, token, head = self.target
        store(
            ref.at[batch, token[:, None], head[:, None], columns[None, :]],
            x.astype(ref.dtype),
            mask=rows_mask(self.in_bounds, columns, ref.shape[3]),
        )
