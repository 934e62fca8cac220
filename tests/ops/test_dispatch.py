"""The choice of a backend, made once for each call before anything is computed."""

import functools
import logging

import jax
import jax.numpy as jnp
import pytest

import fsa_jax
from fsa_jax import NSAConfig
from fsa_jax.ops import block_attention, dispatch, nsa
from fsa_jax.ops.block_attention import BlockSpec, Lists
from fsa_jax.ops.call import Backend
from fsa_jax.ops.dispatch import Choice, Request, resolve
from fsa_jax.ops.nsa import NSASpec
from fsa_jax.ops.range_attention import RangeSpec
from fsa_jax.pallas import SelectedTuning, support
from fsa_jax.pallas.block_attention import passes as selected
from fsa_jax.pallas.support import Unsupported, supported
from fsa_jax.semantics.segments import describe_segments

CONFIG = NSAConfig(kernel_size=8, kernel_stride=4, block_size=16, topk=4, window_size=20)


def shapes(length=64, heads=4, kv_heads=2, width=16, dtype=jnp.bfloat16):
    """Returns shapes of a query, compressed keys and values, and uncompressed keys and values."""
    sizes = ((length, heads), *((length // 4, kv_heads),) * 2, *((length, kv_heads),) * 2)
    query, *keys = (jax.ShapeDtypeStruct((1, *size, width), dtype) for size in sizes)
    return query, tuple(keys[:2]), (tuple(keys[2:]),)


def spec_of(config=CONFIG):
    return NSASpec.of(config, 0.25, packed=False)


def backends(spec):
    return [x.backend for x in (spec.compressed, spec.selection, spec.selected, spec.window)]


def test_a_named_backend_is_asked_for_the_plans_of_all_requests():
    asked = []

    class Asked(RangeSpec):
        def plan(self, *arrays):
            asked.append((self.backend, *arrays))
            return super().plan(*arrays)

    query, keys, _ = shapes()
    requests = [Request(Asked(scale=1.0, branch="window"), (query, *keys)) for _ in range(2)]
    choice = resolve("native_sparse_attention", "triton_interpret", *requests)
    assert choice == Choice(Backend.TRITON_INTERPRET, "named by the caller")
    assert asked == [(Backend.TRITON_INTERPRET, query, *keys)] * 2


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_backends_without_kernels_are_asked_for_no_plan(implementation):
    class Never(RangeSpec):
        def plan(self, *arrays):
            raise AssertionError(arrays)

    request = Request(Never(scale=1.0, branch="window"), (1, 2, 3))
    choice = resolve("sliding_window_attention", implementation, request)
    assert choice.backend.value == choice.implementation == implementation
    # kernels are not planned either when no GPU could run them
    assert resolve("sliding_window_attention", None, request).backend is Backend.XLA


def test_by_default_each_operation_has_the_best_backend_for_itself(monkeypatch, caplog):
    monkeypatch.setattr(support, "capability", lambda: 90)
    assert backends(spec_of().resolved(None, *shapes())) == [Backend.BY_PLATFORM] * 4
    odd = NSAConfig(kernel_size=8, kernel_stride=4, block_size=20, topk=4, window_size=20)
    with caplog.at_level(logging.INFO, logger="fsa_jax"):
        found = backends(spec_of(odd).resolved(None, *shapes()))
    assert found == [Backend.BY_PLATFORM, Backend.BY_PLATFORM, Backend.XLA, Backend.BY_PLATFORM]
    assert "selected_attention uses implementation 'xla': block_size must be a mul" in caplog.text


def test_a_named_backend_serves_all_operations_or_none(monkeypatch):
    odd = NSAConfig(kernel_size=8, kernel_stride=4, block_size=20, topk=4, window_size=20)
    with pytest.raises(NotImplementedError, match=r"native_sparse_attention: block_size must be"):
        spec_of(odd).resolved("triton_interpret", *shapes())
    monkeypatch.setattr(support, "capability", lambda: 90)
    with pytest.raises(NotImplementedError, match=r"native_sparse.*head widths must be 128, got"):
        spec_of().resolved("mosaic_gpu", *shapes())
    found = backends(spec_of().resolved("mosaic_gpu", *shapes(width=128)))
    assert found == [Backend.MOSAIC_GPU] * 4


def test_kernels_for_hopper_take_large_calls_by_default_and_named_ones_always():
    def mosaic(backend, length, capability=90):
        spec = RangeSpec(backend=backend, scale=1.0, branch="compressed", capability=capability)
        query, keys, _ = shapes(length, width=128)
        return supported(spec.plan(query, *keys)).mosaic

    assert mosaic(Backend.MOSAIC_GPU, 64)
    assert not mosaic(Backend.TRITON, 2**16)
    assert mosaic(Backend.BY_PLATFORM, 2**16)
    assert not mosaic(Backend.BY_PLATFORM, 64)
    assert not mosaic(Backend.BY_PLATFORM, 2**16, capability=80)


def test_the_operator_refuses_before_it_computes_anything(monkeypatch):
    query, (compressed, _), ((key, _),) = (
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), x) for x in shapes(width=257)
    )
    gates = jnp.zeros((1, 64, 4, 3), jnp.bfloat16)
    monkeypatch.setattr(nsa, "attention", None)  # must not be called
    with pytest.raises(NotImplementedError, match="native_sparse_attention: the head width of key"):
        fsa_jax.native_sparse_attention(
            query, key, key, compressed, compressed, gates,
            config=CONFIG, implementation="triton_interpret",
        )  # fmt: skip


def test_a_plan_that_cannot_be_made_raises_its_reason():
    with pytest.raises(NotImplementedError, match="too wide"):
        supported(Unsupported("too wide"))
    assert supported(3) == 3


@pytest.mark.parametrize("capability", [80, 90])
def test_only_functions_with_kernels_in_mosaic_gpu_mention_them(monkeypatch, capability):
    monkeypatch.setattr(support, "capability", lambda: capability)
    found = {
        name: reason for name, (chosen, reason) in dispatch.explain().items() if chosen != "xla"
    }
    without = {"select_blocks", "selected_attention"}
    ranges = {"compressed_attention", "sliding_window_attention", "causal_attention"}
    assert set(found) == {*without, *ranges, "native_sparse_attention"}
    for name, reason in found.items():
        mentioned = capability == 90 and name not in without
        assert reason == "a GPU" + ", with kernels in Mosaic GPU where they are faster" * mentioned


def test_explain_says_nothing_in_the_log(caplog):
    with caplog.at_level(logging.INFO, logger="fsa_jax"):
        dispatch.explain()
    assert not caplog.records


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("length", [40, 300])
def test_the_shape_of_an_index_follows_from_the_plan(packed, chunked, length):
    """The shapes computed from the plan match those of tracing the index builder."""
    kinds = ((4, 2), (2, 2))
    for heads, kv_heads in kinds:
        query, key = (
            jax.ShapeDtypeStruct((2, length, n, 16), jnp.float32) for n in (heads, kv_heads)
        )
        indices = jnp.zeros((2, length, kv_heads, 5), jnp.int32)
        ids = jnp.ones((2, length), jnp.int32) if packed else None
        segments = describe_segments(ids, 2, length)
        lists = Lists.of(segments, indices, 32)
        tuning = SelectedTuning(scratch_bytes=2**20, pairs=7) if chunked else None
        spec = BlockSpec(scale=1.0, block_size=32, packed=packed, tuning=tuning)
        plan = supported(spec.plan(query, key, key, 5))
        build = functools.partial(block_attention._build_index, spec, plan)
        sizes = {"block_size": 32, "packed": packed}
        assert selected.index_shape(plan, indices.shape, length, **sizes) == jax.eval_shape(
            build, lists
        )


@pytest.mark.parametrize("name", ["to_stripes", "from_stripes"])
def test_old_names_of_zigzag_order_warn(name):
    new = getattr(fsa_jax, name.replace("stripes", "zigzag"))
    x = jnp.arange(12)
    with pytest.warns(DeprecationWarning, match=f"{name} is now called {new.__name__}"):
        found = getattr(fsa_jax, name)(x, 3, axis=0)
    assert (found == new(x, 3, axis=0)).all()
