"""What is static about an operation: the backend that serves it, and its specification.

Shapes: b sequences of a batch, t tokens, n query heads, k key/value heads, m keys, d and e head
widths of keys and of values.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fsa_jax.pallas import tile_tables
from fsa_jax.pallas.support import Unsupported, planned_capability
from fsa_jax.semantics.precision import narrow

#: Axes of the arrays of an attention, of its results, and of `QueryTerms`, for `partitioned`.
ATTENTION = {"query": "b t n d", "key": "b m k d", "value": "b m k e"}
RESULTS = ("b t n e", "b t n")
QUERY_TERMS = {"lse": "b t n", "delta": "b t n", "dout": "b t n e", "dlse": "b t n"}
#: Branches of native sparse attention, in the order of their gates.
BRANCHES = ("compressed", "selected", "window")
#: Names that outputs carry by default for remat policies such as
#: ``jax.checkpoint_policies.save_only_these_names(*CHECKPOINT_NAMES)``.
CHECKPOINT_NAMES = (
    "block_indices",
    *(f"{branch}_{part}" for branch in (*BRANCHES, "causal") for part in ("out", "lse")),
)


class Backend(enum.Enum):
    """The backends that can compute a function."""

    #: The dense definition, on any device.
    REFERENCE = "reference"
    #: Loops over tiles that XLA compiles, on any device.
    XLA = "xla"
    #: The kernels in Pallas-Triton.
    TRITON = "triton"
    #: The kernels in Pallas Mosaic GPU where they exist, otherwise those in Pallas-Triton.
    MOSAIC_GPU = "mosaic_gpu"
    #: The kernels in Pallas-Triton, interpreted on any device.
    TRITON_INTERPRET = "triton_interpret"
    #: The fastest kernels where the function is lowered for a GPU, `XLA` elsewhere.
    BY_PLATFORM = "by_platform"

    def runs(self, kernels: Callable, portable: Callable) -> Callable[..., Any]:
        """The one of two functions that this backend runs, or both, each on its platform."""
        if self is Backend.XLA:
            return narrow(portable)
        if self is Backend.BY_PLATFORM:
            either = {"cuda": narrow(kernels), "default": narrow(portable)}
            return lambda *args: jax.lax.platform_dependent(*args, **either)
        if self is Backend.REFERENCE:
            raise ValueError("the reference has no kernels or loops")
        return narrow(kernels)


class QueryTerms(NamedTuple):
    """What the backward pass of an attention needs from each query.

    Attributes:
      lse: logsumexp of the logits, [B, T, N].
      delta: sum(out * dout) - dlse, [B, T, N], as in ds = p * (dp - delta).
      dout: cotangent of the output, [B, T, N, E].
      dlse: cotangent of the logsumexp, [B, T, N], with which the portable loops may recompute
        delta.
    """

    lse: jax.Array
    delta: jax.Array
    dout: jax.Array
    dlse: jax.Array

    @classmethod
    def of(cls, out, lse, dout, dlse) -> Self:
        """The terms of an attention that gave `out` and `lse`."""
        delta = jnp.sum(out.astype(dlse.dtype) * dout.astype(dlse.dtype), axis=-1) - dlse
        return cls(lse, delta, dout, dlse)

    @classmethod
    def of_output(cls, lse, delta, dout) -> Self:
        """The terms where nothing but the output is differentiated; delta = sum(out * dout)."""
        return cls(lse, delta, dout, jnp.zeros_like(delta))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpSpec:
    """Everything static about an operation.

    Attributes:
      backend: what serves it. `dispatch.resolve` finds it; see `on`.
      scale: factor of the logits.
      capability: of the GPU that tiles are sized for.
      table: measured tiles.
      checkpoint_name: name of all results for remat policies; None: `CHECKPOINT_NAMES`.
    """

    backend: Backend = Backend.BY_PLATFORM
    scale: float
    capability: int = dataclasses.field(default_factory=planned_capability)
    table: tile_tables.Table | None = dataclasses.field(
        default_factory=tile_tables.table, metadata={"describe": tile_tables.entries}
    )
    checkpoint_name: str | None = None

    def on(self, backend: Backend) -> Self:
        """The same operation by another backend."""
        return dataclasses.replace(self, backend=backend)

    def plan(self, *arrays: Any) -> Any | Unsupported:
        """How the kernels of the backend serve arrays of these shapes and dtypes, or why not.

        It is asked twice. Before anything is computed `resolve` asks with the whole arrays, which
        says whether the kernels serve the call. The kernels' sizes follow from the arrays of one
        device, or with `vmap` from those of the whole stack: so the function that runs there asks
        again, with the shapes that it gets.
        """
        raise NotImplementedError

    @property
    def interpret(self) -> bool:
        """Whether kernels are interpreted."""
        return self.backend is Backend.TRITON_INTERPRET

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that all kernels take."""
        return {"scale": self.scale, "interpret": self.interpret}

    def runs(self, kernels: Callable, portable: Callable) -> Callable[..., Any]:
        """See `Backend.runs`."""
        return self.backend.runs(kernels, portable)

    def named(self, default: str, x: jax.Array) -> jax.Array:
        """A result with its name for remat policies, one of `CHECKPOINT_NAMES` by default."""
        return checkpoint_name(x, self.checkpoint_name or default)

    def renamed(self, *results: jax.Array) -> tuple[jax.Array, ...]:
        """Results that have no names by default."""
        return tuple(self.named("", x) for x in results) if self.checkpoint_name else results


def named(spec: OpSpec, branch: str, out, lse) -> tuple[jax.Array, jax.Array]:
    """The results of a branch with their names for remat policies."""
    return spec.named(f"{branch}_out", out), spec.named(f"{branch}_lse", lse)
