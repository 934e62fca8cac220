"""The configuration of the transformer, in plain values that can be stored as JSON."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from fsa_jax.arguments import checks
from fsa_jax.arguments.types import CompressionMethod, DenseImplementation
from fsa_jax.config import NSAConfig
from fsa_jax.layers import GATES
from fsa_jax.nn.base import check_heads
from fsa_jax.ops.compression import METHODS
from fsa_jax.ops.dispatch import CUDNN, check_name
from fsa_jax.rope import RoPE

ATTENTIONS = ("nsa", "full")
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
#: Default of a derived size, which the constructor replaces by an integer.
_DERIVED: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The configuration of a ``Transformer``, in plain values that can be stored as JSON.

    The constructor derives sizes that are not given from the others, and stores them as numbers:
    ``dataclasses.replace`` keeps them, unless it sets them to None.

    Attributes:
      vocab_size: vocabulary size V.
      num_layers: number of layers L.
      embed_dim: width C of the residual stream.
      num_heads: query heads per layer.
      num_kv_heads: key/value heads per layer, a divisor of `num_heads`; None: the largest divisor
        that is at most ``max(2, num_heads // 4)``.
      head_dim: width of a head, even; None: ``embed_dim // num_heads``.
      mlp_dim: hidden width of the SwiGLU; None: ``3 * embed_dim``.
      attention: ``"nsa"`` or ``"full"``.
      nsa: sizes of the sparse attention; ``"full"`` ignores them, and `compression`, `gate`
        and `kv_per_branch`.
      compression: how a window of keys or values becomes one: ``"linear"``, ``"weighted"``,
        ``"mean"`` or ``"mlp"``.
      gate: one gate triple for each query head, or one for each token.
      kv_per_branch: whether each branch has keys and values of its own.
      rope_theta: base of the RoPE wavelengths.
      tie_embeddings: whether the output head is the transposed embedding.
      remat: whether the backward pass recomputes the layers, except their attention.
      dropout_rate: dropout rate of each residual branch's output in training, in [0, 1).
      norm_eps: epsilon that RMSNorm adds to the mean square.
      dtype: dtype of the computation.
      param_dtype: dtype in which the parameters are stored.
      implementation: see the attention layers; None: the best available one.
      sequence_axis: mesh axis that splits the tokens, see ``NativeSparseAttention``.

    Raises:
      ValueError: a value breaks its rule; the message names the field and its value.

    Example:
      >>> config = TransformerConfig(vocab_size=257, num_layers=2, embed_dim=256, num_heads=16)
      >>> config.num_kv_heads, config.head_dim, config.mlp_dim
      (4, 16, 768)
      >>> TransformerConfig.from_dict(dataclasses.asdict(config)) == config
      True
    """

    vocab_size: int = 257
    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = _DERIVED
    head_dim: int = _DERIVED
    mlp_dim: int = _DERIVED
    attention: Literal["nsa", "full"] = "nsa"
    nsa: NSAConfig = dataclasses.field(default_factory=NSAConfig)
    compression: CompressionMethod = "linear"
    gate: Literal["head", "token"] = "head"
    kv_per_branch: bool = False
    rope_theta: float = 10000.0
    tie_embeddings: bool = True
    remat: bool = False
    dropout_rate: float = 0.0
    norm_eps: float = 1e-6
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
        rule = "a finite number above 0"
        theta = checks.number("rope_theta", self.rope_theta, rule, lambda x: 0 < x < math.inf)
        self._set("rope_theta", theta)
        RoPE(theta=theta).inverse_frequencies(self.head_dim)
        checks.choice("attention", self.attention, ATTENTIONS)
        checks.config(self.nsa, "nsa")
        checks.choice("compression", self.compression, METHODS)
        checks.choice("gate", self.gate, GATES)
        checks.choice("dtype", self.dtype, DTYPES)
        checks.choice("param_dtype", self.param_dtype, DTYPES)
        if self.sequence_axis is not None:
            checks.axis_name(self.sequence_axis)
        # Only the name is checked: a configuration may be built on a machine that cannot run it.
        others = CUDNN if self.attention == "full" else ()
        check_name(self.implementation, others)
        for name in ("kv_per_branch", "tie_embeddings", "remat"):
            self._set(name, checks.flag(name, getattr(self, name)))
        rate = checks.number("dropout_rate", self.dropout_rate, "in [0, 1)", lambda x: 0 <= x < 1)
        self._set("dropout_rate", rate)
        self._set(
            "norm_eps", checks.number("norm_eps", self.norm_eps, "in (0, 1)", lambda x: 0 < x < 1)
        )

    def _set(self, name: str, value: Any) -> None:
        """Sets a field of this frozen dataclass, to a derived size or to a plain Python value."""
        object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TransformerConfig":
        """The configuration from the dict that ``dataclasses.asdict`` made of it.

        Args:
          values: the fields, also after storage as JSON; omitted fields have their defaults.

        Raises:
          ValueError: a key is unknown, or a value breaks its rule.
        """
        _check_keys(cls, values)
        rest = dict(values)
        nsa = rest.pop("nsa", {})
        _check_keys(NSAConfig, nsa)
        return cls(nsa=NSAConfig(**nsa), **rest)


def _check_keys(cls: type, values: dict[str, Any]) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} must be made of a dict, got {checks.short(values)}")
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}, only {sorted(known)}")
