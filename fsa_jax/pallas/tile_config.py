"""Limits on the sizes of all kernels: tiles, supported arrays, and shared memory of a device."""

import dataclasses

import jax.numpy as jnp

from fsa_jax.arguments import scalars
from fsa_jax.pallas.tile_sizes import cut_width, next_power_of_two

#: Shared memory that one program may use, in bytes, by compute capability: the minimum of a family.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
#: Widest head, and most query heads per key head.
WIDEST, MOST_ROWS = 256, 128
#: Most programs along the second and the third axis of a grid.
MOST_PROGRAMS = 65535


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Tile sizes and launch parameters of a program of a KV-outer kernel.

    Attributes:
      rows: rows (query token, head of the group) of a step's matrices, a power of two >= 16.
      num_warps: warps of a program, a power of two up to 16.
      num_stages: depth of the software pipeline, 1 to 8.
    """

    rows: int = 64
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self):
        for name, least, most in (("rows", 16, 512), ("num_warps", 1, 16)):
            size = set_integer(self, name, least, most)
            if size != next_power_of_two(size):
                raise ValueError(f"{name} must be a power of two, got {size}")
        set_integer(self, "num_stages", 1, 8)


def set_integer(owner, name, least, most) -> int:
    """Checks an integer field and converts a NumPy integer to a Python one."""
    size = scalars.size(name, getattr(owner, name), least, most)
    object.__setattr__(owner, name, size)
    return size


def unsupported_arrays_reason(query, key, value) -> str | None:
    """Why the kernels cannot serve arrays of these shapes and dtypes; None if they can."""
    if query.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        return f"the dtype must be float16, bfloat16 or float32, got {query.dtype}"
    for name, x in (("key", key), ("value", value)):
        if x.shape[3] > WIDEST:
            return f"the head width of {name} must be at most {WIDEST}, got {x.shape[3]}"
    group = query.shape[2] // key.shape[2]
    if group > MOST_ROWS:
        return f"at most {MOST_ROWS} query heads may share a key head, got {group}"
    return None


def shared_memory(capability: int) -> int:
    """Bytes of shared memory that one program may use on a GPU of this compute capability."""
    return SHARED_MEMORY[max(c for c in SHARED_MEMORY if c <= capability)]


def padded_width(width: int) -> int:
    """Total columns of the tiles that `tile_sizes.cut_width` makes of `width`."""
    return sum(size for _, size in cut_width(width, 64))
