"""A model with a cache, and texts that it writes: the training forward's, greedy or drawn."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_layers import perturbed
from test_transformer import CONFIG, FULL, TOKENS

from fsa_jax import generate
from fsa_jax.transformer import Transformer

CONFIGS = {
    "nsa": dataclasses.replace(CONFIG, implementation="xla"),
    "full": dataclasses.replace(FULL, tie_embeddings=False),
}
PROMPTS = [[3], [1, 2, 3, 4, 5, 6, 7], list(range(10)) * 2]


def make(name: Any = "nsa", **changes):
    return perturbed(Transformer(dataclasses.replace(CONFIGS[name], **changes), rngs=nnx.Rngs(0)))


@nnx.jit
def call(model, tokens):
    return model(tokens)


@nnx.jit(static_argnames=("fresh", "only_last"))
def extend(model, tokens, cache, num_tokens=None, fresh=False, only_last=False):
    options = {"fresh": fresh, "only_last": only_last}
    return model(tokens, cache=cache, num_tokens=num_tokens, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_model_gives_the_logits_of_the_training_forward(name):
    model, tokens = make(name), jnp.concatenate([TOKENS, TOKENS[:, ::-1]])
    want = call(model, tokens)
    cache, logits = model.init_cache(2, tokens.shape[1]), []
    for start, stop, fresh in ((0, 4, True), (4, 22, False), (22, 23, False), (23, 24, False)):
        part, cache = extend(model, tokens[:, start:stop], cache, fresh=fresh)
        logits.append(part)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), want, atol=1e-5)
    # sequences of different lengths: row 1 has three tokens fewer
    counts = jnp.asarray([18, 15], jnp.int32)
    last, _ = extend(model, tokens[:, :18], cache, counts, fresh=True, only_last=True)
    assert last.shape == (2, 1, 11)
    np.testing.assert_allclose(last[:, 0], want[(0, 1), (17, 14)], atol=1e-5)


def argmax_chain(model, prompt, count):
    """The likeliest token each time, from the training forward over all tokens."""
    tokens = list(prompt)
    for _ in range(count):
        # causal: what stands behind the text changes nothing
        row = jnp.asarray([tokens + [0] * (40 - len(tokens))], jnp.int32)
        tokens.append(int(np.argmax(call(model, row)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_is_the_argmax_chain_of_the_training_forward(name):
    model = make(name)
    texts = generate(model, PROMPTS, max_tokens=16, temperature=0)
    assert texts == [argmax_chain(model, prompt, 16) for prompt in PROMPTS]
    assert len({tuple(text) for text in texts}) == len(texts)
    # a stop ends its own text alone; it is the last of what was added
    stop = texts[1][4:6]
    end = next(i for i in range(2, 17) if texts[1][i - 2 : i] == stop)
    stopped = generate(model, PROMPTS, max_tokens=16, temperature=0, stop=stop)
    assert stopped[1] == texts[1][:end]
    for text, whole in zip(stopped, texts, strict=True):
        assert text == whole[: len(text)]
        assert text[-2:] == stop or len(text) == 16


def test_the_seed_decides_and_texts_do_not_depend_on_one_another():
    model = make()

    def texts(seed, prompts=PROMPTS):
        return generate(model, prompts, max_tokens=12, temperature=1.5, seed=seed)

    first = texts(0)
    assert first == texts(0)
    assert first != texts(1)
    assert texts(0, [PROMPTS[0], [5], [6] * 20])[0] == first[0]
    # equal prompts are drawn apart
    same = texts(0, [PROMPTS[1]] * 3)
    assert len({tuple(text) for text in same}) == 3


def test_stream_shows_each_token_as_it_comes():
    model, shown = make(), []
    stop = generate(model, PROMPTS, max_tokens=8, temperature=0)[1][2:3]
    texts = generate(
        model, PROMPTS, max_tokens=8, temperature=0, stop=stop, stream=lambda t: shown.append(t)
    )
    steps = np.stack(shown)
    assert steps.shape == (max(map(len, texts)), len(PROMPTS))
    for text, column in zip(texts, steps.T, strict=True):
        assert column.tolist() == text + [-1] * (len(steps) - len(text))


class Fixed(Transformer):
    """A model of which every token has the same probabilities, whatever was before."""

    def __init__(self, logits):
        self.config = dataclasses.replace(CONFIGS["nsa"], vocab_size=len(logits))
        self.logits = tuple(logits)

    def init_cache(self, batch, capacity, **options) -> Any:
        return jnp.zeros((), jnp.int32)

    def __call__(self, tokens, *args, cache=None, **options) -> Any:
        logits = jnp.asarray(self.logits, jnp.float32)
        return jnp.broadcast_to(logits[None, None], (len(tokens), 1, len(self.logits))), cache


def shares(logits, **options):
    """How often each token was drawn, of 3200."""
    texts = generate(Fixed(logits), [[0]] * 8, max_tokens=400, **options)
    return np.bincount(np.concatenate(texts), minlength=len(logits)) / 3200


def test_draws_follow_the_probabilities():
    p = np.asarray([0.5, 0.1, 0.3, 0.1])
    logits = np.log(p).tolist()
    np.testing.assert_allclose(shares(logits), p, atol=0.03)
    hot = np.sqrt(p) / np.sqrt(p).sum()
    np.testing.assert_allclose(shares(logits, temperature=2.0), hot, atol=0.03)
    # 0.5 alone is less than 0.6, 0.5 and 0.3 are not
    np.testing.assert_allclose(shares(logits, top_p=0.6), [5 / 8, 0, 3 / 8, 0], atol=0.03)
    np.testing.assert_array_equal(shares(logits, top_p=0.5), [1, 0, 0, 0])
    np.testing.assert_array_equal(shares(logits, top_p=1e-9), [1, 0, 0, 0])
    # of equal ones the lower number counts first
    np.testing.assert_allclose(shares(logits, top_p=0.85)[1], 1 / 9, atol=0.03)
    assert shares(logits, top_p=0.85)[3] == 0
    np.testing.assert_array_equal(shares(logits, temperature=1e-38), [1, 0, 0, 0])
    np.testing.assert_array_equal(shares([*logits, 9.0], vocab_size=4)[4], 0)


BAD = [
    ({"prompts": []}, "prompts must hold at least one prompt, got none"),
    ({"prompts": [[1], []]}, r"prompts\[1\] must have at least one token, got none"),
    ({"prompts": [b""]}, r"prompts\[0\] must have at least one token, got none"),
    ({"prompts": [[1], [11]]}, r"prompts\[1\] must hold tokens in 0 \.\. 10, got 11"),
    ({"prompts": [[-1]]}, r"prompts\[0\] must hold tokens in 0 \.\. 10, got -1"),
    ({"prompts": [[0.5]]}, r"prompts\[0\] must be a sequence of integers, got \[0\.5\]"),
    ({"prompts": ["ab"]}, r"prompts\[0\] must be a sequence of integers, got 'ab'"),
    ({"prompts": [[[1], [2]]]}, r"prompts\[0\] must be a sequence of integers"),
    ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
    ({"temperature": -0.5}, r"temperature must be at least 0 and finite, got -0\.5"),
    ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
    ({"temperature": float("inf")}, "temperature must be at least 0 and finite, got inf"),
    ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
    ({"top_p": 1.5}, r"top_p must be above 0 and at most 1, got 1\.5"),
    ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ({"seed": 2**31}, r"seed must be below 2\*\*31, got 2147483648"),
    ({"stop": [11]}, r"stop must hold tokens in 0 \.\. 10, got 11"),
    ({"vocab_size": 12}, "vocab_size must be at most the model's 11, got 12"),
    ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
    (
        {"prompts": [[1], [1] * 5], "capacity": 8},
        "capacity must hold .* got capacity=8, a prompt of 5 tokens and max_tokens=4",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(make(), **{"prompts": [[1]], "max_tokens": 4} | arguments)


def test_bad_calls_of_the_model():
    model, cache = make(), make().init_cache(1, 24)
    for options, message in [
        ({"cache": cache, "segment_ids": TOKENS}, "segment_ids must not be given with a cache"),
        ({"cache": cache, "dropout_key": TOKENS}, "dropout_key must not be given with a cache"),
        ({"only_last": True}, "only_last must not be given without a cache, got True"),
        ({"cache": make(num_layers=1).init_cache(1, 24)}, "have layers=2, got layers=1"),
        ({"cache": make("full").init_cache(1, 24)}, "have kind=NSACache, got kind=KVCache"),
        ({"cache": model.init_cache(2, 24)}, "have sequences=1, got sequences=2"),
        ({"cache": model.init_cache(1, 20)}, "room for 20 tokens of sequence 0, .* get 24 more"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(TOKENS, **options)


def test_a_model_that_cannot_serve_a_cache():
    with pytest.raises(NotImplementedError, match="implementation='reference' cannot serve"):
        generate(make(implementation="reference"), [[1]], max_tokens=2)
