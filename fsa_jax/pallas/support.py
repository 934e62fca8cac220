"""What the kernels can serve: which GPUs, and the answer of a plan that cannot be made.

A module of kernels answers `make_plan(...)` with a plan, which holds everything static about a
call, or with `Unsupported`, which says why there is none. Nothing here imports kernels, since
`import fsa_jax` would then take twice as long.
"""

import dataclasses

#: The oldest compute capability whose matrix units and asynchronous copies the kernels use.
OLDEST = 80
#: The capability of the GPUs that the kernels in Mosaic GPU are written for.
HOPPER = 90
#: The capability whose tile sizes are taken where there is no such GPU to ask: in interpret mode.
ASSUMED = 90


@dataclasses.dataclass(frozen=True)
class Unsupported:
    """The answer of kernels that cannot serve a call, with the reason in words."""

    reason: str


def supported[Plan](plan: Plan | Unsupported) -> Plan:
    """The plan.

    Raises:
      NotImplementedError: there is none; the message is the reason.
    """
    if isinstance(plan, Unsupported):
        raise NotImplementedError(plan.reason)
    return plan


def capability() -> int | None:
    """Compute capability (90 for 9.0) of the GPU to compile for; None if that is no NVIDIA GPU.

    The GPU is that of the abstract mesh in use (ahead-of-time compilation) or the default device.
    """
    from jax.experimental.pallas import triton as plgpu

    try:
        return plgpu.get_gpu_info().compute_capability or None
    except ValueError:
        return None


def device_reason() -> str | None:
    """Why the kernels cannot run on the device to compile for; None if they can."""
    found = capability()
    if found is None:
        return "the kernels need an NVIDIA GPU, which neither the default device nor the mesh is"
    if found < OLDEST:
        return f"the kernels need compute capability 8.0, the GPU has {found // 10}.{found % 10}"
    return None


def hopper_reason() -> str | None:
    """Why the kernels in Mosaic GPU cannot run on the device to compile for; None if they can."""
    found = capability()
    if found in (None, HOPPER):
        return None
    return f"its kernels need compute capability 9.0, the GPU has {found // 10}.{found % 10}"


def planned_capability() -> int:
    """The capability that tiles are sized for: of the GPU, or `ASSUMED` where none can serve."""
    return ASSUMED if device_reason() else capability() or ASSUMED
