"""The kernel of the gates' gradient: everything that the branches need of dout, in one pass.

With the outputs o_b of the branches and their gates g_b, a program owns R rows (token, head)::

    dgate_b = sum(o_b * dout),    dout_b = g_b * dout,    delta_b = sum(o_b * dout_b)

where delta_b is what every ds of branch b subtracts, of dout_b as it is rounded.

Flops: 7 * 3 for each of B*T*N*E elements. Bytes: reads dout and three outputs, writes three dout_b.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.common import call, columns_of, iota, load, rows_mask, split, store

#: Rows of a program.
ROWS = 32


def gradients(gates, dout, *outs, interpret: bool):
    """The gradients of a gated sum.

    Args:
      gates: [B, T, n, 3], where n divides N.
      dout: [B, T, N, E].
      *outs: three arrays like `dout`.
      interpret: run the kernel in interpret mode.

    Returns:
      dgates float32 [B, T, N, 3], then dout_b like `dout` for each branch, then delta_b float32
      [B, T, N] for each branch.
    """
    batch, length, heads, width = dout.shape
    rows, shared = batch * length * heads, heads // gates.shape[2]
    flat = [x.reshape(rows, width) for x in (dout, *outs)]

    def gates_gradient_kernel(gates_ref, dout_ref, *refs):
        out_refs, (dgates_ref, *result_refs) = refs[: len(outs)], refs[len(outs) :]
        row = pl.program_id(0) * ROWS + iota(ROWS)
        there = row < rows
        owner, _ = split(row, shared)
        columns = columns_of(dout, 128)

        def read(ref, d):
            mask = rows_mask(there, d, width)
            return load(ref.at[row[:, None], d[None, :]], mask=mask).astype(jnp.float32)

        douts = [read(dout_ref, d) for d in columns]
        for branch, out_ref in enumerate(out_refs):
            gate = load(gates_ref.at[owner, branch], mask=there).astype(jnp.float32)
            dgate = delta = jnp.zeros((ROWS,), jnp.float32)
            for d, x in zip(columns, douts, strict=True):
                out = read(out_ref, d)
                own = (x * gate[:, None]).astype(dout_ref.dtype)
                dgate += jnp.sum(out * x, axis=1)
                delta += jnp.sum(out * own.astype(jnp.float32), axis=1)
                target = result_refs[branch].at[row[:, None], d[None, :]]
                store(target, own, mask=rows_mask(there, d, width))
            store(dgates_ref.at[row, branch], dgate, mask=there)
            store(result_refs[len(outs) + branch].at[row], delta, mask=there)

    dgates, *results = call(
        gates_gradient_kernel,
        gates.reshape(-1, len(outs)),
        *flat,
        grid=(-(-rows // ROWS),),
        out_shape=(
            jax.ShapeDtypeStruct((rows, len(outs)), jnp.float32),
            *(jax.ShapeDtypeStruct((rows, width), dout.dtype) for _ in outs),
            *(jax.ShapeDtypeStruct((rows,), jnp.float32) for _ in outs),
        ),
        interpret=interpret,
        num_stages=1,
    )
    return dgates.reshape(batch, length, heads, len(outs)), *(
        x.reshape(batch, length, heads, *x.shape[1:]) for x in results
    )
