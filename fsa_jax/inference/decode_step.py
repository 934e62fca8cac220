"""A decoding step: the three branches for queries whose keys and values are already in the cache.

A step makes three passes over memory, each split over the whole GPU by the kernels of
`fsa_jax.pallas.decode`: the compressed keys of all windows with their values, whose logits choose
the blocks; the chosen blocks; and the tokens of the window. A query reads K*(D + E) elements for
each of T/d windows, S*p tokens of blocks and window_size tokens, instead of for each of T tokens.
The logits of the compressed keys, 8*N*T/d bytes written and read, stay in L2.

Shapes: B sequences, n queries of each, N query heads, K key/value heads, E head width of values, T
tokens of a sequence, d kernel_stride, p block_size, S selected blocks.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fsa_jax.inference.kv_cache import Chunk
from fsa_jax.inference.nsa_cache import NSACache
from fsa_jax.pallas.decode import attention, selection

type Branches = tuple[Float[Array, "B n N E"], Float[Array, "B n N E"], Float[Array, "B n N E"]]


def attend(
    query: Float[Array, "B n N D"],
    cache: NSACache,
    chunk: Chunk,
    layer: int | Int[Array, ""],
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Branches, Int[Array, "B n K S"]]:
    """Computes the attention outputs of the three branches, and the selected blocks.

    Args:
      query: queries after RoPE.
      cache: holds the keys and values of all tokens up to and including those of the queries.
      chunk: positions of the queries; the results of queries that are not valid are 0.
      layer: number of the layer.
      scale: factor of the logits.
      interpret: whether to run the kernels in interpret mode.

    Returns:
      (compressed, selected, window) in the dtype of `query`, and the lists of selected blocks.
    """
    config, pages = cache.config, cache.pages(layer)
    kv_heads = cache.key.shape[2]
    options = {"scale": scale, "interpret": interpret}
    last = jnp.where(chunk.valid, chunk.position, -1)
    zeros, visible = jnp.zeros_like(last), cache.windows_before(last + 1)
    compressed, lse, logits = attention.range_attention(
        query, cache.compressed_key, cache.compressed_value, pages, zeros, visible,
        logits=True, **options,
    )  # fmt: skip
    assert logits is not None
    own = last // config.block_size  # -1 for a query that is not valid
    blocks = selection.select_blocks(
        logits, lse, visible, own, config=config, kv_heads=kv_heads, interpret=interpret
    )
    selected, _ = attention.block_attention(
        query, cache.key, cache.value, pages, blocks, last, **options
    )
    key, value = cache.window_pools
    low = jnp.maximum(last - (config.window_size - 1), 0)
    most = config.window_size + query.shape[1] - 1  # a sequence's queries are adjacent
    window, _, _ = attention.range_attention(
        query, key, value, pages, low, last + 1, most=most, **options
    )
    return (compressed, selected, window), blocks
