"""Runs one small case of the kernels: `compute-sanitizer python tests/sanitized.py CASE`.

Each case runs the forward and backward passes. Without a GPU the kernels are interpreted. With
XLA_PYTHON_CLIENT_ALLOCATOR=platform every array has its own allocation. The case "planted" reads
out of bounds, which the tool must detect.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from util import lists, normal, selected, value_and_vjp

import fsa_jax
from fsa_jax import NSAConfig
from fsa_jax.inference import decode_step
from fsa_jax.inference.kv_cache import Chunk
from fsa_jax.inference.nsa_cache import NSACache
from fsa_jax.pallas import SelectedTuning, support
from fsa_jax.pallas.block_attention.plan import METHODS
from fsa_jax.pallas.range_attention import hopper_pipeline as hopper_kernels

#: Sizes that fill neither whole tiles nor whole blocks.
LENGTH = 333
INTERPRET = jax.default_backend() == "cpu"
IMPLEMENTATION = "triton_interpret" if INTERPRET else "triton"
CONFIG = NSAConfig(topk=4, window_size=100)


def segment_ids():
    ids = np.repeat([1, 1, 2, 0, 3, 4], [1, 90, 150, 20, 70, 2])
    return jnp.asarray(ids, jnp.int32)[None]


def arrays(group, *, kv_heads=2, width=64):
    shapes = ((group * kv_heads, width), (kv_heads, width), (kv_heads, width))
    return [normal(i, 1, LENGTH, *x, dtype=jnp.bfloat16) for i, x in enumerate(shapes)]


def selection(method, group=4):
    indices = lists(3, 1, LENGTH, 2, 7, -(-LENGTH // 64))
    tuning = SelectedTuning(method=method, pairs=48)
    attend = selected(indices, 64, segment_ids(), IMPLEMENTATION, tuning=tuning)
    return value_and_vjp(attend, 5)(*arrays(group))


def operator(implementation: fsa_jax.Implementation = IMPLEMENTATION, width=64):
    query, key, value = arrays(4, width=width)
    ids = segment_ids()
    gates = jax.nn.sigmoid(normal(7, 1, LENGTH, 8, 3, dtype=jnp.bfloat16))

    def attend(query, key, value, gates):
        windows = {"kernel_size": 32, "kernel_stride": 16, "method": "mean", "segment_ids": ids}
        ck, cv = (fsa_jax.compress(x, **windows) for x in (key, value))
        return fsa_jax.native_sparse_attention(
            query, key, value, ck, cv, gates,
            config=CONFIG, segment_ids=ids, implementation=implementation,
        )  # fmt: skip

    return value_and_vjp(attend, 5)(query, key, value, gates)


def hopper():
    """Runs the operator with the Mosaic GPU kernels, where these are supported."""
    there = not INTERPRET and support.hopper_reason() is None
    return operator("mosaic_gpu" if there else IMPLEMENTATION, hopper_kernels.WIDTH)


def decoding():
    """Decodes one step for a sequence of 333 tokens and for an empty sequence."""
    query, key, value = (jnp.concatenate([x, x]) for x in arrays(4))
    cache = NSACache.init(2, LENGTH, config=CONFIG, num_kv_heads=2, head_dim=64, dtype=key.dtype)
    chunk = cache.place(LENGTH, jnp.asarray([LENGTH, 0], jnp.int32))
    cache = cache.append(key, value, 0, chunk)
    mean = functools.partial(fsa_jax.compress, kernel_size=32, kernel_stride=16, method="mean")
    cache = cache.append_compressed(key, value, 0, chunk, lambda x, _: mean(x), mean)
    last = Chunk(jnp.asarray([[LENGTH - 1], [0]], jnp.int32), jnp.asarray([[True], [False]]))
    attend = jax.jit(functools.partial(decode_step.attend, scale=0.1, interpret=INTERPRET))
    return attend(query[:, -1:], cache.advance(chunk), last, 0)


def planted():
    def kernel(x_ref, out_ref):
        place = jax.lax.iota(jnp.int32, 16)
        plgpu.store(out_ref.at[place], plgpu.load(x_ref.at[2**24 + place]))

    params, shape = plgpu.CompilerParams(num_warps=1), jax.ShapeDtypeStruct((16,), jnp.float32)
    read = pl.pallas_call(kernel, out_shape=shape, compiler_params=params, interpret=INTERPRET)
    return read(jnp.ones(16))


CASES = {
    **{name: functools.partial(selection, name) for name in METHODS},
    "operator": operator,
    "hopper": hopper,
    "decoding": decoding,
    "planted": planted,
}


if __name__ == "__main__":
    jax.block_until_ready(CASES[sys.argv[1]]())
