"""The persistent cache of compiled programs, which saves later runs the compilation."""

import jax

from fsa_jax.training.user_cache import user_cache


def keep_compiled_programs() -> None:
    """Turns on jax's persistent compilation cache, unless the user has configured it already.

    The folder is fsa-jax/compiled in the user's cache folder, XDG_CACHE_HOME or ~/.cache.
    JAX_COMPILATION_CACHE_DIR names another folder, or none if it is empty, and
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
    """
    config = jax.config
    folder = getattr(config, "jax_compilation_cache_dir")  # noqa: B009, unknown to pyright
    enabled = getattr(config, "jax_enable_compilation_cache")  # noqa: B009
    if not enabled or folder is not None:
        return
    folder = user_cache("compiled")
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
