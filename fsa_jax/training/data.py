"""Documents to packed sequences of tokens.

A document of bytes is the token DOCUMENT_START followed by the bytes of one text; `tokenizer` says
what others are. The documents are concatenated and cut into sequences of equal length. Within a
sequence each document, or part of one, is a segment, and segments are numbered from 1. Every token
is in exactly one sequence of an epoch. The sequences are shuffled over the whole corpus, so that a
batch is not one long file.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from fsa_jax.training.corpus import Corpus as Corpus
from fsa_jax.training.corpus import TokenCorpus as TokenCorpus
from fsa_jax.training.documents import Documents, Mixture, Turns, sources_of
from fsa_jax.training.renamed import renamed_arguments
from fsa_jax.training.text import load_corpus as load_corpus
from fsa_jax.training.text import open_corpus as open_corpus

#: Documents in any form: the bytes of each, memory-mapped tokens, or those of several sources.
AnyDocuments = Sequence[bytes] | Documents | Mixture

# The validation set does not depend on the seed of the run, so that runs stay comparable.
_VALIDATION_SEED = 0

# Most sequences are the middle of one file. This many are enough to find one with a document
# boundary, and are searched in an instant.
_SEQUENCES_TO_SEARCH = 2000


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of B packed sequences of T tokens.

    Attributes:
      tokens: int32 [B, T]; 0 at padding.
      segment_ids: int32 [B, T], numbered from 1 in each sequence; 0 at padding.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray


class PackedSequences:
    """Documents packed into sequences, as a random-access source for grain.

    Args:
      documents: at least one document, as bytes or as tokens.
      seq_len: tokens per sequence (T). Only the last sequence may end with padding.

    Example:
      >>> sequences = PackedSequences([b"abc", b"d"], seq_len=4)
      >>> [sequences[i]["tokens"].tolist() for i in range(len(sequences))]
      [[256, 97, 98, 99], [256, 100, 0, 0]]
    """

    def __init__(self, documents: Sequence[bytes] | Documents, *, seq_len: int):
        self._documents = sources_of(documents)[0][0]
        self._seq_len = seq_len
        self._ends = self._documents.ends

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self._seq_len)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sequence `index`: "tokens" and "segment_ids", int32 [T], both 0 at padding."""
        tokens = np.zeros(self._seq_len, np.int32)
        segment_ids = np.zeros(self._seq_len, np.int32)
        begin = index * self._seq_len
        which = int(np.searchsorted(self._ends, begin, side="right"))
        offset = begin - (int(self._ends[which - 1]) if which else 0)
        used = segment = 0
        while used < self._seq_len and which < len(self._documents):
            part = self._documents.part(which, offset, self._seq_len - used)
            segment += 1
            tokens[used : used + len(part)] = part
            segment_ids[used : used + len(part)] = segment
            used += len(part)
            which, offset = which + 1, 0
        return {"tokens": tokens, "segment_ids": segment_ids}

    def __repr__(self) -> str:
        # grain shows this text, and compares it when a saved position is restored.
        return f"PackedSequences({len(self._documents)} documents, seq_len={self._seq_len})"


class TrainingBatches:
    """An endless iterator of training batches whose position can be saved and restored.

    Args:
      documents: the training documents. Those of a `Mixture` take turns in proportion to their
        weights, each source in its own epochs.
      seq_len: tokens per sequence (T).
      batch_size: sequences per batch (B).
      seed: seed of the order.
      sequences: first and one past the last sequence of a batch that this process reads; None: all.

    Example:
      >>> batches = TrainingBatches([b"one document"], seq_len=8, batch_size=2, seed=0)
      >>> next(batches).tokens.shape
      (2, 8)
    """

    @renamed_arguments(row_length="seq_len", rows="sequences")
    def __init__(
        self,
        documents: AnyDocuments,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        sequences: tuple[int, int] | None = None,
    ):
        # Sequences are read by index: the documents are in memory or mapped into it, and the
        # position is then a single number, whichever sequences this process reads.
        sources, weights = sources_of(documents)
        self._sources = [_shuffled_sequences(source, seq_len, seed).repeat() for source in sources]
        self._turns = Turns(weights)
        self._batch_size = batch_size
        self._own = sequences or (0, batch_size)
        self._batches = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._batches * self._batch_size
        turns = (self._turns[first + i] for i in range(*self._own))
        sequences = (self._sources[which][index] for which, index in turns)
        self._batches += 1
        return _stack(list(_not_filtered(sequences)))

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch, as JSON values."""
        return {"batches": self._batches}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` returned."""
        self._batches = int(state["batches"])


def validation_batches(
    documents: AnyDocuments, *, seq_len: int, batch_size: int, num_sequences: int
) -> list[Batch]:
    """The fixed validation set: at most `num_sequences`, padded to full batches with empty ones.

    Each source of a `Mixture` has its share of them, but at least one.
    """
    chosen = _fixed_sequences(documents, seq_len, num_sequences)
    empty = {name: np.zeros_like(value) for name, value in chosen[0].items()}
    chosen += [empty] * (-len(chosen) % batch_size)
    return [_stack(chosen[i : i + batch_size]) for i in range(0, len(chosen), batch_size)]


def example_sequence(documents: AnyDocuments, *, seq_len: int) -> Batch:
    """A packed sequence to plot: of those searched, the one with the longest second document."""

    def second_longest(sequence: dict[str, np.ndarray]) -> int:
        # Padding does not count. A sequence with a single document has a second one of length 0.
        return int(np.sort(np.bincount(sequence["segment_ids"], minlength=3)[1:])[-2])

    sequences = _fixed_sequences(documents, seq_len, _SEQUENCES_TO_SEARCH)
    return _stack([max(sequences, key=second_longest)])


def _fixed_sequences(
    documents: AnyDocuments, seq_len: int, limit: int
) -> list[dict[str, np.ndarray]]:
    """At most `limit` sequences, always the same ones, from all over the documents."""
    chosen = []
    for source, weight in zip(*sources_of(documents), strict=True):
        packed = _shuffled_sequences(source, seq_len, _VALIDATION_SEED)
        share = min(max(1, round(limit * weight)), len(packed))
        chosen.extend(_not_filtered(packed[i] for i in range(share)))
    return chosen


def _shuffled_sequences(documents: Documents, seq_len: int, seed: int) -> grain.MapDataset:
    sequences = PackedSequences(documents, seq_len=seq_len)
    return grain.MapDataset.source(sequences).seed(seed).shuffle()


def _not_filtered[Item](items: Iterable[Item | None]) -> Iterator[Item]:
    """The items, none of which is None: grain's type allows it for filters, and there are none."""
    return (item for item in items if item is not None)


def _stack(sequences: Sequence[dict[str, np.ndarray]]) -> Batch:
    return Batch(
        **{name: np.stack([sequence[name] for sequence in sequences]) for name in sequences[0]}
    )


def unigram_loss(
    train: AnyDocuments, validation: Iterable[Batch], counts: Sequence[np.ndarray] = ()
) -> float:
    """Validation loss, in nats per token, of a model that knows only the frequency of each token.

    The mean over the validation targets of -log((count + 1) / (total + V)), with counts over the
    training documents (add-one smoothing); V is 256 for bytes. For a mixture, the probability is
    the weighted mean of those of its sources. The targets are those of the model's validation loss:
    tokens that follow another token of their segment.

    Args:
      train: the training documents.
      validation: the validation set.
      counts: how often each of the V tokens occurs in each source, if that is known.
    """
    sources, weights = sources_of(train)
    log_probabilities = []
    for source, weight, known in itertools.zip_longest(sources, weights, counts):
        smoothed = 1.0 + (source.counts() if known is None else known)
        log_probabilities.append(np.log(weight) - (np.log(smoothed.sum()) - np.log(smoothed)))
    losses = -np.logaddexp.reduce(log_probabilities)
    targets = np.concatenate([_targets(batch) for batch in validation])
    # Nothing but a document start, which bytes do not count, is outside the table.
    return float(losses[targets[targets < len(losses)]].mean())


def target_bytes(validation: Iterable[Batch], num_bytes: np.ndarray) -> int:
    """The bytes of text that the validation targets stand for.

    Args:
      validation: the validation set.
      num_bytes: the bytes of each token.

    Raises:
      ValueError: there is no target, or none with text.
    """
    found = sum(int(num_bytes[_targets(batch)].sum()) for batch in validation)
    if not found:
        raise ValueError(
            "text must have validation documents of at least two tokens, got shorter ones only"
        )
    return found


def _targets(batch: Batch) -> np.ndarray:
    previous, current = batch.segment_ids[:, :-1], batch.segment_ids[:, 1:]
    return batch.tokens[:, 1:][(previous == current) & (current != 0)]
