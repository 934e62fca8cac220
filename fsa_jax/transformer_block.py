"""One layer of the transformer: normalisation, attention of one type, and a gated feed-forward.

Shapes: B batch, T tokens of a sequence, n tokens of a call with a cache, C embed_dim, K key/value
heads.
"""

from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import initializers
from flax.typing import Initializer
from jaxtyping import Array, Float, Int, Integer

from fsa_jax.arguments.types import AnyArray, IntegerList
from fsa_jax.inference.kv_cache import Chunk
from fsa_jax.layers import FullAttention, NativeSparseAttention, SlidingWindowAttention
from fsa_jax.nn.base import without_padding
from fsa_jax.nn.rms_norm import RMSNorm
from fsa_jax.partitioning import partitioned
from fsa_jax.semantics.precision import narrow
from fsa_jax.semantics.segments import cut
from fsa_jax.transformer_config import TransformerConfig


def residual_norm(config: TransformerConfig, rngs: nnx.Rngs) -> RMSNorm:
    """RMSNorm over the residual stream."""
    return RMSNorm(
        config.embed_dim,
        epsilon=config.norm_eps,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        scale_metadata=partitioned("embed"),
        rngs=rngs,
    )


class SwiGLU(nnx.Module):
    """Gated feed-forward: (silu(x W_gate) * (x W_up)) W_down, arXiv 2002.05202, section 2."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int, init, *names: str) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=config.mlp_bias,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                kernel_init=init,
                kernel_metadata=partitioned(*names),
                bias_metadata=partitioned(names[1]),
                rngs=rngs,
            )

        width, hidden = config.embed_dim, config.mlp_dim
        self.gate = linear(width, hidden, initializers.lecun_normal(), "embed", "mlp")
        self.up = linear(width, hidden, initializers.lecun_normal(), "embed", "mlp")
        self.down = linear(hidden, width, _branch_init(config), "mlp", "embed")

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def _attention(config: TransformerConfig, kind: str, rngs: nnx.Rngs) -> Any:
    """The attention layer of a type."""
    shared: dict[str, Any] = dict(
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope=config.rope,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        out_kernel_init=_branch_init(config),
        implementation=config.implementation,
        sequence_axis=config.sequence_axis,
        rngs=rngs,
    )
    sizes = (config.num_heads, config.embed_dim)
    if kind == "full":
        return FullAttention(*sizes, **shared)
    if kind == "window":
        window_size = config.sliding_window or config.nsa.window_size
        return SlidingWindowAttention(*sizes, window_size=window_size, **shared)

    def gate_bias_init(key, shape, dtype):
        del key
        value = jax.numpy.asarray(config.gate_bias_init, dtype)
        return jax.numpy.broadcast_to(value, shape)

    return NativeSparseAttention(
        *sizes,
        config=config.nsa,
        compression=config.compression,
        gate=config.gate,
        kv_per_branch=config.kv_per_branch,
        compress_after_rope=config.compress_after_rope,
        gate_bias=config.gate_bias,
        gate_bias_init=gate_bias_init,
        **shared,
    )


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
      config: the configuration of the model.
      kind: type of the attention, ``"nsa"``, ``"full"`` or ``"window"``.
      rngs: random keys of the initialisation.
    """

    def __init__(self, config: TransformerConfig, kind: str, *, rngs: nnx.Rngs):
        self.attention_norm = residual_norm(config, rngs)
        self.mlp_norm = residual_norm(config, rngs)
        self.attention = _attention(config, kind, rngs)
        self.mlp = SwiGLU(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout_rate)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        segment_ids: Integer[AnyArray, "B T"] | IntegerList | None = None,
        positions: Integer[AnyArray, "B T"] | IntegerList | None = None,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "B T C"]:
        """The layer's output; dropout is applied only if `dropout_key` is given."""
        attention_key, mlp_key = (
            (None, None) if dropout_key is None else jax.random.split(dropout_key)
        )
        x = without_padding(x, segment_ids)
        out = self.attention(self.attention_norm(x), segment_ids, positions)
        x = x + self._drop(out, attention_key)
        return x + self._drop(self.mlp(self.mlp_norm(x)), mlp_key)

    def extend(
        self, x: Float[Array, "B n C"], cache: Any, chunk: Chunk, layer: jax.Array, fresh: bool
    ) -> tuple[Float[Array, "B n C"], Any]:
        """The layer's output for a chunk, and the updated cache; see the attention layers."""
        x = cut(x, chunk.valid)
        out, cache = self.attention.extend(self.attention_norm(x), cache, chunk, layer, fresh)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), cache

    def _drop(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return x if key is None else narrow(self.dropout.__call__)(x, rngs=key)

    def selected_blocks(
        self,
        x: Float[Array, "B T C"],
        segment_ids: Integer[AnyArray, "B T"] | IntegerList | None = None,
        positions: Integer[AnyArray, "B T"] | IntegerList | None = None,
    ) -> Int[Array, "B T K topk"]:
        """The blocks that the attention of this layer selects for the layer's input x."""
        assert isinstance(self.attention, NativeSparseAttention)
        x = without_padding(x, segment_ids)
        return self.attention.selected_blocks(self.attention_norm(x), segment_ids, positions)


def _branch_init(config: TransformerConfig) -> Initializer:
    """Initialiser of projections into the residual stream: the sum of 2L has a bounded variance."""
    return initializers.variance_scaling(1 / (2 * config.num_layers), "fan_in", "truncated_normal")
