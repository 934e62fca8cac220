"""Rows of tokens in stripes: how a row lies over the devices of a mesh axis, and what follows.

Late queries see more windows than early ones. So a row of T tokens is cut into 2n stripes of
L = T/2n, and device i of n holds stripes i and 2n-1-i, in that order: all have the same work.
Arrays of tokens are in this *stripe order* along T (`to_stripes`); a stripe's own tokens are in
order. Windows belong to the stripe that they start in: each has room for L/d, existing ones first.

Shapes: B rows, T tokens, n devices, L tokens of a stripe, K key/value heads, D head width, l
kernel_size, M = T/d compressed windows of stride d.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from fsa_jax.arguments import scalars
from fsa_jax.semantics import segments
from fsa_jax.semantics.precision import narrow
from fsa_jax.semantics.segments import Rows
from fsa_jax.sharding import partitioned


def to_stripes(x: jax.Array, devices: int, axis: int = 1) -> jax.Array:
    """Puts tokens in the order in which `sequence_axis` takes them.

    The axis is cut into 2 * devices stripes, and device i of n gets stripes i and 2n - 1 - i.

    Args:
      x: an array with the tokens of rows along `axis`.
      devices: devices n of the mesh axis.
      axis: the axis of tokens.

    Raises:
      ValueError: the tokens are not a multiple of 2 * devices, or an argument has a wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> to_stripes(jnp.arange(8), devices=2, axis=0)
      Array([0, 1, 6, 7, 2, 3, 4, 5], dtype=int32)
    """
    devices = scalars.size("devices", devices)
    order = [stripe for i in range(devices) for stripe in (i, 2 * devices - 1 - i)]
    return _take_stripes(x, order, axis)


def from_stripes(x: jax.Array, devices: int, axis: int = 1) -> jax.Array:
    """Undoes `to_stripes`; arguments and errors are the same.

    Example:
      >>> import jax.numpy as jnp
      >>> from_stripes(to_stripes(jnp.arange(8), 2, axis=0), 2, axis=0)
      Array([0, 1, 2, 3, 4, 5, 6, 7], dtype=int32)
    """
    devices = scalars.size("devices", devices)
    order = [2 * i for i in range(devices)] + [2 * i + 1 for i in reversed(range(devices))]
    return _take_stripes(x, order, axis)


def _take_stripes(x, order, axis):
    if not isinstance(x, jax.Array | np.ndarray) or not x.ndim:
        raise ValueError(f"x must be an array with an axis of tokens, got {scalars.short(x)}")
    axis = scalars.size("axis", axis, -x.ndim, x.ndim - 1)
    if x.shape[axis] % len(order):
        raise ValueError(
            f"tokens must be a multiple of 2 * devices = {len(order)}, got {x.shape[axis]}"
        )
    stripes = jnp.split(x, len(order), axis=axis)
    return jnp.concatenate([stripes[i] for i in order], axis=axis)


class Device:
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


def describe(device: Device, segment_ids, packed: bool) -> Rows:
    """The documents of the whole row, on every device."""
    batch, tokens = segment_ids.shape
    if packed:
        return segments.describe_rows(device.gather(segment_ids), batch, tokens * device.count)
    return segments.describe_rows(None, batch, tokens * device.count)


def over_axis(body, axis, stride, operands, results) -> Any:
    """`body(axis, *arrays)` on the devices of an axis; at once where that is manual already."""
    body = narrow(body)
    if axis in jax.sharding.get_abstract_mesh().manual_axes:
        return functools.partial(body, axis)
    part = functools.partial(body, axis)
    return partitioned(functools.partial(body, None), operands, results, (part, axis, stride))


# What a packed row implies


def positions(segment_ids, shape: tuple[int, ...], axis: str) -> jax.Array:
    """Position of each token in its document, int32 [B, T] in stripe order."""
    packed, ids = ids_or_zeros(segment_ids, shape)
    return _positions_on(axis, packed)(ids)[0]


def ids_or_zeros(segment_ids, shape):
    """Whether rows have documents, and ids: zeros that nobody reads where they have not."""
    return segment_ids is not None, (
        jnp.zeros(shape, jnp.int32) if segment_ids is None else segment_ids
    )


def _positions_on(axis, packed):
    def body(axis, ids):
        device = Device(axis, ids.shape[1])
        return (device.own(describe(device, ids, packed).position),)

    return over_axis(body, axis, 1, {"segment_ids": "b t"}, ("b t",))


# Windows of tokens


def window_positions(positions, segment_ids, kernel_size: int, kernel_stride: int, axis: str):
    """The position of each window's first token, int32 [B, M]; arguments as in `unit_reader`."""
    packed, ids = ids_or_zeros(segment_ids, positions.shape)
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
    packed, ids = ids_or_zeros(segment_ids, x.shape[:2])

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
    return over_axis(functools.partial(_units, static), static[3], static[1], _UNITS, _UNITS_OUT)


_UNITS_OUT = ("b m l k d", "b m")


def _units_back_on(static):
    def body(axis, x, ids, cotangent):
        # linear in x: the primal is not computed
        return jax.vjp(lambda x: _units(static, axis, x, ids)[0], x)[1](cotangent)

    operands = _UNITS | {"cotangent": "b m l k d"}
    return over_axis(body, static[3], static[1], operands, ("b t k d",))


def _units(static, axis, x, ids):
    """Units of the windows that start in this device's stripes, and which windows there are."""
    size, stride, packed, _, offset = static
    device = Device(axis, x.shape[1])
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
    rows = describe(device, ids, packed)
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
