"""Kernels of attention to a contiguous range of keys: compressed keys, or earlier tokens.

Compressed attention, the sliding window and dense causal attention all run on them. `passes`
chooses the tiles and runs the passes in Triton (`query_kernels`, `key_kernel`); `hopper_groups` is
the entry to the kernels in Mosaic GPU for Hopper (`hopper_*`). In both, the
programs of the forward pass and of dq own queries, and the programs of dK and dV own keys.
"""
