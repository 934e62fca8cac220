"""The gated sum: its gradients, and the residuals it passes to the branches' backward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import assert_close, assert_errors_are_at_most_twice_those_of_dense, normal, value_and_vjp

from fsa_jax.api import combine_branches
from fsa_jax.bench.cases import gated_sum_by
from fsa_jax.ops import gated_sum
from fsa_jax.ops.call import Backend

INTERPRET = jax.default_backend() == "cpu"
KERNELS = Backend.TRITON_INTERPRET if INTERPRET else Backend.TRITON


def arrays(dtype, *, width=80, heads=6, gate_heads=6, length=37):
    """Gates of both signs and three branches, of sizes that do not fill whole tiles."""
    shape = (2, length, heads, width)
    gates = normal(9, 2, length, gate_heads, 3, dtype=dtype)
    return gates.at[:, 3].set(0), *(normal(i, *shape, dtype=dtype) for i in range(3))


@pytest.mark.parametrize("backend", [KERNELS, Backend.XLA, Backend.BY_PLATFORM])
@pytest.mark.parametrize("gate_heads", [1, 6])
@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 80), ("float32", 128), ("float16", 192)])
def test_error_is_at_most_twice_that_of_the_plain_sum(backend, gate_heads, dtype, width):
    args = arrays(jnp.dtype(dtype), width=width, gate_heads=gate_heads)
    ours, plain = (value_and_vjp(f, 5)(*args) for f in (gated_sum_by(backend), combine_branches))
    with jax.enable_x64():
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in args]
        exact = jax.tree.map(np.asarray, value_and_vjp(combine_branches, 5)(*wide))
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    assert [x.dtype for x in jax.tree.leaves(ours)] == [args[0].dtype] * 5
    assert_errors_are_at_most_twice_those_of_dense(ours, plain, exact)


@pytest.mark.parametrize("backend", [KERNELS, Backend.XLA])
def test_branches_get_what_their_gradients_subtract(backend):
    """Delta is sum(out * dout), computed from dout after rounding."""
    gates, *outs = arrays(jnp.bfloat16)
    dout = normal(7, *outs[0].shape, dtype=jnp.bfloat16)
    _, douts, deltas = gated_sum.combine_gradients(backend, gates, outs, dout)
    for out, dbranch, delta in zip(outs, douts, deltas, strict=True):
        wanted = np.sum(np.asarray(out, np.float64) * np.asarray(dbranch, np.float64), axis=-1)
        assert_close(delta, wanted, 1e-6)


def test_vmap_makes_its_axis_part_of_the_batch():
    args = arrays(jnp.float32)
    stacked = [jnp.stack([x, x[::-1]]) for x in args]
    got = jax.vmap(value_and_vjp(gated_sum_by(KERNELS), 5))(*stacked)
    wanted = value_and_vjp(gated_sum_by(KERNELS), 5)(*args)
    assert_close(jax.tree.map(lambda x: x[0], got), wanted, 1e-6)
