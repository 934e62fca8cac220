"""Parts of the attention layers of `fsa_jax.layers`, as Flax NNX modules.

`base` holds what the layers share: projections, RoPE, padding, calls with a cache. The layers turn
features of the residual stream into queries, keys and values, call the functions of `fsa_jax` on
them, and project the result back.
"""
