"""The implementation for NVIDIA GPUs: what the kernels of `fsa_jax.pallas` serve, and gradients.

The kernels stand behind this one seam, so that another backend can stand beside them. The
`*_reason` functions say why a call or a device cannot be served; `dispatch.py` turns that into an
error or another choice.

Residuals of the backward passes, besides query, key and value (which the branches share):

* compressed and window attention: out [B, T, N, E], lse float32 [B, T, N], and the visible ranges,
  8 bytes a token and 8 a key;
* selected attention: out, lse, the lists as first tokens int32 [B, T, K, S], their index (int32
  [B, K, T*S], and 32 bytes for each block that may exist and each thousand pairs), and the
  documents, 9 bytes a token;
* selection: none, it has no gradient.

Shapes: B rows, T tokens, N query heads, K key/value heads, G = N/K, D and E head widths, S slots, M
compressed windows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from fsa_jax import segments, xla
from fsa_jax.config import NSAConfig
from fsa_jax.pallas import ranges, select, selected
from fsa_jax.pallas.tuning import SelectedTuning, arrays_reason, make_plan, plan_reason
from fsa_jax.segments import Rows

#: The oldest compute capability whose matrix units and asynchronous copies the kernels use.
OLDEST = 80
#: The capability whose sizes are taken where there is no such GPU to ask: in interpret mode.
ASSUMED = 90


def capability() -> int | None:
    """Compute capability (90 for 9.0) of the GPU to compile for; None where that is no NVIDIA GPU.

    The GPU is that of the abstract mesh in use (ahead-of-time compilation) or the default device.
    """
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


def range_reason(query, key, value) -> str | None:
    """Why the kernels cannot serve compressed or window attention, likewise; or None."""
    return ranges.plan_reason(query, key, value, planned_capability())


def select_reason(query, key, config: NSAConfig) -> str | None:
    """Why the kernels cannot serve the selection, likewise; or None."""
    reason = arrays_reason(query, key, key)
    if reason is None and _select_plan(query, key, config) is None:
        reason = f"head width {key.shape[3]} of {query.dtype} needs more shared memory than it has"
    return reason


@dataclasses.dataclass(frozen=True)
class _Call:
    """Everything static about a call.

    Attributes:
      plan: sizes of the kernels.
      scale: factor of the logits.
      mode: "gpu"; "interpret" to interpret the kernels on any device; or "either" for the kernels
        where the function is lowered for a GPU, and the portable implementation elsewhere.
      name: of the outputs, for remat policies.
      block_size, packed: of selected attention.
    """

    plan: Any
    scale: float
    mode: str
    name: str = "selected"
    block_size: int = 0
    packed: bool = False

    @property
    def static(self):
        return {"scale": self.scale, "interpret": self.mode == "interpret"}

    def choose(self, kernels, portable, *args):
        """Runs `kernels`, or `portable` where the mode allows it and no GPU is compiled for."""
        if self.mode == "either":
            return jax.lax.platform_dependent(*args, cuda=kernels, default=portable)
        return kernels(*args)

    def named(self, out, lse):
        return checkpoint_name(out, f"{self.name}_out"), checkpoint_name(lse, f"{self.name}_lse")


def _delta(out, dout, dlse):
    """What every ds of a query subtracts."""
    return jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1) - dlse


# Attention to a contiguous range of keys


def compressed_attention(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B M K D"],
    value: Float[Array, "B M K E"],
    rows: Rows,
    *,
    kernel_size: int,
    kernel_stride: int,
    scale: float,
    mode: str,
):
    """See fsa_jax.compressed_attention; `mode` as in `_Call`."""
    windows = segments.describe_windows(rows, kernel_size, kernel_stride)
    visible = segments.visible_windows(windows)
    if key.shape[1] == 0:  # a row too short for even one window
        return xla.range_attention(query, key, value, visible, scale=scale, name="compressed")
    seers = segments.seers_of_windows(rows, windows, kernel_size)
    call = _Call(_range_plan(query, key, value), scale, mode, "compressed")
    return _range_attention(call, query, key, value, visible, seers)


def sliding_window_attention(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K E"],
    rows: Rows,
    *,
    window_size: int,
    scale: float,
    mode: str,
):
    """See fsa_jax.sliding_window_attention; `mode` as in `_Call`."""
    visible = segments.visible_tokens(rows, window_size)
    seers = segments.seers_of_tokens(rows, window_size)
    call = _Call(_range_plan(query, key, value), scale, mode, "window")
    return _range_attention(call, query, key, value, visible, seers)


def _range_plan(query, key, value):
    return ranges.make_plan(query, key, value, planned_capability())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _range_attention(call, query, key, value, visible, seers):
    return _range_forward(call, query, key, value, visible, seers)


def _range_forward(call, *args):
    def portable(query, key, value, visible, seers):
        del seers
        return xla.range_attention(query, key, value, visible, scale=call.scale, name=call.name)

    kernels = functools.partial(ranges.attention, call.plan, **call.static)
    return call.named(*call.choose(kernels, portable, *args))


def _range_attention_fwd(call, *args):
    out, lse = _range_forward(call, *args)
    return (out, lse), (*args, out, lse)


def _range_attention_bwd(call, residuals, cotangents):
    def kernels(query, key, value, visible, seers, out, lse, dout, dlse):
        delta = _delta(out, dout, dlse)
        return ranges.gradients(
            call.plan, query, key, value, visible, seers, lse, delta, dout, **call.static
        )

    def portable(query, key, value, visible, seers, out, lse, dout, dlse):
        del seers, out, lse
        attend = functools.partial(
            xla.range_attention, visible=visible, scale=call.scale, name=call.name
        )
        return jax.vjp(attend, query, key, value)[1]((dout, dlse))

    return *call.choose(kernels, portable, *residuals, *cotangents), None, None


_range_attention.defvjp(_range_attention_fwd, _range_attention_bwd)


# Selection


def select_blocks(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B M K D"],
    lse: Float[Array, "B T N"],
    rows: Rows,
    *,
    config: NSAConfig,
    scale: float,
    mode: str,
) -> Int[Array, "B T K topk"]:
    """See fsa_jax.select_blocks; `mode` as in `_Call`. Not differentiable."""
    portable = functools.partial(xla.select_blocks, config=config, scale=scale)
    if key.shape[1] == 0:
        return portable(query, key, lse, rows)
    call = _Call(_select_plan(query, key, config), scale, mode)

    def kernels(query, key, lse, rows):
        windows = segments.describe_windows(rows, config.kernel_size, config.kernel_stride)
        return select.select_blocks(
            query, key, lse, rows, windows, config=config, plan=call.plan, **call.static
        )

    return call.choose(kernels, portable, query, key, lse, rows)


def _select_plan(query, key, config):
    return select.make_plan(query, key, config, capability=planned_capability())


# Attention to listed blocks


def selected_attention(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K E"],
    block_indices: Int[Array, "B T K S"],
    rows: Rows,
    *,
    block_size: int,
    scale: float,
    mode: str,
    tuning: SelectedTuning | None = None,
):
    """See fsa_jax.selected_attention; `mode` as in `_Call`."""
    starts = segments.listed_block_starts(rows, block_indices, block_size)
    sizes = (block_indices.shape[3], block_size, planned_capability())
    plan = make_plan(tuning or SelectedTuning(), query, key, value, *sizes)
    call = _Call(plan, scale, mode, block_size=block_size, packed=rows.packed)
    documents = (rows.start, rows.end, rows.valid)
    return _selected_attention(call, query, key, value, starts, documents)


# `documents` are the arrays of a Rows: custom_vjp fills pytrees with objects that are no arrays
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selected_attention(call, query, key, value, starts, documents):
    return _selected_forward(call, query, key, value, starts, documents)[:2]


def _selected_forward(call, query, key, value, starts, documents):
    def kernels(query, key, value, starts, documents):
        rows = Rows(*documents, packed=call.packed)
        sizes = {"block_size": call.block_size, "interpret": call.static["interpret"]}
        lists = selected.build_lists(call.plan, starts, rows, **sizes)
        out, lse = selected.attention(
            call.plan, query, key, value, starts, lists, scale=call.scale, **sizes
        )
        return out, lse, lists

    def portable(query, key, value, starts, documents):
        out, lse = xla.block_attention(
            query, key, value, starts, block_size=call.block_size, scale=call.scale
        )
        # the index of the kernels, which nobody reads
        lists = jax.eval_shape(kernels, query, key, value, starts, documents)[2]
        return out, lse, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), lists)

    out, lse, lists = call.choose(kernels, portable, query, key, value, starts, documents)
    return *call.named(out, lse), lists


def _selected_attention_fwd(call, query, key, value, starts, documents):
    out, lse, lists = _selected_forward(call, query, key, value, starts, documents)
    return (out, lse), (query, key, value, starts, documents, out, lse, lists)


def _selected_attention_bwd(call, residuals, cotangents):
    def kernels(query, key, value, starts, documents, out, lse, lists, dout, dlse):
        rows, delta = Rows(*documents, packed=call.packed), _delta(out, dout, dlse)
        return selected.gradients(
            call.plan, query, key, value, starts, lists, rows, lse, delta, dout,
            block_size=call.block_size, **call.static,
        )  # fmt: skip

    def portable(query, key, value, starts, documents, out, lse, lists, dout, dlse):
        del documents, out, lse, lists
        attend = functools.partial(
            xla.block_attention, starts=starts, block_size=call.block_size, scale=call.scale
        )
        return jax.vjp(attend, query, key, value)[1]((dout, dlse))

    return *call.choose(kernels, portable, *residuals, *cotangents), None, None


_selected_attention.defvjp(_selected_attention_fwd, _selected_attention_bwd)
