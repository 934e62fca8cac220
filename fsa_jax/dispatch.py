"""Which implementation serves a call, and why; their names stand in `arguments/types.py`."""

import functools
import logging
from collections.abc import Callable
from typing import get_args

from fsa_jax import operators, reference, triton
from fsa_jax.arguments import checks
from fsa_jax.arguments.types import DenseImplementation, Implementation

_LOG = logging.getLogger("fsa_jax")
_PORTABLE = ("xla", "reference")
#: Names of the kernels, and what `operators.py` calls them: Pallas-Triton, with those of Mosaic GPU
#: or without.
_KERNELS = {"triton": "gpu", "mosaic_gpu": "mosaic", "triton_interpret": "interpret"}
_NAMES = get_args(Implementation)
_FUNCTIONS = (
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "native_sparse_attention",
    "causal_attention",
)
#: What dense causal attention takes besides.
CUDNN = tuple(set(get_args(DenseImplementation)) - set(_NAMES))
_logged = set()


def explain(implementation: Implementation | None = None) -> dict[str, tuple[str, str]]:
    """Which implementation each public function would use here, and why.

    A call whose shapes or dtype the chosen kernels do not serve may still get another one; then
    the reason is logged.

    Args:
      implementation: the argument as the functions take it.

    Returns:
      For each function name a pair (implementation, reason).

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: the named implementation cannot serve.
    """
    chosen = {name: resolve(name, implementation) for name in _FUNCTIONS}
    return {"compress": ("xla", "matmuls that XLA does well on any device"), **chosen}


def check_name(implementation: str | None, others: tuple[str, ...] = ()) -> None:
    """Raises ValueError where no implementation has that name, nor is it among `others`."""
    checks.choice("implementation", implementation, (None, *_NAMES, *others))


def resolve(function: str, implementation: str | None, reason: str | None = None):
    """The implementation that serves `function`, and why; raises where a named one cannot.

    Args:
      function: name of a public function.
      implementation: the argument as the function takes it.
      reason: why the kernels cannot serve the call at hand, if they cannot.
    """
    check_name(implementation)
    if implementation in _PORTABLE:
        return implementation, "named by the caller"
    if implementation != "triton_interpret":
        hopper = triton.hopper_reason() if implementation == "mosaic_gpu" else None
        reason = triton.device_reason() or hopper or reason
    if reason is None:
        if implementation:
            return implementation, "named by the caller"
        mosaic = "" if triton.hopper_reason() else ", with kernels in Mosaic GPU where they pay"
        return "triton", f"a GPU{mosaic}"
    if implementation is None:
        return "xla", reason
    raise NotImplementedError(
        f"implementation={implementation!r} cannot serve {function}: {reason}; "
        "use 'xla', 'reference' or None"
    )


def choose(
    function: str, implementation: str | None, reason: str | None = None, **options
) -> Callable:
    """What computes `function`; a choice made for the caller is logged once for each reason.

    `options` are arguments that the kernels take and the other implementations do not.
    """
    mode = mode_of(function, implementation, reason)
    if mode == "reference":
        return getattr(reference, function)
    options = {} if mode == "portable" else options
    return functools.partial(getattr(operators, function), mode=mode, **options)


def mode_of(function: str, implementation: str | None, reason: str | None = None) -> str:
    """What computes `function`: "reference", or a mode of `operators.Call`; logged as `choose`."""
    name, why = resolve(function, implementation, reason)
    if implementation is None and (function, why) not in _logged:
        _logged.add((function, why))
        _LOG.info("%s uses implementation %r: %s", function, name, why)
    if name in _PORTABLE:
        return "portable" if name == "xla" else name
    return "either" if implementation is None else _KERNELS[name]


def mode_over_tokens(
    function: str, implementation: str | None, reason: str | None, axis: str
) -> str:
    """`mode_of` a call whose tokens are split over a mesh axis: the reference cannot serve it."""
    mode = mode_of(function, implementation, reason)
    if mode == "reference":
        raise NotImplementedError(
            f"implementation='reference' cannot serve sequence_axis={axis!r}: it is "
            "for one device; use 'xla', 'triton' or None"
        )
    return mode
