"""Native sparse attention: the operator of all three branches, and their gated sum.

Shape legend: B batch, T tokens of a sequence, N query heads, K key/value heads, D head width of
query and key, E head width of value, M = T // d compressed windows, d kernel_stride. Query head n
uses key head n // (N/K). The batch axis B may be left out, of all arrays of a call together.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from fsa_jax.arguments import checks
from fsa_jax.arguments.types import AnyArray, FloatLike, Implementation, IntegerList, IntLike
from fsa_jax.config import NSAConfig
from fsa_jax.ops import gated_sum, nsa
from fsa_jax.ops.dispatch import check_name, resolve_over_tokens
from fsa_jax.ops.nsa import NSASpec
from fsa_jax.ops.partition import partitions_itself
from fsa_jax.semantics.precision import accumulation_dtype
from fsa_jax.semantics.segments import describe_segments
from fsa_jax.sequence_parallel import attention


@partitions_itself(
    query="t n d",
    key="t k d",
    value="t k e",
    compressed_key="m k d",
    compressed_value="m k e",
    gates="t n c",
    segment_ids="t",
)
def native_sparse_attention(
    query: Float[AnyArray, "*B T N D"],
    key: Float[AnyArray, "*B T K D"],
    value: Float[AnyArray, "*B T K E"],
    compressed_key: Float[AnyArray, "*B M K D"],
    compressed_value: Float[AnyArray, "*B M K E"],
    gates: Float[AnyArray, "*B T #N 3"],
    *,
    config: NSAConfig,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
    sequence_axis: str | None = None,
    checkpoint_name: str | None = None,
) -> Float[Array, "*B T N E"]:
    """Native sparse attention: compressed, selected and window attention, summed with gates.

    ::

        out = gates[0] * compressed + gates[1] * selected + gates[2] * window

    where the selected branch attends to the blocks that `select_blocks` chooses from the compressed
    attention. The sum is float32 (float64 for float64 inputs).

    Args:
      query: [B, T, N, D], floating, after RoPE.
      key: [B, T, K, D], after RoPE, in the dtype of `query`.
      value: [B, T, K, E], in the dtype of `query`.
      compressed_key: [B, M, K, D] from `compress`, then RoPE at `window_positions`.
      compressed_value: [B, M, K, E] from `compress`.
      gates: [B, T, N, 3], or [B, T, 1, 3] for one triple per token, floating.
      config: the sizes.
      scale: factor of the logits, by default D ** -0.5.
      segment_ids: integers [B, T], equal ids in a run are one document.
      padding_id: the segment id of padding; all other ids are at least 0.
      implementation: "triton", "mosaic_gpu", "triton_interpret", "xla", "reference"; None: best.
      sequence_axis: name of the mesh axis that splits the tokens of each sequence, for sequences
        that are too long for one device. All arrays of tokens are then in the order of `to_zigzag`,
        and `compressed_key` and `compressed_value` come from `compress` with the same axis. T is a
        multiple of 2 * devices * kernel_stride.
      checkpoint_name: name that outputs and logsumexps of the branches and the chosen blocks carry
        for remat policies, instead of `CHECKPOINT_NAMES`.

    Returns:
      [B, T, N, E] in the dtype of `query`; 0 at padding.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
      NotImplementedError: the named implementation cannot serve the call.

    Example:
      >>> import jax.numpy as jnp, fsa_jax
      >>> config = fsa_jax.NSAConfig(kernel_size=8, kernel_stride=4, block_size=16, topk=4)
      >>> q, k = jnp.ones((1, 64, 4, 8)), jnp.ones((1, 64, 2, 8))
      >>> ck = fsa_jax.compress(k, kernel_size=8, kernel_stride=4, method="mean")
      >>> gates = jnp.full((1, 64, 4, 3), 0.5)
      >>> fsa_jax.native_sparse_attention(q, k, k, ck, ck, gates, config=config).shape
      (1, 64, 4, 8)

    Source: NSA (arXiv 2502.11089), equation 5.
    """
    check_name(implementation)
    config = checks.config(config)
    return gated_attention(
        query,
        (compressed_key, compressed_value),
        ((key, value),),
        gates,
        config=config,
        scale=scale,
        segment_ids=segment_ids,
        padding_id=padding_id,
        implementation=implementation,
        sequence_axis=sequence_axis,
        checkpoint_name=checkpoint_name,
    )


def gated_attention(
    query, compressed, sources, gates, *,
    config, scale, segment_ids, implementation, sequence_axis, padding_id: IntLike = 0,
    checkpoint_name=None,
) -> Any:  # fmt: skip
    """`native_sparse_attention`, optionally with separate keys and values for the window.

    `sources` holds one pair of keys and values for the selected branch and the window, or a pair
    for each.
    """
    given, stride = query, config.kernel_stride
    query, compressed_key, compressed_value, has_batch = checks.attention_arrays(
        given, *compressed, kernel_stride=stride
    )
    sources = [checks.attention_arrays(given, *pair)[1:3] for pair in sources]
    for _, value in sources:
        checks.same_widths(value=value, compressed_value=compressed_value)
    gates = checks.gates(gates, query, has_batch)
    if gates.dtype == jnp.float64:  # neither the sum nor any kernel uses float64
        gates = gates.astype(accumulation_dtype(query))
    scale = checks.scale(scale, query.shape[-1])
    ids = checks.ids(segment_ids, query.shape[:2], has_batch, padding_id)
    segments = describe_segments(ids, *query.shape[:2])
    gates = segments.without_padding(gates)  # the branches mask their own arguments
    arrays = (query, (compressed_key, compressed_value), tuple(sources))
    options = {
        "packed": segments.packed,
        "checkpoint_name": checks.checkpoint_name(checkpoint_name),
    }
    if sequence_axis is not None:
        checks.sequence(sequence_axis, has_batch, query.shape[1], stride)
        tuning = attention.TUNING
        spec = NSASpec.of(config, scale, **options, tuning=tuning)
        requests = spec.requests(*arrays).values()
        choice = resolve_over_tokens(nsa.NAME, implementation, sequence_axis, *requests)
        spec = spec.on(choice.backend)
        return attention.attention(spec, *arrays, gates, ids, axis=sequence_axis)
    spec = NSASpec.of(config, scale, **options)
    out = nsa.attention(spec.resolved(implementation, *arrays), *arrays, gates, segments)
    return out if has_batch else out[0]


def combine_branches(
    gates: Float[AnyArray, "*B T #N 3"], *outs: Float[Array, "*B T N E"]
) -> Float[Array, "*B T N E"]:
    """The gated sum of the compressed, selected and window branch, in that order.

    Args:
      gates: [B, T, N, 3] or [B, T, 1, 3], floating.
      *outs: three arrays [B, T, N, E] of one dtype.

    Returns:
      [B, T, N, E] in the dtype of the branches; the sum itself is float32 or float64.

    Raises:
      ValueError: the gates have a wrong shape or dtype.
    """
    out = outs[0]
    has_batch = out.ndim == 4
    gates = checks.gates(gates, out if has_batch else out[None], has_batch)
    return gated_sum.combine(gates if has_batch else gates[0], outs)
