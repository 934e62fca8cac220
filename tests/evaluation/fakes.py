"""Models made by hand, with the calls and the cache of a `Transformer`, that tests ask questions.

Also a text that needs no files.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fsa_jax.evaluation.text import Text
from fsa_jax.training.documents import ByteDocuments, TokenDocuments
from fsa_jax.training.tokenizer import ByteTokenizer

VOCAB = 257


def text_of(*documents: bytes) -> Text:
    return Text(ByteDocuments(documents), ByteTokenizer(), "a test")


class BareBytes(ByteTokenizer):
    """Bytes, without a token at the start of a document."""

    begin: int | None = None


def text_without_start(*documents: bytes) -> Text:
    tokens = np.frombuffer(b"".join(documents), np.uint8).astype(np.int32)
    ends = np.cumsum([len(document) for document in documents])
    starts = np.concatenate([[0], ends[:-1]])
    return Text(TokenDocuments(tokens, starts, ends, 257), BareBytes(), "a test")


class Buffer(NamedTuple):
    """The tokens that were read, int32 [B, capacity], and their number, int32 [B]."""

    tokens: jax.Array
    lengths: jax.Array


class _Reader(nnx.Module):
    """Reads tokens into a buffer; `predict` turns it into logits of the next token."""

    def init_cache(self, batch: int, capacity: int) -> Buffer:
        return Buffer(jnp.zeros((batch, capacity), jnp.int32), jnp.zeros(batch, jnp.int32))

    def __call__(self, tokens, *, cache, num_tokens=None, fresh=False, only_last=False):
        batch, count = tokens.shape
        del fresh, only_last
        lengths = jnp.full(batch, count, jnp.int32) if num_tokens is None else num_tokens
        index = jnp.arange(cache.tokens.shape[1], dtype=jnp.int32)[None] - cache.lengths[:, None]
        new = jnp.take_along_axis(tokens, jnp.clip(index, 0, count - 1), axis=1)
        inside = (index >= 0) & (index < lengths[:, None])
        cache = Buffer(jnp.where(inside, new, cache.tokens), cache.lengths + lengths)
        return self.predict(cache)[:, None], cache

    def predict(self, cache: Buffer) -> jax.Array:
        raise NotImplementedError


class Copier(_Reader):
    """Predicts the token that followed the last earlier place with the same few tokens."""

    def __init__(self, suffix: int = 5):
        self.suffix = suffix

    def predict(self, cache: Buffer) -> jax.Array:
        tokens, lengths = cache
        place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        same = (place >= self.suffix) & (place < lengths[:, None])
        for back in range(1, self.suffix + 1):
            own = jnp.take_along_axis(tokens, (lengths - back)[:, None], axis=1)
            same &= jnp.roll(tokens, back, axis=1) == own
        found = jnp.max(jnp.where(same, place, 0), axis=1, keepdims=True)
        return 30.0 * jax.nn.one_hot(jnp.take_along_axis(tokens, found, axis=1)[:, 0], VOCAB)


class Guesser(_Reader):
    """Always guesses the digit 7, and gives all ten digits nearly the same probability."""

    def predict(self, cache: Buffer) -> jax.Array:
        digits = jnp.full(VOCAB, -40.0).at[48:58].set(0.0).at[55].set(1e-3)
        return jnp.broadcast_to(digits, (len(cache.lengths), VOCAB))
