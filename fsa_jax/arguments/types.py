"""What arguments of public functions may be, for type checkers: names of choices, and arrays."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jax import Array

Implementation = Literal["triton", "mosaic_gpu", "triton_interpret", "xla", "reference"]
"""What computes attention; `fsa_jax.explain` says which of them None means."""

DenseImplementation = Literal[Implementation, "cudnn"]
"""The same of `fsa_jax.causal_attention`."""

CompressionMethod = Literal["linear", "weighted", "mean", "mlp"]
"""How a window of tokens becomes one key or value, see `fsa_jax.compress`."""

AnyArray = Array | np.ndarray
IntegerList = Sequence[int] | Sequence[Sequence[int]]
"""Segment ids, positions or tokens in Python lists: of one row, or of rows of one length."""

IntLike = int | np.integer
FloatLike = float | np.floating | np.integer
