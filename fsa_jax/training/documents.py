"""Documents of tokens, from which training packs sequences."""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from fsa_jax.training.config import DOCUMENT_START

#: How many tokens are counted at a time.
_COUNTED = 2**20


class ByteDocuments:
    """Texts in memory; a document is the token DOCUMENT_START and the bytes of a text.

    Args:
      texts: bytes of each document.

    Attributes:
      ends: int64 [documents], the number of tokens up to the end of each document.
    """

    def __init__(self, texts: Sequence[bytes]):
        self._texts = texts
        self.ends = np.cumsum([1 + len(text) for text in texts])

    def __len__(self) -> int:
        return len(self._texts)

    def part(self, which: int, offset: int, limit: int) -> np.ndarray:
        """At most `limit` tokens of a document from token `offset` on, as int32."""
        # Byte i is token i + 1.
        text = self._texts[which][max(offset - 1, 0) : offset - 1 + limit]
        part = np.frombuffer(text, np.uint8).astype(np.int32)
        return part if offset else np.concatenate([np.asarray([DOCUMENT_START], np.int32), part])

    def counts(self) -> np.ndarray:
        """How often each byte occurs, int64 [256]."""
        counts = np.zeros(DOCUMENT_START, np.int64)
        for text in self._texts:
            counts += np.bincount(np.frombuffer(text, np.uint8), minlength=DOCUMENT_START)
        return counts


@dataclasses.dataclass(frozen=True)
class TokenDocuments:
    """Documents in a memory-mapped array of tokens.

    Attributes:
      tokens: integers [tokens of all documents].
      starts: int64 [documents], index in `tokens` of the first token of each document.
      ends: int64 [documents], the number of tokens up to the end of each document.
      vocab_size: all tokens are below it.
    """

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    vocab_size: int

    def __len__(self) -> int:
        return len(self.ends)

    def part(self, which: int, offset: int, limit: int) -> np.ndarray:
        """At most `limit` tokens of a document from token `offset` on, as int32."""
        length = int(self.ends[which]) - (int(self.ends[which - 1]) if which else 0)
        start = int(self.starts[which])
        part = self.tokens[start + offset : start + min(length, offset + limit)]
        return np.asarray(part, np.int32)

    def counts(self) -> np.ndarray:
        """How often each token occurs, int64 [vocab_size]."""
        counts = np.zeros(self.vocab_size, np.int64)
        waiting, size = [], 0
        lengths = np.diff(self.ends, prepend=0)
        for start, length in zip(self.starts.tolist(), lengths.tolist(), strict=True):
            for at in range(start, start + length, _COUNTED):
                waiting.append(self.tokens[at : min(at + _COUNTED, start + length)])
                size += len(waiting[-1])
                if size >= _COUNTED:
                    counts += np.bincount(np.concatenate(waiting), minlength=self.vocab_size)
                    waiting, size = [], 0
        if waiting:
            counts += np.bincount(np.concatenate(waiting), minlength=self.vocab_size)
        return counts

    def without(self, dropped: np.ndarray) -> "TokenDocuments":
        """These documents without those where `dropped`, bool [documents], is True."""
        if not dropped.any():
            return self
        lengths = np.diff(self.ends, prepend=0)[~dropped]
        return dataclasses.replace(self, starts=self.starts[~dropped], ends=np.cumsum(lengths))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Documents of several sources, with weights.

    Each packed sequence has documents of one source only. The share of a source in the sequences,
    and so in the tokens, is its weight divided by the sum of all.

    Attributes:
      sources: the documents of each source.
      weights: the weight of each source.
    """

    sources: tuple[TokenDocuments, ...]
    weights: tuple[float, ...]


Documents = ByteDocuments | TokenDocuments
"""Documents of one source."""


def sources_of(
    documents: Sequence[bytes] | Documents | Mixture,
) -> tuple[tuple[Documents, ...], tuple[float, ...]]:
    """The documents of each source, and the weights of the sources, whose sum is 1."""
    if isinstance(documents, Mixture):
        total = sum(documents.weights)
        return documents.sources, tuple(weight / total for weight in documents.weights)
    if not isinstance(documents, Documents):
        documents = ByteDocuments(documents)
    return (documents,), (1.0,)


class Turns:
    """Whose turn it is: the source of each sequence, and which of its sequences it is.

    Of the first n sequences, the share of each source in what is left by the sources before it is
    exact but for rounding: no random numbers are drawn, and the answer for any index is immediate.

    Args:
      weights: the weight of each source, positive.

    Example:
      >>> turns = Turns([3, 1])
      >>> [turns[i] for i in range(5)]
      [(0, 0), (0, 1), (0, 2), (1, 0), (0, 3)]
    """

    def __init__(self, weights: Sequence[float]):
        # Integers in exactly the same proportion, so that the answers are the same everywhere.
        exact = [Fraction(weight) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * scale) for weight in exact]

    def __getitem__(self, index: int) -> tuple[int, int]:
        """The source of sequence `index`, and the number of its earlier sequences."""
        before, after = index, index + 1
        rest = sum(self._weights)
        for source, weight in enumerate(self._weights):
            # How many of the sequences up to here are left to the sources that follow.
            left_before = before * (rest - weight) // rest
            left_after = after * (rest - weight) // rest
            if after - left_after != before - left_before:
                return source, before - left_before
            before, after, rest = left_before, left_after, rest - weight
        raise AssertionError("the last source takes all that is left")
