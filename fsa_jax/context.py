"""Sequence parallelism: one row of tokens over the devices of a mesh axis.

Queries stay where they are. Keys and values, also the compressed ones, are gathered for one KV
head after another: peak memory is the device's share of everything, and one head's keys and values
of the whole row. Gradients of keys and values go back by reduce-scatter, in float32.

Late queries see more windows than early ones. So a row of T tokens is cut into 2n stripes of
L = T/2n, and device i of n holds stripes i and 2n-1-i, in that order: all have the same work.
Arrays of tokens are in this *stripe order* along T (`to_stripes`); a stripe's own tokens are in
order. Windows belong to the stripe that they start in: each has room for L/d, existing ones first.

A device's part is two calls of the operators of `operators.py`, one for each of its stripes:
queries at an offset, keys of the whole row.

Shapes: B rows, T tokens, n devices, L tokens of a stripe, N query heads, K key/value heads,
G = N/K, D and E head widths, M = T/d compressed windows of stride d.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from fsa_jax import operators, segments
from fsa_jax.config import NSAConfig
from fsa_jax.operators import Call
from fsa_jax.pallas import SelectedTuning, tuned
from fsa_jax.precision import wide_dtype
from fsa_jax.segments import Rows, Windows
from fsa_jax.sharding import partitioned

#: Most bytes of partial results of the selected branch: a device has a share of a row's tokens.
SCRATCH_BYTES = 2**28


def to_stripes(x: jax.Array, devices: int, axis: int = 1) -> jax.Array:
    """Puts tokens in the order in which `sequence_axis` takes them.

    The axis is cut into 2 * devices stripes, and device i of n gets stripes i and 2n - 1 - i.

    Args:
      x: an array with the tokens of rows along `axis`.
      devices: devices n of the mesh axis.
      axis: the axis of tokens.

    Raises:
      ValueError: the tokens are not a multiple of 2 * devices.

    Example:
      >>> import jax.numpy as jnp
      >>> to_stripes(jnp.arange(8), devices=2, axis=0)
      Array([0, 1, 6, 7, 2, 3, 4, 5], dtype=int32)
    """
    order = [stripe for i in range(devices) for stripe in (i, 2 * devices - 1 - i)]
    return _take_stripes(x, order, axis)


def from_stripes(x: jax.Array, devices: int, axis: int = 1) -> jax.Array:
    """Undoes `to_stripes`; arguments and errors are the same.

    Example:
      >>> import jax.numpy as jnp
      >>> from_stripes(to_stripes(jnp.arange(8), 2, axis=0), 2, axis=0)
      Array([0, 1, 2, 3, 4, 5, 6, 7], dtype=int32)
    """
    order = [2 * i for i in range(devices)] + [2 * i + 1 for i in reversed(range(devices))]
    return _take_stripes(x, order, axis)


def _take_stripes(x, order, axis):
    if x.shape[axis] % len(order):
        raise ValueError(
            f"tokens must be a multiple of 2 * devices = {len(order)}, got {x.shape[axis]}"
        )
    stripes = jnp.split(x, len(order), axis=axis)
    return jnp.concatenate([stripes[i] for i in order], axis=axis)


class _Device:
    """This device's place along the sequence axis, and how arrays of tokens get about.

    Args:
      axis: name of the mesh axis; None for one device alone.
      tokens: tokens that a device holds, 2L.
    """

    def __init__(self, axis: str | None, tokens: int):
        self.axis = axis
        self.count = 1 if axis is None else jax.lax.axis_size(axis)
        self.index = jnp.zeros((), jnp.int32) if axis is None else jax.lax.axis_index(axis)
        if tokens % 2:
            raise ValueError(
                "tokens must be a multiple of 2 * devices of sequence_axis = "
                f"{2 * self.count}, got {tokens * self.count}"
            )
        self.stripe = tokens // 2
        self.numbers = (self.index, 2 * self.count - 1 - self.index)  # of its stripes

    def gather(self, x):
        """[B, share, ...] of each device to [B, n * share, ...] of the whole row, in order."""
        parts = jnp.stack(jnp.split(x, 2, axis=1))
        if self.axis is not None:
            parts = jax.lax.all_gather(parts, self.axis)  # [n, 2, B, share/2, ...]
            parts = jnp.concatenate([parts[:, 0], parts[::-1, 1]])
        return rearrange(parts, "s b l ... -> b (s l) ...")

    def scatter(self, x):
        """The transpose of `gather`: sums over the devices, and gives each its share."""
        parts = rearrange(x, "b (s l) ... -> s b l ...", s=2 * self.count)
        if self.axis is not None:
            parts = jnp.stack([parts[: self.count], parts[: self.count - 1 : -1]], axis=1)
            parts = jax.lax.psum_scatter(parts, self.axis)
        return jnp.concatenate([parts[0], parts[1]], axis=1)

    def offset(self, half):
        """First token of stripe 0 or 1 of this device in the row."""
        return jnp.where(half == 0, self.numbers[0], self.numbers[1]) * self.stripe

    def half_of(self, x, half):
        """A device's own [B, 2L, ...] to one of its stripes."""
        return jax.lax.dynamic_slice_in_dim(x, half * self.stripe, self.stripe, axis=1)

    def cut(self, x, half):
        """[B, T, ...] of the whole row to one stripe of this device."""
        return jax.lax.dynamic_slice_in_dim(x, self.offset(half), self.stripe, axis=1)

    def own(self, x):
        """[B, T, ...] of the whole row to this device's tokens."""
        return jnp.concatenate([self.cut(x, half) for half in (0, 1)], axis=1)


def _describe(device: _Device, segment_ids, packed: bool) -> Rows:
    """The documents of the whole row, on every device."""
    batch, tokens = segment_ids.shape
    if packed:
        return segments.describe_rows(device.gather(segment_ids), batch, tokens * device.count)
    return segments.describe_rows(None, batch, tokens * device.count)


def _partitioned(body, axis, stride, operands, results) -> Any:
    """`body(axis, *arrays)` on the devices of an axis; at once where that is manual already."""
    if axis in jax.sharding.get_abstract_mesh().manual_axes:
        return functools.partial(body, axis)
    part = functools.partial(body, axis)
    return partitioned(functools.partial(body, None), operands, results, (part, axis, stride))


# What a packed row implies


def positions(segment_ids, shape: tuple[int, ...], axis: str) -> jax.Array:
    """Position of each token in its document, int32 [B, T] in stripe order."""
    packed, ids = _ids(segment_ids, shape)
    return _positions_on(axis, packed)(ids)[0]


def _ids(segment_ids, shape):
    """Whether rows have documents, and ids: zeros that nobody reads where they have not."""
    return segment_ids is not None, (
        jnp.zeros(shape, jnp.int32) if segment_ids is None else segment_ids
    )


def _positions_on(axis, packed):
    def body(axis, ids):
        device = _Device(axis, ids.shape[1])
        return (device.own(_describe(device, ids, packed).position),)

    return _partitioned(body, axis, 1, {"segment_ids": "b t"}, ("b t",))


# Windows of tokens


def window_positions(positions, segment_ids, kernel_size: int, kernel_stride: int, axis: str):
    """The position of each window's first token, int32 [B, M]; arguments as in `unit_reader`."""
    packed, ids = _ids(segment_ids, positions.shape)
    units = _units_on((kernel_size, kernel_stride, packed, axis, 0))
    return units(positions[:, :, None, None], ids)[0][:, :, 0, 0, 0]


def unit_reader(x, segment_ids, kernel_size: int, kernel_stride: int, axis: str):
    """Reads the tokens of windows; windows are laid out by stripes.

    Args:
      x: [B, T, K, D] in stripe order.
      segment_ids: int32 [B, T] in stripe order, or None.
      kernel_size: tokens l of a window.
      kernel_stride: tokens d between windows.
      axis: the mesh axis.

    Returns:
      A function from an offset to the d tokens from there on of every window, [B, M, d, K, D], zero
      in empty slots; and which slots have a window, bool [B, M].
    """
    packed, ids = _ids(segment_ids, x.shape[:2])

    def read(offset):
        return _read_units((kernel_size, kernel_stride, packed, axis, offset), x, ids)

    exists = _units_on((kernel_size, kernel_stride, packed, axis, 0))(
        jnp.zeros((*x.shape[:2], 1, 1), jnp.int32), ids
    )[1]
    return read, exists


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read_units(static, x, ids) -> Any:
    return _units_on(static)(x, ids)[0]


def _read_units_fwd(static, x, ids):
    return _read_units(static, x, ids), (x, ids)


def _read_units_bwd(static, residuals, cotangent):
    return *_units_back_on(static)(*residuals, cotangent), None


_read_units.defvjp(_read_units_fwd, _read_units_bwd)

_UNITS = {"x": "b t k d", "segment_ids": "b t"}


def _units_on(static):
    return _partitioned(functools.partial(_units, static), static[3], static[1], _UNITS, _UNITS_OUT)


_UNITS_OUT = ("b m l k d", "b m")


def _units_back_on(static):
    def body(axis, x, ids, cotangent):
        # linear in x: the primal is not computed
        return jax.vjp(lambda x: _units(static, axis, x, ids)[0], x)[1](cotangent)

    operands = _UNITS | {"cotangent": "b m l k d"}
    return _partitioned(body, static[3], static[1], operands, ("b t k d",))


def _units(static, axis, x, ids):
    """Units of the windows that start in this device's stripes, and which windows there are."""
    size, stride, packed, _, offset = static
    device = _Device(axis, x.shape[1])
    length = device.stripe
    if length % stride or length < size:
        raise ValueError(
            f"tokens must be a multiple of 2 * devices * kernel_stride = "
            f"{2 * device.count * stride}, and stripes at least kernel_size={size} long, got "
            f"{2 * device.count * length} tokens"
        )
    # windows run into the next stripe: of each stripe, everyone gets the first tokens
    heads = jnp.stack([device.half_of(x, half)[:, :size] for half in (0, 1)], axis=1)
    heads = device.gather(heads)  # [B, 2n, l, K, D]
    heads = jnp.concatenate([heads, jnp.zeros_like(heads[:, :1])], axis=1)
    rows = _describe(device, ids, packed)
    windows = segments.describe_windows(rows, size, stride)
    slots, total = length // stride, rows.start.shape[1]
    units, exist = [], []
    for half in (0, 1):
        after = jax.lax.dynamic_index_in_dim(heads, device.numbers[half] + 1, 1, keepdims=False)
        stripe = jnp.concatenate([device.half_of(x, half), after], axis=1)
        begin = device.offset(half)
        if packed:
            first = jnp.sum(windows.start < begin, axis=1, dtype=jnp.int32)[:, None]
            slot = first + jnp.arange(slots, dtype=jnp.int32)[None]
            read = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=total))
            start = read(windows.start, slot) - begin
            exists = start < length
            start = jnp.where(exists, start, 0)

            def read_unit(row, at):
                return jax.lax.dynamic_slice_in_dim(row, at + offset, stride)

            unit = jax.vmap(jax.vmap(read_unit, (None, 0)))(stripe, start)
        else:
            start = begin + jnp.arange(0, length, stride, dtype=jnp.int32)
            exists = jnp.broadcast_to((start + size <= total)[None], (x.shape[0], slots))
            unit = stripe[:, offset : offset + length]
            unit = unit.reshape(x.shape[0], slots, stride, *x.shape[2:])
        units.append(jnp.where(exists[:, :, None, None, None], unit, 0))
        exist.append(exists)
    return jnp.concatenate(units, axis=1), jnp.concatenate(exist, axis=1)


# Attention


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
    table: str | None = dataclasses.field(default_factory=tuned.table)

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
        )


def attention(
    query, compressed, sources, segment_ids, *, config: NSAConfig, scale: float, mode, axis: str
):  # fmt: skip
    """The three branches, for queries that are split over a mesh axis.

    Args:
      query: [B, T, N, D]; all arrays of tokens are in stripe order.
      compressed: key [B, M, K, D] and value [B, M, K, E], windows laid out by stripes.
      sources: one pair (key [B, T, K, D], value [B, T, K, E]) for the selected branch and the
        window, or a pair for each.
      segment_ids: int32 [B, T], or None.
      config: the sizes.
      scale: factor of the logits.
      mode: as in `operators.Call`.
      axis: the mesh axis.

    Returns:
      The compressed, selected and window branch, [B, T, N, E] each.
    """
    packed, ids = _ids(segment_ids, query.shape[:2])
    static = _Static(config, scale, mode, packed, len(sources) == 1, axis)
    flat = tuple(x for pair in sources for x in pair)
    return _attention(static, query, compressed, flat, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, query, compressed, sources, ids) -> Any:
    return _attention_fwd(static, query, compressed, sources, ids)[0]


def _attention_fwd(static, query, compressed, sources, ids):
    results = _forward_on(static)(query, *compressed, *sources, ids)
    names = [f"{branch}_{part}" for branch in _BRANCHES for part in ("out", "lse")]
    results = tuple(map(checkpoint_name, results, (*names, "block_indices")))
    return results[:6:2], (query, compressed, sources, ids, results)


def _attention_bwd(static, residuals, cotangents):
    query, compressed, sources, ids, results = residuals
    arrays = (query, *compressed, *sources, ids, *results, *cotangents)
    dquery, dkey, dvalue, *dsources = _backward_on(static)(*arrays)
    return dquery, (dkey, dvalue), tuple(dsources), None


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
        task = _Task(static, axis, *arrays)
        return task.head_by_head(task.forward)

    stride = static.config.kernel_stride
    return _partitioned(body, static.axis, stride, _operands(static), _RESULTS)


def _backward_on(static):
    count = len(_operands(static))

    def body(axis, *arrays):
        task = _Task(static, axis, *arrays[:count])
        step = functools.partial(task.backward, arrays[count : count + 7], arrays[count + 7 :])
        return task.head_by_head(step)

    operands = _operands(static)
    results = (f"{b}_{p}" for b in _BRANCHES for p in ("out", "lse"))
    given = dict(zip((*results, "block_indices"), _RESULTS, strict=True))
    given |= {f"d{branch}": "b t n e" for branch in _BRANCHES}
    grads = tuple(operands.values())[:-1]
    stride = static.config.kernel_stride
    return _partitioned(body, static.axis, stride, operands | given, grads)


class _Task:
    """A device's part of the attention: its queries, and one KV head's keys of the whole row."""

    def __init__(self, static, axis, query, compressed_key, compressed_value, *rest):
        *self.sources, ids = rest
        self.static, self.query = static, query
        self.compressed = (compressed_key, compressed_value)
        self.kv_heads = compressed_key.shape[2]
        self.group = query.shape[2] // self.kv_heads
        config = static.config
        self.device = _Device(axis, query.shape[1])
        self.rows = _describe(self.device, ids, static.packed)
        self.windows = segments.describe_windows(
            self.rows, config.kernel_size, config.kernel_stride
        )
        self.total = self.rows.start.shape[1]

    def head_by_head(self, step):
        """Results [B, T, heads, ...] of `step(head)`, written in place for one after the other."""
        heads = jnp.arange(self.kv_heads, dtype=jnp.int32)
        zeros = (
            jnp.zeros((*x.shape[:2], self.kv_heads * x.shape[2], *x.shape[3:]), x.dtype)
            for x in jax.eval_shape(step, heads[0])
        )

        def write(results, head):
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(x, part, head * part.shape[2], axis=2)
                for x, part in zip(results, step(head), strict=True)
            ), None

        return jax.lax.scan(write, tuple(zeros), heads)[0]

    def _head(self, x, head, size=1):
        """Heads of one KV head of [B, T, heads, ...]."""
        return jax.lax.dynamic_slice_in_dim(x, head * size, size, axis=2)

    def _keys(self, head):
        """Compressed keys and values, then those of the sources: [B, M or T, 1, width] each."""
        gathered = [self.device.gather(self._head(x, head)) for x in self.compressed]
        if self.static.packed:
            gathered = [self._ordered(x) for x in gathered]
        return gathered, [self.device.gather(self._head(x, head)) for x in self.sources]

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
        return tuple(self.device.cut(x, half) for x in visible), self._of_stripe(seers, half)

    def _of_stripe(self, seers, half):
        """Ranges of the row's tokens, cut to a stripe and counted from its first token."""
        begin, length = self.device.offset(half), self.device.stripe
        return tuple(jnp.clip(x - begin, 0, length) for x in seers)

    def _near(self, half):
        """The tokens that windows of a stripe may show: the first, and how many."""
        length = self.device.stripe
        before = min(self.static.config.window_size - 1, self.total - length)
        return jnp.maximum(self.device.offset(half) - before, 0), length + before

    def _nearby(self, x, half):
        begin, size = self._near(half)
        return jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1)

    def _window(self, half):
        """As `_windows`, of the tokens that `_near` tells."""
        window, (begin, _) = self.static.config.window_size, self._near(half)
        visible = segments.visible_tokens(self.rows, window)
        seers = segments.seers_of_tokens(self.rows, window)
        visible = tuple(self.device.cut(x, half) - begin for x in visible)
        return visible, self._of_stripe([self._nearby(x, half) for x in seers], half)

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

    def forward(self, head) -> Any:
        """Results of one KV head: out and lse of each branch, and the lists of blocks."""
        compressed, sources = self._keys(head)
        query = self._head(self.query, head, self.group)
        ranges: Any = operators.range_attention
        listed: Any = operators.block_attention

        def stripe(half):
            q = self.device.half_of(query, half)
            arrays = (q, *compressed, *self._windows(half))
            out, lse = ranges(self.static.call("compressed"), *arrays)
            indices = self._choose(half, q, compressed[0], lse)
            arrays = (q, *sources[:2], self._blocks(half, indices), *self._row(half))
            blocks = listed(self.static.call("selected"), *arrays)
            near = (self._nearby(x, half) for x in sources[-2:])
            arrays = (q, *near, *self._window(half))
            window = ranges(self.static.call("window"), *arrays)
            return out, lse, *blocks, *window, indices

        return self._joined(jax.lax.map(stripe, jnp.arange(2, dtype=jnp.int32)))

    def _joined(self, stripes):
        """[2, B, L, ...] of the stripes to [B, 2L, ...]."""
        return tuple(rearrange(x, "s b l ... -> b (s l) ...") for x in stripes)

    def _choose(self, half, query, key, lse):
        visible = (self.device.cut(x, half) for x in (self.windows.first, self.windows.visible))
        windows = Windows(self.windows.start, *visible)
        call = self.static.call("selection")
        return operators.choose_blocks(call, query, key, lse, self._local(half), windows)

    def backward(self, results, cotangents, head):
        """Gradients of one KV head: of its queries, compressed keys and values, and sources."""
        keys = self._keys(head)
        compressed, sources = keys
        wide = wide_dtype(self.query)

        def add(sums, parts):
            return [total + part.astype(wide) for total, part in zip(sums, parts, strict=True)]

        def stripe(sums, half):
            def own(x, size):
                return self.device.half_of(self._head(x, head, size), half)

            dcompressed, dsources = sums
            q, *saved = (own(x, self.group) for x in (self.query, *results[:6]))
            douts = [own(x, self.group) for x in cotangents]
            dlse = jnp.zeros_like(saved[1])
            arrays = (q, *compressed, *self._windows(half), *saved[:2])
            call = self.static.call("compressed")
            dq, *parts = operators.range_gradients(call, arrays, (douts[0], dlse))
            dcompressed = add(dcompressed, parts)
            starts = self._blocks(half, own(results[6], 1))
            arrays = (q, *sources[:2], starts, *self._row(half), *saved[2:4])
            call = self.static.call("selected")
            dq_selected, *sums = operators.block_gradients(
                call, arrays, (douts[1], dlse), dsources[:2]
            )
            dsources = sums + dsources[2:]
            near = (self._nearby(x, half) for x in sources[-2:])
            arrays = (q, *near, *self._window(half), *saved[4:])
            call = self.static.call("window")
            dq_window, *parts = operators.range_gradients(call, arrays, (douts[2], dlse))
            begin, _ = self._near(half)
            dsources = dsources[:-2] + [
                jax.lax.dynamic_update_slice_in_dim(total, new, begin, axis=1)
                for total, new in zip(
                    dsources[-2:],
                    add([self._nearby(x, half) for x in dsources[-2:]], parts),
                    strict=True,
                )
            ]
            dquery = dq.astype(wide) + dq_selected.astype(wide) + dq_window.astype(wide)
            return (dcompressed, dsources), (dquery.astype(q.dtype),)

        # One stripe after the other: at once, they would need twice the memory.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), keys)
        halves = jnp.arange(2, dtype=jnp.int32)
        (dcompressed, dsources), dquery = jax.lax.scan(stripe, zeros, halves)
        if self.static.packed:
            dcompressed = [self._by_stripes(x) for x in dcompressed]
        scattered = (self.device.scatter(x) for x in (*dcompressed, *dsources))
        # key and value have the dtype of the query
        return *self._joined(dquery), *(x.astype(self.query.dtype) for x in scattered)
