"""The chunked cross-entropy: against float64, its gradients, meshes, memory, and errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from util import assert_same_bits

import fsa_jax
from fsa_jax import cross_entropy
from fsa_jax.transformer import Transformer, TransformerConfig

B, T, C, V = 2, 12, 8, 37


def arrays(dtype: Any = jnp.float32, seed: int = 0):
    rng = np.random.default_rng(seed)
    x, head = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, T, C), (V, C)))
    labels = jnp.asarray(rng.integers(0, V, size=(B, T)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, size=(B, T)) / 2, jnp.float32)
    return x, head, labels, weights


def dense(x, head, labels, weights):
    """The definition, in float64 with numpy; its sum's gradients for x and head by hand."""
    x, head, weights = (np.asarray(y, np.float64) for y in (x, head, weights))
    logits = x @ head.T
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    right = np.eye(V)[np.asarray(labels)]
    losses = -weights * np.log((probabilities * right).sum(-1))
    dlogits = weights[..., None] * (probabilities - right)
    return losses, dlogits @ head, np.einsum("btv,btc->vc", dlogits, x)


def total(x, head, labels, weights, **options):
    return cross_entropy(x, head, labels, weights, **options).sum()


@pytest.mark.parametrize("chunk_size", [1, 5, 8, 24, 2048])
def test_against_the_definition(chunk_size):
    """Also where the chunks do not divide the tokens."""
    given = arrays()
    losses, *grads = dense(*given)
    options = {"chunk_size": chunk_size}
    np.testing.assert_allclose(cross_entropy(*given, **options), losses, rtol=1e-5, atol=1e-6)
    got = jax.jit(jax.grad(functools.partial(total, **options), (0, 1)))(*given)
    for a, b in zip(got, grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    assert_same_bits(got, jax.jit(jax.grad(functools.partial(total, **options), (0, 1)))(*given))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits(dtype):
    """As exact as a loss with all logits in float32, even for a mean over very many tokens."""
    x, head, labels, weights = arrays(dtype)
    scale = 2.0**-20
    grads = jax.grad(lambda *xs: scale * total(xs[0], xs[1], labels, weights, chunk_size=5), (0, 1))
    got = grads(x, head.astype(jnp.float32))
    assert [y.dtype for y in got] == [dtype, jnp.float32]
    expected = dense(x, head, labels, weights)
    np.testing.assert_allclose(cross_entropy(x, head, labels, weights), expected[0], atol=1e-5)
    for a, b in zip(got, expected[1:], strict=True):
        # the smallest float16 is 6e-8, of gradients of 1e-6
        np.testing.assert_allclose(np.asarray(a, np.float64) / scale, b, atol=0.06)
        assert np.abs(np.asarray(a, np.float64)).max() > 0.5 * scale * np.abs(b).max()


def test_nothing_comes_from_tokens_without_weight():
    x, head, labels, weights = arrays()
    out = weights == 0
    assert out.any()
    dirty = jnp.where(out[..., None], jnp.nan, x)
    far = jnp.where(out, 10**6, labels)
    for options in ({"chunk_size": 5}, {}):
        value = jax.value_and_grad(functools.partial(total, **options), (0, 1))
        assert_same_bits(value(x, head, labels, weights), value(dirty, head, far, weights))


def test_masks_and_no_weights():
    x, head, labels, weights = arrays()
    every = jnp.ones_like(weights)
    assert_same_bits(cross_entropy(x, head, labels), cross_entropy(x, head, labels, every))
    mask = weights > 0
    expected = cross_entropy(x, head, labels, mask.astype(jnp.float32))
    assert_same_bits(cross_entropy(x, head, labels, mask), expected)
    assert_same_bits(cross_entropy(x[0, 0], head, labels[0, 0]), expected[0, 0] * 0 + (
        cross_entropy(x, head, labels)[0, 0]))  # fmt: skip


def test_a_label_outside_the_vocabulary_is_nan_in_jit():
    x, head, labels, _ = arrays()
    for wrong in (-1, V):
        losses = jax.jit(cross_entropy)(x, head, labels.at[0, 3].set(wrong))
        assert np.isnan(losses[0, 3])
        assert np.isnan(losses).sum() == 1


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x, head, labels, weights = arrays(jnp.float64)
        losses = cross_entropy(x, head, labels, weights.astype(jnp.float64), chunk_size=5)
        np.testing.assert_allclose(losses, dense(x, head, labels, weights)[0], rtol=1e-12)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("axes", [P("data"), P("data", "sequence"), P(None, ("sequence", "data"))])
def test_over_a_mesh(kind, axes):
    """The same numbers, and each device sees only its own tokens."""
    kinds = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(kinds[kind],) * 2)
    given = arrays()
    specs = (P(*axes, *(None,) * (2 - len(axes)), None), P("data"), axes, axes)
    x, head, labels, weights = given
    head = jnp.concatenate([head, head[:1]])
    given = (x, head, labels, weights)
    placed = [jax.device_put(y, NamedSharding(mesh, s)) for y, s in zip(given, specs, strict=True)]
    options = {"chunk_size": 3} | ({"mesh": mesh, "spec": axes} if kind == "auto" else {})
    function = jax.jit(jax.value_and_grad(functools.partial(total, **options), (0, 1)))
    with jax.sharding.set_mesh(mesh):
        compiled = function.lower(*placed).compile()
    got, expected = compiled(*placed), jax.value_and_grad(total, (0, 1))(*given)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    text = str(compiled.as_text())
    assert f"f32[3,{V + 1}]" in text
    assert f"f32[6,{V + 1}]" not in text


def test_memory_is_that_of_a_chunk():
    """8192 tokens and a vocabulary of 4096: far less than the 128 MiB of all logits."""
    tokens, width, entries, chunk = 8192, 16, 4096, 256
    shapes = (
        jax.ShapeDtypeStruct((1, tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((entries, width), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens), jnp.bool),
    )
    function = jax.value_and_grad(functools.partial(total, chunk_size=chunk), (0, 1))
    found = jax.jit(function).lower(*shapes).compile().memory_analysis()
    arrays_ = 4 * (3 * tokens * width + 3 * entries * width + 8 * tokens)
    assert found is not None
    assert found.temp_size_in_bytes < 3 * 4 * chunk * entries + arrays_


@pytest.mark.parametrize("tied", [True, False])
def test_states_and_head_of_a_model(tied):
    """They give the logits of a call, and 0 at padding."""
    config = TransformerConfig(
        vocab_size=V, num_layers=1, embed_dim=16, num_heads=2, attention="full", tie_embeddings=tied
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    tokens = arrays()[2]
    ids = jnp.ones_like(tokens).at[0, 7:].set(0)
    x = model.hidden_states(tokens, ids)
    assert not x[0, 7:].any()
    logits = jnp.einsum("btc,vc->btv", x, model.head_weight)
    np.testing.assert_allclose(logits, model(tokens, ids), rtol=1e-5, atol=1e-6)


def test_under_vmap():
    x, head, labels, weights = arrays()
    mapped = jax.vmap(functools.partial(cross_entropy, chunk_size=5), (0, None, 0, 0))
    expected = cross_entropy(x, head, labels, weights)
    np.testing.assert_allclose(mapped(x, head, labels, weights), expected, rtol=1e-6)


def test_as_optax_computes_it():
    x, head, labels, _ = arrays()
    logits = jnp.einsum("btc,vc->btv", x, head)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(cross_entropy(x, head, labels), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((B, T, C), jnp.int32)}, "x must be an array of floats .* got int32"),
        ({"x": jnp.zeros((B, T, 9))}, r"x must have the features C .* got x of shape \[2, 12, 9\]"),
        ({"head": jnp.zeros((V,))}, r"head must have shape \[V C\]"),
        ({"labels": jnp.zeros((B, 3), jnp.int32)}, r"labels must .*\[2, 12\].* got \[2, 3\]"),
        ({"labels": jnp.zeros((B, T))}, "labels must have an integer dtype .* got float32"),
        ({"labels": jnp.full((B, T), V, jnp.int32)}, r"labels must be in 0 .. 36 .* got 37"),
        ({"weights": jnp.ones((B, T), jnp.int32)}, "weights must be floats or bools, got int32"),
        ({"weights": 1.0}, r"weights must be an array .* got 1\.0"),
        ({"chunk_size": 0}, "chunk_size must be .* got 0"),
        ({"spec": P("data")}, "spec must come with a mesh"),
    ],
)
def test_bad_arguments(changes, message):
    x, head, labels, weights = arrays()
    given = {"x": x, "head": head, "labels": labels, "weights": jnp.ones_like(weights)}
    with pytest.raises(ValueError, match=message):
        fsa_jax.cross_entropy(**given | changes)


@pytest.mark.parametrize("spec", [P("model"), P(None, None, "data"), P(None, "data")])
def test_a_spec_that_does_not_fit(spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match="spec must"):
        cross_entropy(*arrays(), mesh=mesh, spec=spec)
