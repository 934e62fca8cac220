"""GPU kernels in Pallas-Triton: pure functions of arrays, static sizes and a tuning object."""

from fsa_jax.pallas.block_attention.plan import SelectedTuning
from fsa_jax.pallas.tile_config import Tile

__all__ = ["SelectedTuning", "Tile"]
