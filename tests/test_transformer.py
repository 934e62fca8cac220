"""The transformer: its components, packing, dropout, selected blocks, sharding, bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_transformers import CONFIG, FULL, LENGTHS, SEGMENT_IDS, TOKENS, call

from fsa_jax.partitioning import sharding_rules
from fsa_jax.transformer import Transformer, TransformerConfig


def make(config=CONFIG, **changes):
    return Transformer(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


@pytest.mark.fast_cases("False")
@pytest.mark.parametrize("tied", [True, False])
def test_is_its_parts_in_order(tied):
    """The model equals embedding, layers in a Python loop, norm and head, written out."""
    model = make(tie_embeddings=tied)

    @nnx.jit
    def attend(attention, x):
        return attention(x, SEGMENT_IDS)

    x = np.asarray(model.embedding.embedding[...])[np.asarray(TOKENS)]
    for index in range(2):
        layer = nnx.to_pure_dict(nnx.state(block := model.layer(index)))
        normed = rms_norm(x, np.asarray(layer["attention_norm"]["scale"]))
        x = x + np.asarray(attend(block.attention, jnp.asarray(normed)))
        normed = rms_norm(x, np.asarray(layer["mlp_norm"]["scale"]))
        gate, up = (normed @ np.asarray(layer["mlp"][name]["kernel"]) for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ np.asarray(layer["mlp"]["down"]["kernel"])
    head = model.embedding.embedding if model.head is None else model.head
    assert (model.head is None) == tied
    want = rms_norm(x, 1.0) @ np.asarray(head[...]).T
    logits = call(model, TOKENS, SEGMENT_IDS)
    assert logits.dtype == jnp.float32
    padding = np.asarray(SEGMENT_IDS == 0)[..., None]
    np.testing.assert_allclose(logits, np.where(padding, 0, want), atol=1e-5)


def test_runs_outside_jit():
    np.testing.assert_allclose(
        make()(TOKENS, SEGMENT_IDS), call(make(), TOKENS, SEGMENT_IDS), atol=1e-5
    )


@pytest.mark.parametrize("config", [CONFIG, FULL], ids=["nsa", "full"])
def test_packed_row_equals_its_documents(config):
    model = make(config)
    logits, at = call(model, TOKENS, SEGMENT_IDS), 0
    for document, length in LENGTHS:
        if document:
            alone = call(model, TOKENS[:, at : at + length])
            np.testing.assert_allclose(logits[:, at : at + length], alone, atol=1e-5)
        at += length


@pytest.mark.parametrize("config", [CONFIG, FULL], ids=["nsa", "full"])
def test_is_causal(config):
    model = make(config)
    changed = TOKENS.at[0, 13].set((TOKENS[0, 13] + 1) % 11)
    difference = np.abs(call(model, TOKENS) - call(model, changed)).max(axis=-1)[0]
    assert not np.any(difference[:13])
    assert np.all(difference[13:16] > 0)


def test_selected_blocks_are_those_of_each_layer():
    model = make()
    run = nnx.jit(lambda model: model.selected_blocks(TOKENS, SEGMENT_IDS))
    blocks = run(model)
    assert blocks.shape == (2, 1, TOKENS.shape[1], 1, 3)
    assert blocks.dtype == jnp.int32

    @nnx.jit
    def one(layer, x):
        return layer(x, SEGMENT_IDS), layer.selected_blocks(x, SEGMENT_IDS)

    x = model.embedding(TOKENS)
    for index in range(2):
        x, want = one(model.layer(index), x)
        np.testing.assert_array_equal(blocks[index], want)


def test_dropout_needs_a_key():
    model = make(dropout_rate=0.5)
    plain = call(model, TOKENS)
    np.testing.assert_array_equal(plain, call(make(), TOKENS))
    first = call(model, TOKENS, dropout_key=jax.random.key(0))
    np.testing.assert_array_equal(first, call(model, TOKENS, dropout_key=jax.random.key(0)))
    assert np.abs(first - plain).max() > 1e-3
    other = call(model, TOKENS, dropout_key=jax.random.key(1))
    assert np.abs(first - other).max() > 1e-3
    np.testing.assert_array_equal(call(make(), TOKENS, dropout_key=jax.random.key(0)), plain)


def test_dropout_keeps_the_mean_of_a_branch():
    block = make(dropout_rate=0.25).layer(0)
    dropped = block.dropout(jnp.ones((100, 100)), rngs=jax.random.key(0))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.03)


def test_initial_loss_is_that_of_a_uniform_guess():
    log_p = jax.nn.log_softmax(call(make(), TOKENS))
    loss = -jnp.mean(jnp.take_along_axis(log_p, TOKENS[..., None], axis=-1))
    assert float(loss) == pytest.approx(np.log(11), abs=0.3)


def test_layers_differ_at_start_and_branches_shrink_with_depth():
    state = nnx.to_pure_dict(nnx.state(make(num_layers=8)))["layers"]
    kernels = np.asarray(state["attention"]["query"]["kernel"])
    assert kernels.shape == (8, 16, 2, 8)
    assert not np.any(np.all(kernels[1:] == kernels[0], axis=(1, 2, 3)))
    down = np.asarray(state["mlp"]["down"]["kernel"])
    assert down.std() == pytest.approx((24 * 2 * 8) ** -0.5, rel=0.1)


def test_dtypes():
    model = make(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    logits = call(model, TOKENS)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, call(make(), TOKENS), atol=0.05)
    stored = jax.eval_shape(lambda: nnx.state(make(param_dtype="bfloat16")))
    assert {x.dtype for x in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}


def test_sharding():
    """Stacked parameters carry the layer axis; sharded parameters give the same logits."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)
    graphdef, state = nnx.split(make(num_kv_heads=2, vocab_size=12, tie_embeddings=False))
    rules = {"embed": "data", "heads": "model", "kv_heads": "model", "mlp": "model"}
    with sharding_rules(vocab="model", **rules):
        specs = nnx.to_pure_dict(nnx.get_partition_spec(state))
        shardings = nnx.get_named_sharding(state, mesh)
    layers = specs["layers"]
    assert specs["embedding"]["embedding"] == jax.P("model", "data")
    assert specs["head"] == jax.P("model", "data")
    assert specs["norm"]["scale"] == jax.P("data")
    assert layers["mlp_norm"]["scale"] == jax.P(None, "data")
    assert layers["mlp"]["gate"]["kernel"] == jax.P(None, "data", "model")
    assert layers["mlp"]["down"]["kernel"] == jax.P(None, "model", "data")
    assert layers["attention"]["query"]["kernel"] == jax.P(None, "data", "model", None)
    assert layers["attention"]["out"]["kernel"] == jax.P(None, "model", None, "data")
    assert layers["attention"]["compress_key"]["weights"] == jax.P(None, "model", None, None)

    tokens, segment_ids = jnp.tile(TOKENS, (4, 1)), jnp.tile(SEGMENT_IDS, (4, 1))
    rows = jax.device_put((tokens, segment_ids), jax.NamedSharding(mesh, jax.P("data")))
    run = jax.jit(lambda state, tokens, ids: nnx.merge(graphdef, state)(tokens, ids))
    got = run(jax.device_put(state, shardings), *rows)
    np.testing.assert_allclose(got, run(state, tokens, segment_ids), atol=1e-5)


@pytest.mark.slow
def test_built_under_a_mesh_is_sharded_at_once():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("model",), axis_types=auto, devices=jax.devices()[:2])
    with jax.set_mesh(mesh), sharding_rules(mlp="model", layers=None):
        kernel = make().layers.mlp.up.kernel.get_value()
    want = jax.NamedSharding(mesh, jax.P(None, None, "model"))
    assert kernel.sharding.is_equivalent_to(want, kernel.ndim)


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({}, (2, 32, 384)),  # the sizes of all previous default models
        ({"embed_dim": 256}, (2, 64, 768)),
        ({"embed_dim": 4096, "num_heads": 32}, (8, 128, 12288)),
        ({"embed_dim": 48, "num_heads": 3}, (1, 16, 144)),
        ({"embed_dim": 64, "num_heads": 1}, (1, 64, 192)),
        ({"embed_dim": 60, "num_heads": 10}, (2, 6, 180)),
        ({"num_kv_heads": 4, "head_dim": 8, "mlp_dim": 7}, (4, 8, 7)),
        ({"embed_dim": np.int64(64), "num_heads": np.int32(8)}, (2, 8, 192)),
    ],
)
def test_sizes_that_are_not_given_follow_from_the_others(given, sizes):
    config = TransformerConfig(**given)
    assert (config.num_kv_heads, config.head_dim, config.mlp_dim) == sizes
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert TransformerConfig.from_dict(saved) == config
    rest = {name: value for name, value in saved.items() if name not in DERIVED}
    if not set(given) & DERIVED:
        assert TransformerConfig.from_dict(rest | dict.fromkeys(DERIVED)) == config


DERIVED = {"num_kv_heads", "head_dim", "mlp_dim"}


@pytest.mark.slow
def test_tokens_and_ids_may_be_integers_of_any_kind():
    model = make()
    want = call(model, TOKENS, SEGMENT_IDS)
    for kind in (lambda x: np.asarray(x, np.int64), lambda x: x.astype(jnp.uint8)):
        np.testing.assert_array_equal(call(model, kind(TOKENS), kind(SEGMENT_IDS)), want)
    out = model(TOKENS.tolist(), SEGMENT_IDS.tolist(), np.zeros((1, 24), np.int64).tolist())
    positions = jnp.zeros((1, 24), jnp.int32)
    np.testing.assert_array_equal(out, model(TOKENS, SEGMENT_IDS, positions))


@pytest.mark.parametrize("config", [CONFIG, FULL])
def test_config_survives_json(config):
    assert TransformerConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ({"num_layers": 2.0}, "num_layers must be an integer of at least 1, got 2.0"),
        ({"embed_dim": True}, "embed_dim must be an integer .* got True"),
        ({"num_heads": 0}, "num_heads must be .* got 0"),
        ({"num_kv_heads": -1}, "num_kv_heads must be .* got -1"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads must be a positive multiple .*=3.*=2"),
        ({"head_dim": 5}, "head_dim must be positive and even .* got 5"),
        ({"mlp_dim": 0}, "mlp_dim must be .* got 0"),
        ({"attention": "dense"}, "attention must be one of .* got 'dense'"),
        ({"nsa": {}}, "nsa must be an NSAConfig, got {}"),
        ({"compression": "max"}, "compression must be one of .* got 'max'"),
        ({"gate": "row"}, "gate must be one of .* got 'row'"),
        ({"kv_per_branch": "no"}, "kv_per_branch must be True or False, got 'no'"),
        ({"rope_theta": 0}, "rope_theta must be a finite number above 0, got 0"),
        ({"tie_embeddings": None}, "tie_embeddings must be True or False, got None"),
        ({"remat": "full"}, "remat must be True or False, got 'full'"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\), got 1.0"),
        ({"norm_eps": 0.0}, r"norm_eps must be in \(0, 1\), got 0.0"),
        ({"dropout_rate": "0"}, r"dropout_rate must be in \[0, 1\), got '0'"),
        ({"embed_dim": "16"}, "embed_dim must be an integer .* got '16'"),
        ({"sequence_axis": 3}, "sequence_axis must be None or the name of a mesh axis, got 3"),
        (
            {"embed_dim": 10, "num_heads": 4, "head_dim": None},
            "embed_dim must be a multiple of num_heads .*=10 and num_heads=4",
        ),
        ({"dtype": "int8"}, "dtype must be one of .* got 'int8'"),
        ({"param_dtype": "int8"}, "param_dtype must be one of .* got 'int8'"),
        ({"implementation": "fast"}, "implementation must be .* got 'fast'"),
        ({"attention": "full", "implementation": "fast"}, "implementation must .* got 'fast'"),
        ({"implementation": "cudnn"}, "implementation must .* got 'cudnn'"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 3}, "TransformerConfig has no field 'depth'"),
        ({"nsa": {"stride": 3}}, "NSAConfig has no field 'stride'"),
        ({"nsa": {"topk": 1}}, "topk must be at least init_blocks"),
        ({"nsa": 3}, "NSAConfig must be made of a dict, got 3"),
        ([("depth", 3)], "TransformerConfig must be made of a dict, got .*depth"),
    ],
)
def test_bad_dictionary(values, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict(values)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: make()(TOKENS[0]), r"tokens must have shape \[B T\], got shape \(24,\)"),
        (
            lambda: make()(TOKENS.astype(jnp.float32)),
            "tokens must have an integer dtype .*, got float32",
        ),
        (lambda: make()(TOKENS, SEGMENT_IDS[0]), r"segment_ids must have shape .* \(24,\)"),
        (lambda: make(FULL).selected_blocks(TOKENS), "layers of native .* got attention='full'"),
        (lambda: make().layer(2), r"index must be an integer from 0 to 1, got 2"),
        (lambda: make().layer(0.0), r"index must be an integer from 0 to 1, got 0.0"),  # pyright: ignore
        (lambda: make()([[1, 2.5]]), "tokens must have an integer dtype .*, got float64"),  # pyright: ignore
        (lambda: make()("text"), r"tokens must be an integer array of shape \[B T\], got str"),  # pyright: ignore
        (lambda: make()(TOKENS, "ids"), r"segment_ids must be an integer array .* got str"),  # pyright: ignore
        (lambda: make()(TOKENS, fresh=1), "fresh must be True or False, got 1"),  # pyright: ignore
        (lambda: make().init_cache(1, 8, page_size=8), "page_size must not .*'nsa', got 8"),
        (lambda: make(FULL).init_cache(1, 8, rollback=2), "rollback must not .*'full', got 2"),
        (lambda: Transformer({}, rngs=nnx.Rngs(0)), "config must be a Transformer"),  # pyright: ignore
    ],
)
def test_bad_call(run, message):
    with pytest.raises(ValueError, match=message):
        run()
