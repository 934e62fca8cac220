"""The parameters that sparse attention has and a dense checkpoint lacks: gates and phi.

A warm start begins as close to the dense model as a caller wants:

* Every branch attends with the dense projections, so each is an estimate of the same attention
  output: the selected branch of the whole where its blocks cover the sequence, the window of the
  near part, the compressed branch at a coarse resolution.
* phi is the mean of a window, with a positional table of zeros.
* The kernel of the gates is 0, so that at first the gates are those of the bias alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fsa_jax.nn.compressor import mean_of_window


class Gates(NamedTuple):
    """Biases of the gates (compressed, selected, window), as logits of the sigmoid."""

    compressed: float
    selected: float
    window: float


def _logit(gate: float) -> float:
    return float(np.log(gate / (1 - gate)))


#: The two starts of the gates.
#:
#: closed: in float32 the sigmoids are 4e-18, 1 and 4e-18, so the output is that of the selected
#: branch to rounding, and where the selected blocks cover the sequence that of the dense model. But
#: the derivative of these sigmoids is 4e-18 or 0: such gates learn nothing.
#:
#: open: the sigmoids are 0.05, 0.9 and 0.05. They sum to 1, so the output is a convex combination
#: of three estimates of the same thing, and the derivatives are 0.0475, 0.09 and 0.0475, against at
#: most 0.25.
STARTS = {
    "closed": Gates(-40.0, 40.0, -40.0),
    "open": Gates(_logit(0.05), _logit(0.9), _logit(0.05)),
}


def made(
    path: tuple[str, ...], shape: tuple[int, ...], gates: str, dtype: np.dtype
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function that returns a part of a parameter of a warm start.

    Args:
      path: path of the parameter.
      shape: its shape, with the axis of the layers.
      gates: a key of `STARTS`.
      dtype: dtype of the result.
    """
    *_, module, name = path
    if (module, name) == ("gate", "bias"):  # [L, N, 3]
        value = np.asarray(STARTS[gates])
    elif name == "weights" and len(shape) == 4:  # of "linear", [L, K, window * D, D]
        window, width = shape[2] // shape[3], shape[3]
        value = mean_of_window(window, width)
    elif name in ("kernel", "positions"):
        value = np.zeros(())
    else:
        raise AssertionError(f"a warm start has no parameter {'.'.join(path)}")
    whole = np.broadcast_to(value.astype(dtype), shape)
    return lambda index: np.ascontiguousarray(whole[index])
