"""The selection of the blocks that each query attends to. It has no gradient and no residuals.

Shapes: B sequences, T tokens, N query heads, K key/value heads, M compressed windows, D head width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fsa_jax import xla
from fsa_jax.config import NSAConfig
from fsa_jax.ops.call import Backend, OpSpec
from fsa_jax.ops.partition import partitioned
from fsa_jax.pallas.support import Unsupported, supported
from fsa_jax.semantics import segments
from fsa_jax.semantics.precision import accumulation_dtype
from fsa_jax.semantics.segments import SegmentInfo, Windows
from fsa_jax.semantics.selection_rule import longest_document


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
    config = spec.config
    if all_are_chosen(config, query, key):
        own = jnp.where(segment_info.valid, segment_info.position // config.block_size, -1)
        block = jnp.arange(config.topk, dtype=jnp.int32)[None, None, None]
        chosen = jnp.where(block <= own[:, :, None, None], block, -1)
        return jnp.broadcast_to(chosen, (*chosen.shape[:2], key.shape[2], config.topk))
    if key.shape[1] == 0:  # no kernel takes an empty array
        spec = spec.on(Backend.XLA)
    lse = lse.astype(accumulation_dtype(query))
    return _select(spec, query, key, lse, *to_arrays(segment_info, windows))[0]


def all_are_chosen(config: NSAConfig, query, key) -> bool:
    """Whether no document is so long that a query has more than topk blocks to choose from."""
    length = longest_document(query.shape[1], key.shape[1], config)
    return config.num_blocks(length) <= config.topk


#: Axes of the arrays that describe documents and windows.
SEGMENT_OPERANDS = {"start": "b t", "end": "b t", "valid": "b t", "first": "b t", "visible": "b t"}
_OPERANDS = {"query": "b t n d", "key": "b m k d", "lse": "b t n"} | SEGMENT_OPERANDS


def to_arrays(segment_info: SegmentInfo, windows: Windows) -> tuple[jax.Array, ...]:
    """Documents and windows as arrays, for `partitioned`."""
    documents = (segment_info.start, segment_info.end, segment_info.valid)
    return *documents, windows.first, windows.visible


def from_arrays(
    spec: SelectionSpec, start, end, valid, first, visible
) -> tuple[SegmentInfo, Windows]:
    """The inverse of `to_arrays`, but for where windows start, which nobody reads."""
    return SegmentInfo(start, end, valid, packed=spec.packed), Windows(first, first, visible)


@functools.partial(jax.jit, static_argnums=0)
def _select(spec, *arrays):
    kernels, loops = (functools.partial(f, spec) for f in (select_by_kernels, select_by_loops))
    return partitioned(spec.runs(kernels, loops), _OPERANDS, ("b t k s",))(*arrays)


def select_by_kernels(spec: SelectionSpec, query, key, lse, *arrays):
    """The lists of blocks on one device, by the kernels."""
    from fsa_jax.pallas.block_selection import passes

    plan = supported(spec.plan(query, key))
    options = {"config": spec.config, "plan": plan} | spec.options
    return (passes.select_blocks(query, key, lse, *from_arrays(spec, *arrays), **options),)


def select_by_loops(spec: SelectionSpec, query, key, lse, *arrays):
    """The lists of blocks on one device, by loops that XLA compiles."""
    sizes = {"config": spec.config, "scale": spec.scale}
    return (xla.select_blocks(query, key, lse, *from_arrays(spec, *arrays), **sizes),)
