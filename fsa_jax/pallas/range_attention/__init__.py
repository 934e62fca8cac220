"""Kernels of attention to a contiguous range of keys: compressed keys, or the tokens of a window.

`passes` chooses the tiles and runs the kernels of a pass. There are two sets of kernels, one in
Triton (`query_kernels`, `key_kernel`) and one in Mosaic GPU for Hopper (`hopper_*`). In both, the
programs of the forward pass and of dq own queries, and the programs of dK and dV own keys.
"""
