"""Selection of blocks in decoding, from the logits that attention to the compressed keys leaves.

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

#: Most blocks of which one program chooses: their ranks stay in registers.
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

    Bytes: 4*B*n*(N*M + 2*K*J) and the lists, all of them in L2: XLA sums the weights and folds them
    into ranks of the J = M / (p/d) blocks, and one program of a kernel takes the best of a list
    without a sort: a round of it for each of the S slots, all ranks in registers.

    Args:
      logits: of the compressed keys, from `range_attention`; M of whole blocks.
      lse: likewise.
      visible: int32, how many compressed keys a query sees, from the first one on.
      own: int32, the block of each query; -1 for none.
      config: what is selected.
      kv_heads: K.
      interpret: run the kernel in interpret mode.

    Returns:
      int32 block numbers, ascending, -1 at the tail.
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
        # each goes behind those that are smaller; of the slots without a block, in their order
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
