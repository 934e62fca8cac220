"""The precision rule: sums, logits and softmax are float32, or float64 for float64 inputs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array


def wide_dtype(x: Array) -> jnp.dtype:
    """The dtype of everything that is accumulated from `x`."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def einsum(equation: str, *operands: Array) -> Array:
    """Products of operands of one dtype, summed in its wide dtype.

    The highest precision keeps float32 products from being cut to tf32 or bfloat16 on accelerators;
    it changes nothing for 16-bit operands.
    """
    return jnp.einsum(
        equation,
        *operands,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=wide_dtype(operands[0]),
    )


def narrow[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """`function`, the same with `jax_enable_x64` on as off, unless it takes numbers of 64 bits.

    With it on, what jax and numpy make of Python's numbers, of counts and of sums of integers has
    64 bits: such numbers do not mix with those of 32 in a kernel, and take twice the memory
    elsewhere.
    """

    @functools.wraps(function)
    def narrowed(*args: P.args, **kwargs: P.kwargs) -> R:
        arrays = (x for x in jax.tree.leaves((args, kwargs)) if hasattr(x, "dtype"))
        if any(x.dtype in (jnp.float64, jnp.int64) for x in arrays):
            return function(*args, **kwargs)
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return narrowed
