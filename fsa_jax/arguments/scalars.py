"""Checks of single values, arrays apart (see `checks.py`): each gives the value as plain Python.

Integers and numbers are those of Python and NumPy; a bool is none.
"""

import math
import reprlib
from collections.abc import Callable

import jax
import numpy as np

#: The largest size: positions and sizes are int32 where they are computed with.
LARGEST = 2**31 - 1


def size(name: str, value, least: int = 1, most: float = LARGEST) -> int:
    """A Python or NumPy integer in a range; arrays are none, since jit may trace them."""
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or not least <= value <= most:
        bounded = most not in (LARGEST, math.inf) or (integer and value > most)
        rule = f"from {least} to {most}" if bounded else f"of at least {least}"
        raise ValueError(f"{name} must be an integer {rule}, got {short(value)}")
    return int(value)


def number(name: str, value, rule: str, fits: Callable[[float], bool] = math.isfinite) -> float:
    """A Python or NumPy number for which `fits`, which `rule` says in words."""
    kind = isinstance(value, int | float | np.floating | np.integer)
    if isinstance(value, bool) or not kind or not fits(_float(value)):
        raise ValueError(f"{name} must be {rule}, got {short(value)}")
    return float(value)


def _float(value) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf if value > 0 else -math.inf


def flag(name: str, value) -> bool:
    """True or False, of Python or NumPy."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {short(value)}")
    return bool(value)


def choice[T](name: str, value: T, choices: tuple[T, ...]) -> T:
    """One of `choices`."""
    # an array compares to an array, which is neither true nor false
    if isinstance(value, jax.Array | np.ndarray) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {short(value)}")
    return value


def short(value) -> str:
    """`value` as a message shows it."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array {value.dtype}{list(value.shape)}"
    return reprlib.repr(value) if isinstance(value, list | tuple | dict) else repr(value)
