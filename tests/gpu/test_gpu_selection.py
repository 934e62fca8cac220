"""Tests on a Hopper GPU of compressed attention and the selection in one pass.

`JAX_PLATFORMS=cuda python -m pytest -m gpu`; see test_gpu.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import assert_same_bits, normal

from fsa_jax import NSAConfig
from fsa_jax.ops.block_selection import SelectionSpec, choose_blocks
from fsa_jax.ops.call import Backend
from fsa_jax.ops.compressed_selection import attend_and_choose
from fsa_jax.ops.range_attention import Ranges, RangeSpec, range_forward
from fsa_jax.pallas import support
from fsa_jax.semantics import segments
from gpu.shared import dirty_memory, pytestmark

__all__ = ["dirty_memory", "pytestmark"]  # used by pytest
LENGTH = 6000


def operations(config, packed):
    """Functions of query, key and value that make one pass and two passes."""
    lengths = [5, 2500, 40, 1100, 2355] if packed else [LENGTH]
    ids = np.repeat([1, 2, 0, 3, 4] if packed else [1], lengths).astype(np.int32)[None]
    info = segments.describe_segments(jnp.asarray(ids) if packed else None, 1, LENGTH)
    windows = segments.describe_windows(info, config.kernel_size, config.kernel_stride)
    ranges = Ranges.of_windows(info, windows, config.kernel_size)
    attend = RangeSpec(backend=Backend.MOSAIC_GPU, scale=0.1, branch="compressed")
    choose = SelectionSpec(backend=Backend.MOSAIC_GPU, scale=0.1, config=config, packed=packed)

    def one(*arrays):
        return attend_and_choose(attend, choose, ranges, arrays, info, windows)

    def two(query, key, value):
        out, lse = range_forward(attend, ranges, query, key, value)
        return out, lse, choose_blocks(choose, query, key, lse, info, windows)

    return jax.jit(one), jax.jit(two)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("group", "sizes"), [(1, {}), (4, {"kernel_size": 64}), (16, {}), (64, {"block_size": 32})]
)
def test_one_pass_chooses_what_two_passes_choose(group, sizes, packed):
    """Scores that differ only by rounding may be in another order, which is rare."""
    if support.hopper_reason() is not None:
        return
    config = NSAConfig(**sizes)
    one, two = operations(config, packed)
    slots = LENGTH // config.kernel_stride
    query = normal(0, 1, LENGTH, 2 * group, 128, dtype=jnp.bfloat16)
    key, value = (normal(i, 1, slots, 2, 128, dtype=jnp.bfloat16) for i in (1, 2))
    assert "compressed_choose_kernel" in one.lower(query, key, value).as_text()
    out, lse, found = one(query, key, value)
    wanted_out, wanted_lse, wanted = two(query, key, value)
    assert jnp.mean(jnp.all(found == wanted, axis=-1)) > 0.9999
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-5)
    np.testing.assert_allclose(
        out.astype(jnp.float32), wanted_out.astype(jnp.float32), atol=2e-2, rtol=0
    )
    for _ in range(10):
        assert_same_bits(one(query, key, value), (out, lse, found))


def test_equal_scores_go_to_the_lower_blocks():
    if support.hopper_reason() is not None:
        return
    config = NSAConfig()
    one, _ = operations(config, packed=False)
    query = normal(0, 1, LENGTH, 8, 128, dtype=jnp.bfloat16)
    key = jnp.ones((1, LENGTH // 16, 2, 128), jnp.bfloat16)
    _, _, found = one(query, key, key)
    own = np.arange(LENGTH) // config.block_size
    many = own > config.topk
    lowest = np.broadcast_to(np.arange(14), (LENGTH, 14))
    wanted = np.concatenate([lowest, own[:, None] - 1, own[:, None]], axis=1)
    np.testing.assert_array_equal(found[0, many, 0], wanted[many])
