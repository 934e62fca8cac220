"""What the kernels of `fsa_jax.pallas` serve: which devices, which calls, and why not the others.

The `*_reason` functions say why a call or a device cannot be served; `dispatch.py` turns that into
an error or another choice. `operators.py` runs the kernels. Both import a module of kernels where
they need it, so that `import fsa_jax` is not as long again as that of JAX.
"""

from fsa_jax.config import NSAConfig
from fsa_jax.pallas.block_attention.plan import SelectedTuning, plan_reason
from fsa_jax.pallas.tile_config import arrays_reason

#: The oldest compute capability whose matrix units and asynchronous copies the kernels use.
OLDEST = 80
#: The capability whose sizes are taken where there is no such GPU to ask: in interpret mode.
ASSUMED = 90


def capability() -> int | None:
    """Compute capability (90 for 9.0) of the GPU to compile for; None where that is no NVIDIA GPU.

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
    from fsa_jax.pallas.range_attention import hopper_pipeline as hopper

    found = capability()
    if found in (None, hopper.CAPABILITY):
        return None
    return f"its kernels need compute capability 9.0, the GPU has {found // 10}.{found % 10}"


def planned_capability() -> int:
    """The capability that tiles are sized for: of the GPU, or `ASSUMED` where none can serve."""
    return ASSUMED if device_reason() else capability() or ASSUMED


def selected_reason(
    query, key, value, *, block_size: int, tuning: SelectedTuning | None = None
) -> str | None:
    """Why the kernels cannot serve selected attention on a GPU that can run them; or None."""
    return plan_reason(
        tuning or SelectedTuning(), query, key, value, block_size, planned_capability()
    )


def range_reason(query, key, value, implementation: str | None = None) -> str | None:
    """Why the kernels of that name cannot serve attention to ranges of keys, likewise; or None.

    Those of Mosaic GPU take fewer shapes; where they are not asked for by name, the others serve.
    """
    from fsa_jax.pallas.range_attention import hopper_pipeline as hopper
    from fsa_jax.pallas.range_attention import passes as ranges

    reason = ranges.plan_reason(query, key, value, planned_capability())
    if reason is None and implementation == "mosaic_gpu":
        return hopper.reason(query, key, value)
    return reason


def select_reason(query, key, config: NSAConfig) -> str | None:
    """Why the kernels cannot serve the selection, likewise; or None."""
    from fsa_jax.pallas.block_selection import plan as select

    reason = arrays_reason(query, key, key)
    if reason is not None:
        return reason
    if select.make_plan(query, key, config, capability=planned_capability()) is None:
        reason = f"head width {key.shape[3]} of {query.dtype} needs more shared memory than it has"
    return reason
