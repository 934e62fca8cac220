"""The operator under vmap, scan, checkpoint, pmap, shard_map and jit with shardings."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from util import assert_close, normal

import fsa_jax
from fsa_jax import NSAConfig

CONFIG = NSAConfig(kernel_size=8, kernel_stride=4, block_size=8, topk=4, window_size=9)
WINDOWS: dict[str, Any] = {"kernel_size": 8, "kernel_stride": 4}


def loss(query, key, value, gates, segment_ids=None, implementation=None):
    ck, cv = (
        fsa_jax.compress(x, **WINDOWS, method="mean", segment_ids=segment_ids) for x in (key, value)
    )
    out = fsa_jax.native_sparse_attention(
        query,
        key,
        value,
        ck,
        cv,
        gates,
        config=CONFIG,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return jnp.mean(out.astype(jnp.float32) ** 2)


BATCH = tuple(normal(i, 8, 40, *tail) for i, tail in enumerate([(4, 6), (2, 6), (2, 6), (4, 3)]))
IDS = jnp.broadcast_to(jnp.repeat(jnp.arange(4, dtype=jnp.int32), 10)[None], (8, 40))


@functools.cache
def wanted():
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*BATCH, IDS)


def check(result):
    assert_close(result, wanted(), 1e-6)


@pytest.mark.slow
def test_vmap_over_rows():
    def mean(*args):
        return jnp.mean(jax.vmap(loss)(*args))

    check(jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2, 3)))(*BATCH, IDS))


@pytest.mark.slow
def test_checkpoint_and_scan_over_rows():
    def mean(*args):
        step = jax.checkpoint(lambda total, row: (total + loss(*row), None))
        total, _ = jax.lax.scan(step, jnp.zeros(()), args)
        return total / 8

    check(jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2, 3)))(*BATCH, IDS))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_pmap():
    def one(*args):
        value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*args)
        return jax.lax.pmean(value, "rows"), jax.tree.map(lambda x: x / 8, gradients)

    rows = [x[:, None] for x in (*BATCH, IDS)]
    value, gradients = jax.pmap(one, axis_name="rows")(*rows)
    check((value[0], jax.tree.map(lambda x: x[:, 0], gradients)))


@pytest.mark.slow
def test_shard_map_and_jit_with_shardings():
    mesh = Mesh(np.asarray(jax.devices()), ("rows",))
    spec = PartitionSpec("rows")

    def mean(*args):
        return jax.lax.pmean(loss(*args), "rows")

    sharded = jax.shard_map(mean, mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
    check(jax.jit(jax.value_and_grad(sharded, argnums=(0, 1, 2, 3)))(*BATCH, IDS))
    placed = jax.device_put((*BATCH, IDS), jax.NamedSharding(mesh, spec))
    check(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*placed))


@pytest.mark.slow
def test_a_remat_policy_can_keep_the_named_residuals():
    """If the policy keeps the named residuals, the backward pass does not recompute attention."""
    policy = jax.checkpoint_policies.save_only_these_names(*fsa_jax.CHECKPOINT_NAMES)

    def loops(function):
        compiled = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2))).lower(*BATCH, IDS)
        return compiled.as_text().count("stablehlo.while")

    assert loops(jax.checkpoint(loss, policy=policy)) == loops(loss)
    assert loops(jax.checkpoint(loss)) > loops(loss)
    check(
        jax.jit(jax.value_and_grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2, 3)))(
            *BATCH, IDS
        )
    )


def test_every_checkpoint_name_is_used():
    def dense(query):
        return fsa_jax.causal_attention(query, query, query).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(*BATCH, IDS))
    text += str(jax.make_jaxpr(jax.grad(dense))(BATCH[0]))
    for name in fsa_jax.CHECKPOINT_NAMES:
        assert f"name={name}]" in text
