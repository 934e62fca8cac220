"""Attention to one contiguous range of keys on Hopper, in Pallas Mosaic GPU: the forward pass.

It computes what `range_rows.attention` does, faster where its shapes fit: asynchronous copies (TMA)
feed products (wgmma) that run while exponents are taken, which Triton does not arrange.

Dataflow. Programs, one a multiprocessor, walk over items: 128 rows of one key head, those with the
longest ranges first. A row is a query token and a head of its group. A memory warpgroup copies the
queries of an item, and tiles of keys and values from the first that any of its rows sees to the
last, into a ring of buffers. Two compute warpgroups have 64 rows each. Masked tiles, at the edges
of the ranges, come first; then those that all rows see whole, without a mask.

A compute warpgroup issues the logits of a tile together with the weighted sum of the tile before,
and takes exponents while the matrix unit works on that sum; and the two take turns to issue, so
that one multiplies while the other one takes exponents.

TMA copies strips of rows that lie one stride apart in memory. So the order of the 64 rows of a
warpgroup is by head, then token, for groups of up to 8 heads, else by token, then head.

Flops, with V the visible (row, key) pairs: 4*V*D. Bytes: q and out once; K and V once for each 128
rows, from L2; 16 bytes a row of ranges and logsumexp.

Shapes: B rows of the batch, T tokens, N query heads, K key/value heads, G = N/K, M keys, D head
width of keys and values, S stages of the ring.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

#: Compute capability of the GPUs that have these instructions.
CAPABILITY = 90
#: Head width; rows of a warpgroup, which one wgmma takes; warpgroups of an item.
WIDTH, ROWS, WARPGROUPS = 128, 64, 2
#: Keys of a tile, tiles of the ring: with the queries and the results 192 KB of shared memory.
KEYS, STAGES = 128, 2
#: Multiprocessors of an H100 or H200.
PROGRAMS = 132
#: Fewest (query head, key) pairs for which the kernel is worth what is laid out before it.
ENOUGH_PAIRS = 2**30
#: Registers of a thread of a compute and of the memory warpgroup.
REGISTERS, FEW_REGISTERS = 240, 24
LOG2_E = math.log2(math.e)
#: Of matrices in shared memory: what wgmma takes.
_LAYOUT = (
    plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
)
#: Sums of products in registers.
ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


def reason(query, key, value) -> str | None:
    """Why these kernels cannot serve arrays of these shapes and dtypes; None if they can."""
    group = query.shape[2] // key.shape[2]
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"the dtype must be float16 or bfloat16, got {query.dtype}"
    if key.shape[3] != WIDTH or value.shape[3] != WIDTH:
        return f"head widths must be {WIDTH}, got {key.shape[3]} and {value.shape[3]}"
    if ROWS % group:
        return f"{group} query heads a key head are no power of two up to {ROWS}"
    return None


def pays(query, key, value) -> bool:
    """Whether these kernels serve a call, and faster than those of `range_rows.py`."""
    if reason(query, key, value):
        return False
    batch, length, heads, _ = query.shape
    whole = length % (WARPGROUPS * ROWS // (heads // key.shape[2])) == 0  # else q is copied
    return whole and batch * length * heads * key.shape[1] >= ENOUGH_PAIRS


def attention(query, key, value, visible, seers, *, scale, interpret=None):
    """Attention of each query to keys low .. high-1.

    Args:
      query: [B, T, N, D].
      key: [B, M, K, D].
      value: [B, M, K, D].
      visible: (low, high), int32 [B, T]; empty where the query sees nothing.
      seers: the range of tokens that see each key, int32 [B, M] each; empty where nobody does.
      scale: factor of the logits.
      interpret: `InterpretGPUParams` of Pallas Mosaic GPU, to run on a CPU.

    Returns:
      out [B, T, N, D] in the dtype of `query` and lse float32 [B, T, N], natural logarithm; 0 and
      -inf where a query sees nothing.
    """
    batch, length, heads, _ = query.shape
    group = heads // key.shape[2]
    # a weight of 0 times NaN is NaN: values that nobody sees may hold anything
    value = jnp.where((seers[0] < seers[1])[:, :, None, None], value, 0)
    tokens = WARPGROUPS * ROWS // group  # of an item
    query, low, high = (_pad(x, tokens) for x in (query, *visible))
    key, value = (_pad(x, KEYS) for x in (key, value))
    ranges = [x.reshape(batch, -1, tokens) for x in (low, high)]
    out, lse = _call(
        query,
        key,
        value,
        _bounds(*ranges),
        *(_rows_of_tokens(x, group) for x in ranges),
        scale=scale,
        interpret=interpret,
    )
    return out[:, :length], _tokens_of_rows(lse, group)[:, :length]


def _call(query, key, value, bounds, low, high, *, scale, interpret):
    """The kernel on whole items; `low`, `high` and the logsumexp are [.., items, 2, 64] by rows."""
    batch, _, heads, _ = query.shape
    kv_heads = key.shape[2]
    numbers = low.shape[1]
    shapes = (
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct((batch, kv_heads, numbers, WARPGROUPS, ROWS), jnp.float32),
    )
    items = numbers * batch * kv_heads
    strips = num_strips(heads // kv_heads)

    def hopper_forward_kernel(query_ref, key_ref, value_ref, bounds_ref, *refs):
        def walk(visit):
            """visit(item, steps taken before it) for the items of this program."""
            program = lax.axis_index("program")
            count = lax.div(items - program + PROGRAMS - 1, jnp.int32(PROGRAMS))

            def one(i, before):
                item = _Item(program + i * PROGRAMS, bounds_ref, kv_heads, heads // kv_heads)
                visit(item, before)
                return before + item.steps

            lax.fori_loop(0, count, one, jnp.int32(0))

        def run(queries, keys, values, outs, full, free, turns):
            arrays, buffers = (query_ref, key_ref, value_ref), (queries, keys, values)
            warpgroup = lax.axis_index("warpgroup")

            @pl.when(warpgroup < WARPGROUPS)
            def _():
                plgpu.set_max_registers(REGISTERS, action="increase")
                exact = interpret is not None
                compute = _Compute(refs, buffers, outs, full, free, turns, warpgroup, scale, exact)
                compute.start()
                walk(compute.visit)
                compute.finish()

            @pl.when(warpgroup == WARPGROUPS)
            def _():
                plgpu.set_max_registers(FEW_REGISTERS, action="decrease")
                walk(lambda item, before: _load(item, before, arrays, buffers, full, free))
                _await_all(free)

        def shared(*shape):
            return plgpu.SMEM((*shape, WIDTH), query.dtype, transforms=_LAYOUT)

        def barriers(arrivals, number):
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

        ring, both = (barriers(1, STAGES),) * 2, (barriers(WARPGROUPS, STAGES),) * 2
        pl.run_scoped(
            run,
            shared(WARPGROUPS, ROWS),
            shared(STAGES, KEYS),
            shared(STAGES, KEYS),
            shared(WARPGROUPS, ROWS),
            (barriers(strips, WARPGROUPS), *ring),
            (barriers(1, WARPGROUPS), *both),
            barriers(1, WARPGROUPS),
            collective_axes="warpgroup",
        )

    return plgpu.kernel(
        hopper_forward_kernel,
        out_type=shapes,
        grid=(PROGRAMS,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(query, key, value, bounds, low, high)


class _Item:
    """128 rows of one key head, and the steps that they take; the longest ranges come first.

    Attributes:
      number: of the rows among those of its row of the batch.
      row, kv_head: where they are.
      steps: tiles of keys.
      masked: how many of them need a mask, the first ones.
    """

    def __init__(self, item, bounds_ref, kv_heads, group):
        batch, numbers, _ = bounds_ref.shape
        number, rest = lax.div(item, jnp.int32(batch * kv_heads)), lax.rem(item, batch * kv_heads)
        self.number, self.group = numbers - 1 - number, group
        self.row, self.kv_head = lax.div(rest, jnp.int32(kv_heads)), lax.rem(rest, kv_heads)
        self.begin, self.inner_begin, self.inner_end, end = (
            bounds_ref[self.row, self.number, i] for i in range(4)
        )
        self.steps = end - self.begin
        self.masked = self.steps - (self.inner_end - self.inner_begin)

    def first_key(self, step):
        """First key of the tile of a step."""
        before = self.inner_begin - self.begin
        edge = jnp.where(step < before, self.begin + step, self.inner_end + step - before)
        inner = self.inner_begin + step - self.masked
        return jnp.where(step < self.masked, edge, inner) * KEYS

    def strips(self, array_ref, shared_ref, warpgroup):
        """Pairs (part of [B, T, N, D], part of the shared memory) of a warpgroup's rows."""
        token = (self.number * WARPGROUPS + warpgroup) * (ROWS // self.group)
        head = self.kv_head * self.group
        strips = num_strips(self.group)
        rows = ROWS // strips
        for i in range(strips):
            if self.group <= 8:
                part = array_ref.at[self.row, pl.ds(token, rows), head + i]
            else:
                part = array_ref.at[self.row, token + i, pl.ds(head, rows)]
            yield part, shared_ref.at[pl.ds(i * rows, rows)]


def _load(item, before, arrays, buffers, full, free):
    """Copies what an item needs; the memory warpgroup."""
    (query_ref, key_ref, value_ref), (queries, keys, values) = arrays, buffers

    def step(number, _):
        slot = lax.rem(before + number, STAGES)
        tile = pl.ds(item.first_key(number), KEYS)

        def copy(ref, target, full, free):
            plgpu.barrier_wait(free.at[slot])
            part = ref.at[item.row, tile, item.kv_head]
            plgpu.copy_gmem_to_smem(part, target.at[slot], full.at[slot])

        copy(key_ref, keys, full[1], free[1])

        @pl.when(number == 0)
        def _():
            for warpgroup in range(WARPGROUPS):
                plgpu.barrier_wait(free[0].at[warpgroup])
                for part, target in item.strips(query_ref, queries.at[warpgroup], warpgroup):
                    plgpu.copy_gmem_to_smem(part, target, full[0].at[warpgroup])

        copy(value_ref, values, full[2], free[2])

    lax.fori_loop(0, item.steps, step, None)


def _await_all(barriers):
    """Nothing may be under way when a program ends."""
    for group, number in zip(barriers, (WARPGROUPS, STAGES, STAGES), strict=True):
        for i in range(number):
            plgpu.barrier_wait(group.at[i])


class _Compute:
    """A compute warpgroup: the attention of its 64 rows of each item.

    Interpret mode knows no wgmma of registers. There `exact` multiplies what shared memory holds,
    and fences its reads.
    """

    def __init__(self, refs, buffers, outs, full, free, turns, warpgroup, scale, exact):
        self.low_ref, self.high_ref, self.out_ref, self.lse_ref = refs
        queries, self.keys, self.values = buffers
        self.queries, self.outs = queries.at[warpgroup], outs.at[warpgroup]
        self.full, self.free, self.turns = full, free, turns
        self.warpgroup, self.exact = warpgroup, exact
        self.scale = scale

    def start(self):
        """All buffers are free, and it is the turn of the first warpgroup."""
        for barriers in self.free[1:]:
            for slot in range(STAGES):
                plgpu.barrier_arrive(barriers.at[slot])
        plgpu.barrier_arrive(self.free[0].at[self.warpgroup])
        pl.when(self.warpgroup == 1)(lambda: plgpu.barrier_arrive(self.turns.at[0]))

    def finish(self):
        plgpu.wait_smem_to_gmem(0)
        pl.when(self.warpgroup == 0)(lambda: plgpu.barrier_wait(self.turns.at[0]))

    def begin_turn(self):
        plgpu.barrier_wait(self.turns.at[self.warpgroup])

    def end_turn(self):
        plgpu.barrier_arrive(self.turns.at[1 - self.warpgroup])

    def visit(self, item, before):
        low, high = (
            plgpu.load(
                ref.at[item.row, item.number, self.warpgroup],
                layout=plgpu.Layout.WGMMA.reduce(1),
                optimized=False,
            )
            for ref in (self.low_ref, self.high_ref)
        )

        def slot_of(step):
            return lax.rem(before + step, STAGES)

        def mask(logits, step):
            column = item.first_key(step) + plgpu.broadcasted_iota(
                jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA
            )
            seen = (column >= _columns(low, logits)) & (column < _columns(high, logits))
            return jnp.where(seen, logits, -jnp.inf)

        def step(number, state, masked):
            top, total, p, out = state
            logits, new = self.multiply(
                p, out, slot_of(number), slot_of(number - 1),
                lambda x: self.fold(top, total, mask(x, number) if masked else x, not masked),
            )  # fmt: skip
            top, total, new_p, decay = logits
            # the products read p until here: the new one must not take its registers before
            _, new_p, new = lax.optimization_barrier((p, new_p, new))
            return top, total, new_p, new * _columns(decay, new)

        state = self.first(lambda x: self.fold(None, None, mask(x, 0), False), slot_of(0))
        state = lax.fori_loop(1, item.masked, lambda i, x: step(i, x, True), state)
        begin = lax.max(item.masked, jnp.int32(1))
        state = lax.fori_loop(begin, item.steps, lambda i, x: step(i, x, False), state)
        plgpu.barrier_arrive(self.free[0].at[self.warpgroup])
        top, total, p, out = state
        out = self.last(p, out, slot_of(item.steps - 1))
        sighted = high > low
        total = jnp.where(sighted, total, 1.0)
        out = jnp.where(_columns(sighted, out), out * _columns(1.0 / total, out), 0.0)
        lse = jnp.where(sighted, (top + jnp.log2(total)) * (1 / LOG2_E), -jnp.inf)
        self.store(item, out, lse)

    def fold(self, top, total, logits, whole):
        """A step of an online softmax: see `common.Softmax.fold`; exponents are of 2."""
        factor = (abs(self.scale) or 1.0) * LOG2_E
        new_top = jnp.max(logits, axis=1) * factor
        new_top = new_top if top is None else jnp.maximum(top, new_top)
        safe = new_top if whole else jnp.where(new_top == -jnp.inf, 0.0, new_top)
        p = jnp.exp2(logits * factor - _columns(safe, logits))
        added = jnp.sum(p, axis=1)
        p = p.astype(self.queries.dtype)
        if top is None:
            return new_top, added, p, None
        decay = jnp.exp2(top - safe)
        return new_top, total * decay + added, p, decay

    def first(self, fold, slot):
        """The state after the first tile of keys."""
        plgpu.barrier_wait(self.full[0].at[self.warpgroup])
        plgpu.barrier_wait(self.full[1].at[slot])
        self.begin_turn()

        def multiply(logits_ref):
            plgpu.wgmma(logits_ref, self.queries, self.keys.at[slot].transpose((1, 0)))
            self.end_turn()
            return logits_ref[...]

        if self.exact:
            logits = _dot(self.queries[...], self.keys[slot].T)
            plgpu.commit_smem()
            self.end_turn()
        else:
            logits = pl.run_scoped(multiply, ACC((ROWS, KEYS)))
        plgpu.barrier_arrive(self.free[1].at[slot])
        top, total, p, _ = fold(self.signed(logits))
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, WIDTH), jnp.float32), plgpu.Layout.WGMMA)
        return top, total, p, zeros

    def multiply(self, p, out, slot, last, fold):
        """(fold(logits of the tile in `slot`), out + p V of the tile in `last`), overlapped."""
        plgpu.barrier_wait(self.full[1].at[slot])
        plgpu.barrier_wait(self.full[2].at[last])
        self.begin_turn()

        def after_logits(logits):
            plgpu.barrier_arrive(self.free[1].at[slot])
            return fold(self.signed(logits))

        def both(logits_ref, out_ref):
            out_ref[...] = out
            plgpu.wgmma(logits_ref, self.queries, self.keys.at[slot].transpose((1, 0)))
            plgpu.wgmma(out_ref, p, self.values.at[last])
            self.end_turn()
            folded = after_logits(plgpu.wgmma_accumulator_load(logits_ref, wait_n=1))
            return folded, out_ref[...]

        if self.exact:
            logits = _dot(self.queries[...], self.keys[slot].T)
            new = out + _dot(p, self.values[last])
            plgpu.commit_smem()
            self.end_turn()
            folded = after_logits(logits)
        else:
            folded, new = pl.run_scoped(both, ACC((ROWS, KEYS)), ACC((ROWS, WIDTH)))
        plgpu.barrier_arrive(self.free[2].at[last])
        return folded, new

    def last(self, p, out, slot):
        """The weighted sum of the last tile, added to `out`."""
        plgpu.barrier_wait(self.full[2].at[slot])

        def multiply(out_ref):
            out_ref[...] = out
            plgpu.wgmma(out_ref, p, self.values.at[slot])
            return out_ref[...]

        if self.exact:
            out += _dot(p, self.values[slot])
            plgpu.commit_smem()
        else:
            out = pl.run_scoped(multiply, ACC((ROWS, WIDTH)))
        plgpu.barrier_arrive(self.free[2].at[slot])
        return out

    def signed(self, logits):
        """The logits, so that larger ones get larger weights."""
        if self.scale == 0:
            return logits * 0.0
        return logits if self.scale > 0 else -logits

    def store(self, item, out, lse):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.outs[...] = out.astype(self.outs.dtype)
        self.lse_ref[item.row, item.kv_head, item.number, self.warpgroup] = lse
        plgpu.commit_smem()
        for part, source in item.strips(self.out_ref, self.outs, self.warpgroup):
            plgpu.copy_smem_to_gmem(source, part)


def _columns(x, like):
    """A number of each row, along the columns."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def num_strips(group):
    """Strips of a warpgroup's rows that TMA copies in one go: the tokens of a head, or the heads
    of a token, whichever are 8 or more, a whole tile of the layout in shared memory.
    """
    return group if group <= 8 else ROWS // group


def _rows_of_tokens(x, group):
    """[B, items, tokens] to [B, items, 2, 64] of rows."""
    x = x.reshape(*x.shape[:2], WARPGROUPS, ROWS // group)
    return jnp.tile(x, group) if group <= 8 else jnp.repeat(x, group, axis=3)


def _tokens_of_rows(x, group):
    """[B, K, items, 2, 64] of rows to [B, T, N]."""
    batch, kv_heads = x.shape[:2]
    tokens = ROWS // group
    if group <= 8:
        x = x.reshape(batch, kv_heads, -1, group, tokens).swapaxes(3, 4)
    x = x.reshape(batch, kv_heads, -1, group).swapaxes(1, 2)
    return x.reshape(batch, -1, kv_heads * group)


def _pad(x, multiple):
    """Zeros behind axis 1, up to a multiple."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def _bounds(low, high):
    """Tiles of keys of each item, int32 [B, items, 4]: begin, inner begin, inner end, end.

    The inner ones are those that all rows which see anything see whole.
    """
    sighted = high > low
    first = jnp.min(jnp.where(sighted, low, 2**30), axis=2)
    last = jnp.max(jnp.where(sighted, high, 0), axis=2)
    all_low = jnp.max(jnp.where(sighted, low, 0), axis=2)
    all_high = jnp.min(jnp.where(sighted, high, 2**30), axis=2)
    end = jnp.maximum(-(-last // KEYS), 1)  # one masked tile where nobody sees anything
    begin = jnp.minimum(first // KEYS, end - 1)
    inner_begin = jnp.clip(-(-all_low // KEYS), begin, end)
    inner_end = jnp.clip(all_high // KEYS, inner_begin, end)
    return jnp.stack((begin, inner_begin, inner_end, end), axis=2).astype(jnp.int32)
