"""RMSNorm as a Flax NNX module, over the residual stream or over the channels of a head."""

import jax
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.RMSNorm):
    """RMSNorm over the last axis, with statistics in float32.

    ::

        y = scale * x / sqrt(mean(x ** 2) + epsilon)

    The arguments are those of ``nnx.RMSNorm``.

    Example:
      >>> import jax.numpy as jnp
      >>> norm = RMSNorm(2, rngs=nnx.Rngs(0))
      >>> [f"{y:.3f}" for y in norm(jnp.asarray([3.0, 4.0]))]
      ['0.849', '1.131']

    References:
      Root Mean Square Layer Normalization, arXiv 1910.07467, equation 4.
    """

    def __call__(
        self, x: Float[Array, "... C"], mask: jax.Array | None = None
    ) -> Float[Array, "... C"]:
        """The normalised array; see the class."""
        # flax promotes bfloat16 implicitly, which strict promotion would forbid.
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, mask)
