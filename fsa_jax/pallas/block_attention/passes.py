"""Selected attention from kernels: chunks, the order of the kernels, and the two passes.

Forward: build_index, then per chunk partial_attention -> merge_outputs, or query_outer where the
group is large; or, where neighbouring queries share enough of their blocks, query_tile. Which of
them is decided on the device, by the lists themselves: the other one finds no work and ends.
Backward, decided likewise: per chunk partial_gradients -> sum_gradients (dQ) and sum_blocks (dK,
dV); or dQ by query_tile or query_outer, and per chunk key_gradients -> sum_blocks.
A chunk is some (row, KV head) pairs and some tokens of all queries; its partial results fit the
scratch budget. Chunks run one after another in a scan, and update the results in place.

Shapes: B rows, T tokens, N query heads, K key/value heads, S listed blocks; H heads and C tokens
of a chunk, c chunks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from fsa_jax.pallas.block_attention import (
    kv_outer_backward,
    kv_outer_forward,
    kv_outer_key_gradients,
    merge_partials,
    query_index,
    query_outer,
    query_tile,
)
from fsa_jax.pallas.block_attention.plan import Plan
from fsa_jax.pallas.block_attention.work_item import Chunk
from fsa_jax.semantics.segments import Rows

#: What a block of a tile of 64 rows costs the query-tile kernels: as much as so many rows of pairs
#: cost the KV-outer kernels, forward and for dq, and as so many pairs cost the query-outer kernels,
#: likewise. Measured at 65,536 tokens, 4 key heads of width 128 (benchmarks/NOTES.md).
KV_OUTER_ROWS, KV_OUTER_DQ_ROWS = 13, 24
QUERY_OUTER_PAIRS, QUERY_OUTER_DQ_PAIRS = 1.4, 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Selected attention, as both passes take it.

    Attributes:
      plan: static sizes.
      query: [B, T, N, D], floating.
      key: [B, T, K, D].
      value: [B, T, K, E].
      starts: first token of each listed block, T where the entry does not count.
      lists: what `build_lists` gives.
      offset: the token of the keys' row that query token 0 is; queries may be part of the row.
      rows: the documents.
      block_size: tokens of a block.
      scale: factor of the logits.
      interpret: run the kernels in interpret mode.
    """

    plan: Plan
    query: Float[Array, "B T N D"]
    key: Float[Array, "B T K D"]
    value: Float[Array, "B T K E"]
    starts: Int[Array, "B T K S"]
    lists: query_index.Index
    offset: Int[Array, "1"]
    rows: Rows
    block_size: int
    scale: float
    interpret: bool

    @property
    def static(self):
        """What every kernel takes."""
        return {"block": self.plan.block, "scale": self.scale, "interpret": self.interpret}

    @property
    def arrays(self):
        return self.query, self.key, self.value

    def split_starts(self):
        """`starts` of blocks of the plan's size."""
        length = self.key.shape[1]
        return _split_blocks(self.starts, self.offset, length, self.block_size, self.plan.block)

    def chunks(self, starts, lists):
        """Chunks in their order, as `_fold` takes them."""
        return *_chunk_lists(self.plan, starts, self.offset, self.key.shape[1]), lists

    def chunk(self, where, starts, lists) -> Chunk:
        """One of `chunks`, for the kernels."""
        return Chunk(
            where=where,
            lists=lists,
            heads=self.plan.heads,
            tokens=self.plan.tokens,
            slots=starts.shape[-1],
            pairs=self.plan.pairs,
            **self.static,
        )


def build_lists(
    plan: Plan, starts: Int[Array, "B T K S"], offset, rows: Rows, *, block_size, interpret
) -> query_index.Index:
    """The query index of all chunks; arguments as in `Problem`."""
    kv_heads, length = starts.shape[2], rows.start.shape[1]
    starts = _split_blocks(starts, offset, length, block_size, plan.block)
    where, starts = _chunk_lists(plan, starts, offset, length)
    build = functools.partial(
        query_index.build_index,
        rows=rows,
        kv_heads=kv_heads,
        spacing=_spacing(plan, rows.packed),
        block=plan.block,
        pairs=plan.pairs,
        interpret=interpret,
    )
    if starts.size <= plan.sort_pairs:
        return build(where, starts)
    lists = jax.lax.map(lambda x: build(x[0][None], x[1][None]), (where, starts))
    return jax.tree.map(lambda x: x[:, 0], lists)


def lists_shape(
    plan: Plan, lists: tuple[int, ...], length: int, *, block_size: int, packed: bool
) -> query_index.Index:
    """What `build_lists` makes of lists [B, T, K, S], as shapes and dtypes.

    `length` is that of a row of keys, and `packed` says whether rows have segment ids.
    """
    batch, tokens, kv_heads, slots = lists
    chunks = batch * kv_heads // plan.heads * -(-tokens // plan.tokens)
    cut = (chunks, plan.heads, plan.tokens, slots * (block_size // plan.block))
    spacing = _spacing(plan, packed)
    return query_index.index_shape(cut, length, spacing=spacing, block=plan.block, pairs=plan.pairs)


def attention(problem: Problem):
    """Forward pass.

    Returns:
      out [B, T, N, E] in the dtype of `query`, and lse float32 [B, T, N].
    """
    plan, query, key, lists = problem.plan, problem.query, problem.key, problem.lists
    static, arrays = problem.static, problem.arrays
    starts = problem.split_starts()
    outer = functools.partial(
        query_outer.attention, starts, *arrays, problem.offset, tile=plan.query_outer, **static
    )
    methods, done = plan.forward_methods, jnp.zeros((1,), jnp.int32)
    if methods == ("query_outer",):
        return outer()
    if "query_tile" in methods:
        tile, costs = plan.query_tile, (KV_OUTER_ROWS, QUERY_OUTER_PAIRS)
        tiles, done = _tiles(starts, arrays, tile, methods, costs, problem.interpret)
        results = query_tile.attention(tiles, *arrays, problem.offset, done, tile=tile, **static)
        if "query_outer" in methods:
            return outer(done=done, into=results)
        if "kv_outer" not in methods:
            return results
        # items without pairs: no kernel below does anything where the results are there already
        lists = query_index.only_if(done == 0, lists)
    else:
        # the chunks write all of it
        results = (
            jax.lax.empty((*query.shape[:3], problem.value.shape[3]), query.dtype),
            jax.lax.empty(query.shape[:3], jnp.float32),
        )

    def step(results, chunk):
        out, lse = results
        where, starts, _ = chunk
        part, part_lse = kv_outer_forward.partial_attention(
            problem.chunk(*chunk), *arrays, tile=plan.forward, partial_dtype=plan.partial_dtype
        )
        return merge_partials.merge_outputs(
            where,
            _counted(starts, query, key),
            part,
            part_lse,
            out,
            lse,
            done,
            kv_heads=key.shape[2],
            elements=plan.merge_elements,
            interpret=problem.interpret,
        )

    return _fold(step, results, problem.chunks(starts, lists))


def gradients(problem: Problem, lse, delta, dout, sums=None):
    """Backward pass: (dq, dk, dv) in the dtypes of query, key and value.

    Args:
      problem: that of `attention`.
      lse: what `attention` returned.
      delta: sum(out * dout) - dlse, float32 [B, T, N].
      dout: cotangent of the output.
      sums: float32 sums of dk and dv, which are added to, and returned.
    """
    plan, query, key, value, rows = problem.plan, *problem.arrays, problem.rows
    starts = problem.split_starts()
    spacing = _spacing(plan, rows.packed)
    methods = plan.backward_methods
    kv_outer, either = "kv_outer" in methods, len(methods) > 1
    if methods == ("kv_outer",):
        # the chunks write all of dq
        dquery, done = jax.lax.empty(query.shape, query.dtype), jnp.zeros((1,), jnp.int32)
    else:
        arrays = (query, key, value, dout, lse, delta, problem.offset)
        dquery, done = _query_gradient(plan, starts, arrays, problem.static)
    chunks = problem.chunks(starts, problem.lists)
    inverse = None
    if kv_outer:
        offset = problem.offset[0]
        valid = jax.lax.dynamic_slice_in_dim(rows.valid, offset, query.shape[1], axis=1)
        inverse = kv_outer_backward.inverse_units(key, value, dout, delta, rows.valid, valid)
    first = rows.token - rows.position % plan.block
    block_start = jnp.where(rows.valid, first, rows.start.shape[1])
    arrays = (query, key, value, dout, lse, delta)

    def step(sums, chunk):
        where, starts, lists = chunk
        dquery, *sums = sums

        if kv_outer:
            own = query_index.only_if(done == 0, lists) if either else lists
            own = problem.chunk(where, starts, own)
            *sums, dkey_pieces, dvalue_pieces, part = kv_outer_backward.partial_gradients(
                own, *arrays, inverse, sums, tile=plan.backward, partial_dtype=plan.gradient_dtype
            )
            dquery = merge_partials.sum_gradients(
                where,
                _counted(starts, query, key),
                part,
                inverse,
                dquery,
                done,
                scale=problem.scale,
                kv_heads=key.shape[2],
                elements=plan.merge_elements,
                interpret=problem.interpret,
            )
            sums = kv_outer_backward.sum_blocks(
                own, block_start, dkey_pieces, dvalue_pieces, sums, spacing=spacing
            )
        if methods != ("kv_outer",):
            own = query_index.only_if(done > 0, lists) if kv_outer else lists
            own = problem.chunk(where, starts, own)
            *sums, dkey_pieces, dvalue_pieces = kv_outer_key_gradients.key_gradients(
                own, *arrays, sums, tile=plan.key_gradient
            )
            sums = kv_outer_backward.sum_blocks(
                own, block_start, dkey_pieces, dvalue_pieces, sums, spacing=spacing
            )
        return dquery, *sums

    if sums is not None:
        return _fold(step, (dquery, *sums), chunks)
    # with all tokens in one chunk, sums are final when they are written: no float32 copy
    whole = plan.tokens >= query.shape[1]
    sums = [jnp.zeros(x.shape, x.dtype if whole else jnp.float32) for x in (key, value)]
    dquery, dkey, dvalue = _fold(step, (dquery, *sums), chunks)
    return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype)


def _query_gradient(plan, starts, arrays, static):
    """Dq by kernels whose programs own queries; `arrays` are those of `query_outer`.

    Returns:
      dq, and int32 [1]: 0 where the lists leave it to the KV-outer kernels; then it is unwritten.
    """
    outer = functools.partial(
        query_outer.query_gradient, starts, *arrays, tile=plan.query_outer_backward, **static
    )
    methods, tile = plan.backward_methods, plan.query_tile_backward
    if methods == ("query_outer",):
        return outer(), jnp.ones((1,), jnp.int32)
    costs = (KV_OUTER_DQ_ROWS, QUERY_OUTER_DQ_PAIRS)
    tiles, done = _tiles(starts, arrays, tile, methods, costs, static["interpret"])
    dquery = query_tile.query_gradient(tiles, *arrays, enabled=done, tile=tile, **static)
    return outer(done=done, into=dquery) if "query_outer" in methods else dquery, done


def _tiles(starts, arrays, tile, methods, costs, interpret):
    """The lists of tiles, and whether those pay; where there is no other method, they do.

    `costs` are what a block of a tile costs, in rows of KV-outer and in pairs of query-outer
    kernels.
    """
    query, key, *_ = arrays
    end, group = key.shape[1], query.shape[2] // key.shape[2]
    pairs = {"kv_outer": costs[0] / group, "query_outer": costs[1], "query_tile": None}[methods[-1]]
    if pairs is None:
        done = jnp.ones((1,), jnp.int32)
    else:
        done = query_tile.pays(starts, end, pairs, tile, group)
    return query_tile.merge_lists(starts, end, tile, group, done, interpret=interpret), done


def _counted(starts, query, key):
    """Lists as `merge_partials.py` takes them: entries that do not count are T of the queries."""
    if query.shape[1] == key.shape[1]:
        return starts
    return jnp.where(starts < key.shape[1], 0, query.shape[1])


def _split_blocks(starts, offset, length, block_size, block):
    """Lists of smaller blocks: those of `block` tokens that make up the listed ones."""
    if block == block_size:
        return starts
    part = jnp.arange(0, block_size, block, dtype=jnp.int32)[None, None, None, None]
    token = offset + jnp.arange(starts.shape[1], dtype=jnp.int32)
    token = token[None, :, None, None, None]
    parts = starts[..., None] + part
    return rearrange(jnp.where(parts <= token, parts, length), "b t k s p -> b t k (s p)")


def _chunk_lists(plan, starts, offset, length):
    """Cuts the lists of rows of `length` keys.

    Returns:
      where [c, 3]: first (row, KV head) and token, and the offset; starts [c, H, C, S].
    """
    tokens = starts.shape[1]
    missing = -tokens % plan.tokens
    padding = ((0, 0), (0, missing), (0, 0), (0, 0))
    starts = jnp.pad(starts, padding, constant_values=length)
    starts = rearrange(starts, "b (m c) k s -> (b k) m c s", c=plan.tokens)
    heads = starts.shape[0]
    starts = rearrange(starts, "(n h) m c s -> (n m) h c s", h=plan.heads)
    where = jnp.mgrid[0 : heads : plan.heads, 0 : tokens : plan.tokens]
    where = where.astype(jnp.int32).reshape(2, -1).T
    where = jnp.concatenate([where, jnp.broadcast_to(offset[None], (where.shape[0], 1))], axis=1)
    return where, starts


def _spacing(plan, packed):
    """Every block starts at a multiple of this."""
    return 1 if packed else plan.block


def _fold(step, results, chunks):
    """Runs `step(results, chunk)` over the chunks in their order."""
    if jax.tree.leaves(chunks)[0].shape[0] == 1:
        return step(results, jax.tree.map(lambda x: x[0], chunks))
    return jax.lax.scan(lambda carry, chunk: (step(carry, chunk), None), results, chunks)[0]
