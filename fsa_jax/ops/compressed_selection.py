"""Compressed attention together with the selection of blocks, which both weigh the compressed keys.

On Hopper one pass over the compressed keys serves both (`fsa_jax/pallas/compressed_selection`).
Elsewhere the selection takes the logits again, by the logsumexp of compressed attention. It has no
gradient; residuals of the attention are those of `range_attention`.

Shapes: B sequences, T tokens, N query heads, K key/value heads, M compressed windows, D and E head
widths.
"""

import functools
from typing import Any

import jax

from fsa_jax.ops import block_selection, range_attention
from fsa_jax.ops.block_selection import SelectionSpec, choose_blocks
from fsa_jax.ops.call import ATTENTION, RESULTS, Backend
from fsa_jax.ops.partition import partitioned
from fsa_jax.ops.range_attention import Ranges, RangeSpec, empty_results, range_forward
from fsa_jax.pallas.support import Unsupported, supported
from fsa_jax.semantics.segments import SegmentInfo, Windows


def attend_and_choose(
    compressed: RangeSpec,
    selection: SelectionSpec,
    ranges: Ranges | None,
    arrays: tuple[jax.Array, ...],
    segment_info: SegmentInfo,
    windows: Windows,
) -> Any:
    """Out [B, T, N, E], lse [B, T, N] and block indices int32 [B, T, K, topk]; no derivative.

    Args:
      compressed: the attention, with a backend.
      selection: the selection, with a backend.
      ranges: those of the windows; None where no sequence has one.
      arrays: query [B, T, N, D], and the compressed key [B, M, K, D] and value [B, M, K, E].
      segment_info: the documents of the queries.
      windows: the compressed windows of the documents.
    """
    query, key, value = arrays
    apart = compressed.backend is not selection.backend
    if ranges is None:
        out, lse = empty_results(query, value)
    elif apart or block_selection.all_are_chosen(selection.config, query, key):
        out, lse = range_forward(compressed, ranges, *arrays)
    else:
        arrays += (*ranges.keys, *ranges.queries)
        arrays += block_selection.to_arrays(segment_info, windows)
        return _attend_and_choose((compressed, selection), *arrays)
    return out, lse, choose_blocks(selection, query, key, lse, segment_info, windows)


_OPERANDS = ATTENTION | {
    "low": "b t", "high": "b t", "query_first": "b m", "query_end": "b m",
} | block_selection.SEGMENT_OPERANDS  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _attend_and_choose(specs, *arrays):
    compressed, selection = specs

    def one_pass(arrays, plan):
        from fsa_jax.pallas.compressed_selection import passes

        query, key, value, _, _, first, end, *described = arrays
        segment_info, windows = block_selection.from_arrays(selection, *described)
        return passes.attend_and_choose(
            query, key, value, first < end, segment_info, windows,
            config=selection.config, scale=compressed.scale, plan=plan,
        )  # fmt: skip

    def two_passes(attend, choose, arrays):
        out, lse = attend(compressed, *arrays[:7])
        query, key, *_ = arrays
        return out, lse, *choose(selection, query, key, lse, *arrays[7:])

    def kernels(*arrays):
        plan = _plan(compressed, selection, *arrays[:3])
        if not isinstance(plan, Unsupported):
            return one_pass(arrays, plan)
        return two_passes(
            range_attention.forward_by_kernels, block_selection.select_by_kernels, arrays
        )

    def portable(*arrays):
        return two_passes(range_attention.forward_by_loops, block_selection.select_by_loops, arrays)

    results = (*RESULTS, "b t k s")
    return partitioned(compressed.runs(kernels, portable), _OPERANDS, results)(*arrays)


def _plan(compressed: RangeSpec, selection: SelectionSpec, query, key, value) -> Any:
    """The plan of the pass that serves both, `Unsupported` where two passes are to be used."""
    from fsa_jax.pallas.compressed_selection import plan

    if compressed.backend not in (Backend.BY_PLATFORM, Backend.MOSAIC_GPU):
        return Unsupported("the kernels are in Mosaic GPU")
    if not supported(compressed.plan(query, key, value)).mosaic:
        return Unsupported("compressed attention has other kernels")
    return plan.make_plan(query, key, value, selection.config, packed=selection.packed)
