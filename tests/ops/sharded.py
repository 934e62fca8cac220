"""The operator as one program on arrays with a batch, and meshes to divide it over."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from util import normal

import fsa_jax
from fsa_jax import NSAConfig

CONFIG = NSAConfig(
    kernel_size=8, kernel_stride=4, block_size=16, topk=3, init_blocks=1, local_blocks=1,
    window_size=6,
)  # fmt: skip
ROWS, TOKENS, HEADS, KV_HEADS, WIDTH = 4, 64, 4, 2, 8
LENGTHS = ([20, 5, 30, 9], [3, 1, 56, 4], [64, 0, 0, 0], [7, 25, 16, 16])
IDS = jnp.asarray(np.stack([np.repeat([1, 2, 3, 0], x) for x in LENGTHS]), jnp.int32)
QUERY, GATES = normal(0, ROWS, TOKENS, HEADS, WIDTH), normal(3, ROWS, TOKENS, HEADS, 3)
KEY, VALUE = (normal(i, ROWS, TOKENS, KV_HEADS, WIDTH) for i in (1, 2))
WEIGHTS = normal(4, KV_HEADS, 8 * WIDTH, WIDTH) / 8


def operator(implementation, axis=None, packed=True):
    """Returns compression and attention with all gradients, as a function of arrays and ids."""

    def attend(ids, query, key, value, gates, weights):
        sizes = {"kernel_size": 8, "kernel_stride": 4, "weights": weights}
        ids = ids if packed else None
        sizes |= {"segment_ids": ids, "sequence_axis": axis}
        compressed_key, compressed_value = (fsa_jax.compress(x, **sizes) for x in (key, value))
        return fsa_jax.native_sparse_attention(
            query, key, value, compressed_key, compressed_value, gates,
            config=CONFIG, segment_ids=ids, implementation=implementation, sequence_axis=axis,
        )  # fmt: skip

    def run(query, key, value, gates, weights, ids):
        arrays = (query, key, value, gates, weights)
        out, pull = jax.vjp(functools.partial(attend, ids), *arrays)
        return out, pull(jnp.cos(out))

    return run


def mesh_of(kind, *axes):
    types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * len(axes)
    names, sizes = zip(*axes, strict=True)
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names, axis_types=types, devices=devices)
