"""The public functions: canonicalise, validate, choose an implementation, call it.

Shape legend: B batch, T tokens in a row, N query heads, K key/value heads, G = N/K heads in a GQA
group, D head width of query and key, E head width of value, S listed blocks per query, M = T // d
compressed windows, l kernel_size, d kernel_stride. Query head n uses key head n // G. Everywhere
the batch axis B may be left out, of all arrays of a call together.
"""

from jaxtyping import Array, Float, Int, Integer

from fsa_jax import branches, compression, gating, triton
from fsa_jax.arguments import checks
from fsa_jax.arguments.types import (
    AnyArray,
    CompressionMethod,
    FloatLike,
    Implementation,
    IntegerList,
    IntLike,
)
from fsa_jax.config import NSAConfig, check_window
from fsa_jax.dispatch import check_name, resolve
from fsa_jax.one_branch import compressed_attention as compressed_attention
from fsa_jax.one_branch import selected_attention as selected_attention
from fsa_jax.one_branch import sliding_window_attention as sliding_window_attention
from fsa_jax.semantics.segments import describe_rows
from fsa_jax.sharding import partitions_itself

#: Names that outputs carry for remat policies such as
#: ``jax.checkpoint_policies.save_only_these_names(*CHECKPOINT_NAMES)``.
CHECKPOINT_NAMES = (
    "block_indices",
    *(
        f"{branch}_{part}"
        for branch in ("compressed", "selected", "window", "causal")
        for part in ("out", "lse")
    ),
)


@partitions_itself(x="t k d", segment_ids="t")
def compress(
    x: Float[AnyArray, "*B T K D"],
    *,
    kernel_size: IntLike,
    kernel_stride: IntLike,
    method: CompressionMethod = "linear",
    weights: AnyArray | tuple[AnyArray, AnyArray] | None = None,
    positions: Float[AnyArray, "K l D"] | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    sequence_axis: str | None = None,
) -> Float[Array, "*B M K D"]:
    """Compresses each window of `kernel_size` tokens of a document into one key or value.

    Window i of a document is its tokens i*d .. i*d + l - 1, and ::

        linear    sum over t of (x[t] + positions[t]) @ weights[t]       weights [K, l*D, D]
        weighted  sum over t of (x[t] + positions[t]) * weights[t]       weights [K, l]
        mean      sum over t of (x[t] + positions[t]) / l                no weights
        mlp       gelu((x + positions) flattened @ w_in) @ w_out         ([K, l*D, H], [K, H, D])

    Args:
      x: keys before RoPE, or values, [B, T, K, D], floating.
      kernel_size: tokens l of a window.
      kernel_stride: tokens d between the starts of windows; divides `kernel_size`.
      method: "linear", "weighted", "mean" or "mlp".
      weights: the parameters of the method, as above, in the dtype of `x`.
      positions: table added to the tokens of each window, [K, l, D], in the dtype of `x`.
      segment_ids: integers [B, T], equal ids in a run are one document, 0 is padding.
      sequence_axis: mesh axis that splits the tokens; see `native_sparse_attention`.

    Returns:
      [B, M, K, D] in the dtype of `x`: the existing windows of a row first, in order, the rest
      zero. Only whole windows exist. With `sequence_axis` the same for each stripe of tokens.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.

    Example:
      >>> import jax.numpy as jnp, fsa_jax
      >>> x = jnp.ones((1, 64, 2, 8))
      >>> fsa_jax.compress(x, kernel_size=32, kernel_stride=16, method="mean").shape
      (1, 4, 2, 8)

    Source: NSA (arXiv 2502.11089), equation 7.
    """
    has_batch = checks.batched(x, "T K D")
    x = checks.with_batch("x", x, "T K D", has_batch)
    kernel_size = checks.size("kernel_size", kernel_size)
    kernel_stride = checks.size("kernel_stride", kernel_stride)
    check_window(kernel_size, kernel_stride)
    _, _, heads, width = x.shape
    checks.choice("method", method, compression.METHODS)
    flat = kernel_size * width
    if method == "linear":
        weights = checks.parameter("weights", weights, x, (heads, flat, width))
    elif method == "weighted":
        weights = checks.parameter("weights", weights, x, (heads, kernel_size))
    elif method == "mlp":
        if not isinstance(weights, tuple) or len(weights) != 2:
            got = checks.short(weights)
            raise ValueError(f"weights must be a pair (w_in, w_out) for 'mlp', got {got}")
        hidden = weights[1].shape[1] if getattr(weights[1], "ndim", 0) == 3 else -1
        w_in = checks.parameter("weights[0]", weights[0], x, (heads, flat, hidden))
        weights = (w_in, checks.parameter("weights[1]", weights[1], x, (heads, hidden, width)))
    elif weights is not None:
        raise ValueError("weights must be None for method='mean'")
    if positions is not None:
        positions = checks.parameter("positions", positions, x, (heads, kernel_size, width))
    ids = checks.ids(segment_ids, x.shape[:2], has_batch)
    if sequence_axis is not None:
        checks.sequence(sequence_axis, has_batch, x.shape[1], kernel_stride)
    out = compression.compress(
        x,
        describe_rows(ids, *x.shape[:2]),
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        method=method,
        weights=weights,
        positions=positions,
        sequence=None if sequence_axis is None else (ids, sequence_axis),
    )
    return out if has_batch else out[0]


@partitions_itself(query="t n d", compressed_key="m k d", lse="t n", segment_ids="t")
def select_blocks(
    query: Float[AnyArray, "*B T N D"],
    compressed_key: Float[AnyArray, "*B M K D"],
    lse: Float[AnyArray, "*B T N"],
    *,
    config: NSAConfig,
    scale: FloatLike | None = None,
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    implementation: Implementation | None = None,
) -> Int[Array, "*B T K topk"]:
    """Chooses the blocks that each query attends to, from the compressed attention.

    With p[i] = exp(scale * q . k[i] - lse) of the visible windows, summed over the G heads of a
    group in float32, ::

        score[j] = sum over windows i of p[i] * (strides of d tokens that i shares with block j)

    A query at position t chooses among the blocks 0 .. t // block_size: first the forced ones (the
    first `init_blocks`, the last `local_blocks`), then those of the highest score, of equal scores
    the lower number. No gradient flows through the choice.

    Args:
      query: [B, T, N, D], floating.
      compressed_key: [B, M, K, D] as `compress` lays it out, in the dtype of `query`.
      lse: [B, T, N], the residual of `compressed_attention` on the same query and key.
      config: the sizes.
      scale: factor of the logits, by default D ** -0.5.
      segment_ids: integers [B, T], equal ids in a run are one document, 0 is padding.
      implementation: "triton", "mosaic_gpu", "triton_interpret", "xla", "reference"; None: best.

    Returns:
      int32 [B, T, K, topk]: block numbers, counted from the start of the query's own document,
      ascending; unused places hold -1 and stand at the end.

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
    rows = checks.rows(query, segment_ids, has_batch)
    lse = checks.with_batch("lse", lse, "T N", has_batch)
    checks.same_axes("B T N", query=query, lse=lse)
    scale = checks.scale(scale, query.shape[-1])
    indices = branches.choose_blocks(query, key, lse, rows, config, scale, implementation)
    return indices if has_batch else indices[0]


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
    implementation: Implementation | None = None,
    sequence_axis: str | None = None,
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
      segment_ids: integers [B, T], equal ids in a run are one document, 0 is padding.
      implementation: "triton", "mosaic_gpu", "triton_interpret", "xla", "reference"; None: best.
      sequence_axis: name of the mesh axis that splits the tokens of each row, for rows that are too
        long for one device. All arrays of tokens are then in the order of `to_stripes`, and
        `compressed_key` and `compressed_value` come from `compress` with the same axis. T is a
        multiple of 2 * devices * kernel_stride.

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
    _check_operator(
        query, key, value, compressed_key, compressed_value, gates, config, implementation
    )
    return branches.gated_attention(
        query,
        (compressed_key, compressed_value),
        ((key, value),),
        gates,
        config=config,
        scale=scale,
        segment_ids=segment_ids,
        implementation=implementation,
        sequence_axis=sequence_axis,
    )


def _check_operator(
    query, key, value, compressed_key, compressed_value, gates, config, implementation
) -> None:
    """What a branch would only find after others have done their work."""
    _, *compressed, _ = checks.attention_arrays(
        query, compressed_key, compressed_value, config.kernel_stride
    )
    query, key, value, has_batch = checks.attention_arrays(query, key, value)
    checks.same_widths(value=value, compressed_value=compressed[1])
    checks.gates(gates, query, has_batch)
    if implementation is not None:
        reason = triton.selected_reason(query, key, value, block_size=config.block_size)
        reason = reason or triton.select_reason(query, compressed[0], config)
        reason = reason or triton.range_reason(query, *compressed, implementation=implementation)
        resolve("native_sparse_attention", implementation, reason)


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
    return gating.combine(gates if has_batch else gates[0], outs)
