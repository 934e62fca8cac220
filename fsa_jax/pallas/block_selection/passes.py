"""Block selection from kernels: scores of the blocks, then the best of them.

A query takes the first `init_blocks` and the last `local_blocks` blocks of its document whatever
they score, and free = topk - init_blocks - local_blocks more by score. If it has no more than topk
blocks it takes them all: such an easy query needs no scores. Any other has all the forced blocks,
and they do not overlap, so `free` is one number for all.

Dataflow, for each chunk of (row, KV head) pairs and tokens: `rank_blocks` writes the ranks of all
blocks, `choose_blocks` takes the best of them. Bytes: ranks are written once, 4 * T*K * J/2, and
free * BLOCKS of J read again.

Shapes: B rows of the batch, T tokens, N query heads, K key/value heads, M window slots, J blocks of
a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fsa_jax.config import NSAConfig
from fsa_jax.pallas.block_selection.choose_kernel import choose_blocks
from fsa_jax.pallas.block_selection.plan import SelectPlan
from fsa_jax.pallas.block_selection.score_kernel import rank_blocks
from fsa_jax.semantics.segments import Rows, Windows


def select_blocks(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B M K D"],
    lse: Float[Array, "B T N"],
    rows: Rows,
    windows: Windows,
    *,
    config: NSAConfig,
    scale: float,
    plan: SelectPlan,
    interpret: bool,
) -> Int[Array, "B T K topk"]:
    """The topk blocks of each query and KV head.

    Args:
      query: float16, bfloat16 or float32.
      key: the compressed keys, M >= 1.
      lse: float32, natural logarithm, of the compressed attention; -inf where no window is seen.
      rows: the documents.
      windows: their compressed windows.
      config: what is selected.
      scale: factor of the logits.
      plan: `make_plan`.
      interpret: run the kernels in interpret mode.

    Returns:
      Block numbers, counted in the query's document, ascending, -1 at the tail and at padding.
    """
    batch, length, _, _ = query.shape
    kv_heads = key.shape[2]
    own = jnp.where(rows.valid, rows.position // config.block_size, -1)
    tokenwise = (own, windows.first, windows.visible)
    static = {"config": config, "plan": plan, "interpret": interpret}

    def step(lists, where):
        ranks, tops = rank_blocks(where, query, key, lse, *tokenwise, scale=scale, **static)
        return choose_blocks(where, own, ranks, tops, lists, **static), None

    lists = jnp.full((batch, length, kv_heads, config.topk), -1, jnp.int32)
    where = jnp.mgrid[0 : batch * kv_heads : plan.heads, 0 : length : plan.tokens]
    where = where.astype(jnp.int32).reshape(2, -1).T
    if where.shape[0] == 1:
        return step(lists, where[0])[0]
    return jax.lax.scan(step, lists, where)[0]
