"""Where compiled programs of a run are kept, so that the next start need not compile them again."""

import os
from pathlib import Path

import jax


def keep_compiled_programs() -> None:
    """Turns on jax's persistent cache of compiled programs, unless that has been decided already.

    JAX_COMPILATION_CACHE_DIR names another folder, or none if it is empty, and
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. Else the folder is fsa-jax/compiled in
    the user's cache folder: XDG_CACHE_HOME, or ~/.cache.
    """
    config = jax.config
    folder = getattr(config, "jax_compilation_cache_dir")  # noqa: B009, pyright knows no option
    enabled = getattr(config, "jax_enable_compilation_cache")  # noqa: B009
    if not enabled or folder is not None:
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        caches = caches.expanduser()
    except RuntimeError:  # no home
        return
    # as the standard of XDG_CACHE_HOME has it: a relative path counts for nothing
    if caches.is_absolute():
        jax.config.update("jax_compilation_cache_dir", str(caches / "fsa-jax" / "compiled"))
