"""The Flax layers: vectors of other projects, packing, positions, dtypes, linen."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from small_layers import CONFIG, LENGTHS, SEGMENT_IDS, inputs, make, perturbed

import fsa_jax
from fsa_jax import NSAConfig
from fsa_jax.layers import FullAttention, NativeSparseAttention
from fsa_jax.rope import Llama3Scaling, RoPE

VECTORS = pathlib.Path(__file__).parent / "vectors"


@nnx.jit
def call(layer):
    return layer(inputs(), SEGMENT_IDS)


def peer_parameters(layer, arrays, prefix):
    """Converts parameters (or gradients) of another project to the layer's names and shapes."""
    heads, width = layer.num_heads, layer.head_dim

    def projection(name):
        weight = arrays[f"{prefix}.proj_{name}.weight"]  # [outputs, inputs]
        return {"kernel": weight.T.reshape(weight.shape[1], -1, width)}

    gate = arrays[f"{prefix}.gate.0.weight"]
    return {
        "query": projection("q"),
        "key": projection("k"),
        "value": projection("v"),
        "out": {"kernel": arrays[f"{prefix}.proj_o.weight"].T.reshape(heads, width, -1)},
        "gate": {"kernel": gate.T.reshape(gate.shape[1], -1, 3)},
        "compress_key": {
            "weights": arrays[f"{prefix}.compress_key"],
            "positions": arrays[f"{prefix}.intra_block_pe"],
        },
        "compress_value": {"weights": arrays[f"{prefix}.compress_value"]},
    }


@pytest.mark.fast_cases("mod_fsa_groupsum-token-reference")
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("name", "gate"), [("mod_xl_linear", "head"), ("mod_fsa_groupsum", "token")]
)
def test_reproduces_peer_module(name, gate, implementation, x64):
    with np.load(VECTORS / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        meta = json.loads(str(file["meta"]))
    arrays = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in arrays.items()}
    sizes = ("kernel_size", "kernel_stride", "block_size", "topk", "init_blocks", "local_blocks")
    rope = RoPE(theta=500000.0, scaling=Llama3Scaling())
    np.testing.assert_allclose(rope.inverse_frequencies(32), arrays["inv_freq"], rtol=1e-6)
    layer = NativeSparseAttention(
        meta["num_q_heads"],
        meta["hidden_size"],
        num_kv_heads=meta["num_kv_heads"],
        head_dim=meta["head_dim"],
        # their window is the query's position and window_size keys before it
        config=NSAConfig(window_size=meta["window_size"] + 1, **{n: meta[n] for n in sizes}),
        gate=gate,
        rope=rope,
        param_dtype=jnp.float64,
        implementation=implementation,
        rngs=nnx.Rngs(0),
    )
    graphdef, state = nnx.split(layer)
    parameters = peer_parameters(layer, arrays, "param")
    assert jax.tree.map(np.shape, nnx.to_pure_dict(state)) == jax.tree.map(np.shape, parameters)
    segment_ids = jnp.asarray(np.repeat([1, 2, 3], meta["lens"]), jnp.int32)[None]

    @jax.jit
    def run(parameters, x, dy):
        def layer(parameters, x):
            nnx.replace_by_pure_dict(state, parameters)
            layer = nnx.merge(graphdef, state)
            return layer(x, segment_ids), layer.selected_blocks(x, segment_ids)

        y, pull, blocks = jax.vjp(layer, parameters, x, has_aux=True)
        return y, blocks, pull(dy)

    x, dy = (jnp.asarray(arrays[key])[None] for key in ("x", "dy"))
    y, blocks, (gradients, dx) = run(jax.tree.map(jnp.asarray, parameters), x, dy)
    assert_near(y[0], arrays["y"])
    assert_near(dx[0], arrays["dx"])
    jax.tree.map(assert_near, gradients, peer_parameters(layer, arrays, "grad"))
    want = arrays["topk_idx"].transpose(1, 0, 2)
    np.testing.assert_array_equal(np.sort(blocks[0], axis=-1), np.sort(want, axis=-1))


def assert_near(got, want, bound=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=bound * np.abs(want).max())


VARIANTS = [
    {},
    {"compression": "mlp", "kv_per_branch": True, "gate": "token", "num_kv_heads": 4},
    {"compression": "weighted", "gate": "token", "use_bias": True},
    {"compression": "mean", "kv_per_branch": True, "rope": None},
    {"cls": FullAttention, "use_bias": True},
]
DOCUMENTS = [
    (document, slice(end - length, end))
    for (document, length), end in zip(LENGTHS, np.cumsum([n for _, n in LENGTHS]), strict=True)
]


@pytest.mark.fast_cases("options4")
@pytest.mark.parametrize("options", VARIANTS)
def test_packed_row_equals_its_documents(options):
    layer, x = perturbed(make(**options)), inputs()
    run = nnx.jit(lambda layer, x, segment_ids: layer(x, segment_ids))
    packed = run(layer, x, SEGMENT_IDS)
    for document, here in DOCUMENTS:
        want = run(layer, x[:, here], None) if document else 0
        np.testing.assert_allclose(packed[:, here], want, atol=1e-5 if document else 0)


@pytest.mark.slow
def test_gradients_of_packed_row_equal_those_of_its_documents():
    # The vector tests above cover packing and the gradients of the default options.
    layer, x = perturbed(make(**VARIANTS[1])), inputs()
    weights = jax.random.normal(jax.random.key(5), x.shape)

    @nnx.jit
    @nnx.value_and_grad(argnums=(0, 1))
    def gradients(layer, x, segment_ids, weights):
        return jnp.sum(layer(x, segment_ids) * weights)

    value, (packed, dx) = gradients(layer, x, SEGMENT_IDS, weights)
    packed = nnx.to_pure_dict(packed)
    total_value, total = 0.0, jax.tree.map(np.zeros_like, packed)
    for document, here in DOCUMENTS:
        if not document:
            assert not np.any(dx[:, here])
            continue
        part, (alone, dx_alone) = gradients(layer, x[:, here], None, weights[:, here])
        np.testing.assert_allclose(dx[:, here], dx_alone, atol=1e-4)
        total_value += float(part)
        total = jax.tree.map(np.add, total, nnx.to_pure_dict(alone))
    assert total_value == pytest.approx(float(value), abs=1e-3)
    jax.tree.map(lambda got, want: assert_near(got, want, bound=1e-4), packed, total)


@pytest.mark.parametrize("cls", [NativeSparseAttention, FullAttention])
def test_positions_move_rope_only(cls):
    layer, x = make(cls), inputs()
    run = nnx.jit(lambda layer, positions: layer(x, SEGMENT_IDS, positions))
    counted = np.concatenate([np.arange(n) for _, n in LENGTHS]).astype(np.int32)[None]
    y = run(layer, None)
    np.testing.assert_array_equal(run(layer, jnp.asarray(counted)), y)
    # Scores depend only on distances, so shifting all positions of a sequence changes nothing.
    # Stretching the positions does change the result.
    np.testing.assert_allclose(run(layer, jnp.asarray(counted + 50)), y, atol=1e-4)
    assert np.abs(run(layer, jnp.asarray(counted * 3)) - y).max() > 1e-2


def test_layer_is_its_steps_in_order():
    """The layer equals its definition by public functions: compression comes before RoPE."""
    layer, x = perturbed(make()), inputs(batch=2, length=24)
    got, want = nnx.jit(lambda layer, x: (layer(x), step_by_step(layer, x)))(layer, x)
    np.testing.assert_allclose(got, want, atol=1e-5)


def step_by_step(layer, x):
    rope, positions = RoPE(), jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), (2, 24))
    first_tokens = positions[:, ::4]
    q, k, v = (
        jnp.einsum("btc,cnd->btnd", x, getattr(layer, name).kernel[...])
        for name in ("query", "key", "value")
    )
    compress = functools.partial(fsa_jax.compress, kernel_size=8, kernel_stride=4)
    table = layer.compress_key.positions[...]
    ck = compress(k, weights=layer.compress_key.weights[...], positions=table)
    cv = compress(v, weights=layer.compress_value.weights[...])
    gates = jax.nn.sigmoid(jnp.einsum("btc,cng->btng", x, layer.gate.kernel[...]))
    heads = fsa_jax.native_sparse_attention(
        rope.apply(q, positions),
        rope.apply(k, positions),
        v,
        rope.apply(ck, first_tokens),
        cv,
        gates,
        config=CONFIG,
        implementation="reference",
    )
    return jnp.einsum("btnd,ndc->btc", heads, layer.out.kernel[...])


def test_key_sets_per_branch_equal_to_the_shared_set_change_nothing():
    shared, separate = make(), make(kv_per_branch=True)
    state = nnx.to_pure_dict(nnx.state(shared))
    for name in ("key", "value"):
        kernel = state[name]["kernel"]
        state[name]["kernel"] = jnp.stack([kernel] * 3, axis=1)
    target = nnx.state(separate)
    nnx.replace_by_pure_dict(target, state)
    nnx.update(separate, target)
    x = inputs()

    @nnx.jit
    def run(layer):
        return layer(x, SEGMENT_IDS), layer.selected_blocks(x, SEGMENT_IDS)

    for got, want in zip(run(separate), run(shared), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_initial_compression_is_the_mean():
    x = jax.random.normal(jax.random.key(1), (1, 24, 2, 8))
    want = make(compression="mean").compress_value(x)
    for method in ("linear", "weighted"):
        got = make(compression=method).compress_value(x)
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_selected_blocks_are_sorted_and_of_the_own_document():
    run = nnx.jit(lambda layer, x: layer.selected_blocks(x, SEGMENT_IDS))
    blocks = np.asarray(run(make(), inputs()))
    assert blocks.shape == (1, SEGMENT_IDS.shape[1], 2, CONFIG.topk)
    assert blocks.dtype == np.int32
    position = np.concatenate([np.arange(n) for _, n in LENGTHS])
    for t, row in enumerate(blocks[0]):
        candidates = 0 if SEGMENT_IDS[0, t] == 0 else position[t] // CONFIG.block_size + 1
        for chosen in row:
            count = min(candidates, CONFIG.topk)
            assert list(chosen[:count]) == sorted(set(chosen[:count]))
            assert all(0 <= c < candidates for c in chosen[:count])
            assert all(c == -1 for c in chosen[count:])


@pytest.mark.parametrize("cls", [NativeSparseAttention, FullAttention])
def test_dtype_of_computation_and_storage(cls):
    dtype = jnp.bfloat16
    layer = make(cls, dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}
    y = call(layer)
    assert y.dtype == dtype
    # Selection may flip near ties in low precision, so the test compares the typical error.
    want = call(make(cls))
    assert np.median(np.abs(y.astype(jnp.float32) - want)) < 0.02 * np.abs(want).max()
    stored = make(cls, dtype=dtype, param_dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(stored))} == {jnp.dtype(dtype)}
    assert jax.eval_shape(call, stored).dtype == dtype


@pytest.mark.slow
def test_out_features_scale_and_initialisers():
    ones = nnx.initializers.ones
    layer = make(
        out_features=6,
        scale=1.0,
        use_bias=True,
        kernel_init=nnx.initializers.zeros,
        out_kernel_init=ones,
        bias_init=ones,
        compression_init=nnx.initializers.constant(2.0),
        positions_init=nnx.initializers.constant(3.0),
    )
    assert not np.any(layer.query.kernel[...])
    assert np.all(layer.out.kernel[...] == 1)
    assert layer.query.bias is not None
    assert np.all(layer.query.bias[...] == 1)
    compress_key = nnx.to_pure_dict(nnx.state(layer))["compress_key"]
    assert np.all(compress_key["weights"] == 2)
    assert np.all(compress_key["positions"] == 3)
    assert layer.compress_value.positions is None
    assert call(layer).shape == (1, SEGMENT_IDS.shape[1], 6)
    assert np.abs(call(make(scale=1.0)) - call(make())).max() > 1e-3


@pytest.mark.fast_cases("FullAttention")
@pytest.mark.parametrize("cls", [NativeSparseAttention, FullAttention])
def test_linen(cls):
    """Inside a linen module, numbers are the same and parameters are in the `params` collection."""
    nsa = {"config": CONFIG, "implementation": "reference"}
    options = nsa if cls is NativeSparseAttention else {}

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x, segment_ids):
            layer = nnx.bridge.to_linen(cls, 4, 16, num_kv_heads=2, head_dim=8, **options)
            return layer(linen.Dense(16)(x), segment_ids)

    x = inputs()
    variables = jax.jit(Model().init)(jax.random.key(0), x, SEGMENT_IDS)
    parameters = linen.unbox(variables)["params"]
    (name,) = (name for name in parameters if not name.startswith("Dense"))
    run = jax.jit(lambda v: Model().apply(v, x, SEGMENT_IDS))
    dense = x @ parameters["Dense_0"]["kernel"] + parameters["Dense_0"]["bias"].reshape(1, 1, -1)
    layer = make(cls)
    state = nnx.state(layer)
    nnx.replace_by_pure_dict(state, parameters[name])
    nnx.update(layer, state)
    want = nnx.jit(lambda layer, x: layer(x, SEGMENT_IDS))(layer, dense)
    np.testing.assert_allclose(run(variables), want, atol=1e-5)
    gradients = linen.unbox(jax.grad(lambda v: jnp.sum(run(v) ** 2))(variables))
    assert np.any(gradients["params"][name]["query"]["kernel"])
