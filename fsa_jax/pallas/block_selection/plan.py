"""Sizes of the kernels of block selection.

Shapes: R rows (token, head of the group) of a tile, G query heads per key head, H heads and C
tokens of a chunk.
"""

import dataclasses

from fsa_jax.config import NSAConfig
from fsa_jax.pallas import tile_tables
from fsa_jax.pallas.support import Unsupported
from fsa_jax.pallas.tile_config import (
    MOST_PROGRAMS,
    Tile,
    padded_width,
    shared_memory,
    unsupported_arrays_reason,
)
from fsa_jax.pallas.tile_sizes import next_power_of_two
from fsa_jax.semantics.selection_rule import longest_document

#: Blocks of a tile.
BLOCKS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectPlan:
    """All static parameters of a call of the kernels.

    Attributes:
      rows: R, a power of two that is at least 16 and at least G.
      num_warps, num_stages: warps and pipeline stages of the score kernel.
      hands_over: whether a window that two blocks share is computed only once; see `score_kernel`.
      heads, tokens: H and C of a chunk.
      choose_tokens: tokens of a program of the choose kernel, a power of two.
      choose_warps: warps of a program of the choose kernel.
    """

    rows: int
    num_warps: int
    num_stages: int
    hands_over: bool
    heads: int
    tokens: int
    choose_tokens: int
    choose_warps: int


def make_plan(
    query,
    key,
    config: NSAConfig,
    scratch_bytes: int = 2**29,
    capability: int = 90,
    table: tile_tables.Table | None = None,
) -> SelectPlan | Unsupported:
    """Chooses sizes from shapes, dtypes and the device's compute capability.

    `scratch_bytes` is the most bytes of ranks at a time.

    Raises:
      ValueError: `scratch_bytes` does not hold the ranks of one tile of rows.
    """
    if reason := unsupported_arrays_reason(query, key, key):
        return Unsupported(reason)
    batch, length, query_heads, _ = query.shape
    kv_heads = key.shape[2]
    sizes = _tile_sizes(query, key, config, capability)
    if sizes is None:
        return Unsupported(
            f"head width {key.shape[3]} of {query.dtype} needs more shared memory than the GPU has"
        )
    tile = Tile(
        rows=sizes[0],
        num_warps=8 if sizes[0] >= (32 if query.dtype.itemsize == 4 else 128) else 4,
        num_stages=sizes[1],
    )
    tile = tile_tables.choose("score", table, tile, query, key, key)
    rows = tile.rows
    step = tile_tokens(rows, query_heads // kv_heads, config)[0]
    tiles = num_tiles(query, key, config)
    heads, tokens = _chunk(
        min(scratch_bytes, 2**32),  # offsets into the ranks have 32 bits
        batch * kv_heads,
        length,
        step,
        4 * tiles * (BLOCKS + 1),
    )
    # kept on chip: the largest ranks of all tiles, and one tile of ranks
    choose_tokens = min(16, max(1, 2048 // max(next_power_of_two(tiles), BLOCKS)))
    return SelectPlan(
        rows=rows,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        hands_over=config.kernel_size == 2 * config.kernel_stride,
        heads=heads,
        tokens=tokens,
        choose_tokens=choose_tokens,
        choose_warps=4,
    )


def num_tiles(query, key, config: NSAConfig) -> int:
    """Number of tiles of BLOCKS blocks of a sequence."""
    length = longest_document(query.shape[1], key.shape[1], config)
    return -(-config.num_blocks(length) // BLOCKS)


def tile_tokens(rows: int, group: int, config: NSAConfig) -> tuple[int, int]:
    """Tokens of a row tile, and rows of a token.

    A tile has at most topk * block_size tokens, so that all of its tokens that need scores belong
    to one document.
    """
    padded_group = next_power_of_two(group)
    tokens = max(1, rows // padded_group)
    while tokens > config.topk * config.block_size:
        tokens //= 2
    return tokens, max(padded_group, 16 // tokens)  # matrix units take at least 16 rows


def _tile_sizes(query, key, config, capability) -> tuple[int, int] | None:
    """Rows of a tile and stages of its pipeline: the most that fit on chip; None if none fit."""
    group, itemsize = query.shape[2] // key.shape[2], query.dtype.itemsize
    width = padded_width(key.shape[3])
    least = max(16, next_power_of_two(group))
    # float32 is multiplied without the matrix unit and needs more registers per row
    most = max(least, 64 if itemsize == 4 else 128)
    # Hopper keeps one more buffer; with 2 stages it has registers for two concurrent programs
    for stages in (2, 1) if capability >= 90 else (3, 2, 1):
        for rows in (r for r in (128, 64, 32, 16) if least <= r <= most):
            # q, keys, and ranks that change from the matrix unit's layout to that of the stores
            used = itemsize * width * (rows + stages * BLOCKS)
            used += 4 * BLOCKS * tile_tokens(rows, group, config)[0] + 1024
            if used <= shared_memory(capability):
                return rows, stages
    return None


def _chunk(budget: int, heads: int, length: int, step: int, token_bytes: int) -> tuple[int, int]:
    """Heads and tokens of a chunk: whole heads where they fit, else a part of one head's tokens."""
    whole = -(-length // step) * step
    fit = min(MOST_PROGRAMS, budget // (whole * token_bytes))
    if fit:
        # the largest divisor of the number of heads that fits
        return max(h for h in range(1, fit + 1) if heads % h == 0), whole
    most = budget // (step * token_bytes)  # steps of a chunk
    if not most:
        raise ValueError(
            f"scratch_bytes must hold the ranks of {step} tokens, {step * token_bytes}, "
            f"got {budget}"
        )
    chunks = -(-(whole // step) // most)
    return 1, -(-(whole // step) // chunks) * step
