"""Building blocks of the Triton kernels: the call, instructions, products, loads and stores."""

import contextlib
import contextvars
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOG2_E = math.log2(math.e)
#: Whether the kernel being traced is for interpret mode, which cannot execute GPU instructions.
_interpreted = contextvars.ContextVar("interpreted", default=False)


def call(kernel, *arrays, grid, out_shape, interpret, num_warps=4, num_stages=2, aliases=None):
    """`pallas_call` through Triton: whole arrays in device memory, one program per grid point.

    Kernels use 32-bit integers regardless of `jax_enable_x64`.
    """
    # Interpret mode evaluates the kernel again at lowering, where x64 may be enabled: weakly typed
    # numbers would then become int64.
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

    jnp.exp2 also handles smaller results, which are negligible in a softmax, in four instructions.
    """
    return _instruction("ex2.approx.ftz.f32 $0, $1;", jnp.exp2, x)


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x of float32 as one instruction, accurate to the last bit but one."""
    return _instruction("rcp.approx.ftz.f32 $0, $1;", lambda x: 1 / x, x)


def log2(x: jax.Array) -> jax.Array:
    """Binary logarithm of float32 as one instruction, accurate to 2^-22."""
    return _instruction("lg2.approx.ftz.f32 $0, $1;", jnp.log2, x)


def multiply_add(a, b, c) -> jax.Array:
    """Computes a * b + c of float32, broadcast and rounded once, in one instruction, not two.

    The compiler may not fuse the two operations by itself, since that changes the rounding.
    """
    return _instruction("fma.rn.f32 $0, $1, $2, $3;", lambda a, b, c: a * b + c, a, b, c)


def await_mma(x: jax.Array) -> jax.Array:
    """The float32 `x` unchanged; waits for the matrix products that accumulate into it.

    A sum of products over a loop may be left running on the matrix unit into the next step. If the
    assembler then finds other instructions that use its registers, it serializes all products. The
    instruction itself costs nothing, since the assembler removes it.
    """
    return _instruction("mov.b32 $0, $1;", lambda x: x, x)


def _instruction(assembly: str, interpreted, *args) -> jax.Array:
    """Emits an elementwise PTX instruction, or calls `interpreted` in interpret mode."""
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


def iota(size: int) -> jax.Array:
    """The int32 numbers 0 .. size-1."""
    return jax.lax.iota(jnp.int32, size)


def split(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of numbers >= 0, without the sign rules of // and %."""
    quotient = jax.lax.div(x, jnp.full_like(x, size))
    return quotient, x - quotient * size


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over axis `contract[0]` of `a` and `contract[1]` of `b`, summed in float32.

    float32 operands are multiplied in full precision: tf32 would drop 13 of their bits.
    """
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def load(ref, *, mask=None, other: float = 0) -> jax.Array:
    """Loads the elements where `mask` is true, `other` elsewhere; all elements without a mask."""
    return plgpu.load(ref, mask=mask, other=None if mask is None else other)


store = plgpu.store


def barrier() -> None:
    """Synchronizes the threads of a program; each then sees what the others have stored."""
    if not _interpreted.get():
        plgpu.debug_barrier()
