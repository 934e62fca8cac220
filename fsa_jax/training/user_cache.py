"""The user's folder for files that can be made again."""

import os
from pathlib import Path


def user_cache(name: str) -> Path | None:
    """The folder fsa-jax/NAME in the user's cache folder, XDG_CACHE_HOME or ~/.cache.

    None if the user has no such folder.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        caches = caches.expanduser()
    except RuntimeError:  # the user has no home folder
        return None
    # the XDG standard says that a relative path is ignored
    return caches / "fsa-jax" / name if caches.is_absolute() else None
