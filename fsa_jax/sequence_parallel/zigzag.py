"""Zigzag order: how a sequence is distributed over the devices of a mesh axis.

Late queries see more windows than early ones. So a sequence of T tokens is cut into 2n chunks of
L = T/2n tokens, and device i of n holds chunks i and 2n-1-i, in that order: all have the same work.
Arrays of tokens are in this zigzag order along T (`to_zigzag`); the tokens inside a chunk stay in
order. A window belongs to the chunk in which it starts: each chunk has room for L/d windows,
existing ones first.

Shapes: B sequences, T tokens, n devices, L tokens of a chunk, K key/value heads, D head width, l
kernel_size, M = T/d compressed windows of stride d.
"""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from fsa_jax.arguments import scalars
from fsa_jax.ops.compression import WindowUnits
from fsa_jax.ops.partition import partitioned
from fsa_jax.semantics import segments
from fsa_jax.semantics.precision import narrow
from fsa_jax.semantics.segments import SegmentInfo


def to_zigzag(x: jax.Array, devices: int, axis: int = 1) -> jax.Array:
    """Puts tokens in the order in which `sequence_axis` takes them.

    The axis is cut into 2 * devices chunks, and device i of n gets chunks i and 2n - 1 - i.

    Args:
      x: an array with the tokens of sequences along `axis`.
      devices: devices n of the mesh axis.
      axis: the axis of tokens.

    Raises:
      ValueError: the tokens are not a multiple of 2 * devices, or an argument has a wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> to_zigzag(jnp.arange(8), devices=2, axis=0)
      Array([0, 1, 6, 7, 2, 3, 4, 5], dtype=int32)
    """
    devices = scalars.size("devices", devices)
    order = [chunk for i in range(devices) for chunk in (i, 2 * devices - 1 - i)]
    return _take_chunks(x, order, axis)


def from_zigzag(x: jax.Array, devices: int, axis: int = 1) -> jax.Array:
    """Undoes `to_zigzag`; arguments and errors are the same.

    Example:
      >>> import jax.numpy as jnp
      >>> from_zigzag(to_zigzag(jnp.arange(8), 2, axis=0), 2, axis=0)
      Array([0, 1, 2, 3, 4, 5, 6, 7], dtype=int32)
    """
    devices = scalars.size("devices", devices)
    order = [2 * i for i in range(devices)] + [2 * i + 1 for i in reversed(range(devices))]
    return _take_chunks(x, order, axis)


def _warn_renamed(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is now called {new}; the old name will be removed in the next release",
        DeprecationWarning,
        stacklevel=3,
    )


def to_stripes(x: jax.Array, devices: int, axis: int = 1) -> jax.Array:
    """The old name of `to_zigzag`."""
    _warn_renamed("to_stripes", "to_zigzag")
    return to_zigzag(x, devices, axis)


def from_stripes(x: jax.Array, devices: int, axis: int = 1) -> jax.Array:
    """The old name of `from_zigzag`."""
    _warn_renamed("from_stripes", "from_zigzag")
    return from_zigzag(x, devices, axis)


def _take_chunks(x, order, axis):
    if not isinstance(x, jax.Array | np.ndarray) or not x.ndim:
        raise ValueError(f"x must be an array with an axis of tokens, got {scalars.short(x)}")
    axis = scalars.size("axis", axis, -x.ndim, x.ndim - 1)
    if x.shape[axis] % len(order):
        raise ValueError(
            f"tokens must be a multiple of 2 * devices = {len(order)}, got {x.shape[axis]}"
        )
    chunks = jnp.split(x, len(order), axis=axis)
    return jnp.concatenate([chunks[i] for i in order], axis=axis)


class Device:
    """This device's place along the sequence axis, and how arrays of tokens are exchanged.

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
        self.chunk = tokens // 2
        self.numbers = (self.index, 2 * self.count - 1 - self.index)  # of its chunks

    def gather(self, x):
        """[B, 2L, ...] of each device to [B, T, ...] of the whole sequence, in order."""
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
        """First token, in the sequence, of chunk 0 or 1 of this device."""
        return jnp.where(half == 0, self.numbers[0], self.numbers[1]) * self.chunk

    def half_of(self, x, half):
        """A device's own [B, 2L, ...] to one of its chunks."""
        return jax.lax.dynamic_slice_in_dim(x, half * self.chunk, self.chunk, axis=1)

    def cut(self, x, half):
        """[B, T, ...] of the whole sequence to one chunk of this device."""
        return jax.lax.dynamic_slice_in_dim(x, self.offset(half), self.chunk, axis=1)

    def own(self, x):
        """[B, T, ...] of the whole sequence to this device's tokens."""
        return jnp.concatenate([self.cut(x, half) for half in (0, 1)], axis=1)


def describe(device: Device, segment_ids, packed: bool) -> SegmentInfo:
    """The segments of the whole sequences, on every device."""
    batch, tokens = segment_ids.shape
    if packed:
        return segments.describe_segments(device.gather(segment_ids), batch, tokens * device.count)
    return segments.describe_segments(None, batch, tokens * device.count)


def over_axis(body, axis, stride, operands, results, *arrays) -> Any:
    """`body(axis, *arrays)` on the devices of an axis; directly where that is manual already.

    Call it inside jit, like `partitioned`, whose arguments `operands` and `results` are.

    Args:
      body: what a device computes, given the name of the axis, or None if it is alone.
      axis: the mesh axis that splits tokens and windows.
      stride: tokens to a window.
      operands: name and axes of each argument.
      results: axes of each result.
      *arrays: the arguments.
    """
    body = narrow(body)
    part = functools.partial(body, axis)
    if axis in jax.sharding.get_abstract_mesh().manual_axes:
        return part(*arrays)
    alone = functools.partial(body, None)
    return partitioned(alone, operands, results, (part, axis, stride))(*arrays)


# What segment ids imply


def positions(segment_ids, shape: tuple[int, ...], axis: str) -> jax.Array:
    """Position of each token in its segment, int32 [B, T] in zigzag order."""
    return _positions(axis, *ids_or_zeros(segment_ids, shape))


def ids_or_zeros(segment_ids, shape):
    """Whether there are segment ids, and the ids: zeros that nobody reads where there are none."""
    return segment_ids is not None, (
        jnp.zeros(shape, jnp.int32) if segment_ids is None else segment_ids
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _positions(axis, packed, ids):
    def body(axis, ids):
        device = Device(axis, ids.shape[1])
        return (device.own(describe(device, ids, packed).position),)

    return over_axis(body, axis, 1, {"segment_ids": "b t"}, ("b t",), ids)[0]


# Windows of tokens


class _UnitSpec(NamedTuple):
    """Everything static about reading units of windows: `offset` is that of the unit's token 0."""

    kernel_size: int
    kernel_stride: int
    packed: bool
    axis: str
    offset: int


def window_positions(positions, segment_ids, kernel_size: int, kernel_stride: int, axis: str):
    """The position of each window's first token, int32 [B, M]; arguments as in `window_units`."""
    packed, ids = ids_or_zeros(segment_ids, positions.shape)
    spec = _UnitSpec(kernel_size, kernel_stride, packed, axis, 0)
    return _units(spec, positions[:, :, None, None], ids)[0][:, :, 0, 0, 0]


def window_units(x, segment_ids, kernel_size: int, kernel_stride: int, axis: str) -> WindowUnits:
    """The windows of sequences in zigzag order; the slots of windows are laid out by chunks.

    Args:
      x: [B, T, K, D] in zigzag order.
      segment_ids: int32 [B, T] in zigzag order, or None.
      kernel_size: tokens l of a window.
      kernel_stride: tokens d between windows.
      axis: the mesh axis.
    """
    packed, ids = ids_or_zeros(segment_ids, x.shape[:2])

    def read(offset) -> Any:
        return _read_units(_UnitSpec(kernel_size, kernel_stride, packed, axis, offset), x, ids)

    spec = _UnitSpec(kernel_size, kernel_stride, packed, axis, 0)
    exists = _units(spec, jnp.zeros((*x.shape[:2], 1, 1), jnp.int32), ids)[1]
    return WindowUnits(read, exists, kernel_size, kernel_stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read_units(spec, x, ids) -> Any:
    return _units(spec, x, ids)[0]


def _read_units_fwd(spec, x, ids):
    return _read_units(spec, x, ids), (x, ids)


def _read_units_bwd(spec, residuals, cotangent):
    return *_units_transpose(spec, *residuals, cotangent), None


_read_units.defvjp(_read_units_fwd, _read_units_bwd)

_UNITS = {"x": "b t k d", "segment_ids": "b t"}


@functools.partial(jax.jit, static_argnums=0)
def _units(spec, x, ids):
    body = functools.partial(_units_of_device, spec)
    return over_axis(body, spec.axis, spec.kernel_stride, _UNITS, ("b m l k d", "b m"), x, ids)


@functools.partial(jax.jit, static_argnums=0)
def _units_transpose(spec, x, ids, cotangent):
    def body(axis, x, ids, cotangent):
        # linear in x: the primal is not computed
        return jax.vjp(lambda x: _units_of_device(spec, axis, x, ids)[0], x)[1](cotangent)

    operands = _UNITS | {"cotangent": "b m l k d"}
    arrays = (x, ids, cotangent)
    return over_axis(body, spec.axis, spec.kernel_stride, operands, ("b t k d",), *arrays)


def _units_of_device(spec, axis, x, ids):
    """Units of the windows that start in this device's chunks, and which windows there are."""
    size, stride, packed, _, offset = spec
    device = Device(axis, x.shape[1])
    length = device.chunk
    if length % stride or length < size:
        raise ValueError(
            f"tokens must be a multiple of 2 * devices * kernel_stride = "
            f"{2 * device.count * stride}, and chunks at least kernel_size={size} long, got "
            f"{2 * device.count * length} tokens"
        )
    # windows run into the next chunk: every device gets the first tokens of each chunk
    heads = jnp.stack([device.half_of(x, half)[:, :size] for half in (0, 1)], axis=1)
    heads = device.gather(heads)  # [B, 2n, l, K, D]
    heads = jnp.concatenate([heads, jnp.zeros_like(heads[:, :1])], axis=1)
    segment_info = describe(device, ids, packed)
    windows = segments.describe_windows(segment_info, size, stride)
    slots, total = length // stride, segment_info.start.shape[1]
    units, exist = [], []
    for half in (0, 1):
        after = jax.lax.dynamic_index_in_dim(heads, device.numbers[half] + 1, 1, keepdims=False)
        chunk = jnp.concatenate([device.half_of(x, half), after], axis=1)
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

            unit = jax.vmap(jax.vmap(read_unit, (None, 0)))(chunk, start)
        else:
            start = begin + jnp.arange(0, length, stride, dtype=jnp.int32)
            exists = jnp.broadcast_to((start + size <= total)[None], (x.shape[0], slots))
            unit = chunk[:, offset : offset + length]
            unit = unit.reshape(x.shape[0], slots, stride, *x.shape[2:])
        units.append(jnp.where(exists[:, :, None, None, None], unit, 0))
        exist.append(exists)
    return jnp.concatenate(units, axis=1), jnp.concatenate(exist, axis=1)
