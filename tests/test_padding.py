"""The contents of padding change nothing, be it NaN, infinity, huge numbers or invalid tokens.

This holds for padded positions of every argument and every cotangent. Results elsewhere and all
gradients must be bitwise the same as with ordinary numbers in the padding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from util import assert_same_bits, normal

import fsa_jax
from fsa_jax.layers import FullAttention, NativeSparseAttention
from fsa_jax.semantics import segments
from fsa_jax.training import next_byte_loss
from fsa_jax.transformer import Transformer, TransformerConfig

WINDOWS = {"kernel_size": 8, "kernel_stride": 4}
CONFIG = fsa_jax.NSAConfig(
    **WINDOWS, block_size=16, topk=3, init_blocks=1, local_blocks=1, window_size=7
)
IDS = np.repeat(*np.transpose([(0, 3), (1, 30), (0, 5), (2, 6), (3, 21), (0, 7)]))[None]
PADDING = IDS == 0
SEGMENT_IDS = jnp.asarray(IDS, jnp.int32)
POISON = (np.nan, np.inf, -np.inf, 3e38)


def poisoned(x, where, poison):
    where = np.asarray(where)
    return jnp.where(where.reshape(*where.shape, *(1,) * (x.ndim - 2)), poison, x)


def empty_slots():
    """Returns the mask of compressed slots that hold no window, bool [1, M]."""
    segment_info = segments.describe_segments(SEGMENT_IDS, *IDS.shape)
    return np.asarray(segments.describe_windows(segment_info, 8, 4).start) >= IDS.size


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_operator(implementation):
    """Fills gates, cotangents, queries, keys, and compressed keys in slots without a window.

    For the kernels, see pallas/test_range_attention.py.
    """

    @jax.jit
    def run(dout, *args):
        operator = functools.partial(
            fsa_jax.native_sparse_attention,
            config=CONFIG, segment_ids=SEGMENT_IDS, implementation=implementation,
        )  # fmt: skip
        out, pullback = jax.vjp(operator, *args)
        return out, pullback(dout)

    length = IDS.size
    heads = [(length, 4), (length, 4), *[(length, 2)] * 2, *[(length // 4, 2)] * 2]
    arrays = [normal(i, 1, *shape, 8) for i, shape in enumerate(heads)]
    arrays.append(normal(9, 1, length, 4, 3))
    nowhere = [PADDING] * 4 + [empty_slots()] * 2 + [PADDING]
    wanted = run(*arrays)
    for poison in POISON:
        dirty = (poisoned(x, at, poison) for x, at in zip(arrays, nowhere, strict=True))
        assert_same_bits(run(*dirty), wanted)
    for gradient, at in zip(wanted[1], nowhere[1:], strict=True):
        assert np.isfinite(gradient).all()
        assert np.any(gradient)
        assert not np.any(np.asarray(gradient)[at])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_selection(implementation):
    """For the kernels, see pallas/test_block_selection.py."""
    run = jax.jit(
        functools.partial(
            fsa_jax.select_blocks,
            config=CONFIG, segment_ids=SEGMENT_IDS, implementation=implementation,
        )
    )  # fmt: skip
    query, key, lse = (normal(i, 1, *x) for i, x in enumerate(((72, 4, 8), (18, 2, 8), (72, 4))))
    wanted = run(query, key, lse)
    assert np.all(np.asarray(wanted)[PADDING] == -1)
    nowhere = (PADDING, empty_slots(), PADDING)
    for poison in POISON:
        dirty = zip((query, key, lse), nowhere, strict=True)
        assert_same_bits(run(*(poisoned(x, at, poison) for x, at in dirty)), wanted)


LAYERS = {
    "nsa": lambda: NativeSparseAttention(
        4, 16, num_kv_heads=2, config=CONFIG, compression="mlp", kv_per_branch=True, use_bias=True,
        implementation="reference", rngs=nnx.Rngs(0),
    ),
    "full": lambda: FullAttention(4, 16, num_kv_heads=2, use_bias=True, rngs=nnx.Rngs(0)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers(name):
    """Fills the input, positions and cotangents; checks gradients of parameters and input."""
    graphdef, state = nnx.split(LAYERS[name]())

    @jax.jit
    def run(x, dy, positions):
        def call(state, x):
            return nnx.merge(graphdef, state)(x, SEGMENT_IDS, positions)

        y, pullback = jax.vjp(call, state, x)
        blocks = None
        if name == "nsa":
            blocks = nnx.merge(graphdef, state).selected_blocks(x, SEGMENT_IDS, positions)
        return y, blocks, pullback(dy)

    x, dy = normal(0, 1, IDS.size, 16), normal(1, 1, IDS.size, 16)
    positions = jnp.arange(IDS.size, dtype=jnp.int32)[None]
    wanted = run(x, dy, positions)
    for poison in POISON:
        dirty = (poisoned(array, PADDING, poison) for array in (x, dy))
        assert_same_bits(run(*dirty, poisoned(positions, PADDING, 2**31 - 1)), wanted)
    dx = np.asarray(wanted[-1][1])
    assert np.any(dx)
    assert not np.any(dx[PADDING])


MODELS = {
    name: TransformerConfig(
        num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16,
        vocab_size=20, attention=name, nsa=CONFIG,
        implementation="reference" if name == "nsa" else None,
    )
    for name in ("nsa", "full")
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 20, IDS.shape)


def with_pads(token):
    return jnp.asarray(np.where(PADDING, token, TOKENS), jnp.int32)


@pytest.mark.fast_cases("full")
@pytest.mark.parametrize("name", MODELS)
def test_the_model_and_the_loss(name):
    """Fills padding with tokens outside the vocabulary, and the cotangents of its logits."""
    graphdef, params = nnx.split(Transformer(MODELS[name], rngs=nnx.Rngs(0)))

    @jax.jit
    def run(tokens, dlogits):
        def logits(params):
            return nnx.merge(graphdef, params)(tokens, SEGMENT_IDS)

        out, pullback = jax.vjp(logits, params)
        loss = lambda out: next_byte_loss(out, tokens, SEGMENT_IDS)[0]  # noqa: E731
        return out, pullback(dlogits), jax.value_and_grad(loss)(out)

    dlogits = normal(1, *IDS.shape, 20)
    wanted = run(with_pads(0), dlogits)
    assert not np.any(np.asarray(wanted[0])[PADDING])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(wanted))
    for token, poison in ((19, 0), (20, np.nan), (-1, np.inf), (2**31 - 1, 3e38)):
        assert_same_bits(run(with_pads(token), poisoned(dlogits, PADDING, poison)), wanted)


def test_one_block_of_a_model():
    block = Transformer(MODELS["full"], rngs=nnx.Rngs(0)).layer(0)
    graphdef, params = nnx.split(block)

    @jax.jit
    def run(x):
        call = lambda params, x: nnx.merge(graphdef, params)(x, SEGMENT_IDS)  # noqa: E731
        y, pullback = jax.vjp(call, params, x)
        return y, pullback(poisoned(jnp.ones_like(y), PADDING, 0))

    x = normal(0, 1, IDS.size, 16)
    wanted = run(x)
    for poison in POISON:
        assert_same_bits(run(poisoned(x, PADDING, poison)), wanted)


@pytest.mark.fast_cases("full-False")
@pytest.mark.parametrize(("name", "fresh"), [("nsa", True), ("full", False)])
def test_a_model_with_a_cache(name, fresh):
    """Fills tokens beyond `num_tokens`, including all tokens of a sequence that gets none."""
    config = dataclasses.replace(MODELS[name], implementation=None, num_layers=1)
    graphdef, params = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    counts = jnp.asarray([5, 0, 12], jnp.int32)
    there = np.arange(12)[None] < np.asarray(counts)[:, None]

    @jax.jit
    def run(tokens):
        def call(params):
            model = nnx.merge(graphdef, params)
            options = {"num_tokens": counts, "fresh": fresh, "only_last": fresh}
            return model(tokens, cache=model.init_cache(3, 32), **options)

        logits, pullback, cache = jax.vjp(call, params, has_aux=True)
        return logits, cache, pullback(jnp.ones_like(logits))

    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 20, (3, 12)), jnp.int32)
    wanted = run(tokens)
    given = np.asarray(counts)[:, None] > 0 if fresh else there
    np.testing.assert_array_equal(np.any(wanted[0], axis=-1), given)
    for token in (20, -1):
        assert_same_bits(run(jnp.where(there, tokens, token)), wanted)


@pytest.mark.parametrize("token", [20, -1, -(2**31)])
def test_tokens_outside_the_vocabulary(token):
    """Outside jit they raise, also in calls with a cache; inside jit they give NaN."""
    model = Transformer(MODELS["full"], rngs=nnx.Rngs(0))
    tokens = jnp.zeros((1, 4), jnp.int32).at[0, 2].set(token)
    ids = jnp.asarray([[1, 1, 1, 0]], jnp.int32)
    message = rf"tokens must be in 0 \.\. 19 wherever they are not padding, got {token}"
    with pytest.raises(ValueError, match=message):
        model(tokens, ids)
    with pytest.raises(ValueError, match=message):
        model(tokens, cache=model.init_cache(1, 8))
    with pytest.raises(ValueError, match=message):
        next_byte_loss(jnp.zeros((1, 4, 20)), tokens, ids)
    logits = nnx.jit(lambda model, tokens: model(tokens, ids))(model, tokens)
    assert np.isnan(logits[0, 2]).all()
    assert not np.any(logits[0, 3])
    assert np.isnan(jax.jit(next_byte_loss)(jnp.zeros((1, 4, 20)), tokens, ids)[0])


def test_the_loss_of_negative_ids_is_that_of_padding():
    logits = poisoned(normal(0, 1, 6, 20), [[0, 0, 0, 1, 1, 1]], jnp.nan)
    tokens = jnp.asarray([[3, 4, 5, 99, 99, 99]], jnp.int32)
    loss = jax.jit(jax.value_and_grad(next_byte_loss, has_aux=True))
    for pad in (0, -7):
        (total, count), gradient = loss(logits, tokens, jnp.asarray([[1] * 3 + [pad] * 3]))
        assert count == 2
        assert np.isfinite(total)
        assert np.isfinite(gradient).all()
