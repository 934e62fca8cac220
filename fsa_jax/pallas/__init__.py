"""GPU kernels in Pallas-Triton: pure functions of arrays, static sizes and a tuning object."""

from fsa_jax.pallas.tuning import SelectedTuning, Tile

__all__ = ["SelectedTuning", "Tile"]
