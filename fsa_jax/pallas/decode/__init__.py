"""Decoding kernels: a few queries of each sequence, whose keys and values are stored in pages.

`attention` serves all three branches: compressed keys (it also returns their logits), selected
blocks, and the window. `selection` selects the blocks from those logits.
`fsa_jax.inference.decode_step` runs a decoding step with them on a cache.
"""
