"""Kernels for GPUs, in Pallas: pure functions of arrays, static sizes and a tuning object.

A room for each computation: `range_attention`, `block_attention`, `block_selection` and, for
decoding, `decode`. Its `plan` or `passes` chooses sizes from shapes and the device (`tile_config`,
measured ones in `tile_tables`), its passes run the kernels in their order. What kernels share lies
here, each file on those before it: `intrinsics`, `tiles`, `online_softmax`. Kernels know the rules
of `fsa_jax.semantics`, and nothing of who calls them.
"""

from fsa_jax.pallas.block_attention.plan import SelectedTuning
from fsa_jax.pallas.tile_config import Tile

__all__ = ["SelectedTuning", "Tile"]
