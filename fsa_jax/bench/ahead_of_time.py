"""Compiles for GPUs on a machine without one; this needs the CUDA plugin of jax, but no driver.

XLA accepts the description of a device instead of the device. The result holds the PTX of every
kernel and the buffers of the whole program. The only difference from a compilation on the device is
that XLA's own sort kernels take the place of calls to CUB.
"""

import contextlib
import functools
import math
import re
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import fsa_jax
from fsa_jax.inference.decode_step import attend
from fsa_jax.inference.kv_cache import Chunk
from fsa_jax.inference.nsa_cache import NSACache

_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {core_shared}  threads_per_core_limit: {core_threads}
  core_count: {cores}  fpus_per_core: {core_units}  clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth}  l2_cache_size: {cache}  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""

_HOPPER = {
    "major": 9, "minor": 0, "shared": 232448, "core_shared": 233472, "core_threads": 2048,
    "cores": 132, "core_units": 128, "clock": 1.98, "cache": 52428800,
}  # fmt: skip

#: The properties of each device that XLA needs.
TARGETS = {
    "A100": {
        "name": "NVIDIA A100-SXM4-80GB", "major": 8, "minor": 0, "shared": 166912,
        "core_shared": 167936, "core_threads": 2048, "cores": 108, "core_units": 64, "clock": 1.41,
        "cache": 41943040, "bandwidth": 2039040000000, "memory": 85100068864,
    },
    "L40": {
        "name": "NVIDIA L40", "major": 8, "minor": 9, "shared": 101376, "core_shared": 102400,
        "core_threads": 1536, "cores": 142, "core_units": 128, "clock": 2.49,
        "cache": 100663296, "bandwidth": 864000000000, "memory": 48000000000,
    },
    "H100": _HOPPER | {
        "name": "NVIDIA H100 80GB HBM3", "bandwidth": 3352320000000, "memory": 84942979072,
    },
    "H200": _HOPPER | {
        "name": "NVIDIA H200", "bandwidth": 4800000000000, "memory": 150754820096,
    },
    "B200": _HOPPER | {
        "name": "NVIDIA B200", "major": 10, "cores": 148, "clock": 1.965, "cache": 132644864,
        "bandwidth": 7672320000000, "memory": 191514411008,
    },
}  # fmt: skip

#: The optimisation level gives the code that a user gets. The tests otherwise use a lower level, at
#: which ptxas also takes twice as long. Autotuning is off, since there is no device to measure
#: matmuls on, and XLA would compile several candidates of each only to take one.
OPTIONS = {"xla_backend_optimization_level": 3, "xla_gpu_autotune_level": 0}


def mesh_of(device, sizes=(1,), names=("gpu",)):
    """A mesh of GPUs of one host; `device` names a GPU in TARGETS."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=_CONFIG.format(**TARGETS[device]),
        topology=f"1x1x{math.prod(sizes)}",
    )
    return topologies.make_mesh(topology, sizes, names)


def lower_for(device, function, *shapes, **options):
    """Lowers a function of arrays for a GPU named in TARGETS.

    Args:
      device: name of the GPU.
      function: the function to lower; a jitted function keeps its donations.
      *shapes: jax.ShapeDtypeStruct of each argument, or trees of them.
      **options: options of jax.stages.Traced.lower.
    """
    mesh = mesh_of(device)
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), warnings.catch_warnings():
        # jax warns at each kernel that its Triton backend will move to another package
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        jitted = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
        return jitted.trace(*shapes).lower(**options)


def compile_for(device, function, *shapes, compiler_options=None):
    """Compiles a function of arrays for a GPU; the arguments are as in `lower_for`."""
    lowered = lower_for(device, function, *shapes)
    # Kernels are lowered after XLA has partitioned the program, and then query the target GPU.
    with jax.sharding.use_abstract_mesh(mesh_of(device).abstract_mesh):
        return lowered.compile(OPTIONS | (compiler_options or {}))


@contextlib.contextmanager
def empty_kernels():
    """Replaces kernels by empty ones, to inspect the surrounding program in under half the time.

    XLA sees only the name, operands and results of a kernel, which stay the same, so the memory and
    the calls of the program do not change.
    """

    def emptied(make):
        def call(kernel, *arguments, **options):
            def nothing(*_):
                pass

            nothing.__name__ = kernel.__name__
            return make(nothing, *arguments, **options)

        return call

    # traces with real kernels must not be reused here, nor traces made here elsewhere
    jax.clear_caches()
    try:
        with (
            mock.patch.object(pl, "pallas_call", emptied(pl.pallas_call)),
            mock.patch.object(pl, "kernel", emptied(pl.kernel)),
        ):
            yield
    finally:
        jax.clear_caches()


def custom_calls(text):
    """The names of the custom calls in a program in StableHLO or HLO.

    `AllocateBuffer` is excluded, since it calls nothing: it is the memory of `jax.lax.empty`.
    """
    found = re.findall(r'custom_call(?: @|_target=")([\w.$]+)', text)
    return [name for name in found if name != "AllocateBuffer"]


def selected_gradients(shape, *, dtype=jnp.bfloat16, packed=False, **arguments):
    """Selected attention with its gradients, and the shapes of its arguments.

    Args:
      shape: a `shapes.Shape`.
      dtype: dtype of queries, keys and values.
      packed: whether the function also takes segment_ids.
      **arguments: further arguments of `fsa_jax.selected_attention`.
    """

    def run(query, key, value, dout, indices, segment_ids=None):
        def attend(query, key, value):
            return fsa_jax.selected_attention(
                query,
                key,
                value,
                indices,
                block_size=shape.block_size,
                segment_ids=segment_ids,
                **arguments,
            )

        out, pullback = jax.vjp(attend, query, key, value)
        return out, pullback(dout)

    out = (*shape.query[:3], shape.value_width)
    floats = [jax.ShapeDtypeStruct(x, dtype) for x in (shape.query, shape.key, shape.value, out)]
    ids = [jax.ShapeDtypeStruct(shape.query[:2], jnp.int32)] if packed else []
    return run, *floats, jax.ShapeDtypeStruct(shape.indices, jnp.int32), *ids


def compressed_gradients(shape, *, dtype=jnp.bfloat16, **arguments):
    """Compressed attention with its gradients, and the selection; see `selected_gradients`."""
    config = config_of(shape)
    windows = {"kernel_size": config.kernel_size, "kernel_stride": config.kernel_stride}

    def run(query, key, value, dout):
        def attend(query, key, value):
            return fsa_jax.compressed_attention(
                query, key, value, **windows, return_residuals=True, **arguments
            )

        (out, lse), pullback = jax.vjp(attend, query, key, value)
        blocks = fsa_jax.select_blocks(query, key, lse, config=config, **arguments)
        return out, pullback((dout, jnp.zeros_like(lse))), blocks

    key, value = compressed_shapes(shape, config)
    floats = (shape.query, key, value, (*shape.query[:3], shape.value_width))
    return run, *(jax.ShapeDtypeStruct(x, dtype) for x in floats)


def config_of(shape):
    """The default configuration with the block size and the slots of a shape."""
    few = shape.slots < 3
    return fsa_jax.NSAConfig(
        block_size=shape.block_size,
        topk=shape.slots,
        init_blocks=0 if few else 1,
        local_blocks=1 if few else 2,
    )


def compressed_shapes(shape, config):
    slots = shape.length // config.kernel_stride
    return ((x[0], slots, *x[2:]) for x in (shape.key, shape.value))


def operator_gradients(shape, *, dtype=jnp.bfloat16, packed=False, **arguments):
    """The whole operator with its gradients, and the shapes of its arguments.

    The arguments are as in `selected_gradients`.
    """
    config = config_of(shape)

    def run(query, key, value, compressed_key, compressed_value, gates, dout, segment_ids=None):
        def attend(*arrays):
            return fsa_jax.native_sparse_attention(
                *arrays, config=config, segment_ids=segment_ids, **arguments
            )

        arrays = (query, key, value, compressed_key, compressed_value, gates)
        out, pullback = jax.vjp(attend, *arrays)
        return out, pullback(dout)

    compressed = compressed_shapes(shape, config)
    gates, out = (*shape.query[:3], 3), (*shape.query[:3], shape.value_width)
    floats = (shape.query, shape.key, shape.value, *compressed, gates, out)
    ids = [jax.ShapeDtypeStruct(shape.query[:2], jnp.int32)] if packed else []
    return run, *(jax.ShapeDtypeStruct(x, dtype) for x in floats), *ids


def decode_step(
    *, length, heads, kv_heads, width=128, batch=1, tokens=1, layers=1, dtype=jnp.bfloat16
):
    """A decoding step in one layer, and its argument shapes; `length` is the cache's capacity."""
    cache = jax.eval_shape(
        functools.partial(
            NSACache.init,
            batch,
            length,
            config=fsa_jax.NSAConfig(),
            num_kv_heads=kv_heads,
            head_dim=width,
            dtype=dtype,
            layers=layers,
        )
    )
    run = functools.partial(attend, scale=width**-0.5)
    query = jax.ShapeDtypeStruct((batch, tokens, heads, width), dtype)
    chunk = jax.eval_shape(
        lambda: Chunk(*(jnp.zeros((batch, tokens), dtype) for dtype in (jnp.int32, jnp.bool)))
    )
    return run, query, cache, chunk, jax.ShapeDtypeStruct((), jnp.int32)
