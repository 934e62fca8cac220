"""Dense causal attention over the devices of a mesh axis that splits the tokens of a row.

As in `context.py`: queries stay where they are, in stripe order; keys and values are gathered for
one KV head after another, and their gradients go back by reduce-scatter, in float32. The two
stripes of a device see as many keys together as those of every other.

Shapes: B rows, T tokens, N query heads, K key/value heads, G = N/K, D and E head widths.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fsa_jax import operators, stripes
from fsa_jax.context import Share, in_turn
from fsa_jax.operators import Call
from fsa_jax.semantics.precision import wide_dtype


@dataclasses.dataclass(frozen=True)
class _Static:
    """Everything static about a call."""

    call: Call
    window_size: int | None
    packed: bool
    axis: str


def attention(query, key, value, segment_ids, *, window_size, scale, mode, axis: str):
    """Out [B, T, N, E] and lse [B, T, N] of queries that are split over a mesh axis.

    Args:
      query: [B, T, N, D]; all arrays are in stripe order.
      key: [B, T, K, D].
      value: [B, T, K, E].
      segment_ids: int32 [B, T], or None.
      window_size: visible keys, or None for all.
      scale: factor of the logits.
      mode: as in `operators.Call`.
      axis: the mesh axis.
    """
    packed, ids = stripes.ids_or_zeros(segment_ids, query.shape[:2])
    static = _Static(Call(mode, scale, name="causal"), window_size, packed, axis)
    return _attention(static, query, key, value, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, query, key, value, ids) -> Any:
    return _attention_fwd(static, query, key, value, ids)[0]


def _attention_fwd(static, query, key, value, ids):
    out, lse = static.call.named(*_forward_on(static)(query, key, value, ids))
    return (out, lse), (query, key, value, ids, out, lse)


def _attention_bwd(static, residuals, cotangents):
    *arrays, out, lse = residuals
    rest = static.call.cotangents(lse, out, *cotangents)
    return *_backward_on(static)(*arrays, *rest), None


_attention.defvjp(_attention_fwd, _attention_bwd)

_OPERANDS = {"query": "b t n d", "key": "b t k d", "value": "b t k e", "segment_ids": "b t"}


def _forward_on(static):
    def body(axis, *arrays):
        return _Task(static, axis, *arrays).forward()

    return stripes.over_axis(body, static.axis, 1, _OPERANDS, ("b t n e", "b t n"))


def _backward_on(static):
    def body(axis, query, key, value, ids, *given):
        return _Task(static, axis, query, key, value, ids).backward(*given)

    operands = _OPERANDS | operators.COTANGENTS
    return stripes.over_axis(body, static.axis, 1, operands, tuple(_OPERANDS.values())[:3])


class _Task(Share):
    """A device's part: its queries, and one KV head's keys of the whole row."""

    def __init__(self, static, axis, query, key, value, ids):
        options = {"packed": static.packed, "window_size": static.window_size}
        super().__init__(axis, query, key.shape[2], ids, **options)
        self.call, self.sources = static.call, (key, value)

    def _keys(self, head):
        return [self.device.gather(self.head_of(x, head)) for x in self.sources]

    def forward(self):
        """Out and lse."""
        attend: Any = operators.range_attention

        def step(results, head):
            keys, query = self._keys(head), self.head_of(self.query, head, self.group)

            def stripe(results, half):
                near = (self.nearby(x, half) for x in keys)
                q = self.device.half_of(query, half)
                found = attend(self.call, q, *near, *self.window(half))
                return self.put(results, found, head, half)

            return in_turn(2, stripe, results)

        value, places = self.sources[1], self.query.shape[:3]
        out = jnp.zeros((*places, value.shape[3]), value.dtype)
        return in_turn(self.kv_heads, step, (out, jnp.zeros(places, wide_dtype(value))))

    def backward(self, *given):
        """Gradients of query, key and value; `given` are the arrays of `operators.COTANGENTS`."""
        wide = wide_dtype(self.query)

        def stripe(keys, head, state, half):
            dquery, *sums = state
            q, *rest = (
                self.device.half_of(self.head_of(x, head, self.group), half)
                for x in (self.query, *given)
            )
            near = [self.nearby(x, half) for x in keys]
            dq, *parts = operators.range_gradients_given(
                self.call, q, *near, *self.window(half), *rest
            )
            return *self.put([dquery], [dq], head, half), *self.add_nearby(sums, parts, half)

        def step(results, head):
            keys = self._keys(head)
            sums = [jnp.zeros(x.shape, wide) for x in keys]
            state = (results[0], *sums)
            dquery, *sums = in_turn(2, functools.partial(stripe, keys, head), state)
            parts = [self.device.scatter(x).astype(self.query.dtype) for x in sums]
            return dquery, *self.put(results[1:], parts, head)

        shares = (self.query, *self.sources)
        return in_turn(self.kv_heads, step, tuple(map(jnp.zeros_like, shares)))
