"""The implementation for NVIDIA GPUs: what the kernels of `fsa_jax.pallas` serve, and gradients.

The kernels stand behind this one seam, so that another backend can stand beside them. `supported`
and `device_reason` say why a call or a device cannot be served; `dispatch.py` turns that into an
error or another choice.

Shapes: B rows, T tokens, N query heads, K key/value heads, G = N/K, D and E head widths, S slots.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from fsa_jax import xla
from fsa_jax.pallas import selected
from fsa_jax.pallas.tuning import Plan, SelectedTuning, make_plan, plan_reason
from fsa_jax.segments import Rows, listed_block_starts

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


def supported(query, key, value, *, block_size, tuning=None) -> str | None:
    """Why the kernels cannot serve the call on a GPU that can run them; None if they can."""
    tuning = tuning or SelectedTuning()
    return plan_reason(tuning, query, key, value, block_size, planned_capability())


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
    """See fsa_jax.selected_attention.

    `mode` is "gpu"; "interpret" to interpret the kernels on any device; or "either" for the kernels
    where the function is lowered for a GPU, and the portable implementation elsewhere.

    Residuals of the backward pass: query, key, value, out, lse float32 [B, T, N], the lists as
    first tokens int32 [B, T, K, S], their index (int32 [B, K, T*S], and 32 bytes for each block
    that may exist and each thousand pairs), and the documents, 9 bytes a token.
    """
    starts = listed_block_starts(rows, block_indices, block_size)
    slots = block_indices.shape[3]
    plan = make_plan(
        tuning or SelectedTuning(), query, key, value, slots, block_size, planned_capability()
    )
    call = _Call(plan, block_size, scale, rows.packed, mode)
    documents = (rows.start, rows.end, rows.valid)
    return _selected_attention(call, query, key, value, starts, documents)


@dataclasses.dataclass(frozen=True)
class _Call:
    """Everything static about a call."""

    plan: Plan
    block_size: int
    scale: float
    packed: bool
    mode: str

    @property
    def static(self):
        return {"block_size": self.block_size, "interpret": self.mode == "interpret"}

    def choose(self, kernels, portable, *args):
        """Runs `kernels`, or `portable` where the mode allows it and no GPU is compiled for."""
        if self.mode == "either":
            return jax.lax.platform_dependent(*args, cuda=kernels, default=portable)
        return kernels(*args)


# `documents` are the arrays of a Rows: custom_vjp fills pytrees with objects that are no arrays
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selected_attention(call, query, key, value, starts, documents):
    return _forward(call, query, key, value, starts, documents)[:2]


def _forward(call, query, key, value, starts, documents):
    def kernels(query, key, value, starts, documents):
        rows = Rows(*documents, packed=call.packed)
        lists = selected.build_lists(call.plan, starts, rows, **call.static)
        out, lse = selected.attention(
            call.plan, query, key, value, starts, lists, scale=call.scale, **call.static
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
    return checkpoint_name(out, "selected_out"), checkpoint_name(lse, "selected_lse"), lists


def _selected_attention_fwd(call, query, key, value, starts, documents):
    out, lse, lists = _forward(call, query, key, value, starts, documents)
    return (out, lse), (query, key, value, starts, documents, out, lse, lists)


def _selected_attention_bwd(call, residuals, cotangents):
    def kernels(query, key, value, starts, documents, out, lse, lists, dout, dlse):
        rows = Rows(*documents, packed=call.packed)
        delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1) - dlse
        return selected.gradients(
            call.plan, query, key, value, starts, lists, rows, lse, delta, dout,
            scale=call.scale, **call.static,
        )  # fmt: skip

    def portable(query, key, value, starts, documents, out, lse, lists, dout, dlse):
        del documents, out, lse, lists
        attend = functools.partial(
            xla.block_attention, starts=starts, block_size=call.block_size, scale=call.scale
        )
        return jax.vjp(attend, query, key, value)[1]((dout, dlse))

    return *call.choose(kernels, portable, *residuals, *cotangents), None, None


_selected_attention.defvjp(_selected_attention_fwd, _selected_attention_bwd)
