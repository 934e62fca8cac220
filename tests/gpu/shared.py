"""Markers, dirty memory and segment ids of the tests on an NVIDIA GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = [
    pytest.mark.gpu,
    # jax warns about the backend of the kernels.
    pytest.mark.filterwarnings("ignore:.*Pallas Triton backend.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def dirty_memory():
    """Fills the memory that the allocator will hand out next with NaN."""
    assert jax.devices()[0].platform == "gpu", "these tests need an NVIDIA GPU"
    dirt = [jnp.full(size, jnp.nan) for size in (2**10, 2**16, 2**20, *[2**26] * 8)]
    jax.block_until_ready(dirt)


def segments(length):
    """Returns ids of documents of many lengths, including one token, and padding."""
    rng = np.random.default_rng(0)
    ids = np.repeat(rng.integers(0, 4, 99), rng.choice([1, 7, 64, 300], 99))[:length]
    return jnp.asarray(ids, jnp.int32)[None]
