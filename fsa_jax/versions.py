"""What this process runs on."""

import importlib.metadata
import platform

_PACKAGES = ("fsa-jax", "jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint")


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run, by package name.

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
