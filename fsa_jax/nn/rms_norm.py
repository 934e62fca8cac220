"""RMSNorm as a Flax NNX module, over the residual stream or over the channels of a head."""

from typing import Any

import jax
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float


class RMSNorm(nnx.RMSNorm):
    """RMSNorm over the last axis, with statistics in float32.

    ::

        y = scale * x / sqrt(mean(x ** 2) + epsilon)

    Args:
      features: size of the last axis.
      epsilon: added to the mean square.
      dtype: dtype of the result; None: inferred from input and parameters.
      param_dtype: dtype in which `scale` is stored.
      scale_metadata: metadata of `scale`, such as the name of its axis.
      rngs: random keys, which the initialisation with ones does not use.

    Example:
      >>> import jax.numpy as jnp
      >>> norm = RMSNorm(2, epsilon=1e-6, rngs=nnx.Rngs(0))
      >>> [f"{y:.3f}" for y in norm(jnp.asarray([3.0, 4.0]))]
      ['0.849', '1.131']

    References:
      Root Mean Square Layer Normalization, arXiv 1910.07467, equation 4.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float,
        dtype: Dtype | None = None,
        param_dtype: Dtype = "float32",
        scale_metadata: Any = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            scale_metadata=scale_metadata or {},
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "... C"], mask: jax.Array | None = None
    ) -> Float[Array, "... C"]:
        """The normalised array; see the class."""
        # flax promotes bfloat16 implicitly, which strict promotion would forbid.
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, mask)
