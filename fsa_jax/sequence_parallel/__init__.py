"""Sequence parallelism: the tokens of one sequence over the devices of a mesh axis.

`zigzag.py` is the layout: which tokens a device holds, and how arrays are gathered and scattered.
`attention.py` and `causal_attention.py` are one device's part of native sparse attention and of
dense causal attention. Each is one custom_vjp, as in `fsa_jax.ops.nsa`. Queries stay where they
are, keys and values are gathered for one KV head after another, and data then goes through the
operations of `fsa_jax.ops` in the shapes of one device.
"""
