"""phi: the compression of overlapping windows of tokens into one key or value each.

Windows are never gathered whole. A window of l tokens consists of l/d units of d tokens. Pass u of
l/d reads unit u of every window (each token at most once) and adds its contribution. XLA turns the
passes into matmuls with float32 accumulation.

Shapes: B batch, T tokens, K key/value heads, D width, M = T // d window slots, H hidden width,
l kernel_size, d kernel_stride.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fsa_jax.arguments.types import CompressionMethod
from fsa_jax.semantics.precision import einsum
from fsa_jax.semantics.segments import SegmentInfo, describe_windows

METHODS = get_args(CompressionMethod)


class WindowUnits(NamedTuple):
    """The windows of the sequences of an array [B, T, K, D].

    Attributes:
      read: a function from an offset to the d tokens from there on of every window,
        [B, M, d, K, D]; zero in empty slots.
      exists: which slots have a window, bool [B, M].
      kernel_size: tokens l of a window.
      kernel_stride: tokens d between the starts of windows.
    """

    read: Callable[[int], Float[Array, "B M d K D"]]
    exists: Bool[Array, "B M"]
    kernel_size: int
    kernel_stride: int


def compress(
    x: Float[Array, "B T K D"],
    units: WindowUnits,
    *,
    method: str,
    weights: Any = None,
    positions: Float[Array, "K l D"] | None = None,
) -> Float[Array, "B M K D"]:
    """Compresses every window of x; empty slots are zero. Arguments are already checked."""
    _, exists, kernel_size, kernel_stride = units
    if kernel_size > x.shape[1]:  # no window fits, and its units may be more than memory holds
        return jnp.zeros((*exists.shape, *x.shape[2:]), x.dtype)

    def fold(equation, weight, table_equation):
        """Sum over the tokens of a window of token times weight, and the same for the table."""
        parts = [slice(u, u + kernel_stride) for u in range(0, kernel_size, kernel_stride)]
        total = sum(einsum(equation, units.read(s.start), weight[:, s]) for s in parts)
        if positions is not None:
            # phi is linear up to here, so the table adds the same constant to every window
            total = total + einsum(table_equation, positions, weight)[None, None]
        return total

    if method == "mean":
        ones = jnp.ones((x.shape[2], kernel_size), x.dtype)
        out = fold("bmlkd,kl->bmkd", ones, "kld,kl->kd") / kernel_size
    elif method == "weighted":
        out = fold("bmlkd,kl->bmkd", weights, "kld,kl->kd")
    else:
        matrix = weights if method == "linear" else weights[0]
        matrix = matrix.reshape(x.shape[2], kernel_size, x.shape[3], -1)
        out = fold("bmlkd,kldh->bmkh", matrix, "kld,kldh->kh")
        if method == "mlp":
            out = einsum("bmkh,khd->bmkd", jax.nn.gelu(out).astype(x.dtype), weights[1])
    return jnp.where(exists[:, :, None, None], out, 0).astype(x.dtype)


def window_units(
    x: Float[Array, "B T K D"], segments: SegmentInfo, kernel_size: int, kernel_stride: int
) -> WindowUnits:
    """The windows of sequences that are whole on this device."""
    batch, length, heads, width = x.shape
    slots = length // kernel_stride
    windows = describe_windows(segments, kernel_size, kernel_stride)
    found = windows.start < length
    exists = found[:, :, None, None, None]
    if segments.packed and slots:
        # A slice that would extend past the end of the sequence is moved back inside, so empty
        # slots read existing tokens; the mask removes these and their cotangents.
        def read_packed(offset):
            def unit(row, start):
                return jax.lax.dynamic_slice_in_dim(row, start + offset, kernel_stride)

            units = jax.vmap(jax.vmap(unit, (None, 0)))(x, windows.start)
            return jnp.where(exists, units, 0)

        return WindowUnits(read_packed, found, kernel_size, kernel_stride)
    after = kernel_size - kernel_stride if kernel_size <= length else 0  # else it is never read
    padded = jnp.pad(x[:, : slots * kernel_stride], ((0, 0), (0, after), (0, 0), (0, 0)))

    def read(offset):
        unit = padded[:, offset : offset + slots * kernel_stride]
        unit = unit.reshape(batch, slots, kernel_stride, heads, width)
        return jnp.where(exists, unit, 0)

    return WindowUnits(read, found, kernel_size, kernel_stride)
