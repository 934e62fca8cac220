"""Native sparse attention of new tokens to a cache, the portable implementation.

A query at position t of its sequence sees the windows, blocks and tokens that the definition gives
it, whatever the call is that brings it. So every branch is an attention to ranges of cached
entries, or to blocks of them, and the loops of `xla.py` serve it.

Shapes: B sequences, n tokens of a chunk, N query heads, K key/value heads, D and E head widths.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fsa_jax import xla
from fsa_jax.cache import Chunk, NSACache


def attend(
    query: Float[Array, "B n N D"],
    cache: NSACache,
    chunk: Chunk,
    layer: int | Array,
    *,
    scale: float,
) -> tuple[Float[Array, "B n N E"], Float[Array, "B n N E"], Float[Array, "B n N E"]]:
    """The compressed, selected and window branch of queries whose keys are in the cache.

    Args:
      query: after RoPE.
      cache: with the keys and values of the chunk.
      chunk: where the queries stand.
      layer: number of the layer.
      scale: factor of the logits.
    """
    config, position, valid = cache.config, chunk.position, chunk.valid
    nothing = jnp.zeros_like(position)
    seen = (position - config.kernel_size + 1 + config.kernel_stride) // config.kernel_stride
    windows = jnp.where(valid, jnp.maximum(seen, 0), 0)
    compressed_key = cache.read(cache.compressed_key, layer)
    compressed_value = cache.read(cache.compressed_value, layer)
    compressed, lse = xla.range_attention(
        query, compressed_key, compressed_value, (nothing, windows), scale=scale, name="compressed"
    )
    own = jnp.where(valid, position // config.block_size, -1)
    blocks = xla.best_blocks(
        query, compressed_key, lse, nothing, windows, own,
        packed=False, blocks=config.num_blocks(cache.capacity), config=config, scale=scale,
    )  # fmt: skip
    key, value = cache.read(cache.key, layer), cache.read(cache.value, layer)
    starts = jnp.where(blocks >= 0, blocks * config.block_size, cache.capacity)
    last = jnp.where(valid, position, -1)
    selected, _ = xla.block_attention(
        query, key, value, starts, last, block_size=config.block_size, scale=scale
    )
    if cache.window_key is not None and cache.window_value is not None:
        key, value = cache.read(cache.window_key, layer), cache.read(cache.window_value, layer)
    low = jnp.maximum(position - (config.window_size - 1), 0)
    high = jnp.where(valid, position + 1, low)
    window, _ = xla.range_attention(query, key, value, (low, high), scale=scale, name="window")
    return compressed, selected, window
