"""Packages whose names are imported when they are first used.

Importing jax, flax and kernels takes seconds, which a program that only shows its version or its
help should not wait for. Type checkers read the imports below `if TYPE_CHECKING` of a package.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def exports(
    package: str, homes: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
      package: its `__name__`.
      homes: the names that each of its modules provides. The modules themselves are found too.

    Example:
      >>> getattr_, dir_ = exports("fsa_jax", {"config": ["NSAConfig"]})
      >>> getattr_("NSAConfig").__module__
      'fsa_jax.config'
    """
    module_of = {name: module for module, names in homes.items() for name in names}

    def getattr_(name: str) -> Any:
        if name in module_of:
            value = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
            setattr(sys.modules[package], name, value)
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}"):
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return getattr_, dir_
