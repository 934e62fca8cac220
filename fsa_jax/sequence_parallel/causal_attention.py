"""Dense causal attention with the tokens of a sequence over the devices of a mesh axis.

As in `attention.py`, queries stay on their device, in zigzag order; keys and values are gathered
for one KV head after another, and their gradients return by reduce-scatter, in float32. The two
chunks of a device together see as many keys as those of any other device.

Shapes: B sequences, T tokens, N query heads, K key/value heads, G = N/K, D and E head widths.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fsa_jax.ops.call import QUERY_TERMS, RESULTS, QueryTerms, named
from fsa_jax.ops.range_attention import RangeSpec, range_forward, range_gradients
from fsa_jax.semantics.precision import accumulation_dtype
from fsa_jax.sequence_parallel import zigzag
from fsa_jax.sequence_parallel.attention import Share, in_turn


@dataclasses.dataclass(frozen=True)
class ShardedCausalSpec:
    """Everything static about a call.

    Attributes:
      op: the attention of a chunk's queries.
      window_size: visible keys, or None for all.
      packed: whether sequences have segment ids.
      axis: the mesh axis that splits the tokens.
    """

    op: RangeSpec
    window_size: int | None
    packed: bool
    axis: str


def attention(op: RangeSpec, query, key, value, segment_ids, *, window_size, axis: str):
    """Out [B, T, N, E] and lse [B, T, N] of queries that are split over a mesh axis.

    Args:
      op: the operation, with the backend that serves it.
      query: [B, T, N, D]; all arrays are in zigzag order.
      key: [B, T, K, D].
      value: [B, T, K, E].
      segment_ids: int32 [B, T], or None.
      window_size: visible keys, or None for all.
      axis: the mesh axis.
    """
    packed, ids = zigzag.ids_or_zeros(segment_ids, query.shape[:2])
    spec = ShardedCausalSpec(op, window_size, packed, axis)
    return _attention(spec, query, key, value, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, query, key, value, ids) -> Any:
    return _attention_fwd(spec, query, key, value, ids)[0]


def _attention_fwd(spec, query, key, value, ids):
    results = named(spec.op, spec.op.branch, *_forward(spec, query, key, value, ids))
    return results, (query, key, value, ids, *results)


def _attention_bwd(spec, residuals, cotangents):
    *arrays, out, lse = residuals
    return *_backward(spec, *arrays, *QueryTerms.of(out, lse, *cotangents)), None


_attention.defvjp(_attention_fwd, _attention_bwd)

_OPERANDS = {"query": "b t n d", "key": "b t k d", "value": "b t k e", "segment_ids": "b t"}


@functools.partial(jax.jit, static_argnums=0)
def _forward(spec, *arrays):
    def body(axis, *arrays):
        return ShardedCausal(spec, axis, *arrays).forward()

    return zigzag.over_axis(body, spec.axis, 1, _OPERANDS, RESULTS, *arrays)


@functools.partial(jax.jit, static_argnums=0)
def _backward(spec, *arrays):
    def body(axis, query, key, value, ids, *terms):
        return ShardedCausal(spec, axis, query, key, value, ids).backward(QueryTerms(*terms))

    grads = tuple(_OPERANDS.values())[:3]
    return zigzag.over_axis(body, spec.axis, 1, _OPERANDS | QUERY_TERMS, grads, *arrays)


class ShardedCausal(Share):
    """A device's part: its queries, and one KV head's keys of whole sequences."""

    def __init__(self, spec, axis, query, key, value, ids):
        options = {"packed": spec.packed, "window_size": spec.window_size}
        super().__init__(axis, query, key.shape[2], ids, **options)
        self.op, self.sources = spec.op, (key, value)

    def _keys(self, head):
        return [self.device.gather(self.head_of(x, head)) for x in self.sources]

    def forward(self):
        """Out and lse."""

        def step(results, head):
            keys, query = self._keys(head), self.head_of(self.query, head, self.group)

            def chunk(results, half):
                near = (self.nearby(x, half) for x in keys)
                q = self.device.half_of(query, half)
                found = range_forward(self.op, self.window(half), q, *near)
                return self.put(results, found, head, half)

            return in_turn(2, chunk, results)

        value, places = self.sources[1], self.query.shape[:3]
        out = jnp.zeros((*places, value.shape[3]), value.dtype)
        return in_turn(self.kv_heads, step, (out, jnp.zeros(places, accumulation_dtype(value))))

    def backward(self, terms: QueryTerms):
        """Gradients of query, key and value."""
        wide = accumulation_dtype(self.query)

        def chunk(keys, head, state, half):
            dquery, *sums = state
            q, *own = (
                self.device.half_of(self.head_of(x, head, self.group), half)
                for x in (self.query, *terms)
            )
            near = [self.nearby(x, half) for x in keys]
            dq, *parts = range_gradients(self.op, self.window(half), QueryTerms(*own), q, *near)
            return *self.put([dquery], [dq], head, half), *self.add_nearby(sums, parts, half)

        def step(results, head):
            keys = self._keys(head)
            sums = [jnp.zeros(x.shape, wide) for x in keys]
            state = (results[0], *sums)
            dquery, *sums = in_turn(2, functools.partial(chunk, keys, head), state)
            parts = [self.device.scatter(x).astype(self.query.dtype) for x in sums]
            return dquery, *self.put(results[1:], parts, head)

        shares = (self.query, *self.sources)
        return in_turn(self.kv_heads, step, tuple(map(jnp.zeros_like, shares)))
