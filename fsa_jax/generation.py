"""Generates text token by token, in compiled loops over a cache of keys and values.

Two programs generate a text. The first one reads the prompts and draws one token for each; the
second one draws some more tokens and is called until all sequences have ended. Between the calls
Python runs, so that it can react to Ctrl-C and pass on tokens. Each call is dispatched to the
device before the tokens of the previous one are read, so that the device does not wait for Python.

Shapes: B batch, the prompts followed by empty sequences; n tokens of a prompt, k tokens generated
by one call, s tokens of the stop sequence, V vocabulary.
"""

import dataclasses
import functools
import math
import reprlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fsa_jax.arguments import checks
from fsa_jax.transformer import Transformer

#: Prompt lengths and cache capacities are rounded up to multiples of this many tokens.
_LENGTH_MULTIPLE = 64
#: Stop sequences are padded to multiples of this many tokens.
_STOP_MULTIPLE = 8
#: The tokens that end a sequence are padded to multiples of this many.
_END_MULTIPLE = 8
#: The most tokens that one call of the decoding loop generates for a sequence.
_MAX_STEPS = 128
#: The duration of a call in seconds, unless a single step takes longer: after Ctrl-C the device is
#: busy for at most two calls. A call costs 0.3 to 0.7 ms of Python, while the device runs.
_CALL_SECONDS = 0.1
#: Seconds between two checks whether the device has finished.
_POLL_SECONDS = 5e-4


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    end_tokens: Sequence[int] = (),
    vocab_size: int | None = None,
    capacity: int | None = None,
    stream: Callable[[Int[np.ndarray, " B"]], Any] | None = None,
) -> list[list[int]]:
    """Generates a continuation of each prompt.

    The next token is drawn from p = softmax(logits / temperature), restricted to the smallest set
    of most likely tokens whose total probability is at least `top_p`. All prompts are read in one
    pass, like a batch of training; each further token is a step of a compiled loop, which ends when
    all sequences have ended. Ctrl-C raises ``KeyboardInterrupt`` at once, except during
    compilation.

    Programs are compiled for sizes that are rounded up, and serve all calls within them. The number
    of prompts is rounded up to a power of two with empty prompts, which cost as much memory and
    time as others. The length of the longest prompt, and the capacity of the cache, are rounded up
    to 64 times 1, 2, 3, 4, 6, 8, 12, ... Of the other arguments only `vocab_size`, whether
    `temperature` is 0 and `top_p` is 1, and the number of `end_tokens`, rounded up to a multiple of
    8, make a new program necessary.

    Args:
      model: a ``Transformer`` whose layers support a cache.
      prompts: at least one prompt, each a sequence of at least one token. ``bytes`` serve as a
        prompt of a byte-level model; a single prompt must be in a list too. The models of
        ``fsa-jax train`` expect the token 256 at the start of a text.
      max_tokens: the maximum number of tokens m to generate for each prompt.
      temperature: 0 always takes the most likely token, and the lowest of equally likely ones.
      top_p: in (0, 1]; 1 keeps all tokens.
      seed: in 0 .. 2**31 - 1. The same seed gives the same tokens on the same device; the random
        numbers of prompt b depend only on the seed and on b.
      stop: a sequence ends when its last generated tokens are these; they are part of the result.
      end_tokens: a sequence ends when its last generated token is one of these, for example those
        in `stops` of a tokenizer; it is part of the result.
      vocab_size: only tokens below it are drawn; None: the whole vocabulary.
      capacity: the maximum length of a sequence in tokens, prompt included. The cache has this
        capacity at most, rounded up to a multiple of 64. None: as large as necessary.
      stream: called after each step, in order, with int32 [prompts]: the new token of each
        sequence, or -1 if the sequence has ended. An exception that it raises ends the call and is
        raised unchanged.

    Returns:
      The generated tokens of each prompt, at most `max_tokens` of them.

    Raises:
      ValueError: an argument breaks its rule, or has a wrong type; the message names the argument
        and its value.
      NotImplementedError: the model's layers do not support a cache.

    Example:
      >>> from flax import nnx
      >>> from fsa_jax.transformer import TransformerConfig
      >>> config = TransformerConfig(num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=1)
      >>> model = Transformer(config, rngs=nnx.Rngs(0))
      >>> texts = generate(model, [b"a", b"some words"], max_tokens=5, vocab_size=256)
      >>> [len(bytes(text)) for text in texts]
      [5, 5]

    References:
      top_p: The Curious Case of Neural Text Degeneration, arXiv 1904.09751, section 3.1.
    """
    if not isinstance(model, Transformer):
        raise ValueError(f"model must be a Transformer, got {type(model).__name__}")
    checked = _checked_prompts(prompts, model.config.vocab_size)
    max_tokens = checks.size("max_tokens", max_tokens)
    sampler = _sampler(
        model.config.vocab_size, temperature, top_p, seed, stop, end_tokens, vocab_size
    )
    if stream is not None and not callable(stream):
        raise ValueError(f"stream must be a function or None, got {stream!r}")
    longest = max(map(len, checked))
    cache_size = _round_up(longest + max_tokens)
    if capacity is not None:
        if longest + max_tokens > checks.size("capacity", capacity):
            raise ValueError(
                "capacity must hold the longest prompt and max_tokens, got "
                f"capacity={capacity}, a prompt of {longest} tokens and max_tokens={max_tokens}"
            )
        cache_size = min(cache_size, -(-capacity // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)
    shape = 1 << (len(checked) - 1).bit_length(), min(_round_up(longest), cache_size)
    tokens, lengths = np.zeros(shape, np.int32), np.zeros(shape[:1], np.int32)
    for index, prompt in enumerate(checked):
        tokens[index, : len(prompt)], lengths[index] = prompt, len(prompt)
    graphdef, params = nnx.split(model)
    prefill = functools.partial(
        _prefill, graphdef, params, tokens, lengths, sampler, capacity=cache_size
    )
    decode = functools.partial(_decode, graphdef, params, sampler)
    chunks = []
    for chunk in _chunks(prefill, decode, max_tokens, _MAX_STEPS if stream is None else 1):
        chunks.append(chunk[: len(checked)])
        if stream is not None:
            for step in chunks[-1].T:
                stream(step.copy())
    return [sequence[sequence >= 0].tolist() for sequence in np.concatenate(chunks, axis=1)]


# Arguments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sampler:
    """How tokens are drawn, and what ends a sequence.

    Attributes:
      key: random key.
      temperature: float32.
      top_p: float32.
      stop: int32 [s], the stop sequence, padded on the left with -1, which matches any token. If
        there is no stop sequence, all entries are -2, which matches no token.
      ends: int32 [e], tokens that end a sequence, padded with -2.
      vocab_size: only tokens below it are drawn.
      greedy: whether the temperature is 0.
      truncated: whether top_p is below 1.
    """

    key: Array
    temperature: Any
    top_p: Any
    stop: Any
    ends: Any
    vocab_size: int = dataclasses.field(metadata={"static": True})
    greedy: bool = dataclasses.field(metadata={"static": True})
    truncated: bool = dataclasses.field(metadata={"static": True})


def _sampler(model_vocab: int, temperature, top_p, seed, stop, end_tokens, vocab_size) -> _Sampler:
    """The sampler of a model with `model_vocab` tokens, from the arguments of `generate`."""
    checks.number("temperature", temperature, "at least 0 and finite", lambda x: 0 <= x < math.inf)
    checks.number("top_p", top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
    checks.size("seed", seed, least=0)
    ending = _tokens("stop", stop, model_vocab)
    ends = _tokens("end_tokens", end_tokens, model_vocab)
    allowed = model_vocab if vocab_size is None else checks.size("vocab_size", vocab_size)
    if allowed > model_vocab:
        raise ValueError(f"vocab_size must be at most the model's {model_vocab}, got {vocab_size}")
    length = max(-(-len(ending) // _STOP_MULTIPLE), 1) * _STOP_MULTIPLE
    padded = np.full(length, -1 if len(ending) else -2, np.int32)
    padded[length - len(ending) :] = ending
    # The largest float32 samples as uniformly as any number above it.
    rounded = np.float32(min(temperature, float(np.finfo(np.float32).max)))
    return _Sampler(
        key=jax.random.key(seed),
        temperature=rounded,
        top_p=np.float32(top_p),
        stop=padded,
        ends=np.pad(ends, (0, -len(ends) % _END_MULTIPLE), constant_values=-2),
        vocab_size=allowed,
        greedy=bool(rounded == 0),
        truncated=top_p < 1,
    )


def _checked_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> list[np.ndarray]:
    if isinstance(prompts, str | bytes | bytearray) or not isinstance(prompts, Iterable):
        raise ValueError(
            "prompts must be a sequence of prompts, each a sequence of integers, got "
            f"{reprlib.repr(prompts)}"
        )
    checked = [_tokens(f"prompts[{i}]", prompt, vocab_size) for i, prompt in enumerate(prompts)]
    if not checked:
        raise ValueError("prompts must hold at least one prompt, got none")
    for i, prompt in enumerate(checked):
        if not len(prompt):
            raise ValueError(f"prompts[{i}] must have at least one token, got none")
    return checked


def _tokens(name: str, tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """One sequence of tokens as a checked int32 array."""
    rule = f"{name} must be a sequence of integers, got {reprlib.repr(tokens)}"
    if isinstance(tokens, str):
        raise ValueError(rule)
    try:
        array = np.asarray(tokens if isinstance(tokens, np.ndarray | Array) else list(tokens))
    except (TypeError, ValueError) as error:  # not a sequence, or one of unequal sequences
        raise ValueError(rule) from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(rule)
    wrong = (array < 0) | (array >= vocab_size)
    if wrong.any():
        raise ValueError(f"{name} must hold tokens in 0 .. {vocab_size - 1}, got {array[wrong][0]}")
    return array.astype(np.int32)


def _round_up(tokens: int) -> int:
    """The smallest of 64 * (1, 2, 3, 4, 6, 8, 12, ...) that is at least `tokens`."""
    count = -(-tokens // _LENGTH_MULTIPLE)
    power = 1 << (count - 1).bit_length()
    smaller = power * 3 // 4
    return _LENGTH_MULTIPLE * (smaller if power >= 4 and count <= smaller else power)


# The decoding loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    """The state of all sequences between two steps.

    Attributes:
      step: int32, the number of tokens drawn for each sequence.
      token: int32 [B], the last token of each sequence.
      active: bool [B], whether a sequence has not ended yet.
      recent: int32 [B, s], the last generated tokens of each sequence, padded on the left with -2.
    """

    step: Int[Array, ""]
    token: Int[Array, " B"]
    active: Bool[Array, " B"]
    recent: Int[Array, "B s"]


def _chunks(
    prefill: Callable, decode: Callable, max_tokens: int, max_steps: int
) -> Iterator[Int[np.ndarray, "B k"]]:
    """The generated tokens, at most `max_steps` steps at a time; -1 after the end of a sequence."""
    dispatched = next_steps = steps = 1
    result, since = prefill(), time.monotonic()
    while result is not None:
        cache, progress, tokens = result
        finished, steps = steps, min(next_steps, max_tokens - dispatched)
        result = decode(cache, progress, np.int32(steps)) if steps else None
        dispatched += steps
        # A blocking wait inside the runtime would not react to signals.
        while not tokens.is_ready():
            time.sleep(_POLL_SECONDS)
        tokens = np.asarray(tokens)
        yield tokens[:, np.any(tokens >= 0, axis=0)]
        if not np.any(np.asarray(progress.active)):
            return
        now = time.monotonic()
        fitting = int(finished * _CALL_SECONDS / max(now - since, 1e-6))
        next_steps, since = max(1, min(max_steps, 2 * finished, fitting)), now


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _prefill(
    graphdef: Any,
    params: Any,
    prompts: Int[Array, "B n"],
    lengths: Int[Array, " B"],
    sampler: _Sampler,
    *,
    capacity: int,
) -> tuple[Any, _Progress, Int[Array, "B 1"]]:
    """The cache and the progress after the first token of each sequence, and that token."""
    model = nnx.merge(graphdef, params)
    batch = prompts.shape[0]
    cache = model.init_cache(batch, capacity)
    logits, cache = model(prompts, cache=cache, num_tokens=lengths, fresh=True, only_last=True)
    none_yet = jnp.full((batch, sampler.stop.shape[0]), -2, jnp.int32)
    progress = _Progress(jnp.zeros((), jnp.int32), none_yet[:, 0], lengths > 0, none_yet)
    progress, token = _advance(sampler, logits, progress)
    return cache, progress, token[:, None]


# The cache is donated and updated in place. The progress is not, since Python reads it later.
@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def _decode(
    graphdef: Any,
    params: Any,
    sampler: _Sampler,
    cache: Any,
    progress: _Progress,
    steps: Int[Array, ""],
) -> tuple[Any, _Progress, Int[Array, "B k"]]:
    """The cache and the progress after `steps` more steps, and their tokens, padded with -1."""
    model = nnx.merge(graphdef, params)

    def unfinished(carry):
        step, _, progress, _ = carry
        return (step < steps) & jnp.any(progress.active)

    def advance(carry):
        step, cache, progress, tokens = carry
        logits, cache = model(progress.token[:, None], cache=cache)
        progress, token = _advance(sampler, logits, progress)
        return step + 1, cache, progress, tokens.at[:, step].set(token)

    tokens = jnp.full((progress.token.shape[0], _MAX_STEPS), -1, jnp.int32)
    carry = (jnp.zeros((), jnp.int32), cache, progress, tokens)
    return jax.lax.while_loop(unfinished, advance, carry)[1:]


def _advance(
    sampler: _Sampler, logits: Float[Array, "B 1 V"], progress: _Progress
) -> tuple[_Progress, Int[Array, " B"]]:
    """The progress after one more token, and the token of each active sequence; -1 of others."""
    logits = logits[:, 0, : sampler.vocab_size]
    if sampler.greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        # Each sequence has its own stream of random numbers, so that it does not depend on others.
        index = jnp.arange(logits.shape[0], dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(sampler.key, index)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, progress.step)
        # The maximum is subtracted first: at any low temperature the largest logit stays finite.
        logits = (logits - logits.max(axis=-1, keepdims=True)) / sampler.temperature
        draw = functools.partial(_draw, top_p=sampler.top_p, truncated=sampler.truncated)
        token = jax.vmap(draw)(keys, logits)
    recent = jnp.concatenate([progress.recent[:, 1:], token[:, None]], axis=1)
    stop = sampler.stop[None]
    ended = jnp.all((recent == stop) | (stop == -1), axis=1)
    if sampler.ends.shape[0]:
        ended |= jnp.any(token[:, None] == sampler.ends[None], axis=1)
    return (
        _Progress(progress.step + 1, token, progress.active & ~ended, recent),
        jnp.where(progress.active, token, -1),
    )


def _draw(key: Array, logits: Float[Array, " V"], top_p, truncated: bool) -> Int[Array, ""]:
    """A token from softmax(logits), restricted to the most likely tokens if `truncated`."""
    if not truncated:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    order = jnp.argsort(-logits)  # stable: equal logits stay in the order of their tokens
    logits = logits[order]
    p = jax.nn.softmax(logits)
    # A token is kept if the total probability of more likely ones is still below top_p.
    kept = jnp.cumsum(p) - p < top_p
    return order[jax.random.categorical(key, jnp.where(kept, logits, -jnp.inf))].astype(jnp.int32)
