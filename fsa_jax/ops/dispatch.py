"""Which backend serves a call: asked once a call, before anything is computed.

Users name the backends by the choices in `fsa_jax/arguments/types.py`.
"""

import dataclasses
import functools
import logging
from typing import Any, NamedTuple, get_args

from fsa_jax.arguments import checks
from fsa_jax.arguments.types import DenseImplementation, Implementation
from fsa_jax.ops.call import Backend, OpSpec
from fsa_jax.pallas.support import Unsupported, device_reason, hopper_reason

_LOG = logging.getLogger("fsa_jax")
_NAMES = get_args(Implementation)
#: The public functions that choose a backend, and whether any of their kernels exist in Mosaic GPU.
_FUNCTIONS = {
    "compressed_attention": True,
    "select_blocks": False,
    "selected_attention": False,
    "sliding_window_attention": True,
    "native_sparse_attention": True,
    "causal_attention": True,
}
#: The further implementations of dense causal attention.
CUDNN = tuple(set(get_args(DenseImplementation)) - set(_NAMES))


class Request(NamedTuple):
    """An operation that a call is made of, for `resolve`.

    Attributes:
      spec: the operation, with any backend.
      arrays: the arrays that `spec.plan` takes, or their shapes and dtypes.
    """

    spec: OpSpec
    arrays: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The answer of `resolve`.

    Attributes:
      backend: the backend that serves the call.
      reason: why, in words for users.
    """

    backend: Backend
    reason: str

    @property
    def implementation(self) -> str:
        """The name by which a user would choose the backend."""
        by_platform = self.backend is Backend.BY_PLATFORM
        return "triton" if by_platform else self.backend.value


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
    choices = {name: _decide(name, implementation, ()) for name in _FUNCTIONS}
    chosen = {name: (choice.implementation, choice.reason) for name, choice in choices.items()}
    return {"compress": ("xla", "its matmuls run well in XLA on any device"), **chosen}


def check_name(implementation: str | None, others: tuple[str, ...] = ()) -> None:
    """Raises ValueError where no implementation has that name, nor is it among `others`."""
    checks.choice("implementation", implementation, (None, *_NAMES, *others))


def resolve(function: str, implementation: str | None, *requests: Request) -> Choice:
    """The backend that serves a call; one chosen by default is logged once for each reason.

    Args:
      function: name of the public function, for messages.
      implementation: the argument as the function takes it.
      *requests: the operations that the call is made of; one backend serves all of them.

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: the named implementation cannot serve the call.
    """
    choice = _decide(function, implementation, requests)
    if implementation is None:
        _log_once(function, choice.implementation, choice.reason)
    return choice


def resolve_over_tokens(
    function: str, implementation: str | None, axis: str, *requests: Request
) -> Choice:
    """`resolve` for a call whose tokens a mesh axis splits: the reference cannot serve it."""
    choice = resolve(function, implementation, *requests)
    if choice.backend is Backend.REFERENCE:
        raise NotImplementedError(
            f"implementation='reference' cannot serve sequence_axis={axis!r}: it is "
            "for one device; use 'xla', 'triton' or None"
        )
    return choice


def _decide(function: str, implementation: str | None, requests: tuple[Request, ...]) -> Choice:
    """`resolve` without the log."""
    check_name(implementation)
    backend = Backend.BY_PLATFORM if implementation is None else Backend(implementation)
    if backend in (Backend.XLA, Backend.REFERENCE):
        return Choice(backend, "named by the caller")
    refusal = _device_refusal(backend)
    if refusal is None:
        plans = (request.spec.on(backend).plan(*request.arrays) for request in requests)
        refusal = next((plan for plan in plans if isinstance(plan, Unsupported)), None)
    if refusal is None and implementation is not None:
        return Choice(backend, "named by the caller")
    if refusal is None:
        mosaic = _FUNCTIONS[function] and hopper_reason() is None
        kernels = ", with kernels in Mosaic GPU where they are faster" * mosaic
        return Choice(backend, f"a GPU{kernels}")
    if implementation is None:
        return Choice(Backend.XLA, refusal.reason)
    raise NotImplementedError(
        f"implementation={implementation!r} cannot serve {function}: {refusal.reason}; "
        "use 'xla', 'reference' or None"
    )


def _device_refusal(backend: Backend) -> Unsupported | None:
    """Why the device to compile for does not run the kernels of a backend, if it does not."""
    if backend is Backend.TRITON_INTERPRET:
        return None
    reason = device_reason()
    if reason is None and backend is Backend.MOSAIC_GPU:
        reason = hopper_reason()
    return None if reason is None else Unsupported(reason)


@functools.lru_cache(maxsize=4096)
def _log_once(function: str, implementation: str, reason: str) -> None:
    _LOG.info("%s uses implementation %r: %s", function, implementation, reason)
