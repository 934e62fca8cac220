"""The choice of the blocks that each query attends to.

Shapes: B batch, T tokens of a sequence, N query heads, K key/value heads, G = N/K, D head width,
M = T // d compressed windows, d kernel_stride. The batch axis B may be left out, of all arrays of a
call together.
"""

import jax
from jaxtyping import Array, Float, Int, Integer

from fsa_jax import reference
from fsa_jax.arguments import checks
from fsa_jax.arguments.types import AnyArray, FloatLike, Implementation, IntegerList, IntLike
from fsa_jax.config import NSAConfig
from fsa_jax.ops import block_selection
from fsa_jax.ops.block_selection import SelectionSpec
from fsa_jax.ops.call import Backend
from fsa_jax.ops.dispatch import Request, check_name, resolve
from fsa_jax.ops.partition import partitions_itself


@partitions_itself(query="t n d", compressed_key="m k d", lse="t n", segment_ids="t")
def select_blocks(
    query: Float[AnyArray, "*B T N D"],
    compressed_key: Float[AnyArray, "*B M K D"],
    lse: Float[AnyArray, "*B T N"],
    *,
    config: NSAConfig,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
) -> Int[Array, "*B T K topk"]:
    """Chooses the blocks that each query attends to, from the compressed attention.

    With p[i] = exp(scale * q . k[i] - lse) of the visible windows, summed over the G heads of a
    group in float32, ::

        score[j] = sum over windows i of p[i] * (strides of d tokens that i shares with block j)

    A query at position t chooses among the blocks 0 .. t // block_size: first the forced ones (the
    first `init_blocks` and the last `local_blocks`), then those with the highest scores; between
    equal scores the lower block number wins. No gradient flows through the choice.

    Args:
      query: [B, T, N, D], floating.
      compressed_key: [B, M, K, D] as `compress` lays it out, in the dtype of `query`.
      lse: [B, T, N], the residual of `compressed_attention` on the same query and key.
      config: the sizes.
      scale: factor of the logits, by default D ** -0.5.
      segment_ids: integers [B, T], equal ids in a run are one document.
      padding_id: the segment id of padding; all other ids are at least 0.
      implementation: "triton", "mosaic_gpu", "triton_interpret", "xla", "reference"; None: best.

    Returns:
      int32 [B, T, K, topk]: block numbers, counted from the start of the query's own document, in
      ascending order; unused entries at the end are -1.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
      NotImplementedError: the named implementation cannot serve the call.

    Example:
      >>> import jax.numpy as jnp, fsa_jax
      >>> config = fsa_jax.NSAConfig(kernel_size=8, kernel_stride=4, block_size=16, topk=4)
      >>> q, k, lse = jnp.ones((1, 64, 4, 8)), jnp.ones((1, 16, 2, 8)), jnp.zeros((1, 64, 4))
      >>> fsa_jax.select_blocks(q, k, lse, config=config)[0, 40, 0]
      Array([ 0,  1,  2, -1], dtype=int32)

    Source: NSA (arXiv 2502.11089), equations 8 to 12.
    """
    check_name(implementation)
    config = checks.config(config)
    query, key, _, has_batch = checks.attention_arrays(
        query, compressed_key, compressed_key, config.kernel_stride
    )
    segments = checks.segments(query, segment_ids, has_batch, padding_id)
    lse = checks.with_batch("lse", lse, "T N", has_batch)
    checks.same_axes("B T N", query=query, lse=lse)
    scale = checks.scale(scale, query.shape[-1])
    spec = SelectionSpec(scale=scale, config=config, packed=segments.packed)
    choice = resolve("select_blocks", implementation, Request(spec, (query, key)))
    query, key, lse = jax.lax.stop_gradient((query, key, lse))
    if choice.backend is Backend.REFERENCE:
        indices = reference.select_blocks(query, key, lse, segments, config=config, scale=scale)
    else:
        indices = block_selection.select_blocks(spec.on(choice.backend), query, key, lse, segments)
    indices = spec.named("block_indices", indices)
    return indices if has_batch else indices[0]
