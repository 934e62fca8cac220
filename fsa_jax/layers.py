"""Attention layers for Flax: native sparse attention and its dense counterpart.

Both are ``flax.nnx`` modules with the constructor names of ``nnx.MultiHeadAttention`` and swap for
one another. In linen code wrap them: ``nnx.bridge.to_linen(NativeSparseAttention, num_heads=8,
in_features=512)``.

Every parameter carries the logical names of its axes (see ``fsa_jax.partitioning``). They do
nothing until ``sharding_rules`` binds them to the axes of a mesh.

Shapes: B batch, T tokens in a row, C features of the residual stream, N query heads, K key/value
heads, D head width, M compressed windows, S selected blocks.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from flax.typing import Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Float, Int

from fsa_jax import api, checks, sharding, stripes
from fsa_jax.compression import METHODS
from fsa_jax.compressor import Compressor
from fsa_jax.config import NSAConfig
from fsa_jax.partitioning import partitioned
from fsa_jax.rope import RoPE
from fsa_jax.segments import Rows, describe_windows

FULL_IMPLEMENTATIONS = ("xla", "cudnn", None)
"""Implementations of dense attention, as ``jax.nn.dot_product_attention`` names them."""

GATES = ("head", "token")
"""One gate triple per query head, as the NSA paper, or one per token, as FSA."""

_ROPE = RoPE()
_CONFIG = NSAConfig()
_KERNEL_INIT = initializers.lecun_normal()
_BIAS_INIT = initializers.zeros_init()
_POSITIONS_INIT = initializers.normal(0.02)


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Raises ValueError unless the query heads divide into groups."""
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            "num_heads must be a positive multiple of num_kv_heads, got "
            f"num_heads={num_heads} and num_kv_heads={num_kv_heads}"
        )


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What the branches read: a query, and a key and a value for each branch."""

    query: Float[Array, "B T N D"]
    compressed: tuple[Float[Array, "B M K D"], Float[Array, "B M K D"]]
    selected: tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]
    window: tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]


def _linear(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    names: tuple[tuple[str | None, ...], tuple[str | None, ...]],
    **options: Any,
) -> nnx.LinearGeneral:
    """A projection of the last axes, with the logical names of its input and output axes."""
    return nnx.LinearGeneral(
        inputs,
        outputs,
        axis=tuple(range(-len(inputs), 0)),
        kernel_metadata=partitioned(*names[0], *names[1]),
        bias_metadata=partitioned(*names[1]),
        **options,
    )


class _Attention(nnx.Module):
    """What the two layers share: projections, RoPE, positions and padding."""

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None,
        head_dim: int | None,
        out_features: int | None,
        kv_branches: tuple[int, ...],
        rope: RoPE | None,
        scale: float | None,
        implementation: Any,
        out_kernel_init: Initializer | None,
        options: dict[str, Any],
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(num_heads, num_kv_heads)
        if head_dim is None:
            if in_features % num_heads:
                raise ValueError(
                    "in_features must be a multiple of num_heads where head_dim is not given, got "
                    f"in_features={in_features} and num_heads={num_heads}"
                )
            head_dim = in_features // num_heads
        if rope is not None:
            rope.inverse_frequencies(head_dim)  # raises for an odd head_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.in_features = in_features
        self.out_features = in_features if out_features is None else out_features
        self.rope = rope
        self.scale = scale
        self.implementation = implementation

        features, heads = (in_features,), (num_heads, head_dim)
        kv_heads = (*kv_branches, num_kv_heads, head_dim)
        head_names = ("heads", "head_dim")
        kv_names = (*(None for _ in kv_branches), "kv_heads", "head_dim")
        self.query = _linear(features, heads, (("embed",), head_names), **options)
        self.key = _linear(features, kv_heads, (("embed",), kv_names), **options)
        self.value = _linear(features, kv_heads, (("embed",), kv_names), **options)
        out_options = options | {"kernel_init": out_kernel_init or options["kernel_init"]}
        self.out = _linear(heads, (self.out_features,), (head_names, ("embed",)), **out_options)

    def _describe(
        self, x: jax.Array, segment_ids: jax.Array | None, positions: jax.Array | None
    ) -> tuple[Rows, jax.Array]:
        """Checks the call; gives the documents of each row and every token's position."""
        x = checks.floating("x", x, "B T C")
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have in_features={self.in_features} features, got {x.shape}")
        rows = checks.rows(x, segment_ids, True)
        if positions is not None:
            checks.integers("positions", positions, "B T")
            checks.same_axes("B T", x=x, positions=positions)
        return rows, rows.position if positions is None else positions

    def _turn(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return x if self.rope is None else self.rope.apply(x, positions)

    def _project_out(self, heads: jax.Array, rows: Rows) -> jax.Array:
        """The output projection; padding gets 0 even where there is a bias."""
        return jnp.where(rows.valid[..., None], self.out(heads), 0)


class NativeSparseAttention(_Attention):
    """Causal self-attention by native sparse attention (NSA), packed rows included.

    With q, k, v projections of x, phi the compression and R the rotary embedding:

        ck, cv = R(phi_k(k + table)), phi_v(v)
        o = g_cmp * compressed(R q, ck, cv) + g_slc * selected(R q, R k, v) + g_win * window(R q,
            R k, v),   g = sigmoid(x W_g),   y = o W_o

    Keys are compressed before RoPE; a compressed key is turned by the position of its window's
    first token. Names and shapes of the projections are those of ``nnx.MultiHeadAttention``.

    Args:
      num_heads: query heads N.
      in_features: features C of the input.
      num_kv_heads: key/value heads K, a divisor of N; None: N.
      head_dim: width D of a head; None: ``in_features // num_heads``.
      out_features: features of the output; None: ``in_features``.
      config: sizes of the sparse attention.
      compression: phi, ``"linear"``, ``"weighted"``, ``"mean"`` or ``"mlp"`` (hidden width 2 D).
      gate: ``"head"``, one gate triple per query head, or ``"token"``, one per token.
      kv_per_branch: one key and value projection per branch, as in the NSA paper, instead of one
        for all.
      rope: rotary embedding of queries and keys, or None.
      scale: factor of the logits; None: ``head_dim ** -0.5``.
      use_bias: whether the projections (and the gates) have a bias.
      dtype: dtype of the computation; None: inferred from input and parameters.
      param_dtype: dtype in which the parameters are stored.
      precision: ``jax.lax.Precision`` of the projections.
      kernel_init: initialiser of the projections and of the gates.
      out_kernel_init: initialiser of the output projection; None: `kernel_init`.
      bias_init: initialiser of the biases.
      compression_init: initialiser of phi's weights; None: the mean of the window's tokens for
        ``linear`` and ``weighted``, LeCun normal for ``mlp``.
      positions_init: initialiser of the intra-block positional table [K, l, D].
      implementation: passed on to the functions of fsa_jax; None: the best that fits.
      sequence_axis: mesh axis that splits the tokens of each row, see
        ``fsa_jax.native_sparse_attention``: all arrays of a call are then in stripe order.
      rngs: random keys.

    Raises:
      ValueError: sizes do not divide, or a choice is unknown.

    Example:
      >>> layer = NativeSparseAttention(4, 64, num_kv_heads=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 128, 64))).shape
      (1, 128, 64)

    References:
      NSA, arXiv 2502.11089, equations 5 to 12; gates per token and shared keys as in FSA,
      arXiv 2508.18224.
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
        compression: Literal["linear", "weighted", "mean", "mlp"] = "linear",
        gate: Literal["head", "token"] = "head",
        kv_per_branch: bool = False,
        rope: RoPE | None = _ROPE,
        scale: float | None = None,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = _KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = _BIAS_INIT,
        compression_init: Initializer | None = None,
        positions_init: Initializer = _POSITIONS_INIT,
        implementation: str | None = None,
        sequence_axis: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_choice("compression", compression, METHODS)
        check_choice("gate", gate, GATES)
        options = dict(
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        super().__init__(
            num_heads,
            in_features,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            out_features=out_features,
            kv_branches=(3,) if kv_per_branch else (),
            rope=rope,
            scale=scale,
            implementation=implementation,
            out_kernel_init=out_kernel_init,
            options=options,
        )
        self.config = config
        self.kv_per_branch = kv_per_branch
        self.sequence_axis = sequence_axis
        gates = (num_heads, 3) if gate == "head" else (1, 3)
        gate_names = ("heads" if gate == "head" else None, None)
        self.gate = _linear((in_features,), gates, (("embed",), gate_names), **options)

        def compressor(positions_init: Initializer | None) -> Compressor:
            return Compressor(
                self.num_kv_heads,
                self.head_dim,
                config=config,
                method=compression,
                param_dtype=param_dtype,
                weights_init=compression_init,
                positions_init=positions_init,
                rngs=rngs,
            )

        self.compress_key = compressor(positions_init)
        self.compress_value = compressor(None)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T O"]:
        """Applies the layer.

        Args:
          x: [B, T, C], floating.
          segment_ids: int32 [B, T], equal ids in a run are one document, 0 is padding; None: every
            row is one document.
          positions: int32 [B, T], positions for RoPE; None: counted from each document's start.

        Returns:
          [B, T, out_features] in the dtype of the computation; 0 at padding.

        Raises:
          ValueError: a shape or dtype does not fit.
        """
        return sharding.layer_call(self, self.sequence_axis, x, segment_ids, positions)

    def apply_part(self, x, segment_ids, positions) -> jax.Array:
        rows, positions = self._describe(x, segment_ids, positions)
        inputs = self._inputs(x, rows, segment_ids, positions)
        gates = jax.nn.sigmoid(self.gate(x))
        shared = self._shared(segment_ids)
        if self.sequence_axis is not None:
            sources = (inputs.selected, inputs.window)[: 2 if self.kv_per_branch else 1]
            branches = api.attention_branches(
                inputs.query,
                inputs.compressed,
                sources,
                config=self.config,
                sequence_axis=self.sequence_axis,
                **shared,
            )
            return self._project_out(api.combine_branches(gates, *branches), rows)
        if not self.kv_per_branch:
            heads = api.native_sparse_attention(
                inputs.query,
                *inputs.selected,
                *inputs.compressed,
                gates,
                config=self.config,
                **shared,
            )
            return self._project_out(heads, rows)
        compressed, block_indices = self._select(inputs, segment_ids)
        selected = api.selected_attention(
            inputs.query,
            *inputs.selected,
            block_indices,
            block_size=self.config.block_size,
            **shared,
        )
        window = api.sliding_window_attention(
            inputs.query, *inputs.window, window_size=self.config.window_size, **shared
        )
        return self._project_out(api.combine_branches(gates, compressed, selected, window), rows)

    def selected_blocks(
        self,
        x: Float[Array, "B T C"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Int[Array, "B T K topk"]:
        """The blocks that each query selects: int32 [B, T, K, topk], ascending, -1 at the tail.

        Block numbers count from the start of the query's own document. Arguments as in a call.

        Raises:
          ValueError: the layer has a `sequence_axis`; one without it takes the same parameters.
        """
        if self.sequence_axis is not None:
            raise ValueError(
                "selected_blocks needs a layer without sequence_axis, got "
                f"sequence_axis={self.sequence_axis!r}"
            )
        rows, positions = self._describe(x, segment_ids, positions)
        return self._select(self._inputs(x, rows, segment_ids, positions), segment_ids)[1]

    def _inputs(
        self,
        x: jax.Array,
        rows: Rows,
        segment_ids: jax.Array | None,
        positions: jax.Array,
    ) -> _Inputs:
        query, key, value = self._turn(self.query(x), positions), self.key(x), self.value(x)
        if self.kv_per_branch:
            keys, values = (jnp.unstack(array, axis=2) for array in (key, value))
        else:
            keys, values = (key,) * 3, (value,) * 3
        axis = self.sequence_axis
        compressed_key = self.compress_key(keys[0], segment_ids, axis)
        selected_key = self._turn(keys[1], positions)
        window_key = self._turn(keys[2], positions) if self.kv_per_branch else selected_key
        return _Inputs(
            query=query,
            compressed=(
                self._turn(compressed_key, self._window_positions(rows, segment_ids, positions)),
                self.compress_value(values[0], segment_ids, axis),
            ),
            selected=(selected_key, values[1]),
            window=(window_key, values[2]),
        )

    def _describe(self, x, segment_ids, positions) -> tuple[Rows, jax.Array]:
        rows, counted = super()._describe(x, segment_ids, positions)
        if self.sequence_axis is None or positions is not None:
            return rows, counted
        checks.sequence(self.sequence_axis, True, x.shape[1], self.config.kernel_stride)
        return rows, stripes.positions(segment_ids, x.shape[:2], self.sequence_axis)

    def _window_positions(self, rows: Rows, segment_ids, positions: jax.Array) -> jax.Array:
        """The position of each window's first token, int32 [B, M]."""
        sizes = (self.config.kernel_size, self.config.kernel_stride)
        if self.sequence_axis is not None:
            return stripes.window_positions(positions, segment_ids, *sizes, self.sequence_axis)
        read = jax.vmap(lambda row, start: row.at[start].get(mode="fill", fill_value=0))
        return read(positions, describe_windows(rows, *sizes).start)

    def _shared(self, segment_ids: jax.Array | None) -> dict[str, Any]:
        """Arguments that every attention function takes."""
        return {
            "scale": self.scale,
            "segment_ids": segment_ids,
            "implementation": self.implementation,
        }

    def _select(
        self, inputs: _Inputs, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The compressed branch and the blocks that it selects."""
        shared = self._shared(segment_ids)
        out, lse = api.compressed_attention(
            inputs.query,
            *inputs.compressed,
            kernel_size=self.config.kernel_size,
            kernel_stride=self.config.kernel_stride,
            return_residuals=True,
            **shared,
        )
        return out, api.select_blocks(
            inputs.query, inputs.compressed[0], lse, config=self.config, **shared
        )


class FullAttention(_Attention):
    """Dense causal self-attention over the same projections: what NSA is compared with.

    With q, k, v projections of x and R the rotary embedding, over the tokens of the own document:
    y = softmax(scale * R q (R k)^T) v W_o. Memory is quadratic in T where segment ids are given.

    Args:
      num_heads, in_features, num_kv_heads, head_dim, out_features, rope, scale, use_bias, dtype,
        param_dtype, precision, kernel_init, out_kernel_init, bias_init, rngs: as in
        ``NativeSparseAttention``.
      implementation: ``"xla"``, ``"cudnn"`` or None, as in ``jax.nn.dot_product_attention``.

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
        implementation: Literal["xla", "cudnn"] | None = None,
        rngs: nnx.Rngs,
    ):
        check_choice("implementation", implementation, FULL_IMPLEMENTATIONS)
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

    def __call__(
        self,
        x: Float[Array, "B T C"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T O"]:
        """Applies the layer; arguments and result as in ``NativeSparseAttention``."""
        return sharding.layer_call(self, None, x, segment_ids, positions)

    def apply_part(self, x, segment_ids, positions) -> jax.Array:
        rows, positions = self._describe(x, segment_ids, positions)
        mask = None
        if segment_ids is not None:
            # a run of equal ids is a document, so documents differ by where they start
            mask = (rows.start[:, :, None] == rows.start[:, None, :])[:, None]
        query, key = self._turn(self.query(x), positions), self._turn(self.key(x), positions)
        # jax's function promotes bfloat16 implicitly, which strict promotion would forbid
        with jax.numpy_dtype_promotion("standard"):
            heads = jax.nn.dot_product_attention(
                query,
                key,
                self.value(x),
                mask=mask,
                scale=self.scale,
                is_causal=True,
                implementation=self.implementation,
            )
        return self._project_out(heads, rows)
