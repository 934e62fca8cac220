"""Forward and backward pass of selected attention: chunks and the sequence of kernels.

Forward: build_index, then partial_attention -> merge_outputs for each chunk, or query_outer where
the group is large; or query_tile, where neighbouring queries share enough of their blocks. The
kernel is chosen on the device, from the overlap of the lists; the other kernel is launched without
work and returns at once.
Backward, chosen likewise: partial_gradients -> sum_gradients (dQ) and sum_blocks (dK, dV) for each
chunk; or dQ by query_tile or query_outer, and key_gradients -> sum_blocks for each chunk.
A chunk covers some of the (sequence, KV head) pairs and some of the tokens, so that its partial
results fit the scratch budget. Chunks run one after another in a scan and update the results in
place.

Shapes: B sequences, T tokens, N query heads, K key/value heads, S listed blocks; H heads and C
tokens of a chunk, c chunks.
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
from fsa_jax.pallas.block_attention.backward_inputs import BackwardInputs
from fsa_jax.pallas.block_attention.plan import Plan
from fsa_jax.pallas.block_attention.work_item import Chunk
from fsa_jax.semantics.segments import SegmentInfo

#: Cost of one block of a 64-row tile in the query-tile kernels, forward and for dq: relative to the
#: cost of a row of pairs in the KV-outer kernels, and of a pair in the query-outer kernels.
#: Measured at 65,536 tokens, 4 key heads of width 128 (benchmarks/NOTES.md).
KV_OUTER_ROWS, KV_OUTER_DQ_ROWS = 13, 24
QUERY_OUTER_PAIRS, QUERY_OUTER_DQ_PAIRS = 1.4, 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The inputs of selected attention that both passes share.

    Attributes:
      plan: static sizes.
      query: [B, T, N, D], floating.
      key: [B, T, K, D].
      value: [B, T, K, E].
      block_starts: first token of each listed block, T at entries to ignore.
      index: the query index that `build_index` returns.
      offset: position of query token 0 in the key sequence; queries may be a part of the sequence.
      segments: the documents of the sequences.
      block_size: tokens of a block.
      scale: factor of the logits.
      interpret: run the kernels in interpret mode.
    """

    plan: Plan
    query: Float[Array, "B T N D"]
    key: Float[Array, "B T K D"]
    value: Float[Array, "B T K E"]
    block_starts: Int[Array, "B T K S"]
    index: query_index.Index
    offset: Int[Array, "1"]
    segments: SegmentInfo
    block_size: int
    scale: float
    interpret: bool

    @property
    def static(self):
        """Static arguments that every kernel takes."""
        return {"block": self.plan.block, "scale": self.scale, "interpret": self.interpret}

    @property
    def arrays(self):
        return self.query, self.key, self.value

    def split_block_starts(self):
        """`block_starts`, with each listed block split into blocks of the plan's size."""
        length = self.key.shape[1]
        return _split_blocks(
            self.block_starts, self.offset, length, self.block_size, self.plan.block
        )

    def chunks(self, block_starts, index):
        """The stacked arrays of all chunks, in order, for `_fold`."""
        return *_chunk_block_starts(self.plan, block_starts, self.offset, self.key.shape[1]), index

    def chunk(self, where, block_starts, index) -> Chunk:
        """One of the chunks, as the kernels take it."""
        return Chunk(
            where=where,
            index=index,
            heads=self.plan.heads,
            tokens=self.plan.tokens,
            num_selected=block_starts.shape[-1],
            pairs=self.plan.pairs,
            **self.static,
        )


def build_index(
    plan: Plan, block_starts: Int[Array, "B T K S"], offset, segments: SegmentInfo, *,
    block_size, interpret,
) -> query_index.Index:  # fmt: skip
    """Builds the query index of all chunks; arguments as in `Problem`."""
    kv_heads, length = block_starts.shape[2], segments.start.shape[1]
    block_starts = _split_blocks(block_starts, offset, length, block_size, plan.block)
    where, block_starts = _chunk_block_starts(plan, block_starts, offset, length)
    build = functools.partial(
        query_index.build_index,
        segments=segments,
        kv_heads=kv_heads,
        spacing=_spacing(plan, segments.packed),
        block=plan.block,
        pairs=plan.pairs,
        interpret=interpret,
    )
    if block_starts.size <= plan.sort_pairs:
        return build(where, block_starts)
    index = jax.lax.map(lambda x: build(x[0][None], x[1][None]), (where, block_starts))
    return jax.tree.map(lambda x: x[:, 0], index)


def index_shape(
    plan: Plan, shape: tuple[int, ...], length: int, *, block_size: int, packed: bool
) -> query_index.Index:
    """Shapes and dtypes of the index that `build_index` makes of lists [B, T, K, S].

    `length` is the length of a key sequence; `packed` says whether sequences have segment ids.
    """
    batch, tokens, kv_heads, num_selected = shape
    chunks = batch * kv_heads // plan.heads * -(-tokens // plan.tokens)
    cut = (chunks, plan.heads, plan.tokens, num_selected * (block_size // plan.block))
    spacing = _spacing(plan, packed)
    return query_index.index_shape(cut, length, spacing=spacing, block=plan.block, pairs=plan.pairs)


def attention(problem: Problem):
    """Forward pass.

    Returns:
      out [B, T, N, E] in the dtype of `query`, and lse float32 [B, T, N].
    """
    plan, query, key, index = problem.plan, problem.query, problem.key, problem.index
    static, arrays = problem.static, problem.arrays
    block_starts = problem.split_block_starts()
    outer = functools.partial(
        query_outer.attention,
        block_starts,
        *arrays,
        problem.offset,
        tile=plan.query_outer,
        **static,
    )
    methods, use_tiles = plan.forward_methods, jnp.zeros((1,), jnp.int32)
    if methods == ("query_outer",):
        return outer()
    if "query_tile" in methods:
        tile, costs = plan.query_tile, (KV_OUTER_ROWS, QUERY_OUTER_PAIRS)
        tiles, use_tiles = _tiles(block_starts, arrays, tile, methods, costs, problem.interpret)
        results = query_tile.attention(
            tiles, *arrays, problem.offset, use_tiles, tile=tile, **static
        )
        if "query_outer" in methods:
            return outer(skip=use_tiles, out_buffers=results)
        if "kv_outer" not in methods:
            return results
        # if query_tile has computed the results, the items are emptied: kernels below do nothing
        index = query_index.only_if(use_tiles == 0, index)
    else:
        # the chunks write every element
        results = (
            jax.lax.empty((*query.shape[:3], problem.value.shape[3]), query.dtype),
            jax.lax.empty(query.shape[:3], jnp.float32),
        )

    def step(results, chunk):
        out, lse = results
        where, block_starts, _ = chunk
        part, part_lse = kv_outer_forward.partial_attention(
            problem.chunk(*chunk), *arrays, tile=plan.forward, partial_dtype=plan.partial_dtype
        )
        return merge_partials.merge_outputs(
            where,
            _counted(block_starts, query, key),
            part,
            part_lse,
            out,
            lse,
            use_tiles,
            kv_heads=key.shape[2],
            elements=plan.merge_elements,
            interpret=problem.interpret,
        )

    return _fold(step, results, problem.chunks(block_starts, index))


def gradients(problem: Problem, lse, delta, dout, sums=None):
    """Backward pass: (dq, dk, dv) in the dtypes of query, key and value.

    Args:
      problem: the same as for `attention`.
      lse: logsumexp that `attention` returned.
      delta: sum(out * dout) - dlse, float32 [B, T, N].
      dout: cotangent of the output.
      sums: float32 dk and dv to accumulate into; they are returned as the new dk and dv.
    """
    plan, query, key, value, segments = problem.plan, *problem.arrays, problem.segments
    inputs = BackwardInputs(query, key, value, dout, lse, delta)
    block_starts = problem.split_block_starts()
    spacing = _spacing(plan, segments.packed)
    methods = plan.backward_methods
    kv_outer, either = "kv_outer" in methods, len(methods) > 1
    if methods == ("kv_outer",):
        # the chunks write every element of dq
        dquery, dq_computed = jax.lax.empty(query.shape, query.dtype), jnp.zeros((1,), jnp.int32)
    else:
        dquery, dq_computed = _query_gradient(problem, block_starts, inputs)
    chunks = problem.chunks(block_starts, problem.index)
    inverse = None
    if kv_outer:
        offset = problem.offset[0]
        valid = jax.lax.dynamic_slice_in_dim(segments.valid, offset, query.shape[1], axis=1)
        inverse = kv_outer_backward.inverse_units(key, value, dout, delta, segments.valid, valid)
    first = segments.token - segments.position % plan.block
    token_block_start = jnp.where(segments.valid, first, segments.start.shape[1])

    def step(sums, chunk):
        where, block_starts, index = chunk
        dquery, *sums = sums

        if kv_outer:
            own = query_index.only_if(dq_computed == 0, index) if either else index
            own = problem.chunk(where, block_starts, own)
            *sums, dkey_splits, dvalue_splits, part = kv_outer_backward.partial_gradients(
                own, inputs, inverse, sums, tile=plan.backward, partial_dtype=plan.gradient_dtype
            )
            dquery = merge_partials.sum_gradients(
                where,
                _counted(block_starts, query, key),
                part,
                inverse,
                dquery,
                dq_computed,
                scale=problem.scale,
                kv_heads=key.shape[2],
                elements=plan.merge_elements,
                interpret=problem.interpret,
            )
            sums = kv_outer_backward.sum_blocks(
                own, token_block_start, dkey_splits, dvalue_splits, sums, spacing=spacing
            )
        if methods != ("kv_outer",):
            own = query_index.only_if(dq_computed > 0, index) if kv_outer else index
            own = problem.chunk(where, block_starts, own)
            *sums, dkey_splits, dvalue_splits = kv_outer_key_gradients.key_gradients(
                own, inputs, sums, tile=plan.key_gradient
            )
            sums = kv_outer_backward.sum_blocks(
                own, token_block_start, dkey_splits, dvalue_splits, sums, spacing=spacing
            )
        return dquery, *sums

    if sums is not None:
        return _fold(step, (dquery, *sums), chunks)
    # with all tokens in one chunk, dk and dv are written once: they need no float32 accumulator
    whole = plan.tokens >= query.shape[1]
    sums = [jnp.zeros(x.shape, x.dtype if whole else jnp.float32) for x in (key, value)]
    dquery, dkey, dvalue = _fold(step, (dquery, *sums), chunks)
    return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype)


def _query_gradient(problem, block_starts, inputs):
    """Computes dq by kernels whose programs own queries.

    Returns:
      dq, and an int32 [1] flag; if it is 0, the KV-outer kernels are to compute dq, which is
      unwritten.
    """
    plan, offset, static = problem.plan, problem.offset, problem.static
    outer = functools.partial(
        query_outer.query_gradient,
        block_starts,
        inputs,
        offset,
        tile=plan.query_outer_backward,
        **static,
    )
    methods, tile = plan.backward_methods, plan.query_tile_backward
    if methods == ("query_outer",):
        return outer(), jnp.ones((1,), jnp.int32)
    costs = (KV_OUTER_DQ_ROWS, QUERY_OUTER_DQ_PAIRS)
    tiles, use_tiles = _tiles(block_starts, inputs, tile, methods, costs, problem.interpret)
    dquery = query_tile.query_gradient(tiles, inputs, offset, use_tiles, tile=tile, **static)
    if "query_outer" in methods:
        dquery = outer(skip=use_tiles, out_buffers=dquery)
    return dquery, use_tiles


def _tiles(block_starts, arrays, tile, methods, costs, interpret):
    """The merged lists of tiles, and an int32 [1] flag: 1 if the query-tile kernels are faster.

    The flag is always 1 if there is no other method. `costs` are the costs of a block of a tile, in
    rows of the KV-outer kernels and in pairs of the query-outer kernels.
    """
    query, key, *_ = arrays
    end, group = key.shape[1], query.shape[2] // key.shape[2]
    pairs = {"kv_outer": costs[0] / group, "query_outer": costs[1], "query_tile": None}[methods[-1]]
    if pairs is None:
        use_tiles = jnp.ones((1,), jnp.int32)
    else:
        use_tiles = query_tile.is_profitable(block_starts, end, pairs, tile, group)
    return query_tile.merge_lists(
        block_starts, end, tile, group, use_tiles, interpret=interpret
    ), use_tiles


def _counted(block_starts, query, key):
    """Lists for `merge_partials.py`, where invalid entries equal the number of query tokens."""
    if query.shape[1] == key.shape[1]:
        return block_starts
    return jnp.where(block_starts < key.shape[1], 0, query.shape[1])


def _split_blocks(block_starts, offset, length, block_size, block):
    """Replaces each listed block by the blocks of `block` tokens that it consists of."""
    if block == block_size:
        return block_starts
    part = jnp.arange(0, block_size, block, dtype=jnp.int32)[None, None, None, None]
    token = offset + jnp.arange(block_starts.shape[1], dtype=jnp.int32)
    token = token[None, :, None, None, None]
    parts = block_starts[..., None] + part
    return rearrange(jnp.where(parts <= token, parts, length), "b t k s p -> b t k (s p)")


def _chunk_block_starts(plan, block_starts, offset, length):
    """Splits the lists of sequences of `length` keys into chunks.

    Returns:
      where [c, 3]: first (sequence, KV head) pair, first token and offset;
      block_starts [c, H, C, S].
    """
    tokens = block_starts.shape[1]
    missing = -tokens % plan.tokens
    padding = ((0, 0), (0, missing), (0, 0), (0, 0))
    block_starts = jnp.pad(block_starts, padding, constant_values=length)
    block_starts = rearrange(block_starts, "b (m c) k s -> (b k) m c s", c=plan.tokens)
    heads = block_starts.shape[0]
    block_starts = rearrange(block_starts, "(n h) m c s -> (n m) h c s", h=plan.heads)
    where = jnp.mgrid[0 : heads : plan.heads, 0 : tokens : plan.tokens]
    where = where.astype(jnp.int32).reshape(2, -1).T
    where = jnp.concatenate([where, jnp.broadcast_to(offset[None], (where.shape[0], 1))], axis=1)
    return where, block_starts


def _spacing(plan, packed):
    """The number of which every block start is a multiple."""
    return 1 if packed else plan.block


def _fold(step, results, chunks):
    """Folds `step(results, chunk)` over the chunks in order."""
    if jax.tree.leaves(chunks)[0].shape[0] == 1:
        return step(results, jax.tree.map(lambda x: x[0], chunks))
    return jax.lax.scan(lambda carry, chunk: (step(carry, chunk), None), results, chunks)[0]
