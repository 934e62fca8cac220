"""What the attention layers share: projections, RoPE, positions, padding, and calls with a cache.

Shapes: B batch, T tokens of a sequence, C features of the residual stream, N query heads, K
key/value heads, D head width, n tokens of a call with a cache.
"""

from collections.abc import Callable
from typing import Any, ClassVar, overload

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from flax.typing import Dtype, Initializer, PrecisionLike
from jax.ad_checkpoint import checkpoint_name as named
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from fsa_jax import api
from fsa_jax.arguments import checks
from fsa_jax.arguments.types import AnyArray, DenseImplementation, IntegerList
from fsa_jax.inference.kv_cache import Chunk, KVCache
from fsa_jax.nn.rms_norm import RMSNorm
from fsa_jax.ops import partition
from fsa_jax.ops.dispatch import check_name
from fsa_jax.partitioning import AxisNames, partitioned
from fsa_jax.rope import RoPE, RotaryEmbedding
from fsa_jax.semantics.segments import SegmentInfo, cut, describe_segments
from fsa_jax.sequence_parallel import zigzag

ROPE = RoPE()
KERNEL_INIT = initializers.lecun_normal()
BIAS_INIT = initializers.zeros_init()

#: Names of the outputs of the projections, for the policies of ``jax.checkpoint``.
PROJECTION_NAMES = ("query_proj", "key_proj", "value_proj", "out_proj")


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Raises ValueError unless the query heads divide into groups."""
    checks.size("num_heads", num_heads)
    if checks.size("num_kv_heads", num_kv_heads, least=0) < 1 or num_heads % num_kv_heads:
        raise ValueError(
            "num_heads must be a positive multiple of num_kv_heads, got "
            f"num_heads={num_heads} and num_kv_heads={num_kv_heads}"
        )


def layer_call(
    layer: Any,
    sequence_axis: str | None,
    x: jax.Array,
    *others,
    name: str = "x",
    method: str = "call_part",
) -> jax.Array:
    """Returns `layer.call_part(x, *others)`, even where x is sharded over Explicit mesh axes.

    Args:
      layer: a layer or model, whose `method` returns [B, T, C].
      sequence_axis: mesh axis that may split the tokens.
      x: [B, T] or [B, T, C].
      *others: further arrays, or None.
      name: name of `x`, for messages.
      method: name of a method to call instead of `call_part`.
    """
    graphdef, state = nnx.split(layer)
    mesh = partition.explicit_mesh((state, x, others))
    if mesh is None:
        return getattr(layer, method)(x, *others)
    rows, tokens = (*partition.explicit_spec(x), None, None)[:2]
    partition.places(
        {name: "b t"}, {name: (rows, tokens)}, {name: x.shape[:2]}, dict(mesh.shape), sequence_axis
    )

    def call(given):
        state, arrays = given
        return getattr(nnx.merge(graphdef, state), method)(*arrays)

    return partition.on_auto_axes(
        call, mesh, PartitionSpec(rows, tokens, None), (state, (x, *others))
    )


def without_padding(x: jax.Array, segment_ids: Any) -> jax.Array:
    """Sets the array [B, T, ...] to 0 at padding, even where it is sharded over Explicit axes."""
    if segment_ids is None:
        return x

    def call(given):
        x, segment_ids = given
        return checks.segments(x, segment_ids, True).without_padding(x)

    given = (x, segment_ids)
    mesh = partition.explicit_mesh(given)
    if mesh is None:
        return call(given)
    return partition.on_auto_axes(call, mesh, partition.explicit_spec(x), given)


def linear(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    names: tuple[tuple[str | None, ...], tuple[str | None, ...]],
    *,
    axis_names: AxisNames | None,
    **options: Any,
) -> nnx.LinearGeneral:
    """A projection of the last axes; `names` are logical names of its input and output axes."""
    return nnx.LinearGeneral(
        inputs,
        outputs,
        axis=tuple(range(-len(inputs), 0)),
        kernel_metadata=partitioned(*names[0], *names[1], axis_names=axis_names),
        bias_metadata=partitioned(*names[1], axis_names=axis_names),
        **options,
    )


class AttentionLayer(nnx.Module):
    """Base class of the attention layers.

    A layer defines `attend_rows`, the attention of a call without a cache; `init_cache`; and
    `extend`, the call with a cache. ``NativeSparseAttention`` describes the arguments.
    """

    #: The implementations of this layer besides those that every layer has.
    other_implementations: ClassVar[tuple[str, ...]] = ()

    @property
    def stride(self) -> int:
        """With a `sequence_axis`, the tokens of each chunk must be a multiple of this number."""
        return 1

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        rope: RotaryEmbedding | None = ROPE,
        scale: float | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        use_bias: bool = False,
        qkv_bias: bool | None = None,
        out_bias: bool | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        dot_general: Callable[..., jax.Array] | None = None,
        kernel_init: Initializer = KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = BIAS_INIT,
        axis_names: AxisNames | None = None,
        padding_id: int = 0,
        checkpoint_name: str | None = None,
        implementation: DenseImplementation | None = None,
        sequence_axis: str | None = None,
        _kv_branches: tuple[int, ...] = (),
        rngs: nnx.Rngs,
    ):
        check_name(implementation, self.other_implementations)
        self.num_heads, self.in_features = num_heads, in_features
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.out_features = in_features if out_features is None else out_features
        self.head_dim = self._check_sizes(head_dim)
        checks.scale(scale, self.head_dim)
        self.rope = _check_rope(rope, self.head_dim)
        self.scale = scale
        self.padding_id = checks.padding(padding_id)
        self.checkpoint_name = checks.checkpoint_name(checkpoint_name)
        self.implementation: Any = implementation
        self.sequence_axis = None if sequence_axis is None else checks.axis_name(sequence_axis)

        every = checks.flag("use_bias", use_bias)
        qkv_bias = every if qkv_bias is None else checks.flag("qkv_bias", qkv_bias)
        out_bias = every if out_bias is None else checks.flag("out_bias", out_bias)
        if dot_general is not None and not callable(dot_general):
            raise ValueError(
                "dot_general must be None or a function like jax.lax.dot_general, got "
                f"{checks.short(dot_general)}"
            )
        options: dict[str, Any] = dict(
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            dot_general=dot_general,
            bias_init=bias_init,
            axis_names=axis_names,
            rngs=rngs,
        )
        features, heads = (in_features,), (num_heads, self.head_dim)
        kv_heads = (*_kv_branches, self.num_kv_heads, self.head_dim)
        inner = options | {"use_bias": qkv_bias, "kernel_init": kernel_init}
        names = ("embed",), ("heads", "head_dim")
        kv_names = ("embed",), (*(None for _ in _kv_branches), "kv_heads", "head_dim")
        self.query = linear(features, heads, names, **inner)
        self.key = linear(features, kv_heads, kv_names, **inner)
        self.value = linear(features, kv_heads, kv_names, **inner)
        outer = options | {"use_bias": out_bias, "kernel_init": out_kernel_init or kernel_init}
        self.out = linear(heads, (self.out_features,), (names[1], names[0]), **outer)

        epsilon = checks.number("norm_eps", norm_eps, "in (0, 1)", lambda x: 0 < x < 1)
        self.query_norm: RMSNorm | None = nnx.data(None)
        self.key_norm: RMSNorm | None = nnx.data(None)
        if checks.flag("qk_norm", qk_norm):

            def norm() -> RMSNorm:
                return RMSNorm(
                    self.head_dim,
                    epsilon=epsilon,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    scale_metadata=partitioned(None),
                    rngs=rngs,
                )

            self.query_norm, self.key_norm = norm(), norm()

    def _check_sizes(self, head_dim: int | None) -> int:
        """Checks the sizes of the layer, and returns the head width."""
        check_heads(self.num_heads, self.num_kv_heads)
        checks.size("in_features", self.in_features)
        checks.size("out_features", self.out_features)
        if head_dim is not None:
            return checks.size("head_dim", head_dim)
        if self.in_features % self.num_heads:
            raise ValueError(
                "in_features must be a multiple of num_heads where head_dim is not given, got "
                f"in_features={self.in_features} and num_heads={self.num_heads}"
            )
        return self.in_features // self.num_heads

    @overload
    def __call__(
        self,
        x: Float[AnyArray, "B T C"],
        segment_ids: Integer[AnyArray, "B T"] | IntegerList | None = None,
        positions: Integer[AnyArray, "B T"] | IntegerList | None = None,
    ) -> Float[Array, "B T O"]: ...

    @overload
    def __call__[Cache: KVCache](
        self,
        x: Float[AnyArray, "B n C"],
        *,
        cache: Cache,
        num_tokens: Integer[AnyArray, " B"] | IntegerList | None = None,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B n O"], Cache]: ...

    def __call__(
        self, x, segment_ids=None, positions=None, *, cache=None, num_tokens=None, fresh=False
    ) -> Any:
        """Applies the layer to whole sequences, or to the next tokens of sequences in a cache.

        Args:
          x: [B, T, C], floating.
          segment_ids: integers [B, T]; a run of equal ids is one document, and `padding_id` is
            padding. None: every sequence is one document.
          positions: integers [B, T], for RoPE; None: counted from each document's start.
          cache: the result of `init_cache` or of an earlier call. Row b of `x` then continues
            sequence b, which determines the positions; a call may add any number of tokens.
          num_tokens: with a cache, integers [B], how many tokens of each row of `x` are not
            padding; None: all.
          fresh: with a cache, whether the tokens are the first of their sequences. The earlier
            contents of the sequences are dropped, and the call runs the computation of training,
            with its kernels, which is the fast way to process a long prompt.

        Returns:
          [B, T, out_features] in the dtype of the computation; 0 at padding. With a cache, also the
          cache with the new tokens; the old cache may be donated by
          ``jax.jit(..., donate_argnums=)``.

        Raises:
          ValueError: a shape or dtype does not fit; the cache belongs to another layer; or, outside
            jit, a sequence has no room or is lost. Inside jit, tokens without room are not stored
            and give 0, and sequences that are lost (see ``KVCache``) give NaN.
          NotImplementedError: the layer's implementation or sequence_axis cannot serve a cache.
        """
        fresh = checks.flag("fresh", fresh)
        if cache is None:
            checks.absent("without a cache", num_tokens=num_tokens, fresh=fresh or None)
            arrays = self._arrays(x, segment_ids, positions)
            return layer_call(self, self.sequence_axis, *arrays)
        checks.absent("with a cache", segment_ids=segment_ids, positions=positions)
        x = self._check_features(checks.floating("x", x, "B T C"))
        self.check_cache(cache, x.shape[0])
        cache = cache.emptied() if fresh else cache
        chunk = cache.place(x.shape[1], num_tokens)
        y, cache = self.extend(cut(x, chunk.valid), cache, chunk, 0, fresh)
        return cache.marked(y), cache.advance(chunk)

    def call_part(self, x, segment_ids, positions) -> jax.Array:
        """The call without a cache, where no mesh axis is Explicit."""
        segments, positions = self._describe(x, segment_ids, positions)
        heads = self.attend_rows(segments.without_padding(x), segment_ids, positions)
        return self._project_out(heads, segments)

    def attend_rows(self, x, segment_ids, positions) -> jax.Array:
        """The attention output [B, T, N, D] of a call without a cache; `x` is 0 at padding."""
        raise NotImplementedError

    def _causal_rows(self, x, segment_ids, positions, window_size: int | None = None) -> jax.Array:
        """Dense causal attention [B, T, N, D] of a call without a cache; `x` is 0 at padding."""
        query, key = self._query(x, positions), self._turn(self._key(x), positions)
        return self._causal(query, key, self._value(x), segment_ids, window_size)

    def _causal(
        self, query, key, value, segment_ids: jax.Array | None, window_size: int | None
    ) -> jax.Array:
        """``fsa_jax.causal_attention`` with the options of the layer."""
        return api.causal_attention(
            query,
            key,
            value,
            window_size=window_size,
            segment_ids=segment_ids,
            scale=self.scale,
            implementation=self.implementation,
            sequence_axis=self.sequence_axis,
            checkpoint_name=self.checkpoint_name,
        )

    def init_cache(
        self,
        batch: int,
        capacity: int,
        *,
        dtype: Any = None,
        num_pages: int | None = None,
        layers: int = 1,
    ) -> KVCache:
        """An empty cache of this layer; see `KVCache.init`."""
        raise NotImplementedError

    def extend(
        self, x: jax.Array, cache: Any, chunk: Chunk, layer: int | jax.Array, fresh: bool
    ) -> tuple[jax.Array, Any]:
        """The outputs [B, n, C] of a chunk, and the cache with the chunk appended in that layer.

        Args:
          x: [B, n, C], 0 at padding.
          cache: the cache of this layer and others like it, with the lengths before the chunk.
          chunk: positions of the tokens.
          layer: number of the layer.
          fresh: whether the sequences are empty.
        """
        raise NotImplementedError

    def check_cache(self, cache: KVCache, batch: int, layers: int = 1) -> None:
        """Raises ValueError unless the cache fits this layer and has `batch` sequences."""
        if self.sequence_axis is not None:
            raise NotImplementedError(
                f"sequence_axis={self.sequence_axis!r} cannot serve a cache: it is for training; a "
                "layer without it takes the same parameters"
            )
        if not isinstance(cache, KVCache):
            raise ValueError(f"cache must be what init_cache gives, got {type(cache).__name__}")
        # The dtype is not compared here but with the keys, whose dtype depends on x and parameters.
        own = jax.eval_shape(lambda: self.init_cache(batch, 1, layers=layers))
        wanted, got = own.traits(), cache.traits()
        for name, value in wanted.items():
            if got.get(name) != value:
                raise ValueError(f"cache must have {name}={value}, got {name}={got.get(name)}")

    def _dtype_of_cache(self, dtype: Any) -> Any:
        """The dtype of a new cache: `dtype` if the keys can have it; None: that of the layer."""
        own = jax.dtypes.canonicalize_dtype(self.query.dtype or self.query.param_dtype)
        if dtype is None:
            return own
        dtype = checks.float_dtype("dtype", dtype)
        # If the layer sets no dtype, an x of a wider dtype than the parameters determines it.
        with jax.numpy_dtype_promotion("standard"):
            wider = self.query.dtype is None and jnp.promote_types(own, dtype) == dtype
        if dtype != own and not wider:
            rule = "" if self.query.dtype else " or a wider one"
            raise ValueError(f"dtype must be that of the layer's keys, {own}{rule}, got {dtype}")
        return dtype

    def _check_same_dtype(self, key: jax.Array, cache: KVCache) -> None:
        if key.dtype != cache.key.dtype:
            raise ValueError(
                f"cache must have the dtype of the layer's keys, got {cache.key.dtype} and "
                f"{key.dtype}"
            )

    def _check_features(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have in_features={self.in_features} features, got {x.shape}")
        return x

    def _arrays(self, x, segment_ids, positions) -> Any:
        """Checks the arguments of a call without a cache, and returns them as arrays or None."""
        x = self._check_features(checks.floating("x", x, "B T C"))
        segment_ids = checks.ids(segment_ids, x.shape[:2], True, self.padding_id)
        if positions is not None:
            positions = checks.integers("positions", positions, "B T")
            checks.same_axes("B T", x=x, positions=positions)
        return x, segment_ids, positions

    def _describe(
        self, x: jax.Array, segment_ids: jax.Array | None, positions: jax.Array | None
    ) -> tuple[SegmentInfo, jax.Array]:
        """The documents of each sequence and the position of each token; see `_arrays`."""
        segments = describe_segments(segment_ids, *x.shape[:2])
        if positions is not None:
            return segments, positions
        if self.sequence_axis is None:
            return segments, segments.position
        checks.sequence(self.sequence_axis, True, x.shape[1], self.stride)
        return segments, zigzag.positions(segment_ids, x.shape[:2], self.sequence_axis)

    def _query(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """The queries [B, T, N, D] after normalisation and RoPE."""
        query = named(self.query(x), "query_proj")
        query = query if self.query_norm is None else self.query_norm(query)
        return self._turn(query, positions)

    def _key(self, x: jax.Array) -> jax.Array:
        """The keys [B, T, ..., K, D] after normalisation, before RoPE."""
        key = named(self.key(x), "key_proj")
        return key if self.key_norm is None else self.key_norm(key)

    def _value(self, x: jax.Array) -> jax.Array:
        return named(self.value(x), "value_proj")

    def _turn(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return x if self.rope is None else self.rope.apply(x, positions)

    def _project_out(self, heads: jax.Array, segments: SegmentInfo | Chunk) -> jax.Array:
        """Applies the output projection; the result at padding is 0 even with a bias."""
        return cut(named(self.out(heads), "out_proj"), segments.valid)


def _check_rope(rope: RotaryEmbedding | None, head_dim: int) -> RotaryEmbedding | None:
    if not isinstance(rope, RotaryEmbedding | None):
        raise ValueError(
            "rope must be None or a RotaryEmbedding, an object with the methods `apply` and "
            f"`check`, got {checks.short(rope)}"
        )
    if rope is not None:
        rope.check(head_dim)
    return rope
