"""Rotary position embedding (RoFormer, arXiv 2104.09864), half-split, with Llama 3 scaling."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from fsa_jax.arguments import checks, scalars
from fsa_jax.arguments.types import AnyArray, IntegerList


def _check_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        scalars.number(name, value, "a finite number above 0", lambda x: 0 < x < math.inf)
        if isinstance(value, np.generic):
            object.__setattr__(owner, name, value.item())  # JSON holds no NumPy scalars


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
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
      The Llama 3 Herd of Models, arXiv 2407.21783; the formula is that of its released code.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        _check_positive(self, *(field.name for field in dataclasses.fields(self)))
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "high_freq_factor must be above low_freq_factor, got "
                f"high_freq_factor={self.high_freq_factor} and "
                f"low_freq_factor={self.low_freq_factor}"
            )

    def stretch(self, frequencies: np.ndarray) -> np.ndarray:
        """The scaled frequencies.

        Args:
          frequencies: frequencies in radians per token.

        Returns:
          Frequencies in radians per token, float64, of the same shape.
        """
        turns = self.original_max_position * frequencies / (2 * math.pi)  # L / w
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)  # 0 and 1 are the first two cases of the formula
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclasses.dataclass(frozen=True)
class RoPE:
    """Rotary position embedding: rotates channels (c, c + D/2) of a head by an angle p f_c.

    For a token at position p and a head of width D:

        out[c]       = x[c] * cos(p f_c) - x[c + D/2] * sin(p f_c)
        out[c + D/2] = x[c + D/2] * cos(p f_c) + x[c] * sin(p f_c),   f_c = theta ** (-2c / D)

    Attributes:
      theta: base of the wavelengths.
      scaling: scaling of the frequencies, or None.

    Raises:
      ValueError: ``theta`` is not a finite number above 0, or ``scaling`` has another type.

    Example:
      >>> RoPE(theta=10000.0).inverse_frequencies(4).round(4).tolist()
      [1.0, 0.009999999776482582]

    References:
      RoFormer, arXiv 2104.09864, equation 34, with channels paired across the halves of a head as
      in GPT-NeoX and Hugging Face's Llama. RoFormer, and the code that Meta released with Llama,
      pair the neighbouring channels 2c and 2c + 1. To use such weights, reorder the output channels
      of each head of the query and key projections: first the even ones, then the odd ones.
    """

    theta: float = 10000.0
    scaling: Llama3Scaling | None = None

    def __post_init__(self):
        _check_positive(self, "theta")
        if not isinstance(self.scaling, Llama3Scaling | None):
            raise ValueError(
                f"scaling must be a Llama3Scaling or None, got {scalars.short(self.scaling)}"
            )

    def inverse_frequencies(self, head_dim: int) -> Float[np.ndarray, " half"]:
        """The frequencies f_c.

        Args:
          head_dim: width D of a head.

        Returns:
          Frequencies in radians per token, float32 [head_dim / 2].

        Raises:
          ValueError: ``head_dim`` is not a positive even number.
        """
        if scalars.size("head_dim", head_dim) % 2:
            raise ValueError(f"head_dim must be positive and even for RoPE, got {head_dim}")
        frequencies = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.scaling is not None:
            frequencies = self.scaling.stretch(frequencies)
        return frequencies.astype(np.float32)

    def apply(
        self, x: Float[AnyArray, "*B T N D"], positions: Integer[AnyArray, "*B T"] | IntegerList
    ) -> Float[Array, "*B T N D"]:
        """Rotates every head of `x` by the angles of its token's position.

        Args:
          x: queries or keys, floating point [..., T, heads, D].
          positions: positions of the tokens, integers [..., T]; leading axes may be omitted if all
            sequences have the same positions. For packed sequences `fsa_jax.token_positions` and
            `fsa_jax.window_positions` compute them.

        Returns:
          An array of the shape and dtype of `x`. The angles and the rotation are computed in
          float32, or in float64 if `x` is float64.

        Raises:
          ValueError: the shape of `positions` does not match that of `x` without its last two axes,
            the positions are not integers, or the head width is odd.

        Example:
          >>> x = jnp.ones((1, 3, 2, 4))
          >>> RoPE().apply(x, jnp.arange(3)[None]).shape
          (1, 3, 2, 4)
        """
        axes = "B " * ((checks.rank(x) or 3) - 3) + "T N D"
        x = checks.floating("x", x, axes, empty="T")
        leading = axes.split()[:-2][-(checks.rank(positions) or 1) :]
        positions = checks.integers("positions", positions, " ".join(leading), empty="T")
        if positions.shape != x.shape[:-2][-positions.ndim :]:
            raise ValueError(
                "positions must have the shape of x [..., T, heads, D] without its last two axes, "
                f"or the last few of these, got positions {positions.shape} and x {x.shape}"
            )
        positions = jnp.expand_dims(positions, range(x.ndim - 2 - positions.ndim))
        precise = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        frequencies = jnp.asarray(self.inverse_frequencies(x.shape[-1]), precise)
        frequencies = jnp.expand_dims(frequencies, range(positions.ndim))
        angles = positions.astype(precise)[..., None] * frequencies
        cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
        first, second = jnp.split(x.astype(precise), 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.astype(x.dtype)
