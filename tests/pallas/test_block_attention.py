"""The Pallas-Triton kernels in interpret mode, against the dense reference in float64.

Interpret mode fills the output buffers of a kernel with NaN, and `unwritten_is_nan` does so for the
buffers of `jax.lax.empty`: an element that no kernel writes fails every comparison here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from util import (
    assert_close,
    assert_same_bits,
    attention_inputs,
    lists,
    segmentations,
    selected,
    value_and_gradients,
    value_and_vjp,
)

import fsa_jax
from fsa_jax.bench.shapes import Shape
from fsa_jax.ops import block_attention
from fsa_jax.ops.block_attention import BlockSpec
from fsa_jax.pallas import SelectedTuning, Tile, support
from fsa_jax.pallas.block_attention import query_tile
from fsa_jax.pallas.block_attention.passes import (
    KV_OUTER_DQ_ROWS,
    KV_OUTER_ROWS,
    QUERY_OUTER_DQ_PAIRS,
    QUERY_OUTER_PAIRS,
)
from fsa_jax.pallas.block_attention.plan import METHODS, make_plan
from fsa_jax.pallas.block_attention.query_index import build_index, num_splits, search
from fsa_jax.pallas.support import supported
from fsa_jax.semantics.segments import describe_segments

kernel_attention = functools.partial(selected, implementation="triton_interpret")


@pytest.fixture(autouse=True, scope="module")
def unwritten_is_nan():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
        jax.clear_caches()  # no trace made without the patch may be reused
        yield
    jax.clear_caches()


def packed_ids(shape, seed=0):
    """Segment ids of documents of 1 to 60 tokens, and padding."""
    rng = np.random.default_rng(seed)
    ids = [np.repeat(rng.integers(0, 4, 99), rng.integers(1, 60, 99)) for _ in range(shape.batch)]
    return jnp.asarray(np.stack([row[: shape.length] for row in ids]), jnp.int32)


def exact(make, cotangent_seed, *args):
    """Results of the dense reference in float64 on the same inputs."""
    with jax.enable_x64(True):
        wide = (x.astype(jnp.float64) for x in args)
        reference = make(implementation="reference")
        return jax.tree.map(np.asarray, value_and_gradients(reference, cotangent_seed, *wide))


def group(heads, *, kv_heads=1, length=70, **sizes):
    return Shape(length=length, heads=heads * kv_heads, kv_heads=kv_heads, **sizes)


# Together these cover every group, width, block size and number of slots that kernels support.
CASES = {
    "g1": (group(1, kv_heads=2, batch=2, width=32, value_width=32, block_size=16), "float32"),
    "g2": (group(2, kv_heads=2, width=64, value_width=32, block_size=32), "bfloat16"),
    "g3": (group(3, kv_heads=2, width=32, value_width=80, block_size=16, slots=1), "float16"),
    "g4": (group(4, width=80, value_width=96, block_size=64, length=150), "float32"),
    "g5": (group(5, width=96, value_width=64, block_size=16, slots=7), "bfloat16"),
    "g6": (group(6, width=128, value_width=128, block_size=64, slots=2), "bfloat16"),
    "g7": (group(7, width=64, value_width=192, block_size=32, slots=3), "float32"),
    "g8": (group(8, width=192, value_width=128, block_size=128, length=200), "float16"),
    "g12": (group(12, width=32, value_width=32, block_size=16, slots=5), "float32"),
    "g16": (group(16, width=64, value_width=64, block_size=16), "bfloat16"),
    "g32": (group(32, width=32, value_width=256, block_size=32, length=40), "float16"),
    "wide": (group(2, width=256, value_width=256, block_size=128, length=140), "float32"),
    "narrow": (group(2, width=5, value_width=7, block_size=48, length=100), "float32"),
    "one_token": (group(2, length=1, width=32, value_width=32), "float32"),
    "many_slots": (group(2, length=300, width=32, value_width=32, slots=64), "float32"),
}
TOLERANCE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}


@pytest.mark.fast_cases("g16", "one_token")
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_reference(case):
    shape, dtype = CASES[case]
    args = attention_inputs(shape, jnp.dtype(dtype))
    segment_ids = packed_ids(shape) if list(CASES).index(case) % 2 else None
    indices = lists(1, *shape.indices, shape.blocks)
    make = functools.partial(selected, indices, shape.block_size, segment_ids)
    got = value_and_gradients(make(implementation="triton_interpret"), 7, *args)
    assert_close(got, exact(make, 7, *args), TOLERANCE[dtype])


SMALL = Shape(batch=2, length=90, heads=6, kv_heads=2, width=32, value_width=16, slots=5)


@functools.cache
def compiled(implementation, tuning=None, block_size=16):
    """Values and gradients as a function of lists, segment ids and arrays, compiled only once."""

    def run(indices, segment_ids, *args):
        attend = selected(indices, block_size, segment_ids, implementation, tuning=tuning)
        return value_and_gradients(attend, 3, *args)

    return jax.jit(run)


def exact_small(indices, segment_ids, *args, block_size=16):
    """Results of the dense reference in float64, for comparison with `compiled`."""
    with jax.enable_x64(True):
        wide = (x.astype(jnp.float64) for x in args)
        run = compiled("reference", block_size=block_size)
        return jax.tree.map(np.asarray, run(indices, segment_ids, *wide))


TUNINGS = {
    "query_outer": SelectedTuning(method="query_outer"),
    "query_tile": SelectedTuning(method="query_tile"),
    "kv_outer": SelectedTuning(method="kv_outer"),
    "split_blocks": SelectedTuning(block_k=16),
    "small_items": SelectedTuning(pairs=3),
    "small_tiles": SelectedTuning(forward=Tile(rows=16), backward=Tile(rows=32)),
    "float32_partials": SelectedTuning(partial_dtype="float32"),
}


@pytest.mark.fast_cases("query_tile", "kv_outer")
@pytest.mark.parametrize("name", TUNINGS)
def test_tuning_changes_no_result(name):
    shape = dataclasses.replace(SMALL, block_size=32)
    args = attention_inputs(shape, jnp.bfloat16)
    ids, indices = packed_ids(shape), lists(2, *shape.indices, shape.blocks)
    make = functools.partial(selected, indices, 32, ids)
    got = value_and_gradients(make("triton_interpret", tuning=TUNINGS[name]), 3, *args)
    assert_close(got, exact_small(indices, ids, *args, block_size=32), TOLERANCE["bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("group", [4, 8, 16])
def test_the_lists_decide_which_kernels_run(group, alike):
    """Query-tile, or else KV-outer (forward from group 3, backward from 8) or query-outer."""
    shape = Shape(length=480, heads=2 * group, kv_heads=2, width=32, value_width=32, slots=1)
    args = attention_inputs(shape, jnp.bfloat16)
    token = jnp.arange(shape.length, dtype=jnp.int32)
    chosen = token * (0 if alike else 1) % (token // shape.block_size + 1)
    indices = jnp.broadcast_to(chosen[None, :, None, None], shape.indices)
    starts = indices * shape.block_size
    costs = {
        4: (KV_OUTER_ROWS / 4,),
        8: (KV_OUTER_ROWS / 8, KV_OUTER_DQ_ROWS / 8),
        16: (QUERY_OUTER_PAIRS, QUERY_OUTER_DQ_PAIRS),
    }
    for pairs in costs[group]:
        profitable = query_tile.is_profitable(starts, shape.length, pairs, Tile(), group)
        assert bool(profitable[0]) == alike
    make = functools.partial(selected, indices, shape.block_size, None)
    got = value_and_gradients(make("triton_interpret"), 7, *args)
    assert_close(got, exact(make, 7, *args), TOLERANCE["bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "tokens", "sort_pairs", "packed"),
    [(2, 90, 2**20, True), (2, 34, 2**20, False), (1, 34, 1, True), (4, 7, 1, False)],
)
def test_chunks_change_no_result(heads, tokens, sort_pairs, packed, monkeypatch):
    """With few pairs per item, blocks have several items in each chunk, also at the causal edge."""

    def chunked(*args, **sizes):
        plan = supported(make_plan(*args, **sizes))
        return dataclasses.replace(plan, heads=heads, tokens=tokens, sort_pairs=sort_pairs)

    monkeypatch.setattr(block_attention, "make_plan", chunked)
    jax.clear_caches()
    ids, indices = packed_ids(SMALL) if packed else None, lists(3, *SMALL.indices, SMALL.blocks)
    make = functools.partial(selected, indices, SMALL.block_size, ids)
    args = attention_inputs(SMALL)
    got = value_and_gradients(make("triton_interpret", tuning=SelectedTuning(pairs=5)), 3, *args)
    assert_close(got, exact_small(indices, ids, *args), TOLERANCE["float32"])


@pytest.mark.fast_cases("query_tile")
@pytest.mark.parametrize("method", [None, "kv_outer", "query_tile"])
def test_many_short_documents(method):
    """There are more blocks than programs, so each program has several work items."""
    tuning = SelectedTuning(method=method)
    rng = np.random.default_rng(4)
    ids = np.arange(2 * SMALL.length).reshape(2, -1) + 1  # each token is a document
    ids[1] = np.repeat(np.arange(1, 41), rng.integers(1, 5, 40))[: SMALL.length]
    ids, args = jnp.asarray(ids, jnp.int32), attention_inputs(SMALL)
    indices = jnp.asarray(rng.integers(-1, 2, SMALL.indices), jnp.int32)
    make = functools.partial(selected, indices, SMALL.block_size, ids)
    got = value_and_gradients(make("triton_interpret", tuning=tuning), 3, *args)
    assert_close(got, exact_small(indices, ids, *args), TOLERANCE["float32"])


def test_rows_of_a_chunk_have_numbers_of_32_bits():
    shape = Shape(length=2**22, heads=64, kv_heads=4, slots=16)
    query, key, value = (
        jax.ShapeDtypeStruct(x, "bfloat16") for x in (shape.query, shape.key, shape.value)
    )
    tuning = SelectedTuning(method="kv_outer", scratch_bytes=2**40)
    plan = supported(make_plan(tuning, query, key, value, shape.slots, 64, 90))
    assert plan.heads * plan.tokens * shape.slots * 16 <= 2**31
    assert plan.tokens == shape.length  # chunks are no smaller than needed


@pytest.mark.parametrize("scratch_mib", [1, 7, 64, 1024])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_chunk_fits_the_scratch_budget(scratch_mib, dtype):
    budget = scratch_mib * 2**20
    for length, heads, kv_heads, slots in ((2**20, 16, 4, 16), (4096, 8, 8, 64), (1, 4, 2, 1)):
        shape = Shape(
            length=length, heads=heads, kv_heads=kv_heads, width=128, value_width=128, slots=slots
        )
        query, key, value = (
            jax.ShapeDtypeStruct(x, dtype) for x in (shape.query, shape.key, shape.value)
        )
        tuning = SelectedTuning(scratch_bytes=budget)
        plan = supported(make_plan(tuning, query, key, value, slots, 64, 90))
        pairs = plan.heads * plan.tokens * slots
        width = 128 * jnp.dtype(dtype).itemsize
        partial = pairs * (heads // kv_heads) * (width + 4)
        splits = num_splits(pairs, plan.pairs) * plan.block * 256 * 4
        assert partial + splits + 16 * pairs <= budget
        # no more chunks than needed: a larger chunk would not fit, or this one is everything
        whole = plan.heads == kv_heads and plan.tokens == length
        assert whole or 2.1 * (partial + splits + 16 * pairs) >= budget


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=25)
@given(segmentations(SMALL.batch, SMALL.length), st.integers(0, 2**31))
def test_any_segmentation_and_any_lists(method, segment_ids, seed):
    args = (
        lists(seed, *SMALL.indices, SMALL.blocks),
        segment_ids,
        *attention_inputs(SMALL, seed=seed),
    )
    ours = compiled("triton_interpret", SelectedTuning(method=method, pairs=8))
    assert_close(ours(*args), compiled("reference")(*args), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hot", "own", "none"])
def test_skewed_lists(name):
    """All queries select one block, each query selects its own block, or no query selects any."""
    own = jnp.arange(SMALL.length, dtype=jnp.int32)[None, :, None, None] // 16
    block = {"hot": jnp.zeros_like(own), "own": own, "none": jnp.full_like(own, -1)}[name]
    args = (jnp.broadcast_to(block, SMALL.indices), None, *attention_inputs(SMALL))
    for tuning in (None, SelectedTuning(pairs=7)):
        got = compiled("triton_interpret", tuning)(*args)
        assert_close(got, exact_small(*args), TOLERANCE["float32"])


def test_bitwise_the_same_on_every_rerun():
    attend = kernel_attention(lists(0, *SMALL.indices, SMALL.blocks), 16, packed_ids(SMALL))
    run = value_and_vjp(attend, 5)
    first = run(*attention_inputs(SMALL))
    for _ in range(3):
        assert_same_bits(run(*attention_inputs(SMALL)), first)


@pytest.mark.slow
def test_vmap_and_checkpoint():
    indices = jnp.stack([lists(i, *SMALL.indices, SMALL.blocks) for i in range(3)])
    args = [
        jnp.stack(x)
        for x in zip(*(attention_inputs(SMALL, seed=9 * i) for i in range(3)), strict=True)
    ]

    def loss(indices, *args, remat=False):
        attend = kernel_attention(indices, 16)
        if remat:
            policy = jax.checkpoint_policies.save_only_these_names(*fsa_jax.CHECKPOINT_NAMES)
            attend = jax.checkpoint(attend, policy=policy)
        out, lse = attend(*args)
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0))

    def mapped(indices, *args):
        return jnp.sum(jax.vmap(functools.partial(loss, remat=True))(indices, *args))

    together, alone = (jax.jit(jax.value_and_grad(f, argnums=(1, 2, 3))) for f in (mapped, loss))
    values, gradients = zip(
        *(alone(*(x[i] for x in (indices, *args))) for i in range(3)), strict=True
    )
    wanted = (sum(values), jax.tree.map(lambda *x: jnp.stack(x), *gradients))
    assert_close(together(indices, *args), wanted, 1e-6)


@functools.cache
def compiled_index(spacing, pairs):
    static = {"kv_heads": 1, "spacing": spacing, "block": 8, "pairs": pairs, "interpret": True}
    return jax.jit(functools.partial(build_index, **static))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.booleans())
def test_index(seed, packed):
    """Every valid pair is in exactly one work item of its block, in order."""
    rng = np.random.default_rng(seed)
    chunks, heads, tokens, slots, length, pairs = 2, 2, 12, 3, 40, 4
    spacing = 1 if packed else 8
    starts = rng.choice(np.arange(0, length, spacing), (chunks, heads, tokens, slots))
    starts[rng.random(starts.shape) < 0.4] = rng.choice(starts.ravel())  # a hot block
    starts[rng.random(starts.shape) < 0.2] = length
    where = np.asarray([[0, 0], [2, 12]])
    segments = describe_segments(None, 4, length)
    arrays = (jnp.asarray(x, jnp.int32) for x in (where, starts))
    index = compiled_index(spacing, pairs)(*arrays, segments)
    got = jax.tree.map(np.asarray, dataclasses.asdict(index))
    blocks = -(-length // spacing)
    for chunk in range(chunks):
        splits = 0
        wanted = []
        for head in range(heads):
            for start in range(0, length, spacing):
                flat = starts[chunk, head].ravel()
                members = where[chunk, 1] * slots + np.flatnonzero(flat == start)
                count, block = -(-len(members) // pairs), head * blocks + start // spacing
                assert got["block_items"][chunk, block] == count
                if count > 1:
                    assert got["block_split"][chunk, block] == splits
                for at in range(0, len(members), pairs):
                    split = splits if count > 1 else -1
                    splits += count > 1
                    wanted.append((head, start, at == 0, split, list(members[at : at + pairs])))
        items = []
        for i, count in enumerate(got["count"][chunk]):
            if count:
                first = got["first"][chunk, i]
                order = list(got["order"][chunk, first : first + count])
                fields = ("head", "start", "begins", "split")
                items.append((*(got[n][chunk, i] for n in fields), order))
                assert got["stop"][chunk, i] == length
        assert items == wanted
        assert got["items"][chunk] == len(wanted)
        assert all(got["count"][chunk, : len(wanted)])  # unused items come last
        assert splits <= num_splits(heads * tokens * slots, pairs)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=70), st.lists(st.integers(-1, 52)))
def test_search(numbers, wanted):
    wanted = [0, *wanted]
    ascending = jnp.asarray(sorted(numbers), jnp.int32)
    got = search(ascending, jnp.asarray(wanted, jnp.int32), interpret=True)
    np.testing.assert_array_equal(got, np.searchsorted(sorted(numbers), wanted))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", "fsa", "method must be one of .*, got 'fsa'"),
        ("forward", 64, "forward must be None or a Tile, got 64"),
        ("block_k", 48, "block_k must be a power of two, got 48"),
        ("block_k", 256, "block_k must be an integer from 16 to 128, got 256"),
        ("pairs", 0, "pairs must be an integer from 1 to"),
        ("pairs", 2.0, "pairs must be an integer from 1 to .*, got 2.0"),
        ("merge_elements", 1, "merge_elements must be an integer from"),
        ("partial_dtype", "int8", "partial_dtype must be one of .*, got 'int8'"),
        ("scratch_bytes", 1000, "scratch_bytes must be an integer from"),
    ],
)
def test_bad_tuning_is_named_with_its_value_and_the_rule(field, value, message):
    with pytest.raises(ValueError, match=message):
        SelectedTuning(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("rows", 48), ("rows", 8), ("num_warps", 3), ("num_stages", 0)]
)
def test_bad_tile_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .* got {value}"):
        Tile(**{field: value})


UNSUPPORTED = {
    "dtype": (dataclasses.replace(SMALL), jnp.float64, 16, None, "float16, bfloat16 or float32"),
    "width": (dataclasses.replace(SMALL, width=257), jnp.float32, 16, None, "at most 256, got 257"),
    "block": (SMALL, jnp.float32, 24, None, "block_size must be a multiple of 16, got 24"),
    "group": (group(130), jnp.float32, 16, None, "at most 128 query heads"),
    "shared": (group(128, width=256, value_width=256), jnp.float32, 16, None, "shared memory of"),
    "split": (SMALL, jnp.float32, 16, SelectedTuning(block_k=32), "block_k=32 must divide"),
    "rows": (group(20), jnp.float32, 16, SelectedTuning(backward=Tile(rows=16)), "rows=16 must"),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_call_that_the_kernels_cannot_serve(name, monkeypatch, caplog):
    """A named implementation raises with the reason; None takes another one and logs the reason."""
    shape, dtype, block_size, tuning, reason = UNSUPPORTED[name]
    indices = jnp.zeros(shape.indices, jnp.int32)
    call = functools.partial(
        fsa_jax.selected_attention,
        *attention_inputs(shape, dtype),
        indices,
        block_size=block_size,
        tuning=tuning,
    )
    with pytest.raises(NotImplementedError, match=reason):
        call(implementation="triton_interpret")
    monkeypatch.setattr(support, "capability", lambda: 90)
    with pytest.raises(NotImplementedError, match=reason):
        call(implementation="triton")
    with caplog.at_level("INFO", logger="fsa_jax"):
        assert np.isfinite(call()).all()
        call()
    assert len(caplog.records) == 1
    assert reason in caplog.text


def test_an_old_gpu_or_none_is_refused(monkeypatch):
    call = functools.partial(
        fsa_jax.selected_attention,
        *attention_inputs(SMALL),
        jnp.zeros(SMALL.indices, jnp.int32),
        block_size=16,
        implementation="triton",
    )
    with pytest.raises(NotImplementedError, match="need an NVIDIA GPU"):
        call()
    monkeypatch.setattr(support, "capability", lambda: 75)
    with pytest.raises(NotImplementedError, match=r"capability 8\.0, the GPU has 7\.5"):
        call()


def test_on_a_cpu_the_choice_for_either_device_is_the_portable_implementation():
    """Lowers implementation None for a CPU in a process with a GPU: values and gradients."""
    indices = lists(0, *SMALL.indices, SMALL.blocks)
    segments = describe_segments(packed_ids(SMALL), SMALL.batch, SMALL.length)
    spec = BlockSpec(scale=0.3, block_size=16, packed=True)
    either = functools.partial(
        block_attention.selected_attention, spec, block_indices=indices, segment_info=segments
    )
    portable = selected(indices, 16, packed_ids(SMALL), "xla", scale=0.3)
    args = attention_inputs(SMALL)
    got, wanted = (value_and_gradients(f, 3, *args) for f in (either, portable))
    assert_close(got, wanted, 1e-6)
