"""The samples of recall and needle, and the scores of models that are known to find or to guess."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from small_transformers import CONFIG, FULL

import fsa_jax
from evaluation.fakes import Copier, Guesser, text_of, text_without_start
from fsa_jax.evaluation.answers import answer
from fsa_jax.evaluation.tasks import Sample, Samples
from fsa_jax.transformer import Transformer

HAY = ("It was a bright cold day, and the clocks were striking. " * 8).encode()


def samples(digits: int = 5, seed: int = 0) -> Samples:
    return Samples(text_of(HAY), seed=seed, digits=digits)


def decode(tokens: np.ndarray) -> str:
    return bytes(tokens.tolist()).decode()


def text_in(sample: Sample) -> tuple[str, str]:
    assert sample.prompt[0] == 256
    return decode(sample.prompt[1:]), decode(sample.answer)


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 8), (1.0, 15)])
def test_recall_asks_for_the_pair_at_the_depth(depth, place):
    sample = samples().make("recall", 210, depth, 3)
    prompt, value = text_in(sample)
    *lines, question = prompt.split("\n")
    assert all(re.fullmatch(r"[a-z]{5}=\d{5}", line) for line in lines)
    # 16 pairs of 12 bytes, a question of 6, an answer of 5, and the start: one more does not fit.
    assert (len(lines), len(sample.prompt) + len(value)) == (16, 204)
    assert question + value == lines[place]
    assert prompt.count(question) == 2


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_the_needle_is_at_its_depth_in_the_text(depth):
    sample = samples().make("needle", 200, depth, 0)
    prompt, value = text_in(sample)
    assert len(sample.prompt) + len(value) == 200
    question = re.search(r"\nThe pass key is [a-z]{5}=$", prompt)
    assert question
    hay = prompt[: question.start()]
    needle = f"{question[0]}{value}\n"
    before, after = hay.split(needle)
    assert len(before) == round(depth * len(before + after))
    assert before + after in HAY.decode()


def test_samples_follow_from_the_seed_and_their_place():
    def make(seed: int, task: str, *place: Any) -> bytes:
        sample = samples(seed=seed).make(task, *place)
        return sample.prompt.tobytes() + sample.answer.tobytes()

    for task in ("recall", "needle"):
        one = make(0, task, 128, 0.5, 0)
        assert one == make(0, task, 128, 0.5, 0)
        others = [make(1, task, 128, 0.5, 0), make(0, task, 128, 0.5, 1)]
        others += [make(0, task, 129, 0.5, 0), make(0, task, 128, 0.25, 0)]
        assert len({one, *others}) == 5


def test_no_start_token():
    maker = Samples(text_without_start(HAY, HAY), seed=0, digits=5)
    assert re.match("[a-z]{5}=", decode(maker.make("recall", 60, 0.0, 0).prompt))
    assert len(maker.make("needle", 60, 0.0, 0).prompt) == 55


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        ("recall", 35, r"lengths must hold 2 keys .* 36 tokens or more, got 35"),
        ("needle", 57, r"lengths must hold the needle, .* 58 tokens or more, got 57"),
        ("needle", 507, r"lengths must be at most 506, .* got 507: give a longer text"),
    ],
)
def test_lengths_that_hold_no_sample(task, length, message):
    with pytest.raises(ValueError, match=message):
        samples().make(task, length, 0.5, 0)
    samples().make(task, length + (-1 if length == 507 else 1), 0.5, 0)


@pytest.mark.parametrize("task", ["recall", "needle"])
def test_a_model_that_copies_finds_everything(task):
    made = [samples().make(task, length, depth, i) for length in (80, 150, 300)
            for depth in (0.0, 0.4, 1.0) for i in range(2)]  # fmt: skip
    log_probability, right = answer(Copier(), made, batch_size=5)
    assert right.all()
    assert (log_probability > -1e-6).all()


@pytest.mark.parametrize("task", ["recall", "needle"])
def test_a_model_that_guesses_is_right_by_chance(task):
    made = [samples(digits=1).make(task, 60, 0.5, i) for i in range(400)]
    log_probability, right = answer(Guesser(), made, batch_size=100)
    assert right.tolist() == [sample.answer[0] == ord("7") for sample in made]
    assert abs(right.mean() - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 400)
    np.testing.assert_allclose(log_probability, -np.log(10), atol=2e-3)


@pytest.mark.fast_cases("full")
@pytest.mark.essential_cases("nsa")
@pytest.mark.parametrize("config", [CONFIG, FULL], ids=["nsa", "full"])
def test_scores_are_those_of_generation_and_of_whole_sequences(config):
    """Answers of different lengths, half of them what the model would say, in two batches."""
    rng = np.random.default_rng(1)
    model = Transformer(dataclasses.replace(config, implementation=None), rngs=nnx.Rngs(0))
    asked = [rng.integers(0, 11, n).astype(np.int32) for n in (20, 33, 9, 9)]
    greedy = fsa_jax.generate(
        model, [list(map(int, x)) for x in asked], max_tokens=3, temperature=0
    )
    said = [np.asarray(x, np.int32) for x in greedy]
    said[1] = said[1][:1]
    said[2] = (said[2] + [0, 1, 0]).astype(np.int32) % 11
    said[3] = (said[3] + [0, 0, 1]).astype(np.int32) % 11
    pairs = [Sample(prompt, wanted) for prompt, wanted in zip(asked, said, strict=True)]
    log_probability, right = answer(model, pairs, batch_size=3)
    assert right.tolist() == [True, True, False, False]
    whole = np.zeros((4, 40), np.int32)
    for row, (prompt, wanted) in enumerate(zip(asked, said, strict=True)):
        whole[row, : len(prompt) + len(wanted)] = [*prompt, *wanted]
    # Later tokens do not change earlier logits. The parameters are those of the other model.
    model = Transformer(config, rngs=nnx.Rngs(0))
    log_p = np.asarray(jax.nn.log_softmax(model(whole)), np.float64)
    for row, (prompt, wanted) in enumerate(zip(asked, said, strict=True)):
        places = len(prompt) - 1 + np.arange(len(wanted))
        assert log_probability[row] == pytest.approx(log_p[row, places, wanted].sum(), abs=1e-5)


def test_probabilities_that_are_not_finite():
    class Broken(Guesser):
        def predict(self, cache):
            return super().predict(cache) + np.float32(np.nan)

    with pytest.raises(FloatingPointError, match="log-probability of an answer must be finite"):
        answer(Broken(), [samples().make("recall", 60, 0.5, 0)], batch_size=4)
