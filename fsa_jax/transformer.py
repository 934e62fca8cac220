"""A small decoder-only transformer, for training and for comparing sparse with dense attention.

The parameters of the layers of a type are stacked along a leading layer axis, and ``lax.scan`` runs
the layers (see `nn/layer_stack.py`), so tracing and compilation take the time of one layer, or of a
few if the types of the layers differ.

Shapes: B batch, T tokens of a sequence, n tokens of a call with a cache, C embed_dim, L layers,
V vocabulary, K key/value heads.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Integer

from fsa_jax import api
from fsa_jax.arguments import checks
from fsa_jax.arguments.types import AnyArray, IntegerList
from fsa_jax.inference.kv_cache import KVCache
from fsa_jax.layers import NativeSparseAttention
from fsa_jax.nn.base import layer_call
from fsa_jax.nn.layer_stack import run_layers
from fsa_jax.partitioning import partitioned
from fsa_jax.semantics.segments import cut
from fsa_jax.transformer_block import Block, residual_norm
from fsa_jax.transformer_config import TransformerConfig as TransformerConfig

#: The primitive by which jax runs cuDNN's forward pass of attention.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"


class Transformer(nnx.Module):
    """Decoder-only transformer: embedding, pre-norm blocks with SwiGLU, final RMSNorm, head.

    ``model.set_attributes(full_attention=True)`` makes its layers of sparse attention compute full
    attention with the same parameters, as a warm-up; see ``NativeSparseAttention``.

    Args:
      config: the configuration.
      rngs: random keys of the initialisation.

    Raises:
      ValueError: `config` is not a ``TransformerConfig``.

    Example:
      >>> config = TransformerConfig(num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=1)
      >>> model = Transformer(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 64), jnp.int32)).shape
      (1, 64, 257)

    References:
      Llama, arXiv 2302.13971, section 2.2, with NSA (arXiv 2502.11089) as its attention.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        if not isinstance(config, TransformerConfig):
            raise ValueError(f"config must be a TransformerConfig, got {checks.short(config)}")
        self.config = config
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.embed_dim,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=initializers.normal(0.02),
            embedding_metadata=partitioned("vocab", "embed"),
            rngs=rngs,
        )

        def stack(kind: str, count: int) -> Block:
            @nnx.split_rngs(splits=count)
            @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
            def build(rngs: nnx.Rngs) -> Block:
                return Block(config, kind, rngs=rngs)

            return build(rngs)

        counts = Counter(config.types)
        self.layers: Any
        if len(counts) == 1:
            self.layers = stack(config.types[0], config.num_layers)
        else:
            self.layers = nnx.Dict({kind: stack(kind, count) for kind, count in counts.items()})
        self.norm = residual_norm(config, rngs)
        self.head: nnx.Param | None = nnx.data(None)
        if not config.tie_embeddings:
            shape = (config.vocab_size, config.embed_dim)
            head = initializers.normal(0.02)(rngs.params(), shape, config.param_dtype)
            self.head = nnx.Param(head, **partitioned("vocab", "embed"))

    @overload
    def __call__(
        self,
        tokens: Integer[AnyArray, "B T"] | IntegerList,
        segment_ids: Integer[AnyArray, "B T"] | IntegerList | None = None,
        positions: Integer[AnyArray, "B T"] | IntegerList | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "B T V"]: ...

    @overload
    def __call__[Cache: KVCache](
        self,
        tokens: Integer[AnyArray, "B n"] | IntegerList,
        *,
        cache: Cache,
        num_tokens: Integer[AnyArray, " B"] | IntegerList | None = None,
        fresh: bool = False,
        only_last: bool = False,
    ) -> tuple[Float[Array, "B n V"], Cache]: ...

    def __call__(
        self,
        tokens,
        segment_ids=None,
        positions=None,
        *,
        dropout_key=None,
        cache=None,
        num_tokens=None,
        fresh=False,
        only_last=False,
    ) -> Any:
        """Logits of the next token at each position, of whole sequences or with a cache.

        Args:
          tokens: integers [B, T], in 0 .. vocab_size - 1; any value at padding.
          segment_ids: integers [B, T]; a run of equal ids is one document, and the configuration's
            `padding_id` is padding. None: every sequence is one document.
          positions: integers [B, T], for RoPE; None: counted from the start of each document.
          dropout_key: random key of dropout; None: no dropout.
          cache: the result of `init_cache` or of an earlier call. The tokens [b] then continue
            sequence b of the cache.
          num_tokens: with a cache, integers [B], the number of valid tokens of each sequence in
            this call; None: all.
          fresh: with a cache, whether the tokens are the first ones of their sequences. This is the
            fast way to read long prompts, see ``AttentionLayer``.
          only_last: with a cache, whether to return only the logits [B, 1, V] after the last token
            of each sequence, which are 0 for a sequence without new tokens.

        Returns:
          float32 logits [B, T, V], 0 at padding. With a cache, the logits and the updated cache.

        Raises:
          ValueError: a shape or dtype does not match; the cache belongs to another model; outside
            jit, a token is not in the vocabulary, or a sequence exceeds the capacity of the cache
            or is lost. Inside jit, a token that is not in the vocabulary makes its logits NaN, and
            possibly others of its sequence; tokens beyond the capacity are not stored, and their
            logits are 0; the logits of lost sequences (see ``KVCache``) are NaN.
          NotImplementedError: the implementation or the sequence_axis does not support a cache.

        Example:
          >>> config = TransformerConfig(num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=1)
          >>> model, tokens = Transformer(config, rngs=nnx.Rngs(0)), jnp.zeros((1, 3), jnp.int32)
          >>> logits, cache = model(tokens, cache=model.init_cache(1, 64))
          >>> logits.shape, cache.lengths.tolist()
          ((1, 3, 257), [3])
        """
        fresh, only_last = checks.flag("fresh", fresh), checks.flag("only_last", only_last)
        tokens = checks.integers("tokens", tokens, "B T")
        if cache is not None:
            rest = {"segment_ids": segment_ids, "positions": positions, "dropout_key": dropout_key}
            checks.absent("with a cache", **rest)
            return self._extend(tokens, cache, num_tokens, fresh, only_last)
        options = {"fresh": fresh or None, "only_last": only_last or None}
        checks.absent("without a cache", num_tokens=num_tokens, **options)
        return self._call("call_part", tokens, segment_ids, positions, dropout_key)

    def hidden_states(
        self,
        tokens: Integer[AnyArray, "B T"] | IntegerList,
        segment_ids: Integer[AnyArray, "B T"] | IntegerList | None = None,
        positions: Integer[AnyArray, "B T"] | IntegerList | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Float[Array, "B T C"]:
        """The states h, after the final norm, whose logits a call returns: h @ `head_weight`.T.

        With ``fsa_jax.cross_entropy`` they give the loss without the logits of all tokens.

        Args:
          tokens: as in a call, like all other arguments.
          segment_ids: as in a call.
          positions: as in a call.
          dropout_key: as in a call.

        Returns:
          [B, T, C] in the dtype of the computation, 0 at padding.

        Raises:
          ValueError: as in a call.

        Example:
          >>> from fsa_jax import cross_entropy
          >>> config = TransformerConfig(num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=1)
          >>> model, tokens = Transformer(config, rngs=nnx.Rngs(0)), jnp.zeros((1, 64), jnp.int32)
          >>> cross_entropy(model.hidden_states(tokens), model.head_weight, tokens).shape
          (1, 64)
        """
        tokens = checks.integers("tokens", tokens, "B T")
        return self._call("hidden_part", tokens, segment_ids, positions, dropout_key)

    @property
    def head_weight(self) -> Float[Array, "V C"]:
        """The matrix of the output head; the embedding table if they are tied."""
        return (self.embedding.embedding if self.head is None else self.head)[...]

    def _call(self, method: str, tokens, segment_ids, positions, dropout_key) -> jax.Array:
        """`method` of checked arguments."""
        segment_ids = checks.ids(segment_ids, tokens.shape, True, self.config.padding_id)
        if positions is not None:
            positions = checks.integers("positions", positions, "B T")
        rest = (segment_ids, positions, dropout_key)
        axis = self.config.sequence_axis
        return layer_call(self, axis, tokens, *rest, name="tokens", method=method)

    def call_part(self, tokens, segment_ids, positions, dropout_key) -> jax.Array:
        """The call without a cache, under mesh axes that are not Explicit."""
        x, segments = self._states(tokens, segment_ids, positions, dropout_key)
        return segments.without_padding(self._logits(x))

    def hidden_part(self, tokens, segment_ids, positions, dropout_key) -> jax.Array:
        """`hidden_states`, under mesh axes that are not Explicit."""
        x, segments = self._states(tokens, segment_ids, positions, dropout_key)
        return segments.without_padding(self.norm(x))

    def _states(self, tokens, segment_ids, positions, dropout_key) -> tuple[jax.Array, Any]:
        """The output of the last layer, and the documents."""
        keys = (
            None if dropout_key is None else jax.random.split(dropout_key, self.config.num_layers)
        )

        def step(x: jax.Array, layer: Block, key: jax.Array | None) -> tuple[jax.Array, None]:
            return layer(x, segment_ids, positions, key), None

        segments = checks.segments(tokens, segment_ids, True)
        remat = _keeps_attention if self.config.remat else None
        x, _ = self._run(step, self._embed(tokens, segments.valid), keys, remat=remat)
        return x, segments

    def init_cache(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: Dtype | None = None,
        num_pages: int | None = None,
        rollback: int | None = None,
        page_size: int | None = None,
    ) -> KVCache:
        """An empty cache for a batch of sequences.

        Args:
          batch: number of sequences B.
          capacity: maximum number of tokens of a sequence; rounded up to whole pages.
          dtype: dtype of keys and values; None: that of the computation.
          num_pages: number of pages that a ``PageAllocator`` assigns to sequences; None: every
            sequence has pages of its own.
          rollback: for sparse attention, the maximum number of tokens that ``NSACache.rewind`` may
            remove; None: 0.
          page_size: for full attention, tokens per page; None: 64.

        Raises:
          ValueError: a size is not a positive integer, an option belongs to the other kind of
            attention, or the dtype is not that of the keys.
        """
        options = {"rollback": rollback, "page_size": page_size}
        other = "page_size" if "nsa" in self.config.types else "rollback"
        checks.absent(f"with attention={self.config.attention!r}", **{other: options.pop(other)})
        return self._cached.init_cache(
            batch,
            capacity,
            dtype=dtype,
            num_pages=num_pages,
            layers=self.config.num_layers,
            **{name: value for name, value in options.items() if value is not None},
        )

    @property
    def _stacks(self) -> dict[str, Block]:
        """For each type of layer, the layers of that type, with stacked parameters."""
        if isinstance(self.layers, Block):
            return {self.config.types[0]: self.layers}
        return dict(self.layers.items())

    @property
    def _cached(self) -> Any:
        """The attention layer that makes the cache of all layers.

        The cache of sparse attention holds all that the other types need: the keys and values of
        all tokens.
        """
        stacks = self._stacks
        return stacks["nsa" if "nsa" in stacks else self.config.types[0]].attention

    def _extend(self, tokens: jax.Array, cache: KVCache, num_tokens, fresh: bool, only_last: bool):
        """The logits, and the cache with the new tokens."""
        self._cached.check_cache(cache, tokens.shape[0], self.config.num_layers)
        cache = cache.emptied() if fresh else cache
        chunk = cache.place(tokens.shape[1], num_tokens)
        x, valid = self._embed(tokens, chunk.valid), chunk.valid

        # The cache of all layers is carried rather than scanned over, so that each layer updates it
        # in place.
        def step(carry, layer: Block, number: jax.Array):
            x, cache = carry
            return layer.extend(x, cache, chunk, number, fresh), None

        numbers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (x, cache), _ = self._run(step, (x, cache), numbers)
        if only_last:
            last = jnp.maximum(chunk.stop - chunk.first - 1, 0)[:, None]
            x = jnp.take_along_axis(x, last[..., None], axis=1)
            valid = jnp.take_along_axis(valid, last, axis=1)
        return cache.marked(cut(self._logits(x), valid)), cache.advance(chunk)

    def _logits(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        return jnp.einsum(
            "btc,vc->btv", x, self.head_weight.astype(x.dtype), preferred_element_type=jnp.float32
        )

    def selected_blocks(
        self,
        tokens: Integer[AnyArray, "B T"] | IntegerList,
        segment_ids: Integer[AnyArray, "B T"] | IntegerList | None = None,
        positions: Integer[AnyArray, "B T"] | IntegerList | None = None,
    ) -> Int[Array, "L B T K topk"]:
        """The blocks that each query selects in each layer.

        Args:
          tokens: as in a call.
          segment_ids: as in a call.
          positions: as in a call.

        Returns:
          int32 [L, B, T, K, topk] block indices, in ascending order and padded with -1, of the
          layers of sparse attention. They count from the start of the query's own document.

        Raises:
          ValueError: the model has no layer of sparse attention.
        """
        if "nsa" not in self.config.types:
            raise ValueError(
                "selected_blocks needs a model with layers of native sparse attention, got "
                f"attention={self.config.attention!r}"
            )

        def step(x: jax.Array, layer: Block, _: None) -> tuple[jax.Array, jax.Array | None]:
            sparse = isinstance(layer.attention, NativeSparseAttention)
            blocks = layer.selected_blocks(x, segment_ids, positions) if sparse else None
            return layer(x, segment_ids, positions), blocks

        tokens = checks.integers("tokens", tokens, "B T")
        segment_ids = checks.ids(segment_ids, tokens.shape, True, self.config.padding_id)
        valid = checks.segments(tokens, segment_ids, True).valid
        return self._run(step, self._embed(tokens, valid))[1]

    def layer(self, index: int) -> Block:
        """A single layer, with copies of its parameters.

        Args:
          index: index of the layer, from 0.

        Raises:
          ValueError: the index is not that of a layer.
        """
        index = checks.size("index", index, 0, self.config.num_layers - 1)
        kind = self.config.types[index]
        graphdef, stacked = nnx.split(self._stacks[kind])
        place = self.config.types[:index].count(kind)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[place], stacked))

    def _embed(self, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        # At padding this may be NaN, which the layers replace by 0.
        return self.embedding(checks.tokens("tokens", tokens, self.config.vocab_size, valid))

    def _run(self, step: Callable, carry: Any, xs: Any = None, **options: Any) -> tuple[Any, Any]:
        """Runs `step(carry, layer, x) -> (carry, output)` over the layers; see `run_layers`."""
        return run_layers(self._stacks, self.config.types, step, carry, xs, **options)


_named = jax.checkpoint_policies.save_only_these_names(*api.CHECKPOINT_NAMES)


def _keeps_attention(primitive, *avals, **params) -> Any:
    """Policy of ``jax.checkpoint`` that saves the residuals of attention; cuDNN's have no names."""
    return _named(primitive, *avals, **params) or primitive.name == CUDNN_FORWARD
