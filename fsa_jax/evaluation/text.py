"""The text of an evaluation, as tokens: packed sequences for the loss, and stretches of it."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fsa_jax.evaluation.models import OpenedModel
from fsa_jax.training.corpus import Corpus, TokenCorpus
from fsa_jax.training.data import open_corpus, validation_batches
from fsa_jax.training.documents import ByteDocuments, Documents, Mixture, sources_of
from fsa_jax.training.text import open_documents
from fsa_jax.training.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
    """The documents of a text.

    Attributes:
      documents: the documents, with begin and end tokens as in training.
      tokenizer: their tokenizer.
      source: what was read, for a human reader.
    """

    documents: Documents | Mixture
    tokenizer: Tokenizer
    source: str

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """How often each token occurs, int64 [V], without begin and end tokens."""
        counts = np.zeros(self.tokenizer.vocab_size, np.int64)
        for source in sources_of(self.documents)[0]:
            found = source.counts()
            counts[: len(found)] += found
        for token in (self.tokenizer.begin, self.tokenizer.end):
            if token is not None:
                counts[token] = 0
        return counts

    def describe(self) -> dict[str, Any]:
        """The text in JSON values."""
        tokens = int(self.counts.sum())
        num_bytes = int(self.counts @ self.tokenizer.num_bytes)
        return {
            "source": self.source,
            "documents": sum(map(len, sources_of(self.documents)[0])),
            "bytes": num_bytes,
            "tokens": tokens,
            "bytes_per_token": num_bytes / max(tokens, 1),
        }

    @functools.cached_property
    def stretch(self) -> np.ndarray:
        """All documents in one array, with line breaks for begin and end tokens between them."""
        (separator,) = self.tokenizer.encode([b"\n"])
        parts = []
        for source in sources_of(self.documents)[0]:
            for which, length in enumerate(np.diff(source.ends, prepend=0).tolist()):
                document = source.part(which, 0, length)
                # Pre-tokenised documents may have neither.
                begins = int(document[0] == self.tokenizer.begin)
                ends = int(length > begins and document[-1] == self.tokenizer.end)
                parts += [document[begins : length - ends], separator]
        return np.concatenate(parts[:-1]).astype(np.int32)


def read_text(
    models: Sequence[OpenedModel],
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    column: str = "text",
) -> Text:
    """Reads the text of an evaluation.

    Args:
      models: the models; without `paths` it is the validation part of the text of their runs.
      paths: what `fsa-jax train` reads as a text; all documents are used.
      tokenizer: the tokenizer of all models.
      column: the column of the text in files of records among the paths.

    Raises:
      ValueError: a path cannot be read; without paths, the text of a run is unknown, has changed
        since its training, or is not that of the other runs.
      OSError: the cache of tokens cannot be written.
    """
    if paths:
        documents, source = open_documents(paths, tokenizer=tokenizer, column=column)
        return Text(documents, tokenizer, source)
    corpus = _own_text(models, tokenizer)
    held_out = corpus.validation
    documents = ByteDocuments(held_out) if isinstance(held_out, tuple) else held_out
    return Text(documents, tokenizer, f"the validation part of {corpus.source}")


def _own_text(models: Sequence[OpenedModel], tokenizer: Tokenizer) -> Corpus | TokenCorpus:
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
    corpus = open_corpus(
        first.text, tokenizer=tokenizer, column=first.text_column, weights=first.text_weights
    )
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

    The choice is the trainer's: as many sequences as those of its validation set are the same ones.

    Raises:
      ValueError: the text does not fill one sequence.
    """
    size = sum(int(source.ends[-1]) for source in sources_of(text.documents)[0])
    if size < seq_len:
        raise ValueError(
            f"seq_len must be at most the {size} tokens of the text, got seq_len={seq_len} "
            f"for {text.source}"
        )
    batches = validation_batches(text.documents, seq_len=seq_len, batch_size=1, num_sequences=limit)
    tokens, segment_ids = (
        np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("tokens", "segment_ids")
    )
    return Sequences(tokens, segment_ids)
