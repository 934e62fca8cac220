"""Lazy exports: a package imports its public names when they are first used.

Importing jax, flax and the kernels takes seconds, which a program should not spend only to show its
version or help. Type checkers read the imports under `if TYPE_CHECKING` of each package.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def exports(
    package: str, homes: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes the `__getattr__` and `__dir__` of a package.

    Args:
      package: the `__name__` of the package.
      homes: for each module of the package, the names that it provides. The modules themselves can
        be accessed too.

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
