"""The precision rule: sums, logits and softmax are float32, or float64 for float64 inputs."""

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
