"""Logits, losses and gradients of checkpoints that transformers wrote."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fsa_jax.pretrained import load_pretrained, names
from pretrained.folders import DATA

FOLDERS = ("llama3", "qwen2", "qwen3")


@functools.cache
def expected(folder):
    with np.load(DATA / folder / "expected.npz") as arrays:
        return dict(arrays)


@pytest.mark.essential
@pytest.mark.fast_cases("llama3")
@pytest.mark.parametrize("folder", FOLDERS)
def test_logits(folder):
    want = expected(folder)
    logits = load_pretrained(DATA / folder)(want["input_ids"])[:, want["positions"]]
    np.testing.assert_allclose(
        logits, want["logits"], rtol=0, atol=5e-5 * np.abs(want["logits"]).max()
    )


@pytest.mark.slow
@pytest.mark.essential_cases("qwen3")
@pytest.mark.parametrize("folder", FOLDERS)
def test_loss_and_gradients(folder):
    want = expected(folder)
    model = load_pretrained(DATA / folder)
    graphdef, params = nnx.split(model)
    ids = jnp.asarray(want["input_ids"])

    @jax.jit
    @jax.value_and_grad
    def loss_and_grads(params):
        logits = nnx.merge(graphdef, params)(ids)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return losses.mean()

    loss, grads = loss_and_grads(params)
    np.testing.assert_allclose(loss, want["loss"], rtol=1e-6)
    found = nnx.traversals.flatten_mapping(nnx.to_pure_dict(grads))
    places = names.places(model.config, {path: leaf.shape for path, leaf in found.items()})
    tensors = {
        names.in_file(name): place.to_tensor(
            np.asarray(found[path][layer] if place.stacked else found[path])
        )
        for path, place in places.items()
        for layer, name in enumerate(place.tensors)
    }
    given = {name.removeprefix("grad."): x for name, x in want.items() if name.startswith("grad.")}
    assert given
    for name, gradient in given.items():
        bound = 5e-5 * np.abs(gradient).max()
        np.testing.assert_allclose(tensors[name], gradient, rtol=0, atol=bound, err_msg=name)
