"""What every kernel of this package shares: calling, tile sizes, products, padding of widths."""

import contextlib
import contextvars
import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fsa_jax.pallas.tile_sizes import cut_width
from fsa_jax.pallas.tile_sizes import next_power_of_two as next_power_of_two
from fsa_jax.pallas.tile_sizes import tile_width as tile_width

LOG2_E = math.log2(math.e)
#: Whether the kernel that is being traced is for interpret mode, which knows no instructions of a
#: GPU.
_interpreted = contextvars.ContextVar("interpreted", default=False)
#: Programs that any GPU can share evenly, and the most tasks that one gets where there are more.
ENOUGH_PROGRAMS, MOST_TASKS = 16384, 4
#: Widest tile of float32 columns; products of float32 hold one of each side in registers.
FLOAT32_COLUMNS = 32


def call(kernel, *arrays, grid, out_shape, interpret, num_warps=4, num_stages=2, aliases=None):
    """`pallas_call` through Triton: whole arrays in device memory, one program a grid point.

    Kernels count in 32 bits, whatever `jax_enable_x64` says.
    """
    # interpret mode evaluates a kernel anew when it is lowered, where x64 may be on: there weakly
    # typed numbers would become int64
    arrays = [jax.lax.convert_element_type(x, x.dtype) for x in arrays]
    with _tracing(interpret), jax.enable_x64(False):
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=out_shape,
            interpret=interpret,
            name=kernel.__name__,
            input_output_aliases=aliases or {},
            compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        )(*arrays)


@contextlib.contextmanager
def _tracing(interpret: bool):
    token = _interpreted.set(interpret)
    try:
        yield
    finally:
        _interpreted.reset(token)


def exp2(x: jax.Array) -> jax.Array:
    """2^x of float32 as one instruction; 0 where the result is below 2^-126.

    jnp.exp2 takes care of smaller results, which a softmax adds to nothing: four instructions.
    """
    return _instruction("ex2.approx.ftz.f32 $0, $1;", jnp.exp2, x)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x of float32 as one instruction, right to the last bit but one."""
    return _instruction("rcp.approx.ftz.f32 $0, $1;", lambda x: 1 / x, x)


def log2(x: jax.Array) -> jax.Array:
    """Binary logarithm of float32 as one instruction, right to 2^-22."""
    return _instruction("lg2.approx.ftz.f32 $0, $1;", jnp.log2, x)


def multiply_add(a, b, c) -> jax.Array:
    """The sum a * b + c of float32, broadcast, rounded once: one instruction instead of two.

    The compiler may not fuse the two by itself, since that changes the rounding.
    """
    return _instruction("fma.rn.f32 $0, $1, $2, $3;", lambda a, b, c: a * b + c, a, b, c)


def settled(x: jax.Array) -> jax.Array:
    """The float32 `x` itself: products that were added to it have ended when it is used.

    A sum of products over a loop may be left running on the matrix unit into the next step. Where
    the assembler then finds other instructions on its registers, it makes every product wait for
    the one before it. The instruction costs nothing: the assembler drops it.
    """
    return _instruction("mov.b32 $0, $1;", lambda x: x, x)


def _instruction(assembly: str, interpreted, *args) -> jax.Array:
    """An elementwise PTX instruction; what `interpreted` computes in interpret mode."""
    args = [jnp.asarray(x, jnp.float32) for x in args]
    shape = jnp.broadcast_shapes(*(x.shape for x in args))
    args = [jnp.broadcast_to(x, shape) for x in args]
    if _interpreted.get():
        return interpreted(*args)
    return plgpu.elementwise_inline_asm(
        assembly,
        args=args,
        constraints=",".join(["=f", *("f" for _ in args)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )[0]


def columns_of(array, most: int) -> list[jax.Array]:
    """Column numbers of the tiles that `cut_width` makes of the last axis of an array.

    Those of float32 are narrow: `product` then rounds sums of few terms, as a dense product does.
    """
    if array.dtype == jnp.float32:
        most = min(most, FLOAT32_COLUMNS)
    return [start + iota(size) for start, size in cut_width(array.shape[-1], most)]


def programs_of(tasks: int, rows: int, enough: int = ENOUGH_PROGRAMS) -> int:
    """Programs for the tasks of each row: several to one, where all need more than enough.

    For idle programs cost time too: 0.2 ms for 262,144 of them.
    """
    return -(-tasks // max(1, min(tasks * rows // enough, MOST_TASKS)))


def each(tasks: int, wanted: jax.Array, body) -> None:
    """Calls `body(task)` for the tasks of a program of axis 0; if not wanted, it is over at once.

    They are neighbours, so that programs that run at the same time are at about the same place, and
    what they load is in the L2 cache.
    """
    number, programs = pl.program_id(0), pl.num_programs(0)
    several = jax.lax.div(jnp.asarray(tasks + programs - 1), jnp.asarray(programs))
    begin = number * several
    end = jnp.where(wanted, jnp.minimum(begin + several, tasks), begin)
    jax.lax.fori_loop(begin, end, lambda task, _: body(task), None)


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


def barrier() -> None:
    """Every thread of the program gets here before any goes on, and sees what others stored."""
    if not _interpreted.get():
        plgpu.debug_barrier()


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


@dataclasses.dataclass(frozen=True)
class Softmax:
    """A softmax over scale * logits, in the fewest instructions a logit.

    float32 inputs get a few more: the largest weight of a row is exactly 1, so that a query that
    sees one key gives back its value, and numbers are rounded in the unit in which they are kept.
    """

    scale: float
    exact: bool

    @property
    def factor(self) -> float:
        """Of the logits that `signed` gives, to the unit of the exponents."""
        return (abs(self.scale) or 1.0) * (1 if self.exact else LOG2_E)

    def signed(self, logits: jax.Array) -> jax.Array:
        """The logits, so that larger ones get larger weights."""
        if self.scale == 0:
            return logits * 0.0
        return logits if self.scale > 0 else -logits

    def top(self, logits: jax.Array) -> jax.Array:
        """The largest exponent of each row."""
        return jnp.max(logits, axis=1) * self.factor

    def weights(self, logits: jax.Array, top: jax.Array) -> jax.Array:
        """exp(scale * logits) in units of that of an exponent `top`."""
        if self.exact:
            return exp2((logits * self.factor - top) * LOG2_E)
        return exp2(multiply_add(logits, self.factor, -top))

    def decay(self, top: jax.Array, new_top: jax.Array) -> jax.Array:
        """What the unit of `top` is in that of `new_top`."""
        return exp2((top - new_top) * (LOG2_E if self.exact else 1.0))

    def fold(self, top: jax.Array, logits: jax.Array, whole: bool = False):
        """A step of an online softmax: the new largest exponents, the weights, and the decay.

        A row that has seen nothing yet, -inf alone, gets weights and decay 2^-inf = 0; where there
        is no such row, `whole` spares the care for it.
        """
        new_top = jnp.maximum(top, self.top(logits))
        safe = new_top if whole else jnp.where(new_top == -jnp.inf, 0.0, new_top)
        return new_top, self.weights(logits, safe[:, None]), self.decay(top, safe)

    def attend(self, state, logits: jax.Array, values):
        """The next state (largest exponents, sums of weights, sums of weighted values in tiles)."""
        top, total, out = state
        top, p, decay = self.fold(top, logits)
        p_cut = p.astype(values[0].dtype)
        out = [x * decay[:, None] + dot(p_cut, v, (1, 0)) for x, v in zip(out, values, strict=True)]
        return top, total * decay + jnp.sum(p, axis=1), out

    def mean(self, x: jax.Array, total: jax.Array) -> jax.Array:
        """Sums x [R, D] of weighted values over the sums of the weights [R]."""
        return x / total[:, None] if self.exact else x * reciprocal(total)[:, None]

    def lse(self, top: jax.Array, total: jax.Array) -> jax.Array:
        """Natural logarithm of a sum of weights, `total` in the unit of `top`."""
        if self.exact:
            return top + jnp.log(total)
        return (top + log2(total)) * (1 / LOG2_E)


def softmax_weights(logits: jax.Array, lse: jax.Array, scale: float, dtype) -> jax.Array:
    """Weights exp(scale * logits - lse) of a softmax whose natural logsumexp is known."""
    if dtype == jnp.float32:
        return exp2((logits * scale - lse) * LOG2_E)
    return exp2(multiply_add(logits, scale * LOG2_E, lse * -LOG2_E))


def product(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """Product a b^T of matrices that are cut into tiles of columns.

    Sums of float32 tiles are kept apart until each is whole: in one long sum, the last of 128 terms
    would be rounded in the unit of all of them, which dp - delta shows where a query sees few keys.
    """
    parts = [dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True)]
    if a[0].dtype == jnp.float32:
        parts = [settled(x) for x in parts]
    return sum(parts[1:], parts[0])


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

    def settled(self) -> "Sum":
        """The same sum; its products have ended here, see `settled`."""
        return self if self.lost is not None else Sum(settled(self.total), None)
