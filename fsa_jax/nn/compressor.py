"""The compression phi of native sparse attention as a Flax module, with its weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import initializers
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from fsa_jax import api
from fsa_jax.arguments.types import CompressionMethod
from fsa_jax.config import NSAConfig
from fsa_jax.partitioning import AxisNames, partitioned


class Compressor(nnx.Module):
    """The compression phi with its parameters: maps each window of tokens to one key (or value).

    Args:
      num_kv_heads: number of key/value heads K.
      head_dim: width D of a head.
      config: supplies the size l and the stride of the windows.
      method: ``"linear"``, ``"weighted"``, ``"mean"`` or ``"mlp"``.
      param_dtype: dtype in which the parameters are stored.
      weights_init: initialiser of the weights; None: see ``NativeSparseAttention``.
      positions_init: initialiser of the positional table [K, l, D]; None: there is no table.
      axis_names: other names of parameter axes; see ``NativeSparseAttention``.
      rngs: random keys.

    Example:
      >>> phi = Compressor(2, 8, config=NSAConfig(), method="mean", rngs=nnx.Rngs(0))
      >>> phi(jnp.ones((1, 64, 2, 8))).shape
      (1, 4, 2, 8)
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        config: NSAConfig,
        method: CompressionMethod,
        param_dtype: Dtype = jnp.float32,
        weights_init: Initializer | None = None,
        positions_init: Initializer | None = None,
        axis_names: AxisNames | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.method: CompressionMethod = method
        heads, window, hidden = num_kv_heads, config.kernel_size, 2 * head_dim
        flat = window * head_dim
        shapes = {
            "linear": ((heads, flat, head_dim),),
            "weighted": ((heads, window),),
            "mean": (),
            "mlp": ((heads, flat, hidden), (heads, hidden, head_dim)),
        }[method]
        default_init = _lecun_per_head if method == "mlp" else _mean_of_window
        init = default_init if weights_init is None else weights_init

        def parameter(init: Initializer, shape: tuple[int, ...], *names: str | None) -> nnx.Param:
            metadata = partitioned("kv_heads", *names, axis_names=axis_names)
            return nnx.Param(init(rngs.params(), shape, param_dtype), **metadata)

        self.weights: nnx.Param | None = nnx.data(None)
        self.weights_out: nnx.Param | None = nnx.data(None)  # the second matrix of "mlp"
        self.positions: nnx.Param | None = nnx.data(None)
        if method == "weighted":
            self.weights = parameter(init, shapes[0], None)
        elif shapes:
            self.weights = parameter(init, shapes[0], "window", "head_dim")
        if len(shapes) == 2:
            self.weights_out = parameter(init, shapes[1], None, "head_dim")
        if positions_init is not None:
            self.positions = parameter(positions_init, (heads, window, head_dim), None, "head_dim")

    def __call__(
        self,
        x: Float[Array, "B T K D"],
        segment_ids: Int[Array, "B T"] | None = None,
        sequence_axis: str | None = None,
    ) -> Float[Array, "B M K D"]:
        """Compresses x in its own dtype; M = T // kernel_stride. See ``fsa_jax.compress``."""
        weights, weights_out = _cast(self.weights, x), _cast(self.weights_out, x)
        return api.compress(
            x,
            kernel_size=self.config.kernel_size,
            kernel_stride=self.config.kernel_stride,
            method=self.method,
            weights=(weights, weights_out) if self.method == "mlp" else weights,
            positions=_cast(self.positions, x),
            segment_ids=segment_ids,
            sequence_axis=sequence_axis,
        )


def _cast(parameter: nnx.Param | None, x: jax.Array) -> Any:
    return None if parameter is None else parameter[...].astype(x.dtype)


def _mean_of_window(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
    """Weights [K, l*D, D] or [K, l] with which phi is the mean of the window's tokens."""
    del key
    width = shape[2] if len(shape) == 3 else 1
    mean = jnp.asarray(mean_of_window(shape[1] // width, width), dtype)
    return jnp.broadcast_to(mean, (shape[0], *mean.shape)).reshape(shape)


def mean_of_window(window: int, width: int) -> np.ndarray:
    """The matrix [window * width, width] that averages the tokens of a window."""
    return np.tile(np.eye(width), (window, 1)) / window


def _lecun_per_head(key: jax.Array, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
    """LeCun normal weights [K, in, out] of K independent maps."""
    return initializers.lecun_normal(batch_axis=0)(key, shape, dtype)
