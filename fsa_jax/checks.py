"""Argument checks of the public functions. Each message names the argument, its value, the rule."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fsa_jax.config import NSAConfig
from fsa_jax.pallas import SelectedTuning
from fsa_jax.segments import Rows, describe_rows

FLOATS = ("float16", "bfloat16", "float32", "float64")


def array(name: str, x, axes: str, empty: str = "") -> jax.Array:
    """`x` as an array with one axis for each letter of `axes`; only the axis `empty` may be 0."""
    rank = len(axes.split())
    if not isinstance(x, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be an array of shape [{axes}], got {type(x).__name__}")
    if x.ndim != rank:
        raise ValueError(f"{name} must have shape [{axes}], got shape {x.shape}")
    if any(n == 0 and axis != empty for n, axis in zip(x.shape, axes.split(), strict=True)):
        raise ValueError(f"{name} must have no empty axis, got shape {x.shape}")
    return jnp.asarray(x)


def floating(name: str, x, axes: str, empty: str = "") -> jax.Array:
    """Like `array`, of a dtype that the attention functions compute with."""
    dtype = getattr(x, "dtype", None)
    x = array(name, x, axes, empty)
    if str(dtype) not in FLOATS:
        raise ValueError(f"{name} must have one of the dtypes {', '.join(FLOATS)}, got {dtype}")
    return x


def same_dtype(**arrays) -> None:
    """All the arrays have the dtype of the first."""
    (first, x), *others = arrays.items()
    for name, other in others:
        if other.dtype != x.dtype:
            raise ValueError(
                f"{name} must have the dtype of {first}, got {other.dtype} and {x.dtype}"
            )


def same_axes(axes: str, **arrays) -> None:
    """All the arrays agree on their leading axes, as many as `axes` names."""
    count = len(axes.split())
    (first, x), *others = arrays.items()
    for name, other in others:
        if other.shape[:count] != x.shape[:count]:
            raise ValueError(
                f"{name} must have the leading axes [{axes}] of {first}, got shapes "
                f"{other.shape} and {x.shape}"
            )


def grouped(query, key, value, prefix: str = "") -> None:
    """Key and value belong together, and their heads divide the query heads."""
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and {prefix}key must have one head width, got {query.shape[3]} and "
            f"{key.shape[3]}"
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"the heads of query must be a multiple of the heads of {prefix}key, got "
            f"{query.shape[2]} and {key.shape[2]}"
        )
    same_axes("B T K", **{f"{prefix}key": key, f"{prefix}value": value})


def same_widths(**arrays) -> None:
    """All the arrays have the last axis of the first."""
    (first, x), *others = arrays.items()
    for name, other in others:
        if other.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"{name} must have the head width of {first}, got {other.shape[-1]} and "
                f"{x.shape[-1]}"
            )


def window_count(name: str, x, length: int, kernel_stride: int) -> None:
    """One slot for every kernel_stride tokens, as `compress` lays them out."""
    if x.shape[1] != length // kernel_stride:
        raise ValueError(
            f"{name} must have T // kernel_stride = {length} // {kernel_stride} = "
            f"{length // kernel_stride} windows, got {x.shape[1]}"
        )


def integers(name: str, x, axes: str) -> jax.Array:
    """An int32 array; other integer types would have to be cut to fit."""
    dtype = getattr(x, "dtype", None)
    x = array(name, x, axes)
    if dtype != jnp.int32:
        raise ValueError(f"{name} must have dtype int32, got {dtype}")
    return x


def sequence(axis, has_batch: bool, length: int, stride: int) -> None:
    """The name of a mesh axis that splits rows of `length` tokens; rows come in a batch."""
    if not isinstance(axis, str):
        raise ValueError(f"sequence_axis must be None or the name of a mesh axis, got {axis!r}")
    if not has_batch:
        raise ValueError(f"arrays must have a batch axis with sequence_axis={axis!r}, got none")
    if length % (2 * stride):
        raise ValueError(
            f"tokens must be a multiple of 2 * devices * kernel_stride with sequence_axis={axis!r} "
            f"(kernel_stride={stride}), got {length}"
        )


def absent(when: str, **arguments) -> None:
    """All the arguments are None, as they must be in such a call."""
    for name, value in arguments.items():
        if value is not None:
            got = getattr(value, "shape", value)
            raise ValueError(f"{name} must not be given {when}, got {got}")


def size(name: str, value, least: int = 1) -> int:
    """A Python integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def number(name: str, value, rule: str, fits: Callable[[float], bool]) -> float:
    """A Python number for which `fits`, which `rule` says in words."""
    kind = isinstance(value, int | float | np.floating | np.integer)
    if isinstance(value, bool) or not kind or not fits(float(value)):
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return float(value)


def flag(name: str, value) -> bool:
    """True or False, of Python or NumPy."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def float_dtype(name: str, value) -> jnp.dtype:
    """A dtype that the attention functions compute with, and that arrays can have now."""
    try:
        dtype = None if value is None else jnp.dtype(value)
    except TypeError:  # not a dtype
        dtype = None
    if str(dtype) not in FLOATS:
        got = value if dtype is None else dtype
        raise ValueError(f"{name} must be one of the dtypes {', '.join(FLOATS)}, got {got!s}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name} must not be {dtype} unless jax_enable_x64 is on, got {dtype}")
    return jnp.dtype(dtype)


def scale(value, width: int) -> float:
    """The factor of the logits: by default one over the square root of the head width."""
    if value is None:
        return width**-0.5
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating):
        raise ValueError(f"scale must be a Python number or None, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {value!r}")
    return float(value)


def config(value) -> NSAConfig:
    if not isinstance(value, NSAConfig):
        raise ValueError(f"config must be an NSAConfig, got {value!r}")
    return value


def batched(x, axes: str) -> bool:
    """Whether `x` comes with a batch axis before `axes`; a wrong rank counts as batched."""
    return getattr(x, "ndim", None) != len(axes.split())


def with_batch(name: str, x, axes: str, has_batch: bool, empty: str = "") -> jax.Array:
    """`x` checked, with a batch axis added if the arrays of this call come without."""
    x = floating(name, x, f"B {axes}" if has_batch else axes, empty)
    return x if has_batch else x[None]


def attention_arrays(query, key, value, kernel_stride: int | None = None):
    """Canonical, checked arrays of an attention; keys are compressed if a stride is given.

    Returns:
      query, key and value with a batch axis, and whether there was a batch.
    """
    prefix = "" if kernel_stride is None else "compressed_"
    tokens = "T" if kernel_stride is None else "M"
    has_batch = batched(query, "T N D")
    query = with_batch("query", query, "T N D", has_batch)
    key = with_batch(f"{prefix}key", key, f"{tokens} K D", has_batch, empty="M")
    value = with_batch(f"{prefix}value", value, f"{tokens} K E", has_batch, empty="M")
    arrays = {"query": query, f"{prefix}key": key, f"{prefix}value": value}
    same_dtype(**arrays)
    same_axes("B" if prefix else "B T", **arrays)
    grouped(query, key, value, prefix)
    if kernel_stride is not None:
        window_count(f"{prefix}key", key, query.shape[1], kernel_stride)
    return query, key, value, has_batch


def gates(gates, query: jax.Array, has_batch: bool) -> jax.Array:
    """Gates with a batch axis: one triple for each query head, or one for each token."""
    gates = with_batch("gates", gates, "T N 3", has_batch)
    batch, length, heads, _ = query.shape
    if gates.shape not in ((batch, length, heads, 3), (batch, length, 1, 3)):
        first = 0 if has_batch else 1
        wanted = tuple((batch, length, n, 3)[first:] for n in (heads, 1))
        got = gates.shape[first:]
        raise ValueError(f"gates must have shape {wanted[0]} or {wanted[1]}, got {got}")
    return gates


def rows(x: jax.Array, segment_ids, has_batch: bool) -> Rows:
    """The documents of the rows of `x` [B, T, ...].

    The sign of the ids is checked where their values are known, that is outside jit; inside jit a
    negative id is padding.
    """
    if segment_ids is not None:
        ids = integers("segment_ids", segment_ids, "B T" if has_batch else "T")
        if not isinstance(ids, Tracer) and ids.is_fully_addressable:
            least = np.asarray(ids).min()  # numpy: inside jit a jnp.min would be traced
            if least < 0:
                raise ValueError(f"segment_ids must be 0 (padding) or positive, got {least}")
        segment_ids = ids if has_batch else ids[None]
        if segment_ids.shape != x.shape[:2]:
            shape = x.shape[:2] if has_batch else x.shape[1:2]
            raise ValueError(f"segment_ids must have shape {shape}, got {ids.shape}")
    return describe_rows(segment_ids, x.shape[0], x.shape[1])


def tokens(name: str, ids: jax.Array, vocab_size: int, valid: jax.Array) -> jax.Array:
    """Token ids where `valid`, in 0 .. vocab_size - 1; anything may stand elsewhere.

    Values are checked where they are known, that is outside jit. The ids that come back are never
    negative, which would count from the end of the vocabulary: whoever looks up a wrong one in jit
    gets NaN.
    """
    known = (ids, valid)
    if not any(isinstance(x, Tracer) or not x.is_fully_addressable for x in known):
        here, there = (np.asarray(x) for x in known)
        if (wrong := here[there & ((here < 0) | (here >= vocab_size))]).size:
            raise ValueError(
                f"{name} must be in 0 .. {vocab_size - 1} wherever they are not padding, got "
                f"{wrong[0]}"
            )
    return jnp.where(ids < 0, vocab_size, ids)


def parameter(name: str, value, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if getattr(value, "shape", None) != shape or value.dtype != x.dtype:
        got = f"{getattr(value, 'dtype', type(value).__name__)} {getattr(value, 'shape', '')}"
        raise ValueError(f"{name} must be a {x.dtype} array of shape {shape}, got {got}")
    return jnp.asarray(value)


def tuning(tuning, implementation: str | None) -> SelectedTuning | None:
    """None or a SelectedTuning, for an implementation that has kernels to tune."""
    if tuning is None:
        return None
    if not isinstance(tuning, SelectedTuning):
        raise ValueError(f"tuning must be None or a SelectedTuning, got {tuning!r}")
    if implementation in ("xla", "reference"):
        raise ValueError(
            f"tuning must be None for implementation={implementation!r}, which has no kernels"
        )
    return tuning
