"""Dense causal attention of packed sequences in linear memory: what sparse attention replaces.

The computation is that of a sliding window as long as the sequence, so it has the same kernels and
the same portable loops. cuDNN can be chosen by name.

Shapes: B batch, T tokens of a sequence, N query heads, K key/value heads, D head width of query and
key, E of value.
"""

from typing import Any, Literal, overload

import jax
from jaxtyping import Array, Float, Integer

from fsa_jax import reference
from fsa_jax.api.one_branch import as_asked
from fsa_jax.arguments import checks
from fsa_jax.arguments.types import AnyArray, DenseImplementation, FloatLike, IntegerList, IntLike
from fsa_jax.ops import range_attention
from fsa_jax.ops.call import Backend
from fsa_jax.ops.dispatch import CUDNN, Request, check_name, resolve, resolve_over_tokens
from fsa_jax.ops.partition import partitions_itself
from fsa_jax.ops.range_attention import RangeSpec
from fsa_jax.semantics.precision import narrow
from fsa_jax.semantics.segments import describe_segments
from fsa_jax.sequence_parallel import causal_attention as sequence_parallel


@overload
def causal_attention(
    query: Float[AnyArray, "*B T N D"],
    key: Float[AnyArray, "*B T K D"],
    value: Float[AnyArray, "*B T K E"],
    *,
    window_size: IntLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    scale: FloatLike | None = None,
    implementation: DenseImplementation | None = None,
    return_residuals: Literal[False] = False,
    sequence_axis: str | None = None,
    checkpoint_name: str | None = None,
) -> Float[Array, "*B T N E"]: ...


@overload
def causal_attention(
    query: Float[AnyArray, "*B T N D"],
    key: Float[AnyArray, "*B T K D"],
    value: Float[AnyArray, "*B T K E"],
    *,
    window_size: IntLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    scale: FloatLike | None = None,
    implementation: DenseImplementation | None = None,
    return_residuals: Literal[True],
    sequence_axis: str | None = None,
    checkpoint_name: str | None = None,
) -> tuple[Float[Array, "*B T N E"], Float[Array, "*B T N"]]: ...


@overload
def causal_attention(
    query: Float[AnyArray, "*B T N D"],
    key: Float[AnyArray, "*B T K D"],
    value: Float[AnyArray, "*B T K E"],
    *,
    window_size: IntLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    scale: FloatLike | None = None,
    implementation: DenseImplementation | None = None,
    return_residuals: bool,
    sequence_axis: str | None = None,
    checkpoint_name: str | None = None,
) -> Float[Array, "*B T N E"] | tuple[Float[Array, "*B T N E"], Float[Array, "*B T N"]]: ...


@partitions_itself(query="t n d", key="t k d", value="t k e", segment_ids="t")
def causal_attention(
    query: Float[AnyArray, "*B T N D"],
    key: Float[AnyArray, "*B T K D"],
    value: Float[AnyArray, "*B T K E"],
    *,
    window_size: IntLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    padding_id: IntLike = 0,
    scale: FloatLike | None = None,
    implementation: DenseImplementation | None = None,
    return_residuals: bool = False,
    sequence_axis: str | None = None,
    checkpoint_name: str | None = None,
) -> Any:
    """Attention of each query to all tokens of its document up to itself, in linear memory.

    With t the query's position in its document, and w the `window_size` or the length, ::

        out[t] = sum over t - w < s <= t of softmax_s(scale * q[t] . k[s]) * v[s]

    Neither pass creates an array of T x T numbers. The time is proportional to the number of
    visible pairs of a query and a key: packed documents cost as much as they would one by one.

    Args:
      query: [B, T, N, D], floating.
      key: [B, T, K, D], in the dtype of `query`.
      value: [B, T, K, E], in the dtype of `query`.
      window_size: the exact number of visible keys, the query's own included; None: all.
      segment_ids: integers [B, T], equal ids in a run are one document.
      padding_id: the segment id of padding; all other ids are at least 0.
      scale: factor of the logits, by default D ** -0.5.
      implementation: "triton", "mosaic_gpu", "triton_interpret", "xla", "reference"; None: the
        best of these; or "cudnn", which serves neither `segment_ids` nor `return_residuals`, and
        whose gradient of `query` has other bits on every run.
      return_residuals: also return the logsumexp of the scaled logits.
      sequence_axis: mesh axis that splits the tokens; see `native_sparse_attention`.
      checkpoint_name: name that the results carry for remat policies; None: `CHECKPOINT_NAMES`,
        or no name with "cudnn".

    Returns:
      out [B, T, N, E] in the dtype of `query`, or (out, lse) with lse [B, T, N], natural log, in
      float32 (float64 for float64 inputs). At padding out is 0 and lse -inf.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
      NotImplementedError: the named implementation cannot serve the call.

    Example:
      >>> import jax.numpy as jnp, fsa_jax
      >>> q, kv = jnp.ones((1, 64, 4, 8)), jnp.ones((1, 64, 2, 8))
      >>> ids = jnp.asarray([[1] * 40 + [2] * 20 + [0] * 4], jnp.int32)  # two documents, padding
      >>> out = fsa_jax.causal_attention(q, kv, kv, segment_ids=ids)
      >>> out.shape, float(out[0, 59, 0, 0]), float(out[0, 60, 0, 0])
      ((1, 64, 4, 8), 1.0, 0.0)

    Source: Attention Is All You Need (arXiv 1706.03762), equation 1; the online softmax of
    FlashAttention (arXiv 2205.14135).
    """
    check_name(implementation, CUDNN)
    return_residuals = checks.flag("return_residuals", return_residuals)
    if window_size is not None:
        window_size = checks.size("window_size", window_size)
    query, key, value, has_batch = checks.attention_arrays(query, key, value)
    ids = checks.ids(segment_ids, query.shape[:2], has_batch, padding_id)
    scale = checks.scale(scale, query.shape[-1])
    label = checks.checkpoint_name(checkpoint_name)
    spec = RangeSpec(scale=scale, branch="causal", checkpoint_name=label)
    length = query.shape[1]
    if implementation in CUDNN:
        _refuse(
            segment_ids=ids is not None,
            return_residuals=return_residuals,
            sequence_axis=sequence_axis is not None,
        )
        (out,) = spec.renamed(_by_cudnn(query, key, value, window_size, scale))
        return out if has_batch else out[0]
    arrays = (query, key, value)
    name = "causal_attention"
    if sequence_axis is not None:
        checks.sequence(sequence_axis, has_batch, length, 1)
        choice = resolve_over_tokens(name, implementation, sequence_axis, Request(spec, arrays))
        options = {"window_size": window_size, "axis": sequence_axis}
        result = sequence_parallel.attention(spec.on(choice.backend), *arrays, ids, **options)
        return as_asked(result, has_batch, return_residuals)
    choice = resolve(name, implementation, Request(spec, arrays))
    segments, window = describe_segments(ids, *query.shape[:2]), min(window_size or length, length)
    if choice.backend is Backend.REFERENCE:
        attend = reference.sliding_window_attention
        result = spec.renamed(*attend(*arrays, segments, window_size=window, scale=scale))
    else:
        attend = range_attention.sliding_window_attention
        result = attend(spec.on(choice.backend), *arrays, segments, window_size=window)
    return as_asked(result, has_batch, return_residuals)


def _refuse(**asked: bool) -> None:
    for name, given in asked.items():
        if given:
            raise NotImplementedError(
                f"implementation='cudnn' cannot serve {name}; use None, 'mosaic_gpu' or 'triton'"
            )


def _by_cudnn(query, key, value, window_size: int | None, scale: float) -> jax.Array:
    """The kernels of cuDNN by way of jax, which says what they serve."""
    if query.dtype.itemsize != 2:
        raise NotImplementedError(
            "implementation='cudnn' cannot serve causal_attention: the dtype must be float16 or "
            f"bfloat16, got {query.dtype}; use None"
        )
    try:
        # jax's function promotes bfloat16 implicitly, which strict promotion would forbid
        with jax.numpy_dtype_promotion("standard"):
            return narrow(jax.nn.dot_product_attention)(
                query,
                key,
                value,
                scale=scale,
                is_causal=True,
                local_window_size=None if window_size is None else (window_size - 1, 0),
                implementation="cudnn",
            )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise NotImplementedError(
            f"implementation='cudnn' cannot serve causal_attention: {error}; use None"
        ) from error
