"""The precision rule: sums, logits and softmax use float32, or float64 for float64 inputs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array


def accumulation_dtype(x: Array) -> jnp.dtype:
    """Returns the dtype in which sums over elements of `x` are accumulated."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def einsum(equation: str, *operands: Array) -> Array:
    """Computes an einsum of operands of one dtype, accumulated in their accumulation dtype.

    The highest precision keeps accelerators from rounding float32 products to tf32 or bfloat16. It
    changes nothing for 16-bit operands.
    """
    return jnp.einsum(
        equation,
        *operands,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=accumulation_dtype(operands[0]),
    )


def narrow[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Makes `function` ignore `jax_enable_x64`, unless it receives a 64-bit array.

    With `jax_enable_x64` on, Python scalars, counts and sums of integers become 64-bit arrays.
    These cannot be combined with 32-bit arrays in a kernel, and take twice the memory elsewhere.
    """

    @functools.wraps(function)
    def narrowed(*args: P.args, **kwargs: P.kwargs) -> R:
        arrays = (x for x in jax.tree.leaves((args, kwargs)) if hasattr(x, "dtype"))
        if any(x.dtype in (jnp.float64, jnp.int64) for x in arrays):
            return function(*args, **kwargs)
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return narrowed
