"""Positions for RoPE in packed sequences: of tokens, and of the first tokens of compressed windows.

Shapes are as in `fsa_jax.api`. The batch axis B may be left out.
"""

import numpy as np
from jaxtyping import Array, Int, Integer

from fsa_jax.arguments import checks
from fsa_jax.arguments.types import AnyArray, IntegerList, IntLike
from fsa_jax.config import check_window
from fsa_jax.ops.partition import partitions_itself
from fsa_jax.semantics import segments
from fsa_jax.sequence_parallel import zigzag


@partitions_itself(segment_ids="t")
def token_positions(
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList,
    *,
    padding_id: IntLike = 0,
    sequence_axis: str | None = None,
) -> Int[Array, "*B T"]:
    """The position of each token in its document, counted from 0, as RoPE needs it for queries.

    ::

        out[t] = t - (first token of the document of t)

    Args:
      segment_ids: integers [B, T]; a run of equal ids is one document.
      padding_id: the segment id of padding; all other ids are at least 0.
      sequence_axis: mesh axis that splits the tokens; see `native_sparse_attention`.

    Returns:
      int32 [B, T]. The values at padding are meaningless.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.

    Example:
      >>> import fsa_jax
      >>> fsa_jax.token_positions([7, 7, 7, 8, 8, 0]).tolist()
      [0, 1, 2, 0, 1, 0]

    Source: NSA (arXiv 2502.11089) for one document; a packed sequence holds several.
    """
    has_batch = checks.batched(segment_ids, "T")
    ids = checks.ids(segment_ids, None, has_batch, padding_id)
    if ids is None:
        raise ValueError("segment_ids must be integers [B, T], got None")
    if sequence_axis is None:
        found = segments.describe_segments(ids, *ids.shape).position
    else:
        checks.sequence(sequence_axis, has_batch, ids.shape[1], 1)
        found = zigzag.positions(ids, ids.shape, sequence_axis)
    return found if has_batch else found[0]


@partitions_itself(segment_ids="t", positions="t")
def window_positions(
    segment_ids: Integer[AnyArray, "*B T"] | IntegerList | None,
    *,
    kernel_size: IntLike,
    kernel_stride: IntLike,
    padding_id: IntLike = 0,
    length: IntLike | None = None,
    positions: Integer[AnyArray, "*B T"] | IntegerList | None = None,
    sequence_axis: str | None = None,
) -> Int[Array, "*B M"]:
    """The position of the first token of each window of `compress`, as RoPE needs it for the keys.

    If slot m of `compress` holds the i-th window of its document, then ::

        out[m] = i * kernel_stride

    In a packed sequence this differs from m * kernel_stride: i restarts at each document, and there
    are no windows that cross the end of a document, so later windows move up.

    Args:
      segment_ids: integers [B, T]; a run of equal ids is one document. None: a sequence is one
        document; then give `length` or `positions`.
      kernel_size: tokens l of a window.
      kernel_stride: tokens d between the starts of windows; divides `kernel_size`.
      padding_id: the segment id of padding; all other ids are at least 0.
      length: tokens T of a sequence, where `segment_ids` is None.
      positions: integers [B, T], for tokens whose positions are not `token_positions`; out[m] is
        then the position of the window's first token.
      sequence_axis: mesh axis that splits the tokens; see `native_sparse_attention`.

    Returns:
      int32 [B, M], M = T // kernel_stride, in the order of `compress`; 0 in slots without a window.
      Where only `length` is given, the result is [M] and holds for any batch.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.

    Example:
      >>> import fsa_jax
      >>> ids = [1] * 10 + [2] * 14  # two documents: 3 windows, then 5
      >>> fsa_jax.window_positions(ids, kernel_size=6, kernel_stride=2).tolist()
      [0, 2, 4, 0, 2, 4, 6, 8, 0, 0, 0, 0]

    Source: NSA (arXiv 2502.11089), equation 7; compression comes before RoPE.
    """
    sizes = checks.size("kernel_size", kernel_size), checks.size("kernel_stride", kernel_stride)
    check_window(*sizes)
    if segment_ids is None and positions is None:
        positions = np.arange(
            checks.size("length (or segment_ids, or positions)", length), dtype=np.int32
        )
    else:
        checks.absent("where segment_ids or positions say it", length=length)
    has_batch = checks.batched(positions if segment_ids is None else segment_ids, "T")
    ids = checks.ids(segment_ids, None, has_batch, padding_id)
    given = None
    if positions is not None:
        given = checks.integers("positions", positions, "B T" if has_batch else "T")
        given = given if has_batch else given[None]
        checks.same_axes("B T", **({} if ids is None else {"segment_ids": ids}), positions=given)
    shape = next(x.shape for x in (ids, given) if x is not None)
    if sequence_axis is not None:
        checks.sequence(sequence_axis, has_batch, shape[1], sizes[1])
        given = zigzag.positions(ids, shape, sequence_axis) if given is None else given
        return zigzag.window_positions(given, ids, *sizes, sequence_axis)
    segment_info = segments.describe_segments(ids, *shape)
    found = segments.window_positions(segment_info, given, *sizes)
    return found if has_batch else found[0]
