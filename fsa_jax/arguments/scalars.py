"""Checks of scalar arguments; each returns the value as a plain Python object.

Integers and numbers may be Python or NumPy scalars; a bool counts as neither. `checks.py` holds the
checks of arrays.
"""

import math
import reprlib
from collections.abc import Callable

import jax
import numpy as np

#: The largest size, since computations hold positions and sizes as int32.
LARGEST = 2**31 - 1


def size(name: str, value, least: int = 1, most: float = LARGEST) -> int:
    """Checks for a Python or NumPy integer in a range; refuses arrays, which jit may trace."""
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or not least <= value <= most:
        bounded = most not in (LARGEST, math.inf) or (integer and value > most)
        rule = f"from {least} to {most}" if bounded else f"of at least {least}"
        raise ValueError(f"{name} must be an integer {rule}, got {short(value)}")
    return int(value)


def number(name: str, value, rule: str, fits: Callable[[float], bool] = math.isfinite) -> float:
    """Checks for a Python or NumPy number that satisfies `fits`, which `rule` states in words."""
    kind = isinstance(value, int | float | np.floating | np.integer)
    if isinstance(value, bool) or not kind or not fits(_float(value)):
        raise ValueError(f"{name} must be {rule}, got {short(value)}")
    return float(value)


def _float(value) -> float:
    try:
        return float(value)
    except OverflowError:  # the integer exceeds every float
        return math.inf if value > 0 else -math.inf


def flag(name: str, value) -> bool:
    """Checks for a Python or NumPy bool."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {short(value)}")
    return bool(value)


def choice[T](name: str, value: T, choices: tuple[T, ...]) -> T:
    """Checks for one of `choices`."""
    # comparing an array gives an array, whose truth value is undefined
    if isinstance(value, jax.Array | np.ndarray) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {short(value)}")
    return value


def short(value) -> str:
    """Formats `value` for a message."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array {value.dtype}{list(value.shape)}"
    return reprlib.repr(value) if isinstance(value, list | tuple | dict) else repr(value)
