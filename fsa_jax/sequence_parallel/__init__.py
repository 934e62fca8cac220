"""Sequence parallelism: the tokens of one sequence over the devices of a mesh axis.

`zigzag.py` is the layout: which tokens a device holds, and how arrays are gathered and scattered.
`attention.py` and `causal_attention.py` are one device's part of native sparse attention and of
dense causal attention. Each is one custom_vjp, as in `fsa_jax.ops.nsa`. Queries stay on their
device, keys and values are gathered for one KV head after another, and the operations of
`fsa_jax.ops` then run on arrays of one device.
"""
