"""The Hopper kernels for any group size, which is split into powers of two, one call for each.

A program of these kernels has 64 rows of one key head, a number that only powers of two divide. A
group of 5 query heads, for example, is split into 4 and 1: two calls with the same keys. The
partial dK and dV are added in float32. Each further call reads K and V once more, from L2, and
q, dout and the results are copied once: a small cost where a query attends to many keys.

Shapes: B sequences, T tokens, N query heads, K key/value heads, G = N/K, D head width.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fsa_jax.pallas.range_attention import hopper_key_kernel, hopper_query_kernels
from fsa_jax.pallas.range_attention.hopper_layout import ROWS


def parts(group: int) -> tuple[int, ...]:
    """The powers of two, each at most `ROWS`, that sum to a group size, in descending order.

    Example:
      >>> parts(16), parts(7), parts(128)
      ((16,), (4, 2, 1), (64, 64))
    """
    found = []
    while group:
        found.append(min(ROWS, 1 << (group.bit_length() - 1)))
        group -= found[-1]
    return tuple(found)


def _cut(x: jax.Array, kv_heads: int) -> list[jax.Array]:
    """Splits [B, T, N, ...] into an array [B, T, K * g, ...] for each part g of the group."""
    grouped = x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])
    sizes = parts(grouped.shape[3])
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    some = [grouped[:, :, :, end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return [y.reshape(*x.shape[:2], -1, *x.shape[3:]) for y in some]


def _join(found: Sequence[jax.Array], kv_heads: int) -> jax.Array:
    """Undoes `_cut`."""
    grouped = [x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:]) for x in found]
    x = jnp.concatenate(grouped, axis=3)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def attention(query, key, value, visible, query_range, *, scale, interpret=None):
    """`hopper_query_kernels.attention` for any group size."""
    kv_heads = key.shape[2]
    run = functools.partial(hopper_query_kernels.attention, scale=scale, interpret=interpret)
    if len(parts(query.shape[2] // kv_heads)) == 1:
        return run(query, key, value, visible, query_range)
    found = [run(q, key, value, visible, query_range) for q in _cut(query, kv_heads)]
    return tuple(_join(x, kv_heads) for x in zip(*found, strict=True))


def query_gradient(
    query, key, value, visible, query_range, lse, delta, dout, *, scale, interpret=None
):  # fmt: skip
    """`hopper_query_kernels.query_gradient` for any group size."""
    kv_heads = key.shape[2]
    run = functools.partial(hopper_query_kernels.query_gradient, scale=scale, interpret=interpret)
    if len(parts(query.shape[2] // kv_heads)) == 1:
        return run(query, key, value, visible, query_range, lse, delta, dout)
    cut = _cut_all(kv_heads, query, lse, delta, dout)
    found = [run(q, key, value, visible, query_range, *rest) for q, *rest in cut]
    return _join(found, kv_heads)


def key_gradients(query, key, value, query_range, lse, delta, dout, *, scale, interpret=None):
    """`hopper_key_kernel.key_gradients` for any group size."""
    kv_heads = key.shape[2]
    run: Callable = functools.partial(
        hopper_key_kernel.key_gradients, scale=scale, interpret=interpret
    )
    if len(parts(query.shape[2] // kv_heads)) == 1:
        return run(query, key, value, query_range, lse, delta, dout)
    cut = _cut_all(kv_heads, query, lse, delta, dout)
    found = [run(q, key, value, query_range, *rest, dtype=jnp.float32) for q, *rest in cut]
    # always added in the order of the parts, so that every run gives the same bits
    sums = [functools.reduce(jnp.add, some) for some in zip(*found, strict=True)]
    return tuple(x.astype(like.dtype) for x, like in zip(sums, (key, value), strict=True))


def _cut_all(kv_heads: int, *arrays):
    return zip(*(_cut(x, kv_heads) for x in arrays), strict=True)
