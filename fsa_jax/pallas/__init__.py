"""Pallas kernels for GPUs: pure functions of arrays and static sizes.

Each computation has a package: `range_attention`, `block_attention`, `block_selection`, and, for a
few new tokens of sequences with a cache, `decode`. The kernel `gate_gradient` is a single module.
The first three packages have a `passes` module, which runs their kernels in sequence; it takes its
sizes from a plan, made from the shapes and the device. Plans prefer the tiles that were measured on
the device (`tile_tables`) to their own heuristics, and both describe them as `tile_config.Tile`.
`support` says whether a device can run the kernels at all.

The kernels in Triton are written with the operations in `intrinsics`, `tiles` and `online_softmax`;
those in Mosaic GPU (`range_attention.hopper_*`) have operations of their own. All of them follow
the rules of `fsa_jax.semantics` and import nothing from their callers.
"""

from fsa_jax.pallas.block_attention.plan import SelectedTuning
from fsa_jax.pallas.tile_config import Tile

__all__ = ["SelectedTuning", "Tile"]
