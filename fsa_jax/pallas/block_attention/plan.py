"""Sizes of the kernels of selected attention: tiles, buffers, and the method of each pass.

They affect time and memory, never the meaning of a result. `SelectedTuning()` leaves every choice
to the measured heuristics of this file; a field that is set is used as given.
"""

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp

from fsa_jax.arguments import scalars
from fsa_jax.pallas.support import Unsupported
from fsa_jax.pallas.tile_config import (
    Tile,
    padded_width,
    set_integer,
    shared_memory,
    unsupported_arrays_reason,
)
from fsa_jax.pallas.tile_sizes import next_power_of_two

SelectedMethod = Literal["kv_outer", "query_outer", "query_tile"]
METHODS: tuple[SelectedMethod, ...] = get_args(SelectedMethod)
#: Most elements of a block's K and V with which dK and dV still fit in registers.
ON_CHIP = 20480
#: Largest group for which a pass always uses the KV-outer kernels, and the largest for which the
#: lists decide between KV-outer and query-tile kernels; for larger groups they decide between
#: query-outer and query-tile kernels. Measured, see benchmarks/NOTES.md.
KV_OUTER_FORWARD, KV_OUTER_BACKWARD = (2, 10), (7, 15)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectedTuning:
    """How the Pallas-Triton kernels of selected attention run.

    Attributes:
      method: "kv_outer" (FSA), "query_outer" (vanilla NSA), "query_tile" (neighbouring queries
        share the blocks that they load) or None for the fastest one.
      forward: tile of the forward kernel, None for the heuristic one.
      backward: tile of the backward kernel, likewise.
      pairs: the most (query, block) pairs that one program walks; None for the heuristic number.
      block_k: keys of a tile, a power of two of at least 16 that divides the block size; None for
        the whole block, or a part of it if the whole block does not fit on chip.
      merge_elements: partial results that a program of the segmented reduction holds at once.
      partial_dtype: "float32" keeps partial results in float32; None uses as many bits as the
        inputs have.
      scratch_bytes: most bytes of partial results and gather lists at a time. Longer inputs are
        processed in chunks of heads, then of tokens. The budget does not include the float32 sums
        of dK and dV, which are 4*B*T*K*(D+E) bytes, and the scratch memory of a chunk's sort.

    Raises:
      ValueError: a size is out of its range.
    """

    method: SelectedMethod | None = None
    forward: Tile | None = None
    backward: Tile | None = None
    pairs: int | None = None
    block_k: int | None = None
    merge_elements: int = 1024
    partial_dtype: Literal["float32"] | None = None
    scratch_bytes: int = 2**30

    def __post_init__(self):
        scalars.choice("method", self.method, (None, *METHODS))
        for name in ("forward", "backward"):
            tile = getattr(self, name)
            if tile is not None and not isinstance(tile, Tile):
                raise ValueError(f"{name} must be None or a Tile, got {tile!r}")
        if self.pairs is not None:
            set_integer(self, "pairs", 1, 2**20)
        if self.block_k is not None:
            size = set_integer(self, "block_k", 16, 128)
            if size != next_power_of_two(size):
                raise ValueError(f"block_k must be a power of two, got {size}")
        set_integer(self, "merge_elements", 256, 2**16)
        scalars.choice("partial_dtype", self.partial_dtype, (None, "float32"))
        set_integer(self, "scratch_bytes", 2**20, 2**40)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All static parameters of a call of the kernels.

    Attributes:
      forward_methods, backward_methods: one or two of `METHODS`; if there are two, the lists decide
        between them on the device.
      block: keys of a tile; a listed block consists of `block_size // block` tiles.
      forward, backward: tiles of the KV-outer kernels.
      key_gradient: tile of the KV-outer kernel that computes dK and dV only.
      query_outer, query_outer_backward: tiles of the query-outer kernels.
      query_tile, query_tile_backward: tiles of the query-tile kernels.
      pairs: the most pairs of a work item.
      heads, tokens: (sequence, KV head) pairs and tokens of a chunk.
      sort_pairs: the most pairs that are sorted at a time.
      merge_elements: see `SelectedTuning`.
      partial_dtype, gradient_dtype: dtypes of partial outputs and of partial dq.
    """

    forward_methods: tuple[str, ...]
    backward_methods: tuple[str, ...]
    block: int
    forward: Tile
    backward: Tile
    key_gradient: Tile
    query_outer: Tile
    query_outer_backward: Tile
    query_tile: Tile
    query_tile_backward: Tile
    pairs: int
    heads: int
    tokens: int
    sort_pairs: int
    merge_elements: int
    partial_dtype: jnp.dtype
    gradient_dtype: jnp.dtype


def _unsupported_reason(tuning: SelectedTuning, query, key, value, block_size: int) -> str | None:
    """Why the kernels cannot serve such a call on any GPU; None if they can."""
    if reason := unsupported_arrays_reason(query, key, value):
        return reason
    if block_size % 16:
        return f"block_size must be a multiple of 16, got {block_size}"
    if tuning.block_k is not None and block_size % tuning.block_k:
        return f"block_k={tuning.block_k} must divide block_size={block_size}"
    group = query.shape[2] // key.shape[2]
    for tile in (tuning.forward, tuning.backward):
        if tile is not None and tile.rows < group:
            return f"rows={tile.rows} must hold the {group} heads of a group"
    if key.shape[0] * key.shape[1] * key.shape[2] > 2**30:
        return f"batch * tokens * key heads must be at most 2**30, got shape {key.shape}"
    return None


def _too_wide(query, key, value, capability: int) -> str:
    return (
        f"{query.shape[2] // key.shape[2]} query heads per key head, of {query.dtype} and head "
        f"widths {key.shape[3]} and {value.shape[3]}, need more than the "
        f"{shared_memory(capability)} bytes of shared memory of the GPU"
    )


def make_plan(
    tuning: SelectedTuning, query, key, value, num_selected: int, block_size: int, capability: int
) -> Plan | Unsupported:
    """Chooses what `tuning` leaves open, from shapes, dtypes and the device's compute capability.

    Raises:
      ValueError: `scratch_bytes` does not hold the partial results of one token.
    """
    if reason := _unsupported_reason(tuning, query, key, value, block_size):
        return Unsupported(reason)
    sizes = _tile_sizes(query, key, value, block_size, capability)
    if sizes is None:
        return Unsupported(_too_wide(query, key, value, capability))
    batch, _, kv_heads, width = key.shape
    group, value_width = query.shape[2] // kv_heads, value.shape[3]
    widths = padded_width(width) + padded_width(value_width)
    dtype = jnp.dtype(tuning.partial_dtype or query.dtype)
    # partial dq need more bits than the dq that they are summed into
    gradient_dtype = jnp.dtype(jnp.float16 if dtype == jnp.bfloat16 else jnp.float32)
    block, rows = tuning.block_k or sizes[0], sizes[1]
    # float32: short sums, since adding thousands of terms in sequence would lose its precision
    pairs = tuning.pairs or (64 if query.dtype == jnp.float32 else 1024)
    # a tile of queries holds its sums in registers, and float32 products need registers as well
    narrow = query.dtype.itemsize == 2 and widths <= 256
    most = max(64 if narrow else 32 if widths <= 256 else 16, next_power_of_two(group))
    query_tile = Tile(rows=most, num_warps=max(4, most // 16), num_stages=3 if narrow else 2)
    forward, backward = (
        (tuning.method,) if tuning.method else _methods(group, narrow, *bounds)
        for bounds in (KV_OUTER_FORWARD, KV_OUTER_BACKWARD)
    )
    # bytes of a pair: its list entries, its share of the partial sums of hot blocks, and, in the
    # kernels that have them, its partial results
    pair_bytes = 16 + 8 * block * (width + value_width) // pairs
    if "kv_outer" in forward + backward:
        part = max(width * gradient_dtype.itemsize, value_width * dtype.itemsize)
        pair_bytes += group * (part + 4)
    num_selected = num_selected * (block_size // block)
    batch_heads, length = batch * kv_heads, query.shape[1]
    # the rows of a chunk's partial results are indexed in 32 bits
    budget = min(tuning.scratch_bytes, 2**31 // group * pair_bytes)
    heads, tokens = _chunk(budget, batch_heads, length, num_selected, pair_bytes)
    return Plan(
        forward_methods=forward,
        backward_methods=backward,
        block=block,
        forward=tuning.forward or Tile(rows=rows),
        # a third stage is faster, but costs registers; only power-of-two groups leave enough
        backward=tuning.backward or Tile(rows=rows, num_stages=2 if rows % group else 3),
        key_gradient=tuning.backward or Tile(rows=rows, num_stages=2),
        query_outer=tuning.forward or Tile(num_warps=2, num_stages=2),
        query_outer_backward=tuning.backward or Tile(num_stages=2),
        query_tile=tuning.forward or query_tile,
        query_tile_backward=tuning.backward or dataclasses.replace(query_tile, num_stages=2),
        pairs=pairs,
        heads=heads,
        tokens=tokens,
        sort_pairs=min(tuning.scratch_bytes // 16, 2**30),
        merge_elements=tuning.merge_elements,
        partial_dtype=dtype,
        gradient_dtype=gradient_dtype,
    )


def _methods(group: int, narrow: bool, alone: int, most: int) -> tuple[str, ...]:
    """The methods of a pass; query tiles are for groups above `alone` and `narrow` heads only."""
    outer = "kv_outer" if group <= most else "query_outer"
    return ("query_tile", outer) if narrow and group > alone else (outer,)


def _tile_sizes(query, key, value, block_size: int, capability: int) -> tuple[int, int] | None:
    """Keys and rows of the largest tile whose backward kernel fits on chip; None if none fits.

    There are two limits: registers hold dK and dV of the block, which bounds block * (D + E);
    shared memory holds K and V, two stages of q and dout, and p and ds.
    """
    group, itemsize = query.shape[2] // key.shape[2], query.dtype.itemsize
    widths = sum(padded_width(x.shape[3]) for x in (key, value))
    shared = shared_memory(capability)
    # wide heads and older matrix units need more registers per row
    most = 64 if widths <= 256 and capability >= 90 and itemsize == 2 else 32
    most = max(most, next_power_of_two(group))
    blocks = [b for b in (128, 64, 32, 16) if block_size % b == 0 and b * widths <= ON_CHIP]
    for block in blocks:
        for rows in (r for r in (128, 64, 32, 16) if group <= r <= most):
            if itemsize * (widths * (block + 2 * rows) + 2 * rows * block) + 2048 <= shared:
                return block, rows
    return None


def _chunk(
    budget: int, heads: int, length: int, num_selected: int, pair_bytes: int
) -> tuple[int, int]:
    """Heads and tokens of a chunk: whole heads where they fit, else a part of one head's tokens."""
    token_bytes = num_selected * pair_bytes
    if token_bytes > budget:
        raise ValueError(
            f"scratch_bytes must hold the partial results of one token, {token_bytes}, got {budget}"
        )
    fit = budget // (length * token_bytes)
    if fit:
        # the largest divisor of the number of heads that fits
        return max(h for h in range(1, heads + 1) if heads % h == 0 and h <= fit), length
    chunks = -(-length // (budget // token_bytes))
    return 1, -(-length // chunks)
