"""The differentiable operations, each computed by the backend that serves it.

A public function asks `dispatch.resolve` which backend serves a call, and hands the arrays with an
`OpSpec` (`call.py`: everything static, the backend included) to a module of this package. Each
module of a branch defines the derivative and two equivalent computations: the kernels of
`fsa_jax.pallas` and the portable loops of `fsa_jax.xla`. Both are pure functions of one device's
arrays; `partition.partitioned` runs them on each device of a mesh for its sequences and heads.
`nsa.py` joins the branches: data goes from it to `range_attention`, `block_selection`,
`block_attention` and `gated_sum`, and from each of these through `partition` to kernels or loops.
Kernel modules are imported only where they are called, since Pallas takes as long to import as JAX.
"""
