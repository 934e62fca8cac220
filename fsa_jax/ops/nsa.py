"""Native sparse attention of all branches, on devices that each hold whole sequences.

Forward: compressed attention with the selection, attention to the selected blocks
and to the window, and the gated sum. Backward: one pass over the outputs of the branches for the
gradients of the gates (`gated_sum.py`), which also gives each branch its cotangent and delta; then
the branches' own backward passes.

Residuals: the arguments; out and lse of each branch; the ranges of compressed and window attention,
8 bytes a query and 8 a key each; the lists of blocks as first tokens, and for the kernels their
index (`block_attention.py`). Outputs, logsumexps and the chosen blocks carry
`CHECKPOINT_NAMES` or the name that the caller gave.

Shapes: B sequences, T tokens, N query heads, K key/value heads, M compressed windows, D and E head
widths.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fsa_jax import reference
from fsa_jax.config import NSAConfig
from fsa_jax.ops import dispatch, gated_sum
from fsa_jax.ops.block_attention import BlockSpec, Lists, block_forward, block_gradients
from fsa_jax.ops.block_selection import SelectionSpec
from fsa_jax.ops.call import Backend, QueryTerms, named
from fsa_jax.ops.compressed_selection import attend_and_choose
from fsa_jax.ops.dispatch import Request
from fsa_jax.ops.range_attention import (
    Ranges,
    RangeSpec,
    range_forward,
    range_gradients,
)
from fsa_jax.pallas import SelectedTuning
from fsa_jax.semantics import segments
from fsa_jax.semantics.segments import SegmentInfo

NAME = "native_sparse_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NSASpec:
    """Everything static about a call: the operations that it is made of, each with its backend.

    Attributes:
      config: the sizes.
      compressed, selection, selected, window: the operations.
    """

    config: NSAConfig
    compressed: RangeSpec
    selection: SelectionSpec
    selected: BlockSpec
    window: RangeSpec

    @classmethod
    def of(
        cls,
        config: NSAConfig,
        scale: float,
        *,
        packed: bool,
        tuning: SelectedTuning | None = None,
        checkpoint_name: str | None = None,
    ) -> "NSASpec":
        """The operations of a config.

        Args:
          config: the sizes.
          scale: factor of the logits.
          packed: whether sequences have segment ids.
          tuning: how the kernels of the selected branch run.
          checkpoint_name: name of the results of all operations; see `OpSpec`.
        """
        shared: Any = {"scale": scale, "checkpoint_name": checkpoint_name}
        lists: Any = {"block_size": config.block_size, "packed": packed, "tuning": tuning}
        return cls(
            config=config,
            compressed=RangeSpec(**shared, branch="compressed"),
            selection=SelectionSpec(**shared, config=config, packed=packed),
            selected=BlockSpec(**shared, **lists),
            window=RangeSpec(**shared, branch="window"),
        )

    def on(self, backend: Backend) -> "NSASpec":
        """The same operations, all by one backend."""
        return dataclasses.replace(
            self,
            compressed=self.compressed.on(backend),
            selection=self.selection.on(backend),
            selected=self.selected.on(backend),
            window=self.window.on(backend),
        )

    def requests(self, query, compressed, sources) -> dict[str, Request]:
        """The requests for `dispatch.resolve`, by the name of each operation's public function.

        The arguments are as in `attention`; their shapes and dtypes suffice.
        """
        key, value = compressed
        topk = self.config.topk
        return {
            "selected_attention": Request(self.selected, (query, *sources[0], topk)),
            "select_blocks": Request(self.selection, (query, key)),
            "compressed_attention": Request(self.compressed, (query, key, value)),
            "sliding_window_attention": Request(self.window, (query, *sources[-1])),
        }

    def resolved(self, implementation: str | None, query, compressed, sources) -> "NSASpec":
        """The same with the backends that serve the call.

        A backend that is named serves all operations or raises. By default each operation gets the
        best one for itself.
        """
        requests = self.requests(query, compressed, sources)
        if implementation is not None:
            return self.on(dispatch.resolve(NAME, implementation, *requests.values()).backend)
        found = {
            name: dispatch.resolve(name, None, request).backend
            for name, request in requests.items()
        }
        return dataclasses.replace(
            self,
            compressed=self.compressed.on(found["compressed_attention"]),
            selection=self.selection.on(found["select_blocks"]),
            selected=self.selected.on(found["selected_attention"]),
            window=self.window.on(found["sliding_window_attention"]),
        )


def attention(
    spec: NSASpec, query, compressed, sources, gates, segment_info: SegmentInfo
) -> jax.Array:
    """The gated sum of the branches, [B, T, N, E].

    Args:
      spec: static, with backends.
      query: [B, T, N, D].
      compressed: key [B, M, K, D] and value [B, M, K, E].
      sources: one pair (key [B, T, K, D], value [B, T, K, E]) for the selected branch and the
        window, or a pair for each.
      gates: [B, T, N, 3] or [B, T, 1, 3].
      segment_info: the documents of the sequences.
    """
    if spec.window.backend is Backend.REFERENCE:  # serves all branches or none
        return _by_reference(spec, query, compressed, sources, gates, segment_info)
    segment_arrays = (segment_info.start, segment_info.end, segment_info.valid)
    return _attention(spec, query, compressed, sources, gates, segment_arrays)


def _by_reference(spec, query, compressed, sources, gates, segment_info):
    """The dense definition, whose gradients are those of its operations."""
    config, shared = spec.config, {"segments": segment_info, "scale": spec.window.scale}
    windows = {"kernel_size": config.kernel_size, "kernel_stride": config.kernel_stride}
    out, lse = spec.compressed.renamed(
        *reference.compressed_attention(query, *compressed, **windows, **shared)
    )
    choice = jax.lax.stop_gradient((query, compressed[0], lse))
    indices = reference.select_blocks(*choice, config=config, **shared)
    indices = spec.selection.named("block_indices", indices)
    listed = {"block_indices": indices, "block_size": config.block_size}
    selected, _ = spec.selected.renamed(
        *reference.selected_attention(query, *sources[0], **listed, **shared)
    )
    near = {"window_size": config.window_size}
    window, _ = spec.window.renamed(
        *reference.sliding_window_attention(query, *sources[-1], **near, **shared)
    )
    return gated_sum.combine(gates, (out, selected, window))


class _Residuals(NamedTuple):
    """The residuals of the backward pass, besides the arguments."""

    outs: Any
    lses: Any
    windows: Any  # `Ranges` of compressed attention, None where no sequence has a window
    lists: Lists
    index: Any
    neighbours: Ranges  # of the sliding window


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, query, compressed, sources, gates, segment_arrays) -> Any:
    return _attention_fwd(spec, query, compressed, sources, gates, segment_arrays)[0]


def _attention_fwd(spec, query, compressed, sources, gates, segment_arrays):
    config, segment_info = spec.config, SegmentInfo(*segment_arrays, packed=spec.selected.packed)
    windows = segments.describe_windows(segment_info, config.kernel_size, config.kernel_stride)
    ranges = None
    if compressed[0].shape[1]:
        ranges = Ranges.of_windows(segment_info, windows, config.kernel_size)
    *results, indices = attend_and_choose(
        spec.compressed, spec.selection, ranges, (query, *compressed), segment_info, windows
    )
    out, lse = named(spec.compressed, "compressed", *results)
    indices = spec.selection.named("block_indices", indices)
    lists = Lists.of(segment_info, indices, config.block_size)
    *results, index = block_forward(spec.selected, lists, query, *sources[0])
    selected, selected_lse = named(spec.selected, "selected", *results)
    neighbours = Ranges.of_tokens(segment_info, config.window_size)
    window, window_lse = named(
        spec.window, "window", *range_forward(spec.window, neighbours, query, *sources[-1])
    )
    outs, lses = (out, selected, window), (lse, selected_lse, window_lse)
    residuals = _Residuals(outs, lses, ranges, lists, index, neighbours)
    return gated_sum.combine(gates, outs), (query, compressed, sources, gates, residuals)


def _attention_bwd(spec, residuals, dout):
    query, compressed, sources, gates, found = residuals
    backend = spec.window.backend
    dgates, douts, deltas = gated_sum.combine_gradients(backend, gates, found.outs, dout)
    terms = [QueryTerms.of_output(*x) for x in zip(found.lses, deltas, douts, strict=True)]
    dquery, *dwindow = range_gradients(spec.window, found.neighbours, terms[2], query, *sources[-1])
    dquery_selected, *dselected = block_gradients(
        spec.selected, found.lists, terms[1], query, *sources[0], index=found.index
    )
    dquery += dquery_selected
    if found.windows is None:
        dcompressed = tuple(map(jnp.zeros_like, compressed))
    else:
        dquery_compressed, *dcompressed = range_gradients(
            spec.compressed, found.windows, terms[0], query, *compressed
        )
        dquery += dquery_compressed
    if len(sources) == 1:
        dsources = (tuple(map(jnp.add, dwindow, dselected)),)
    else:
        dsources = (tuple(dselected), tuple(dwindow))
    return dquery, tuple(dcompressed), dsources, dgates, None


_attention.defvjp(_attention_fwd, _attention_bwd)
