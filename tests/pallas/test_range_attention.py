"""Compressed and window attention, and the whole operator, on kernels in interpret mode.

Interpret mode fills the output buffers of a kernel with NaN: an element that a kernel leaves
unwritten fails every comparison here.
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
    normal,
    segmentations,
    value_and_gradients,
    value_and_vjp,
)

import fsa_jax
from fsa_jax.pallas import support
from fsa_jax.pallas.range_attention import passes as ranges
from fsa_jax.pallas.support import supported

KERNELS = "triton_interpret"
TOLERANCE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}


def attend(branch, sizes, segment_ids=None, implementation: str | None = KERNELS, scale=None):
    """One of the two branches, with residuals, as a function of query, key and value."""
    function = {
        "compressed": fsa_jax.compressed_attention,
        "window": fsa_jax.sliding_window_attention,
    }[branch]
    return functools.partial(
        function,
        **sizes,
        scale=scale,
        segment_ids=segment_ids,
        implementation=implementation,
        return_residuals=True,
    )


def inputs(
    branch, sizes, length, group, kv_heads=1, widths=(32, 32), batch=1, dtype=jnp.float32, seed=0
):
    width, value_width = widths
    keys = length // sizes["kernel_stride"] if branch == "compressed" else length
    shapes = ((length, group * kv_heads, width), (keys, kv_heads, width))
    shapes += ((keys, kv_heads, value_width),)
    return tuple(normal(seed + i, batch, *shape, dtype=dtype) for i, shape in enumerate(shapes))


def documents(batch, length):
    """Segment ids of documents of many lengths, including one token, and padding."""
    rng = np.random.default_rng(0)
    rows = [
        np.repeat(rng.integers(0, 4, 999), rng.choice([1, 5, 30, 90], 999)) for _ in range(batch)
    ]
    return jnp.asarray(np.stack([row[:length] for row in rows]), jnp.int32)


def exact(branch, sizes, ids, args, seed=7):
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in args]
        reference = attend(branch, sizes, ids, "reference")
        return jax.tree.map(np.asarray, value_and_gradients(reference, seed, *wide))


WINDOWS = {"kernel_size": 8, "kernel_stride": 4}
CASES = {
    "g1": ("compressed", WINDOWS, {"group": 1, "kv_heads": 2, "batch": 2}, "float32"),
    "g2": ("window", {"window_size": 33}, {"group": 2, "kv_heads": 2, "batch": 2}, "float32"),
    "g3_wide": ("compressed", WINDOWS, {"group": 3, "widths": (192, 128)}, "bfloat16"),
    "g4": ("window", {"window_size": 100}, {"group": 4, "widths": (128, 128)}, "bfloat16"),
    "g4_disjoint": (
        "compressed",
        {"kernel_size": 3, "kernel_stride": 3},
        {"group": 4, "widths": (80, 96)},
        "float32",
    ),
    "g5": ("window", {"window_size": 1}, {"group": 5, "widths": (96, 80)}, "float16"),
    "g6": ("compressed", WINDOWS, {"group": 6, "widths": (64, 192)}, "float16"),
    "g7": ("window", {"window_size": 2**31 - 1}, {"group": 7, "widths": (5, 7)}, "float32"),
    "g8": (
        "compressed",
        {"kernel_size": 32, "kernel_stride": 2},
        {"group": 8, "widths": (256, 256)},
        "bfloat16",
    ),
    "g12": ("window", {"window_size": 17}, {"group": 12}, "float32"),
    "g16": ("compressed", WINDOWS, {"group": 16, "kv_heads": 2}, "float32"),
    "g32": ("window", {"window_size": 40}, {"group": 32, "widths": (128, 64)}, "float16"),
    "short": ("compressed", WINDOWS, {"group": 2, "length": 9}, "float32"),
    "no_window": ("compressed", WINDOWS, {"group": 2, "length": 6}, "float32"),
    "no_slot": ("compressed", WINDOWS, {"group": 2, "length": 3}, "float32"),
    "one_token": ("window", {"window_size": 4}, {"group": 2, "length": 1}, "float32"),
}


@pytest.mark.fast_cases("g2-True", "g16-True", "short-False", "no_slot-False", "one_token-True")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_reference(case, packed):
    branch, sizes, shape, dtype = CASES[case]
    args = inputs(branch, sizes, **{"length": 230} | shape, dtype=jnp.dtype(dtype))
    ids = documents(*args[0].shape[:2]) if packed else None
    got = value_and_gradients(attend(branch, sizes, ids), 7, *args)
    assert_close(got, exact(branch, sizes, ids, args), TOLERANCE[dtype])


@functools.cache
def compiled(branch, implementation):
    sizes = {"compressed": WINDOWS, "window": {"window_size": 11}}[branch]

    def run(segment_ids, *args):
        return value_and_gradients(attend(branch, sizes, segment_ids, implementation), 3, *args)

    return jax.jit(run), sizes


@pytest.mark.fast_cases("compressed")
@pytest.mark.parametrize("branch", ["compressed", "window"])
@settings(deadline=None, max_examples=25)
@given(segmentations(2, 150), st.integers(0, 2**31))
def test_any_segmentation(branch, segment_ids, seed):
    (ours, sizes), (reference, _) = compiled(branch, KERNELS), compiled(branch, "reference")
    args = inputs(branch, sizes, 150, 3, batch=2, seed=seed)
    assert_close(ours(segment_ids, *args), reference(segment_ids, *args), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("branch", ["compressed", "window"])
def test_splits_change_no_result(branch, splits, monkeypatch):
    make_plan = ranges.make_plan

    def split(*args, **options):
        plan = supported(make_plan(*args, **options))
        return dataclasses.replace(plan, splits=splits)

    monkeypatch.setattr(ranges, "make_plan", split)
    jax.clear_caches()
    sizes = {"compressed": WINDOWS, "window": {"window_size": 70}}[branch]
    args = inputs(branch, sizes, 400, 2)
    for ids in (None, documents(1, 400)):
        got = value_and_gradients(attend(branch, sizes, ids), 7, *args)
        assert_close(got, exact(branch, sizes, ids, args), TOLERANCE["float32"])


def test_many_rows_of_few_keys_are_split():
    shapes = [
        jax.ShapeDtypeStruct((1, n, h, 128), jnp.bfloat16) for n, h in ((65536, 16), (4096, 4))
    ]
    query, key = shapes
    few = supported(ranges.make_plan(query, key, key, 90))
    assert few.splits > 1
    key = jax.ShapeDtypeStruct((1, 65536, 32, 128), jnp.bfloat16)
    many = supported(ranges.make_plan(key, key, key, 90))
    assert many.splits == 1


@pytest.mark.parametrize("branch", ["compressed", "window"])
def test_poison_that_nobody_sees_changes_no_bit(branch):
    """NaN and infinity are in padding, in slots without a window, and in cotangents of padding."""
    sizes = {"compressed": WINDOWS, "window": {"window_size": 20}}[branch]
    ids = np.asarray([[1] * 50 + [0] * 9 + [2] * 61 + [3] * 3 + [0] * 13], np.int32)
    args = inputs(branch, sizes, ids.size, 2)
    cotangent = normal(9, *args[0].shape)
    function = attend(branch, sizes, jnp.asarray(ids))

    @jax.jit
    def run(cotangent, *args):
        (out, lse), pullback = jax.vjp(function, *args)
        return out, lse, pullback((cotangent, cotangent[..., 0]))

    wanted = run(cotangent, *args)
    padding = ids[0] == 0
    unseen = padding
    if branch == "compressed":
        windows = sum(max(0, (n - 8) // 4 + 1) for n in (50, 61, 3))
        unseen = np.arange(ids.size // 4) >= windows
    for poison in (np.nan, np.inf, -np.inf):
        dirty = [
            jnp.where(jnp.asarray(mask)[None, :, None, None], poison, x)
            for mask, x in zip((padding, padding, unseen, unseen), (cotangent, *args), strict=True)
        ]
        assert_same_bits(run(*dirty), wanted)
    assert all(np.isfinite(x).all() and np.any(x) for x in wanted[2])


@pytest.mark.parametrize("branch", ["compressed", "window"])
def test_logits_of_ten_thousand(branch):
    sizes = {"compressed": WINDOWS, "window": {"window_size": 50}}[branch]
    query, key, value = inputs(branch, sizes, 200, 2, widths=(4, 4), dtype=jnp.bfloat16)
    sign = jnp.where(jnp.arange(200) % 2 == 0, 1e4, -1e4)[None, :, None, None]
    query, key = jnp.broadcast_to(sign, query.shape).astype(query.dtype), jnp.ones_like(key)
    ours, wanted = (
        value_and_gradients(attend(branch, sizes, None, name, scale=0.25), 3, *args)
        for name, args in (
            (KERNELS, (query, key, value)),
            ("reference", tuple(x.astype(jnp.float32) for x in (query, key, value))),
        )
    )
    assert_close(ours[0], wanted[0], 2e-2)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in ours[1])


@pytest.mark.parametrize("branch", ["compressed", "window"])
def test_bitwise_the_same_on_every_rerun(branch):
    sizes = {"compressed": WINDOWS, "window": {"window_size": 50}}[branch]
    args = inputs(branch, sizes, 300, 2)
    run = value_and_vjp(attend(branch, sizes, documents(1, 300)), 5)
    first = run(*args)
    for _ in range(3):
        assert_same_bits(run(*args), first)


CONFIG = fsa_jax.NSAConfig(
    kernel_size=8, kernel_stride=4, block_size=16, topk=4, init_blocks=1, local_blocks=2,
    window_size=20,
)  # fmt: skip


def operator(implementation, segment_ids, query, key, value, gates):
    windows = {"kernel_size": 8, "kernel_stride": 4, "segment_ids": segment_ids}
    ck, cv = (fsa_jax.compress(x, **windows, method="mean") for x in (key, value))
    return fsa_jax.native_sparse_attention(
        query, key, value, ck, cv, gates,
        config=CONFIG, segment_ids=segment_ids, implementation=implementation,
    )  # fmt: skip


def test_values_of_the_operator():
    """Tests the forward pass only, which compiles fast: branches, selection, gates on kernels."""
    args = [normal(i, 1, 90, *x) for i, x in enumerate(((4, 16), (2, 16), (2, 16), (4, 3)))]
    got, wanted = (
        jax.jit(functools.partial(operator, name, documents(1, 90)))(*args)
        for name in (KERNELS, "reference")
    )
    assert_close(got, wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("gate_heads", "packed"), [(1, True), (6, False)])
def test_the_operator_and_its_gradients(gate_heads, packed):
    """Gradients flow through gates, compression, selection and all three branches."""
    shapes = ((6, 32), (2, 32), (2, 48), (gate_heads, 3))
    args = [normal(i, 2, 210, *shape) for i, shape in enumerate(shapes)]
    ids = documents(2, 210) if packed else None
    run = value_and_vjp(functools.partial(operator, KERNELS, ids), 5)
    got = run(*args)
    if ids is not None:  # inputs at padding may hold any value
        padding = (ids == 0)[:, :, None, None]
        assert_same_bits(run(*(jnp.where(padding, jnp.nan, x) for x in args)), got)
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in args]
        reference = functools.partial(operator, "reference", ids)
        wanted = jax.tree.map(np.asarray, value_and_gradients(reference, 5, *wide))
    assert_close(got, wanted, 1e-5)


@pytest.mark.slow
def test_vmap_of_the_operator_under_checkpoint():
    args = [normal(i, 3, 90, *shape) for i, shape in enumerate(((2, 16), (1, 16), (1, 16), (2, 3)))]
    policy = jax.checkpoint_policies.save_only_these_names(*fsa_jax.CHECKPOINT_NAMES)

    def loss(*args):
        run = jax.checkpoint(functools.partial(operator, KERNELS, None), policy=policy)
        return jnp.sum(run(*args) ** 2)

    def mapped(*args):
        return jnp.sum(jax.vmap(loss)(*args))

    together, alone = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3))) for f in (mapped, loss))
    values, gradients = zip(*(alone(*(x[i] for x in args)) for i in range(3)), strict=True)
    wanted = (sum(values), jax.tree.map(lambda *x: jnp.stack(x), *gradients))
    assert_close(together(*args), wanted, 1e-6)


@pytest.mark.slow
def test_on_a_cpu_the_choice_for_either_device_is_the_portable_implementation(monkeypatch):
    """Lowers implementation None for a CPU in a process with a GPU: values and gradients."""
    args = [normal(i, 1, 90, *shape) for i, shape in enumerate(((4, 8), (2, 8), (2, 8), (4, 3)))]
    ids = documents(1, 90)
    wanted = value_and_gradients(functools.partial(operator, "xla", ids), 3, *args)
    monkeypatch.setattr(support, "capability", lambda: 90)
    got = value_and_gradients(functools.partial(operator, None, ids), 3, *args)
    assert_close(got, wanted, 1e-6)
