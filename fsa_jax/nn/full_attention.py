"""Dense causal attention as a Flax layer, with memory linear in the tokens.

Shapes: B batch, T tokens of a sequence, C features of the residual stream.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from flax.typing import Dtype, Initializer, PrecisionLike

from fsa_jax import api
from fsa_jax.arguments import checks
from fsa_jax.arguments.types import DenseImplementation
from fsa_jax.inference import cached_attention
from fsa_jax.inference.kv_cache import Chunk, KVCache
from fsa_jax.nn.base import AttentionLayer
from fsa_jax.ops.dispatch import CUDNN, check_name
from fsa_jax.rope import RoPE

_ROPE = RoPE()
_KERNEL_INIT = initializers.lecun_normal()
_BIAS_INIT = initializers.zeros_init()


class FullAttention(AttentionLayer):
    """Dense causal self-attention over the same projections as ``NativeSparseAttention``.

    With q, k, v the projections of x and R the rotary embedding, over the tokens of one document:
    y = softmax(scale * R q (R k)^T) v W_o. ``fsa_jax.causal_attention`` computes the attention.

    Args:
      num_heads, in_features, num_kv_heads, head_dim, out_features, rope, scale, use_bias, dtype,
        param_dtype, precision, kernel_init, out_kernel_init, bias_init, rngs: as in
        ``NativeSparseAttention``.
      implementation: as in ``fsa_jax.causal_attention``. ``"cudnn"`` supports neither segment ids
        nor a cache.
      sequence_axis: mesh axis that splits the tokens; see ``NativeSparseAttention``.

    Raises:
      ValueError: sizes do not divide, or a choice is unknown.

    Example:
      >>> layer = FullAttention(4, 64, num_kv_heads=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 128, 64))).shape
      (1, 128, 64)

    References:
      Attention Is All You Need, arXiv 1706.03762, equation 1; grouped heads as in GQA,
      arXiv 2305.13245.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        rope: RoPE | None = _ROPE,
        scale: float | None = None,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = _KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = _BIAS_INIT,
        implementation: DenseImplementation | None = None,
        sequence_axis: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_name(implementation, CUDNN)
        super().__init__(
            num_heads,
            in_features,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            out_features=out_features,
            kv_branches=(),
            rope=rope,
            scale=scale,
            implementation=implementation,
            sequence_axis=sequence_axis,
            out_kernel_init=out_kernel_init,
            options=dict(
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                kernel_init=kernel_init,
                bias_init=bias_init,
                rngs=rngs,
            ),
        )

    def attend_rows(self, x, segment_ids, positions) -> jax.Array:
        query, key = self._turn(self.query(x), positions), self._turn(self.key(x), positions)
        return self._attend(query, key, self.value(x), segment_ids)

    def _attend(self, query, key, value, segment_ids: jax.Array | None) -> jax.Array:
        return api.causal_attention(
            query,
            key,
            value,
            segment_ids=segment_ids,
            scale=self.scale,
            implementation=self.implementation,
            sequence_axis=self.sequence_axis,
        )

    def init_cache(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: Dtype | None = None,
        num_pages: int | None = None,
        page_size: int = 64,
        layers: int = 1,
    ) -> KVCache:
        """An empty cache of this layer; the arguments are as in ``NativeSparseAttention``.

        Args:
          batch: number of sequences.
          capacity: the most tokens that a sequence can have; it is rounded up to whole pages.
          dtype: dtype of the cached keys and values, which must be the dtype of the layer's keys;
            None: that of the computation, or else of the parameters.
          num_pages: pages that a ``PageAllocator`` assigns to sequences; None: each sequence has
            all its pages from the start.
          page_size: tokens of a page.
          layers: number of layers like this one that share the cache.

        Raises:
          ValueError: a size is not a positive integer, or the dtype is not that of the keys.
        """
        return KVCache.init(
            batch,
            capacity,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self._dtype_of_cache(dtype),
            page_size=page_size,
            num_pages=num_pages,
            layers=layers,
        )

    def extend(self, x, cache: KVCache, chunk: Chunk, layer, fresh) -> tuple[jax.Array, KVCache]:
        query, key = (self._turn(y, chunk.position) for y in (self.query(x), self.key(x)))
        value = self.value(x)
        self._check_same_dtype(key, cache)
        backend = cached_attention.backend_of(self.implementation, query, cache)
        cache = cache.append(key, value, layer, chunk)
        if fresh:
            # padding comes last, where causal attention hides it from the tokens before it
            heads = self._attend(query, key, value, None)
        else:
            scale = checks.scale(self.scale, self.head_dim)
            heads = cached_attention.attend_full(
                query, cache, chunk, layer, scale=scale, backend=backend
            )
        return self._project_out(heads, chunk), cache
