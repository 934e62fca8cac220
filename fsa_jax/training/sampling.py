"""Continues a text byte by byte, in one compiled loop."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fsa_jax.training.config import DOCUMENT_START
from fsa_jax.transformer import Transformer


def sample_bytes(
    model: Transformer,
    prompt: bytes,
    *,
    row_length: int,
    max_bytes: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> bytes:
    """Continues a prompt.

    Every byte is drawn from softmax(logits / temperature) of a whole forward pass over a buffer
    of `row_length` tokens (there is no cache of keys and values); once the buffer is full, its
    oldest token makes room for each new one.

    Args:
      model: a byte-level model (`init_model` with vocab_size 257).
      prompt: may be empty: the text then starts as a document does.
      row_length: tokens of the buffer, at least 1; use the row length of the training.
      max_bytes: bytes to add, at least 1.
      temperature: 0 takes the likeliest byte each time.
      seed: the same seed gives the same bytes.

    Returns:
      The added bytes, `max_bytes` of them.

    Raises:
      ValueError: an argument breaks its rule; the message names it and gives the value.
    """
    if row_length < 1:
        raise ValueError(f"row_length must be at least 1, got {row_length}")
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature!r}")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must be at least 0 and below 2**31, got {seed}")
    tokens = np.asarray([DOCUMENT_START, *prompt], np.int32)[-row_length:]
    row = np.zeros(row_length, np.int32)
    row[: len(tokens)] = tokens
    graphdef, params = nnx.split(model)
    added = _continue(
        graphdef,
        params,
        jnp.asarray(row),
        jnp.asarray(len(tokens), jnp.int32),
        jax.random.key(seed),
        jnp.asarray(temperature, jnp.float32),
        max_bytes=max_bytes,
        greedy=temperature == 0,
    )
    return np.asarray(added).astype(np.uint8).tobytes()


@functools.partial(jax.jit, static_argnames=("graphdef", "max_bytes", "greedy"))
def _continue(
    graphdef: Any,
    params: Any,
    row: Array,
    length: Array,
    key: Array,
    temperature: Array,
    *,
    max_bytes: int,
    greedy: bool,
) -> Array:
    model = nnx.merge(graphdef, params)
    size = row.shape[0]

    def add_byte(i, carry):
        row, length, added = carry
        segment_ids = (jnp.arange(size, dtype=jnp.int32) < length).astype(jnp.int32)
        logits = model(row[None], segment_ids[None])[0, length - 1]
        # Only bytes: the document start was never a target.
        logits = logits[:DOCUMENT_START]
        if greedy:
            byte = jnp.argmax(logits)
        else:
            byte = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        byte = byte.astype(jnp.int32)
        row = jnp.where(length == size, jnp.roll(row, -1), row)
        row = row.at[jnp.minimum(length, size - 1)].set(byte)
        return row, jnp.minimum(length + 1, size), added.at[i].set(byte)

    start = (row, length, jnp.zeros(max_bytes, jnp.int32))
    return jax.lax.fori_loop(0, max_bytes, add_byte, start)[2]
