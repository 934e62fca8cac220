"""phi: the compression of overlapping windows of tokens into one key or value each.

No window is ever copied out whole. A window of l tokens is l/d units of d tokens; pass u of l/d
reads unit u of every window (each token at most once) and adds its share. XLA turns the passes
into matmuls with float32 accumulation.

Shapes: B batch, T tokens, K key/value heads, D width, M = T // d window slots, H hidden width,
l kernel_size, d kernel_stride.
"""

from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fsa_jax import stripes
from fsa_jax.arguments.types import CompressionMethod
from fsa_jax.semantics.precision import einsum
from fsa_jax.semantics.segments import Rows, Windows, describe_windows

METHODS = get_args(CompressionMethod)


def compress(
    x: Float[Array, "B T K D"],
    rows: Rows,
    *,
    kernel_size: int,
    kernel_stride: int,
    method: str,
    weights: Any = None,
    positions: Float[Array, "K l D"] | None = None,
    sequence: tuple[Int[Array, "B T"] | None, str] | None = None,
) -> Float[Array, "B M K D"]:
    """Compresses every window; empty slots are zero. Arguments are already checked.

    `sequence` is (segment_ids, mesh axis) where an axis splits the tokens; `rows` is then not read.
    """
    if sequence is None and kernel_size > x.shape[1]:  # not one window, whatever its parts
        return jnp.zeros((x.shape[0], x.shape[1] // kernel_stride, *x.shape[2:]), x.dtype)
    if sequence is None:
        windows = describe_windows(rows, kernel_size, kernel_stride)
        units = _unit_reader(x, rows, windows, kernel_size, kernel_stride)
        exists = windows.start < x.shape[1]
    else:
        ids, axis = sequence
        units, exists = stripes.unit_reader(x, ids, kernel_size, kernel_stride, axis)

    def fold(equation, weight, table_equation):
        """Sum over the tokens of a window of token times weight, and the same for the table."""
        parts = [slice(u, u + kernel_stride) for u in range(0, kernel_size, kernel_stride)]
        total = sum(einsum(equation, units(s.start), weight[:, s]) for s in parts)
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


def _unit_reader(
    x: Float[Array, "B T K D"], rows: Rows, windows: Windows, kernel_size: int, kernel_stride: int
) -> Callable[[int], Float[Array, "B M d K D"]]:
    """A function that reads the d tokens from `offset` on of every window, zero in empty slots."""
    batch, length, heads, width = x.shape
    slots = length // kernel_stride
    exists = (windows.start < length)[:, :, None, None, None]
    if rows.packed and slots:
        # A slice that would pass the end of the row is moved back inside, so empty slots read
        # something that exists; the mask takes it away, and its cotangent with it.
        def read_packed(offset):
            def unit(row, start):
                return jax.lax.dynamic_slice_in_dim(row, start + offset, kernel_stride)

            units = jax.vmap(jax.vmap(unit, (None, 0)))(x, windows.start)
            return jnp.where(exists, units, 0)

        return read_packed
    padded = jnp.pad(
        x[:, : slots * kernel_stride], ((0, 0), (0, kernel_size - kernel_stride), (0, 0), (0, 0))
    )

    def read(offset):
        unit = padded[:, offset : offset + slots * kernel_stride]
        unit = unit.reshape(batch, slots, kernel_stride, heads, width)
        return jnp.where(exists, unit, 0)

    return read
