"""With `jax_enable_x64` on, 32-bit programs are the same as without it.

This is measured in two ways. Programs are traced and searched for arrays of 64-bit numbers, for all
kernels including those for GPUs, which needs no compilation. Some programs are also run with and
without x64, and must give the same bits.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)
from training.runs import DENSE, MODEL, tiny
from util import assert_close, assert_same_bits, lists, normal, value_and_vjp

import fsa_jax
from fsa_jax import NSAConfig
from fsa_jax.inference import decode_step
from fsa_jax.inference.kv_cache import Chunk
from fsa_jax.inference.nsa_cache import NSACache
from fsa_jax.layers import NativeSparseAttention
from fsa_jax.pallas import SelectedTuning, intrinsics
from fsa_jax.pallas.block_attention.plan import METHODS
from fsa_jax.pallas.range_attention import hopper_key_kernel, hopper_pipeline, hopper_query_kernels
from fsa_jax.semantics import precision
from fsa_jax.sequence_parallel.zigzag import from_zigzag, to_zigzag
from fsa_jax.training.step import init_model, init_state, make_eval_step, make_train_step

CONFIG = NSAConfig(kernel_size=16, kernel_stride=8, block_size=16, topk=3, window_size=20)
#: gpu/test_gpu_x64.py runs some of these tests on a GPU.
INTERPRET = jax.default_backend() == "cpu"
WINDOWS: Any = {"kernel_size": 16, "kernel_stride": 8}
WIDE = {np.dtype(x) for x in ("float64", "int64", "uint64", "complex128")}


def all_jaxprs(jaxpr):
    yield jaxpr
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            yield from all_jaxprs(inner)


def wide_arrays(function, *args):
    """Returns the arrays of 64-bit numbers that a program computes; scalars do not count.

    In kernels, which use only 32-bit numbers, scalars count too.
    """
    found = []
    for jaxpr in all_jaxprs(jax.make_jaxpr(function)(*args).jaxpr):
        kernel = any(hasattr(x.aval, "inner_aval") for x in jaxpr.invars)  # kernels take references
        for equation in jaxpr.eqns:
            for x in equation.outvars:
                if getattr(x.aval, "dtype", None) in WIDE and (kernel or x.aval.size > 1):
                    found.append((str(equation.primitive), str(x.aval)))
    return found


def bits_without_and_with(function, *args):
    """Runs a function that has not been jitted yet, without x64 and with it."""
    runs = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            runs.append(jax.tree.map(np.asarray, jax.jit(function)(*args)))
    return runs


def inputs(dtype=jnp.float32, length=64, group=2, width=16):
    """Returns query, key, value, compressed key and value, and gates."""
    shapes = [(length, group, width), *[(length, 1, width)] * 2, *[(length // 8, 1, width)] * 2]
    arrays = [normal(i, 1, *shape, dtype=dtype) for i, shape in enumerate(shapes)]
    return *arrays, jax.nn.sigmoid(normal(5, 1, length, group, 3, dtype=dtype))


def documents(length=64):
    ids = np.repeat([1, 2, 2, 3, 0], [length // 3, 1, 5, length // 2, length])[:length]
    return jnp.asarray(ids, jnp.int32)[None]


def branches(arrays, implementation, ids=None):
    """Runs every public function."""
    query, key, value, ck, cv, _ = arrays
    shared: dict[str, Any] = {"segment_ids": ids, "implementation": implementation}
    residuals: dict[str, Any] = shared | {"return_residuals": True}
    compressed = fsa_jax.compressed_attention(query, ck, cv, **WINDOWS, **residuals)
    blocks = fsa_jax.select_blocks(query, ck, compressed[1], config=CONFIG, **shared)
    assert blocks.dtype == jnp.int32
    return (
        fsa_jax.compress(key, **WINDOWS, method="mean", segment_ids=ids),
        compressed,
        listed(arrays, implementation, ids),
        fsa_jax.sliding_window_attention(query, key, value, window_size=20, **residuals),
        fsa_jax.native_sparse_attention(*arrays, config=CONFIG, **shared),
    )


def listed(arrays, implementation, ids=None, method=None):
    query, key, value, *_ = arrays
    return fsa_jax.selected_attention(
        query,
        key,
        value,
        lists(0, 1, query.shape[1], 1, 3, 4),
        block_size=16,
        segment_ids=ids,
        implementation=implementation,
        return_residuals=True,
        tuning=SelectedTuning(method=method) if method else None,
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", ["triton_interpret", "xla", "reference"])
def test_programs_of_the_functions_have_no_arrays_of_64_bits(implementation, packed, x64):
    def attend(arrays):
        return branches(arrays, implementation, documents() if packed else None)

    arrays = inputs(jnp.bfloat16)
    assert wide_arrays(value_and_vjp(attend, 7), arrays) == []
    outs = jax.eval_shape(attend, arrays)
    assert [x.dtype for x in jax.tree.leaves(outs) if x.ndim == 4] == [jnp.bfloat16] * 5
    assert [x.dtype for x in jax.tree.leaves(outs) if x.ndim == 3] == [jnp.float32] * 3


@pytest.fixture
def for_a_gpu():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
    with use_abstract_mesh(AbstractMesh((), (), (), abstract_device=device)):
        yield


@pytest.mark.fast_cases("mosaic_gpu-8")
@pytest.mark.usefixtures("for_a_gpu", "x64")
@pytest.mark.parametrize(("implementation", "group"), [(None, 1), ("mosaic_gpu", 8)])
def test_programs_for_a_gpu_have_no_arrays_of_64_bits(implementation, group):
    """Traces the GPU kernels themselves, not their interpreted form, without compiling them."""
    run = value_and_vjp(
        functools.partial(branches, implementation=implementation, ids=documents()), 7
    )
    arrays = inputs(jnp.bfloat16, group=group, width=128)
    assert wide_arrays(run, arrays) == []
    text = str(jax.make_jaxpr(run)(arrays))
    assert "range_forward_kernel" in text or "hopper_forward_kernel" in text
    assert ("hopper" in text) == (implementation == "mosaic_gpu")


@pytest.mark.usefixtures("for_a_gpu", "x64")
@pytest.mark.parametrize("method", METHODS)
def test_programs_of_each_method_have_no_arrays_of_64_bits(method):
    run = value_and_vjp(functools.partial(listed, implementation="triton", method=method), 7)
    arrays = inputs(jnp.bfloat16, group=4, width=64)
    assert wide_arrays(run, arrays) == []


def test_kernels_for_hopper_can_be_called_by_themselves(x64):
    query, key, *_ = inputs(jnp.bfloat16, width=hopper_pipeline.WIDTH)
    ranges = [(jnp.zeros((1, 64), jnp.int32), jnp.full((1, 64), 64, jnp.int32))] * 2
    numbers = [jnp.zeros((1, 64, 2), jnp.float32)] * 2
    attend = functools.partial(hopper_query_kernels.attention, scale=0.1)
    assert wide_arrays(attend, query, key, key, *ranges) == []
    gradient = functools.partial(hopper_query_kernels.query_gradient, scale=0.1)
    assert wide_arrays(gradient, query, key, key, *ranges, *numbers, query) == []
    gradients = functools.partial(hopper_key_kernel.key_gradients, scale=0.1)
    dkey, _ = jax.eval_shape(gradients, query, key, key, ranges[0], *numbers, query)
    assert (dkey.shape, dkey.dtype) == (key.shape, key.dtype)


def test_the_measure_sees_arrays_of_64_bits(x64):
    x = jnp.ones((4,), jnp.float32)
    assert wide_arrays(lambda x: x * jnp.arange(4).astype(x.dtype), x) == [("iota", "int64[4]")]
    assert wide_arrays(precision.narrow(lambda x: x * jnp.arange(4).astype(x.dtype)), x) == []


def test_a_kernel_takes_weakly_typed_numbers(x64):
    """Comparisons with such numbers are traced again in the lowering, while x64 is on."""

    def count_kernel(x_ref, out_ref):
        at = intrinsics.iota(16)
        x = intrinsics.load(x_ref.at[at], mask=at < 8)
        intrinsics.store(out_ref.at[at], (x < at).astype(jnp.int32))

    @jax.jit
    def run():
        weak = precision.narrow(lambda: jnp.full((16,), 3))()
        assert weak.weak_type
        assert weak.dtype == jnp.int32
        shape = jax.ShapeDtypeStruct((16,), jnp.int32)
        return intrinsics.call(count_kernel, weak, grid=(1,), out_shape=shape, interpret=True)

    np.testing.assert_array_equal(run(), np.arange(16) > 3)


@pytest.mark.slow
def test_tokens_over_devices(x64):
    """float64 matches one device, and float32 programs have no 64-bit arrays."""
    sizes = {"num_kv_heads": 1, "head_dim": 16, "config": CONFIG, "implementation": "xla"}

    def make(axis):
        options = sizes | {"sequence_axis": axis, "param_dtype": jnp.float64}
        return nnx.split(NativeSparseAttention(2, 32, rngs=nnx.Rngs(0), **options))

    ids = documents(128)
    x = normal(0, 1, 128, 32, dtype=jnp.float64)
    graphdef, state = make(None)
    wanted = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, ids))(state, x)
    ordered, state = make("row")

    def run(state, x):
        out = nnx.merge(ordered, state)(x, to_zigzag(ids, 2))
        return out, out.sum()

    mesh = Mesh(np.array(jax.devices()[:2]), ("row",))
    with jax.set_mesh(mesh):
        x = jax.device_put(to_zigzag(x, 2), NamedSharding(mesh, PartitionSpec(None, "row")))
        assert_close(from_zigzag(jax.jit(run)(state, x)[0], 2), wanted)
        loss = jax.grad(lambda *args: run(*args)[1])
        assert wide_arrays(loss, state, x) != []
        assert wide_arrays(loss, *jax.tree.map(lambda x: x.astype(jnp.float32), (state, x))) == []


@pytest.mark.slow
def test_results_and_gradients_are_bitwise_the_same(x64):
    """The portable results match bitwise; kernels, slow to compile, run once and must be close."""

    def attend(arrays, implementation):
        shared = {"segment_ids": documents(), "implementation": implementation}
        return fsa_jax.native_sparse_attention(*arrays, config=CONFIG, **shared)

    arrays = inputs()
    run = value_and_vjp(functools.partial(attend, implementation="xla"), 7)
    without, with_x64 = bits_without_and_with(run, arrays)
    assert_same_bits(with_x64, without)
    kernels = value_and_vjp(functools.partial(attend, implementation="triton_interpret"), 7)(arrays)
    assert {x.dtype for x in jax.tree.leaves(kernels)} == {jnp.dtype(jnp.float32)}
    assert_close(kernels, without, 2e-6)


@pytest.mark.fast_cases("True")
@pytest.mark.parametrize("full", [False, True])
def test_programs_of_a_model_have_no_arrays_of_64_bits(full, x64):
    """Traces a training step with dropout, the evaluation, and calls with each kind of cache."""
    kernels: dict = {} if full else {"implementation": "triton_interpret"}
    sizes = {"head_dim": 16, "attention": "full" if full else "nsa", "nsa": CONFIG}
    config = tiny(Path("texts"), Path("out"), model=dataclasses.replace(MODEL, **sizes, **kernels))
    graphdef, params = init_model(config.model, 0)
    state, tokens = init_state(params, config), jnp.ones((1, 32), jnp.int32)
    step = make_train_step(graphdef, config)
    assert wide_arrays(step, state, tokens, tokens) == []
    assert wide_arrays(make_eval_step(graphdef), params, tokens, tokens) == []
    new, metrics = jax.eval_shape(step, state, tokens, tokens)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (state, new))
    assert shapes[0] == shapes[1]
    assert {x.dtype for x in metrics} == {jnp.dtype(jnp.float32)}

    def call(params, tokens, fresh):
        model = nnx.merge(graphdef, params)
        return model(tokens, cache=model.init_cache(1, 64), fresh=fresh)

    for length, fresh in ((1, False), (32, False), (32, True)):
        run = functools.partial(call, fresh=fresh)
        assert wide_arrays(run, params, tokens[:, :length]) == []


@pytest.mark.slow
def test_a_step_of_decoding_is_bitwise_the_same():
    sizes = {"config": CONFIG, "num_kv_heads": 1, "head_dim": 16}
    empty = NSACache.init(2, 64, **sizes)
    leaves, tree = jax.tree.flatten(empty)
    full = [normal(i, *x.shape) if x.dtype == jnp.float32 else x for i, x in enumerate(leaves)]
    position = jnp.asarray([[40], [17]], jnp.int32)
    chunk = Chunk(position, jnp.ones((2, 1), bool))

    def run(query, leaves):
        cache = jax.tree.unflatten(tree, leaves)
        return decode_step.attend(query, cache, chunk, 0, scale=0.25, interpret=INTERPRET)

    assert_same_bits(*bits_without_and_with(run, normal(9, 2, 1, 2, 16), full))


@pytest.mark.slow
def test_texts_are_the_same():
    texts = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            model = nnx.merge(*init_model(DENSE, 0))
            texts.append(fsa_jax.generate(model, [b"abc", b"a"], max_tokens=4, top_p=0.9))
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_gates_and_lse_of_64_bits_beside_arrays_of_32():
    """They count up to the precision of the sums; the gradient of the gates keeps their dtype."""
    *arrays, gates = inputs()
    lse = normal(9, 1, 64, 2)

    def run(implementation, gates, lse):
        shared: dict[str, Any] = {"config": CONFIG, "implementation": implementation}
        operate: Any = fsa_jax.native_sparse_attention
        operator = lambda gates: operate(*arrays, gates, **shared)  # noqa: E731
        blocks = fsa_jax.select_blocks(arrays[0], arrays[3], lse, **shared)
        return *value_and_vjp(operator, 3)(gates), blocks

    xla = functools.partial(run, "xla")
    wanted, got = jax.jit(xla)(gates, lse), jax.jit(xla)(*_wide(gates, lse))
    assert_close(got, wanted, 1e-6)
    out, (dgates,), _ = got
    assert out.dtype == jnp.float32
    assert dgates.dtype == jnp.float64
    # Kernels receive neither of them.
    found = wide_arrays(functools.partial(run, "triton_interpret"), *_wide(gates, lse))
    assert {name for name, _ in found} <= {"stop_gradient", "convert_element_type", "jit"}


def _wide(*arrays):
    return tuple(x.astype(jnp.float64) for x in arrays)
