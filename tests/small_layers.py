"""Small attention layers, a packed row for them, and parameters that are not initial values."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fsa_jax import NSAConfig
from fsa_jax.layers import NativeSparseAttention

CONFIG = NSAConfig(
    kernel_size=8,
    kernel_stride=4,
    block_size=8,
    topk=4,
    init_blocks=1,
    local_blocks=2,
    window_size=6,
)
# One token, a document shorter than a window, whole windows, and padding before and after.
LENGTHS = [(0, 3), (1, 21), (2, 1), (3, 5), (4, 21), (0, 2)]
SEGMENT_IDS = jnp.asarray(np.repeat(*np.transpose(LENGTHS)), jnp.int32)[None]


def make(cls=NativeSparseAttention, **options):
    if cls is NativeSparseAttention:
        # The dense reference compiles fastest; test_layers.py also covers the portable one.
        options = {"config": CONFIG, "implementation": "reference"} | options
    options = {"num_kv_heads": 2, "head_dim": 8, "rngs": nnx.Rngs(0)} | options
    return cls(4, 16, **options)


def inputs(batch=1, length=SEGMENT_IDS.shape[1], dtype=jnp.float32):
    return jax.random.normal(jax.random.key(7), (batch, length, 16), dtype)


def perturbed(layer):
    """Returns the layer with all parameters perturbed, so that none has a special initial value."""
    graphdef, state = nnx.split(layer)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, moved))
