"""Parts of the attention layers of `fsa_jax.layers` and of models, as Flax NNX modules.

`base` holds what the layers share: projections, RoPE, padding, and calls with a cache.
`dense_attention` has the dense layers, over all tokens or in a window, `compressor` the weights of
phi, and `rms_norm` the normalisation. `layer_stack` runs the layers of a model. The attention
layers project features of the residual stream to queries, keys and values, call the functions of
`fsa_jax` on them, and project the result back.
"""
