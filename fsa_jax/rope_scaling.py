"""Scaling of RoPE to longer contexts than it was trained for: linear, Llama 3's, and YaRN."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from fsa_jax.arguments import scalars


def check_positive(owner: object, *names: str) -> None:
    """Checks that attributes are finite numbers above 0."""
    for name in names:
        _check_number(owner, name, "a finite number above 0", least=None)


def _check_number(
    owner: object, name: str, rule: str, least: float | None, most: float = sys.float_info.max
) -> None:
    """Checks for a number above 0 or, if `least` is given, of at least `least`; at most `most`."""
    value = getattr(owner, name)
    above = (lambda x: x > 0) if least is None else (lambda x: x >= least)
    scalars.number(name, value, rule, lambda x: above(x) and x <= most)
    if isinstance(value, np.generic):
        object.__setattr__(owner, name, value.item())  # JSON holds no NumPy scalars


def frequencies(theta: float, head_dim: int) -> np.ndarray:
    """The frequencies of RoPE without scaling, in radians per token, float64 [head_dim / 2]."""
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


class _Scaling:
    """What the scalings share: how they act on RoPE by default, and the dictionaries."""

    rope_type: ClassVar[str]
    #: Keys of a dictionary without which a scaling is not read from it.
    _required: ClassVar[tuple[str, ...]]

    @property
    def amplitude(self) -> float:
        """The factor on the cosines and sines."""
        return 1.0

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """The scaled frequencies of RoPE.

        Args:
          theta: base of the wavelengths.
          head_dim: width of a head.

        Returns:
          Frequencies in radians per token, float64 [head_dim / 2].
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, str | float | bool]:
        """The scaling as Hugging Face's configurations write it, for JSON.

        Returns:
          ``rope_type`` and the attributes that are not None. ``original_max_position`` has the key
          ``original_max_position_embeddings``. `scaling_from_dict` reads the result.
        """
        fields = {_KEYS.get(f.name, f.name): getattr(self, f.name) for f in _fields(type(self))}
        values = {key: value for key, value in fields.items() if value is not None}
        return {"rope_type": self.rope_type, **values}

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> Self:
        names = {_KEYS.get(field.name, field.name): field.name for field in _fields(cls)}
        for key, value in values.items():
            if key not in names:
                raise ValueError(
                    f"{key!r} (with the value {scalars.short(value)}) is not a key of rope_type "
                    f"{cls.rope_type!r}, whose keys are {', '.join(names)}"
                )
        for key in cls._required:
            if key not in values:
                raise ValueError(
                    f"rope_type {cls.rope_type!r} needs the key {key!r}, got "
                    f"{scalars.short(dict(values))}"
                )
        return cls(**{names[key]: value for key, value in values.items()})


#: Attributes whose keys in Hugging Face's configurations have other names.
_KEYS = {"original_max_position": "original_max_position_embeddings"}


def _fields(kind: type[_Scaling]):
    return dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]  # all are dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling(_Scaling):
    """Position interpolation: all frequencies are divided by ``factor``.

    Attributes:
      factor: factor by which the context becomes longer.

    Raises:
      ValueError: ``factor`` is not a finite number above 0.

    Example:
      >>> from fsa_jax import RoPE
      >>> RoPE(scaling=LinearScaling(factor=4.0)).inverse_frequencies(4).tolist()
      [0.25, 0.0024999999441206455]

    References:
      Extending Context Window of Large Language Models via Positional Interpolation,
      arXiv 2306.15595; ``rope_type="linear"`` of Hugging Face's configurations.
    """

    rope_type: ClassVar[str] = "linear"
    _required: ClassVar[tuple[str, ...]] = ("factor",)

    factor: float

    def __post_init__(self):
        check_positive(self, "factor")

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        return frequencies(theta, head_dim) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling(_Scaling):
    """Frequency scaling that extends a trained RoPE to longer contexts, as in Llama 3.1.

    Let w be the wavelength in tokens of a frequency f, L ``original_max_position``, lo
    ``low_freq_factor`` and hi ``high_freq_factor``. The scaled frequency is

        f                                 if w < L / hi
        f / factor                        if w > L / lo
        (1 - s) * f / factor + s * f      otherwise, with s = (L / w - lo) / (hi - lo)

    Attributes:
      factor: factor by which the longest wavelengths are stretched.
      low_freq_factor: wavelengths above ``original_max_position / low_freq_factor`` tokens are
        stretched by the whole factor.
      high_freq_factor: wavelengths below ``original_max_position / high_freq_factor`` tokens are
        not changed.
      original_max_position: context length, in tokens, that the frequencies were trained for.

    Raises:
      ValueError: a value is not a finite number above 0, or ``high_freq_factor`` is not above
        ``low_freq_factor``.

    Example:
      >>> Llama3Scaling(factor=32.0).original_max_position
      8192

    References:
      The Llama 3 Herd of Models, arXiv 2407.21783; the formula is that of its released code;
      ``rope_type="llama3"`` of Hugging Face's configurations.
    """

    rope_type: ClassVar[str] = "llama3"
    _required: ClassVar[tuple[str, ...]] = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        check_positive(self, *(field.name for field in dataclasses.fields(self)))
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "high_freq_factor must be above low_freq_factor, got "
                f"high_freq_factor={self.high_freq_factor} and "
                f"low_freq_factor={self.low_freq_factor}"
            )

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        plain = frequencies(theta, head_dim)
        turns = self.original_max_position * plain / (2 * math.pi)  # L / w
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)  # 0 and 1 are the first two cases of the formula
        return (1 - kept) * plain / self.factor + kept * plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling(_Scaling):
    """YaRN: slow frequencies are divided by ``factor``, fast ones kept, the logits made larger.

    Let D be the width of a head, L ``original_max_position`` and s ``factor``. The channel pair
    that turns b times within L tokens has the index (a real number, counted from 0)

        index(b) = D * ln(L / (2 pi b)) / (2 ln(theta))

    Pair c has the frequency f_c of `RoPE`. With lo = index(``beta_fast``) rounded down and hi =
    index(``beta_slow``) rounded up, no smaller than 0 and no larger than D - 1, the scaled
    frequency is

        f_c                              if c <= lo
        f_c / s                          if c >= hi
        r * f_c / s + (1 - r) * f_c      otherwise, with r = (c - lo) / (hi - lo)

    Cosines and sines are multiplied by ``attention_factor``, which is by default m(1), with
    m(x) = 0.1 x ln(s) + 1 for s > 1, else 1. So the logits grow by the square of it.

    Attributes:
      factor: factor s by which the context becomes longer.
      original_max_position: context length L, in tokens, that the frequencies were trained for.
      beta_fast: pairs that turn more often than this in L tokens are not changed.
      beta_slow: pairs that turn less often than this in L tokens are stretched by the whole factor.
      attention_factor: factor on cosines and sines, or None for the default.
      mscale, mscale_all_dim: where both are given and neither is 0, the default of
        ``attention_factor`` is m(``mscale``) / m(``mscale_all_dim``); otherwise they are ignored.
        Models of DeepSeek, whose configurations these come from, also multiply their softmax scale
        by m(``mscale_all_dim``) ** 2, which belongs into the ``scale`` of the attention.
      truncate: False leaves lo and hi as they are, without rounding.

    Raises:
      ValueError: a number is not finite or not above 0 (``mscale`` and ``mscale_all_dim`` may be
        0), ``beta_fast`` is not above ``beta_slow``, or ``truncate`` is not a bool.

    Example:
      >>> from fsa_jax import RoPE
      >>> rope = RoPE(scaling=YarnScaling(factor=4.0, original_max_position=64))
      >>> rope.inverse_frequencies(4).tolist(), round(rope.scaling.amplitude, 4)
      ([1.0, 0.0024999999441206455], 1.1386)

    References:
      YaRN, arXiv 2309.00071. The paper's ramp between the kept and the stretched frequencies is
      linear in the turns; that of its released code, which models are trained with, is linear in
      the index, as above. ``rope_type="yarn"`` of Hugging Face's configurations.
    """

    rope_type: ClassVar[str] = "yarn"
    _required: ClassVar[tuple[str, ...]] = ("factor", "original_max_position_embeddings")

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        check_positive(self, "factor", "original_max_position", "beta_fast", "beta_slow")
        if self.attention_factor is not None:
            rule = "a number above 0 and at most 1000, or None"
            _check_number(self, "attention_factor", rule, least=None, most=1000.0)
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                _check_number(self, name, "a finite number of at least 0, or None", least=0.0)
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast must be above beta_slow, got beta_fast={self.beta_fast} and "
                f"beta_slow={self.beta_slow}"
            )
        object.__setattr__(self, "truncate", scalars.flag("truncate", self.truncate))

    @property
    def amplitude(self) -> float:
        """The factor on the cosines and sines."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    def _growth(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        low, high = (
            head_dim
            * math.log(self.original_max_position / (2 * math.pi * turns))
            / (2 * math.log(theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high = max(high, low + 0.001)  # a step where the range is empty
        ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
        kept = frequencies(theta, head_dim)
        return ramp * kept / self.factor + (1 - ramp) * kept


RoPEScaling = LinearScaling | Llama3Scaling | YarnScaling
"""The scalings of RoPE."""

_SCALINGS = {kind.rope_type: kind for kind in (LinearScaling, Llama3Scaling, YarnScaling)}


def scaling_from_dict(values: Mapping[str, Any] | None) -> RoPEScaling | None:
    """Reads what `to_dict` of a scaling or a Hugging Face configuration (``rope_scaling``) wrote.

    Args:
      values: ``rope_type`` (or ``type``, as older configurations call it) and the attributes of
        that scaling, in which ``original_max_position`` has the key
        ``original_max_position_embeddings``. A value of None counts as absent. None, or a
        ``rope_type`` of "default": no scaling. Keys that belong to the whole embedding, such as
        ``rope_theta``, must not be in it.

    Returns:
      The scaling, or None.

    Raises:
      ValueError: the type is unknown, a key is missing or unknown, or a value breaks the rules of
        the scaling.

    Example:
      >>> scaling_from_dict({"rope_type": "linear", "factor": 2.0})
      LinearScaling(factor=2.0)
    """
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise ValueError(
            f"the scaling must be a mapping of keys to values or None, got {scalars.short(values)}"
        )
    rest = {key: value for key, value in values.items() if value is not None}
    types = [rest.pop(key) for key in ("rope_type", "type") if key in rest]
    if not types or types[0] != types[-1]:
        raise ValueError(f"the scaling needs one rope_type, got {scalars.short(dict(values))}")
    kind = scalars.choice("rope_type", types[0], (*_SCALINGS, "default"))
    if kind != "default":
        return _SCALINGS[kind]._from_dict(rest)
    if rest:
        raise ValueError(f"rope_type 'default' has no other keys, got {scalars.short(rest)}")
    return None
