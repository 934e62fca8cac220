"""Support checks of the kernels: the GPUs that they run on, and the reason why a plan is refused.

`make_plan(...)` of a kernel package returns a plan, which holds all static parameters of a call, or
`Unsupported`, which says why there is none. This module imports no kernels, since `import fsa_jax`
would then take twice as long.
"""

import dataclasses

#: The oldest compute capability with the matrix units and asynchronous copies that kernels need.
OLDEST = 80
#: The compute capability of the GPUs that the Mosaic GPU kernels are written for.
HOPPER = 90
#: The capability for which tiles are sized if there is no such GPU, as in interpret mode.
ASSUMED = 90


@dataclasses.dataclass(frozen=True)
class Unsupported:
    """The result of planning a call that the kernels cannot serve, with the reason in words."""

    reason: str


def supported[Plan](plan: Plan | Unsupported) -> Plan:
    """Returns the plan unless it is `Unsupported`.

    Raises:
      NotImplementedError: the call is unsupported; the message is the reason.
    """
    if isinstance(plan, Unsupported):
        raise NotImplementedError(plan.reason)
    return plan


def capability() -> int | None:
    """Compute capability (90 for 9.0) of the GPU to compile for; None if it is no NVIDIA GPU.

    The GPU is taken from the current abstract mesh (ahead-of-time compilation), or else it is the
    default device.
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
        return "the kernels need an NVIDIA GPU as the default device or in the mesh"
    if found < OLDEST:
        return f"the kernels need compute capability 8.0, the GPU has {found // 10}.{found % 10}"
    return None


def hopper_reason() -> str | None:
    """Why the GPU cannot run the Mosaic GPU kernels; None if it can, or if there is no GPU."""
    found = capability()
    if found in (None, HOPPER):
        return None
    return f"its kernels need compute capability 9.0, the GPU has {found // 10}.{found % 10}"


def planned_capability() -> int:
    """The capability that tiles are sized for: the GPU's, or `ASSUMED` without a usable GPU."""
    return ASSUMED if device_reason() else capability() or ASSUMED
