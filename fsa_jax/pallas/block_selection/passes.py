"""Block selection: computes scores of the blocks and selects the best of them.

A query always selects the first `init_blocks` and the last `local_blocks` blocks of its document
(the forced blocks), and free = topk - init_blocks - local_blocks more by score. A query that has at
most topk blocks selects all of them and needs no scores. Any other query has all forced blocks
without overlap, so `free` is the same for all of these.

Dataflow, for each chunk of (sequence, KV head) pairs and tokens: `rank_blocks` writes the ranks of
all blocks, and `choose_blocks` selects the best. Bytes: ranks are written once, 4 * T*K * J/2, and
free * BLOCKS of the J ranks are read again.

Shapes: B sequences, T tokens, N query heads, K key/value heads, M window slots, J blocks of a
sequence.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fsa_jax.config import NSAConfig
from fsa_jax.pallas.block_selection.choose_kernel import choose_blocks
from fsa_jax.pallas.block_selection.plan import SelectPlan
from fsa_jax.pallas.block_selection.score_kernel import rank_blocks
from fsa_jax.semantics.segments import SegmentInfo, Windows


def select_blocks(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B M K D"],
    lse: Float[Array, "B T N"],
    segments: SegmentInfo,
    windows: Windows,
    *,
    config: NSAConfig,
    scale: float,
    plan: SelectPlan,
    interpret: bool,
) -> Int[Array, "B T K topk"]:
    """Selects topk blocks for each query and KV head.

    Args:
      query: float16, bfloat16 or float32.
      key: the compressed keys, M >= 1.
      lse: float32, natural logarithm; logsumexp of compressed attention, -inf for a query without
        visible windows.
      segments: the documents of the sequences.
      windows: the compressed windows of the documents.
      config: the configuration of the selection.
      scale: factor of the logits.
      plan: result of `make_plan`.
      interpret: run the kernels in interpret mode.

    Returns:
      Block numbers relative to the query's document, ascending, -1 at unused entries and at
      padding.
    """
    batch, length, _, _ = query.shape
    kv_heads = key.shape[2]
    own = jnp.where(segments.valid, segments.position // config.block_size, -1)
    tokenwise = (own, windows.first, windows.visible)
    static = {"config": config, "plan": plan, "interpret": interpret}

    def step(block_indices, where):
        ranks, tops = rank_blocks(where, query, key, lse, *tokenwise, scale=scale, **static)
        return choose_blocks(where, own, ranks, tops, block_indices, **static), None

    block_indices = jnp.full((batch, length, kv_heads, config.topk), -1, jnp.int32)
    where = jnp.mgrid[0 : batch * kv_heads : plan.heads, 0 : length : plan.tokens]
    where = where.astype(jnp.int32).reshape(2, -1).T
    if where.shape[0] == 1:
        return step(block_indices, where[0])[0]
    return jax.lax.scan(step, block_indices, where)[0]
