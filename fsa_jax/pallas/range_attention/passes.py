"""Attention to contiguous ranges of keys from kernels: sizes, and the two passes.

Forward: one kernel. Backward: dq by one whose programs own rows, dK and dV by one whose programs
own keys; seven matmuls instead of the five of a single pass, and no sums between programs but those
of the splits, so the order of every sum is fixed.
"""

import dataclasses

from fsa_jax.pallas import tile_tables
from fsa_jax.pallas.range_attention import hopper_groups, key_kernel, query_kernels
from fsa_jax.pallas.support import Unsupported
from fsa_jax.pallas.tile_config import Tile, arrays_reason, padded_width, shared_memory

#: Programs of the kernel of dK and dV that keep a GPU busy, whatever the number of keys.
PROGRAMS = 1024
#: Fewest steps of one of them, if all rows see its keys.
SHORTEST = 8
#: Most bytes of the parts of dK and dV that they leave.
PARTS_BYTES = 2**28
#: Most programs of the second and third axis of a grid.
MOST_HEADS = 65535


#: Rows, keys, warps and stages of tiles, the fastest first, by kernel and what it multiplies:
#: 16-bit numbers of D + E <= 256 or more, or float32, which has no matrix unit. Measured on an H100
#: (benchmarks/NOTES.md): two programs of 4 warps on a multiprocessor, one of which multiplies while
#: the other one takes exponents, beat one of 8. A window has few tiles of keys that all rows see
#: whole: narrower ones leave less to mask.
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
    """How a program is cut: like `Tile`, with the number of `keys` of a tile."""

    keys: int = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call of the kernels.

    Attributes:
      forward, query_gradient, key_gradient: tiles of the kernels.
      splits: parts of the rows that see a tile of keys.
    """

    forward: RangeTile
    query_gradient: RangeTile
    key_gradient: RangeTile
    splits: int


def _reason(query, key, value) -> str | None:
    """Why no kernel takes such a call, on whatever GPU; None if they do."""
    if reason := arrays_reason(query, key, value):
        return reason
    batch, length, heads, _ = query.shape
    if batch * key.shape[2] > MOST_HEADS:
        return f"batch * key heads must be at most {MOST_HEADS}, got shape {key.shape}"
    if length * (heads // key.shape[2]) >= 2**30:
        return f"tokens * query heads a key head must be below 2**30, got shape {query.shape}"
    return None


def shared_bytes(kernel: str, tile: RangeTile, query, key, value) -> int:
    """Shared memory that a kernel takes, bytes."""
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
    """The tiles of the table, else the first of `TILES` that fit on chip.

    `causal`: a query sees most of what comes before it, so that few tiles of keys are masked.
    """
    if reason := _reason(query, key, value):
        return Unsupported(reason)
    both = sum(padded_width(x.shape[3]) for x in (key, value))
    kind = "float32" if query.dtype.itemsize == 4 else "wide" if both > 256 else "narrow"
    window = kind == "narrow" and tile_tables.branch_of(query, key) == "window" and not causal

    def fitting(kernel):
        """The first tile that fits in shared memory, unless a faster one is known."""
        known = (kernel, "window") if window and (kernel, "window") in TILES else (kernel, kind)
        for rows, keys, num_warps, most in TILES[known]:
            if num_warps == 8 and capability < 90 and kind == "narrow":
                continue  # older matrix units need more registers
            for stages in range(most, 1, -1):
                tile = RangeTile(rows=rows, keys=keys, num_warps=num_warps, num_stages=stages)
                if shared_bytes(kernel, tile, query, key, value) <= shared_memory(capability):
                    # tables are measured with the ranges of sparse attention
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
    """Enough parts to keep a GPU busy, not so many that they are short or need much memory."""
    batch, slots, kv_heads, _ = key.shape
    programs = max(1, batch * kv_heads * -(-slots // tile.keys))
    part_bytes = max(1, 4 * (key.size + value.size))
    steps = -(-query.shape[1] * (query.shape[2] // kv_heads) // tile.rows)
    return max(1, min(-(-PROGRAMS // programs), PARTS_BYTES // part_bytes, steps // SHORTEST))


def attention(plan, query, key, value, visible, seers, *, scale, interpret):
    """Out [B, T, N, E] and lse float32 [B, T, N]; arguments as in `query_kernels.attention`."""
    return query_kernels.attention(
        query, key, value, visible, seers, plan=plan, scale=scale, interpret=interpret
    )


def gradients(
    plan, query, key, value, visible, seers, lse, delta, dout, *, scale, interpret, mosaic=False
):  # fmt: skip
    """(dq, dk, dv) in the dtypes of query, key and value; arguments as in `range_rows`.

    `mosaic`: by the kernels in Mosaic GPU.
    """
    static: dict = {"plan": plan, "scale": scale, "interpret": interpret}
    query_gradient, key_gradients = query_kernels.query_gradient, key_kernel.key_gradients
    if mosaic and scale:  # `hopper_key_kernel.py` divides by it
        static = {"scale": scale}
        query_gradient, key_gradients = hopper_groups.query_gradient, hopper_groups.key_gradients
    rest = (lse, delta, dout)
    dquery = query_gradient(query, key, value, visible, seers, *rest, **static)
    return dquery, *key_gradients(query, key, value, seers, *rest, **static)
