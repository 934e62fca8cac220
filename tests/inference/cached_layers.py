"""Layers with a cache, their tokens, and the forward passes of training and with the cache."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from small_layers import CONFIG, perturbed

from fsa_jax.layers import NativeSparseAttention

LENGTH, BATCH, FEATURES = 72, 2, 16


def make(cls: Any = NativeSparseAttention, heads=(4, 2), **options: Any) -> Any:
    if cls is NativeSparseAttention:
        options = {"config": CONFIG} | options
    options = {"num_kv_heads": heads[1], "head_dim": 8, "rngs": nnx.Rngs(0)} | options
    return perturbed(cls(heads[0], FEATURES, implementation="xla", **options))


def inputs(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(7), (BATCH, LENGTH, FEATURES)).astype(dtype)


@nnx.jit
def whole(layer, x):
    return layer(x)


@nnx.jit(static_argnames="fresh")
def extend(layer, x, cache, num_tokens, fresh=False):
    return layer(x, cache=cache, num_tokens=num_tokens, fresh=fresh)


def numbers(*values):
    return jnp.asarray(values, jnp.int32)
