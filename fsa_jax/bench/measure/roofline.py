"""The ceilings of a device: its fastest matrix product and copy, measured in each run."""

from typing import Any

import jax
import jax.numpy as jnp

from fsa_jax.bench.measure import timing

#: The side of the square matrices, and the bytes of the copied array.
SIDE, BYTES = 8192, 2**31


def measure(rounds: int, side: int = SIDE, size: int = BYTES) -> dict[str, Any]:
    """Measures the ceilings of this device.

    Args:
      rounds: number of timed rounds.
      side: side of the square matrices.
      size: bytes of the copied array.

    Returns:
      `flops` (flop/s of a product of random bfloat16 matrices) and `bytes` (bytes per second read
      and written by a pass over an array), both of the fastest round; `source`; and the samples of
      both, `matmul_ms` and `copy_ms`.
    """
    keys = jax.random.split(jax.random.key(0), 2)
    pairs = [tuple(jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys)]
    product = jax.jit(lambda a, b: a @ b).lower(*pairs[0]).compile()
    matmul = timing.measure(product, pairs, rounds)["samples_ms"]
    del pairs
    x = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1).lower(x).compile()  # XLA would elide a plain copy
    copied = timing.measure(copy, [(x,)], rounds)["samples_ms"]
    return {
        "flops": 1e3 * 2 * side**3 / min(matmul),
        "bytes": 1e3 * 2 * size / min(copied),
        "source": "measured in this run",
        "matmul_ms": matmul,
        "copy_ms": copied,
    }
