"""Dense causal attention as Flax layers, over all tokens or in a sliding window, in linear memory.

Shapes: B batch, T tokens of a sequence, C features of the residual stream.
"""

from typing import Any, ClassVar

import jax
from flax.typing import Dtype

from fsa_jax.arguments import checks
from fsa_jax.inference import cached_attention
from fsa_jax.inference.kv_cache import Chunk, KVCache
from fsa_jax.nn.base import AttentionLayer
from fsa_jax.ops.dispatch import CUDNN


class FullAttention(AttentionLayer):
    """Dense causal self-attention over the same projections as ``NativeSparseAttention``.

    With q, k, v the projections of x and R the rotary embedding, over the tokens of one document:
    y = softmax(scale * R q (R k)^T) v W_o. ``fsa_jax.causal_attention`` computes the attention.

    Args:
      num_heads, in_features, num_kv_heads, head_dim, out_features, rope, scale, qk_norm, norm_eps,
        use_bias, qkv_bias, out_bias, dtype, param_dtype, precision, dot_general, kernel_init,
        out_kernel_init, bias_init, axis_names, padding_id, checkpoint_name, rngs: as in
        ``NativeSparseAttention``.
      implementation: as in ``fsa_jax.causal_attention``. ``"cudnn"`` supports neither segment ids
        nor a cache.
      sequence_axis: mesh axis that splits the tokens; see ``NativeSparseAttention``.

    Raises:
      ValueError: sizes do not divide, or a choice is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = FullAttention(4, 64, num_kv_heads=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 128, 64))).shape
      (1, 128, 64)

    References:
      Attention Is All You Need, arXiv 1706.03762, equation 1; grouped heads as in GQA,
      arXiv 2305.13245.
    """

    other_implementations: ClassVar[tuple[str, ...]] = CUDNN

    #: The number of visible keys, the query's own included; None: all.
    window_size: int | None = None

    def attend_rows(self, x, segment_ids, positions) -> jax.Array:
        return self._causal_rows(x, segment_ids, positions, self.window_size)

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

    def extend(self, x, cache: Any, chunk: Chunk, layer, fresh) -> tuple[jax.Array, Any]:
        query, value = self._query(x, chunk.position), self._value(x)
        key = self._turn(self._key(x), chunk.position)
        self._check_same_dtype(key, cache)
        size = self.window_size
        # checked even if `fresh`, so that every call refuses what later calls could not serve
        backend = cached_attention.dense_backend(
            self.implementation, query, cache, window_size=size
        )
        cache = cache.append(key, value, layer, chunk)
        if fresh:
            # padding comes last, where causal attention hides it from the tokens before it
            heads = self._causal(query, key, value, None, size)
        else:
            heads = cached_attention.attend_dense(
                query,
                cache,
                chunk,
                layer,
                window_size=size,
                scale=checks.scale(self.scale, self.head_dim),
                backend=backend,
            )
        return self._project_out(heads, chunk), cache


class SlidingWindowAttention(FullAttention):
    """Causal self-attention in a sliding window; otherwise like ``FullAttention``.

    A query at position t of its document sees the tokens t - w + 1 to t, with w the `window_size`.

    Args:
      num_heads, in_features: as in ``FullAttention``.
      window_size: the exact number of visible keys, the query's own included.
      **options: num_kv_heads, head_dim, out_features, rope, scale, qk_norm, norm_eps, use_bias,
        qkv_bias, out_bias, dtype, param_dtype, precision, dot_general, kernel_init,
        out_kernel_init, bias_init, axis_names, padding_id, checkpoint_name, implementation,
        sequence_axis and rngs, as in ``FullAttention``.

    Raises:
      ValueError: a size is not a positive integer; see ``FullAttention``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = SlidingWindowAttention(4, 64, window_size=32, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 128, 64))).shape
      (1, 128, 64)

    References:
      Longformer, arXiv 2004.05150, section 3.1, with keys only on one side.
    """

    def __init__(self, num_heads: int, in_features: int, *, window_size: int, **options: Any):
        super().__init__(num_heads, in_features, **options)
        self.window_size = checks.size("window_size", window_size)
