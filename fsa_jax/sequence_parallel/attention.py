"""Native sparse attention with the tokens of a sequence over the devices of a mesh axis.

Queries stay on their device. Keys and values, including the compressed ones, are gathered for one
KV head after another, so peak memory is the device's share of everything and one head's keys and
values of the whole sequence. Gradients of keys and values return by reduce-scatter, in float32.

Arrays of tokens are in zigzag order (`zigzag.py`). A device's part is two calls of the operations
of `fsa_jax.ops`, one for each of its chunks: queries at an offset, keys of the whole sequence.

Shapes: B sequences, T tokens, n devices, L tokens of a chunk, N query heads, K key/value heads,
G = N/K, D and E head widths, M = T/d compressed windows of stride d.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fsa_jax.config import NSAConfig
from fsa_jax.ops import gated_sum
from fsa_jax.ops.block_attention import Lists, block_forward, block_gradients
from fsa_jax.ops.call import BRANCHES, RESULTS, QueryTerms
from fsa_jax.ops.compressed_selection import attend_and_choose
from fsa_jax.ops.nsa import NSASpec
from fsa_jax.ops.range_attention import Ranges, range_forward, range_gradients
from fsa_jax.pallas import SelectedTuning
from fsa_jax.semantics import segments
from fsa_jax.semantics.precision import accumulation_dtype
from fsa_jax.semantics.segments import SegmentInfo, Windows
from fsa_jax.sequence_parallel import zigzag

#: How the kernels of the selected branch run: their partial results take few bytes, since a device
#: has a share of the tokens.
TUNING = SelectedTuning(scratch_bytes=2**28)


@dataclasses.dataclass(frozen=True)
class ShardedSpec:
    """Everything static about a call.

    Attributes:
      ops: the operations, all by one backend.
      shared: whether the selected branch and the window have one key and one value.
      axis: the mesh axis that splits the tokens.
    """

    ops: NSASpec
    shared: bool
    axis: str

    @property
    def config(self) -> NSAConfig:
        """The sizes."""
        return self.ops.config

    @property
    def packed(self) -> bool:
        """Whether sequences have segment ids."""
        return self.ops.selected.packed


def attention(ops: NSASpec, query, compressed, sources, gates, segment_ids, *, axis: str) -> Any:
    """The gated sum of the three branches, of queries that are split over a mesh axis.

    Args:
      ops: the operations, all with the backend that serves the call.
      query: [B, T, N, D]; all arrays of tokens are in zigzag order.
      compressed: key [B, M, K, D] and value [B, M, K, E], windows laid out by chunks.
      sources: one pair (key [B, T, K, D], value [B, T, K, E]) for the selected branch and the
        window, or a pair for each.
      gates: [B, T, N, 3] or [B, T, 1, 3].
      segment_ids: int32 [B, T], or None.
      axis: the mesh axis.

    Returns:
      [B, T, N, E].
    """
    _, ids = zigzag.ids_or_zeros(segment_ids, query.shape[:2])
    spec = ShardedSpec(ops, len(sources) == 1, axis)
    flat = tuple(x for pair in sources for x in pair)
    return _attention(spec, query, compressed, flat, gates, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, query, compressed, sources, gates, ids) -> Any:
    return _attention_fwd(spec, query, compressed, sources, gates, ids)[0]


def _attention_fwd(spec, query, compressed, sources, gates, ids):
    results = _forward(spec, query, *compressed, *sources, ids)
    names = [f"{branch}_{part}" for branch in BRANCHES for part in ("out", "lse")]
    results = tuple(map(spec.ops.selection.named, (*names, "block_indices"), results))
    *results, indices = results
    outs, lses = results[::2], results[1::2]
    residuals = (query, compressed, sources, gates, ids, outs, lses, indices)
    return gated_sum.combine(gates, outs), residuals


def _attention_bwd(spec, residuals, dout):
    query, compressed, sources, gates, ids, outs, lses, indices = residuals
    # What needs the outputs comes first. The cotangents of the branches are made where they are
    # used, a head and chunk at a time: whole, they would be three times as large as dout.
    found = [gated_sum.gate_gradient(gates[..., i], dout, out) for i, out in enumerate(outs)]
    dgates, _, deltas = zip(*found, strict=True)
    arrays = (query, *compressed, *sources, ids, *lses, *deltas, indices, gates, dout)
    dquery, dkey, dvalue, *dsources = _backward(spec, *arrays)
    dgates = gated_sum.gates_gradient(gates, dgates)
    return dquery, (dkey, dvalue), tuple(dsources), dgates, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _operands(spec):
    operands = {"query": "b t n d", "compressed_key": "b m k d", "compressed_value": "b m k e"}
    for prefix in ("",) if spec.shared else ("selected ", "window "):
        operands |= {f"{prefix}key": "b t k d", f"{prefix}value": "b t k e"}
    return operands | {"segment_ids": "b t"}


@functools.partial(jax.jit, static_argnums=0)
def _forward(spec, *arrays):
    def body(axis, *arrays):
        return ShardedNSA(spec, axis, *arrays).forward()

    results = (*RESULTS * len(BRANCHES), "b t k s")
    stride = spec.config.kernel_stride
    return zigzag.over_axis(body, spec.axis, stride, _operands(spec), results, *arrays)


@functools.partial(jax.jit, static_argnums=0)
def _backward(spec, *arrays):
    operands = _operands(spec)
    count, one_gate = len(operands), arrays[-2].shape[2] == 1

    def body(axis, *arrays):
        return ShardedNSA(spec, axis, *arrays[:count]).backward(arrays[count:])

    given = {f"{branch} {name}": "b t n" for name in ("lse", "delta") for branch in BRANCHES}
    given |= {"block_indices": "b t k s", "gates": "b t one c" if one_gate else "b t n c"}
    given |= {"dout": "b t n e"}
    grads = tuple(operands.values())[:-1]
    stride = spec.config.kernel_stride
    return zigzag.over_axis(body, spec.axis, stride, operands | given, grads, *arrays)


def in_turn(count, step, carry):
    """The carry after `step(carry, number)` of each head or chunk.

    They run one after another, since all at once they would need more memory.
    """
    numbers = jnp.arange(count, dtype=jnp.int32)
    return jax.lax.scan(lambda carry, number: (step(carry, number), None), carry, numbers)[0]


class Share:
    """A device's share of the sequences: its tokens, in two chunks, and the segments of all tokens.

    Args:
      axis: the mesh axis.
      query: [B, share, N, D].
      kv_heads: key heads K.
      ids: segment ids of the device's tokens, int32 [B, share].
      packed: whether the ids count.
      window_size: how many tokens up to and including its own a query sees.
    """

    def __init__(self, axis, query, kv_heads: int, ids, *, packed: bool, window_size: int | None):
        self.query, self.kv_heads, self.group = query, kv_heads, query.shape[2] // kv_heads
        self.device = zigzag.Device(axis, query.shape[1])
        self.segments = zigzag.describe(self.device, ids, packed)
        self.total = self.segments.start.shape[1]
        self.window_size = min(window_size or self.total, self.total)

    def put(self, results, parts, head, half=0):
        """Results [B, T, heads, ...] with parts of one KV head and chunk written in place."""

        def put(x, part):
            start = (0, half * part.shape[1], head * part.shape[2], *[0] * (x.ndim - 3))
            # with x64 on, Python integers would become int64 beside the int32 indices
            start = [jnp.asarray(number, jnp.int32) for number in start]
            return jax.lax.dynamic_update_slice(x, part, start)

        return tuple(map(put, results, parts))

    def head_of(self, x, head, size=1):
        """Heads of one KV head of [B, T, heads, ...]."""
        return jax.lax.dynamic_slice_in_dim(x, head * size, size, axis=2)

    def of_chunk(self, ranges, half):
        """Ranges of the sequence's tokens, cut to a chunk and counted from its first token."""
        begin, length = self.device.offset(half), self.device.chunk
        return tuple(jnp.clip(x - begin, 0, length) for x in ranges)

    def near(self, half):
        """The tokens that the windows of a chunk may contain: the first, and their number."""
        length = self.device.chunk
        before = min(self.window_size - 1, self.total - length)
        return jnp.maximum(self.device.offset(half) - before, 0), length + before

    def nearby(self, x, half):
        begin, size = self.near(half)
        return jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1)

    def add_nearby(self, sums, parts, half):
        """Sums of the sequence's tokens, with parts of those that `near` names added in place."""
        begin, _ = self.near(half)
        return [
            jax.lax.dynamic_update_slice_in_dim(
                total, self.nearby(total, half) + part.astype(total.dtype), begin, axis=1
            )
            for total, part in zip(sums, parts, strict=True)
        ]

    def window(self, half) -> Ranges:
        """The ranges between the queries of a chunk and the tokens that `near` names."""
        ranges, (begin, _) = Ranges.of_tokens(self.segments, self.window_size), self.near(half)
        keys = tuple(self.device.cut(x, half) - begin for x in ranges.keys)
        return Ranges(keys, self.of_chunk([self.nearby(x, half) for x in ranges.queries], half))


class ShardedNSA(Share):
    """A device's part of the attention: its queries, and one KV head's keys of whole sequences."""

    def __init__(self, spec, axis, query, compressed_key, compressed_value, *rest):
        *self.sources, ids = rest
        self.spec, config = spec, spec.config
        self.compressed = (compressed_key, compressed_value)
        kv_heads, window_size = compressed_key.shape[2], config.window_size
        super().__init__(axis, query, kv_heads, ids, packed=spec.packed, window_size=window_size)
        self.windows = segments.describe_windows(
            self.segments, config.kernel_size, config.kernel_stride
        )

    def _keys(self, head):
        """Compressed keys and values, then those of the sources: [B, M or T, 1, width] each."""
        gathered = [self.device.gather(self.head_of(x, head)) for x in self.compressed]
        if self.spec.packed:
            gathered = [self._ordered(x) for x in gathered]
        return gathered, [self.device.gather(self.head_of(x, head)) for x in self.sources]

    def _places(self):
        """The place of each slot's window in the layout by chunks, int32 [B, M]; M: no window."""
        start, length = self.windows.start, self.device.chunk
        slots = length // self.spec.config.kernel_stride  # of a chunk
        edges = jnp.arange(2 * self.device.count, dtype=jnp.int32) * length
        # slots taken by windows that start before each chunk
        before = jax.vmap(lambda row: jnp.searchsorted(row, edges).astype(jnp.int32))(start)
        chunk = jnp.minimum(start // length, 2 * self.device.count - 1)
        slot = jnp.arange(start.shape[1], dtype=jnp.int32)[None]
        place = chunk * slots + slot - jnp.take_along_axis(before, chunk, axis=1)
        return jnp.where(start < self.total, place, start.shape[1])

    def _ordered(self, x):
        """Windows in the layout by chunks, put into the order of their slots."""
        read = lambda row, at: row.at[at].get(mode="fill", fill_value=0)  # noqa: E731
        return jax.vmap(read)(x, self._places())

    def _by_chunks(self, x):
        """The transpose of `_ordered`."""
        write = lambda row, at: jnp.zeros_like(row).at[at].set(row, mode="drop")  # noqa: E731
        return jax.vmap(write)(x, self._places())

    def _windows(self, half) -> Ranges:
        """The ranges between the queries of a chunk and the compressed keys."""
        ranges = Ranges.of_windows(self.segments, self.windows, self.spec.config.kernel_size)
        keys = tuple(self.device.cut(x, half) for x in ranges.keys)
        return Ranges(keys, self.of_chunk(ranges.queries, half))

    def _lists(self, half, indices) -> Lists:
        """The listed blocks of the queries of a chunk, in the sequence."""
        segment_info = self._local(half)
        block_starts = segments.listed_block_starts(
            segment_info, indices, self.spec.config.block_size
        )
        counts = block_starts < self.device.chunk
        block_starts = jnp.where(counts, block_starts + self.device.offset(half), self.total)
        offset = jnp.broadcast_to(self.device.offset(half), (self.query.shape[0], 1))
        return Lists(
            block_starts, self.segments.start, self.segments.end, self.segments.valid, offset
        )

    def _local(self, half) -> SegmentInfo:
        """The segments of a chunk's tokens, counted from the first token of the chunk."""
        begin, cut = self.device.offset(half), functools.partial(self.device.cut, half=half)
        segment_info = self.segments
        return SegmentInfo(
            cut(segment_info.start) - begin,
            cut(segment_info.end) - begin,
            cut(segment_info.valid),
            self.spec.packed,
        )

    def forward(self) -> Any:
        """Out and lse of each branch, and the lists of blocks."""
        ops = self.spec.ops

        def step(results, head):
            compressed, sources = self._keys(head)
            query = self.head_of(self.query, head, self.group)

            def chunk(results, half):
                q = self.device.half_of(query, half)
                out, lse, indices = self._attend_and_choose(half, q, *compressed)
                lists = self._lists(half, indices)
                *blocks, _ = block_forward(ops.selected, lists, q, *sources[:2])
                near = (self.nearby(x, half) for x in sources[-2:])
                window = range_forward(ops.window, self.window(half), q, *near)
                return self.put(results, (out, lse, *blocks, *window, indices), head, half)

            return in_turn(2, chunk, results)

        places = self.query.shape[:3]
        values = (self.compressed[1], self.sources[1], self.sources[-1])
        results = [
            jnp.zeros((*places, *width), dtype)
            for x in values
            for width, dtype in ((x.shape[3:], x.dtype), ((), accumulation_dtype(x)))
        ]
        indices = jnp.zeros((*places[:2], self.kv_heads, self.spec.config.topk), jnp.int32)
        return in_turn(self.kv_heads, step, (*results, indices))

    def _attend_and_choose(self, half, *arrays):
        visible = (self.device.cut(x, half) for x in (self.windows.first, self.windows.visible))
        windows, ops = Windows(self.windows.start, *visible), self.spec.ops
        ranges, segment_info = self._windows(half), self._local(half)
        return attend_and_choose(
            ops.compressed, ops.selection, ranges, arrays, segment_info, windows
        )

    def backward(self, given):
        """Gradients of the queries, the compressed keys and values, and the sources.

        `given` are lse and delta of the branches, the lists of blocks, the gates, and dout.
        """
        lses, deltas, (indices, gates, dout) = given[:3], given[3:6], given[6:]
        wide, ops = accumulation_dtype(self.query), self.spec.ops

        def chunk(keys, head, state, half):
            def own(x, size):
                return self.device.half_of(self.head_of(x, head, size), half)

            compressed, sources = keys
            dquery, dcompressed, dsources = state
            q, over, *lse = (own(x, self.group) for x in (self.query, dout, *lses))
            shared = gates.shape[2] == 1
            gate = self.device.half_of(gates, half) if shared else own(gates, self.group)

            def terms(branch, *before):
                dout, _ = jax.lax.optimization_barrier((over, before))
                dbranch = gated_sum.branch_cotangent(gate[..., branch], dout)
                return QueryTerms.of_output(lse[branch], own(deltas[branch], self.group), dbranch)

            # The selected branch comes first, since it needs most memory by itself.
            lists = self._lists(half, own(indices, 1))
            dq_selected, *sums = block_gradients(
                ops.selected, lists, terms(1), q, *sources[:2], sums=dsources[:2]
            )
            dsources = sums + dsources[2:]
            dq, *parts = range_gradients(
                ops.compressed, self._windows(half), terms(0, dq_selected), q, *compressed
            )
            dcompressed = [
                x + part.astype(wide) for x, part in zip(dcompressed, parts, strict=True)
            ]
            near = (self.nearby(x, half) for x in sources[-2:])
            dq_window, *parts = range_gradients(
                ops.window, self.window(half), terms(2, dq_selected), q, *near
            )
            dsources = dsources[:-2] + self.add_nearby(dsources[-2:], parts, half)
            dq = dq.astype(wide) + dq_selected.astype(wide) + dq_window.astype(wide)
            dquery = self.put([dquery], [dq.astype(q.dtype)], head, half)[0]
            return dquery, dcompressed, dsources

        def step(results, head):
            keys = self._keys(head)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), keys)
            dquery, dcompressed, dsources = in_turn(
                2, functools.partial(chunk, keys, head), (results[0], *zeros)
            )
            if self.spec.packed:
                dcompressed = [self._by_chunks(x) for x in dcompressed]
            scattered = (self.device.scatter(x) for x in (*dcompressed, *dsources))
            # key and value have the dtype of the query
            parts = (x.astype(self.query.dtype) for x in scattered)
            return dquery, *self.put(results[1:], parts, head)

        shares = (self.query, *self.compressed, *self.sources)
        return in_turn(self.kv_heads, step, tuple(map(jnp.zeros_like, shares)))
