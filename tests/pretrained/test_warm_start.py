"""Sparse attention that starts from the weights of a dense model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fsa_jax import NSAConfig
from fsa_jax.pretrained import load_pretrained, warm_start
from pretrained.folders import LLAMA, changed, params_of

#: Ten blocks of 16 tokens cover the 150 tokens of the test.
COVERING = NSAConfig(kernel_size=16, kernel_stride=8, block_size=16, topk=10, window_size=32)
TOKENS = np.random.default_rng(0).integers(0, 512, (1, 150)).astype(np.int32)


@pytest.fixture(scope="module")
def dense():
    return np.asarray(load_pretrained(LLAMA)(TOKENS))


@pytest.mark.essential
def test_closed_gates_compute_the_dense_model(dense):
    model = load_pretrained(LLAMA, attention="nsa", nsa=COVERING)
    bound = 5e-6 * np.abs(dense).max()
    np.testing.assert_allclose(model(TOKENS), dense, rtol=0, atol=bound)
    assert not model.config.compress_after_rope
    gates = jax.nn.sigmoid(params_of(model)["layers", "attention", "gate", "bias"])
    assert (gates[..., 1] == 1).all()
    assert (gates[..., ::2] < 1e-17).all()


@pytest.mark.slow
def test_hybrids_compute_the_dense_model(dense):
    kinds = ("nsa", "full")
    model = load_pretrained(LLAMA, layer_types=kinds, nsa=COVERING)
    bound = 5e-6 * np.abs(dense).max()
    np.testing.assert_allclose(model(TOKENS), dense, rtol=0, atol=bound)
    assert model.config.types == kinds
    gates = [path for path in params_of(model) if "gate" in path and "attention" in path]
    assert {path[:2] for path in gates} == {("layers", "nsa")}


@pytest.mark.slow
def test_windows_that_cover_the_sequence(dense):
    sizes = NSAConfig(window_size=150)
    model = load_pretrained(LLAMA, layer_types=("window", "full"), nsa=sizes)
    bound = 5e-6 * np.abs(dense).max()
    np.testing.assert_allclose(model(TOKENS), dense, rtol=0, atol=bound)
    assert not [path for path in params_of(model) if "compress_key" in path]


@pytest.mark.slow
def test_open_gates_let_every_branch_learn():
    model = load_pretrained(LLAMA, attention="nsa", nsa=COVERING, gates="open")
    gates = jax.nn.sigmoid(params_of(model)["layers", "attention", "gate", "bias"])
    np.testing.assert_allclose(gates, np.broadcast_to([0.05, 0.9, 0.05], gates.shape), rtol=1e-6)
    graphdef, params = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.square(nnx.merge(graphdef, params)(TOKENS)).mean()

    grads = nnx.traversals.flatten_mapping(nnx.to_pure_dict(gradient(params)))
    kernel = np.abs(grads["layers", "attention", "gate", "kernel"]).max(axis=(0, 1, 2))
    assert (kernel > 1e-3 * kernel.max()).all()  # of each of the three branches
    for name in ("compress_key", "compress_value"):
        assert np.abs(grads["layers", "attention", name, "weights"]).max() > 0
    assert np.abs(grads["layers", "attention", "compress_key", "positions"]).max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_phi_starts_as_the_mean(dtype):
    """Every part of the made parameters is that part of what the layer itself starts with."""
    from fsa_jax.nn.compressor import _mean_of_window

    shape = (3, 2, 8 * 4, 4)
    made = warm_start.made(
        ("layers", "attention", "compress_key", "weights"),
        shape,
        "closed",
        jnp.dtype(dtype),
    )
    want = np.broadcast_to(_mean_of_window(jax.random.key(0), shape[1:], dtype), shape)
    for index in (
        tuple(slice(0, n) for n in shape),
        (slice(1, 2), slice(1, 2), slice(3, 9), slice(1, 4)),
    ):
        np.testing.assert_array_equal(made(index), want[index])


def test_gates_of_flash_linear_attention_beside_a_dense_model(tmp_path):
    rng = np.random.default_rng(0)
    gates = {
        f"model.layers.{i}.self_attn.g_proj.weight": rng.normal(size=(24, 64)).astype(np.float32)
        for i in range(2)
    }
    folder = changed(tmp_path / "x", change=lambda tensors: tensors | gates)
    for attention in (None, "full"):
        with pytest.raises(ValueError, match="attention must be 'nsa', with the sizes"):
            load_pretrained(folder, attention=attention)
    model = load_pretrained(folder, attention="nsa", nsa=COVERING)
    assert not model.config.gate_bias
    kernel = np.asarray(params_of(model)["layers", "attention", "gate", "kernel"])  # [L, C, N, 3]
    for layer, weight in enumerate(gates.values()):
        np.testing.assert_array_equal(kernel[layer], weight.reshape(8, 3, 64).transpose(2, 0, 1))
