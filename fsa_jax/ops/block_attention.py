"""Attention of each query to the blocks in its list.

Residuals of the backward pass, besides query, key and value: out, lse, the lists as first tokens
int32 [B, T, K, S], and for the kernels the index of the lists (int32 [B, K, T*S], and 36 bytes for
each block that may exist and each thousand pairs) and the segments, 9 bytes a token.

Shapes: B sequences, T tokens, N query heads, K key/value heads, M keys, S listed blocks, D and E
head widths.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fsa_jax import xla
from fsa_jax.ops.call import ATTENTION, QUERY_TERMS, RESULTS, Backend, OpSpec, QueryTerms, named
from fsa_jax.ops.partition import partitioned
from fsa_jax.pallas import tile_tables
from fsa_jax.pallas.block_attention.plan import Plan, SelectedTuning, make_plan
from fsa_jax.pallas.support import Unsupported, supported
from fsa_jax.semantics import segments
from fsa_jax.semantics.segments import SegmentInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSpec(OpSpec):
    """Attention to listed blocks.

    Attributes:
      block_size: tokens of a block.
      packed: whether sequences have segment ids.
      tuning: how the kernels run; None: the heuristics decide.
    """

    block_size: int
    packed: bool
    tuning: SelectedTuning | None = None

    def plan(self, *arrays: Any) -> Plan | Unsupported:
        """The plan for query, key and value, and the length of a list."""
        query, key, value, num_selected = arrays
        tuning = self.tuning or SelectedTuning()
        sizes = (num_selected, self.block_size, self.capability)
        plan = make_plan(tuning, query, key, value, *sizes)
        if isinstance(plan, Unsupported):
            return plan
        return tile_tables.fill(plan, tuning, self.table, query, key, value, self.block_size)


class Lists(NamedTuple):
    """The block lists of queries that are all tokens of the key sequences, or some of them.

    Attributes:
      block_starts: first token of each listed block; M where an entry is ignored.
      start, end, valid: the segments of the keys' tokens, as in `SegmentInfo`. (These are separate
        since a custom_vjp fills trees with objects other than arrays, which `SegmentInfo` refuses.)
      offset: query t is token offset[b, 0] + t of the keys' sequence; the same for all b.
    """

    block_starts: Int[Array, "B T K S"]
    start: Int[Array, "B M"]
    end: Int[Array, "B M"]
    valid: Bool[Array, "B M"]
    offset: Int[Array, "B 1"]

    @classmethod
    def of(
        cls, segment_info: SegmentInfo, block_indices: Int[Array, "B T K S"], block_size: int
    ) -> "Lists":
        """The lists made from block numbers, for queries of all tokens."""
        block_starts = segments.listed_block_starts(segment_info, block_indices, block_size)
        offset = jnp.zeros_like(segment_info.start[:, :1])
        return cls(block_starts, segment_info.start, segment_info.end, segment_info.valid, offset)

    def segments(self, packed: bool) -> SegmentInfo:
        """The segments of the keys."""
        return SegmentInfo(self.start, self.end, self.valid, packed=packed)


def selected_attention(
    spec: BlockSpec,
    query: Float[Array, "B T N D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K E"],
    block_indices: Int[Array, "B T K S"],
    segment_info: SegmentInfo,
) -> tuple[Float[Array, "B T N E"], Float[Array, "B T N"]]:
    """See fsa_jax.selected_attention."""
    return block_attention(
        spec, query, key, value, Lists.of(segment_info, block_indices, spec.block_size)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def block_attention(spec: BlockSpec, query, key, value, lists: Lists) -> Any:
    """Out [B, T, N, E] and lse [B, T, N] of attention to listed blocks."""
    return _block_attention_fwd(spec, query, key, value, lists)[0]


def _block_attention_fwd(spec, query, key, value, lists):
    out, lse, index = block_forward(spec, lists, query, key, value)
    results = named(spec, "selected", out, lse)
    return results, (query, key, value, lists, index, *results)


def _block_attention_bwd(spec, residuals, cotangents):
    *arrays, lists, index, out, lse = residuals
    terms = QueryTerms.of(out, lse, *cotangents)
    return *block_gradients(spec, lists, terms, *arrays, index=index), None


block_attention.defvjp(_block_attention_fwd, _block_attention_bwd)


def block_forward(spec: BlockSpec, lists: Lists, query, key, value) -> Any:
    """Out, lse, and the index of the lists, which `block_gradients` takes; not differentiable."""
    out, lse, *index = _forward(spec, query, key, value, *lists)
    return out, lse, tuple(index)


def block_gradients(
    spec: BlockSpec, lists: Lists, terms: QueryTerms, query, key, value, *, index=(), sums=()
) -> Any:
    """(dq, dk, dv) in the dtypes of query, key and value.

    Args:
      spec: the operation.
      lists: the lists of the queries.
      terms: what the forward pass and the cotangents say about each query.
      query: [B, T, N, D].
      key: [B, M, K, D].
      value: [B, M, K, E].
      index: that of `block_forward`; without it, kernels build it again.
      sums: dk and dv in float32 (or float64) that are added to, and returned in that dtype.
    """
    return _backward(
        spec, bool(index), bool(sums), query, key, value, *lists, *terms, *index, *sums
    )


_LISTS = {
    "block_starts": "b t k s",
    "start": "b m",
    "end": "b m",
    "valid": "b m",
    "offset": "b one",
}
_OPERANDS = ATTENTION | _LISTS


def _plan(spec, query, key, value, lists) -> Plan:
    return supported(spec.plan(query, key, value, lists.block_starts.shape[3]))


def _build_index(spec, plan, lists):
    from fsa_jax.pallas.block_attention import passes

    return passes.build_index(
        plan,
        lists.block_starts,
        lists.offset[0],
        lists.segments(spec.packed),
        block_size=spec.block_size,
        interpret=spec.interpret,
    )


def _index_shape(spec, plan, key, lists):
    """The shapes and dtypes of the result of `_build_index`."""
    from fsa_jax.pallas.block_attention import passes

    sizes = {"block_size": spec.block_size, "packed": spec.packed}
    return passes.index_shape(plan, lists.block_starts.shape, key.shape[1], **sizes)


def _problem(spec, plan, query, key, value, lists, index):
    from fsa_jax.pallas.block_attention import passes

    return passes.Problem(
        plan=plan,
        query=query,
        key=key,
        value=value,
        block_starts=lists.block_starts,
        index=index,
        offset=lists.offset[0],
        segments=lists.segments(spec.packed),
        block_size=spec.block_size,
        **spec.options,
    )


# Chunks are as large as a device's part allows, so the arrays of the index have other shapes on one
# device than on many. Between forward and backward they are stored by sequence and head, padded to
# sizes that hold the few more items that smaller chunks may have.


def _padded_sizes(spec, query, key, value, lists) -> tuple[int, ...]:
    """The padded size of each array of the index, for one sequence and KV head."""
    if spec.backend is Backend.XLA:
        return ()
    plan = _plan(spec, query, key, value, lists)
    arrays = jax.tree.leaves(_index_shape(spec, plan, key, lists))
    heads = key.shape[0] * key.shape[2]
    return tuple(-(-math.prod(x.shape) // heads) + x.shape[0] for x in arrays)


def _packed_axes(count: int) -> dict[str, str]:
    return {f"index[{i}]": f"b k x{i}" for i in range(count)}


def _pack(index, padded_sizes, key):
    batch, _, kv_heads, _ = key.shape

    def one(x, size):
        missing = batch * kv_heads * size - x.size
        return jnp.pad(x.reshape(-1), (0, missing)).reshape(batch, kv_heads, size)

    return tuple(map(one, jax.tree.leaves(index), padded_sizes))


def _unpack(shape, packed):
    leaves, tree = jax.tree.flatten(shape)
    flat = (x.reshape(-1)[: t.size].reshape(t.shape) for x, t in zip(packed, leaves, strict=True))
    return jax.tree.unflatten(tree, flat)


@functools.partial(jax.jit, static_argnums=0)
def _forward(spec, *arrays):
    query, key, value, *lists = arrays
    padded_sizes = _padded_sizes(spec, query, key, value, Lists(*lists))

    def kernels(query, key, value, *lists):
        from fsa_jax.pallas.block_attention import passes

        lists = Lists(*lists)
        plan = _plan(spec, query, key, value, lists)
        index = _build_index(spec, plan, lists)
        out, lse = passes.attention(_problem(spec, plan, query, key, value, lists, index))
        return out, lse, *_pack(index, padded_sizes, key)

    def portable(query, key, value, *lists):
        block_starts, *_, offset = lists
        out, lse = xla.block_attention(
            query, key, value, block_starts, offset[0], block_size=spec.block_size, scale=spec.scale
        )
        # a placeholder for the index of the kernels, which is not read
        batch, _, kv_heads, _ = key.shape
        return out, lse, *(jnp.zeros((batch, kv_heads, x), jnp.int32) for x in padded_sizes)

    results = (*RESULTS, *_packed_axes(len(padded_sizes)).values())
    return partitioned(spec.runs(kernels, portable), _OPERANDS, results)(*arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(spec, has_index, has_sums, *arrays):
    counts = [len(_LISTS), len(QUERY_TERMS)]
    extra = len(arrays) - len(ATTENTION) - sum(counts) - 2 * has_sums

    def parts(arrays):
        """The lists, the terms, the index and the sums, of the arrays behind query, key, value."""
        found = []
        for count in (*counts, extra, 2 * has_sums):
            found.append(arrays[:count])
            arrays = arrays[count:]
        return Lists(*found[0]), QueryTerms(*found[1]), *found[2:]

    def kernels(query, key, value, *rest):
        from fsa_jax.pallas.block_attention import passes

        lists, terms, packed, sums = parts(rest)
        plan = _plan(spec, query, key, value, lists)
        if has_index:
            index = _unpack(_index_shape(spec, plan, key, lists), packed)
        else:
            index = _build_index(spec, plan, lists)
        problem = _problem(spec, plan, query, key, value, lists, index)
        return passes.gradients(problem, terms.lse, terms.delta, terms.dout, sums or None)

    def portable(query, key, value, *rest):
        lists, terms, _, sums = parts(rest)
        dquery, *dkeys = xla.block_gradients(
            query, key, value, lists.block_starts, lists.offset[0], *terms,
            block_size=spec.block_size, scale=spec.scale,
        )  # fmt: skip
        if sums:
            dkeys = [total + x.astype(total.dtype) for total, x in zip(sums, dkeys, strict=True)]
        return dquery, *dkeys

    operands = _OPERANDS | QUERY_TERMS | _packed_axes(extra)
    operands |= {"dkey": "b m k d", "dvalue": "b m k e"} if has_sums else {}
    run = partitioned(spec.runs(kernels, portable), operands, tuple(ATTENTION.values()))
    return run(*arrays)
