"""The selection of the blocks that each query attends to. It has no gradient and no residuals.

Shapes: B sequences, T tokens, N query heads, K key/value heads, M compressed windows, D head width.
"""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from fsa_jax import xla
from fsa_jax.config import NSAConfig
from fsa_jax.ops.call import Backend, OpSpec
from fsa_jax.ops.partition import partitioned
from fsa_jax.pallas.support import Unsupported, supported
from fsa_jax.semantics import segments
from fsa_jax.semantics.precision import accumulation_dtype
from fsa_jax.semantics.segments import SegmentInfo, Windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionSpec(OpSpec):
    """The selection of blocks.

    Attributes:
      config: sizes of the sparse attention.
      packed: whether sequences have segment ids.
    """

    config: NSAConfig
    packed: bool

    def plan(self, *arrays: Any) -> Any | Unsupported:
        """A `fsa_jax.pallas.block_selection.plan.SelectPlan` for query and compressed key."""
        from fsa_jax.pallas.block_selection import plan as select_plan

        query, key = arrays
        return select_plan.make_plan(
            query, key, self.config, capability=self.capability, table=self.table
        )


def select_blocks(
    spec: SelectionSpec,
    query: Float[Array, "B T N D"],
    key: Float[Array, "B M K D"],
    lse: Float[Array, "B T N"],
    segment_info: SegmentInfo,
) -> Int[Array, "B T K topk"]:
    """See fsa_jax.select_blocks. Not differentiable."""
    config = spec.config
    windows = segments.describe_windows(segment_info, config.kernel_size, config.kernel_stride)
    return choose_blocks(spec, query, key, lse, segment_info, windows)


def choose_blocks(
    spec: SelectionSpec, query, key, lse, segment_info: SegmentInfo, windows: Windows
) -> Int[Array, "B T K topk"]:
    """`select_blocks` for queries whose `segment_info` and `windows` are given."""
    if key.shape[1] == 0:  # no kernel takes an empty array
        spec = spec.on(Backend.XLA)
    lse = lse.astype(accumulation_dtype(query))
    segment_arrays = (segment_info.start, segment_info.end, segment_info.valid)
    return _select(spec, query, key, lse, *segment_arrays, windows.first, windows.visible)[0]


_OPERANDS = {
    "query": "b t n d", "key": "b m k d", "lse": "b t n",
    "start": "b t", "end": "b t", "valid": "b t", "first": "b t", "visible": "b t",
}  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _select(spec, *arrays):
    config = spec.config

    def described(start, end, valid, first, visible):
        # nobody reads where windows start
        return SegmentInfo(start, end, valid, packed=spec.packed), Windows(first, first, visible)

    def kernels(query, key, lse, *segment_arrays):
        from fsa_jax.pallas.block_selection import passes

        segment_info, windows = described(*segment_arrays)
        plan = supported(spec.plan(query, key))
        options = {"config": config, "plan": plan} | spec.options
        return (passes.select_blocks(query, key, lse, segment_info, windows, **options),)

    def portable(query, key, lse, *segment_arrays):
        described_by = described(*segment_arrays)
        return (xla.select_blocks(query, key, lse, *described_by, config=config, scale=spec.scale),)

    return partitioned(spec.runs(kernels, portable), _OPERANDS, ("b t k s",))(*arrays)
