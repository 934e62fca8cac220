"""Attention of one branch: to compressed windows, to listed blocks, or to a sliding window.

Shapes: B batch, T tokens of a sequence, N query heads, K key/value heads, D head width of query and
key, E head width of value, S listed blocks per query, M = T // d compressed windows, l kernel_size,
d kernel_stride. The batch axis B may be left out, of all arrays of a call together.
"""

from typing import Any, Literal, overload

from jaxtyping import Array, Float, Integer

from fsa_jax import reference
from fsa_jax.arguments import checks
from fsa_jax.arguments.types import AnyArray, FloatLike, Implementation, IntegerList, IntLike
from fsa_jax.config import check_window
from fsa_jax.ops import block_attention, range_attention
from fsa_jax.ops.block_attention import BlockSpec
from fsa_jax.ops.call import Backend
from fsa_jax.ops.dispatch import Request, check_name, resolve
from fsa_jax.ops.partition import partitions_itself
from fsa_jax.ops.range_attention import RangeSpec
from fsa_jax.pallas import SelectedTuning


@overload
def compressed_attention(
    query: Float[AnyArray, "*B T N D"],
    compressed_key: Float[AnyArray, "*B M K D"],
    compressed_value: Float[AnyArray, "*B M K E"],
    *,
    kernel_size: IntLike,
    kernel_stride: IntLike,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
    return_residuals: Literal[False] = False,
    checkpoint_name: str | None = None,
) -> Float[Array, "*B T N E"]: ...


@overload
def compressed_attention(
    query: Float[AnyArray, "*B T N D"],
    compressed_key: Float[AnyArray, "*B M K D"],
    compressed_value: Float[AnyArray, "*B M K E"],
    *,
    kernel_size: IntLike,
    kernel_stride: IntLike,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
    return_residuals: Literal[True],
    checkpoint_name: str | None = None,
) -> tuple[Float[Array, "*B T N E"], Float[Array, "*B T N"]]: ...


@overload
def compressed_attention(
    query: Float[AnyArray, "*B T N D"],
    compressed_key: Float[AnyArray, "*B M K D"],
    compressed_value: Float[AnyArray, "*B M K E"],
    *,
    kernel_size: IntLike,
    kernel_stride: IntLike,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
    return_residuals: bool,
    checkpoint_name: str | None = None,
) -> Float[Array, "*B T N E"] | tuple[Float[Array, "*B T N E"], Float[Array, "*B T N"]]: ...


@partitions_itself(query="t n d", compressed_key="m k d", compressed_value="m k e", segment_ids="t")
def compressed_attention(
    query: Float[AnyArray, "*B T N D"],
    compressed_key: Float[AnyArray, "*B M K D"],
    compressed_value: Float[AnyArray, "*B M K E"],
    *,
    kernel_size: IntLike,
    kernel_stride: IntLike,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
    return_residuals: bool = False,
    checkpoint_name: str | None = None,
) -> Any:
    """Attention to the compressed windows that end at or before the query.

    With t the query's position in its document, ::

        out[t] = sum over i with i*d + l - 1 <= t of softmax_i(scale * q[t] . k[i]) * v[i]

    Args:
      query: [B, T, N, D], floating.
      compressed_key: [B, M, K, D] as `compress` lays it out, in the dtype of `query`.
      compressed_value: [B, M, K, E], in the dtype of `query`.
      kernel_size: tokens l of a window.
      kernel_stride: tokens d between the starts of windows.
      scale: factor of the logits, by default D ** -0.5.
      segment_ids: integers [B, T], equal ids in a run are one document.
      padding_id: the segment id of padding; all other ids are at least 0.
      implementation: "triton", "mosaic_gpu", "triton_interpret", "xla", "reference"; None: best.
      return_residuals: also return the logsumexp of the scaled logits.
      checkpoint_name: name that the results carry for remat policies; None: `CHECKPOINT_NAMES`.

    Returns:
      out [B, T, N, E] in the dtype of `query`, or (out, lse) with lse [B, T, N], natural log, in
      float32 (float64 for float64 inputs). A query that sees no window gets out 0 and lse -inf.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
      NotImplementedError: the named implementation cannot serve the call.

    Example:
      >>> import jax.numpy as jnp, fsa_jax
      >>> q, kv = jnp.ones((1, 64, 4, 8)), jnp.ones((1, 4, 2, 8))
      >>> out = fsa_jax.compressed_attention(q, kv, kv, kernel_size=32, kernel_stride=16)
      >>> out.shape, float(out[0, 0, 0, 0]), float(out[0, 63, 0, 0])
      ((1, 64, 4, 8), 0.0, 1.0)

    Source: NSA (arXiv 2502.11089), equation 7.
    """
    check_name(implementation)
    return_residuals = checks.flag("return_residuals", return_residuals)
    name = checks.checkpoint_name(checkpoint_name)
    kernel_size = checks.size("kernel_size", kernel_size)
    kernel_stride = checks.size("kernel_stride", kernel_stride)
    check_window(kernel_size, kernel_stride)
    query, key, value, has_batch = checks.attention_arrays(
        query, compressed_key, compressed_value, kernel_stride
    )
    segments = checks.segments(query, segment_ids, has_batch, padding_id)
    scale = checks.scale(scale, query.shape[-1])
    arrays, sizes = (
        (query, key, value),
        {"kernel_size": kernel_size, "kernel_stride": kernel_stride},
    )
    spec = RangeSpec(scale=scale, branch="compressed", checkpoint_name=name)
    choice = resolve("compressed_attention", implementation, Request(spec, arrays))
    if choice.backend is Backend.REFERENCE:
        result = spec.renamed(
            *reference.compressed_attention(*arrays, segments, **sizes, scale=scale)
        )
    else:
        spec = spec.on(choice.backend)
        result = range_attention.compressed_attention(spec, *arrays, segments, **sizes)
    return as_asked(result, has_batch, return_residuals)


@overload
def selected_attention(
    query: Float[AnyArray, "*B T N D"],
    key: Float[AnyArray, "*B T K D"],
    value: Float[AnyArray, "*B T K E"],
    block_indices: Integer[AnyArray, "*B T K S"],
    *,
    block_size: IntLike,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
    return_residuals: Literal[False] = False,
    checkpoint_name: str | None = None,
    tuning: SelectedTuning | None = None,
) -> Float[Array, "*B T N E"]: ...


@overload
def selected_attention(
    query: Float[AnyArray, "*B T N D"],
    key: Float[AnyArray, "*B T K D"],
    value: Float[AnyArray, "*B T K E"],
    block_indices: Integer[AnyArray, "*B T K S"],
    *,
    block_size: IntLike,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
    return_residuals: Literal[True],
    checkpoint_name: str | None = None,
    tuning: SelectedTuning | None = None,
) -> tuple[Float[Array, "*B T N E"], Float[Array, "*B T N"]]: ...


@overload
def selected_attention(
    query: Float[AnyArray, "*B T N D"],
    key: Float[AnyArray, "*B T K D"],
    value: Float[AnyArray, "*B T K E"],
    block_indices: Integer[AnyArray, "*B T K S"],
    *,
    block_size: IntLike,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
    return_residuals: bool,
    checkpoint_name: str | None = None,
    tuning: SelectedTuning | None = None,
) -> Float[Array, "*B T N E"] | tuple[Float[Array, "*B T N E"], Float[Array, "*B T N"]]: ...


@partitions_itself(
    query="t n d", key="t k d", value="t k e", block_indices="t k s", segment_ids="t"
)
def selected_attention(
    query: Float[AnyArray, "*B T N D"],
    key: Float[AnyArray, "*B T K D"],
    value: Float[AnyArray, "*B T K E"],
    block_indices: Integer[AnyArray, "*B T K S"],
    *,
    block_size: IntLike,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
    return_residuals: bool = False,
    checkpoint_name: str | None = None,
    tuning: SelectedTuning | None = None,
) -> Any:
    """Attention of each query to the tokens of the blocks in its list.

    With t the query's position in its document, ::

        out[t] = sum over s of softmax_s(scale * q[t] . k[s]) * v[s],
                 s <= t and s // block_size in the list

    Args:
      query: [B, T, N, D], floating.
      key: [B, T, K, D], in the dtype of `query`.
      value: [B, T, K, E], in the dtype of `query`.
      block_indices: integers [B, T, K, S], block numbers counted from the start of the query's own
        document. A list is a set: a repeated number counts once. Negative, future and
        out-of-range numbers are ignored, wherever they stand.
      block_size: tokens of a block.
      scale: factor of the logits, by default D ** -0.5.
      segment_ids: integers [B, T], equal ids in a run are one document.
      padding_id: the segment id of padding; all other ids are at least 0.
      implementation: "triton", "mosaic_gpu", "triton_interpret", "xla", "reference"; None: best.
      return_residuals: also return the logsumexp of the scaled logits.
      checkpoint_name: name that the results carry for remat policies; None: `CHECKPOINT_NAMES`.
      tuning: how the kernels of "triton" run; None: measured heuristics decide. It changes only
        time and memory, and is unused where `implementation=None` chose another implementation.

    Returns:
      out [B, T, N, E] in the dtype of `query`, or (out, lse) with lse [B, T, N], natural log, in
      float32 (float64 for float64 inputs). A query with an empty list gets out 0 and lse -inf.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
      NotImplementedError: the named implementation cannot serve the call.

    Example:
      >>> import jax.numpy as jnp, fsa_jax
      >>> q, kv = jnp.ones((1, 64, 4, 8)), jnp.ones((1, 64, 2, 8))
      >>> indices = jnp.zeros((1, 64, 2, 3), jnp.int32)  # everyone chooses block 0
      >>> fsa_jax.selected_attention(q, kv, kv, indices, block_size=16).shape
      (1, 64, 4, 8)

    Source: NSA (arXiv 2502.11089), equation 10; FSA (arXiv 2508.18224).
    """
    check_name(implementation)
    return_residuals = checks.flag("return_residuals", return_residuals)
    name = checks.checkpoint_name(checkpoint_name)
    block_size = checks.size("block_size", block_size)
    query, key, value, has_batch = checks.attention_arrays(query, key, value)
    segments = checks.segments(query, segment_ids, has_batch, padding_id)
    axes = "B T K S" if has_batch else "T K S"
    block_indices = checks.integers("block_indices", block_indices, axes, saturate=True)
    block_indices = block_indices if has_batch else block_indices[None]
    checks.same_axes("B T K", key=key, block_indices=block_indices)
    tuning = checks.tuning(tuning, implementation)
    scale = checks.scale(scale, query.shape[-1])
    sizes = {"block_size": block_size, "scale": scale}
    spec = BlockSpec(**sizes, packed=segments.packed, tuning=tuning, checkpoint_name=name)
    request = Request(spec, (query, key, value, block_indices.shape[3]))
    choice = resolve("selected_attention", implementation, request)
    arrays = (query, key, value, block_indices, segments)
    if choice.backend is Backend.REFERENCE:
        result = spec.renamed(*reference.selected_attention(*arrays, **sizes))
    else:
        result = block_attention.selected_attention(spec.on(choice.backend), *arrays)
    return as_asked(result, has_batch, return_residuals)


@overload
def sliding_window_attention(
    query: Float[AnyArray, "*B T N D"],
    key: Float[AnyArray, "*B T K D"],
    value: Float[AnyArray, "*B T K E"],
    *,
    window_size: IntLike,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
    return_residuals: Literal[False] = False,
    checkpoint_name: str | None = None,
) -> Float[Array, "*B T N E"]: ...


@overload
def sliding_window_attention(
    query: Float[AnyArray, "*B T N D"],
    key: Float[AnyArray, "*B T K D"],
    value: Float[AnyArray, "*B T K E"],
    *,
    window_size: IntLike,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
    return_residuals: Literal[True],
    checkpoint_name: str | None = None,
) -> tuple[Float[Array, "*B T N E"], Float[Array, "*B T N"]]: ...


@overload
def sliding_window_attention(
    query: Float[AnyArray, "*B T N D"],
    key: Float[AnyArray, "*B T K D"],
    value: Float[AnyArray, "*B T K E"],
    *,
    window_size: IntLike,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
    return_residuals: bool,
    checkpoint_name: str | None = None,
) -> Float[Array, "*B T N E"] | tuple[Float[Array, "*B T N E"], Float[Array, "*B T N"]]: ...


@partitions_itself(query="t n d", key="t k d", value="t k e", segment_ids="t")
def sliding_window_attention(
    query: Float[AnyArray, "*B T N D"],
    key: Float[AnyArray, "*B T K D"],
    value: Float[AnyArray, "*B T K E"],
    *,
    window_size: IntLike,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    implementation: Implementation | None = None,
    return_residuals: bool = False,
    checkpoint_name: str | None = None,
) -> Any:
    """Attention of each query to the last `window_size` tokens of its document up to itself.

    With t the query's position in its document, ::

        out[t] = sum over t - window_size < s <= t of softmax_s(scale * q[t] . k[s]) * v[s]

    Args:
      query: [B, T, N, D], floating.
      key: [B, T, K, D], in the dtype of `query`.
      value: [B, T, K, E], in the dtype of `query`.
      window_size: the exact number of visible keys, the query's own included.
      scale: factor of the logits, by default D ** -0.5.
      segment_ids: integers [B, T], equal ids in a run are one document.
      padding_id: the segment id of padding; all other ids are at least 0.
      implementation: "triton", "mosaic_gpu", "triton_interpret", "xla", "reference"; None: best.
      return_residuals: also return the logsumexp of the scaled logits.
      checkpoint_name: name that the results carry for remat policies; None: `CHECKPOINT_NAMES`.

    Returns:
      out [B, T, N, E] in the dtype of `query`, or (out, lse) with lse [B, T, N], natural log, in
      float32 (float64 for float64 inputs). At padding out is 0 and lse -inf.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
      NotImplementedError: the named implementation cannot serve the call.

    Example:
      >>> import jax.numpy as jnp, fsa_jax
      >>> q, kv = jnp.ones((1, 64, 4, 8)), jnp.ones((1, 64, 2, 8))
      >>> fsa_jax.sliding_window_attention(q, kv, kv, window_size=16).shape
      (1, 64, 4, 8)

    Source: NSA (arXiv 2502.11089), section 3.3.3.
    """
    check_name(implementation)
    return_residuals = checks.flag("return_residuals", return_residuals)
    name = checks.checkpoint_name(checkpoint_name)
    window_size = checks.size("window_size", window_size)
    query, key, value, has_batch = checks.attention_arrays(query, key, value)
    segments = checks.segments(query, segment_ids, has_batch, padding_id)
    scale = checks.scale(scale, query.shape[-1])
    arrays, sizes = (query, key, value), {"window_size": window_size}
    spec = RangeSpec(scale=scale, branch="window", checkpoint_name=name)
    choice = resolve("sliding_window_attention", implementation, Request(spec, arrays))
    if choice.backend is Backend.REFERENCE:
        result = spec.renamed(
            *reference.sliding_window_attention(*arrays, segments, **sizes, scale=scale)
        )
    else:
        spec = spec.on(choice.backend)
        result = range_attention.sliding_window_attention(spec, *arrays, segments, **sizes)
    return as_asked(result, has_batch, return_residuals)


def as_asked(result, has_batch: bool, return_residuals: bool) -> Any:
    """Returns out and lse [B, ...] of a branch in the form that the caller requested."""
    out, lse = result if has_batch else (x[0] for x in result)
    return (out, lse) if return_residuals else out
