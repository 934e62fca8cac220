"""Attention of each query to a contiguous range of keys: compressed, window and causal attention.

Residuals of the backward pass, besides query, key and value: out [B, T, N, E], lse float32 (or
float64) [B, T, N], and the ranges, 8 bytes a query and 8 a key.

Shapes: B sequences, T tokens, N query heads, K key/value heads, M keys, D and E head widths.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fsa_jax import xla
from fsa_jax.ops.call import ATTENTION, QUERY_TERMS, RESULTS, Backend, OpSpec, QueryTerms, named
from fsa_jax.ops.partition import partitioned
from fsa_jax.pallas.support import HOPPER, Unsupported, supported
from fsa_jax.semantics import segments
from fsa_jax.semantics.precision import accumulation_dtype
from fsa_jax.semantics.segments import SegmentInfo, Windows


class Ranges(NamedTuple):
    """Which query sees which keys.

    Attributes:
      keys: (low, high), int32 [B, T] each: a query sees the keys low .. high - 1.
      queries: (low, high), int32 [B, M] each: the queries that see a key; empty if none does.
    """

    keys: tuple[Int[Array, "B T"], ...]
    queries: tuple[Int[Array, "B M"], ...]

    @classmethod
    def of_windows(cls, segment_info: SegmentInfo, windows: Windows, kernel_size: int) -> "Ranges":
        """The ranges of compressed attention."""
        visible = segments.visible_windows(windows)
        return cls(visible, segments.query_range_of_windows(segment_info, windows, kernel_size))

    @classmethod
    def of_tokens(cls, segment_info: SegmentInfo, window_size: int) -> "Ranges":
        """The ranges of a sliding window."""
        visible = segments.visible_tokens(segment_info, window_size)
        return cls(visible, segments.query_range_of_tokens(segment_info, window_size))


@dataclasses.dataclass(frozen=True)
class RangePlan:
    """How the kernels serve a call.

    Attributes:
      tiles: the `fsa_jax.pallas.range_attention.passes.Plan` of the Triton kernels.
      mosaic: whether the Mosaic GPU kernels serve the call.
    """

    tiles: Any
    mosaic: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeSpec(OpSpec):
    """Attention to ranges.

    Attributes:
      branch: prefix of the names of the outputs, for remat policies; "causal" uses tiles for many
        keys per query.
    """

    branch: str

    def plan(self, *arrays: Any) -> RangePlan | Unsupported:
        """The plan for query, key and value."""
        from fsa_jax.pallas.range_attention import hopper_pipeline
        from fsa_jax.pallas.range_attention import passes as ranges

        query, key, value = arrays
        causal = self.branch == "causal"
        tiles = ranges.make_plan(query, key, value, self.capability, self.table, causal=causal)
        if isinstance(tiles, Unsupported):
            return tiles
        mosaic = self.backend is Backend.MOSAIC_GPU
        if mosaic and (reason := hopper_pipeline.unsupported_reason(query, key, value)):
            return Unsupported(reason)
        if self.backend is Backend.BY_PLATFORM and self.capability == HOPPER:
            mosaic = hopper_pipeline.is_profitable(
                query, key, value, window=self.branch == "window"
            )
        return RangePlan(tiles, mosaic)


def compressed_attention(
    spec: RangeSpec,
    query: Float[Array, "B T N D"],
    key: Float[Array, "B M K D"],
    value: Float[Array, "B M K E"],
    segment_info: SegmentInfo,
    *,
    kernel_size: int,
    kernel_stride: int,
) -> tuple[Float[Array, "B T N E"], Float[Array, "B T N"]]:
    """See fsa_jax.compressed_attention."""
    if key.shape[1] == 0:
        return empty_results(query, value)
    windows = segments.describe_windows(segment_info, kernel_size, kernel_stride)
    return range_attention(
        spec, query, key, value, Ranges.of_windows(segment_info, windows, kernel_size)
    )


def sliding_window_attention(
    spec: RangeSpec,
    query: Float[Array, "B T N D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K E"],
    segment_info: SegmentInfo,
    *,
    window_size: int,
) -> tuple[Float[Array, "B T N E"], Float[Array, "B T N"]]:
    """See fsa_jax.sliding_window_attention."""
    return range_attention(spec, query, key, value, Ranges.of_tokens(segment_info, window_size))


def empty_results(query, value) -> tuple[jax.Array, jax.Array]:
    """Out and lse of queries without keys: their sequences are too short for even one window."""
    out = jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)
    return out, jnp.full(query.shape[:3], -jnp.inf, accumulation_dtype(query))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def range_attention(spec: RangeSpec, query, key, value, ranges: Ranges) -> Any:
    """Out [B, T, N, E] and lse [B, T, N] of attention to ranges of keys."""
    return _range_attention_fwd(spec, query, key, value, ranges)[0]


def _range_attention_fwd(spec, query, key, value, ranges):
    results = named(spec, spec.branch, *range_forward(spec, ranges, query, key, value))
    return results, (query, key, value, ranges, *results)


def _range_attention_bwd(spec, residuals, cotangents):
    *arrays, ranges, out, lse = residuals
    terms = QueryTerms.of(out, lse, *cotangents)
    return *range_gradients(spec, ranges, terms, *arrays), None


range_attention.defvjp(_range_attention_fwd, _range_attention_bwd)


def range_forward(spec: RangeSpec, ranges: Ranges, query, key, value) -> Any:
    """Out and lse; not differentiable."""
    return _forward(spec, query, key, value, *ranges.keys, *ranges.queries)


def range_gradients(spec: RangeSpec, ranges: Ranges, terms: QueryTerms, query, key, value) -> Any:
    """(dq, dk, dv) in the dtypes of query, key and value."""
    return _backward(spec, query, key, value, *ranges.keys, *ranges.queries, *terms)


_RANGES = ATTENTION | {"low": "b t", "high": "b t", "first": "b m", "last": "b m"}


@functools.partial(jax.jit, static_argnums=0)
def _forward(spec, *arrays):
    kernels, loops = (functools.partial(f, spec) for f in (forward_by_kernels, forward_by_loops))
    return partitioned(spec.runs(kernels, loops), _RANGES, RESULTS)(*arrays)


def forward_by_kernels(spec: RangeSpec, query, key, value, low, high, first, last):
    """Out and lse on one device, by the kernels; the ranges are those of `Ranges`."""
    from fsa_jax.pallas.range_attention import hopper_groups
    from fsa_jax.pallas.range_attention import passes as ranges

    plan = supported(spec.plan(query, key, value))
    arrays = (query, key, value, (low, high), (first, last))
    if plan.mosaic:
        return hopper_groups.attention(*arrays, scale=spec.scale)
    return ranges.attention(plan.tiles, *arrays, **spec.options)


def forward_by_loops(spec: RangeSpec, query, key, value, low, high, first, last):
    """Out and lse on one device, by loops that XLA compiles."""
    del first, last
    return xla.range_attention(query, key, value, (low, high), scale=spec.scale)


@functools.partial(jax.jit, static_argnums=0)
def _backward(spec, *arrays):
    def kernels(query, key, value, low, high, first, last, lse, delta, dout, dlse):
        from fsa_jax.pallas.range_attention import passes as ranges

        del dlse
        plan = supported(spec.plan(query, key, value))
        arrays = (query, key, value, (low, high), (first, last), lse, delta, dout)
        return ranges.gradients(plan.tiles, *arrays, mosaic=plan.mosaic, **spec.options)

    def portable(query, key, value, low, high, first, last, *terms):
        del first, last
        return xla.range_gradients(query, key, value, (low, high), *terms, scale=spec.scale)

    run = partitioned(
        spec.runs(kernels, portable), _RANGES | QUERY_TERMS, tuple(ATTENTION.values())
    )
    return run(*arrays)
