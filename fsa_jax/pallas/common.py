"""What every kernel of this package shares: calling, tile sizes, products, padding of widths."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOG2_E = math.log2(math.e)


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`; Triton's tiles have no other sizes."""
    return 1 << max(size - 1, 0).bit_length()


def tile_width(width: int) -> int:
    """Columns of a tile that holds `width`; matrix units take at least 16."""
    return max(16, next_power_of_two(width))


def call(kernel, *arrays, grid, out_shape, interpret, num_warps=4, num_stages=2, aliases=None):
    """`pallas_call` through Triton: whole arrays in device memory, one program a grid point."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        interpret=interpret,
        name=kernel.__name__,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
    )(*arrays)


def cut_width(width: int, most: int) -> list[tuple[int, int]]:
    """Cuts `width` columns into tiles (start, size) of at most `most`.

    Tiles are powers of two from 16 on, so that little is padded: 80 is 64 + 16, not 128.
    """
    tiles, start = [], 0
    while start < width:
        left = width - start
        size = tile_width(left)
        if size - left >= 16:  # a smaller tile and another one after it pad less
            size //= 2
        size = min(most, size)
        tiles.append((start, size))
        start += size
    return tiles


def columns_of(width: int, most: int) -> list[jax.Array]:
    """Column numbers of the tiles of `cut_width`."""
    return [start + iota(size) for start, size in cut_width(width, most)]


def iota(size: int) -> jax.Array:
    """int32 numbers 0 .. size-1."""
    return jax.lax.iota(jnp.int32, size)


def split(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of numbers >= 0, without the sign rules of // and %."""
    quotient = jax.lax.div(x, jnp.full_like(x, size))
    return quotient, x - quotient * size


def rows_mask(rows: jax.Array, columns: jax.Array, width: int) -> jax.Array:
    """Mask [rows, columns] of the rows that exist and the first `width` columns."""
    return rows[:, None] & (columns < width)[None, :]


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over axis `contract[0]` of `a` and `contract[1]` of `b`, summed in float32.

    float32 operands are multiplied as they are: tf32 would lose 13 bits of them.
    """
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def load(ref, *, mask=None, other: float = 0) -> jax.Array:
    """Loads what `mask` allows, all without a mask, and `other` elsewhere."""
    return plgpu.load(ref, mask=mask, other=None if mask is None else other)


store = plgpu.store


def load_tiles(ref, batch, token, head, columns: list[jax.Array], rows=None) -> list[jax.Array]:
    """Tiles [R, columns] of `ref` [B, T, H, D] at R tokens of one row, cut as `columns` say.

    Args:
      ref: the array.
      batch: row of the batch.
      token: int32 [R].
      head: one head, or one for each token.
      columns: what `columns_of` gives.
      rows: bool [R], rows that are loaded, 0 elsewhere; None for all.
    """
    width = ref.shape[3]
    head = head[:, None] if head.ndim else head
    # without anything to leave out there is no mask to compute
    masked = rows is not None or sum(d.size for d in columns) != width
    rows = jnp.full(token.shape, True) if rows is None else rows
    return [
        load(
            ref.at[batch, token[:, None], head, d[None, :]],
            mask=rows_mask(rows, d, width) if masked else None,
        )
        for d in columns
    ]


def softmax_weights(logits: jax.Array, lse: jax.Array, scale: float, dtype) -> jax.Array:
    """Weights exp(scale * logits - lse) of a softmax whose logsumexp is known.

    For float32 inputs the difference is taken first: scaled to base 2 before it, both numbers would
    be rounded once more, which doubles the error of dq.
    """
    if dtype == jnp.float32:
        return jnp.exp2((logits * scale - lse) * LOG2_E)
    return jnp.exp2(logits * (scale * LOG2_E) - lse * LOG2_E)


def product(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """Product a b^T of matrices that are cut into tiles of columns."""
    first, *others = (dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True))
    return sum(others, first)


def fold_tiles(step, state, begin, inner_begin, inner_end, end):
    """Folds `step(number, state, masked)` over the tiles begin .. end-1.

    Those from inner_begin to inner_end-1 need no mask, and come first; then those before and after.
    """
    before = inner_begin - begin

    def edge(i, state):
        return step(jnp.where(i < before, begin + i, inner_end + i - before), state, True)

    whole = lambda i, state: step(i, state, False)  # noqa: E731
    state = jax.lax.fori_loop(inner_begin, inner_end, whole, state)
    return jax.lax.fori_loop(0, before + (end - inner_end), edge, state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum:
    """A float32 sum of many tiles; with `lost`, the rounding errors of its additions (Kahan).

    Products of float32 are exact enough that the order of long sums shows: thousands of terms added
    in a row err several times more than what dense attention adds in trees.
    """

    total: jax.Array
    lost: jax.Array | None

    @staticmethod
    def zeros(shape: tuple[int, ...], exact: bool) -> "Sum":
        zeros = jnp.zeros(shape, jnp.float32)
        return Sum(zeros, zeros if exact else None)

    def add(self, part: jax.Array, decay: jax.Array | None = None) -> "Sum":
        """The sum times `decay`, plus `part`."""
        total = self.total if decay is None else self.total * decay
        if self.lost is None:
            return Sum(total + part, None)
        part = part - (self.lost if decay is None else self.lost * decay)
        new = total + part
        return Sum(new, (new - total) - part)
