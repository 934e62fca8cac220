"""What a model answers: its most likely answer and the probability of the right one, by its cache.

The prompts are read in one pass that fills the cache (prefill), and then the right answer token by
token (decode), as in `fsa_jax.generate`. The greedy answer is the right one exactly if each of its
tokens is the most likely one after the right tokens before it, so that this single pass tells both
the exact match and the probability.

Shapes: B samples of a batch, n tokens of a prompt, a tokens of an answer, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fsa_jax.evaluation.tasks import Sample

#: Prompts and caches are padded to multiples of this many tokens.
_MULTIPLE = 64


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _answer(
    graphdef: Any,
    params: Any,
    prompts: Int[Array, "B n"],
    lengths: Int[Array, " B"],
    answers: Int[Array, "B a"],
    capacity: int,
) -> tuple[Float[Array, "B a"], Bool[Array, "B a"]]:
    """The log-probability of each token of the answers, and whether it is the most likely one."""
    model = nnx.merge(graphdef, params)
    cache = model.init_cache(len(prompts), capacity)
    logits, cache = model(prompts, cache=cache, num_tokens=lengths, fresh=True, only_last=True)

    def score(logits, token):
        logits = logits[:, 0]
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        log_probability = chosen - jax.nn.logsumexp(logits, axis=-1)
        return log_probability, jnp.argmax(logits, axis=-1).astype(token.dtype) == token

    def step(carry, token):
        logits, cache = carry
        scores = score(logits, token)
        return model(token[:, None], cache=cache), scores

    # The last token is scored and not read.
    *others, last = jnp.unstack(answers, axis=1)
    scores = []
    if others:
        (logits, _), (log_probabilities, hits) = jax.lax.scan(
            step, (logits, cache), jnp.stack(others)
        )
        scores.append((log_probabilities.T, hits.T))
    log_probability, hit = score(logits, last)
    scores.append((log_probability[:, None], hit[:, None]))
    log_probabilities, hits = zip(*scores, strict=True)
    return jnp.concatenate(log_probabilities, axis=1), jnp.concatenate(hits, axis=1)


def answer(
    model: Any, samples: Sequence[Sample], *, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Asks a model.

    Args:
      model: a ``Transformer``, or another nnx module with its `init_cache` and calls with a cache.
      samples: the samples; those of similar length should come together.
      batch_size: samples in one call of the model (B).

    Returns:
      The log-probability of each right answer in nats, float64 [samples], and whether it is the
      greedy answer, bool [samples].

    Raises:
      FloatingPointError: a log-probability is not finite.
    """
    graphdef, params = nnx.split(model)
    batch_size = min(batch_size, len(samples))
    width = _rounded(max(len(sample.prompt) for sample in samples))
    size = max(len(sample.answer) for sample in samples)
    found, right = [], []
    for first in range(0, len(samples), batch_size):
        chosen = samples[first : first + batch_size]
        prompts = np.zeros((batch_size, width), np.int32)
        answers = np.zeros((batch_size, size), np.int32)
        lengths = np.ones(batch_size, np.int32)
        for index, sample in enumerate(chosen):
            prompts[index, : len(sample.prompt)] = sample.prompt
            answers[index, : len(sample.answer)] = sample.answer
            lengths[index] = len(sample.prompt)
        scores = _answer(graphdef, params, prompts, lengths, answers, _rounded(width + size))
        log_probabilities, hits = (np.asarray(x)[: len(chosen)] for x in scores)
        own = np.arange(size) < np.asarray([len(sample.answer) for sample in chosen])[:, None]
        found.append(np.where(own, log_probabilities.astype(np.float64), 0.0).sum(axis=1))
        right.append((hits | ~own).all(axis=1))
    log_probability = np.concatenate(found)
    if not np.isfinite(log_probability).all():
        wrong = log_probability[~np.isfinite(log_probability)][0]
        raise FloatingPointError(f"log-probability of an answer must be finite, got {wrong}")
    return log_probability, np.concatenate(right)


def _rounded(tokens: int) -> int:
    return -(-tokens // _MULTIPLE) * _MULTIPLE
