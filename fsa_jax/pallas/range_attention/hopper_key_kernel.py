"""dK and dV of attention to contiguous key ranges on Hopper: the counterpart of `key_kernel.py`.

A program owns 128 keys of one key head, 64 per compute warpgroup. K and V stay in shared memory, dK
and dV in registers. The memory warpgroup copies tiles of 64 rows of the tokens that attend to any
of the keys (q, dout, and two numbers per row) into a ring that both compute warpgroups read. The
row order is that of `hopper_layout.py`. Tiles at the edges of the ranges come first and are masked;
then come the tiles in which all rows attend to all keys.

Scores are [64 keys, 64 rows], so that p and ds are register operands of the products that
accumulate dV and dK. The accumulators of q.k start from -lse / scale, those of dout.v from -delta:
p is then the exponential of a multiple of the first, ds is p times the second, and neither lse nor
delta takes registers. Exponentials are computed while the product dout.v runs.

Rows with an empty range get weights of 0 from the initial value of their accumulators. But their q
and dout may hold any value, and 0 times NaN is NaN: in tiles with such rows, which are always
masked, the warpgroups zero them in shared memory, one warpgroup q and the other dout. Keys outside
every range affect only their own rows of dK and dV, which are zeroed at the end. With one split, dK
and dV are stored through the shared memory of K and V.

Early keys may be attended to by many more rows than late ones. The rows are therefore divided into
`splits` parts, at the same tokens for all keys, so that programs that run concurrently read the
same rows from L2. Each part yields float32 partial sums, which are added in order. The longest
programs come first.

Flops, with V the visible (row, key) pairs: 8*V*D. Bytes: q, dout and 12 bytes per row once for each
128 keys, from L2; with more than one split, 8*splits*M*D bytes of partial sums, written and read.

Shapes: B sequences, T tokens, N query heads, K key/value heads, G = N/K, M keys, D = 128 head
width, tiles of 64 rows (64/G tokens).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fsa_jax.pallas.range_attention.hopper_layout import (
    ROWS,
    WARPGROUPS,
    WIDTH,
    num_strips,
    pad,
    rows_of_heads,
    strips,
)
from fsa_jax.pallas.range_attention.hopper_pipeline import (
    ACC,
    FEW_REGISTERS,
    LAYOUT,
    LOG2_E,
    REGISTERS,
    Steps,
    call,
    dot,
    number_of_rows,
    zeros,
)
from fsa_jax.pallas.tile_tables import branch_of

#: Keys of a warpgroup; row tiles in shared memory.
KEYS, STAGES = 64, 4
#: Programs that keep a GPU busy, fewest row tiles of a program, and most bytes of partial sums.
ENOUGH_PROGRAMS, SHORTEST, PARTS_BYTES = 1024, 32, 2**28


def key_gradients(
    query, key, value, query_range, lse, delta, dout, *, scale, splits=None, dtype=None,
    interpret=None,
):  # fmt: skip
    """Gradients dK and dV [B, M, K, D].

    Args:
      query: [B, T, N, D].
      key: [B, M, K, D].
      value: [B, M, K, D].
      query_range: (first, end) of the tokens that attend to each key, int32 [B, M]; empty if none.
      lse: float32 [B, T, N], natural logarithm; -inf for a query with an empty range.
      delta: sum(out * dout) - dlse, float32 [B, T, N].
      dout: [B, T, N, D].
      scale: factor of the logits, not 0.
      splits: number of parts that the tokens are divided into; None for as many as keep a GPU busy.
      dtype: dtype of the results: float32, or that of key and value, which is what None means.
      interpret: `InterpretGPUParams` of Pallas Mosaic GPU, to run on a CPU.
    """
    batch, _, heads, _ = query.shape
    slots, kv_heads = key.shape[1:3]
    tokens, keys = ROWS // (heads // kv_heads), WARPGROUPS * KEYS
    starts, branch = _starts(lse, delta, scale, kv_heads), branch_of(query, key)
    query, dout = (pad(x, tokens) for x in (query, dout))
    key, value, first, end = (pad(x, keys) for x in (key, value, *query_range))
    if splits is None:
        splits = _num_splits(branch, key, starts.shape[2])
    items = _items(first, end, starts.shape[2], kv_heads, tokens, splits)
    first, end = (x.reshape(batch, -1, WARPGROUPS, KEYS) for x in (first, end))
    arrays = (query, key, value, dout, items, first, end, starts)
    dtype = dtype or key.dtype
    static = {"scale": scale, "splits": splits, "interpret": interpret}
    parts = _call(*arrays, out_dtype=dtype if splits == 1 else jnp.float32, **static)
    return tuple(jnp.sum(x[:, :, :slots], axis=0).astype(dtype) for x in parts)


def _num_splits(branch, key, tiles):
    """Number of parts of the tokens; an even number, so that long and short parts balance the load.

    A window gets one part: the rows that attend to a key are adjacent, most of them in one part.
    """
    if branch == "window":
        return 1
    batch, slots, kv_heads, _ = key.shape
    programs = batch * kv_heads * slots // (WARPGROUPS * KEYS)
    wanted = min(ENOUGH_PROGRAMS // programs, PARTS_BYTES // (8 * key.size), tiles // SHORTEST)
    return max(1, wanted // 2 * 2)


def _call(
    query, key, value, dout, items, first, end, starts, *, scale, splits, out_dtype, interpret
):  # fmt: skip
    """Partial dK and dV, [splits, B, M, K, D]."""
    group = query.shape[2] // key.shape[2]
    dtype = key.dtype

    def hopper_key_gradient_kernel(
        query_ref, key_ref, value_ref, dout_ref, items_ref, first_ref, end_ref, starts_ref,
        dkey_ref, dvalue_ref,
    ):  # fmt: skip
        def run(*scoped):
            warpgroup = lax.axis_index("warpgroup")
            buffers, barriers = scoped[:7], scoped[7:]
            item = [items_ref[lax.axis_index("item"), i] for i in range(12)]

            @pl.when(warpgroup < WARPGROUPS)
            def _():
                plgpu.set_max_registers(REGISTERS, action="increase")
                refs = (first_ref, end_ref, dkey_ref, dvalue_ref)
                static = {"scale": scale, "group": group, "exact": interpret is not None}
                _Compute(item, refs, buffers, barriers, warpgroup, **static).run()

            @pl.when(warpgroup == WARPGROUPS)
            def _():
                plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
                refs = (query_ref, key_ref, value_ref, dout_ref, starts_ref)
                _load(item, refs, buffers, barriers, group)

        def shared(number, rows):
            return plgpu.SMEM((number, rows, WIDTH), dtype, transforms=LAYOUT)

        pl.run_scoped(
            run,
            shared(WARPGROUPS, KEYS),
            shared(WARPGROUPS, KEYS),
            shared(STAGES, ROWS),
            shared(STAGES, ROWS),
            plgpu.SMEM((STAGES, 3, ROWS), jnp.float32),
            plgpu.SMEM((WARPGROUPS, KEYS), jnp.int32),
            plgpu.SMEM((WARPGROUPS, KEYS), jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=2 * num_strips(group) + 1, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            collective_axes="warpgroup",
        )

    shapes = [jax.ShapeDtypeStruct((splits, *x.shape), out_dtype) for x in (key, value)]
    arrays = (query, key, value, dout, items, first, end, starts)
    return call(
        hopper_key_gradient_kernel,
        *arrays,
        grid={"item": items.shape[0]},
        out_shape=shapes,
        interpret=interpret,
    )


def _load(item, refs, buffers, barriers, group):
    """The memory warpgroup: copies the inputs of a program into shared memory."""
    query_ref, key_ref, value_ref, dout_ref, starts_ref = refs
    keys, values, queries, douts, starts, *_ = buffers
    own, full, free, _ = barriers
    row, kv_head, number, _, *bounds = item
    tiles = Steps(*bounds[:4])
    for warpgroup in range(WARPGROUPS):
        some = pl.ds((number * WARPGROUPS + warpgroup) * KEYS, KEYS)
        for ref, target in ((key_ref, keys), (value_ref, values)):
            part = ref.at[row, some, kv_head]
            plgpu.copy_gmem_to_smem(part, target.at[warpgroup], own.at[warpgroup])

    def step(step, _):
        slot = lax.rem(step, STAGES)
        plgpu.barrier_wait(free.at[slot])
        tile = tiles.tile(step)
        plgpu.copy_gmem_to_smem(starts_ref.at[row, kv_head, tile], starts.at[slot], full.at[slot])
        for ref, target in ((query_ref, queries), (dout_ref, douts)):
            for part, rows in strips(ref, target.at[slot], row, kv_head, tile, group):
                plgpu.copy_gmem_to_smem(part, rows, full.at[slot])

    lax.fori_loop(0, tiles.count, step, None)
    for slot in range(STAGES):  # no copy may be in flight when the program ends
        plgpu.barrier_wait(free.at[slot])


class _Compute:
    """A compute warpgroup: dK and dV of 64 keys. `exact`: see `hopper_pipeline.py`."""

    def __init__(self, item, refs, buffers, barriers, warpgroup, *, scale, group, exact):
        keys, values, self.queries, self.douts, self.starts, *limits = buffers
        self.keys, self.values, *self.limits = (x.at[warpgroup] for x in (keys, values, *limits))
        self.own, self.full, self.free, self.clean = barriers
        self.row, self.kv_head, self.number, self.part, *bounds = item
        self.tiles = Steps(*bounds[:4])
        # row tiles that attend to any of this warpgroup's keys
        self.begin, self.end = (
            jnp.where(warpgroup == 0, bounds[4 + i], bounds[6 + i]) for i in range(2)
        )
        *self.ranges_refs, self.dkey_ref, self.dvalue_ref = refs
        self.warpgroup, self.scale, self.group, self.exact = warpgroup, scale, group, exact

    def run(self):
        tiles = self.tiles
        for slot in range(STAGES):
            plgpu.barrier_arrive(self.free.at[slot])
        for ref, limit in zip(self.ranges_refs, self.limits, strict=True):
            limit[...] = number_of_rows(ref.at[self.row, self.number, self.warpgroup])
        plgpu.commit_smem()
        plgpu.barrier_wait(self.own.at[self.warpgroup])
        # the masked tiles in which some rows attend to this warpgroup's keys
        before = tiles.inner_begin - tiles.begin
        begin = lax.clamp(jnp.int32(0), self.begin - tiles.begin, before)
        end = before + lax.clamp(jnp.int32(0), self.end - tiles.inner_end, tiles.masked - before)
        lax.fori_loop(0, begin, self.skip, None)
        sums = (zeros(WIDTH), zeros(WIDTH))
        sums = lax.fori_loop(begin, end, lambda i, x: self.step(i, x, True), sums)
        lax.fori_loop(end, tiles.masked, self.skip, None)
        sums = lax.fori_loop(tiles.masked, tiles.count, lambda i, x: self.step(i, x, False), sums)
        first, last = self.ranges()
        seen = lax.broadcast_in_dim(last > first, (KEYS, WIDTH), [0])
        some = pl.ds((self.number * WARPGROUPS + self.warpgroup) * KEYS, KEYS)
        own = ((self.dkey_ref, self.keys, self.scale), (self.dvalue_ref, self.values, 1.0))
        for (ref, buffer, factor), x in zip(own, sums, strict=True):
            x = jnp.where(seen, x * factor, 0.0).astype(ref.dtype)
            part = ref.at[self.part, self.row, some, self.kv_head]
            if ref.dtype == buffer.dtype:  # direct stores of 16-bit numbers leave sectors part-full
                buffer[...] = x
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(buffer, part)
            else:
                part[...] = x
        plgpu.wait_smem_to_gmem(0)

    def ranges(self):
        """The first token that attends to each key, and one past the last."""
        return [number_of_rows(x) for x in self.limits]

    def ready(self, step, masked):
        """Waits for the row tile of a step and returns its slot."""
        slot = lax.rem(step, STAGES)
        plgpu.barrier_wait(self.full.at[slot])
        if masked:
            pl.when(self.starts[slot, 2, 0] != 0)(lambda: self.clear_rows_without_keys(slot))
        return slot

    def clear_rows_without_keys(self, slot):
        """Zeroes the rows with an empty range: one warpgroup zeroes q, the other dout."""

        def clear(rows):
            no_keys = jnp.abs(number_of_rows(self.starts.at[slot, 0])) == jnp.inf
            x = plgpu.load(rows.at[slot], layout=plgpu.Layout.WGMMA, optimized=False)
            no_keys = lax.broadcast_in_dim(no_keys, x.shape, [0])
            rows[slot] = jnp.where(no_keys, jnp.zeros((), x.dtype), x)

        pl.when(self.warpgroup == 0)(lambda: clear(self.queries))
        pl.when(self.warpgroup == 1)(lambda: clear(self.douts))
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.clean)
        plgpu.barrier_wait(self.clean)

    def skip(self, step, _):
        """Releases a row tile in which no row attends to this warpgroup's keys."""
        slot = self.ready(step, True)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.free.at[slot])

    def start(self, slot, number):
        """Initial value of the accumulators of a tile's scores."""
        x = plgpu.load(self.starts.at[slot, number], layout=plgpu.Layout.WGMMA.reduce(0))
        return lax.broadcast_in_dim(x, (KEYS, ROWS), [1])

    def weights(self, scores, step, masked):
        p = jnp.exp2(scores * (self.scale * LOG2_E))
        if not masked:
            return p
        tokens = ROWS // self.group
        token = plgpu.broadcasted_iota(jnp.int32, p.shape, 1, layout=plgpu.Layout.WGMMA)
        token = lax.rem(token, tokens) if self.group <= 8 else lax.div(token, self.group)
        token += self.tiles.tile(step) * tokens
        first, end = (lax.broadcast_in_dim(x, p.shape, [0]) for x in self.ranges())
        return jnp.where((token >= first) & (token < end), p, 0.0)

    def step(self, step, sums, masked):
        """Adds the contribution of a row tile to the sums dK and dV."""
        dkey, dvalue = sums
        slot = self.ready(step, masked)
        queries, douts = self.queries.at[slot], self.douts.at[slot]
        dtype = self.keys.dtype

        def multiply(scores_ref, dp_ref, dkey_ref, dvalue_ref):
            scores_ref[...] = self.start(slot, 0)
            dp_ref[...] = self.start(slot, 1)
            dkey_ref[...] = dkey
            dvalue_ref[...] = dvalue
            plgpu.wgmma(scores_ref, self.keys, queries.transpose((1, 0)))
            plgpu.wgmma(dp_ref, self.values, douts.transpose((1, 0)))
            p = self.weights(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1), step, masked)
            plgpu.wgmma(dvalue_ref, p.astype(dtype), douts)
            ds = (p * plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)).astype(dtype)
            plgpu.wgmma(dkey_ref, ds, queries)
            return dkey_ref[...], dvalue_ref[...]

        if self.exact:
            scores = self.start(slot, 0) + dot(self.keys[...], queries[...].T)
            p = self.weights(scores, step, masked)
            dp = self.start(slot, 1) + dot(self.values[...], douts[...].T)
            dvalue += dot(p.astype(dtype), douts[...])
            dkey += dot((p * dp).astype(dtype), queries[...])
            plgpu.commit_smem()
        else:
            square, wide = ACC((KEYS, ROWS)), ACC((KEYS, WIDTH))
            dkey, dvalue = pl.run_scoped(multiply, square, square, wide, wide)
        plgpu.barrier_arrive(self.free.at[slot])
        return dkey, dvalue


def _items(first, end, tiles, kv_heads, tokens, splits):
    """The work items of programs, int32 [items, 12], the longest first.

    The numbers of an item are: batch index, key head, key tile and part; the four of `Steps`; and
    for each warpgroup the first row tile that attends to its keys and one past the last.
    """
    batch = first.shape[0]

    def bounds(keys):
        """Bounds of the row tiles that attend to any, and to all, of `keys` keys; [B, 1, ...]."""
        low, high = (x.reshape(batch, 1, -1, keys) for x in (first, end))
        seen = high > low
        return (
            jnp.min(jnp.where(seen, low, 2**30), axis=3) // tokens,
            -(-jnp.max(jnp.where(seen, low, 0), axis=3) // tokens),
            jnp.min(jnp.where(seen, high, 2**30), axis=3) // tokens,
            -(-jnp.max(jnp.where(seen, high, 0), axis=3) // tokens),
        )

    begin, inner_begin, inner_end, finish = bounds(WARPGROUPS * KEYS)
    share = -(-tiles // splits)
    part = jnp.arange(splits, dtype=jnp.int32)[None, :, None]
    begin, finish = (jnp.clip(x, part * share, (part + 1) * share) for x in (begin, finish))
    finish = jnp.maximum(finish, begin)
    inner_begin = jnp.clip(inner_begin, begin, finish)
    inner_end = jnp.clip(inner_end, inner_begin, finish)
    own = [x.reshape(batch, 1, -1, WARPGROUPS) for x in bounds(KEYS)[::3]]
    own = jnp.broadcast_to(jnp.stack(own, axis=4), (*begin.shape, WARPGROUPS, 2))
    steps = jnp.stack((begin, inner_begin, inner_end, finish), axis=3)  # [B, splits, tiles, 4]
    steps = jnp.concatenate((steps, own.reshape(*begin.shape, 2 * WARPGROUPS)), axis=3)
    shape = (splits, batch, kv_heads, begin.shape[2])
    part, row, kv_head, tile = (lax.broadcasted_iota(jnp.int32, shape, i) for i in range(4))
    steps = jnp.broadcast_to(steps.swapaxes(0, 1)[:, :, None], (*shape, steps.shape[3]))
    places = jnp.stack((row, kv_head, tile, part), axis=4)
    items = jnp.concatenate((places, steps), axis=4).reshape(part.size, -1).astype(jnp.int32)
    return items[jnp.argsort(items[:, 4] - items[:, 7], stable=True)]


def _starts(lse, delta, scale, kv_heads):
    """float32 [B, K, tiles, 3, 64]: initial accumulators of q.k and of dout.v of each row.

    The third number is 1 in tiles where some row has an empty range, 0 in others.
    """
    no_keys = jnp.isneginf(lse)
    never = -math.copysign(math.inf, scale)
    tokens = ROWS * kv_heads // lse.shape[2]
    score, dp = (
        rows_of_heads(pad(jnp.where(no_keys, missing, x), tokens, missing), kv_heads)
        for x, missing in ((lse * (-1 / scale), never), (-delta, 0.0))
    )
    some: Any = jnp.isinf(score).any(axis=3, keepdims=True)
    return jnp.stack((score, dp, jnp.broadcast_to(some, dp.shape).astype(dp.dtype)), axis=3)
