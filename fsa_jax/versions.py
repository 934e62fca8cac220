"""Versions of Python and of the packages that this process uses."""

import importlib.metadata
import platform

_PACKAGES = ("fsa-jax", "jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint")


def versions() -> dict[str, str]:
    """Versions, by name, of Python and the packages that affect the results of a run.

    Example:
      >>> sorted(versions())[-1]
      'python'
    """
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
