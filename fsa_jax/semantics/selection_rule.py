"""How blocks are chosen: scores from attention to compressed keys, ranks, and the top k of them.

A query takes the forced blocks of its document (the first and the last ones), and then the blocks
with the highest scores. An integer rank combines both into one order. The selection kernels follow
the same rule.

Shapes: B batch, K key/value heads, G query heads of a key head, Q queries, M compressed windows of
a document, J blocks, S chosen blocks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fsa_jax.config import NSAConfig


def longest_document(queries: int, windows: int, config: NSAConfig) -> int:
    """The most tokens of a document of which there are so many queries and compressed windows."""
    if queries // config.kernel_stride == windows:
        return queries
    # the queries are a part of the sequence, whose M windows are fewer than M + 1 strides
    return (windows + 1) * config.kernel_stride - 1


def group_weights(
    logits: Float[Array, "B K G Q M"], lse: Float[Array, "B K G Q"], sees: Bool[Array, "B Q M"]
) -> Float[Array, "B K Q M"]:
    """Softmax weights of the compressed keys, summed over a group's heads; 0 where masked."""
    lse = jnp.where(jnp.isneginf(lse), 0, lse)[..., None]
    return jnp.where(sees[:, None], jnp.exp(logits - lse).sum(axis=2), 0)


def block_ranks(
    p: Float[Array, "B K Q M"], own: Int[Array, "B #K Q"], blocks: int, config: NSAConfig
) -> Int[Array, "B K Q J"]:
    """Ranks of the blocks, of which the largest are chosen.

    Among equal ranks the lower block number is chosen first; negative ranks are never chosen.

    Args:
      p: weights of the windows of a document, starting with its first window.
      own: the block that contains each query, or -1 for padding.
      blocks: the number of blocks J.
      config: the sizes of the selection.
    """
    score = _fold(p, blocks, config)
    block = jnp.arange(blocks, dtype=jnp.int32)[None, None, None]
    own = own[..., None]
    # The bits of floats >= 0 sort like the floats, so one integer holds score and priority.
    integer = jnp.int32 if score.dtype == jnp.float32 else jnp.int64
    largest = jnp.iinfo(integer).max
    bits = jax.lax.bitcast_convert_type(score, integer)
    forced = (block < config.init_blocks) | (block > own - config.local_blocks)
    return jnp.where(block > own, -1, jnp.where(forced, largest, jnp.clip(bits, 0, largest - 1)))


def take_best(rank: Int[Array, "B K Q J"], topk: int) -> Int[Array, "B K Q S"]:
    """The `topk` blocks with the largest ranks, in ascending order and padded with -1."""
    blocks = rank.shape[-1]
    kept = min(topk, blocks)
    rank, best = jax.lax.top_k(rank, kept)  # of equal ranks, the lower index comes first
    chosen = jnp.sort(jnp.where(rank >= 0, best.astype(jnp.int32), blocks), axis=-1)
    chosen = jnp.where(chosen < blocks, chosen, -1)
    return jnp.pad(chosen, ((0, 0), (0, 0), (0, 0), (0, topk - kept)), constant_values=-1)


def _fold(p: Float[Array, "B K Q M"], blocks: int, config: NSAConfig) -> Float[Array, "B K Q J"]:
    """Block scores: each window is weighted by the number of strides it shares with the block."""
    per_window = config.kernel_size // config.kernel_stride
    per_block = config.block_size // config.kernel_stride
    before = per_window - 1
    after = max(0, blocks * per_block - p.shape[-1])
    padded = jnp.pad(p, ((0, 0), (0, 0), (0, 0), (before, after)))
    score = jnp.zeros((), p.dtype)
    for offset in range(-before, per_block):  # window j*per_block + offset and block j
        shared = min(offset + per_window, per_block) - max(offset, 0)
        column = before + offset
        score = score + shared * padded[..., column : column + blocks * per_block : per_block]
    return score
