"""Rotary position embedding (RoFormer, arXiv 2104.09864).

`RotaryEmbedding` is what the layers ask of an embedding, and `RoPE` the one that they use by
default. `rope_scaling.py` holds the scalings of `RoPE` to longer contexts.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from fsa_jax.arguments import checks, scalars
from fsa_jax.arguments.types import AnyArray, IntegerList
from fsa_jax.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    RoPEScaling,
    YarnScaling,
    check_positive,
    frequencies,
    scaling_from_dict,
)

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "RoPE",
    "RotaryEmbedding",
    "YarnScaling",
    "scaling_from_dict",
]


@runtime_checkable
class RotaryEmbedding(Protocol):
    """What the layers ask of a position embedding of queries and keys.

    `RoPE` is one. Any other object with these two methods can take its place, if it is also

    * hashable and comparable by value: the layers keep it as static metadata, and a layer whose
      embedding compares unequal is compiled anew. A frozen dataclass of plain values is both.
    * deterministic, and the same for every token of the same position: caches hold keys after the
      embedding, next to which the keys of later calls are put.

    Arrays that are trained have no place in it.

    Example:
      Partial rotary embedding, which leaves all channels but the first ``width`` as they are:

      >>> @dataclasses.dataclass(frozen=True)
      ... class PartialRotary:
      ...     rope: RoPE
      ...     width: int
      ...
      ...     def check(self, head_dim):
      ...         if self.width > head_dim:
      ...             raise ValueError(f"width must be at most {head_dim}, got {self.width}")
      ...         self.rope.check(self.width)
      ...
      ...     def apply(self, x, positions):
      ...         turned, kept = x[..., : self.width], x[..., self.width :]
      ...         return jnp.concatenate([self.rope.apply(turned, positions), kept], axis=-1)
      >>> embedding = PartialRotary(RoPE(), width=4)
      >>> isinstance(embedding, RotaryEmbedding)
      True
      >>> embedding.apply(jnp.ones((1, 3, 2, 16)), jnp.arange(3)[None]).shape
      (1, 3, 2, 16)
    """

    def check(self, head_dim: int, /) -> None:
        """Raises a ValueError if heads of width `head_dim` cannot be embedded.

        A layer calls this once, when it is built.
        """
        ...

    def apply(
        self, x: Float[Array, "*B T N D"], positions: Integer[Array, "*B T"], /
    ) -> Float[Array, "*B T N D"]:
        """Embeds every head of `x` at the position of its token.

        A layer calls this inside `jax.jit` with its queries and its keys, and with the compressed
        keys at the positions of the first tokens of their windows.

        Args:
          x: queries or keys, floating point [..., T, heads, D].
          positions: positions of the tokens in their documents, integers [..., T]; leading axes
            may be absent if all sequences have the same positions.

        Returns:
          An array of the shape and dtype of `x`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class RoPE:
    """Rotary position embedding: rotates pairs of channels of a head by angles p f_c.

    For a token at position p and a head of width D:

        out[c]       = x[c] * cos(p f_c) - x[c + D/2] * sin(p f_c)
        out[c + D/2] = x[c + D/2] * cos(p f_c) + x[c] * sin(p f_c),   f_c = theta ** (-2c / D)

    With ``interleaved`` the pairs are the neighbouring channels (2c, 2c + 1) instead of
    (c, c + D/2).

    Attributes:
      theta: base of the wavelengths.
      scaling: scaling of the frequencies (`LinearScaling`, `Llama3Scaling`, `YarnScaling`), or
        None.
      interleaved: which channels form a pair: False for those of the two halves of a head, as in
        GPT-NeoX and Hugging Face's Llama; True for neighbouring ones, as in RoFormer, the code that
        Meta released with Llama, and MaxText's llama3.1. The two are the same function up to the
        order of the channels of queries and keys: first the even ones, then the odd ones turns
        weights for True into weights for False.

    Raises:
      ValueError: ``theta`` is not a finite number above 0 (above 1 with `YarnScaling`), ``scaling``
        has another type, or ``interleaved`` is not a bool.

    Example:
      >>> RoPE(theta=10000.0).inverse_frequencies(4).round(4).tolist()
      [1.0, 0.009999999776482582]

    References:
      RoFormer, arXiv 2104.09864, equation 34.
    """

    theta: float = 10000.0
    scaling: RoPEScaling | None = None
    interleaved: bool = False

    def __post_init__(self):
        check_positive(self, "theta")
        if not isinstance(self.scaling, RoPEScaling | None):
            raise ValueError(
                "scaling must be a LinearScaling, Llama3Scaling, YarnScaling or None, got "
                f"{scalars.short(self.scaling)}"
            )
        if isinstance(self.scaling, YarnScaling) and self.theta <= 1:
            raise ValueError(f"theta must be above 1 with a YarnScaling, got {self.theta}")
        object.__setattr__(self, "interleaved", scalars.flag("interleaved", self.interleaved))

    def check(self, head_dim: int) -> None:
        """Checks that heads of this width can be rotated.

        Args:
          head_dim: width D of a head.

        Raises:
          ValueError: ``head_dim`` is not a positive even number.
        """
        if scalars.size("head_dim", head_dim) % 2:
            raise ValueError(f"head_dim must be positive and even for RoPE, got {head_dim}")
        if not (self._frequencies(head_dim) <= np.finfo(np.float32).max).all():
            raise ValueError(
                "theta and scaling must give frequencies that float32 holds, got "
                f"theta={self.theta} and scaling={self.scaling}"
            )

    def inverse_frequencies(self, head_dim: int) -> Float[np.ndarray, " half"]:
        """The frequencies f_c.

        Args:
          head_dim: width D of a head.

        Returns:
          Frequencies in radians per token after the scaling, float32 [head_dim / 2].

        Raises:
          ValueError: ``head_dim`` is not a positive even number.
        """
        self.check(head_dim)
        return self._frequencies(head_dim).astype(np.float32)

    def _frequencies(self, head_dim: int) -> np.ndarray:
        """The frequencies in float64."""
        with np.errstate(over="ignore"):  # an overflow is found by `check`
            if self.scaling is None:
                return frequencies(self.theta, head_dim)
            return self.scaling.frequencies(self.theta, head_dim)

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
        per_token = jnp.asarray(self.inverse_frequencies(x.shape[-1]), precise)
        per_token = jnp.expand_dims(per_token, range(positions.ndim))
        angles = positions.astype(precise)[..., None] * per_token
        cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
        if self.scaling is not None and self.scaling.amplitude != 1:
            cos, sin = cos * self.scaling.amplitude, sin * self.scaling.amplitude
        wide = x.astype(precise)
        if self.interleaved:
            first, second = wide[..., 0::2], wide[..., 1::2]
        else:
            first, second = jnp.split(wide, 2, axis=-1)
        pairs = [first * cos - second * sin, second * cos + first * sin]
        if self.interleaved:
            rotated = jnp.stack(pairs, axis=-1).reshape(x.shape)
        else:
            rotated = jnp.concatenate(pairs, axis=-1)
        return rotated.astype(x.dtype)
