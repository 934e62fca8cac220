"""Block selection in decoding, from the logits that attention to the compressed keys returns.

Shapes: B sequences, n queries of each, N query heads, K key/value heads, M compressed keys, J
blocks, S selected blocks.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from fsa_jax.config import NSAConfig
from fsa_jax.pallas.intrinsics import call, iota, load, store
from fsa_jax.pallas.tile_sizes import LARGEST, next_power_of_two
from fsa_jax.semantics.selection_rule import block_ranks, group_weights, take_best

#: Most blocks that one program can choose from, since their ranks stay in registers.
MOST_BLOCKS = 16384


def select_blocks(
    logits: Float[Array, "B n N M"],
    lse: Float[Array, "B n N"],
    visible: Int[Array, "B n"],
    own: Int[Array, "B n"],
    *,
    config: NSAConfig,
    kv_heads: int,
    interpret: bool = False,
) -> Int[Array, "B n K S"]:
    """The blocks that each query and KV head selects, by the rule of `semantics.selection_rule`.

    XLA sums the weights and turns them into ranks of the J = M / (p/d) blocks, where a block is p
    and a stride d tokens long. One program of a kernel then selects the blocks of a list without a
    sort, one round for each of the S slots, with all ranks in registers. Bytes:
    4*B*n*(N*M + 2*K*J) and the lists, all of which stay in L2.

    Args:
      logits: logits of the compressed keys from `range_attention`; M must cover whole blocks.
      lse: logsumexp from `range_attention`.
      visible: int32, number of compressed keys that a query attends to, from the first one on.
      own: int32, the block of each query; -1 for none.
      config: the configuration of the selection.
      kv_heads: K.
      interpret: run the kernel in interpret mode.

    Returns:
      int32 block numbers, ascending, -1 at unused entries.
    """
    blocks = logits.shape[3] // (config.block_size // config.kernel_stride)
    grouped = rearrange(logits, "b q (k g) m -> b k g q m", k=kv_heads)
    lse = rearrange(lse, "b q (k g) -> b k g q", k=kv_heads)
    window = jnp.arange(logits.shape[3], dtype=jnp.int32)[None, None]
    p = group_weights(grouped, lse, window < visible[..., None])
    rank = block_ranks(p, own[:, None], blocks, config)
    if blocks > MOST_BLOCKS:
        best = take_best(rank, config.topk)
    else:
        best = _take_best(rank, config.topk, interpret)
    return rearrange(best, "b k q s -> b q k s")


def _take_best(rank, topk: int, interpret: bool):
    """`take_best` as a kernel."""
    *rows, blocks = rank.shape
    count = rows[0] * rows[1] * rows[2]
    width = next_power_of_two(blocks)

    def take_best_kernel(rank_ref, best_ref):
        row = pl.program_id(0)
        block, s = iota(width), iota(next_power_of_two(topk))
        ranks = load(rank_ref.at[row, block], mask=block < blocks, other=-1)

        def take(i, state):
            ranks, chosen = state
            best = jnp.max(ranks)
            at = jnp.min(jnp.where(ranks == best, block, LARGEST))
            chosen = jnp.where((s == i) & (best >= 0), at, chosen)
            return jnp.where(block == at, -1, ranks), chosen

        chosen = jnp.full(s.shape, LARGEST, jnp.int32)
        _, chosen = jax.lax.fori_loop(0, topk, take, (ranks, chosen))
        # each block is placed after the smaller ones; slots without a block keep their order
        before = chosen[None, :] < chosen[:, None]
        before |= (chosen[None, :] == chosen[:, None]) & (s[None, :] < s[:, None])
        place = jnp.sum(before.astype(jnp.int32), axis=1)
        chosen = jnp.where(chosen == LARGEST, -1, chosen)
        store(best_ref.at[row, place], chosen, mask=place < topk)

    best = call(
        take_best_kernel,
        rank.reshape(count, blocks),
        grid=(count,),
        out_shape=jax.ShapeDtypeStruct((count, topk), jnp.int32),
        interpret=interpret,
        num_warps=min(max(width // 1024, 1), 16),
        num_stages=1,
    )
    return best.reshape(*rows, topk)
