"""Common styles of training loops all give the same loss, gradients and next parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fsa_jax import NSAConfig
from fsa_jax.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=17,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    nsa=NSAConfig(
        kernel_size=8,
        kernel_stride=4,
        block_size=8,
        topk=3,
        init_blocks=1,
        local_blocks=1,
        window_size=8,
    ),
)
ROWS, LENGTH = 8, 40
TOKENS = jax.random.randint(jax.random.key(0), (ROWS, LENGTH), 0, 17, jnp.int32)
SEGMENT_IDS = jnp.asarray([np.repeat([1, 2, 3, 0], [20 - i, 11, 5 + i, 4]) for i in range(ROWS)])
SEGMENT_IDS = SEGMENT_IDS.astype(jnp.int32)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)  # Adam's first step would hide all but signs


def make(**changes):
    return Transformer(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def loss_of_logits(logits, tokens, segment_ids):
    """Next-token cross entropy within documents, divided by all tokens of the sequences."""
    counts = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.sum(losses * counts.astype(jnp.float32)) / tokens.size


def train_step(graphdef, average=lambda x: x):
    """A functional step from (params, opt_state, batch) to (params, opt_state, loss, gradients)."""

    def step(params, opt_state, tokens, segment_ids):
        def loss(params):
            logits = nnx.merge(graphdef, params)(tokens, segment_ids)
            return loss_of_logits(logits, tokens, segment_ids)

        loss, gradients = average(jax.value_and_grad(loss)(params))
        updates, opt_state = OPTIMIZER.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, gradients

    return step


def jit_loop(model):
    graphdef, params = nnx.split(model)
    step = jax.jit(train_step(graphdef), donate_argnums=(0, 1))
    # Copy the parameters, because donation takes their buffers.
    params = jax.tree.map(jnp.copy, params)
    params, _, loss, gradients = step(params, OPTIMIZER.init(params), TOKENS, SEGMENT_IDS)
    return loss, gradients, params


def pmap_loop(model):
    """Data parallelism over 8 devices, with one sequence each."""
    graphdef, params = nnx.split(model)
    step = train_step(graphdef, average=lambda x: jax.lax.pmean(x, "data"))
    step = jax.pmap(step, axis_name="data", in_axes=(None, None, 0, 0))
    batch = TOKENS[:, None], SEGMENT_IDS[:, None]
    params, _, loss, gradients = step(params, OPTIMIZER.init(params), *batch)
    assert loss.shape == (8,)
    return jax.tree.map(lambda x: x[3], (loss, gradients, params))


def nnx_loop(model):
    """The usual nnx style: stateful modules and optimizer under nnx.jit."""
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens, segment_ids):
        def loss(model):
            return loss_of_logits(model(tokens, segment_ids), tokens, segment_ids)

        loss, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return loss, gradients

    loss, gradients = step(model, optimizer, TOKENS, SEGMENT_IDS)
    return loss, gradients, nnx.state(model)


class PythonLoop(nnx.Module):
    """The same model with a Python loop over layers instead of a scan."""

    def __init__(self, model):
        self.model = model

    def __call__(self, tokens, segment_ids):
        x = self.model.embedding(tokens)
        for index in range(self.model.config.num_layers):
            x = self.model.layer(index)(x, segment_ids)
        return self.model.norm(x) @ self.model.embedding.embedding[...].T


def python_loop(model):
    loss, gradients, params = jit_loop(PythonLoop(model))
    return loss, gradients["model"], params["model"]


LOOPS = {
    "pmap": lambda: pmap_loop(make()),
    "nnx.jit": lambda: nnx_loop(make()),
    "jax.checkpoint": lambda: jit_loop(make(remat=True)),
    "python loop over layers": lambda: python_loop(make()),
}


@pytest.fixture(scope="module")
def expected():
    """Returns loss, gradients and next parameters under jax.jit, with a scan over layers."""
    return jit_loop(make())


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_loops_agree(loop, expected):
    got_loss, *got_trees = LOOPS[loop]()
    want_loss, *want_trees = expected
    assert float(got_loss) == pytest.approx(float(want_loss), rel=1e-6)
    for got, want in zip(got_trees, want_trees, strict=True):
        jax.tree.map(assert_near, nnx.to_pure_dict(got), nnx.to_pure_dict(want))


def assert_near(got, want):
    assert got.shape == want.shape
    assert np.any(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("kept", [True, False])
def test_remat_keeps_attention_and_not_the_mlp(kept):
    """With remat, the backward scan gets attention's named results, but not those of the MLP."""
    graphdef, params = nnx.split(make(remat=kept))

    def pull(params):
        return jax.vjp(lambda p: nnx.merge(graphdef, p)(TOKENS, SEGMENT_IDS).sum(), params)[1]

    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(pull, params))]
    if kept:
        assert (2, ROWS, LENGTH, 2, 3) in shapes  # block_indices of 2 layers
    assert ((2, ROWS, LENGTH, CONFIG.mlp_dim) in shapes) != kept


@pytest.mark.fast_cases("full")
@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_steps_lower_the_loss(attention):
    graphdef, params = nnx.split(make(attention=attention, num_layers=1))
    step, opt_state = jax.jit(train_step(graphdef)), OPTIMIZER.init(params)
    losses = []
    for _ in range(20):
        params, opt_state, loss, _ = step(params, opt_state, TOKENS, SEGMENT_IDS)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
