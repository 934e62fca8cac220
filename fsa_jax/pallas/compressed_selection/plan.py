"""Sizes of the kernels that choose blocks in the pass over the compressed keys.

Shapes: G query heads per key head, M window slots; a block is r strides long, a window q strides.
"""

import dataclasses

import numpy as np

from fsa_jax.config import NSAConfig
from fsa_jax.pallas.compressed_selection import choose_kernel
from fsa_jax.pallas.compressed_selection.choose_kernel import ChoosePlan
from fsa_jax.pallas.compressed_selection.fold import KEYS, OF_THREAD
from fsa_jax.pallas.compressed_selection.placement import most_places
from fsa_jax.pallas.range_attention import hopper_pipeline
from fsa_jax.pallas.range_attention.hopper_layout import ROWS, WARPGROUPS
from fsa_jax.pallas.support import Unsupported

#: The most blocks that are chosen by their scores.
MOST_FREE = 32
#: Bytes of a number in the scratch memory.
_ITEMSIZE = 4
#: Bounds of the scratch memory, which otherwise is four times that of the queries.
LEAST_SCRATCH, MOST_SCRATCH = 2**27, 2**30


@dataclasses.dataclass(frozen=True)
class FoldPlan:
    """All static parameters of a call.

    Attributes:
      chunk_steps: steps of a chunk, without those by which its last item goes beyond it.
      most_tiles: tiles of keys of a sequence.
      chunks: the most chunks that a call has.
      choose: sizes of the kernel that chooses.
    """

    chunk_steps: int
    most_tiles: int
    chunks: int
    choose: ChoosePlan

    @property
    def steps(self) -> int:
        """Steps of the scratch memory: a chunk and the rest of its last item."""
        return self.chunk_steps + self.most_tiles


def step_bytes(config: NSAConfig) -> int:
    """Scratch memory of a step: the fold and the edges of 128 rows."""
    blocks = KEYS * config.kernel_stride // config.block_size
    return _ITEMSIZE * WARPGROUPS * ROWS * (blocks + 2)


def unsupported_reason(query, key, value, config: NSAConfig) -> str | None:
    """Why the kernels cannot serve a call; None if they can."""
    if reason := hopper_pipeline.unsupported_reason(query, key, value):
        return reason
    per_block, per_window = (
        x // config.kernel_stride for x in (config.block_size, config.kernel_size)
    )
    if OF_THREAD % per_block:
        return f"block_size / kernel_stride must divide {OF_THREAD}, got {per_block}"
    if per_window - 1 > per_block:
        return (
            "kernel_size must be at most block_size + kernel_stride, got "
            f"{config.kernel_size}, {config.block_size} and {config.kernel_stride}"
        )
    free = config.topk - config.init_blocks - config.local_blocks
    if free > MOST_FREE:  # all candidates are compared with one another
        return f"topk - init_blocks - local_blocks must be at most {MOST_FREE}, got {free}"
    if config.kernel_size - 1 > config.topk * config.block_size:
        return "queries that need scores must see a window: kernel_size is above topk * block_size"
    group = query.shape[2] // key.shape[2]
    if ROWS % group:
        return f"query heads per key head must divide {ROWS}, got {group}"
    return None


def make_plan(
    query, key, value, config: NSAConfig, *, packed: bool, scratch_bytes: int | None = None
) -> FoldPlan | Unsupported:
    """Chooses sizes from shapes and dtypes; `scratch_bytes` is the most memory of a chunk."""
    if scratch_bytes is None:
        scratch_bytes = min(MOST_SCRATCH, max(LEAST_SCRATCH, 4 * query.dtype.itemsize * query.size))
    if reason := unsupported_reason(query, key, value, config):
        return Unsupported(reason)
    batch, length, *_ = query.shape
    tiles = most_places(length, key.shape[1], config, packed) // KEYS
    most = batch * key.shape[2] * _most_steps(query, key, config, tiles)
    fit = scratch_bytes // step_bytes(config) - tiles
    if fit < 1:
        return Unsupported(f"{tiles} tiles of keys need more than {scratch_bytes} bytes")
    if most >= 2**31 - fit:
        return Unsupported(
            f"work items times tiles of keys must be below {2**31 - fit}, got {most}"
        )
    return FoldPlan(
        chunk_steps=min(fit, most),
        most_tiles=tiles,
        chunks=-(-most // fit),
        choose=choose_kernel.make_plan(query.shape[2] // key.shape[2], tiles, config),
    )


def _most_steps(query, key, config: NSAConfig, tiles: int) -> int:
    """The most steps of a key head of a sequence: a query does not see the windows after it."""
    length, group = query.shape[1], query.shape[2] // key.shape[2]
    tokens = WARPGROUPS * ROWS // group
    items = -(-length // tokens)
    if length // config.kernel_stride != key.shape[1]:
        return items * tiles  # the queries are a part of the sequence
    further = tiles * KEYS - key.shape[1]  # by which windows may move up
    last = np.minimum((np.arange(items, dtype=np.int64) + 1) * tokens, length)
    seen = last // config.kernel_stride + further
    return int(np.minimum(-(-seen // KEYS), tiles).sum())
