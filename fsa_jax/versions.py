"""Versions of Python, of the packages that this process uses, and of this code."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

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


def commit() -> str:
    """The git commit of this code, "-dirty" appended if tracked files differ; "unknown" if none."""
    here = Path(__file__).resolve()
    # An installed copy may lie in the repository of another project, which does not track it.
    if not output("git", "ls-files", here.name, cwd=here.parent):
        return "unknown"
    command = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return output(*command, cwd=here.parent) or "unknown"


def output(*command: str, cwd: Path | None = None) -> str:
    """The output of a command; empty if it is missing or fails."""
    try:
        run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()
