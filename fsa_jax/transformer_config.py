"""The configuration of the transformer, in plain values that can be stored as JSON."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from fsa_jax.arguments import checks
from fsa_jax.arguments.types import CompressionMethod, DenseImplementation, LayerType
from fsa_jax.config import NSAConfig
from fsa_jax.layers import GATES
from fsa_jax.nn.base import check_heads
from fsa_jax.ops.compression import METHODS
from fsa_jax.ops.dispatch import CUDNN, check_name
from fsa_jax.rope import RoPE
from fsa_jax.rope_scaling import RoPEScaling, scaling_from_dict

LAYER_TYPES: tuple[LayerType, ...] = get_args(LayerType)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def with_sizes(config: "TransformerConfig", sizes: dict[str, int]) -> "TransformerConfig":
    """The configuration with these sizes; those that depend on them are derived if not given."""
    derived = dict.fromkeys(_DERIVATIONS.keys() - sizes.keys())
    changed = {"embed_dim", "num_heads"} & sizes.keys()
    return dataclasses.replace(config, **sizes, **(derived if changed else {}))


def _derive_kv_heads(config: "TransformerConfig") -> int:
    most = max(2, config.num_heads // 4)
    return max(k for k in range(1, most + 1) if config.num_heads % k == 0)


def _derive_head_dim(config: "TransformerConfig") -> int:
    if config.embed_dim % config.num_heads:
        raise ValueError(
            "embed_dim must be a multiple of num_heads where head_dim is not given, got "
            f"embed_dim={config.embed_dim} and num_heads={config.num_heads}"
        )
    return config.embed_dim // config.num_heads


_DERIVATIONS: dict[str, Callable[["TransformerConfig"], int]] = {
    "num_kv_heads": _derive_kv_heads,
    "head_dim": _derive_head_dim,
    "mlp_dim": lambda config: 3 * config.embed_dim,
}


SIZES = ("embed_dim", "num_heads", *_DERIVATIONS)
#: Fields that are either True or False.
_FLAGS = (
    *("gate_bias", "kv_per_branch", "compress_after_rope", "qk_norm", "qkv_bias", "out_bias"),
    *("mlp_bias", "tie_embeddings", "remat"),
)
#: Default of a derived size, which the constructor replaces by an integer.
_DERIVED: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The configuration of a ``Transformer``, in plain values that can be stored as JSON.

    The constructor derives sizes that are not given from the others, and stores them as numbers:
    ``dataclasses.replace`` keeps them, unless it sets them to None.

    Attributes:
      vocab_size: vocabulary size V. `fsa-jax train` only has 257.
      num_layers: number of layers L.
      embed_dim: width C of the residual stream.
      num_heads: query heads per layer.
      num_kv_heads: key/value heads per layer, a divisor of `num_heads`; None: the largest divisor
        that is at most ``max(2, num_heads // 4)``.
      head_dim: width of a head, even; None: ``embed_dim // num_heads``.
      mlp_dim: hidden width of the SwiGLU; None: ``3 * embed_dim``.
      attention: attention of all layers, ``"nsa"``, ``"full"`` or ``"window"``. With `layer_types`
        of several types, leave it out: the field then reads ``"hybrid"``.
      layer_types: attention of each layer, for layers of several types; None: `attention`.
      sliding_window: visible keys of layers of type ``"window"``; None: the `window_size` of `nsa`.
      nsa: sizes of the sparse attention; only layers of type ``"nsa"`` have it, and `compression`,
        `gate`, `gate_bias`, `kv_per_branch` and `compress_after_rope`.
      compression: how a window of keys or values becomes one: ``"linear"``, ``"weighted"``,
        ``"mean"`` or ``"mlp"``.
      gate: one gate triple for each query head, or one for each token.
      gate_bias: whether the gates have a bias.
      gate_bias_init: initial bias of the gates: one number, or three in the order compressed,
        selected, window.
      kv_per_branch: whether each branch has keys and values of its own.
      compress_after_rope: whether keys are compressed after RoPE, rather than before.
      qk_norm: whether each head of the queries and keys is normalised (RMSNorm) before RoPE.
      qkv_bias: whether the projections of queries, keys and values have a bias.
      out_bias: whether the output projection of attention has a bias.
      mlp_bias: whether the projections of the feed-forward have a bias.
      rope_theta: base of the RoPE wavelengths.
      rope_scaling: scaling of the RoPE frequencies for longer contexts, ``LinearScaling``,
        ``Llama3Scaling`` or ``YarnScaling``; None: none. On the command line it is JSON, for
        example '{"rope_type": "linear", "factor": 2}'.
      rope_interleaved: whether RoPE pairs neighbouring channels; see ``RoPE``.
      tie_embeddings: whether the output head is the transposed embedding.
      remat: whether the backward pass recomputes the layers, except their attention.
      dropout_rate: dropout rate of each residual branch's output in training, in [0, 1).
      norm_eps: epsilon that RMSNorm adds to the mean square.
      padding_id: the segment id that marks padding. `fsa-jax train` only has 0.
      dtype: dtype of the computation.
      param_dtype: dtype in which the parameters are stored.
      implementation: see the attention layers; None: the best available one.
      sequence_axis: mesh axis that splits the tokens, see ``NativeSparseAttention``. In `fsa-jax
        train` the mesh says so, and this must be None.

    Raises:
      ValueError: a value breaks its rule; the message names the field and its value.

    Example:
      >>> config = TransformerConfig(vocab_size=257, num_layers=2, embed_dim=256, num_heads=16)
      >>> config.num_kv_heads, config.head_dim, config.mlp_dim
      (4, 16, 768)
      >>> TransformerConfig.from_dict(config.to_dict()) == config
      True
    """

    vocab_size: int = 257
    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = _DERIVED
    head_dim: int = _DERIVED
    mlp_dim: int = _DERIVED
    attention: Literal[LayerType, "hybrid"] = "nsa"
    layer_types: tuple[LayerType, ...] | None = None
    sliding_window: int | None = None
    nsa: NSAConfig = dataclasses.field(default_factory=NSAConfig)
    compression: CompressionMethod = "linear"
    gate: Literal["head", "token"] = "head"
    gate_bias: bool = False
    gate_bias_init: float | tuple[float, float, float] = 0.0
    kv_per_branch: bool = False
    compress_after_rope: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RoPEScaling | None = None
    rope_interleaved: bool = False
    tie_embeddings: bool = True
    remat: bool = False
    dropout_rate: float = 0.0
    norm_eps: float = 1e-6
    padding_id: int = 0
    dtype: str = "float32"
    param_dtype: str = "float32"
    implementation: DenseImplementation | None = None
    sequence_axis: str | None = None

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads"):
            self._set(name, checks.size(name, getattr(self, name)))
        for name, derive in _DERIVATIONS.items():
            value = getattr(self, name)
            self._set(name, derive(self) if value is None else checks.size(name, value))
        check_heads(self.num_heads, self.num_kv_heads)
        self._check_rope()
        self._check_layer_types()
        checks.config(self.nsa, "nsa")
        if self.sliding_window is not None:
            self._set("sliding_window", checks.size("sliding_window", self.sliding_window))
        checks.choice("compression", self.compression, METHODS)
        checks.choice("gate", self.gate, GATES)
        self._set("gate_bias_init", _gate_bias("gate_bias_init", self.gate_bias_init))
        checks.choice("dtype", self.dtype, DTYPES)
        checks.choice("param_dtype", self.param_dtype, DTYPES)
        if self.sequence_axis is not None:
            checks.axis_name(self.sequence_axis)
        # Only the name is checked: a configuration may be built on a machine that cannot run it.
        check_name(self.implementation, () if "nsa" in self.types else CUDNN)
        for name in _FLAGS:
            self._set(name, checks.flag(name, getattr(self, name)))
        rate = checks.number("dropout_rate", self.dropout_rate, "in [0, 1)", lambda x: 0 <= x < 1)
        self._set("dropout_rate", rate)
        self._set(
            "norm_eps", checks.number("norm_eps", self.norm_eps, "in (0, 1)", lambda x: 0 < x < 1)
        )
        self._set("padding_id", checks.padding(self.padding_id))

    def _check_rope(self) -> None:
        try:
            rope = self.rope
        except ValueError as error:  # starts with the field of RoPE: theta, scaling, interleaved
            raise ValueError(f"rope_{error}") from error
        rope.check(self.head_dim)
        self._set("rope_theta", float(rope.theta))
        self._set("rope_interleaved", rope.interleaved)

    def _check_layer_types(self) -> None:
        """Checks the types of the layers, and stores layers of one type as `attention` alone."""
        if self.layer_types is None:
            checks.choice("attention", self.attention, LAYER_TYPES)
            return
        types = self.layer_types
        if not isinstance(types, list | tuple) or len(types) != self.num_layers:
            raise ValueError(
                f"layer_types must have one type for each of the num_layers={self.num_layers} "
                f"layers, got {checks.short(types)}"
            )
        for index, kind in enumerate(types):
            checks.choice(f"layer_types[{index}]", kind, LAYER_TYPES)
        several = len(set(types)) > 1
        self._set("layer_types", tuple(types) if several else None)
        self._set("attention", "hybrid" if several else types[0])

    @property
    def types(self) -> tuple[LayerType, ...]:
        """The attention of each layer."""
        every: Any = self.attention
        return self.layer_types or (every,) * self.num_layers

    @property
    def rope(self) -> RoPE:
        """The rotary embedding of the model."""
        return RoPE(
            theta=self.rope_theta, scaling=self.rope_scaling, interleaved=self.rope_interleaved
        )

    def _set(self, name: str, value: Any) -> None:
        """Sets a field of this frozen dataclass, to a derived size or to a plain Python value."""
        object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TransformerConfig":
        """The configuration from the dict that `to_dict` made of it.

        Args:
          values: the fields, also after storage as JSON; omitted fields have their defaults.

        Raises:
          ValueError: a key is unknown, or a value breaks its rule.
        """
        _check_keys(cls, values)
        rest = dict(values)
        nsa = rest.pop("nsa", {})
        _check_keys(NSAConfig, nsa)
        for name in ("layer_types", "gate_bias_init"):  # JSON has no tuples
            if isinstance(rest.get(name), list):
                rest[name] = tuple(rest[name])
        if isinstance(scaling := rest.get("rope_scaling"), dict):
            rest["rope_scaling"] = scaling_from_dict(scaling)
        return cls(nsa=NSAConfig(**nsa), **rest)

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold; the inverse of `from_dict`."""
        values = dataclasses.asdict(self)
        if self.rope_scaling is not None:
            values["rope_scaling"] = self.rope_scaling.to_dict()
        return values


def _gate_bias(name: str, value: Any) -> float | tuple[float, ...]:
    """Checks for one number, or three, one for each branch."""
    if not isinstance(value, list | tuple):
        return checks.number(name, value, "one finite number or three", math.isfinite)
    if len(value) != 3:
        raise ValueError(f"{name} must be one finite number or three, got {checks.short(value)}")
    return tuple(
        checks.number(f"{name}[{i}]", x, "finite", math.isfinite) for i, x in enumerate(value)
    )


def _check_keys(cls: type, values: dict[str, Any]) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} must be made of a dict, got {checks.short(values)}")
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}, only {sorted(known)}")
