"""Configs of two small transformers, a packed row of tokens for them, and the call of a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fsa_jax import NSAConfig
from fsa_jax.transformer import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=11,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    nsa=NSAConfig(
        kernel_size=4,
        kernel_stride=2,
        block_size=4,
        topk=3,
        init_blocks=1,
        local_blocks=1,
        window_size=4,
    ),
    implementation="reference",
)
FULL = dataclasses.replace(CONFIG, attention="full", implementation=None)
LENGTHS = [(1, 9), (2, 1), (3, 9), (0, 5)]
SEGMENT_IDS = jnp.asarray(np.repeat(*np.transpose(LENGTHS)), jnp.int32)[None]
TOKENS = jax.random.randint(jax.random.key(1), SEGMENT_IDS.shape, 0, 11, jnp.int32)


@nnx.jit
def call(model, tokens, segment_ids=None, dropout_key=None):
    return model(tokens, segment_ids, dropout_key=dropout_key)
