"""The text of an evaluation, as tokens: packed sequences for the loss, and stretches of it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from fsa_jax.evaluation.models import OpenedModel, Tokenizer
from fsa_jax.training.data import Corpus, load_corpus

# The choice of sequences is that of the trainer's validation set.
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Text:
    """The documents of a text.

    Attributes:
      documents: int32 tokens of each document, without a start token.
      num_bytes: number of bytes of all documents.
      start: the token at the start of every document, or None.
      source: what was read, for a human reader.
      separator: tokens of a line break, which stand between documents in a stretch of text.
    """

    documents: list[np.ndarray]
    num_bytes: int
    start: int | None
    source: str
    separator: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Number of tokens, without start tokens."""
        return sum(map(len, self.documents))

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token stands for on average."""
        return self.num_bytes / self.num_tokens

    def describe(self) -> dict[str, Any]:
        """The text in JSON values."""
        return {
            "source": self.source,
            "documents": len(self.documents),
            "bytes": self.num_bytes,
            "tokens": self.num_tokens,
            "bytes_per_token": self.bytes_per_token,
        }

    def stretch(self) -> np.ndarray:
        """All documents in one array, with line breaks between them and no start tokens."""
        parts = [part for document in self.documents for part in (document, self.separator)]
        return np.concatenate(parts[:-1])


def read_text(models: Sequence[OpenedModel], paths: Sequence[Path], tokenizer: Tokenizer) -> Text:
    """Reads the text of an evaluation.

    Args:
      models: the models; without `paths` it is the validation part of the text of their runs.
      paths: text files and folders, all of whose documents are used.
      tokenizer: the tokenizer of all models.

    Raises:
      ValueError: a path cannot be read; without paths, the text of a run is unknown, has changed
        since its training, or is not that of the other runs.
    """
    if paths:
        corpus = load_corpus(paths)
        # The training part of a single document comes before its validation part.
        documents, source = (*corpus.train, *corpus.validation), corpus.source
        if len(documents) == 2 and sum(corpus.read.values()) == 1:
            documents = (b"".join(documents),)
    else:
        corpus = _own_text(models)
        documents, source = corpus.validation, f"the validation part of {corpus.source}"
    tokens = [
        np.asarray(tokenizer.encode(document.decode("utf-8", "surrogateescape")), np.int32)
        for document in documents
    ]
    return Text(
        documents=tokens,
        num_bytes=sum(map(len, documents)),
        start=tokenizer.start,
        source=source,
        separator=np.asarray(tokenizer.encode("\n"), np.int32),
    )


def _own_text(models: Sequence[OpenedModel]) -> Corpus:
    """The text that all models were trained on."""
    first = models[0]
    for model in models:
        if model.text is None:
            raise ValueError(
                f"text must be given for {str(model.path)!r}, whose training text is not known"
            )
        if model.fingerprint != first.fingerprint:
            raise ValueError(
                "text must be given where the checkpoints were trained on different texts, got "
                f"none for {str(first.path)!r} and {str(model.path)!r}"
            )
    assert first.text is not None
    corpus = load_corpus(first.text)
    if corpus.fingerprint != first.fingerprint:
        raise ValueError(
            f"text must be given for {str(first.path)!r}, since {corpus.source} is no longer the "
            "text of its training, and its validation part may hold what the model was trained on"
        )
    return corpus


@dataclasses.dataclass(frozen=True)
class Sequences:
    """N packed sequences of T tokens.

    Attributes:
      tokens: int32 [N, T], 0 at padding.
      segment_ids: int32 [N, T], numbered from 1 in each sequence; 0 at padding.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        """The token after each position, int32 [N, T]."""
        return np.roll(self.tokens, -1, axis=1)

    @property
    def counted(self) -> np.ndarray:
        """Whether the next token is of the same segment and is predicted, bool [N, T]."""
        following = np.pad(self.segment_ids[:, 1:], ((0, 0), (0, 1)))
        return (self.segment_ids == following) & (self.segment_ids > 0)

    @property
    def positions(self) -> np.ndarray:
        """The position of each token in its segment, from 0, int32 [N, T]."""
        index = np.arange(self.tokens.shape[1], dtype=np.int32)[None]
        new = np.pad(np.diff(self.segment_ids, axis=1) != 0, ((0, 0), (1, 0)))
        return index - np.maximum.accumulate(np.where(new, index, 0), axis=1)


def pack(text: Text, *, seq_len: int, limit: int) -> Sequences:
    """Packs the documents into sequences like the trainer, and chooses at most `limit` of them.

    The documents are concatenated, each after its start token, and cut into sequences of equal
    length. The choice is the trainer's: as many sequences as those of its validation set are the
    same ones.

    Raises:
      ValueError: the text does not fill one sequence.
    """
    start = np.asarray([] if text.start is None else [text.start], np.int32)
    parts = [np.concatenate([start, document]) for document in text.documents]
    stream = np.concatenate(parts)
    if len(stream) < seq_len:
        raise ValueError(
            f"seq_len must be at most the {len(stream)} tokens of the text, got seq_len={seq_len} "
            f"for {text.source}"
        )
    owner = np.repeat(np.arange(1, len(parts) + 1, dtype=np.int32), [len(part) for part in parts])
    count = -(-len(stream) // seq_len)
    padding = (0, count * seq_len - len(stream))
    tokens = np.pad(stream, padding).reshape(count, seq_len)
    owner = np.pad(owner, padding).reshape(count, seq_len)
    shuffled = grain.MapDataset.range(count).seed(_SEED).shuffle()
    chosen = np.asarray([shuffled[i] for i in range(min(limit, count))])
    owner = owner[chosen]
    return Sequences(tokens[chosen], np.where(owner > 0, owner - owner[:, :1] + 1, 0))
