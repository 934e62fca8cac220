"""Dense causal attention: errors, packing, NaN fill, sequence parallelism, memory, cuDNN."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from util import (
    assert_close,
    assert_errors_are_at_most_twice_those_of_dense,
    assert_poison_changes_no_bit,
    normal,
    value_and_gradients,
    value_and_vjp,
)

import fsa_jax
from fsa_jax import from_zigzag, to_zigzag
from fsa_jax.layers import FullAttention
from fsa_jax.pallas.range_attention import (
    hopper_groups,
    hopper_key_kernel,
    hopper_pipeline,
    hopper_query_kernels,
)
from fsa_jax.semantics import segments
from fsa_jax.transformer import Transformer, TransformerConfig

#: Documents, some of one token, with padding before, between and after them.
LENGTHS = [3, 37, 1, 40, 4, 30, 1, 9, 3]
IDS = jnp.asarray(np.repeat([0, 1, 2, 3, 0, 4, 5, 6, 0], LENGTHS), jnp.int32)[None]
TOKENS = IDS.shape[1]


def attend(implementation, ids=None, window=None, axis=None):
    return lambda query, key, value: fsa_jax.causal_attention(
        query,
        key,
        value,
        window_size=window,
        segment_ids=ids,
        implementation=implementation,
        return_residuals=True,
        sequence_axis=axis,
    )


def arrays(heads=6, kv_heads=2, width=16, value_width=None, dtype="float32", batch=1):
    widths = [(heads, width), (kv_heads, width), (kv_heads, value_width or width)]
    return [normal(i, batch, TOKENS, *x, dtype=jnp.dtype(dtype)) for i, x in enumerate(widths)]


def dense(ids, window, dtype):
    """An independent softmax over the whole score matrix in one dtype, the baseline for errors."""
    token = np.arange(TOKENS)
    sees = (token[:, None] >= token) & (token[:, None] - token < (window or TOKENS))
    if ids is not None:
        start = np.asarray(segments.describe_segments(ids, 1, TOKENS).start[0])
        sees &= (start[:, None] == start) & (np.asarray(ids[0]) > 0)
    sees = sees[None, None]

    def run(query, key, value):
        group = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
        wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
        scores = jnp.einsum("btnd,bsnd->bnts", query, key, preferred_element_type=wide)
        scores = jnp.where(sees, scores * query.shape[3] ** -0.5, -1e30)
        weights = jnp.where(sees, jax.nn.softmax(scores, axis=-1), 0).astype(dtype)
        out = jnp.einsum("bnts,bsne->btne", weights, value, preferred_element_type=wide)
        lse = jax.nn.logsumexp(scores, axis=-1).swapaxes(1, 2)
        return out.astype(dtype), jnp.where(lse < -1e29, -jnp.inf, lse)

    return run


@functools.cache
def exact(ids_given, window, heads, dtype):
    """Returns the inputs, and the results of `dense` in their dtype and in float64."""
    ids = IDS if ids_given else None
    args = arrays(heads, value_width=24, dtype=dtype)
    same = value_and_gradients(dense(ids, window, jnp.dtype(dtype)), 9, *args)
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in args]
        found = value_and_gradients(dense(ids, window, jnp.float64), 9, *wide)
        return args, same, jax.tree.map(np.asarray, found)


@pytest.mark.fast_cases("packed-xla", "packed-triton_interpret", "packed_window-reference")
@pytest.mark.parametrize("implementation", ["xla", "triton_interpret", "reference"])
@pytest.mark.parametrize(
    ("packed", "window", "heads", "dtype"),
    [(True, None, 6, "bfloat16"), (False, None, 2, "float32"), (True, 20, 8, "float32")],
    ids=["packed", "plain", "packed_window"],
)
def test_errors_are_at_most_twice_those_of_dense(implementation, packed, window, heads, dtype):
    args, same, wanted = exact(packed, window, heads, dtype)
    run = attend(implementation, IDS if packed else None, window)
    ours = value_and_gradients(run, 9, *args)
    assert_errors_are_at_most_twice_those_of_dense(ours, same, wanted)


def test_documents_are_those_of_jax_one_by_one():
    query, key, value = arrays()
    out = attend("xla", IDS)(query, key, value)[0]
    ends = np.cumsum(LENGTHS)
    for end, length in zip(ends, LENGTHS, strict=True):
        some = slice(end - length, end)
        wanted = jax.nn.dot_product_attention(
            *(x[:, some] for x in (query, key, value)), is_causal=True
        )
        assert_close(out[:, some], jnp.where(IDS[:, some, None, None] > 0, wanted, 0), 1e-5)


@pytest.mark.parametrize("implementation", ["xla", "triton_interpret", "reference"])
def test_poison_at_padding_reaches_nothing(implementation):
    padding = (IDS == 0)[:, :, None, None]
    run = value_and_vjp(attend(implementation, IDS), 3)
    assert_poison_changes_no_bit(run, arrays(), [padding] * 3)


def test_without_a_batch_and_under_vmap():
    args = arrays(batch=2)
    wanted = attend("xla")(*args)
    assert_close(attend("xla")(*(x[0] for x in args)), jax.tree.map(lambda x: x[0], wanted))
    assert_close(jax.vmap(attend("xla"))(*args), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("packed", "window"), [(True, None), (False, None), (True, 24)])
def test_tokens_over_four_devices(packed, window):
    """Results match one device; the only collectives gather keys and scatter their gradients."""
    ids = IDS if packed else None
    args = arrays()
    wanted = value_and_gradients(attend("xla", ids, window), 5, *args)
    mesh = jax.make_mesh((4,), ("tokens",), devices=jax.devices()[:4])
    put = lambda x: jax.device_put(to_zigzag(x, 4), NamedSharding(mesh, P(None, "tokens")))  # noqa: E731
    ids = None if ids is None else put(ids)

    def run(*args):
        def loss(*args):  # the cotangents of `value_and_gradients`, in token order
            return jax.tree.map(
                lambda x: from_zigzag(x, 4), attend("xla", ids, window, "tokens")(*args)
            )

        return value_and_gradients(loss, 5, *args)

    out, gradients = run(*map(put, args))
    assert_close(out, wanted[0], 1e-5)
    assert_close(tuple(from_zigzag(x, 4) for x in gradients), wanted[1], 1e-5)
    text = jax.jit(attend("xla", ids, window, "tokens")).lower(*map(put, args)).compile().as_text()
    gathered = re.findall(r"= \S*f32\[([\d,]+)\]\S* all-gather", str(text))
    assert gathered
    # one key head of one sequence at a time
    assert all(x.split(",").count("1") >= 2 for x in gathered)


def test_a_layer_over_devices_is_the_layer():
    def build(axis):
        return FullAttention(
            4, 16, num_kv_heads=2, sequence_axis=axis, rngs=nnx.Rngs(0), implementation="xla"
        )

    x = normal(1, 1, TOKENS, 16)
    mesh = jax.make_mesh((2,), ("tokens",), devices=jax.devices()[:2])
    put = lambda x: jax.device_put(to_zigzag(x, 2), NamedSharding(mesh, P(None, "tokens")))  # noqa: E731
    got = nnx.jit(lambda layer, x, ids: layer(x, ids))(build("tokens"), put(x), put(IDS))
    assert_close(from_zigzag(got, 2), build(None)(x, IDS), 1e-5)


def test_memory_of_a_layer_is_linear_on_cpus():
    """Four times the tokens take at most 4.2 times the bytes, for packed forward and backward."""
    graph, state = nnx.split(FullAttention(2, 16, num_kv_heads=1, rngs=nnx.Rngs(0)))

    def peak(tokens):
        def loss(state, x, ids):
            return jnp.sum(nnx.merge(graph, state)(x, ids) ** 2)

        shapes = jax.ShapeDtypeStruct((1, tokens, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        program = jax.jit(jax.grad(loss, (0, 1))).lower(state, shapes, ids).compile()
        found = program.memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    assert peak(16384) <= 4.2 * peak(4096)


@pytest.mark.slow
def test_hopper_kernels_at_a_group_that_is_no_power_of_two(monkeypatch):
    """Three heads run as two and one, match the reference, and sum both parts in float32."""
    monkeypatch.setattr(hopper_pipeline, "PROGRAMS", 2)  # every program is interpreted, so use few
    query, key, value = (
        normal(i, 1, 40, heads, 128, dtype=jnp.bfloat16) for i, heads in enumerate((3, 1, 1))
    )
    dout = normal(3, *query.shape, dtype=jnp.bfloat16)
    segment_info = segments.describe_segments(None, 1, 40)
    visible, query_range = (
        segments.visible_tokens(segment_info, 40),
        segments.query_range_of_tokens(segment_info, 40),
    )
    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    reference = functools.partial(
        fsa_jax.causal_attention, scale=0.1, implementation="reference", return_residuals=True
    )
    wanted, pull = jax.vjp(reference, *wide)
    gradients = pull((dout.astype(jnp.float32), jnp.zeros_like(wanted[1])))

    @jax.jit
    def run(query, key, value, lse, delta, dout):
        static = {"scale": 0.1, "interpret": InterpretGPUParams()}
        rest = (query_range, lse, delta, dout)
        return (
            hopper_groups.attention(query, key, value, visible, query_range, **static),
            hopper_groups.query_gradient(query, key, value, visible, *rest, **static),
            *hopper_groups.key_gradients(query, key, value, *rest, **static),
        )

    delta = jnp.sum(wanted[0] * dout.astype(jnp.float32), axis=-1)
    results, *found = run(query, key, value, wanted[1], delta, dout)
    assert_close(results, wanted, 2e-2)
    assert_close(tuple(found), gradients, 2e-2)
    assert [x.dtype for x in found] == [jnp.bfloat16] * 3


def test_hopper_kernels_take_a_power_of_two_as_it_is(monkeypatch):
    seen = []
    monkeypatch.setattr(
        hopper_query_kernels, "attention", lambda query, *_, **__: seen.append(query.shape)
    )
    monkeypatch.setattr(hopper_key_kernel, "key_gradients", lambda query, *_, **x: seen.append(x))
    query, key = jnp.ones((1, 2, 8, 4)), jnp.ones((1, 2, 2, 4))
    hopper_groups.attention(query, key, key, None, None, scale=1.0)
    hopper_groups.key_gradients(query, key, key, None, None, None, None, scale=1.0)
    assert seen == [query.shape, {"scale": 1.0, "interpret": None}]


CUDNN = {"implementation": "cudnn"}
BAD = {
    "name": ({"implementation": "cudann"}, ValueError, "implementation must be .*'cudnn'"),
    "window": ({"window_size": 0}, ValueError, "window_size must be an integer .*, got 0"),
    "ids": (CUDNN | {"segment_ids": IDS}, NotImplementedError, "cannot serve segment_ids"),
    "lse": (CUDNN | {"return_residuals": True}, NotImplementedError, "return_residuals"),
    "axis": (CUDNN | {"sequence_axis": "x"}, NotImplementedError, "sequence_axis"),
    "dtype": (CUDNN, NotImplementedError, "float16 or bfloat16, got float32"),
    "device": ({"implementation": "triton"}, NotImplementedError, "serve causal_attention"),
    "reference": (
        {"implementation": "reference", "sequence_axis": "x"},
        NotImplementedError,
        "for one device",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_say_why(name):
    options, error, why = BAD[name]
    with pytest.raises(error, match=why):
        fsa_jax.causal_attention(*arrays(), **options)


def test_cudnn_says_that_it_is_not_there():
    with pytest.raises(NotImplementedError, match=r"implementation='cudnn' cannot serve .*cuDNN"):
        fsa_jax.causal_attention(*arrays(dtype="bfloat16"), implementation="cudnn")


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_remat_keeps_what_attention_leaves(implementation, monkeypatch):
    """The backward pass does not recompute attention, including cuDNN's."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    config = TransformerConfig(
        num_layers=1, attention="full", remat=True, dtype="bfloat16", implementation=implementation
    )
    graph, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))

    def loss(state, tokens):
        return jnp.sum(nnx.merge(graph, state)(tokens).astype(jnp.float32))

    text = str(jax.make_jaxpr(jax.grad(loss))(state, jnp.zeros((1, 64), jnp.int32)))
    if implementation == "cudnn":
        assert text.count("dot_product_attention_fwd_wrapper[") == 1
        assert text.count("dot_product_attention_bwd_wrapper[") == 1
    else:
        assert text.count("name=causal_out") == 1
