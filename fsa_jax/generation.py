"""Continues texts token by token, in compiled loops over a cache of keys and values.

Two programs make a text: one reads the prompts and draws a token, the other adds some tokens more
and is called until the texts have ended. Python runs between its calls: there it hears of Ctrl-C
and shows tokens. Each call is handed to the device before the tokens of the one before it are
read, so that the device need not wait for Python.

Shapes: B rows, the prompts and then empty ones; n tokens of a prompt, k tokens that a call adds, s
tokens of the stop, V vocabulary.
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

#: Prompts and room are multiples of so many tokens.
_ROUND = 64
#: Stops are padded to multiples of so many tokens.
_STOP = 8
#: The most tokens that one call of the loop adds.
_TOGETHER = 128
#: Seconds that a call of the loop may take, if a step takes less: after Ctrl-C the device is busy
#: for two calls at most. A call costs 0.3 to 0.7 ms of Python, while the device runs.
_SECONDS = 0.1
#: Seconds between two looks at whether the device has come to an end.
_LOOK = 5e-4


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    vocab_size: int | None = None,
    capacity: int | None = None,
    stream: Callable[[Int[np.ndarray, " B"]], Any] | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    The next token is drawn from p = softmax(logits / temperature), cut to the likeliest tokens, the
    fewest that have a share of `top_p` together. Prompts run at once, as what training runs; each
    further token is a step of a compiled loop, which ends when all texts have. Ctrl-C raises
    ``KeyboardInterrupt`` at once, unless the compiler is at work.

    Programs are compiled for sizes that are rounded up, and serve every call within them: prompts
    to a power of two (empty ones fill it, and take memory and time like others), tokens of the
    longest prompt and room in the cache to 64 times 1, 2, 3, 4, 6, 8, 12, ... What else is given
    compiles nothing anew, but for `vocab_size`, and whether `temperature` is 0 and `top_p` 1.

    Args:
      model: any ``Transformer`` whose layers serve a cache.
      prompts: tokens of each prompt, at least one; ``bytes`` will do for a model of bytes, one
        prompt too comes in a list. The models of ``fsa-jax train`` know texts that start with the
        token 256.
      max_tokens: the most tokens m to add to each.
      temperature: 0 takes the likeliest token each time, of equal ones the lowest.
      top_p: in (0, 1]; 1 cuts nothing.
      seed: in 0 .. 2**31 - 1. The same seed gives the same texts on the same device; the random
        numbers of prompt b depend on the seed and b alone.
      stop: a text ends when these are the last tokens that were added; they stay in it.
      vocab_size: only tokens below it are drawn; None: all.
      capacity: the most tokens that a text may have, prompt included, which also bounds the cache,
        in multiples of 64; None: as many as are needed.
      stream: called at each step, in order, with int32 [prompts]: the token of each text, -1 where
        it has ended. What it raises ends the call, and is raised as it is.

    Returns:
      The tokens that were added to each prompt, at most `max_tokens`.

    Raises:
      ValueError: an argument breaks its rule, or has a wrong type; the message names it and gives
        the value.
      NotImplementedError: the model's layers cannot serve a cache.

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
    rule = _rule(model.config.vocab_size, temperature, top_p, seed, stop, vocab_size)
    if stream is not None and not callable(stream):
        raise ValueError(f"stream must be a function or None, got {stream!r}")
    longest = max(map(len, checked))
    room = _rounded(longest + max_tokens)
    if capacity is not None:
        if longest + max_tokens > checks.size("capacity", capacity):
            raise ValueError(
                "capacity must hold the longest prompt and max_tokens, got "
                f"capacity={capacity}, a prompt of {longest} tokens and max_tokens={max_tokens}"
            )
        room = min(room, -(-capacity // _ROUND) * _ROUND)
    shape = 1 << (len(checked) - 1).bit_length(), min(_rounded(longest), room)
    rows, lengths = np.zeros(shape, np.int32), np.zeros(shape[:1], np.int32)
    for row, prompt in enumerate(checked):
        rows[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    graphdef, params = nnx.split(model)
    begin = functools.partial(_begin, graphdef, params, rows, lengths, rule, capacity=room)
    add = functools.partial(_add, graphdef, params, rule)
    parts = []
    for part in _parts(begin, add, max_tokens, _TOGETHER if stream is None else 1):
        parts.append(part[: len(checked)])
        if stream is not None:
            for tokens in parts[-1].T:
                stream(tokens.copy())
    return [row[row >= 0].tolist() for row in np.concatenate(parts, axis=1)]


# Arguments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rule:
    """How tokens are drawn, and what ends a text.

    Attributes:
      key: random key.
      temperature: float32.
      top_p: float32.
      stop: int32 [s]; before its tokens come some -1, for which any token will do. Without a stop
        all are -2, which no token is.
      choices: only tokens below it are drawn.
      greedy: whether the temperature is 0.
      cut: whether top_p is below 1.
    """

    key: Array
    temperature: Any
    top_p: Any
    stop: Any
    choices: int = dataclasses.field(metadata={"static": True})
    greedy: bool = dataclasses.field(metadata={"static": True})
    cut: bool = dataclasses.field(metadata={"static": True})


def _rule(size: int, temperature, top_p, seed, stop, vocab_size) -> _Rule:
    """The rule of a vocabulary of `size` tokens, from the checked arguments of `generate`."""
    checks.number("temperature", temperature, "at least 0 and finite", lambda x: 0 <= x < math.inf)
    checks.number("top_p", top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
    checks.size("seed", seed, least=0)
    ending = _tokens("stop", stop, size)
    choices = size if vocab_size is None else checks.size("vocab_size", vocab_size)
    if choices > size:
        raise ValueError(f"vocab_size must be at most the model's {size}, got {vocab_size}")
    padded = np.full(max(-(-len(ending) // _STOP), 1) * _STOP, -1 if len(ending) else -2, np.int32)
    padded[len(padded) - len(ending) :] = ending
    # the highest float32 draws as evenly as any number above it
    warmth = np.float32(min(temperature, float(np.finfo(np.float32).max)))
    return _Rule(
        key=jax.random.key(seed),
        temperature=warmth,
        top_p=np.float32(top_p),
        stop=padded,
        choices=choices,
        greedy=bool(warmth == 0),
        cut=top_p < 1,
    )


def _checked_prompts(prompts: Sequence[Sequence[int]], size: int) -> list[np.ndarray]:
    if isinstance(prompts, str | bytes | bytearray) or not isinstance(prompts, Iterable):
        raise ValueError(
            "prompts must be a sequence of prompts, each a sequence of integers, got "
            f"{reprlib.repr(prompts)}"
        )
    checked = [_tokens(f"prompts[{i}]", prompt, size) for i, prompt in enumerate(prompts)]
    if not checked:
        raise ValueError("prompts must hold at least one prompt, got none")
    for i, prompt in enumerate(checked):
        if not len(prompt):
            raise ValueError(f"prompts[{i}] must have at least one token, got none")
    return checked


def _tokens(name: str, tokens: Sequence[int], size: int) -> np.ndarray:
    """One text as int32, each token checked."""
    rule = f"{name} must be a sequence of integers, got {reprlib.repr(tokens)}"
    if isinstance(tokens, str):
        raise ValueError(rule)
    try:
        array = np.asarray(tokens if isinstance(tokens, np.ndarray | Array) else list(tokens))
    except (TypeError, ValueError) as error:  # no sequence; one of sequences of several lengths
        raise ValueError(rule) from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(rule)
    wrong = (array < 0) | (array >= size)
    if wrong.any():
        raise ValueError(f"{name} must hold tokens in 0 .. {size - 1}, got {array[wrong][0]}")
    return array.astype(np.int32)


def _rounded(tokens: int) -> int:
    """The least of 64 * (1, 2, 3, 4, 6, 8, 12, ...) that is at least `tokens`."""
    count = -(-tokens // _ROUND)
    power = 1 << (count - 1).bit_length()
    return _ROUND * (power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power)


# The loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Texts:
    """Where the texts are.

    Attributes:
      step: int32, how many tokens have been drawn.
      token: int32 [B], the last of each text.
      live: bool [B], texts that go on.
      recent: int32 [B, s], the last tokens that were added, before them -2.
    """

    step: Int[Array, ""]
    token: Int[Array, " B"]
    live: Bool[Array, " B"]
    recent: Int[Array, "B s"]


def _parts(
    begin: Callable, add: Callable, max_tokens: int, together: int
) -> Iterator[Int[np.ndarray, "B k"]]:
    """The tokens of the rows, at most `together` steps at a time; -1 where a text has ended."""
    made = next_steps = steps = 1
    asked, since = begin(), time.monotonic()
    while asked is not None:
        cache, texts, tokens = asked
        done, steps = steps, min(next_steps, max_tokens - made)
        asked = add(cache, texts, np.int32(steps)) if steps else None
        made += steps
        # a wait in the runtime would be deaf to signals
        while not tokens.is_ready():
            time.sleep(_LOOK)
        tokens = np.asarray(tokens)
        yield tokens[:, np.any(tokens >= 0, axis=0)]
        if not np.any(np.asarray(texts.live)):
            return
        now = time.monotonic()
        fit = int(done * _SECONDS / max(now - since, 1e-6))
        next_steps, since = max(1, min(together, 2 * done, fit)), now


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _begin(
    graphdef: Any,
    params: Any,
    prompts: Int[Array, "B n"],
    lengths: Int[Array, " B"],
    rule: _Rule,
    *,
    capacity: int,
) -> tuple[Any, _Texts, Int[Array, "B 1"]]:
    """The cache and the texts after their first token, and that token."""
    model = nnx.merge(graphdef, params)
    batch = prompts.shape[0]
    cache = model.init_cache(batch, capacity)
    logits, cache = model(prompts, cache=cache, num_tokens=lengths, fresh=True, only_last=True)
    nothing = jnp.full((batch, rule.stop.shape[0]), -2, jnp.int32)
    texts = _Texts(jnp.zeros((), jnp.int32), nothing[:, 0], lengths > 0, nothing)
    texts, shown = _drawn(rule, logits, texts)
    return cache, texts, shown[:, None]


# The cache is written in place. What Python reads later, the texts, must stay.
@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def _add(
    graphdef: Any, params: Any, rule: _Rule, cache: Any, texts: _Texts, steps: Int[Array, ""]
) -> tuple[Any, _Texts, Int[Array, "B k"]]:
    """The cache and the texts after so many steps more, and the tokens, with -1 after them."""
    model = nnx.merge(graphdef, params)

    def goes_on(carry):
        step, _, texts, _ = carry
        return (step < steps) & jnp.any(texts.live)

    def advance(carry):
        step, cache, texts, tokens = carry
        logits, cache = model(texts.token[:, None], cache=cache)
        texts, shown = _drawn(rule, logits, texts)
        return step + 1, cache, texts, tokens.at[:, step].set(shown)

    tokens = jnp.full((texts.token.shape[0], _TOGETHER), -1, jnp.int32)
    carry = (jnp.zeros((), jnp.int32), cache, texts, tokens)
    return jax.lax.while_loop(goes_on, advance, carry)[1:]


def _drawn(
    rule: _Rule, logits: Float[Array, "B 1 V"], texts: _Texts
) -> tuple[_Texts, Int[Array, " B"]]:
    """The texts with one more token, and the token of those that went on; -1 of the others."""
    logits = logits[:, 0, : rule.choices]
    if rule.greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        # a stream of random numbers for each text, so that it does not depend on the others
        rows = jnp.arange(logits.shape[0], dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rule.key, rows)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, texts.step)
        # from the likeliest down: however low the temperature is, that one stays finite
        logits = (logits - logits.max(axis=-1, keepdims=True)) / rule.temperature
        token = jax.vmap(lambda k, x: _draw(k, x, rule.top_p, rule.cut))(keys, logits)
    recent = jnp.concatenate([texts.recent[:, 1:], token[:, None]], axis=1)
    ended = jnp.all((recent == rule.stop[None]) | (rule.stop[None] == -1), axis=1)
    return (
        _Texts(texts.step + 1, token, texts.live & ~ended, recent),
        jnp.where(texts.live, token, -1),
    )


def _draw(key: Array, logits: Float[Array, " V"], top_p, cut: bool) -> Int[Array, ""]:
    """A token of probability softmax(logits), of the likeliest that have a share of top_p."""
    if not cut:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    order = jnp.argsort(-logits)  # stable: of equal ones the lower number first
    logits = logits[order]
    p = jax.nn.softmax(logits)
    # a token stays as long as those before it do not have the share yet
    stays = jnp.cumsum(p) - p < top_p
    return order[jax.random.categorical(key, jnp.where(stays, logits, -jnp.inf))].astype(jnp.int32)
