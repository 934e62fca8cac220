"""Attention to one range of keys on Hopper, and its dq: the counterpart of `query_kernels.py`.

`hopper_pipeline.py` describes the pipeline of rows, key tiles and warpgroups. A compute warpgroup
issues the products of a tile together with the accumulating product of the previous tile, and
computes exponentials while the matrix unit works on the latter.

Flops, with V the visible (row, key) pairs: forward 4*V*D, dq 6*V*D. Bytes: q, dout and the result
once; K and V once for each 128 rows, from L2; 8 to 16 bytes per row of ranges, logsumexp and delta.

Shapes: B sequences, T tokens, N query heads, K key/value heads, G = N/K, M keys, D = 128 head width
of keys and values.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fsa_jax.pallas.range_attention.hopper_layout import ROWS, WIDTH
from fsa_jax.pallas.range_attention.hopper_pipeline import (
    ACC,
    LOG2_E,
    Compute,
    Ring,
    call_on_rows,
    dot,
    number_of_rows,
    over_columns,
    zeros,
)

#: Together with the rows and the results, each ring takes 192 KB of shared memory. In the gradient
#: kernel a tile of keys is in use for two steps, a tile of values for one.
FORWARD, GRADIENT = Ring(128, 2, 2), Ring(64, 3, 3)


def attention(query, key, value, visible, query_range, *, scale, interpret=None):
    """Attention of each query to keys low .. high-1.

    Args:
      query: [B, T, N, D].
      key: [B, M, K, D].
      value: [B, M, K, D].
      visible: (low, high), int32 [B, T]; low >= high is an empty range.
      query_range: (first, end) of the tokens that attend to each key, int32 [B, M]; empty if none.
      scale: factor of the logits.
      interpret: `InterpretGPUParams` of Pallas Mosaic GPU, to run on a CPU.

    Returns:
      out [B, T, N, D] in the dtype of `query` and lse float32 [B, T, N], natural logarithm; 0 and
      -inf for a query with an empty range.
    """
    return tuple(
        call_on_rows(
            "hopper_forward", Forward, [query], key, value, visible, query_range,
            tables=[], results=[query.dtype, None], ring=FORWARD, scale=scale, interpret=interpret,
        )
    )  # fmt: skip


def query_gradient(
    query, key, value, visible, query_range, lse, delta, dout, *, scale, interpret=None
):  # fmt: skip
    """Gradient [B, T, N, D] of the queries.

    `lse` is float32 [B, T, N], `delta` = sum(out * dout) - dlse likewise, `dout` [B, T, N, D]; the
    other arguments are those of `attention`.
    """
    tables = [lse * LOG2_E, delta]
    return call_on_rows(
        "hopper_query_gradient", _QueryGradient, [query, dout], key, value, visible, query_range,
        tables=tables, results=[query.dtype], ring=GRADIENT, scale=scale, interpret=interpret,
    )[0]  # fmt: skip


class Forward(Compute):
    """Forward pass: overlaps the logits of a tile with the weighted sum of the previous tile."""

    def visit(self, item, before):
        out_ref, lse_ref, *_ = self.refs
        ranges, dtype = self.ranges(item), self.rows[0].dtype
        low, high = ranges
        self.begin(item)

        def slots(step):
            return self.ring.slots(before + step)

        def mask(logits, step):
            return jnp.where(self.seen(item, step, ranges, logits.shape), logits, -jnp.inf)

        def step(number, state, masked):
            row_max, row_sum, p, out = state

            def fold(logits):
                logits = mask(logits, number) if masked else logits
                return self.softmax(row_max, row_sum, logits, masked, (item, number))

            folded, new = self.multiply(p, out, slots(number)[0], slots(number - 1)[1], fold)
            row_max, row_sum, new_p, decay = folded
            # products read p up to here, so the new p must not be written to its registers before;
            # it is cast here, since a cast before would be a copy
            _, new_p, new = lax.optimization_barrier((p, new_p, new))
            return row_max, row_sum, new_p.astype(dtype), new * over_columns(decay, new)

        def first(logits):
            return self.softmax(None, None, mask(logits, 0), True, (item, 0))

        state = self.first(first, slots(0)[0])
        row_max, row_sum, p, out = self.fold(item, step, state)
        self.free_rows()
        out = self.last(p, out, slots(item.tiles.count - 1)[1])
        has_keys = high > low
        row_sum = jnp.where(has_keys, row_sum, 1.0)
        out = jnp.where(over_columns(has_keys, out), out * over_columns(1.0 / row_sum, out), 0.0)
        lse = jnp.where(has_keys, (row_max + jnp.log2(row_sum)) * (1 / LOG2_E), -jnp.inf)
        self.at(lse_ref, item)[...] = lse
        self.store(item, out_ref, out)
        self.finished(item, row_max, row_sum)

    def softmax(self, row_max, row_sum, logits, masked, step):
        """A step of an online softmax in base 2; see `online_softmax.Softmax.fold`."""
        factor = (abs(self.scale) or 1.0) * LOG2_E
        new_max = jnp.max(logits, axis=1) * factor
        new_max = new_max if row_max is None else jnp.maximum(row_max, new_max)
        safe = jnp.where(new_max == -jnp.inf, 0.0, new_max) if masked else new_max
        p = jnp.exp2(logits * factor - over_columns(safe, logits))
        item, number = step
        added = self.weigh(item, number, p, new_max)
        if row_max is None:
            return new_max, added, p, None
        decay = jnp.exp2(row_max - safe)
        return new_max, row_sum * decay + added, p, decay

    def begin(self, item):
        """For subclasses: called before the first step of an item."""

    def weigh(self, item, number, p, row_max):
        """Each row's sum of the weights [64, keys] of a step, relative to 2**row_max."""
        del item, number, row_max
        return jnp.sum(p, axis=1)

    def finished(self, item, row_max, row_sum):
        """For subclasses: called after the last step with each row's maximum and sum of weights."""

    def signed(self, logits):
        """The logits, negated if the scale is negative: larger logits then get larger weights."""
        if self.scale == 0:
            return logits * 0.0
        return logits if self.scale > 0 else -logits

    def first(self, fold, slot):
        """The state after the first tile of keys."""
        (queries,), keys = self.rows, self.shared.keys
        plgpu.barrier_wait(self.shared.full[0].at[self.warpgroup])
        plgpu.barrier_wait(self.shared.full[1].at[slot])
        self.begin_turn()

        def multiply(logits_ref):
            plgpu.wgmma(logits_ref, queries, keys.at[slot].transpose((1, 0)))
            self.end_turn()
            return logits_ref[...]

        if self.exact:
            logits = dot(queries[...], keys[slot].T)
            plgpu.commit_smem()
            self.end_turn()
        else:
            logits = pl.run_scoped(multiply, ACC((ROWS, self.ring.keys)))
        plgpu.barrier_arrive(self.shared.free[1].at[slot])
        row_max, row_sum, p, _ = fold(self.signed(logits))
        return row_max, row_sum, p.astype(self.rows[0].dtype), zeros(WIDTH)

    def multiply(self, p, out, slot, last, fold):
        """(fold(logits of the keys in `slot`), out + p V of the values in `last`), overlapped."""
        (queries,), keys, values = self.rows, self.shared.keys, self.shared.values
        plgpu.barrier_wait(self.shared.full[1].at[slot])
        plgpu.barrier_wait(self.shared.full[2].at[last])
        self.begin_turn()

        def after_logits(logits):
            plgpu.barrier_arrive(self.shared.free[1].at[slot])
            return fold(self.signed(logits))

        def both(logits_ref, out_ref):
            out_ref[...] = out
            plgpu.wgmma(logits_ref, queries, keys.at[slot].transpose((1, 0)))
            plgpu.wgmma(out_ref, p, values.at[last])
            self.end_turn()
            folded = after_logits(plgpu.wgmma_accumulator_load(logits_ref, wait_n=1))
            return folded, out_ref[...]

        if self.exact:
            logits = dot(queries[...], keys[slot].T)
            new = out + dot(p, values[last])
            plgpu.commit_smem()
            self.end_turn()
            folded = after_logits(logits)
        else:
            folded, new = pl.run_scoped(both, ACC((ROWS, self.ring.keys)), ACC((ROWS, WIDTH)))
        plgpu.barrier_arrive(self.shared.free[2].at[last])
        return folded, new

    def last(self, p, out, slot):
        """Adds the weighted sum of the last tile to `out`."""
        plgpu.barrier_wait(self.shared.full[2].at[slot])
        out = self.added(out, p, self.shared.values, slot)
        plgpu.barrier_arrive(self.shared.free[2].at[slot])
        return out


class _QueryGradient(Compute):
    """Gradient dq: overlaps logits and dp of a tile with the product ds K of the previous one."""

    def visit(self, item, before):
        lse_ref, delta_ref, dquery_ref = self.refs
        ranges = self.ranges(item)
        lses, deltas = (number_of_rows(self.at(x, item)) for x in (lse_ref, delta_ref))

        def slots(step):
            return self.ring.slots(before + step)

        def weights(logits):
            return jnp.exp2(logits * (self.scale * LOG2_E) - over_columns(lses, logits))

        def gradient(p, dp, number, masked):
            """The gradient of the logits."""
            ds = p * (dp - over_columns(deltas, dp))
            if masked:
                ds = jnp.where(self.seen(item, number, ranges, ds.shape), ds, 0.0)
            return ds.astype(self.rows[0].dtype)

        def step(number, state, masked):
            ds, dquery = state
            new = self.multiply(
                slots(number), weights, lambda p, dp: gradient(p, dp, number, masked),
                (ds, dquery, slots(number - 1)[0]),
            )  # fmt: skip
            # products read ds up to here, so the new ds must not be written to its registers before
            return lax.optimization_barrier((ds, *new))[1:]

        plgpu.barrier_wait(self.shared.full[0].at[self.warpgroup])
        ds, _ = self.multiply(slots(0), weights, lambda p, dp: gradient(p, dp, 0, True))
        ds, dquery = self.fold(item, step, (ds, zeros(WIDTH)))
        self.free_rows()
        slot = slots(item.tiles.count - 1)[0]
        dquery = self.added(dquery, ds, self.shared.keys, slot)
        plgpu.barrier_arrive(self.shared.free[1].at[slot])
        has_keys = over_columns(ranges[1] > ranges[0], dquery)
        self.store(item, dquery_ref, jnp.where(has_keys, dquery * self.scale, 0.0))

    def multiply(self, slots, weights, gradient, before: Any = None):
        """(gradient(weights(q k^T), dout v^T), dquery + ds K), overlapped.

        `before` = (ds, dquery, slot of the previous keys); without it only ds is computed.
        """
        (queries, douts), keys, values = self.rows, self.shared.keys, self.shared.values
        key_slot, value_slot = slots
        ds, dquery, last = before or (None, None, None)
        plgpu.barrier_wait(self.shared.full[1].at[key_slot])
        plgpu.barrier_wait(self.shared.full[2].at[value_slot])
        self.begin_turn()

        def three(logits_ref, dp_ref, dquery_ref: Any = None):
            if before:
                dquery_ref[...] = dquery
            plgpu.wgmma(logits_ref, queries, keys.at[key_slot].transpose((1, 0)))
            plgpu.wgmma(dp_ref, douts, values.at[value_slot].transpose((1, 0)))
            if before:
                plgpu.wgmma(dquery_ref, ds, keys.at[last])
            self.end_turn()
            later = 1 if before else 0
            p = weights(plgpu.wgmma_accumulator_load(logits_ref, wait_n=1 + later))
            dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=later)
            plgpu.barrier_arrive(self.shared.free[2].at[value_slot])
            return gradient(p, dp), dquery_ref[...] if before else None

        if self.exact:
            p = weights(dot(queries[...], keys[key_slot].T))
            dp = dot(douts[...], values[value_slot].T)
            new = dquery + dot(ds, keys[last]) if before else None  # pyright: ignore[reportOptionalOperand]
            plgpu.commit_smem()
            self.end_turn()
            plgpu.barrier_arrive(self.shared.free[2].at[value_slot])
            new_ds = gradient(p, dp)
        else:
            sums = [ACC((ROWS, self.ring.keys))] * 2 + [ACC((ROWS, WIDTH))] * bool(before)
            new_ds, new = pl.run_scoped(three, *sums)
        if before:
            plgpu.barrier_arrive(self.shared.free[1].at[last])
        return new_ds, new
