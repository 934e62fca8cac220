"""Pallas kernels for GPUs: pure functions of arrays, static sizes and a tuning object.

There is a package for each computation: `range_attention`, `block_attention`, `block_selection`
and, for decoding, `decode`. Its `plan` or `passes` module chooses sizes from shapes and the device
(`tile_config`; `tile_tables` holds measured sizes), and its passes run the kernels in sequence.
Code that the kernels share is in this package: `intrinsics`, `tiles` and `online_softmax`, each of
which may import the modules named before it. Kernels follow the rules of `fsa_jax.semantics` and
know nothing about their callers.
"""

from fsa_jax.pallas.block_attention.plan import SelectedTuning
from fsa_jax.pallas.tile_config import Tile

__all__ = ["SelectedTuning", "Tile"]
