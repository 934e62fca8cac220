"""The kernels of block selection compile for their GPUs, in memory linear in the tokens."""

import jax
import jax.numpy as jnp
import pytest
from pallas.selection import kernel

from fsa_jax import NSAConfig
from fsa_jax.bench.ahead_of_time import compile_for

pytestmark = pytest.mark.compile


@pytest.mark.parametrize(
    ("device", "length", "packed"), [("A100", 777, True), ("H200", 1, False), ("H200", 2**20, True)]
)
def test_compiles(device, length, packed):
    config = NSAConfig(kernel_size=1, kernel_stride=1) if length == 1 else NSAConfig()
    shapes = [
        jax.ShapeDtypeStruct((1, length, 12, 80), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, length // config.kernel_stride, 4, 80), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, length, 12), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    ]

    def select_blocks(query, key, lse, ids):
        capability = {"A100": 80, "H200": 90}[device]
        ids = ids if packed else None
        return kernel(query, key, lse, ids, config, interpret=False, capability=capability)

    found = compile_for(device, select_blocks, *shapes).memory_analysis()
    assert found is not None
    # the ranks of a chunk, and the arrays that are linear in the tokens: documents and lists
    assert found.temp_size_in_bytes <= 2**29 + length * 4 * 80
