"""The arrays that every kernel of the backward pass reads."""

from typing import NamedTuple

from jaxtyping import Array, Float


class BackwardInputs(NamedTuple):
    """The inputs of selected attention, and what its backward pass needs of each query.

    Attributes:
      query: [B, T, N, D].
      key: [B, T, K, D].
      value: [B, T, K, E].
      dout: cotangent of the output.
      lse: logsumexp of the forward pass, natural logarithm.
      delta: sum(out * dout) - dlse.
    """

    query: Float[Array, "B T N D"]
    key: Float[Array, "B T K D"]
    value: Float[Array, "B T K E"]
    dout: Float[Array, "B T N E"]
    lse: Float[Array, "B T N"]
    delta: Float[Array, "B T N"]
