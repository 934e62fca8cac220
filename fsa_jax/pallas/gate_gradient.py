"""Gate gradient kernel: computes everything that a branch needs from dout in one pass.

A program owns R rows (token, head). With the branch output o and its gate g it computes::

    dgate = sum(o * dout),    dbranch = g * dout,    delta = sum(o * dbranch)

where delta is the row sum that the backward pass of the branch subtracts from dp; it is computed
from dbranch after rounding.

Flops: 7 for each of B*T*N*E elements. Bytes: reads dout and the output, writes dbranch.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.intrinsics import call, iota, load, split, store
from fsa_jax.pallas.tiles import columns_of, rows_mask

#: Rows of a program.
ROWS = 32


def gradients(gate, dout, out, *, interpret: bool):
    """The gradients of gate * out.

    Args:
      gate: [B, T, n], where n divides N.
      dout: [B, T, N, E].
      out: like `dout`.
      interpret: run the kernel in interpret mode.

    Returns:
      dgate float32 [B, T, N], dbranch like `dout`, delta float32 [B, T, N].
    """
    batch, length, heads, width = dout.shape
    rows, shared = batch * length * heads, heads // gate.shape[2]

    def gate_gradient_kernel(gate_ref, dout_ref, out_ref, dgate_ref, dbranch_ref, delta_ref):
        row = pl.program_id(0) * ROWS + iota(ROWS)
        in_bounds = row < rows
        owner, _ = split(row, shared)
        g = load(gate_ref.at[owner], mask=in_bounds).astype(jnp.float32)
        dgate = delta = jnp.zeros((ROWS,), jnp.float32)
        for d in columns_of(dout, 128):
            at, mask = (row[:, None], d[None, :]), rows_mask(in_bounds, d, width)
            x, o = (load(ref.at[*at], mask=mask).astype(jnp.float32) for ref in (dout_ref, out_ref))
            own = (x * g[:, None]).astype(dout_ref.dtype)
            dgate += jnp.sum(o * x, axis=1)
            delta += jnp.sum(o * own.astype(jnp.float32), axis=1)
            store(dbranch_ref.at[*at], own, mask=mask)
        store(dgate_ref.at[row], dgate, mask=in_bounds)
        store(delta_ref.at[row], delta, mask=in_bounds)

    numbers = jax.ShapeDtypeStruct((rows,), jnp.float32)
    dgate, dbranch, delta = call(
        gate_gradient_kernel,
        gate.reshape(-1),
        dout.reshape(rows, width),
        out.reshape(rows, width),
        grid=(-(-rows // ROWS),),
        out_shape=(numbers, jax.ShapeDtypeStruct((rows, width), dout.dtype), numbers),
        interpret=interpret,
        num_stages=1,
    )
    shape = dout.shape[:3]
    return dgate.reshape(shape), dbranch.reshape(dout.shape), delta.reshape(shape)
