"""How blocks are chosen: scores from the softmax of compressed keys, ranks, the best of them.

A query takes the forced blocks of its document, the first and the last ones, and then those of the
highest scores. Ranks are integers in which both are one order: kernels that choose by themselves
follow the same rule.

Shapes: B batch, K key/value heads, G query heads of a key head, Q queries, M compressed windows of
a document, J blocks, S chosen blocks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fsa_jax.config import NSAConfig


def group_weights(
    logits: Float[Array, "B K G Q M"], lse: Float[Array, "B K G Q"], sees: Bool[Array, "B Q M"]
) -> Float[Array, "B K Q M"]:
    """Weights of the compressed keys, summed over the heads of a group; 0 where they are hidden."""
    lse = jnp.where(jnp.isneginf(lse), 0, lse)[..., None]
    return jnp.where(sees[:, None], jnp.exp(logits - lse).sum(axis=2), 0)


def block_ranks(
    p: Float[Array, "B K Q M"], own: Int[Array, "B #K Q"], blocks: int, config: NSAConfig
) -> Int[Array, "B K Q J"]:
    """What blocks are chosen by: the largest ranks, equal ones by number, none below 0.

    Args:
      p: weights of the windows of a document, from its first one on.
      own: the block of each query, -1 for none.
      blocks: their number J.
      config: what is selected.
    """
    score = _fold(p, blocks, config)
    block = jnp.arange(blocks, dtype=jnp.int32)[None, None, None]
    own = own[..., None]
    # The bits of a float >= 0 order like the number, so one integer holds score and priority.
    integer = jnp.int32 if score.dtype == jnp.float32 else jnp.int64
    largest = jnp.iinfo(integer).max
    bits = jax.lax.bitcast_convert_type(score, integer)
    forced = (block < config.init_blocks) | (block > own - config.local_blocks)
    return jnp.where(block > own, -1, jnp.where(forced, largest, jnp.clip(bits, 0, largest - 1)))


def take_best(rank: Int[Array, "B K Q J"], topk: int) -> Int[Array, "B K Q S"]:
    """The `topk` blocks of the largest ranks, ascending; -1 at the tail."""
    blocks = rank.shape[-1]
    kept = min(topk, blocks)
    rank, best = jax.lax.top_k(rank, kept)  # of equal ones, the lower index comes first
    chosen = jnp.sort(jnp.where(rank >= 0, best.astype(jnp.int32), blocks), axis=-1)
    chosen = jnp.where(chosen < blocks, chosen, -1)
    return jnp.pad(chosen, ((0, 0), (0, 0), (0, 0), (0, topk - kept)), constant_values=-1)


def _fold(p: Float[Array, "B K Q M"], blocks: int, config: NSAConfig) -> Float[Array, "B K Q J"]:
    """Scores of blocks: each window counts by the units of kernel_stride that it shares."""
    per_window = config.kernel_size // config.kernel_stride
    per_block = config.block_size // config.kernel_stride
    before = per_window - 1
    after = max(0, blocks * per_block - p.shape[-1])
    padded = jnp.pad(p, ((0, 0), (0, 0), (0, 0), (before, after)))
    score = jnp.zeros((), p.dtype)
    for offset in range(-before, per_block):  # window j*per_block + offset against block j
        shared = min(offset + per_window, per_block) - max(offset, 0)
        column = before + offset
        score = score + shared * padded[..., column : column + blocks * per_block : per_block]
    return score
