"""The gated sum of the branches, and its gradient in one pass over them.

The backward pass of a branch needs dout_b = gate_b * dout and delta_b = sum(out_b * dout_b).
`gated_sum` computes both where it reads the branches for the gradient of the gates, and hands
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
from fsa_jax.pallas import gates as kernel
from fsa_jax.precision import wide_dtype
from fsa_jax.sharding import partitioned


def combine(gates: Float[Array, "B T #N 3"], outs) -> Float[Array, "B T N E"]:
    """The sum of gates[..., b] * outs[b], added in the wide dtype."""
    wide = wide_dtype(outs[0])
    each = rearrange(gates.astype(wide), "... n c -> c ... n 1")
    total = sum(gate * out.astype(wide) for gate, out in zip(each, outs, strict=True))
    return jnp.asarray(total).astype(outs[0].dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gated_sum(call: Call, sequence_axis: str | None, gates, outs, lses) -> Any:
    """`combine` of branches that were computed with `gated=True`.

    Args:
      call: mode of the gradient.
      sequence_axis: mesh axis over which tokens may be split.
      gates: [B, T, N, 3] or [B, T, 1, 3].
      outs: outputs of the three branches, [B, T, N, E] each.
      lses: their logsumexps, [B, T, N] each.
    """
    del call, sequence_axis, lses
    return combine(gates, outs)


def _gated_sum_fwd(call, sequence_axis, gates, outs, lses):
    del call, sequence_axis, lses
    return combine(gates, outs), (gates, outs)


def _gated_sum_bwd(call, sequence_axis, residuals, dout):
    gates, outs = residuals
    one_gate = gates.shape[2] == 1
    dgates, *rest = _gradients_on(call, one_gate, sequence_axis)(gates, dout, *outs)
    if one_gate:
        dgates = jnp.sum(dgates, axis=2, keepdims=True)
    douts, deltas = rest[: len(outs)], rest[len(outs) :]
    return dgates.astype(gates.dtype), tuple(douts), tuple(-delta for delta in deltas)


gated_sum.defvjp(_gated_sum_fwd, _gated_sum_bwd)


@functools.cache
def _gradients_on(call, one_gate, sequence_axis):
    def kernels(gates, dout, *outs):
        return kernel.gradients(gates, dout, *outs, interpret=call.static["interpret"])

    operands = {"gates": "b t one c" if one_gate else "b t n c", "dout": "b t n e"}
    operands |= {f"out[{i}]": "b t n e" for i in range(3)}
    results = ("b t n c", *["b t n e"] * 3, *["b t n"] * 3)
    function = call.choose(kernels, _gradients)
    # every token is for itself, wherever it is
    sequence = (function, sequence_axis, 1) if sequence_axis else None
    return partitioned(function, operands, results, sequence)


def _gradients(gates, dout, *outs):
    """What `pallas.gates.gradients` computes."""
    wide = wide_dtype(dout)
    each = rearrange(gates.astype(wide), "... n c -> c ... n 1")
    over = dout.astype(wide)
    dgates = jnp.stack([jnp.sum(out.astype(wide) * over, axis=-1) for out in outs], axis=-1)
    douts = [(gate * over).astype(dout.dtype) for gate in each]
    deltas = [
        jnp.sum(out.astype(wide) * own.astype(wide), axis=-1)
        for out, own in zip(outs, douts, strict=True)
    ]
    return dgates, *douts, *deltas
