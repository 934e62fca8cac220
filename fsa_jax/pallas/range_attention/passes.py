"""Forward and backward pass of attention to contiguous ranges of keys, and the plan of their sizes.

The forward pass is one kernel. In the backward pass, one kernel whose programs own rows computes
dq, and one whose programs own keys computes dK and dV. These take seven matmuls instead of the five
of a single pass, but apart from the splits no sums cross programs, so the order of every sum is
fixed.
"""

import dataclasses

from fsa_jax.pallas import tile_tables
from fsa_jax.pallas.range_attention import hopper_groups, key_kernel, query_kernels
from fsa_jax.pallas.support import Unsupported
from fsa_jax.pallas.tile_config import (
    MOST_PROGRAMS,
    Tile,
    padded_width,
    shared_memory,
    unsupported_arrays_reason,
)

#: Programs of the dK and dV kernel that keep a GPU busy, for any number of keys.
PROGRAMS = 1024
#: Fewest steps of such a program if all rows attend to its keys.
SHORTEST = 8
#: Most bytes of the partial dK and dV of these programs.
PARTS_BYTES = 2**28


#: Rows, keys, warps and stages of tiles, the fastest first, by kernel and kind of operands: 16-bit
#: numbers with D + E <= 256 ("narrow") or more ("wide"), or float32, which has no matrix unit.
#: Measured on an H100 (benchmarks/NOTES.md): two programs of 4 warps per multiprocessor, one of
#: which multiplies while the other computes exponentials, are faster than one program of 8 warps.
#: In a window few key tiles need no mask; narrower tiles leave less to mask.
TILES = {
    ("forward", "window"): ((64, 32, 4, 3), (32, 32, 4, 3)),
    ("forward", "narrow"): ((64, 64, 4, 3), (64, 32, 4, 3), (32, 32, 4, 3)),
    ("forward", "wide"): ((64, 32, 4, 3), (32, 32, 4, 3), (16, 16, 4, 2)),
    ("forward", "float32"): ((32, 32, 8, 2), (16, 16, 4, 2)),
    ("query_gradient", "narrow"): ((64, 64, 4, 2), (64, 32, 4, 3), (32, 32, 4, 3)),
    ("query_gradient", "wide"): ((64, 32, 4, 3), (32, 32, 4, 3), (16, 16, 4, 2)),
    ("query_gradient", "float32"): ((32, 32, 8, 2), (16, 16, 4, 2)),
    ("key_gradient", "narrow"): ((64, 128, 8, 3), (32, 64, 4, 3), (32, 32, 4, 3)),
    ("key_gradient", "wide"): ((32, 64, 8, 3), (32, 32, 4, 3), (16, 16, 4, 2)),
    ("key_gradient", "float32"): ((32, 32, 8, 2), (16, 16, 4, 2)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeTile(Tile):
    """Tile sizes and launch parameters: a `Tile` with the number of `keys` of a key tile."""

    keys: int = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """All static parameters of a call of the kernels.

    Attributes:
      forward, query_gradient, key_gradient: tiles of the kernels.
      splits: number of parts that the rows attending to a key tile are divided into.
    """

    forward: RangeTile
    query_gradient: RangeTile
    key_gradient: RangeTile
    splits: int


def _unsupported_reason(query, key, value) -> str | None:
    """Why the kernels cannot serve such a call on any GPU; None if they can."""
    if reason := unsupported_arrays_reason(query, key, value):
        return reason
    batch, length, heads, _ = query.shape
    if batch * key.shape[2] > MOST_PROGRAMS:
        return f"batch * key heads must be at most {MOST_PROGRAMS}, got shape {key.shape}"
    if length * (heads // key.shape[2]) >= 2**30:
        return f"tokens * query heads per key head must be below 2**30, got shape {query.shape}"
    return None


def shared_bytes(kernel: str, tile: RangeTile, query, key, value) -> int:
    """Shared memory that a kernel takes, in bytes."""
    width = padded_width(key.shape[3])
    both = width + padded_width(value.shape[3])
    rows, keys, stages = tile.rows, tile.keys, tile.num_stages
    elements = {
        "forward": rows * width + stages * keys * both,
        "query_gradient": rows * (both + keys) + stages * keys * both,
        "key_gradient": keys * both + stages * rows * both,
    }
    return query.dtype.itemsize * elements[kernel] + 2048


def make_plan(
    query,
    key,
    value,
    capability: int,
    table: tile_tables.Table | None = None,
    *,
    causal: bool = False,
) -> Plan | Unsupported:
    """Plans a call: tiles of the table, or else the first tiles of `TILES` that fit on chip.

    With `causal`, a query attends to most tokens before it, so that few key tiles are masked.
    """
    if reason := _unsupported_reason(query, key, value):
        return Unsupported(reason)
    both = sum(padded_width(x.shape[3]) for x in (key, value))
    kind = "float32" if query.dtype.itemsize == 4 else "wide" if both > 256 else "narrow"
    window = kind == "narrow" and tile_tables.branch_of(query, key) == "window" and not causal

    def fitting(kernel):
        """The first tile that fits in shared memory, unless the table has a faster one."""
        known = (kernel, "window") if window and (kernel, "window") in TILES else (kernel, kind)
        for rows, keys, num_warps, most in TILES[known]:
            if num_warps == 8 and capability < 90 and kind == "narrow":
                continue  # older matrix units need more registers
            for stages in range(most, 1, -1):
                tile = RangeTile(rows=rows, keys=keys, num_warps=num_warps, num_stages=stages)
                if shared_bytes(kernel, tile, query, key, value) <= shared_memory(capability):
                    # tables are measured on the ranges of sparse attention, not on causal ranges
                    measured = None if causal else table
                    return tile_tables.choose(f"range_{kernel}", measured, tile, query, key, value)
        return None

    forward, dquery, dkeys = map(fitting, ("forward", "query_gradient", "key_gradient"))
    if forward is None or dquery is None or dkeys is None:
        return Unsupported(
            f"head widths {key.shape[3]} and {value.shape[3]} of {query.dtype} need more than the "
            f"{shared_memory(capability)} bytes of shared memory of the GPU"
        )
    return Plan(forward, dquery, dkeys, splits=_splits(query, key, value, dkeys))


def _splits(query, key, value, tile: RangeTile) -> int:
    """Enough parts to keep a GPU busy, but not so many that they are short or need much memory."""
    batch, slots, kv_heads, _ = key.shape
    programs = max(1, batch * kv_heads * -(-slots // tile.keys))
    part_bytes = max(1, 4 * (key.size + value.size))
    steps = -(-query.shape[1] * (query.shape[2] // kv_heads) // tile.rows)
    return max(1, min(-(-PROGRAMS // programs), PARTS_BYTES // part_bytes, steps // SHORTEST))


def attention(plan, query, key, value, visible, query_range, *, scale, interpret):
    """Returns out [B, T, N, E], lse float32 [B, T, N]; arguments as `query_kernels.attention`."""
    return query_kernels.attention(
        query, key, value, visible, query_range, plan=plan, scale=scale, interpret=interpret
    )


def gradients(
    plan, query, key, value, visible, query_range, lse, delta, dout, *, scale, interpret,
    mosaic=False,
):  # fmt: skip
    """Returns (dq, dk, dv) in the dtypes of query, key and value.

    The arguments are those of `query_kernels.query_gradient`; `mosaic` selects the Mosaic GPU
    kernels.
    """
    static: dict = {"plan": plan, "scale": scale, "interpret": interpret}
    query_gradient, key_gradients = query_kernels.query_gradient, key_kernel.key_gradients
    if mosaic and scale:  # `hopper_key_kernel.py` divides by the scale
        static = {"scale": scale}
        query_gradient, key_gradients = hopper_groups.query_gradient, hopper_groups.key_gradients
    rest = (lse, delta, dout)
    dquery = query_gradient(query, key, value, visible, query_range, *rest, **static)
    return dquery, *key_gradients(query, key, value, query_range, *rest, **static)
