"""Argument checks of the public functions.

Each message names the argument, its value and the rule.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fsa_jax.arguments.scalars import choice as choice
from fsa_jax.arguments.scalars import flag as flag
from fsa_jax.arguments.scalars import number as number
from fsa_jax.arguments.scalars import short as short
from fsa_jax.arguments.scalars import size as size
from fsa_jax.arguments.types import IntLike
from fsa_jax.config import NSAConfig
from fsa_jax.pallas import SelectedTuning
from fsa_jax.semantics.segments import SegmentInfo, describe_segments

FLOATS = ("float16", "bfloat16", "float32", "float64")


def array(name: str, x, axes: str, empty: str = "") -> jax.Array:
    """Returns `x` as an array whose axes are named by `axes`; only axis `empty` may have size 0."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be an array of shape [{axes}], got {type(x).__name__}")
    _check_shape(name, x, axes, empty)
    return jnp.asarray(x)


def _check_shape(name: str, x, axes: str, empty: str = "") -> None:
    if x.ndim != len(axes.split()):
        raise ValueError(f"{name} must have shape [{axes}], got shape {x.shape}")
    if any(n == 0 and axis != empty for n, axis in zip(x.shape, axes.split(), strict=True)):
        raise ValueError(f"{name} must have no empty axis, got shape {x.shape}")


def floating(name: str, x, axes: str, empty: str = "") -> jax.Array:
    """Like `array`, for a dtype that the attention functions support."""
    dtype = getattr(x, "dtype", None)
    if isinstance(x, jax.Array | np.ndarray):
        _check_shape(name, x, axes, empty)
        if str(dtype) not in FLOATS:
            raise ValueError(f"{name} must have one of the dtypes {', '.join(FLOATS)}, got {dtype}")
    return array(name, x, axes, empty)


def same_dtype(**arrays) -> None:
    """Checks that all arrays have the dtype of the first."""
    (first, x), *others = arrays.items()
    for name, other in others:
        if other.dtype != x.dtype:
            raise ValueError(
                f"{name} must have the dtype of {first}, got {other.dtype} and {x.dtype}"
            )


def same_axes(axes: str, **arrays) -> None:
    """Checks that all arrays agree on the leading axes that `axes` names."""
    count = len(axes.split())
    (first, x), *others = arrays.items()
    for name, other in others:
        if other.shape[:count] != x.shape[:count]:
            raise ValueError(
                f"{name} must have the leading axes [{axes}] of {first}, got shapes "
                f"{other.shape} and {x.shape}"
            )


def grouped(query, key, value, prefix: str = "") -> None:
    """Checks that key and value have matching shapes, and that their heads divide the query's."""
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
    """Checks that all arrays have the same last axis as the first."""
    (first, x), *others = arrays.items()
    for name, other in others:
        if other.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"{name} must have the head width of {first}, got {other.shape[-1]} and "
                f"{x.shape[-1]}"
            )


def window_count(name: str, x, length: int, kernel_stride: int) -> None:
    """Checks that there is one slot for every kernel_stride tokens, as `compress` lays them out."""
    if x.shape[1] != length // kernel_stride:
        raise ValueError(
            f"{name} must have T // kernel_stride = {length} // {kernel_stride} = "
            f"{length // kernel_stride} windows, got {x.shape[1]}"
        )


def rank(x) -> int | None:
    """The number of axes of an array or of nested lists; None for anything else."""
    if isinstance(x, list | tuple):
        inner = rank(x[0]) if x else 0
        return 1 + (inner or 0)
    return getattr(x, "ndim", None)


def integers(name: str, x, axes: str, *, empty: str = "", saturate: bool = False) -> jax.Array:
    """Converts integers of any dtype, in an array or in lists, to int32.

    Only axis `empty` may have size 0. Outside jit, where the values are known, integers that do not
    fit into int32 raise an error. Inside jit, or with `saturate`, they are clipped to int32, which
    makes no difference to a caller that only tests whether a number lies in some range.
    """
    x = _integers(name, x, axes, empty)
    if not _is_wide(x):
        return jnp.asarray(x, jnp.int32)
    if x.size and is_known(x) and not saturate:
        _check_fits(name, x)
    limits = np.iinfo(np.int32)
    clip = jnp.clip if isinstance(x, jax.Array) else np.clip  # jnp may truncate to 32 bits first
    x = clip(x, max(limits.min, int(jnp.iinfo(x.dtype).min)), limits.max)
    return jnp.asarray(x.astype(np.int32))


def _integers(name: str, x, axes: str, empty: str = "") -> jax.Array | np.ndarray:
    """Returns `x` as an array of integers, without changing its dtype."""
    wanted = f"{name} must be an integer array of shape [{axes}]"
    if isinstance(x, list | tuple):
        try:
            x = np.asarray(x)
        except (TypeError, ValueError) as error:  # lists of different lengths; arrays inside jit
            raise ValueError(f"{wanted}, or lists of Python integers, got {short(x)}") from error
    elif not isinstance(x, jax.Array | np.ndarray):
        raise ValueError(f"{wanted}, got {type(x).__name__}")
    _check_shape(name, x, axes, empty)
    if x.dtype == bool:
        raise ValueError(
            f"{name} must have an integer dtype, got bool: convert with .astype(jnp.int32) if True "
            "means 1"
        )
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must have an integer dtype such as int32, got {x.dtype}")
    return x


def _is_wide(x) -> bool:
    """Whether the integer dtype of `x` has values above the range of int32."""
    return jnp.iinfo(x.dtype).max > jnp.iinfo(jnp.int32).max


def is_known(*arrays) -> bool:
    """Whether the values can be read: the arrays are not traced and fully addressable here."""
    return not any(isinstance(x, Tracer) for x in arrays) and all(
        isinstance(x, np.ndarray) or x.is_fully_addressable for x in arrays
    )


def _check_fits(name: str, x) -> None:
    limits, values = np.iinfo(np.int32), np.asarray(x)
    for value in (values.min(), values.max()):
        if not limits.min <= value <= limits.max:
            raise ValueError(
                f"{name} must hold integers that int32 holds, {limits.min} to {limits.max}, got "
                f"{value}"
            )


def axis_name(axis) -> str:
    """Checks and returns the name of a mesh axis that splits the tokens."""
    if not isinstance(axis, str):
        raise ValueError(
            f"sequence_axis must be None or the name of a mesh axis, got {short(axis)}"
        )
    return axis


def sequence(axis, has_batch: bool, length: int, stride: int) -> None:
    """Checks that a mesh axis can split sequences of `length` tokens, which must be batched."""
    axis_name(axis)
    if not has_batch:
        raise ValueError(f"arrays must have a batch axis with sequence_axis={axis!r}, got none")
    if length % (2 * stride):
        raise ValueError(
            f"tokens must be a multiple of 2 * devices * kernel_stride with sequence_axis={axis!r} "
            f"(kernel_stride={stride}), got {length}"
        )


def absent(when: str, **arguments) -> None:
    """Checks that all the arguments are None, as this kind of call requires."""
    for name, value in arguments.items():
        if value is not None:
            got = getattr(value, "shape", value)
            raise ValueError(f"{name} must not be given {when}, got {got}")


def path(name: str, value) -> Path:
    """Checks for a path, as a string or an object such as `pathlib.Path`."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ValueError(f"{name} must be a path, got {short(value)}")
    return Path(value)


def float_dtype(name: str, value) -> jnp.dtype:
    """Checks for a dtype that the attention functions support and that arrays can now have."""
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
    """The factor of the logits, by default one over the square root of the head width."""
    if value is None:
        return width**-0.5
    most = float(np.finfo(np.float32).max)  # a larger scale overflows to infinity in float32
    rule = "None or a finite number, not an array"
    return number("scale", value, rule, lambda x: -most <= x <= most)


def config(value, name: str = "config") -> NSAConfig:
    if not isinstance(value, NSAConfig):
        raise ValueError(f"{name} must be an NSAConfig, got {short(value)}")
    return value


def batched(x, axes: str) -> bool:
    """Whether `x` has a batch axis before `axes`; any unexpected rank counts as batched."""
    return rank(x) != len(axes.split())


def with_batch(name: str, x, axes: str, has_batch: bool, empty: str = "") -> jax.Array:
    """Checks `x`, and adds a batch axis if the arrays of this call have none."""
    x = floating(name, x, f"B {axes}" if has_batch else axes, empty)
    return x if has_batch else x[None]


def attention_arrays(query, key, value, kernel_stride: int | None = None):
    """Checks the arrays of an attention call; the keys are compressed if a stride is given.

    Returns:
      query, key and value with a batch axis, and whether the arguments had one.
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
    """Checks the gates and adds a batch axis: a triple for each query head, or for each token."""
    gates = with_batch("gates", gates, "T N 3", has_batch)
    batch, length, heads, _ = query.shape
    if gates.shape not in ((batch, length, heads, 3), (batch, length, 1, 3)):
        first = 0 if has_batch else 1
        wanted = tuple((batch, length, n, 3)[first:] for n in (heads, 1))
        got = gates.shape[first:]
        raise ValueError(f"gates must have shape {wanted[0]} or {wanted[1]}, got {got}")
    return gates


def padding(padding_id) -> int:
    """Checks the segment id that marks padding, an integer that int32 holds."""
    return size("padding_id", padding_id, least=-(2**31))


def ids(
    segment_ids, shape: tuple[int, ...] | None, has_batch: bool, padding_id: IntLike = 0
) -> jax.Array | None:
    """Checks segment ids [B, T], against `shape` if given; returns them with 0 for padding.

    Outside jit, where the values are known, their sign and size are checked, and the result is
    int32. Inside jit a negative id counts as padding, and a dtype is kept or made as wide as
    needed, so that no two ids become equal.
    """
    padding_id = padding(padding_id)
    if segment_ids is None:
        return None
    found = _integers("segment_ids", segment_ids, "B T" if has_batch else "T")
    if shape is not None and found.shape != (wanted := shape if has_batch else shape[1:]):
        raise ValueError(f"segment_ids must have shape {wanted}, got {found.shape}")
    free = None
    if is_known(found):
        values = np.asarray(found)  # numpy: inside jit, operations of jnp would be traced
        _check_documents(values[values != padding_id], padding_id)
        _check_fits("segment_ids", found)
        free = _unused(values)
    if is_known(found) or not _is_wide(found):
        found = jnp.asarray(found, jnp.int32)
    return _with_padding_0(jnp.asarray(found if has_batch else found[None]), padding_id, free)


def _check_documents(values: np.ndarray, padding_id: int) -> None:
    if values.size and (least := values.min()) < 0:
        rule = "0 (padding) or positive" if padding_id == 0 else "padding_id or at least 0"
        raise ValueError(f"segment_ids must be {rule}, got {least} with padding_id={padding_id}")


def _unused(values: np.ndarray) -> int:
    """A positive int32 that is none of the values, which fit into int32."""
    top = max(int(values.max()), 0)
    if top < np.iinfo(np.int32).max:
        return top + 1
    return int(np.setdiff1d(np.arange(1, values.size + 2), values)[0])


def _with_padding_0(ids: jax.Array, padding_id: int, free: int | None) -> jax.Array:
    """The same documents, where 0 and negative ids are padding, and no other ids.

    Args:
      ids: int32 or wider; padding has `padding_id` or another negative id.
      padding_id: the id of padding.
      free: a positive id that does not occur, if the ids are known.
    """
    if padding_id == 0:
        return ids
    if padding_id > 0:  # 0 and the other id change places
        return jnp.where(ids == padding_id, 0, jnp.where(ids == 0, padding_id, ids))
    # Document 0 gets another id. Where all positive numbers of the dtype may be taken, it is the
    # first that only the unsigned dtype has.
    positive = jnp.maximum(ids, 0)
    if free is None:
        if not jnp.issubdtype(ids.dtype, jnp.signedinteger):
            raise ValueError(
                f"segment_ids must have a signed dtype with padding_id={padding_id} inside jit, "
                f"got {ids.dtype}: convert with .astype(jnp.int32)"
            )
        free = int(jnp.iinfo(ids.dtype).max) + 1
        positive = positive.astype(f"u{ids.dtype}")
    return jnp.where(ids < 0, 0, jnp.where(ids == 0, jnp.asarray(free, positive.dtype), positive))


def segments(x: jax.Array, segment_ids, has_batch: bool, padding_id: IntLike = 0) -> SegmentInfo:
    """The documents of the sequences of `x` [B, T, ...]; see `ids`."""
    return describe_segments(ids(segment_ids, x.shape[:2], has_batch, padding_id), *x.shape[:2])


def checkpoint_name(name: str | None) -> str | None:
    """Checks for None or a name that results carry for remat policies."""
    if name is not None and not (isinstance(name, str) and name):
        raise ValueError(f"checkpoint_name must be None or a non-empty string, got {short(name)}")
    return name


def tokens(name: str, ids: jax.Array, vocab_size: int, valid: jax.Array) -> jax.Array:
    """Checks that token ids are in 0 .. vocab_size - 1 wherever `valid`; others may be anything.

    Values are checked outside jit, where they are known. A negative index would count from the end
    of the vocabulary, so negative ids are replaced by vocab_size: inside jit, the lookup of a wrong
    id gives NaN.
    """
    if is_known(ids, valid):
        here, there = np.asarray(ids), np.asarray(valid)
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
    """Checks for None, or a SelectedTuning with an implementation that has kernels to tune."""
    if tuning is None:
        return None
    if not isinstance(tuning, SelectedTuning):
        raise ValueError(f"tuning must be None or a SelectedTuning, got {tuning!r}")
    if implementation in ("xla", "reference"):
        raise ValueError(
            f"tuning must be None for implementation={implementation!r}, which has no kernels"
        )
    return tuning
