"""The gated sum of the branches, and its gradient in one pass over each of them.

The backward pass of a branch needs dout_b = gate_b * dout and delta_b = sum(out_b * dout_b). Both
are computed where the branch's output is read for the gradient of its gate, so that nothing else in
the backward pass reads it.

Shapes: B sequences, T tokens, N query heads, E head width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from fsa_jax.ops.call import Backend
from fsa_jax.ops.partition import partitioned
from fsa_jax.semantics.precision import accumulation_dtype


def combine(gates: Float[Array, "B T #N 3"], outs) -> Float[Array, "B T N E"]:
    """The sum of gates[..., b] * outs[b], added in the wide dtype."""
    wide = accumulation_dtype(outs[0])
    each = rearrange(gates.astype(wide), "... n c -> c ... n 1")
    total = sum(gate * out.astype(wide) for gate, out in zip(each, outs, strict=True))
    return jnp.asarray(total).astype(outs[0].dtype)


def combine_gradients(backend: Backend, gates, outs, dout) -> tuple[jax.Array, Any, Any]:
    """The gradients of `combine`, and delta = sum(out * dout) of each branch.

    Args:
      backend: what computes them.
      gates: [B, T, N, 3] or [B, T, 1, 3].
      outs: outputs of the three branches, [B, T, N, E] each.
      dout: cotangent of the sum, [B, T, N, E].

    Returns:
      dgates like `gates`; the cotangent of each branch's output, like `dout`, and its delta
      [B, T, N], computed from the cotangent as it is rounded.
    """
    # The branches are handled one after another. Otherwise the compiler may compute all three
    # cotangents at once, which takes three times the memory.
    found = []
    for i, out in enumerate(outs):
        late, _ = jax.lax.optimization_barrier((dout, found[-1:]))
        found.append(_gradients(backend, gates.shape[2] == 1, gates[..., i], late, out))
    dgates, douts, deltas = zip(*found, strict=True)
    return gates_gradient(gates, dgates), douts, deltas


def gates_gradient(gates, dgates):
    """The gradient of the gates, from the result [B, T, N] of `gate_gradient` for each branch."""
    dgates = jnp.stack(dgates, axis=-1)
    if gates.shape[2] == 1:
        dgates = jnp.sum(dgates, axis=2, keepdims=True)
    return dgates.astype(gates.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(backend, one_gate, *arrays):
    def kernels(gate, dout, out):
        from fsa_jax.pallas import gate_gradient

        interpret = backend is Backend.TRITON_INTERPRET
        return gate_gradient.gradients(gate, dout, out, interpret=interpret)

    operands = {"gates": "b t one" if one_gate else "b t n", "dout": "b t n e", "out": "b t n e"}
    function = backend.runs(kernels, gate_gradient)
    return partitioned(function, operands, ("b t n", "b t n e", "b t n"))(*arrays)


def gate_gradient(gate, dout, out):
    """The portable equivalent of `pallas.gate_gradient.gradients`."""
    wide = accumulation_dtype(dout)
    dbranch, out = branch_cotangent(gate, dout), out.astype(wide)
    delta = jnp.sum(out * dbranch.astype(wide), axis=-1)
    return jnp.sum(out * dout.astype(wide), axis=-1), dbranch, delta


def branch_cotangent(gate, dout):
    """The gate times dout, rounded to the dtype of `dout`."""
    wide = accumulation_dtype(dout)
    dbranch = gate.astype(wide)[..., None] * dout.astype(wide)
    if dout.dtype != wide:  # XLA may elide the rounding of a mere conversion
        digits = jnp.finfo(dout.dtype)
        dbranch = jax.lax.reduce_precision(dbranch, digits.nexp, digits.nmant)
    return dbranch.astype(dout.dtype)
