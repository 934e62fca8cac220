"""phi: each compressed window of tokens becomes one key or value.

Shapes: B batch, T tokens of a sequence, K key/value heads, D head width, M = T // d compressed
windows, l kernel_size, d kernel_stride. The batch axis B may be left out, of all arrays of a call
together.
"""

from jaxtyping import Array, Float, Integer

from fsa_jax.arguments import checks
from fsa_jax.arguments.types import AnyArray, CompressionMethod, IntegerList, IntLike
from fsa_jax.config import check_window
from fsa_jax.ops import compression
from fsa_jax.ops.partition import partitions_itself
from fsa_jax.semantics.segments import describe_segments
from fsa_jax.sequence_parallel import zigzag


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
    padding_id: IntLike = 0,
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
      segment_ids: integers [B, T], equal ids in a run are one document.
      padding_id: the segment id of padding; all other ids are at least 0.
      sequence_axis: mesh axis that splits the tokens; see `native_sparse_attention`.

    Returns:
      [B, M, K, D] in the dtype of `x`: the existing windows of a sequence first, in order, the rest
      zero. Only whole windows exist. With `sequence_axis` the same for each chunk of tokens (see
      `to_zigzag`).

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
    ids = checks.ids(segment_ids, x.shape[:2], has_batch, padding_id)
    if sequence_axis is not None:
        checks.sequence(sequence_axis, has_batch, x.shape[1], kernel_stride)
        units = zigzag.window_units(x, ids, kernel_size, kernel_stride, sequence_axis)
    else:
        segments = describe_segments(ids, *x.shape[:2])
        units = compression.window_units(x, segments, kernel_size, kernel_stride)
    out = compression.compress(x, units, method=method, weights=weights, positions=positions)
    return out if has_batch else out[0]
