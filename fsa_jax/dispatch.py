"""Which implementation serves a call, and why. The only place that knows their names."""

import logging
from types import ModuleType

from fsa_jax import reference, xla

_LOG = logging.getLogger("fsa_jax")
_MODULES = {"xla": xla, "reference": reference}
_TRITON = ("triton", "triton_interpret")
_logged = set()


def explain(implementation: str | None = None) -> dict[str, tuple[str, str]]:
    """Which implementation each public function would use here, and why.

    Args:
      implementation: the argument as the functions take it.

    Returns:
      For each function name a pair (implementation, reason).

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: the named implementation cannot serve.
    """
    names = (
        "compressed_attention",
        "select_blocks",
        "selected_attention",
        "sliding_window_attention",
        "native_sparse_attention",
    )
    chosen = {name: resolve(implementation) for name in names}
    return {"compress": ("xla", "matmuls that XLA does well on any device"), **chosen}


def resolve(implementation: str | None) -> tuple[str, str]:
    """The implementation to use and the reason; raises where a named one cannot serve."""
    if implementation is None:
        return "xla", "portable; this version has no GPU kernels yet"
    if implementation in _TRITON:
        raise NotImplementedError(
            f"implementation={implementation!r} is not available: this version has no "
            "Pallas-Triton kernels yet; use 'xla', 'reference' or None"
        )
    if implementation not in _MODULES:
        known = ", ".join(repr(name) for name in (*_TRITON, *_MODULES))
        raise ValueError(f"implementation must be None or one of {known}, got {implementation!r}")
    return implementation, "named by the caller"


def choose(function: str, implementation: str | None) -> ModuleType:
    """The module that serves `function`; a choice made for the caller is logged once."""
    name, reason = resolve(implementation)
    if implementation is None and function not in _logged:
        _logged.add(function)
        _LOG.info("%s uses implementation %r: %s", function, name, reason)
    return _MODULES[name]
