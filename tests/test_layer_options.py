"""Options of the attention layers: normalised heads, biases, compression after RoPE, names."""

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fsa_jax
from fsa_jax import NSAConfig, RoPE
from fsa_jax.layers import (
    SPARSE_PARTS,
    FullAttention,
    NativeSparseAttention,
    SlidingWindowAttention,
)
from fsa_jax.nn.base import PROJECTION_NAMES
from fsa_jax.partitioning import sharding_rules

CONFIG = NSAConfig(
    kernel_size=8,
    kernel_stride=4,
    block_size=8,
    topk=3,
    init_blocks=1,
    local_blocks=1,
    window_size=6,
)
LENGTHS = ((1, 21), (2, 2), (3, 17), (0, 8))
SEGMENT_IDS = jnp.asarray(np.repeat(*np.transpose(LENGTHS)), jnp.int32)[None]
LENGTH = SEGMENT_IDS.shape[1]
X = jax.random.normal(jax.random.key(1), (1, LENGTH, 24))
LAYERS = {
    "nsa": functools.partial(NativeSparseAttention, config=CONFIG),
    "full": FullAttention,
    "window": functools.partial(SlidingWindowAttention, window_size=6),
}
#: All options that add parameters or change the function.
OPTIONS = {"qk_norm": True, "norm_eps": 1e-2, "qkv_bias": True, "out_bias": True}


def make(kind="nsa", implementation="reference", **options):
    """Returns a layer whose parameters are all random, also those that start as 0 or 1."""
    options = {"num_kv_heads": 2, "head_dim": 8} | options
    layer = LAYERS[kind](4, 24, implementation=implementation, rngs=nnx.Rngs(0), **options)
    state, key = nnx.state(layer, nnx.Param), jax.random.key(2)

    def random(path, x):
        where = jax.random.fold_in(key, sum(map(ord, jax.tree_util.keystr(path))))
        return x + 0.3 * jax.random.normal(where, x.shape, x.dtype)

    nnx.update(layer, jax.tree_util.tree_map_with_path(random, state))
    return layer


@nnx.jit
def call(layer, x, segment_ids=None, positions=None):
    return layer(x, segment_ids, positions)


def by_hand(layer, x, window=None):
    """Returns dense attention of a layer's parameters to one document, in float64."""
    of = lambda p: np.asarray(p[...], np.float64)  # noqa: E731
    x = np.asarray(x[0], np.float64)

    def heads(projection, norm=None):
        y = np.einsum("tc,cnd->tnd", x, of(projection.kernel)) + of(projection.bias)
        if norm is None:
            return y
        y = y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-2) * of(norm.scale)
        return np.asarray(RoPE().apply(jnp.asarray(y, jnp.float32), np.arange(len(y))), np.float64)

    query, key = heads(layer.query, layer.query_norm), heads(layer.key, layer.key_norm)
    key, value = (np.repeat(y, 2, axis=1) for y in (key, heads(layer.value)))
    logits = np.einsum("tnd,snd->nts", query, key) / np.sqrt(8)
    place = np.arange(len(x))
    seen = place[None] <= place[:, None]
    if window:
        seen &= place[None] > place[:, None] - window
    weight = np.where(seen, np.exp(logits), 0)
    out = np.einsum("nts,sne->tne", weight / weight.sum(axis=-1, keepdims=True), value)
    return np.einsum("tne,nec->tc", out, of(layer.out.kernel)) + of(layer.out.bias)


@pytest.mark.parametrize(("kind", "window"), [("full", None), ("window", 6)])
def test_dense_layers_are_their_definition(kind, window):
    layer = make(kind, **OPTIONS)
    np.testing.assert_allclose(call(layer, X)[0], by_hand(layer, X, window), atol=2e-5)


def test_sparse_layer_that_selects_everything_is_dense():
    config = NSAConfig(kernel_size=8, kernel_stride=4, block_size=8, topk=6, window_size=6)
    layer = make("nsa", **OPTIONS, config=config, gate_bias=True)
    layer.gate.kernel[...] = jnp.zeros((24, 4, 3))
    layer.gate.bias[...] = jnp.broadcast_to(jnp.asarray([-40.0, 40, -40]), (4, 3))
    np.testing.assert_allclose(call(layer, X)[0], by_hand(layer, X), atol=2e-5)


@pytest.mark.fast_cases("True-True")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_sparse_layer_is_the_functions_in_order(after, own):
    """The compressed keys are those of normalised keys, before or after RoPE."""
    layer = make(**OPTIONS, compress_after_rope=after, kv_per_branch=own, gate_bias=True)
    rope, place = RoPE(), fsa_jax.token_positions(SEGMENT_IDS)
    at = fsa_jax.window_positions(SEGMENT_IDS, kernel_size=8, kernel_stride=4)

    @nnx.jit
    def want(layer):
        query = rope.apply(layer.query_norm(layer.query(X)), place)
        key, value = layer.key_norm(layer.key(X)), layer.value(X)
        keys, values = ([x] * 3 if not own else jnp.unstack(x, axis=2) for x in (key, value))
        turned = rope.apply(keys[1], place), rope.apply(keys[2], place)
        first = rope.apply(keys[0], place) if after else keys[0]
        compressed = layer.compress_key(first, SEGMENT_IDS)
        compressed = compressed if after else rope.apply(compressed, at)
        shared = {"segment_ids": SEGMENT_IDS, "implementation": "reference"}
        sizes = {"kernel_size": 8, "kernel_stride": 4}
        pair = compressed, layer.compress_value(values[0], SEGMENT_IDS)
        out, lse = fsa_jax.compressed_attention(
            query, *pair, **sizes, return_residuals=True, **shared
        )
        blocks = fsa_jax.select_blocks(query, pair[0], lse, config=CONFIG, **shared)
        outs = (
            out,
            fsa_jax.selected_attention(query, turned[0], values[1], blocks, block_size=8, **shared),
            fsa_jax.sliding_window_attention(query, turned[1], values[2], window_size=6, **shared),
        )
        gates = jax.nn.sigmoid(layer.gate(X))
        mixed = sum(gates[..., i, None] * out for i, out in enumerate(outs))
        return jnp.where(SEGMENT_IDS[..., None] == 0, 0, layer.out(mixed))

    np.testing.assert_allclose(call(layer, X, SEGMENT_IDS), want(layer), atol=2e-5)


def test_biases_are_where_they_are_asked_for():
    parts = ("query", "key", "value", "out", "gate")

    def having(**options):
        layer = make(**options)
        return {name for name in parts if getattr(layer, name).bias is not None}

    assert having() == set()
    assert having(use_bias=True) == {*parts}
    assert having(qkv_bias=True) == {*parts[:3]}
    assert having(use_bias=True, out_bias=False, gate_bias=False) == {*parts[:3]}
    assert having(gate_bias=True) == {"gate"}
    bias = LAYERS["nsa"](
        4, 24, gate_bias=True, gate_bias_init=nnx.initializers.constant(2.0), rngs=nnx.Rngs(0)
    ).gate.bias
    np.testing.assert_array_equal(bias[...], np.full((4, 3), 2.0))


@pytest.mark.parametrize("kind", LAYERS)
def test_documents_may_be_numbered_from_zero(kind):
    layer, other = make(kind), make(kind, padding_id=-1)
    want = call(layer, X, SEGMENT_IDS)
    np.testing.assert_allclose(call(other, X, SEGMENT_IDS - 1), want, atol=1e-4)
    assert not np.any(want[:, -8:])
    assert np.any(want[:, :21])


class Partial:
    """A user's embedding: RoPE on the first half of the channels."""

    def __eq__(self, other):
        return isinstance(other, Partial)

    def __hash__(self):
        return 0

    def check(self, head_dim):
        if head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")

    def apply(self, x, positions):
        turned, rest = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([RoPE().apply(turned, positions), rest], axis=-1)


@pytest.mark.parametrize("kind", LAYERS)
def test_takes_a_users_rotary_embedding(kind):
    layer = make(kind, rope=Partial())
    got = call(layer, X, SEGMENT_IDS)
    assert np.all(np.isfinite(got))
    assert np.abs(got - call(make(kind), X, SEGMENT_IDS)).max() > 1e-3
    # Positions that differ by a constant give the same output: only differences count.
    moved = call(layer, X, SEGMENT_IDS, fsa_jax.token_positions(SEGMENT_IDS) + 5)
    np.testing.assert_allclose(moved, got, atol=1e-4)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 4, got 6"):
        make(kind, rope=Partial(), head_dim=6)


def test_names_of_parameter_axes_can_be_those_of_another_framework():
    names = {"embed": "embed_attn", "head_dim": None, "kv_heads": "kv", "window": "fsdp_too"}
    layer = make(axis_names=names)
    found = {
        name: getattr(layer, name).kernel.get_metadata("out_sharding") for name in ("query", "key")
    }
    assert found == {"query": ("embed_attn", "heads", None), "key": ("embed_attn", "kv", None)}
    assert layer.compress_key.weights.get_metadata("out_sharding") == ("kv", "fsdp_too", None)
    with sharding_rules(window="data", kv_heads="model"):
        specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(make())))
    assert tuple(specs["compress_key"]["weights"]) == ("model", "data", None)


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_projections_have_names_for_checkpoint_policies(kind):
    layer = make(kind, checkpoint_name="context")
    graphdef, state = nnx.split(layer)

    def saved(*names):
        """Returns how often the forward pass keeps an array of each shape."""
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        function = lambda state, x: nnx.merge(graphdef, state)(x).sum()  # noqa: E731
        function = jax.checkpoint(function, policy=policy)
        kept = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], state, X)
        return Counter(x.shape for x in jax.tree.leaves(kept))

    nothing = saved()
    assert (saved("context") - nothing)[1, LENGTH, 4, 8] >= 1
    for name, heads in zip(PROJECTION_NAMES[:3], (4, 2, 2), strict=True):
        assert saved(name) - nothing == {(1, LENGTH, heads, 8): 1}


@pytest.mark.parametrize("kind", LAYERS)
def test_projections_can_be_computed_by_another_function(kind):
    shapes = []

    def product(lhs, rhs, dimension_numbers, precision=None, **options):
        shapes.append(rhs.shape)
        return 2 * jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, **options)

    layer = make(kind, dot_general=product)
    jax.eval_shape(layer, X)
    projections = 5 if kind == "nsa" else 4
    assert len(shapes) == projections
    np.testing.assert_allclose(layer.query(X), 2 * make(kind).query(X), atol=1e-5)


BAD = [
    ({"qk_norm": 1}, "qk_norm must be True or False, got 1"),
    ({"norm_eps": 0.0}, r"norm_eps must be in \(0, 1\), got 0.0"),
    ({"qkv_bias": "yes"}, "qkv_bias must be True or False, got 'yes'"),
    ({"out_bias": 2}, "out_bias must be True or False, got 2"),
    ({"padding_id": 1.5}, "padding_id must be an integer.* got 1.5"),
    ({"checkpoint_name": ""}, "checkpoint_name must be .*, got ''"),
    ({"rope": 10000.0}, "rope must be None or a RotaryEmbedding.* got 10000.0"),
    ({"dot_general": 3}, "dot_general must be None or a function .* got 3"),
    ({"axis_names": {"width": "x"}}, "axis_names must have keys in .* got 'width'"),
    ({"axis_names": {"embed": 3}}, r"axis_names\['embed'\] must be a string or None, got 3"),
    ({"axis_names": ["embed"]}, r"axis_names must be a dict or None, got \['embed'\]"),
]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **options)


def test_bad_options_of_single_layers_are_named():
    with pytest.raises(ValueError, match="window_size must be an integer of at least 1, got 0"):
        make("window", window_size=0)
    with pytest.raises(ValueError, match="gate_bias must be True or False, got 'x'"):
        make(gate_bias="x")
    with pytest.raises(ValueError, match="compress_after_rope must be True or False, got None"):
        make(compress_after_rope=None)


def test_full_attention_of_the_projections_of_nsa():
    """The bits of a layer of full attention; gates and phi get no gradient; and back again."""
    options: dict[str, Any] = OPTIONS | {"gate_bias": True}
    layer, dense = make(full_attention=True, **options), make("full", **OPTIONS)
    own = nnx.state(layer, nnx.Param)
    nnx.update(dense, {name: x for name, x in own.items() if name not in SPARSE_PARTS})
    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None] + 7
    arrays = (X, SEGMENT_IDS, positions)

    @nnx.jit
    def both(layer):
        return nnx.value_and_grad(lambda layer: (layer(*arrays) ** 2).sum())(layer)

    np.testing.assert_array_equal(call(layer, *arrays), call(dense, *arrays))
    (loss, grads), (wanted, wanted_grads) = both(layer), both(dense)
    assert loss == wanted
    for name in grads:
        for got in jax.tree.leaves(grads[name]):
            assert bool(got.any()) == (name not in SPARSE_PARTS)
    rest = {name: x for name, x in grads.items() if name not in SPARSE_PARTS}
    for a, b in zip(jax.tree.leaves(rest), jax.tree.leaves(dict(wanted_grads)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    model = nnx.List([layer])
    model.set_attributes(full_attention=False)
    np.testing.assert_array_equal(call(layer, *arrays), call(make(**options), *arrays))


def test_what_full_attention_of_nsa_refuses():
    with pytest.raises(ValueError, match=r"full_attention must be .* got 2"):
        make(full_attention=2)
    layer = make(full_attention=True)
    with pytest.raises(NotImplementedError, match="full_attention=True cannot serve a cache"):
        layer(X, cache=layer.init_cache(1, LENGTH))
    layer = make(full_attention=True, kv_per_branch=True)
    with pytest.raises(ValueError, match=r"full_attention=True needs .* got kv_per_branch=True"):
        layer(X)
