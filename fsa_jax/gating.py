"""The gated sum of the branches, and its gradient in one pass over each of them.

The backward pass of a branch needs dout_b = gate_b * dout and delta_b = sum(out_b * dout_b).
`gated_sum` computes both where it reads the branch for the gradient of its gate, and hands
-delta_b to the branch as the cotangent of its logsumexp. That is an agreement between it and
`operators.Call(gated=True)`, whose backward pass then reads no output: nothing else that is
differentiated may use the logsumexp of such a branch.

Residuals: the gates, and the outputs of the branches, which these then do not keep.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from fsa_jax.operators import Call
from fsa_jax.semantics.precision import wide_dtype
from fsa_jax.sharding import partitioned


def combine(gates: Float[Array, "B T #N 3"], outs) -> Float[Array, "B T N E"]:
    """The sum of gates[..., b] * outs[b], added in the wide dtype."""
    wide = wide_dtype(outs[0])
    each = rearrange(gates.astype(wide), "... n c -> c ... n 1")
    total = sum(gate * out.astype(wide) for gate, out in zip(each, outs, strict=True))
    return jnp.asarray(total).astype(outs[0].dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_sum(call: Call, gates, outs, lses) -> Any:
    """`combine` of branches that were computed with `gated=True`.

    Args:
      call: mode of the gradient.
      gates: [B, T, N, 3] or [B, T, 1, 3].
      outs: outputs of the three branches, [B, T, N, E] each.
      lses: their logsumexps, [B, T, N] each.
    """
    del call, lses
    return combine(gates, outs)


def _gated_sum_fwd(call, gates, outs, lses):
    del call, lses
    return combine(gates, outs), (gates, outs)


def _gated_sum_bwd(call, residuals, dout):
    gates, outs = residuals
    run = _gradients_on(call, gates.shape[2] == 1)
    # One branch after the other: else the compiler may make all three cotangents at once, which
    # need three times the memory.
    found = []
    for i, out in enumerate(outs):
        late, _ = jax.lax.optimization_barrier((dout, found[-1:]))
        found.append(run(gates[..., i], late, out))
    dgates, douts, deltas = zip(*found, strict=True)
    return gates_gradient(gates, dgates), douts, tuple(-delta for delta in deltas)


gated_sum.defvjp(_gated_sum_fwd, _gated_sum_bwd)


def gates_gradient(gates, dgates):
    """The gradient of the gates, from that [B, T, N] of each branch as `gate_gradient` gives it."""
    dgates = jnp.stack(dgates, axis=-1)
    if gates.shape[2] == 1:
        dgates = jnp.sum(dgates, axis=2, keepdims=True)
    return dgates.astype(gates.dtype)


@functools.cache
def _gradients_on(call, one_gate):
    def kernels(gate, dout, out):
        from fsa_jax.pallas import gate_gradient as kernel

        return kernel.gradients(gate, dout, out, interpret=call.static["interpret"])

    operands = {"gates": "b t one" if one_gate else "b t n", "dout": "b t n e", "out": "b t n e"}
    function = call.choose(kernels, gate_gradient)
    return partitioned(function, operands, ("b t n", "b t n e", "b t n"))


def gate_gradient(gate, dout, out):
    """What `pallas.gate_gradient.gradients` computes."""
    wide = wide_dtype(dout)
    dbranch, out = branch_cotangent(gate, dout), out.astype(wide)
    delta = jnp.sum(out * dbranch.astype(wide), axis=-1)
    return jnp.sum(out * dout.astype(wide), axis=-1), dbranch, delta


def branch_cotangent(gate, dout):
    """The gate times dout, rounded to the dtype of `dout`."""
    wide = wide_dtype(dout)
    dbranch = gate.astype(wide)[..., None] * dout.astype(wide)
    if dout.dtype != wide:  # XLA may leave out a rounding that it is not told of
        digits = jnp.finfo(dout.dtype)
        dbranch = jax.lax.reduce_precision(dbranch, digits.nexp, digits.nmant)
    return dbranch.astype(dout.dtype)
