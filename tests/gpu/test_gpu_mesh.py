"""Two NVIDIA GPUs against one: results and step times of data, tensor and sequence parallelism."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from util import normal

import fsa_jax
from fsa_jax import from_zigzag, to_zigzag
from fsa_jax.bench.ahead_of_time import config_of, operator_gradients
from fsa_jax.bench.shapes import Shape

pytestmark = [
    pytest.mark.gpu,
    # jax warns about the backend of the kernels; on a mesh, it does so in an XLA callback.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SHAPE = Shape(
    batch=2, length=32768, heads=16, kv_heads=4, width=128, value_width=128, block_size=64, slots=16
)
#: How the query and the gates are split over an axis of two devices.
SPLITS = {
    "data": P("devices"),
    "tensor": P(None, None, "devices"),
    "sequence": P(None, "devices"),
}


@pytest.fixture(scope="module")
def mesh():
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    if len(gpus) < 2:
        pytest.fail(f"needs two GPUs, got {len(gpus)}")
    return jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,), devices=gpus[:2])


def arrays():
    """Returns inputs and the cotangent of the operator, without documents."""
    _, *shapes = operator_gradients(SHAPE)
    inputs = [normal(i, *x.shape, dtype=jnp.bfloat16) for i, x in enumerate(shapes)]
    # Use realistic compressed keys, each near the mean of its window's keys.
    sizes = {"kernel_size": 32, "kernel_stride": 16, "method": "mean"}
    inputs[3:5] = (fsa_jax.compress(x, **sizes) for x in inputs[1:3])
    return inputs


def step(sequence_axis, *inputs):
    *inputs, dout = inputs
    attend = functools.partial(
        fsa_jax.native_sparse_attention, config=config_of(SHAPE), sequence_axis=sequence_axis
    )
    out, pull = jax.vjp(attend, *inputs)
    return out, pull(dout)


def median_time(program, *inputs):
    times = []
    for _ in range(12):
        since = time.perf_counter()
        jax.block_until_ready(program(*inputs))
        times.append(time.perf_counter() - since)
    return float(np.median(times[2:]))


@functools.cache
def on_one():
    """Returns the results on one GPU, and the time of a step."""
    program = jax.jit(functools.partial(step, None))
    inputs = arrays()
    return jax.device_get(program(*inputs)), median_time(program, *inputs)


@pytest.mark.parametrize("split", SPLITS)
def test_two_gpus_compute_what_one_does(split, mesh):
    wanted, seconds = on_one()
    sequence = split == "sequence"
    inputs = arrays()
    if sequence:
        inputs = [to_zigzag(x, 2) for x in inputs]
    placed = jax.device_put(inputs, NamedSharding(mesh, SPLITS[split]))
    program = jax.jit(functools.partial(step, "devices" if sequence else None))
    got = jax.device_get(program(*placed))
    if sequence:
        got = jax.tree.map(lambda x: np.asarray(from_zigzag(jnp.asarray(x), 2)), got)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = a.astype(np.float32), b.astype(np.float32)
        # If scores tie up to rounding, only one run may select a block, which affects few queries.
        differs = np.abs(a - b) > 0.02 * np.abs(b).max()
        assert differs.mean() < 1e-3, (split, differs.mean())
    both = median_time(program, *placed)
    print(
        f"{split}: {1e3 * both:.2f} ms on two, {1e3 * seconds:.2f} ms on one, {both / seconds:.2f}"
    )
