"""Kernels of decoding: a few queries of each sequence, whose keys and values stand in pages.

`attention` serves all three branches: the compressed keys with their logits, the chosen blocks, the
window. `selection` chooses the blocks from those logits. `fsa_jax.inference.decode_step` calls them
in that order on a cache.
"""
