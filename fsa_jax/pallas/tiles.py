"""Tiles of the Triton kernels: columns, tasks of a program, loads, products, loops over tiles."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fsa_jax.pallas.intrinsics import await_mma, dot, iota, load
from fsa_jax.pallas.tile_sizes import cut_width

#: Enough programs to balance the load on any GPU; with more tasks, the most tasks per program.
ENOUGH_PROGRAMS, MOST_TASKS = 16384, 4
#: Widest tile of float32 columns; float32 products hold a tile of each operand in registers.
FLOAT32_COLUMNS = 32


def columns_of(array, most: int) -> list[jax.Array]:
    """Column numbers of the tiles that `cut_width` makes of the last axis of an array.

    float32 tiles are narrow: `product` then rounds sums of few terms, as a dense product does.
    """
    if array.dtype == jnp.float32:
        most = min(most, FLOAT32_COLUMNS)
    return [start + iota(size) for start, size in cut_width(array.shape[-1], most)]


def programs_of(tasks: int, rows: int, enough: int = ENOUGH_PROGRAMS) -> int:
    """Number of programs for the tasks of a grid row.

    A program takes several tasks if all rows together have more than enough of them, because even
    idle programs cost time: 0.2 ms for 262,144 of them.
    """
    return -(-tasks // max(1, min(tasks * rows // enough, MOST_TASKS)))


def each(tasks: int, wanted: jax.Array, body) -> None:
    """Calls `body(task)` for the tasks of this program of grid axis 0; for none if not `wanted`.

    The tasks of a program are adjacent, so that programs that run concurrently process nearby tasks
    and find what they load in the L2 cache.
    """
    number, programs = pl.program_id(0), pl.num_programs(0)
    several = jax.lax.div(jnp.asarray(tasks + programs - 1), jnp.asarray(programs))
    begin = number * several
    end = jnp.where(wanted, jnp.minimum(begin + several, tasks), begin)
    jax.lax.fori_loop(begin, end, lambda task, _: body(task), None)


def rows_mask(rows: jax.Array, columns: jax.Array, width: int) -> jax.Array:
    """Mask [rows, columns] of the valid rows and the first `width` columns."""
    return rows[:, None] & (columns < width)[None, :]


def load_tiles(ref, batch, token, head, columns: list[jax.Array], rows=None) -> list[jax.Array]:
    """Loads R tokens of one sequence of `ref` [B, T, H, D] as tiles [R, columns].

    Args:
      ref: the array.
      batch: batch index of the sequence.
      token: int32 [R].
      head: one head, or one for each token.
      columns: column numbers of the tiles, from `columns_of`.
      rows: bool [R], the rows to load, 0 elsewhere; None for all.
    """
    width = ref.shape[3]
    head = head[:, None] if head.ndim else head
    # if everything is loaded, there is no mask to compute
    masked = rows is not None or sum(d.size for d in columns) != width
    rows = jnp.full(token.shape, True) if rows is None else rows
    return [
        load(
            ref.at[batch, token[:, None], head, d[None, :]],
            mask=rows_mask(rows, d, width) if masked else None,
        )
        for d in columns
    ]


def product(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """Product a b^T of matrices that are split into tiles of columns.

    The products of float32 tiles are computed separately and then added: in one long sum, the last
    of 128 terms would be rounded at the magnitude of the whole sum, an error that shows in
    dp - delta where a query attends to few keys.
    """
    parts = [dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True)]
    if a[0].dtype == jnp.float32:
        parts = [await_mma(x) for x in parts]
    return sum(parts[1:], parts[0])


def fold_tiles(step, state, begin, inner_begin, inner_end, end):
    """Folds `step(number, state, masked)` over the tiles begin .. end-1.

    Tiles inner_begin .. inner_end-1 need no mask and come first, then the tiles before and after.
    """
    before = inner_begin - begin

    def edge(i, state):
        return step(jnp.where(i < before, begin + i, inner_end + i - before), state, True)

    whole = lambda i, state: step(i, state, False)  # noqa: E731
    state = jax.lax.fori_loop(inner_begin, inner_end, whole, state)
    return jax.lax.fori_loop(0, before + (end - inner_end), edge, state)
