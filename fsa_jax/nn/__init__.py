"""Parts of the attention layers of `fsa_jax.layers`, as Flax NNX modules.

`base` holds what the layers share: projections, RoPE, padding, and calls with a cache.
`full_attention` is the dense layer, and `compressor` holds the weights of phi. The layers
project features of the residual stream to queries, keys and values, call the functions of `fsa_jax`
on them, and project the result back.
"""
