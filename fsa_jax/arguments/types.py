"""Types of the arguments of public functions, for type checkers: literal choices and arrays."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jax import Array

Implementation = Literal["triton", "mosaic_gpu", "triton_interpret", "xla", "reference"]
"""The implementations of attention; `fsa_jax.explain` says which one None stands for."""

DenseImplementation = Literal[Implementation, "cudnn"]
"""The implementations of `fsa_jax.causal_attention`."""

LayerType = Literal["nsa", "full", "window"]
"""The attention of a layer of a model."""

CompressionMethod = Literal["linear", "weighted", "mean", "mlp"]
"""How a window of tokens is mapped to one key or value; see `fsa_jax.compress`."""

AnyArray = Array | np.ndarray
IntegerList = Sequence[int] | Sequence[Sequence[int]]
"""Segment ids, positions or tokens in Python lists: one sequence, or several of equal length."""

IntLike = int | np.integer
FloatLike = float | np.floating | np.integer
