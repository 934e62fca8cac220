"""Sequence parallelism: one row of tokens over the devices of a mesh axis.

Queries stay where they are. Keys and values, also the compressed ones, are gathered for one KV
head after another: peak memory is the device's share of everything, and one head's keys and values
of the whole row. Gradients of keys and values go back by reduce-scatter, in float32.

Arrays of tokens are in stripe order (`stripes.py`). A device's part is two calls of the operators
of `operators.py`, one for each of its stripes: queries at an offset, keys of the whole row.

Shapes: B rows, T tokens, n devices, L tokens of a stripe, N query heads, K key/value heads,
G = N/K, D and E head widths, M = T/d compressed windows of stride d.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fsa_jax import gating, operators, stripes
from fsa_jax.config import NSAConfig
from fsa_jax.operators import Call
from fsa_jax.pallas import SelectedTuning
from fsa_jax.pallas import tile_tables as tuned
from fsa_jax.semantics import segments
from fsa_jax.semantics.precision import wide_dtype
from fsa_jax.semantics.segments import Rows, Windows

#: Most bytes of partial results of the selected branch: a device has a share of a row's tokens.
SCRATCH_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class _Static:
    """Everything static about a call; `shared`: selected and window branch have one key."""

    config: NSAConfig
    scale: float
    mode: str
    packed: bool
    shared: bool
    axis: str
    capability: int = dataclasses.field(default_factory=operators.planned_capability)
    table: str | None = dataclasses.field(
        default_factory=tuned.table, metadata={"describe": tuned.entries}
    )

    def call(self, name: str) -> Call:
        return Call(
            self.mode,
            self.scale,
            self.capability,
            name=name,
            block_size=self.config.block_size,
            packed=self.packed,
            tuning=None if self.mode == "portable" else SelectedTuning(scratch_bytes=SCRATCH_BYTES),
            config=self.config,
            table=self.table,
            gated=True,
        )


def attention(
    query, compressed, sources, gates, segment_ids, *,
    config: NSAConfig, scale: float, mode, axis: str,
):  # fmt: skip
    """The gated sum of the three branches, of queries that are split over a mesh axis.

    Args:
      query: [B, T, N, D]; all arrays of tokens are in stripe order.
      compressed: key [B, M, K, D] and value [B, M, K, E], windows laid out by stripes.
      sources: one pair (key [B, T, K, D], value [B, T, K, E]) for the selected branch and the
        window, or a pair for each.
      gates: [B, T, N, 3] or [B, T, 1, 3].
      segment_ids: int32 [B, T], or None.
      config: the sizes.
      scale: factor of the logits.
      mode: as in `operators.Call`.
      axis: the mesh axis.

    Returns:
      [B, T, N, E].
    """
    packed, ids = stripes.ids_or_zeros(segment_ids, query.shape[:2])
    static = _Static(config, scale, mode, packed, len(sources) == 1, axis)
    flat = tuple(x for pair in sources for x in pair)
    return _attention(static, query, compressed, flat, gates, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, query, compressed, sources, gates, ids) -> Any:
    return _attention_fwd(static, query, compressed, sources, gates, ids)[0]


def _attention_fwd(static, query, compressed, sources, gates, ids):
    results = _forward_on(static)(query, *compressed, *sources, ids)
    names = [f"{branch}_{part}" for branch in _BRANCHES for part in ("out", "lse")]
    results = tuple(map(checkpoint_name, results, (*names, "block_indices")))
    *results, indices = results
    outs, lses = results[::2], results[1::2]
    residuals = (query, compressed, sources, gates, ids, outs, lses, indices)
    return gating.combine(gates, outs), residuals


def _attention_bwd(static, residuals, dout):
    query, compressed, sources, gates, ids, outs, lses, indices = residuals
    # What needs the outputs comes first. The cotangents of the branches are made where they are
    # used, a head and stripe at a time: whole, they would be three times as large as dout.
    found = [gating.gate_gradient(gates[..., i], dout, out) for i, out in enumerate(outs)]
    dgates, _, deltas = zip(*found, strict=True)
    arrays = (query, *compressed, *sources, ids, *lses, *deltas, indices, gates, dout)
    dquery, dkey, dvalue, *dsources = _backward_on(static, gates.shape[2] == 1)(*arrays)
    dgates = gating.gates_gradient(gates, dgates)
    return dquery, (dkey, dvalue), tuple(dsources), dgates, None


_attention.defvjp(_attention_fwd, _attention_bwd)

_BRANCHES = ("compressed", "selected", "window")
_RESULTS = ("b t n e", "b t n") * 3 + ("b t k s",)


def _operands(static):
    operands = {"query": "b t n d", "compressed_key": "b m k d", "compressed_value": "b m k e"}
    for prefix in ("",) if static.shared else ("selected ", "window "):
        operands |= {f"{prefix}key": "b t k d", f"{prefix}value": "b t k e"}
    return operands | {"segment_ids": "b t"}


def _forward_on(static):
    def body(axis, *arrays):
        return _Task(static, axis, *arrays).forward()

    stride = static.config.kernel_stride
    return stripes.over_axis(body, static.axis, stride, _operands(static), _RESULTS)


def _backward_on(static, one_gate):
    count = len(_operands(static))

    def body(axis, *arrays):
        return _Task(static, axis, *arrays[:count]).backward(arrays[count:])

    operands = _operands(static)
    given = {f"{branch} {name}": "b t n" for name in ("lse", "delta") for branch in _BRANCHES}
    given |= {"block_indices": "b t k s", "gates": "b t one c" if one_gate else "b t n c"}
    given |= {"dout": "b t n e"}
    grads = tuple(operands.values())[:-1]
    stride = static.config.kernel_stride
    return stripes.over_axis(body, static.axis, stride, operands | given, grads)


def in_turn(count, step, carry):
    """The carry after `step(carry, number)` of each head or stripe: at once they need more room."""
    numbers = jnp.arange(count, dtype=jnp.int32)
    return jax.lax.scan(lambda carry, number: (step(carry, number), None), carry, numbers)[0]


class Share:
    """A device's share of a row: its tokens, in two stripes, and the documents of the whole row.

    Args:
      axis: the mesh axis.
      query: [B, share, N, D].
      kv_heads: key heads K.
      ids: segment ids of the device's tokens, int32 [B, share].
      packed: whether the ids count.
      window_size: how many tokens a query sees before it, its own included.
    """

    def __init__(self, axis, query, kv_heads: int, ids, *, packed: bool, window_size: int | None):
        self.query, self.kv_heads, self.group = query, kv_heads, query.shape[2] // kv_heads
        self.device = stripes.Device(axis, query.shape[1])
        self.rows = stripes.describe(self.device, ids, packed)
        self.total = self.rows.start.shape[1]
        self.window_size = min(window_size or self.total, self.total)

    def put(self, results, parts, head, half=0):
        """Results [B, T, heads, ...] with parts of one KV head and stripe written in place."""

        def put(x, part):
            start = (0, half * part.shape[1], head * part.shape[2], *[0] * (x.ndim - 3))
            # with x64 on, numbers of Python would be int64 beside the others
            start = [jnp.asarray(number, jnp.int32) for number in start]
            return jax.lax.dynamic_update_slice(x, part, start)

        return tuple(map(put, results, parts))

    def head_of(self, x, head, size=1):
        """Heads of one KV head of [B, T, heads, ...]."""
        return jax.lax.dynamic_slice_in_dim(x, head * size, size, axis=2)

    def of_stripe(self, seers, half):
        """Ranges of the row's tokens, cut to a stripe and counted from its first token."""
        begin, length = self.device.offset(half), self.device.stripe
        return tuple(jnp.clip(x - begin, 0, length) for x in seers)

    def near(self, half):
        """The tokens that windows of a stripe may show: the first, and how many."""
        length = self.device.stripe
        before = min(self.window_size - 1, self.total - length)
        return jnp.maximum(self.device.offset(half) - before, 0), length + before

    def nearby(self, x, half):
        begin, size = self.near(half)
        return jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1)

    def add_nearby(self, sums, parts, half):
        """Sums of the row's tokens, with parts of those that `near` tells added in place."""
        begin, _ = self.near(half)
        return [
            jax.lax.dynamic_update_slice_in_dim(
                total, self.nearby(total, half) + part.astype(total.dtype), begin, axis=1
            )
            for total, part in zip(sums, parts, strict=True)
        ]

    def window(self, half):
        """What queries of a stripe see of the tokens that `near` tells, and which see each key."""
        window, (begin, _) = self.window_size, self.near(half)
        visible = segments.visible_tokens(self.rows, window)
        seers = segments.seers_of_tokens(self.rows, window)
        visible = tuple(self.device.cut(x, half) - begin for x in visible)
        return visible, self.of_stripe([self.nearby(x, half) for x in seers], half)


class _Task(Share):
    """A device's part of the attention: its queries, and one KV head's keys of the whole row."""

    def __init__(self, static, axis, query, compressed_key, compressed_value, *rest):
        *self.sources, ids = rest
        self.static, config = static, static.config
        self.compressed = (compressed_key, compressed_value)
        kv_heads, window_size = compressed_key.shape[2], config.window_size
        super().__init__(axis, query, kv_heads, ids, packed=static.packed, window_size=window_size)
        self.windows = segments.describe_windows(
            self.rows, config.kernel_size, config.kernel_stride
        )

    def _keys(self, head):
        """Compressed keys and values, then those of the sources: [B, M or T, 1, width] each."""
        gathered = [self.device.gather(self.head_of(x, head)) for x in self.compressed]
        if self.static.packed:
            gathered = [self._ordered(x) for x in gathered]
        return gathered, [self.device.gather(self.head_of(x, head)) for x in self.sources]

    def _places(self):
        """Where, laid out by stripes, the window of each slot is, int32 [B, M]; M where none is."""
        start, length = self.windows.start, self.device.stripe
        room = length // self.static.config.kernel_stride
        edges = jnp.arange(2 * self.device.count, dtype=jnp.int32) * length
        # slots taken by windows that start before each stripe
        before = jax.vmap(lambda row: jnp.searchsorted(row, edges).astype(jnp.int32))(start)
        stripe = jnp.minimum(start // length, 2 * self.device.count - 1)
        slot = jnp.arange(start.shape[1], dtype=jnp.int32)[None]
        place = stripe * room + slot - jnp.take_along_axis(before, stripe, axis=1)
        return jnp.where(start < self.total, place, start.shape[1])

    def _ordered(self, x):
        """Windows laid out by stripes, to the order of their slots."""
        read = lambda row, at: row.at[at].get(mode="fill", fill_value=0)  # noqa: E731
        return jax.vmap(read)(x, self._places())

    def _by_stripes(self, x):
        """The transpose of `_ordered`."""
        write = lambda row, at: jnp.zeros_like(row).at[at].set(row, mode="drop")  # noqa: E731
        return jax.vmap(write)(x, self._places())

    def _windows(self, half):
        """What queries of a stripe see of the compressed keys, and which of them see each key."""
        size = self.static.config.kernel_size
        visible = segments.visible_windows(self.windows)
        seers = segments.seers_of_windows(self.rows, self.windows, size)
        return tuple(self.device.cut(x, half) for x in visible), self.of_stripe(seers, half)

    def _blocks(self, half, indices):
        """First tokens of the listed blocks, in the row."""
        rows = self._local(half)
        starts = segments.listed_block_starts(rows, indices, self.static.config.block_size)
        counts = starts < self.device.stripe
        return jnp.where(counts, starts + self.device.offset(half), self.total)

    def _local(self, half) -> Rows:
        """The documents of a stripe's tokens, counted from the first of the stripe."""
        begin, cut = self.device.offset(half), functools.partial(self.device.cut, half=half)
        rows = self.rows
        return Rows(
            cut(rows.start) - begin, cut(rows.end) - begin, cut(rows.valid), self.static.packed
        )

    def _row(self, half):
        """The documents of the row, and where the stripe begins, for `block_attention`."""
        documents = (self.rows.start, self.rows.end, self.rows.valid)
        offset = jnp.broadcast_to(self.device.offset(half), (self.query.shape[0], 1))
        return documents, offset

    def forward(self) -> Any:
        """Out and lse of each branch, and the lists of blocks."""
        ranges: Any = operators.range_attention
        listed: Any = operators.block_attention

        def step(results, head):
            compressed, sources = self._keys(head)
            query = self.head_of(self.query, head, self.group)

            def stripe(results, half):
                q = self.device.half_of(query, half)
                arrays = (q, *compressed, *self._windows(half))
                out, lse = ranges(self.static.call("compressed"), *arrays)
                indices = self._choose(half, q, compressed[0], lse)
                arrays = (q, *sources[:2], self._blocks(half, indices), *self._row(half))
                blocks = listed(self.static.call("selected"), *arrays)
                near = (self.nearby(x, half) for x in sources[-2:])
                arrays = (q, *near, *self.window(half))
                window = ranges(self.static.call("window"), *arrays)
                return self.put(results, (out, lse, *blocks, *window, indices), head, half)

            return in_turn(2, stripe, results)

        places = self.query.shape[:3]
        values = (self.compressed[1], self.sources[1], self.sources[-1])
        results = [
            jnp.zeros((*places, *width), dtype)
            for x in values
            for width, dtype in ((x.shape[3:], x.dtype), ((), wide_dtype(x)))
        ]
        indices = jnp.zeros((*places[:2], self.kv_heads, self.static.config.topk), jnp.int32)
        return in_turn(self.kv_heads, step, (*results, indices))

    def _choose(self, half, query, key, lse):
        visible = (self.device.cut(x, half) for x in (self.windows.first, self.windows.visible))
        windows = Windows(self.windows.start, *visible)
        call = self.static.call("selection")
        return operators.choose_blocks(call, query, key, lse, self._local(half), windows)

    def backward(self, given):
        """Gradients of the queries, the compressed keys and values, and the sources.

        `given` are lse and delta of the branches, the lists of blocks, the gates, and dout.
        """
        lses, deltas, (indices, gates, dout) = given[:3], given[3:6], given[6:]
        wide = wide_dtype(self.query)

        def stripe(keys, head, state, half):
            def own(x, size):
                return self.device.half_of(self.head_of(x, head, size), half)

            compressed, sources = keys
            dquery, dcompressed, dsources = state
            q, over, *lse = (own(x, self.group) for x in (self.query, dout, *lses))
            shared = gates.shape[2] == 1
            gate = self.device.half_of(gates, half) if shared else own(gates, self.group)

            def cotangents(branch, *before):
                dout, _ = jax.lax.optimization_barrier((over, before))
                dbranch = gating.branch_cotangent(gate[..., branch], dout)
                return dbranch, -own(deltas[branch], self.group)

            # The selected branch comes first, since it needs most memory by itself.
            starts = self._blocks(half, own(indices, 1))
            arrays = (q, *sources[:2], starts, *self._row(half), None, lse[1])
            call = self.static.call("selected")
            dq_selected, *sums = operators.block_gradients(
                call, arrays, cotangents(1), dsources[:2]
            )
            dsources = sums + dsources[2:]
            arrays = (q, *compressed, *self._windows(half), None, lse[0])
            call = self.static.call("compressed")
            dq, *parts = operators.range_gradients(call, arrays, cotangents(0, dq_selected))
            dcompressed = [
                x + part.astype(wide) for x, part in zip(dcompressed, parts, strict=True)
            ]
            near = (self.nearby(x, half) for x in sources[-2:])
            arrays = (q, *near, *self.window(half), None, lse[2])
            call = self.static.call("window")
            dq_window, *parts = operators.range_gradients(call, arrays, cotangents(2, dq_selected))
            dsources = dsources[:-2] + self.add_nearby(dsources[-2:], parts, half)
            dq = dq.astype(wide) + dq_selected.astype(wide) + dq_window.astype(wide)
            dquery = self.put([dquery], [dq.astype(q.dtype)], head, half)[0]
            return dquery, dcompressed, dsources

        def step(results, head):
            keys = self._keys(head)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), keys)
            dquery, dcompressed, dsources = in_turn(
                2, functools.partial(stripe, keys, head), (results[0], *zeros)
            )
            if self.static.packed:
                dcompressed = [self._by_stripes(x) for x in dcompressed]
            scattered = (self.device.scatter(x) for x in (*dcompressed, *dsources))
            # key and value have the dtype of the query
            parts = (x.astype(self.query.dtype) for x in scattered)
            return dquery, *self.put(results[1:], parts, head)

        shares = (self.query, *self.compressed, *self.sources)
        return in_turn(self.kv_heads, step, tuple(map(jnp.zeros_like, shares)))
