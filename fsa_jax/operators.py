"""The four computations that everything is made of, each with its gradients.

Kernels and portable loops are two ways to do the same: pure functions of arrays, forward and
backward. Here stands what they share: which of them runs, the rules of differentiation, and how the
work divides over devices (`sharding.partitioned`; sizes of tiles follow from one device's part).
Modules of kernels are imported where they are called: Pallas takes as long to import as JAX.

Residuals of the backward passes, besides query, key and value (which the branches share):

* compressed and window attention: out [B, T, N, E] (of a `gated` call not: its `gated_sum` keeps
  it), lse float32 [B, T, N], and the visible ranges, 8 bytes a token and 8 a key;
* selected attention: out (likewise), lse, the lists as first tokens int32 [B, T, K, S], and for the
  kernels their index (int32 [B, K, T*S], and 36 bytes for each block that may exist and each
  thousand pairs) and the documents, 9 bytes a token;
* selection: none, it has no gradient.

Shapes: B rows, T tokens, N query heads, K key/value heads, G = N/K, D and E head widths, S slots, M
compressed windows.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from fsa_jax import xla
from fsa_jax.config import NSAConfig
from fsa_jax.pallas import tile_tables as tuned
from fsa_jax.pallas.block_attention.plan import SelectedTuning, make_plan
from fsa_jax.semantics import segments
from fsa_jax.semantics.precision import narrow, wide_dtype
from fsa_jax.semantics.segments import Rows, Windows
from fsa_jax.sharding import partitioned
from fsa_jax.triton import planned_capability

_ATTENTION = {"query": "b t n d", "key": "b m k d", "value": "b m k e"}
_RESULTS = {"out": "b t n e", "lse": "b t n"}
COTANGENTS = {"lse": "b t n", "delta": "b t n", "dout": "b t n e", "dlse": "b t n"}
_ROWS = {"start": "b t", "end": "b t", "valid": "b t"}
_KEY_ROWS = {name: "b m" for name in _ROWS}


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything static about a call.

    Attributes:
      mode: "gpu" for the kernels in Triton; "mosaic" for them, and those in Mosaic GPU where there
        are any; "interpret" to interpret those in Triton on any device; "portable" for the loops;
        or "either" for the fastest kernels where the function is lowered for a GPU, else the loops.
      scale: factor of the logits.
      capability: of the GPU that tiles are sized for.
      name: of the outputs, for remat policies; "causal" has tiles for many keys a query.
      block_size, packed, tuning: of selected attention.
      config: of the selection.
      table: of measured tiles.
      gated: the cotangent of lse is that of `gating.gated_sum`, -delta.
    """

    mode: str
    scale: float
    capability: int = dataclasses.field(default_factory=planned_capability)
    name: str = "selected"
    block_size: int = 0
    packed: bool = False
    tuning: SelectedTuning | None = None
    config: NSAConfig | None = None
    table: str | None = dataclasses.field(
        default_factory=tuned.table, metadata={"describe": tuned.entries}
    )
    gated: bool = False

    @property
    def static(self):
        return {"scale": self.scale, "interpret": self.mode == "interpret"}

    def choose(self, kernels, portable):
        """The function that runs `kernels` or `portable`, as the mode says."""
        if self.mode == "portable":
            return narrow(portable)
        if self.mode == "either":
            either = {"cuda": narrow(kernels), "default": narrow(portable)}
            return lambda *args: jax.lax.platform_dependent(*args, **either)
        return narrow(kernels)

    def takes_hopper(self, query, key, value) -> bool:
        """Whether the kernels in Mosaic GPU take this call of `range_attention`."""
        if self.mode != "either":
            return self.mode == "mosaic"
        from fsa_jax.pallas.range_attention import hopper_pipeline as hopper

        pays = hopper.pays(query, key, value, window=self.name == "window")
        return self.capability == hopper.CAPABILITY and pays

    def range_plan(self, query, key, value) -> Any:
        """The tiles of the kernels in Triton for `range_attention`, a `passes.Plan`."""
        from fsa_jax.pallas.range_attention import passes as ranges

        causal = self.name == "causal"
        plan = ranges.make_plan(query, key, value, self.capability, self.table, causal=causal)
        assert plan is not None  # `triton.range_reason` has asked
        return plan

    def named(self, out, lse):
        return checkpoint_name(out, f"{self.name}_out"), checkpoint_name(lse, f"{self.name}_lse")

    def delta(self, out, dout, dlse):
        """What every ds of a query subtracts."""
        if self.gated:
            return -dlse
        return jnp.sum(out.astype(dlse.dtype) * dout.astype(dlse.dtype), axis=-1) - dlse

    def cotangents(self, lse, out, dout, dlse):
        """The arrays of `COTANGENTS`: the portable loops may compute delta again, from dlse."""
        delta = self.delta(out, dout, dlse)
        return lse, delta, dout, jnp.zeros_like(dlse) if self.gated else dlse


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
    gated: bool = False,
):
    """See fsa_jax.compressed_attention; `mode` and `gated` as in `Call`."""
    if key.shape[1] == 0:  # a row too short for even one window
        out = jnp.zeros((*query.shape[:3], value.shape[3]), query.dtype)
        return out, jnp.full(query.shape[:3], -jnp.inf, wide_dtype(query))
    windows = segments.describe_windows(rows, kernel_size, kernel_stride)
    visible = segments.visible_windows(windows)
    seers = segments.seers_of_windows(rows, windows, kernel_size)
    call = Call(mode, scale, name="compressed", gated=gated)
    return range_attention(call, query, key, value, visible, seers)


def sliding_window_attention(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B T K D"],
    value: Float[Array, "B T K E"],
    rows: Rows,
    *,
    window_size: int,
    scale: float,
    mode: str,
    gated: bool = False,
    name: str = "window",
):
    """See fsa_jax.sliding_window_attention; `mode`, `gated` and `name` as in `Call`."""
    visible = segments.visible_tokens(rows, window_size)
    seers = segments.seers_of_tokens(rows, window_size)
    call = Call(mode, scale, name=name, gated=gated)
    return range_attention(call, query, key, value, visible, seers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def range_attention(call: Call, query, key, value, visible, seers) -> Any:
    """Attention of each query to keys low .. high-1.

    `visible` = (low, high), int32 [B, T] each; `seers` the range of queries that see each key,
    int32 [B, M] each; empty where there is none.
    """
    return _range_forward(call, query, key, value, visible, seers)


def _range_forward(call, query, key, value, visible, seers):
    return call.named(*_range_forward_on(call)(query, key, value, *visible, *seers))


def _range_attention_fwd(call, *args):
    out, lse = _range_forward(call, *args)
    return (out, lse), (*args, None if call.gated else out, lse)


def _range_attention_bwd(call, residuals, cotangents):
    return *range_gradients(call, residuals, cotangents), None, None


def range_gradients(call: Call, residuals, cotangents):
    """(dq, dk, dv) of `range_attention`: residuals are its arguments and its results."""
    query, key, value, visible, seers, out, lse = residuals
    rest = call.cotangents(lse, out, *cotangents)
    return range_gradients_given(call, query, key, value, visible, seers, *rest)


def range_gradients_given(call: Call, query, key, value, visible, seers, *rest):
    """`range_gradients` with the arrays of `COTANGENTS`."""
    return _range_backward_on(call)(query, key, value, *visible, *seers, *rest)


range_attention.defvjp(_range_attention_fwd, _range_attention_bwd)

_RANGES = _ATTENTION | {"low": "b t", "high": "b t", "first": "b m", "last": "b m"}


@functools.cache
def _range_forward_on(call):
    def kernels(query, key, value, low, high, first, last):
        from fsa_jax.pallas.range_attention import hopper_groups
        from fsa_jax.pallas.range_attention import passes as ranges

        arrays = (query, key, value, (low, high), (first, last))
        if call.takes_hopper(query, key, value):
            return hopper_groups.attention(*arrays, scale=call.scale)
        return ranges.attention(call.range_plan(query, key, value), *arrays, **call.static)

    def portable(query, key, value, low, high, first, last):
        del first, last
        return xla.range_attention(query, key, value, (low, high), scale=call.scale)

    return partitioned(call.choose(kernels, portable), _RANGES, tuple(_RESULTS.values()))


@functools.cache
def _range_backward_on(call):
    def kernels(query, key, value, low, high, first, last, lse, delta, dout, dlse):
        from fsa_jax.pallas.range_attention import passes as ranges

        del dlse
        arrays = (query, key, value, (low, high), (first, last), lse, delta, dout)
        plan = call.range_plan(query, key, value)
        mosaic = call.takes_hopper(query, key, value)
        return ranges.gradients(plan, *arrays, mosaic=mosaic, **call.static)

    def portable(query, key, value, low, high, first, last, *rest):
        del first, last
        return xla.range_gradients(query, key, value, (low, high), *rest, scale=call.scale)

    return partitioned(
        call.choose(kernels, portable), _RANGES | COTANGENTS, tuple(_ATTENTION.values())
    )


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
    """See fsa_jax.select_blocks; `mode` as in `Call`. Not differentiable."""
    mode = "portable" if key.shape[1] == 0 else mode
    windows = segments.describe_windows(rows, config.kernel_size, config.kernel_stride)
    call = Call(mode, scale, config=config, packed=rows.packed)
    return choose_blocks(call, query, key, lse, rows, windows)


def choose_blocks(call: Call, query, key, lse, rows, windows):
    """`select_blocks` of queries whose own `rows` and `windows` are given."""
    documents = (rows.start, rows.end, rows.valid)
    lse = lse.astype(wide_dtype(query))
    return _select_on(call)(query, key, lse, *documents, windows.first, windows.visible)[0]


@functools.cache
def _select_on(call):
    config = call.config

    def described(start, end, valid, first, visible):
        # nobody reads where windows start
        return Rows(start, end, valid, packed=call.packed), Windows(first, first, visible)

    def kernels(query, key, lse, *documents):
        from fsa_jax.pallas.block_selection import passes as select
        from fsa_jax.pallas.block_selection.plan import make_plan as make_select_plan

        rows, windows = described(*documents)
        plan = make_select_plan(query, key, config, capability=call.capability, table=call.table)
        assert plan is not None
        return (
            select.select_blocks(
                query, key, lse, rows, windows, config=config, plan=plan, **call.static
            ),
        )

    def portable(query, key, lse, *documents):
        described_by = described(*documents)
        return (xla.select_blocks(query, key, lse, *described_by, config=config, scale=call.scale),)

    operands = {"query": "b t n d", "key": "b m k d", "lse": "b t n"} | _ROWS
    operands |= {"first": "b t", "visible": "b t"}
    return partitioned(call.choose(kernels, portable), operands, ("b t k s",))


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
    gated: bool = False,
):
    """See fsa_jax.selected_attention; `mode` and `gated` as in `Call`."""
    starts = segments.listed_block_starts(rows, block_indices, block_size)
    sizes = {"block_size": block_size, "packed": rows.packed, "tuning": tuning}
    call = Call(mode, scale, gated=gated, **sizes)
    documents = (rows.start, rows.end, rows.valid)
    offset = jnp.zeros_like(rows.start[:, :1])
    return block_attention(call, query, key, value, starts, documents, offset)


# `documents` are the arrays of a Rows: custom_vjp fills pytrees with objects that are no arrays
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def block_attention(call: Call, query, key, value, starts, documents, offset) -> Any:
    """Attention of each query to the blocks that start at the tokens `starts` [B, T, K, S].

    Query t is token offset[b, 0] + t of the row of keys, whose documents are given; all rows b
    have one offset.
    """
    return _block_forward(call, query, key, value, starts, documents, offset)[:2]


def _block_forward(call, query, key, value, starts, documents, offset):
    room = _lists_of(call, query, key, value, starts, documents, offset)
    run = _block_forward_on(call, room)
    out, lse, *lists = run(query, key, value, starts, *documents, offset)
    return *call.named(out, lse), lists


def _block_attention_fwd(call, *args):
    out, lse, lists = _block_forward(call, *args)
    return (out, lse), (*args, None if call.gated else out, lse, lists)


def _block_attention_bwd(call, residuals, cotangents):
    query, key, value, starts, documents, offset, out, lse, lists = residuals
    rest = (*call.cotangents(lse, out, *cotangents), *lists)
    run = _block_backward_on(call, _lists_of(call, query, key, value, starts, documents, offset))
    return *run(query, key, value, starts, *documents, offset, *rest), None, None, None


def block_gradients(call: Call, residuals, cotangents, sums):
    """(dq, dk, dv) of `block_attention`: residuals are its arguments and its results.

    `sums` of dk and dv, in float32 (or float64), are added to. The index is built again.
    """
    query, key, value, starts, documents, offset, out, lse = residuals
    rest = (*call.cotangents(lse, out, *cotangents), *sums)
    run = _block_backward_on(call, (), True)
    return run(query, key, value, starts, *documents, offset, *rest)


block_attention.defvjp(_block_attention_fwd, _block_attention_bwd)

_BLOCKS = _ATTENTION | {"starts": "b t k s"} | _KEY_ROWS | {"offset": "b one"}


def _plan_of(call, query, key, value, starts):
    sizes = (starts.shape[3], call.block_size, call.capability)
    tuning = call.tuning or SelectedTuning()
    plan = make_plan(tuning, query, key, value, *sizes)
    return tuned.fill(plan, tuning, call.table, query, key, value, call.block_size)


def _build_lists(call, query, key, value, starts, documents, offset):
    from fsa_jax.pallas.block_attention import passes as selected

    plan = _plan_of(call, query, key, value, starts)
    interpret = call.static["interpret"]
    rows = Rows(*documents, packed=call.packed)
    return selected.build_lists(
        plan, starts, offset[0], rows, block_size=call.block_size, interpret=interpret
    )


def _lists_of(call, query, key, value, starts, documents, offset):
    """Numbers that each array of the index takes for a row and a KV head, and its axes.

    Chunks are as large as a device's part allows, so the arrays of the index have other shapes on
    one device than on many. Between forward and backward they are stored by row and head, with
    room for the few more items that smaller chunks may have.
    """
    if call.mode == "portable":
        return ()
    build = functools.partial(_build_lists, call)
    lists = jax.tree.leaves(jax.eval_shape(build, query, key, value, starts, documents, offset))
    heads = key.shape[0] * key.shape[2]
    return tuple(-(-math.prod(x.shape) // heads) + x.shape[0] for x in lists)


def _pack(lists, room, key):
    batch, _, kv_heads, _ = key.shape

    def one(x, size):
        missing = batch * kv_heads * size - x.size
        return jnp.pad(x.reshape(-1), (0, missing)).reshape(batch, kv_heads, size)

    return tuple(map(one, jax.tree.leaves(lists), room))


def _unpack(call, packed, *arrays):
    template = jax.eval_shape(functools.partial(_build_lists, call), *arrays)
    leaves, tree = jax.tree.flatten(template)
    flat = (x.reshape(-1)[: t.size].reshape(t.shape) for x, t in zip(packed, leaves, strict=True))
    return jax.tree.unflatten(tree, flat)


@functools.cache
def _block_forward_on(call, room):
    def kernels(query, key, value, starts, start, end, valid, offset):
        from fsa_jax.pallas.block_attention import passes as selected

        documents = (start, end, valid)
        lists = _build_lists(call, query, key, value, starts, documents, offset)
        out, lse = selected.attention(
            _plan_of(call, query, key, value, starts),
            query, key, value, starts, lists, offset[0],
            block_size=call.block_size, **call.static,
        )  # fmt: skip
        return out, lse, *_pack(lists, room, key)

    def portable(query, key, value, starts, start, end, valid, offset):
        del start, end, valid
        out, lse = xla.block_attention(
            query, key, value, starts, offset[0], block_size=call.block_size, scale=call.scale
        )
        # the index of the kernels, which nobody reads
        batch, _, kv_heads, _ = key.shape
        return out, lse, *(jnp.zeros((batch, kv_heads, size), jnp.int32) for size in room)

    results = (*_RESULTS.values(), *_packed_axes(room).values())
    return partitioned(call.choose(kernels, portable), _BLOCKS, results)


def _packed_axes(room):
    return {f"lists[{i}]": f"b k x{i}" for i in range(len(room))}


@functools.cache
def _block_backward_on(call, room, summed=False):
    count = len(COTANGENTS)

    def kernels(
        query, key, value, starts, start, end, valid, offset, lse, delta, dout, dlse, *more
    ):
        from fsa_jax.pallas.block_attention import passes as selected

        del dlse
        packed, sums = ((), more) if summed else (more, None)
        documents = (start, end, valid)
        arrays = (query, key, value, starts, documents, offset)
        lists = _unpack(call, packed, *arrays) if room else _build_lists(call, *arrays)
        rows = Rows(*documents, packed=call.packed)
        return selected.gradients(
            _plan_of(call, query, key, value, starts),
            query, key, value, starts, lists, offset[0], rows, lse, delta, dout, sums,
            block_size=call.block_size, **call.static,
        )  # fmt: skip

    def portable(query, key, value, starts, start, end, valid, offset, *more):
        del start, end, valid
        rest, more = more[:count], more[count:]
        dquery, *dkeys = xla.block_gradients(
            query, key, value, starts, offset[0], *rest,
            block_size=call.block_size, scale=call.scale,
        )  # fmt: skip
        if summed:
            dkeys = [total + x.astype(total.dtype) for total, x in zip(more, dkeys, strict=True)]
        return dquery, *dkeys

    operands = _BLOCKS | COTANGENTS | _packed_axes(room)
    operands |= {"dkey": "b m k d", "dvalue": "b m k e"} if summed else {}
    return partitioned(call.choose(kernels, portable), operands, tuple(_ATTENTION.values()))
