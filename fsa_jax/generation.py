"""Continues texts token by token, in one compiled loop over a cache of keys and values.

Shapes: B prompts, n tokens of the longest one, m tokens to add, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import io_callback
from jaxtyping import Array, Float, Int

from fsa_jax import checks
from fsa_jax.transformer import Transformer

#: Prompts and room are rounded up to so many tokens: each size is a program of its own.
_ROUND = 64


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
    further token is a step of one compiled loop, which ends when all texts have.

    Args:
      model: any ``Transformer`` whose layers serve a cache.
      prompts: tokens of each prompt, at least one; ``bytes`` will do for a model of bytes. The
        models of ``fsa-jax train`` know texts that start with the token 256.
      max_tokens: the most tokens m to add to each.
      temperature: 0 takes the likeliest token each time, of equal ones the lowest.
      top_p: in (0, 1]; 1 cuts nothing.
      seed: in 0 .. 2**31 - 1. The same seed gives the same texts on the same device; the random
        numbers of prompt b depend on the seed and b alone.
      stop: a text ends when these are the last tokens that were added; they stay in it.
      vocab_size: only tokens below it are drawn; None: all.
      capacity: tokens that a text may have, prompt included; None: as many as are needed.
      stream: called with int32 [B] at each step, in order: the token of each text, -1 where it has
        ended. Every function is compiled into the loop anew.

    Returns:
      The tokens that were added to each prompt, at most `max_tokens`.

    Raises:
      ValueError: an argument breaks its rule; the message names it and gives the value.
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
    size = model.config.vocab_size
    checked = [_tokens(f"prompts[{i}]", prompt, size) for i, prompt in enumerate(prompts)]
    if not checked:
        raise ValueError("prompts must hold at least one prompt, got none")
    for i, prompt in enumerate(checked):
        if not len(prompt):
            raise ValueError(f"prompts[{i}] must have at least one token, got none")
    max_tokens = checks.size("max_tokens", max_tokens)
    checks.number("temperature", temperature, "at least 0 and finite", lambda x: 0 <= x < math.inf)
    checks.number("top_p", top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
    if checks.size("seed", seed, least=0) >= 2**31:
        raise ValueError(f"seed must be below 2**31, got {seed}")
    ending = _tokens("stop", stop, size)
    choices = size if vocab_size is None else checks.size("vocab_size", vocab_size)
    if choices > size:
        raise ValueError(f"vocab_size must be at most the model's {size}, got {vocab_size}")
    longest = max(map(len, checked))
    if capacity is not None and longest + max_tokens > checks.size("capacity", capacity):
        raise ValueError(
            "capacity must hold the longest prompt and max_tokens, got "
            f"capacity={capacity}, a prompt of {longest} tokens and max_tokens={max_tokens}"
        )
    length = -(-longest // _ROUND) * _ROUND
    rows = np.zeros((len(checked), length), np.int32)
    for row, prompt in zip(rows, checked, strict=True):
        row[: len(prompt)] = prompt
    graphdef, params = nnx.split(model)
    added, counts = _generate(
        graphdef,
        params,
        jnp.asarray(rows),
        jnp.asarray([len(prompt) for prompt in checked], jnp.int32),
        jax.random.key(seed),
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(top_p, jnp.float32),
        jnp.asarray(ending, jnp.int32),
        max_tokens=max_tokens,
        capacity=-(-(longest + max_tokens) // _ROUND) * _ROUND,
        choices=choices,
        greedy=bool(np.float32(temperature) == 0),
        cut=top_p < 1,
        stream=stream,
    )
    jax.effects_barrier()  # the stream has shown everything before the caller goes on
    lists = zip(np.asarray(added), np.asarray(counts), strict=True)
    return [row[:count].tolist() for row, count in lists]


def _tokens(name: str, tokens: Sequence[int], size: int) -> np.ndarray:
    """One text as int32, each token checked."""
    array = np.asarray(list(tokens))
    if array.size == 0:
        return array.astype(np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a sequence of integers, got {tokens!r}")
    wrong = (array < 0) | (array >= size)
    if wrong.any():
        raise ValueError(f"{name} must hold tokens in 0 .. {size - 1}, got {array[wrong][0]}")
    return array.astype(np.int32)


@functools.partial(
    jax.jit,
    static_argnames=(
        "graphdef", "max_tokens", "capacity", "choices", "greedy", "cut", "stream",
    ),
)  # fmt: skip
def _generate(
    graphdef: Any,
    params: Any,
    prompts: Int[Array, "B n"],
    lengths: Int[Array, " B"],
    key: Array,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    stop: Int[Array, " s"],
    *,
    max_tokens: int,
    capacity: int,
    choices: int,
    greedy: bool,
    cut: bool,
    stream: Callable | None,
) -> tuple[Int[Array, "B m"], Int[Array, " B"]]:
    """The tokens that are added, then anything; and how many they are."""
    model = nnx.merge(graphdef, params)
    batch, ending = prompts.shape[0], stop.shape[0]
    # a stream of random numbers for each text, so that it does not depend on the others
    rows = jnp.arange(batch, dtype=jnp.int32)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)

    def draw(logits: Float[Array, "B 1 V"], step) -> Int[Array, " B"]:
        logits = logits[:, 0, :choices]
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        # from the likeliest down: however low the temperature is, that one stays finite
        logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
        return jax.vmap(lambda k, x: _draw(k, x, top_p, cut))(step_keys, logits)

    def add(step, logits, added, live, counts):
        """Draws a token for each text that goes on."""
        token = draw(logits, step)
        if stream is not None:
            io_callback(_shown_by(stream), None, jnp.where(live, token, -1), ordered=True)
        added = added.at[:, ending + step].set(token)
        counts = counts + live.astype(jnp.int32)
        if ending:
            last = jax.lax.dynamic_slice_in_dim(added, step + 1, ending, axis=1)
            live = live & ~jnp.all(last == stop[None], axis=1)
        return token, added, live, counts

    def goes_on(carry):
        step, _, (_, _, live, _) = carry
        return (step < max_tokens) & jnp.any(live)

    def advance(carry):
        step, cache, (token, added, live, counts) = carry
        logits, cache = model(token[:, None], cache=cache)
        return step + 1, cache, add(step, logits, added, live, counts)

    cache = model.init_cache(batch, capacity)
    logits, cache = model(prompts, cache=cache, num_tokens=lengths, fresh=True, only_last=True)
    # so many places in front that the last `ending` tokens are there from the first step on
    added = jnp.full((batch, ending + max_tokens), -1, jnp.int32)
    first = add(0, logits, added, jnp.ones((batch,), bool), jnp.zeros((batch,), jnp.int32))
    carry = (jnp.ones((), jnp.int32), cache, first)
    _, _, (_, added, _, counts) = jax.lax.while_loop(goes_on, advance, carry)
    return added[:, ending:], counts


def _shown_by(stream: Callable) -> Callable[[Array], None]:
    def show(tokens: Array) -> None:
        stream(np.asarray(tokens))

    return show


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
