"""The Flax layers: vectors of other projects, packing, dtypes, sharding, linen, bad input."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import fsa_jax
from fsa_jax import NSAConfig
from fsa_jax.layers import FullAttention, NativeSparseAttention
from fsa_jax.partitioning import sharding_rules
from fsa_jax.rope import Llama3Scaling, RoPE

VECTORS = pathlib.Path(__file__).parent / "vectors"
CONFIG = NSAConfig(
    kernel_size=8,
    kernel_stride=4,
    block_size=8,
    topk=4,
    init_blocks=1,
    local_blocks=2,
    window_size=6,
)
# One token, a document shorter than a window, whole windows, and padding before and after.
LENGTHS = [(0, 3), (1, 21), (2, 1), (3, 5), (4, 21), (0, 2)]
SEGMENT_IDS = jnp.asarray(np.repeat(*np.transpose(LENGTHS)), jnp.int32)[None]


def make(cls=NativeSparseAttention, **options):
    if cls is NativeSparseAttention:
        # The dense reference compiles fastest; the vector tests also cover the portable one.
        options = {"config": CONFIG, "implementation": "reference"} | options
    options = {"num_kv_heads": 2, "head_dim": 8, "rngs": nnx.Rngs(0)} | options
    return cls(4, 16, **options)


def inputs(batch=1, length=SEGMENT_IDS.shape[1], dtype=jnp.float32):
    return jax.random.normal(jax.random.key(7), (batch, length, 16), dtype)


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


def perturbed(layer):
    """Returns the layer with all parameters perturbed, so that none has a special initial value."""
    graphdef, state = nnx.split(layer)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, moved))


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


MESH_RULES = {"embed": "data", "heads": "model", "kv_heads": "model"}


def mesh():
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)


@pytest.mark.fast_cases("options1-specs1")
@pytest.mark.parametrize(
    ("options", "specs"),
    [
        (
            {"use_bias": True},
            {
                "query": {"kernel": ("data", "model", None), "bias": ("model", None)},
                "key": {"kernel": ("data", "model", None), "bias": ("model", None)},
                "value": {"kernel": ("data", "model", None), "bias": ("model", None)},
                "out": {"kernel": ("model", None, "data"), "bias": ("data",)},
                "gate": {"kernel": ("data", "model", None), "bias": ("model", None)},
                "compress_key": {
                    "weights": ("model", None, None),
                    "positions": ("model", None, None),
                },
                "compress_value": {"weights": ("model", None, None)},
            },
        ),
        (
            {"compression": "mlp", "gate": "token", "kv_per_branch": True},
            {
                "query": {"kernel": ("data", "model", None)},
                "key": {"kernel": ("data", None, "model", None)},
                "value": {"kernel": ("data", None, "model", None)},
                "out": {"kernel": ("model", None, "data")},
                "gate": {"kernel": ("data", None, None)},
                "compress_key": {
                    "weights": ("model", None, None),
                    "weights_out": ("model", None, None),
                    "positions": ("model", None, None),
                },
                "compress_value": {
                    "weights": ("model", None, None),
                    "weights_out": ("model", None, None),
                },
            },
        ),
    ],
)
def test_sharding(options, specs):
    layer = make(**options)
    graphdef, state = nnx.split(layer)
    with sharding_rules(**MESH_RULES):
        got = nnx.to_pure_dict(nnx.get_partition_spec(state))
        shardings = nnx.get_named_sharding(state, mesh())
    is_spec = lambda x: isinstance(x, jax.P)  # noqa: E731
    assert jax.tree.map(tuple, got, is_leaf=is_spec) == specs
    sharded = jax.device_put(state, shardings)
    kernel = sharded.query.kernel.get_value()
    assert kernel.addressable_shards[0].data.shape == (4, 2, 8)

    x = inputs(batch=4)
    segment_ids = jnp.tile(SEGMENT_IDS, (4, 1))
    rows = jax.NamedSharding(mesh(), jax.P("data"))
    run = jax.jit(lambda state, x, segment_ids: nnx.merge(graphdef, state)(x, segment_ids))
    got = run(sharded, *jax.device_put((x, segment_ids), rows))
    assert len(got.sharding.device_set) == 8
    np.testing.assert_allclose(got, run(state, x, segment_ids), atol=1e-5)


def test_built_under_a_mesh_is_sharded_at_once():
    with jax.set_mesh(mesh()):
        # without sharding rules, parameters are replicated
        assert make().query.kernel.sharding.is_fully_replicated
        with sharding_rules(heads="model"):
            kernel = make().query.kernel.get_value()
    assert kernel.sharding.is_equivalent_to(
        jax.NamedSharding(mesh(), jax.P(None, "model", None)), kernel.ndim
    )
    assert kernel.addressable_shards[0].data.shape == (16, 2, 8)


IDS = jnp.ones((1, 8), jnp.int32)


@pytest.mark.parametrize("cls", [NativeSparseAttention, FullAttention])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads must be a positive multiple .*num_heads=4.*=3"),
        ({"num_kv_heads": 0}, "num_heads must be a positive multiple .*num_kv_heads=0"),
        ({"head_dim": 7}, "head_dim must be positive and even .* got 7"),
        ({"implementation": "fast"}, "implementation must be .*'fast'"),
        ({"head_dim": 8.0}, "head_dim must be an integer .* got 8.0"),
        ({"num_kv_heads": "2"}, "num_kv_heads must be an integer .* got '2'"),
        ({"out_features": 0}, "out_features must be an integer of at least 1, got 0"),
        ({"rope": "half"}, "rope must be a RoPE or None, got 'half'"),
        ({"scale": "1"}, "scale must be None or a finite number, not an array, got '1'"),
    ],
)
def test_bad_options(cls, options, message):
    with pytest.raises(ValueError, match=message):
        make(cls, **options)(inputs(length=8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "max"}, "compression must be one of .* got 'max'"),
        ({"gate": "row"}, "gate must be one of .* got 'row'"),
        ({"config": {"topk": 4}}, "config must be an NSAConfig, got {'topk': 4}"),
        ({"kv_per_branch": 1}, "kv_per_branch must be True or False, got 1"),
        ({"sequence_axis": 0}, "sequence_axis must be None or the name of a mesh axis, got 0"),
    ],
)
def test_bad_options_of_nsa(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_default_head_dim():
    with pytest.raises(ValueError, match=r"in_features must be a multiple of num_heads.*30.*4"):
        FullAttention(4, 30, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("cls", [NativeSparseAttention, FullAttention])
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": jnp.zeros((8, 16))}, r"x must have shape \[B T C\], got shape \(8, 16\)"),
        ({"x": jnp.zeros((1, 8, 15))}, r"x must have in_features=16 features, got \(1, 8, 15\)"),
        ({"x": jnp.zeros((1, 8, 16), jnp.int32)}, "x must have one of the dtypes .* got int32"),
        ({"segment_ids": IDS[0]}, r"segment_ids must have shape .* got shape \(8,\)"),
        ({"segment_ids": IDS[:, 1:]}, r"segment_ids must have shape .* got \(1, 7\)"),
        (
            {"segment_ids": IDS.astype(jnp.float32)},
            "segment_ids must have an integer dtype .*, got float32",
        ),
        ({"segment_ids": -IDS}, r"segment_ids must be 0 \(padding\) or positive, got -1"),
        ({"positions": IDS[0]}, r"positions must have shape .* got shape \(8,\)"),
        ({"segment_ids": IDS > 0}, "segment_ids must have an integer dtype, got bool"),
        ({"segment_ids": [1] * 8}, r"segment_ids must have shape \[B T\], got shape \(8,\)"),
        ({"positions": "0"}, r"positions must be an integer array of shape \[B T\], got str"),
        ({"x": [[1.0]]}, r"x must be an array of shape \[B T C\], got list"),
        ({"fresh": "yes"}, "fresh must be True or False, got 'yes'"),
        ({"positions": IDS[:, 1:]}, r"positions must have .*\[B T\] of x.*\(1, 7\)"),
        (
            {"positions": IDS.astype(jnp.float32)},
            "positions must have an integer dtype .*, got float32",
        ),
    ],
)
def test_bad_call(cls, arrays, message):
    with pytest.raises(ValueError, match=message):
        make(cls)(**{"x": inputs(length=8)} | arrays)


def test_unknown_logical_axis():
    with (
        pytest.raises(ValueError, match=r"logical axis must be one of .* got 'head'"),
        sharding_rules(head="model"),
    ):
        pass
