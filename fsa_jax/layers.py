"""Attention layers for Flax: native sparse attention, and dense attention with or without a window.

All are ``flax.nnx`` modules with the constructor arguments of ``nnx.MultiHeadAttention``, and are
interchangeable. In linen code, wrap them: ``nnx.bridge.to_linen(NativeSparseAttention, num_heads=8,
in_features=512)``.

Every parameter carries the logical names of its axes (see ``fsa_jax.partitioning``), which have no
effect until ``sharding_rules`` binds them to the axes of a mesh.

Shapes: B batch, T tokens of a sequence, C features of the residual stream, N query heads, K
key/value heads, D head width, M compressed windows, S selected blocks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from flax.typing import Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Float, Int, Integer

from fsa_jax import api
from fsa_jax.api.operator import gated_attention
from fsa_jax.arguments import checks
from fsa_jax.arguments.types import AnyArray, CompressionMethod, Implementation, IntegerList
from fsa_jax.config import NSAConfig
from fsa_jax.inference import cached_attention
from fsa_jax.inference.kv_cache import Chunk, KVCache
from fsa_jax.inference.nsa_cache import NSACache
from fsa_jax.nn.base import BIAS_INIT, KERNEL_INIT, ROPE, AttentionLayer, linear
from fsa_jax.nn.compressor import Compressor
from fsa_jax.nn.dense_attention import FullAttention as FullAttention
from fsa_jax.nn.dense_attention import SlidingWindowAttention as SlidingWindowAttention
from fsa_jax.ops.compression import METHODS
from fsa_jax.partitioning import AxisNames
from fsa_jax.positions import window_positions
from fsa_jax.rope import RotaryEmbedding

GATES = ("head", "token")
"""Three gates per query head, as in the NSA paper, or three per token, as in FSA."""

SPARSE_PARTS = ("gate", "compress_key", "compress_value")
"""The parts of a layer that its sparse attention reads and full attention does not."""

_CONFIG = NSAConfig()
_POSITIONS_INIT = initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """The inputs of the branches: the queries, and the keys and values of each branch."""

    query: Float[Array, "B T N D"]
    compressed: tuple[Float[Array, "B M K D"], Float[Array, "B M K D"]]
    selected: tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]
    window: tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]


class NativeSparseAttention(AttentionLayer):
    """Causal self-attention by native sparse attention (NSA), also of packed sequences.

    With projections q, k, v of x, the compression phi and the rotary embedding R:

        ck, cv = R(phi_k(k + table)), phi_v(v)
        o = g_cmp * compressed(R q, ck, cv) + g_slc * selected(R q, R k, v) + g_win * window(R q,
            R k, v),   g = sigmoid(x W_g),   y = o W_o

    Keys are compressed before RoPE; a compressed key is rotated by the position of the first token
    in its window. With `compress_after_rope`, ck = phi_k(R k + table). With `qk_norm`, RMSNorm over
    the channels of a head follows the projections q and k. The projections have the names and
    shapes of ``nnx.MultiHeadAttention``; they carry the names "query_proj", "key_proj",
    "value_proj" and "out_proj" for the policies of ``jax.checkpoint``.

    Args:
      num_heads: number of query heads N.
      in_features: features C of the input.
      num_kv_heads: number of key/value heads K, a divisor of N; None: N.
      head_dim: width D of a head; None: ``in_features // num_heads``.
      out_features: features of the output; None: ``in_features``.
      config: sizes of the sparse attention.
      compression: phi, ``"linear"``, ``"weighted"``, ``"mean"`` or ``"mlp"`` (hidden width 2 D).
      gate: ``"head"`` for three gates per query head, or ``"token"`` for three per token.
      kv_per_branch: whether each branch has its own key and value projections, as in the NSA paper,
        rather than all branches the same.
      compress_after_rope: whether phi is applied to rotated keys, as in flash-linear-attention.
      rope: rotary embedding of queries and keys (see ``fsa_jax.RotaryEmbedding``), or None.
      scale: scale of the logits; None: ``head_dim ** -0.5``.
      qk_norm: whether each head of the queries and keys is normalised (RMSNorm) before RoPE.
      norm_eps: epsilon of that normalisation.
      use_bias: whether the projections and the gates have a bias, where the next three do not say.
      qkv_bias: whether the projections of queries, keys and values have a bias; None: `use_bias`.
      out_bias: whether the output projection has a bias; None: `use_bias`.
      gate_bias: whether the gates have a bias; None: `use_bias`.
      dtype: dtype of the computation; None: inferred from input and parameters.
      param_dtype: dtype in which the parameters are stored.
      precision: ``jax.lax.Precision`` of the projections.
      dot_general: a function like ``jax.lax.dot_general`` that computes the projections, for
        example with quantised operands; None: ``jax.lax.dot_general``.
      kernel_init: initialiser of the projections and of the gates.
      out_kernel_init: initialiser of the output projection; None: `kernel_init`.
      bias_init: initialiser of the biases, except that of the gates.
      gate_bias_init: initialiser of the bias of the gates, an array [N, 3] (or [1, 3]) in the
        order compressed, selected, window; None: `bias_init`.
      compression_init: initialiser of phi's weights; None: ``linear`` and ``weighted`` start as the
        mean of the window's tokens, and ``mlp`` as LeCun normal.
      positions_init: initialiser of the positional table within a window, [K, l, D].
      axis_names: names of parameter axes that replace some of ``fsa_jax.partitioning``'s
        ``LOGICAL_AXES``, for example ``{"embed": "embed_attn", "head_dim": None}``.
      padding_id: the segment id that marks padding; see ``native_sparse_attention``.
      checkpoint_name: one name for the outputs and logsumexps of the attention, for the policies of
        ``jax.checkpoint``; None: ``fsa_jax.CHECKPOINT_NAMES``.
      implementation: passed on to the functions of fsa_jax; None: the best available one.
      sequence_axis: mesh axis that splits the tokens of each sequence, see
        ``fsa_jax.native_sparse_attention``: all arrays of a call are then in zigzag order.
      full_attention: whether a call without a cache computes full causal attention in place of o,
        as ``FullAttention`` with the same q, k, v and W_o does, for a warm-up. `SPARSE_PARTS` of
        the layer are then not read, and their gradient is 0. The attribute of this name may change
        at any time: ``model.set_attributes(full_attention=False)`` of ``nnx`` ends the warm-up of
        all layers of a model. Not with `kv_per_branch`.
      rngs: random keys of the initialisation.

    Raises:
      ValueError: a size is not a multiple as required, or a value is not one of the choices.

    Example:
      >>> layer = NativeSparseAttention(4, 64, num_kv_heads=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 128, 64))).shape
      (1, 128, 64)

    References:
      NSA, arXiv 2502.11089, equations 5 to 12; gates per token, and keys that all branches share,
      are those of FSA, arXiv 2508.18224.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        config: NSAConfig = _CONFIG,
        compression: CompressionMethod = "linear",
        gate: Literal["head", "token"] = "head",
        kv_per_branch: bool = False,
        compress_after_rope: bool = False,
        rope: RotaryEmbedding | None = ROPE,
        scale: float | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        use_bias: bool = False,
        qkv_bias: bool | None = None,
        out_bias: bool | None = None,
        gate_bias: bool | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        dot_general: Callable[..., jax.Array] | None = None,
        kernel_init: Initializer = KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = BIAS_INIT,
        gate_bias_init: Initializer | None = None,
        compression_init: Initializer | None = None,
        positions_init: Initializer = _POSITIONS_INIT,
        axis_names: AxisNames | None = None,
        padding_id: int = 0,
        checkpoint_name: str | None = None,
        implementation: Implementation | None = None,
        sequence_axis: str | None = None,
        full_attention: bool = False,
        rngs: nnx.Rngs,
    ):
        checks.choice("compression", compression, METHODS)
        checks.choice("gate", gate, GATES)
        self.config = checks.config(config)
        self.kv_per_branch = checks.flag("kv_per_branch", kv_per_branch)
        self.compress_after_rope = checks.flag("compress_after_rope", compress_after_rope)
        self.full_attention = checks.flag("full_attention", full_attention)
        options: dict[str, Any] = dict(
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            dot_general=dot_general,
            kernel_init=kernel_init,
            axis_names=axis_names,
            rngs=rngs,
        )
        super().__init__(
            num_heads,
            in_features,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            out_features=out_features,
            _kv_branches=(3,) if kv_per_branch else (),
            rope=rope,
            scale=scale,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            use_bias=use_bias,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            out_kernel_init=out_kernel_init,
            bias_init=bias_init,
            padding_id=padding_id,
            checkpoint_name=checkpoint_name,
            implementation=implementation,
            sequence_axis=sequence_axis,
            **options,
        )
        gates = (num_heads, 3) if gate == "head" else (1, 3)
        names = ("embed",), ("heads" if gate == "head" else None, None)
        own_bias = use_bias if gate_bias is None else checks.flag("gate_bias", gate_bias)
        init = bias_init if gate_bias_init is None else gate_bias_init

        def flat_init(key, flat, dtype):  # Flax asks for the bias as a vector
            return init(key, gates, dtype).reshape(flat)

        self.gate = linear(
            (in_features,), gates, names, use_bias=own_bias, bias_init=flat_init, **options
        )

        sizes = (self.num_kv_heads, self.head_dim)
        shared: dict[str, Any] = dict(
            config=config,
            method=compression,
            param_dtype=param_dtype,
            weights_init=compression_init,
            axis_names=axis_names,
            rngs=rngs,
        )
        self.compress_key = Compressor(*sizes, positions_init=positions_init, **shared)
        self.compress_value = Compressor(*sizes, positions_init=None, **shared)

    @property
    def stride(self) -> int:
        return self.config.kernel_stride

    def attend_rows(self, x, segment_ids, positions) -> jax.Array:
        if self.full_attention:
            if self.kv_per_branch:
                raise ValueError(
                    "full_attention=True needs keys and values that all branches share, got "
                    "kv_per_branch=True"
                )
            return self._causal_rows(x, segment_ids, positions)
        return self._attend(x, self._inputs(x, segment_ids, positions), segment_ids)

    def _attend(self, x: jax.Array, inputs: _Inputs, segment_ids: jax.Array | None) -> jax.Array:
        """The gated sum of the branches, [B, T, N, D]."""
        gates = jax.nn.sigmoid(self.gate(x))
        shared = self._shared(segment_ids)
        shared |= {
            "config": self.config,
            "sequence_axis": self.sequence_axis,
            "checkpoint_name": self.checkpoint_name,
        }
        arrays = (inputs.query, *inputs.selected, *inputs.compressed, gates)
        if not self.kv_per_branch:
            return api.native_sparse_attention(*arrays, **shared)
        sources = (inputs.selected, inputs.window)
        return gated_attention(inputs.query, inputs.compressed, sources, gates, **shared)

    def init_cache(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: Dtype | None = None,
        num_pages: int | None = None,
        rollback: int = 0,
        layers: int = 1,
    ) -> NSACache:
        """An empty cache for this layer.

        Args:
          batch: number of sequences.
          capacity: maximum number of tokens of a sequence; rounded up to whole blocks.
          dtype: dtype of keys and values, which must be that of the layer's keys; None: that of the
            computation, or else that of the parameters.
          num_pages: number of pages that a ``PageAllocator`` assigns to sequences; None: every
            sequence has pages of its own.
          rollback: maximum number of tokens that all calls of ``NSACache.rewind`` together may
            remove.
          layers: number of layers like this one that share the cache, as in a model.

        Raises:
          ValueError: a size is not a positive integer, or the dtype is not that of the keys.
        """
        return NSACache.init(
            batch,
            capacity,
            config=self.config,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self._dtype_of_cache(dtype),
            window_of_its_own=self.kv_per_branch,
            num_pages=num_pages,
            rollback=rollback,
            layers=layers,
        )

    def check_cache(self, cache: KVCache, batch: int, layers: int = 1) -> None:
        if self.full_attention:
            raise NotImplementedError(
                "full_attention=True cannot serve a cache: it is for training; a layer without it "
                "takes the same parameters"
            )
        super().check_cache(cache, batch, layers)

    def extend(self, x, cache: NSACache, chunk: Chunk, layer, fresh) -> tuple[jax.Array, NSACache]:
        query, key, value = self._query(x, chunk.position), self._key(x), self._value(x)
        self._check_same_dtype(key, cache)
        backend = cached_attention.nsa_backend(self.implementation, query, cache)
        keys, values = self._by_branch(key, value)
        compressed_key = self._to_compress(keys[0], chunk.position)
        selected = window = (self._turn(keys[1], chunk.position), values[1])
        cache = cache.append(*selected, layer, chunk)
        if self.kv_per_branch:
            window = (self._turn(keys[2], chunk.position), values[2])
            cache = cache.append_window(*window, layer, chunk)
        cache = cache.append_compressed(
            compressed_key,
            values[0],
            layer,
            chunk,
            lambda key, at: self._from_compress(self.compress_key(key)[:, : at.shape[1]], at),
            self.compress_value,
        )
        if fresh:
            count = x.shape[1] // self.config.kernel_stride
            compressed = cache.read_compressed(layer, chunk, count)
            inputs = _Inputs(query, compressed, selected, window)
            heads = self._attend(x, inputs, chunk.valid.astype(jnp.int32))
        else:
            scale = checks.scale(self.scale, self.head_dim)
            outs = cached_attention.attend(query, cache, chunk, layer, scale=scale, backend=backend)
            heads = api.combine_branches(jax.nn.sigmoid(self.gate(x)), *outs)
        return self._project_out(heads, chunk), cache

    def selected_blocks(
        self,
        x: Float[AnyArray, "B T C"],
        segment_ids: Integer[AnyArray, "B T"] | IntegerList | None = None,
        positions: Integer[AnyArray, "B T"] | IntegerList | None = None,
    ) -> Int[Array, "B T K topk"]:
        """The blocks that each query selects.

        Args:
          x: as in a call.
          segment_ids: as in a call.
          positions: as in a call.

        Returns:
          int32 [B, T, K, topk] block indices, in ascending order and padded with -1. They count
          from the start of the query's own document.

        Raises:
          ValueError: the layer has a `sequence_axis`; a layer without one takes the same
            parameters.
        """
        if self.sequence_axis is not None:
            raise ValueError(
                "selected_blocks needs a layer without sequence_axis, got "
                f"sequence_axis={self.sequence_axis!r}"
            )
        array, ids, given = self._arrays(x, segment_ids, positions)
        segments, positions = self._describe(array, ids, given)
        array = segments.without_padding(array)
        return self._select(self._inputs(array, ids, positions), ids)

    def _inputs(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array,
    ) -> _Inputs:
        query, key, value = self._query(x, positions), self._key(x), self._value(x)
        keys, values = self._by_branch(key, value)
        axis = self.sequence_axis
        windows: dict[str, Any] = {
            "kernel_size": self.config.kernel_size,
            "kernel_stride": self.config.kernel_stride,
            "positions": positions,
            "sequence_axis": axis,
        }
        compressed_key = self.compress_key(self._to_compress(keys[0], positions), segment_ids, axis)
        selected_key = self._turn(keys[1], positions)
        window_key = self._turn(keys[2], positions) if self.kv_per_branch else selected_key
        return _Inputs(
            query=query,
            compressed=(
                self._from_compress(compressed_key, window_positions(segment_ids, **windows)),
                self.compress_value(values[0], segment_ids, axis),
            ),
            selected=(selected_key, values[1]),
            window=(window_key, values[2]),
        )

    def _to_compress(self, key: jax.Array, positions: jax.Array) -> jax.Array:
        """The keys that phi compresses, at the positions of their tokens."""
        return self._turn(key, positions) if self.compress_after_rope else key

    def _from_compress(self, key: jax.Array, positions: jax.Array) -> jax.Array:
        """The compressed keys that queries see, at the positions of their windows."""
        return key if self.compress_after_rope else self._turn(key, positions)

    def _by_branch(self, key: jax.Array, value: jax.Array) -> Any:
        """The keys and the values of the compressed, selected and window branch."""
        if self.kv_per_branch:
            return (jnp.unstack(array, axis=2) for array in (key, value))
        return (key,) * 3, (value,) * 3

    def _shared(self, segment_ids: jax.Array | None) -> dict[str, Any]:
        """The arguments that all attention functions share."""
        return {
            "scale": self.scale,
            "segment_ids": segment_ids,
            "implementation": self.implementation,
        }

    def _select(self, inputs: _Inputs, segment_ids: jax.Array | None) -> jax.Array:
        """The blocks that the probabilities of the compressed branch select."""
        shared = self._shared(segment_ids)
        _, lse = api.compressed_attention(
            inputs.query,
            *inputs.compressed,
            kernel_size=self.config.kernel_size,
            kernel_stride=self.config.kernel_stride,
            return_residuals=True,
            **shared,
        )
        return api.select_blocks(
            inputs.query, inputs.compressed[0], lse, config=self.config, **shared
        )
