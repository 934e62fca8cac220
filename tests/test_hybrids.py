"""Models whose layers have attention of several types, and the loops that run them."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small_transformers import CONFIG, SEGMENT_IDS, TOKENS, call

import fsa_jax
from fsa_jax import YarnScaling, generate
from fsa_jax.layers import FullAttention, NativeSparseAttention, SlidingWindowAttention
from fsa_jax.nn.layer_stack import stages
from fsa_jax.transformer import Transformer, TransformerConfig

TYPES = ("full", "window", "nsa", "window", "nsa", "window")
SHORT = ("full", "nsa", "window")
HYBRID = dataclasses.replace(
    CONFIG,
    num_layers=6,
    layer_types=TYPES,
    sliding_window=3,
    qk_norm=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    gate_bias=True,
    gate_bias_init=(-1.0, 2.0, 0.5),
    compress_after_rope=True,
    rope_scaling=YarnScaling(factor=4.0, original_max_position=16),
    rope_interleaved=True,
    implementation="xla",
)


def make(config=HYBRID, **changes):
    return Transformer(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=14))
@settings(max_examples=200, deadline=None)
def test_stages_are_the_layers_in_order(types):
    found = stages(tuple(types))
    assert [kind for unit, repeats in found for kind in unit * repeats] == types
    # never more layers than there are runs of equal ones
    runs = 1 + sum(a != b for a, b in itertools.pairwise(types))
    assert sum(len(unit) for unit, _ in found) <= runs


@pytest.mark.parametrize(
    ("types", "sizes"),
    [
        ("n" * 64, [(1, 64)]),
        ("wwwwwf" * 8, [(6, 8)]),
        ("ff" + "nnnf" * 7 + "n", [(1, 2), (1, 1), (4, 7)]),
        ("fnnnnnf", [(1, 1), (1, 5), (1, 1)]),
    ],
)
def test_periods_are_found(types, sizes):
    assert [(len(unit), repeats) for unit, repeats in stages(tuple(types))] == sizes


CLASSES = {"nsa": NativeSparseAttention, "full": FullAttention, "window": SlidingWindowAttention}


def by_hand(model):
    """Returns the logits of a hybrid, layer by layer in a Python loop."""
    x = model.embedding(TOKENS)
    for index, kind in enumerate(model.config.types):
        layer = model.layer(index)
        assert type(layer.attention) is CLASSES[kind]
        x = layer(x, SEGMENT_IDS)
    logits = model.norm(x) @ model.embedding.embedding[...].T
    return jnp.where(SEGMENT_IDS[..., None] == 0, 0, logits)


def packed(model):
    return model(TOKENS, SEGMENT_IDS)


def test_hybrid_is_its_layers_in_order():
    model = make(layer_types=SHORT, num_layers=3)
    np.testing.assert_allclose(nnx.jit(packed)(model), nnx.jit(by_hand)(model), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_gradients_of_a_hybrid_are_those_of_its_layers_in_order(remat):
    model = make(remat=remat)

    def gradient(run):
        return nnx.jit(nnx.grad(lambda model: jnp.sum(jnp.sin(run(model)))))(model)

    gradients = gradient(packed), gradient(by_hand)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *gradients)
    assert all(np.any(x) for x in jax.tree.leaves(gradients[0]))


@pytest.mark.slow
def test_layers_differ_in_what_they_see():
    """Layers in another order give another result: each has its parameters and its attention."""
    one, other = make(), make(layer_types=(*TYPES[::-1],))
    assert np.abs(call(one, TOKENS) - call(other, TOKENS)).max() > 1e-3


@pytest.mark.slow
def test_blocks_are_those_of_the_sparse_layers():
    model = make()
    blocks = nnx.jit(lambda model: model.selected_blocks(TOKENS, SEGMENT_IDS))(model)
    assert blocks.shape == (2, 1, TOKENS.shape[1], 1, 3)

    @nnx.jit
    def one_by_one(model):
        x, found = model.embedding(TOKENS), []
        for index, kind in enumerate(TYPES):
            layer = model.layer(index)
            if kind == "nsa":
                found.append(layer.selected_blocks(x, SEGMENT_IDS))
            x = layer(x, SEGMENT_IDS)
        return jnp.stack(found)

    np.testing.assert_array_equal(blocks, one_by_one(model))
    with pytest.raises(ValueError, match="layers of native sparse attention, got attention='full'"):
        make(layer_types=("full",) * 6).selected_blocks(TOKENS)


@nnx.jit
def extend(model, tokens, cache, num_tokens):
    return model(tokens, cache=cache, num_tokens=num_tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("types", "changes"),
    [
        pytest.param(SHORT, {"num_layers": 3}, id="hybrid"),
        pytest.param(TYPES, {}, id="long_hybrid"),
        pytest.param(TYPES, {"kv_per_branch": True, "compression": "mlp"}, id="per_branch"),
        pytest.param(("window", "full") * 3, {}, id="no_nsa"),
        pytest.param(("window",) * 6, {"sliding_window": 50}, id="long_window"),
        pytest.param(("nsa",) * 6, {}, id="nsa"),
    ],
)
def test_cache_gives_the_training_forward(types, changes):
    model = make(layer_types=types, **changes)
    tokens = jax.random.randint(jax.random.key(4), (2, 44), 0, 11, jnp.int32)
    want = np.asarray(call(model, tokens))
    cache, at = model.init_cache(2, 44), np.asarray([0, 0])
    for counts in ((20, 3), (3, 20), (1, 1), (0, 1), (20, 19)):
        width = 20 if max(counts) > 3 else 3  # one copies the keys, the other gathers them
        rows = np.zeros((2, width), np.int32)
        for row, count in enumerate(counts):
            rows[row, :count] = tokens[row, at[row] : at[row] + count]
        logits, cache = extend(model, jnp.asarray(rows), cache, jnp.asarray(counts, jnp.int32))
        for row, count in enumerate(counts):
            got = np.asarray(logits)[row, :count]
            np.testing.assert_allclose(got, want[row, at[row] : at[row] + count], atol=1e-4)
        at += counts
    assert at.tolist() == [44, 44]


@pytest.mark.slow
@pytest.mark.parametrize("types", [TYPES, ("window", "full") * 3], ids=["nsa", "no_nsa"])
def test_pages_and_generation(types):
    """Pages that another sequence left, and `generate`, give what the whole forward gives."""
    model = make(layer_types=types)
    cache = model.init_cache(2, 64, num_pages=24)
    allocator = fsa_jax.PageAllocator(cache)
    tokens = jax.random.randint(jax.random.key(5), (2, 20), 0, 11, jnp.int32)
    for turn in range(2):
        for row in range(2):
            cache = allocator.reserve(cache, row, 40)
        given = jnp.roll(tokens, turn, axis=1)
        logits, cache = extend(model, given, cache, jnp.asarray([20, 20], jnp.int32))
        np.testing.assert_allclose(logits, call(model, given), atol=1e-4)
        for row in range(2):
            cache = allocator.release(cache, row)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5]]
    for prompt, text in zip(
        prompts, generate(model, prompts, max_tokens=8, temperature=0), strict=True
    ):
        tokens = list(prompt)
        for _ in range(8):
            logits = call(model, jnp.asarray([tokens + [0] * (24 - len(tokens))], jnp.int32))
            tokens.append(int(jnp.argmax(logits[0, len(tokens) - 1])))
        assert text == tokens[len(prompt) :]


def test_sizes_of_the_cache_belong_to_the_kind_of_model():
    with pytest.raises(ValueError, match="page_size must not be given with attention='hybrid'"):
        nnx.eval_shape(make).init_cache(1, 8, page_size=8)
    model = nnx.eval_shape(lambda: make(layer_types=("window", "full") * 3))
    with pytest.raises(ValueError, match="rollback must not be given with attention='hybrid'"):
        model.init_cache(1, 8, rollback=8)


def test_configuration_goes_through_json():
    again = TransformerConfig.from_dict(json.loads(json.dumps(HYBRID.to_dict())))
    assert again == HYBRID
    assert hash(again) == hash(HYBRID)
    assert again.types == TYPES


def test_layers_of_one_type_are_no_hybrid():
    config = dataclasses.replace(HYBRID, layer_types=["full"] * 6)
    assert (config.attention, config.layer_types) == ("full", None)
    assert config == dataclasses.replace(HYBRID, attention="full", layer_types=None)
    assert HYBRID.attention == "hybrid"


def test_configurations_of_before_still_load():
    """The fields that a checkpoint of an earlier version holds."""
    old = {
        "vocab_size": 257, "num_layers": 2, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1,
        "head_dim": 8, "mlp_dim": 48, "attention": "nsa", "nsa": {"topk": 8},
        "compression": "linear", "gate": "head", "kv_per_branch": False, "rope_theta": 10000.0,
        "tie_embeddings": True, "remat": False, "dropout_rate": 0.0, "norm_eps": 1e-6,
        "dtype": "float32", "param_dtype": "float32", "implementation": None,
        "sequence_axis": None,
    }  # fmt: skip
    config = TransformerConfig.from_dict(old)
    assert {name: config.to_dict()[name] for name in old if name != "nsa"} == {
        name: value for name, value in old.items() if name != "nsa"
    }


BAD = [
    ({"layer_types": ("nsa",)}, r"one type for each of the num_layers=6 layers, got \('nsa',\)"),
    ({"layer_types": "nsa"}, "layer_types must have one type .* got 'nsa'"),
    ({"layer_types": (*TYPES[:5], "ssm")}, r"layer_types\[5\] must be one of .* got 'ssm'"),
    ({"layer_types": None}, "attention must be one of .* got 'hybrid'"),
    ({"sliding_window": 0}, "sliding_window must be an integer of at least 1, got 0"),
    ({"gate_bias_init": (1.0, 2.0)}, "gate_bias_init must be one finite number or three"),
    ({"gate_bias_init": "x"}, "gate_bias_init must be one finite number or three, got 'x'"),
    ({"gate_bias_init": (1, 2, float("inf"))}, r"gate_bias_init\[2\] must be finite, got inf"),
    ({"rope_scaling": {"factor": 2}}, "rope_scaling must be a LinearScaling"),
    ({"rope_interleaved": 1}, "rope_interleaved must be True or False, got 1"),
    ({"qk_norm": None}, "qk_norm must be True or False, got None"),
    ({"padding_id": None}, "padding_id must be an integer.* got None"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HYBRID, **changes)


@pytest.mark.slow
def test_padding_has_the_id_that_the_configuration_says():
    want = call(make(), TOKENS, SEGMENT_IDS)
    got = call(make(padding_id=-1), TOKENS, SEGMENT_IDS - 1)
    np.testing.assert_allclose(got, want, atol=1e-5)
    blocks = [
        nnx.jit(lambda model, ids: model.selected_blocks(TOKENS, ids))(model, ids)
        for model, ids in ((make(), SEGMENT_IDS), (make(padding_id=-1), SEGMENT_IDS - 1))
    ]
    np.testing.assert_array_equal(*blocks)
