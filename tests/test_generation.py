"""Generation with a cache matches the training forward pass, both greedy and sampled."""

import contextlib
import dataclasses
import re
import signal
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_layers import perturbed
from small_transformers import CONFIG, FULL, TOKENS

from fsa_jax import generate, generation
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


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_model_gives_the_logits_of_the_training_forward(name):
    model, tokens = make(name), jnp.concatenate([TOKENS, TOKENS[:, ::-1]])
    want = call(model, tokens)
    cache, logits = model.init_cache(2, tokens.shape[1]), []
    for start, stop, fresh in ((0, 4, True), (4, 22, False), (22, 23, False), (23, 24, False)):
        part, cache = extend(model, tokens[:, start:stop], cache, fresh=fresh)
        logits.append(part)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), want, atol=1e-5)
    # sequences of different lengths: sequence 1 has three tokens fewer
    counts = jnp.asarray([18, 15], jnp.int32)
    last, _ = extend(model, tokens[:, :18], cache, counts, fresh=True, only_last=True)
    assert last.shape == (2, 1, 11)
    np.testing.assert_allclose(last[:, 0], want[(0, 1), (17, 14)], atol=1e-5)


def argmax_chain(model, prompt, count):
    """Greedy decoding by running the training forward pass over all tokens at each step."""
    tokens = list(prompt)
    for _ in range(count):
        # attention is causal, so what follows the text does not matter
        row = jnp.asarray([tokens + [0] * (40 - len(tokens))], jnp.int32)
        tokens.append(int(np.argmax(call(model, row)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.fast_cases("full")
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_is_the_argmax_chain_of_the_training_forward(name):
    model = make(name)
    texts = generate(model, PROMPTS, max_tokens=16, temperature=0)
    assert texts == [argmax_chain(model, prompt, 16) for prompt in PROMPTS]
    assert len({tuple(text) for text in texts}) == len(texts)
    # a stop token ends only its own sequence, and is the last token added to it
    stop = texts[1][4:6]
    end = next(i for i in range(2, 17) if texts[1][i - 2 : i] == stop)
    stopped = generate(model, PROMPTS, max_tokens=16, temperature=0, stop=stop)
    assert stopped[1] == texts[1][:end]
    for text, whole in zip(stopped, texts, strict=True):
        assert text == whole[: len(text)]
        assert text[-2:] == stop or len(text) == 16


def test_end_tokens_end_each_sequence():
    model = make("full")
    texts = generate(model, PROMPTS, max_tokens=16, temperature=0)
    ends = [texts[0][3], texts[1][5]]
    ended = generate(model, PROMPTS, max_tokens=16, temperature=0, end_tokens=ends)
    for text, whole in zip(ended, texts, strict=True):
        first = next((i for i, token in enumerate(whole) if token in ends), 15)
        assert text == whole[: first + 1]
    assert len(ended[0]) <= 4


@pytest.mark.slow
def test_the_seed_decides_and_texts_do_not_depend_on_one_another():
    model = make()

    def texts(seed, prompts=PROMPTS):
        return generate(model, prompts, max_tokens=12, temperature=1.5, seed=seed)

    first = texts(0)
    assert first == texts(0)
    assert first != texts(1)
    assert texts(0, [PROMPTS[0], [5], [6] * 20])[0] == first[0]
    # equal prompts get different samples
    same = texts(0, [PROMPTS[1]] * 3)
    assert len({tuple(text) for text in same}) == 3


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_error_of_the_stream_ends_the_text_and_keeps_its_type():
    model, shown = make(), []

    class Enough(Exception):
        pass

    def stream(tokens):
        shown.append(tokens)
        if len(shown) == 3:
            raise Enough("three")

    with pytest.raises(Enough, match="three"):
        generate(model, PROMPTS, max_tokens=1000, temperature=0, stream=stream)
    assert len(shown) == 3
    # the state of the device is unchanged
    texts = generate(model, PROMPTS, max_tokens=3, temperature=0)
    assert texts == np.stack(shown, axis=1).tolist()


@contextlib.contextmanager
def interrupted_after(seconds):
    """Raises in Python what Ctrl-C would raise, using another signal."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_ctrl_c_is_heard_at_once():
    """Ctrl-C interrupts both a decode that would take hours and a prefill on the device."""
    model = Fixed([0.0] * 8, rounds=60_000)
    generate(model, [[0]], max_tokens=2)  # compiles the programs
    for prompt, stream in ((0, None), (0, lambda _: None), (1, None)):
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt), interrupted_after(0.5):
            generate(model, [[prompt]], max_tokens=10**8, stream=stream)
        assert time.monotonic() - start < 1.5


class Clock:
    """A simulated clock that advances only during sleep."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Asked:
    """A simulated device call that starts after the previous call and takes `seconds`."""

    def __init__(self, clock, seconds, before=None):
        self.clock, self.end = clock, max(clock.now, before.end if before else 0) + seconds

    def is_ready(self):
        return self.clock.now >= self.end

    def __array__(self, dtype=None, copy=None):
        return np.zeros((1, 1), np.int32)


@pytest.mark.parametrize(("seconds", "most"), [(1e-5, 128), (0.03, 3), (0.3, 1)])
def test_the_device_is_asked_for_a_tenth_of_a_second_at_a_time(seconds, most, monkeypatch):
    """Short chunks free the device soon after Ctrl-C; cheap steps are batched, not run singly."""
    clock, asked, texts = Clock(), [], types.SimpleNamespace(active=np.ones(1, bool))
    monkeypatch.setattr(generation, "time", clock)

    def add(before, texts, steps):
        asked.append(int(steps))
        call = Asked(clock, seconds * int(steps), before)
        return call, texts, call

    for part in generation._chunks(lambda: (None, texts, Asked(clock, 0.0)), add, 1000, 128):
        assert part.shape == (1, 1)
    assert sum(asked) == 999  # prefill gave the remaining token
    assert most - 1 <= max(asked[3:]) <= most


@pytest.mark.slow
def test_calls_of_similar_sizes_share_their_programs(caplog):
    model = Fixed([0.5] * 11)  # a model that no other test has compiled

    def programs(**options):
        caplog.clear()
        with jax.log_compiles():
            generate(model, **{"prompts": PROMPTS, "max_tokens": 9} | options)
        return re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)

    assert programs()[-2:] == ["_prefill", "_decode"]
    for options in [
        {"max_tokens": 1},
        {"max_tokens": 44},
        {"prompts": [*PROMPTS, [1] * 30]},
        {"seed": 5, "temperature": 0.3, "stop": [1, 2, 3], "capacity": 1000},
        {"stream": lambda tokens: None},
        {"stream": lambda tokens: 1, "stop": [4], "capacity": 64},
    ]:
        assert programs(**options) == []
    # A longer prompt or a larger capacity compiles a new program, which then serves all sizes up to
    # twice as large.
    programs(max_tokens=150)
    assert programs(max_tokens=170) == []
    lengths = [1, 64, 65, 192, 193, 256, 257, 300, 385, 70000]
    rounded = [64, 64, 128, 192, 256, 256, 384, 384, 512, 98304]
    assert [generation._round_up(n) for n in lengths] == rounded


class Fixed(Transformer):
    """A model whose next-token distribution is the same for every context."""

    def __init__(self, logits, rounds=0):
        self.config = dataclasses.replace(CONFIGS["nsa"], vocab_size=len(logits))
        self.logits, self.rounds = tuple(logits), rounds

    def init_cache(self, batch, capacity, **options) -> Any:
        return jnp.zeros((), jnp.int32)

    def __call__(self, tokens, *args, cache=None, **options) -> Any:
        logits = jnp.asarray(self.logits, jnp.float32)
        if options.get("fresh"):
            # the time that a prompt takes is proportional to this
            rounds = self.rounds * tokens[0, 0]
            x = jax.lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(x @ x), jnp.eye(64))
            cache += x[0, 1].astype(jnp.int32)
        return jnp.broadcast_to(logits[None, None], (len(tokens), 1, len(self.logits))), cache


def shares(logits, **options):
    """Returns the fraction of 3200 samples that drew each token."""
    texts = generate(Fixed(logits), [[0]] * 8, max_tokens=400, **options)
    return np.bincount(np.concatenate(texts), minlength=len(logits)) / 3200


def test_draws_follow_the_probabilities():
    p = np.asarray([0.5, 0.1, 0.3, 0.1])
    logits = np.log(p).tolist()
    np.testing.assert_allclose(shares(logits), p, atol=0.03)
    hot = np.sqrt(p) / np.sqrt(p).sum()
    np.testing.assert_allclose(shares(logits, temperature=2.0), hot, atol=0.03)
    # 0.5 alone is less than 0.6; 0.5 and 0.3 together are not
    np.testing.assert_allclose(shares(logits, top_p=0.6), [5 / 8, 0, 3 / 8, 0], atol=0.03)
    np.testing.assert_array_equal(shares(logits, top_p=0.5), [1, 0, 0, 0])
    np.testing.assert_array_equal(shares(logits, top_p=1e-9), [1, 0, 0, 0])
    # among equal probabilities, the lower token id comes first
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
    ({"prompts": b"abc"}, r"prompts must be a sequence of prompts, each .* got b'abc'"),
    ({"prompts": "abc"}, r"prompts must be a sequence of prompts, each .* got 'abc'"),
    ({"prompts": 7}, "prompts must be a sequence of prompts, each .* got 7"),
    ({"prompts": None}, "prompts must be a sequence of prompts, each .* got None"),
    ({"prompts": [1, 2]}, r"prompts\[0\] must be a sequence of integers, got 1"),
    ({"prompts": [[1], None]}, r"prompts\[1\] must be a sequence of integers, got None"),
    ({"prompts": [[1, None]]}, r"prompts\[0\] must be a sequence of integers, got \[1, None\]"),
    ({"prompts": [[[1], [2, 3]]]}, r"prompts\[0\] must be a sequence of integers, got \[\[1\], "),
    ({"prompts": [[True]]}, r"prompts\[0\] must be a sequence of integers, got \[True\]"),
    ({"prompts": [""]}, r"prompts\[0\] must be a sequence of integers, got ''"),
    ({"prompts": [[2**70]]}, r"prompts\[0\] must be a sequence of integers, got \[1180591620717"),
    ({"stop": 10}, "stop must be a sequence of integers, got 10"),
    ({"stop": "ab"}, "stop must be a sequence of integers, got 'ab'"),
    ({"stop": None}, "stop must be a sequence of integers, got None"),
    ({"stop": [[]]}, r"stop must be a sequence of integers, got \[\[\]\]"),
    ({"max_tokens": "4"}, "max_tokens must be an integer of at least 1, got '4'"),
    ({"max_tokens": 4.0}, r"max_tokens must be an integer of at least 1, got 4\.0"),
    ({"max_tokens": True}, "max_tokens must be an integer of at least 1, got True"),
    ({"temperature": "hot"}, "temperature must be at least 0 and finite, got 'hot'"),
    ({"temperature": None}, "temperature must be at least 0 and finite, got None"),
    ({"top_p": [0.5]}, r"top_p must be above 0 and at most 1, got \[0\.5\]"),
    ({"seed": 1.0}, r"seed must be an integer of at least 0, got 1\.0"),
    ({"vocab_size": "11"}, "vocab_size must be an integer of at least 1, got '11'"),
    ({"capacity": 64.0}, r"capacity must be an integer of at least 1, got 64\.0"),
    ({"stream": 3}, "stream must be a function or None, got 3"),
    ({"model": 3}, "model must be a Transformer, got int"),
    ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
    ({"temperature": -0.5}, r"temperature must be at least 0 and finite, got -0\.5"),
    ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
    ({"temperature": float("inf")}, "temperature must be at least 0 and finite, got inf"),
    ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
    ({"top_p": 1.5}, r"top_p must be above 0 and at most 1, got 1\.5"),
    ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ({"seed": 2**31}, "seed must be an integer from 0 to 2147483647, got 2147483648"),
    ({"stop": [11]}, r"stop must hold tokens in 0 \.\. 10, got 11"),
    ({"end_tokens": [-1]}, r"end_tokens must hold tokens in 0 \.\. 10, got -1"),
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
        generate(**{"model": make(), "prompts": [[1]], "max_tokens": 4} | arguments)


def test_numpy_numbers_count_as_numbers():
    model, options = Fixed([0.0, 1.0, 2.0]), {"max_tokens": 4, "seed": 3, "temperature": 0.5}
    want = generate(model, [[1, 2]], stop=[0, 0], **options)
    options = {"max_tokens": np.int64(4), "seed": np.uint8(3), "temperature": np.float32(0.5)}
    more: Any = {"top_p": np.float64(1), "vocab_size": np.int16(3), "capacity": np.int64(6)}
    stop: Any = np.zeros(2, int)
    arrays: Any = (np.asarray([[1, 2]]), jnp.asarray([[1, 2]]), [(np.int64(1), np.uint8(2))])
    for prompts in arrays:
        assert generate(model, prompts, stop=stop, **options, **more) == want
    assert len(generate(model, [[1]], max_tokens=2, temperature=1e300)[0]) == 2


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
