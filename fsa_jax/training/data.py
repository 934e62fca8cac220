"""Text files to packed sequences of bytes.

A document is the token DOCUMENT_START followed by the bytes of one file. The documents are
concatenated and cut into sequences of equal length. Within a sequence each document, or part of
one, is a segment, and segments are numbered from 1. Every byte is in exactly one sequence of an
epoch. The sequences are shuffled over the whole corpus, so that a batch is not one long file.
"""

import collections
import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from fsa_jax.training.config import DOCUMENT_START
from fsa_jax.training.renamed import renamed_arguments, renamed_fields

# One document in 20, but at least one, is held out for validation.
_VALIDATION_EVERY = 20

# Folders of the standard library that are not its own source text: installed packages, and tests
# with their data (half of all bytes, much of it tables).
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})

# The validation set does not depend on the seed of the run, so that runs stay comparable.
_VALIDATION_SEED = 0

# The line that says what was read names at most this many suffixes.
_MAX_SHOWN = 6

# Most sequences are the middle of one file. This many are enough to find one with a document
# boundary, and are searched in an instant.
_SEQUENCES_TO_SEARCH = 2000


@renamed_fields(held_out="validation")
@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training documents, validation documents, and a fingerprint of their bytes.

    Attributes:
      train: bytes of each training document.
      validation: bytes of each validation document.
      source: the files or folders, described for a human reader.
      fingerprint: hexadecimal SHA-256 over all documents of both splits.
      read: number of files read, by suffix.
      skipped: number of files that were found and skipped, by reason and suffix.
    """

    train: tuple[bytes, ...]
    validation: tuple[bytes, ...]
    source: str
    fingerprint: str
    read: Mapping[str, int] = dataclasses.field(default_factory=dict)
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line that says which files were read and which were skipped."""
        read = f"read {sum(self.read.values())} files ({_counts(self.read)}) of {self.source}"
        return f"{read}; skipped: {_counts(self.skipped) or 'none'}"


def _counts(counts: Mapping[str, int]) -> str:
    """The largest counts, and the sum of the rest, as text."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {name}" for name, count in ordered[:_MAX_SHOWN]]
    rest = sum(count for _, count in ordered[_MAX_SHOWN:])
    return ", ".join(shown + [f"{rest} others"] * bool(rest))


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of B packed sequences of T tokens.

    Attributes:
      tokens: int32 [B, T], bytes and DOCUMENT_START; 0 at padding.
      segment_ids: int32 [B, T], numbered from 1 in each sequence; 0 at padding.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray


def load_corpus(paths: Sequence[Path] = ()) -> Corpus:
    """Reads documents and splits them into a training and a validation set.

    The order and the split follow from a hash of each document's bytes, so they depend neither on
    paths nor on the order in which a folder lists its files. Identical documents count once, so a
    copy of a training document is never in the validation set. A single document is cut: its last
    5% are the validation set.

    Args:
      paths: text files, whatever their suffix, and folders, which are searched recursively. Hidden
        files in a folder are skipped, and so are binary ones, which have a NUL byte in their first
        8 KiB. Empty: the standard library's *.py files.

    Returns:
      The corpus.

    Raises:
      ValueError: a path is missing or unreadable, or the files hold no text.

    Example:
      >>> corpus = load_corpus()
      >>> len(corpus.train) > len(corpus.validation) > 0
      True
    """
    skipped = collections.Counter()
    if paths:
        source = ", ".join(str(path) for path in paths)
        files = [file for path in paths for file in _text_files(Path(path), skipped)]
    else:
        library = Path(sysconfig.get_path("stdlib"))
        source = f"the Python standard library in {library}"
        files = []
        for file in _walk(library, skipped, _NOT_LIBRARY):
            if file.suffix == ".py":
                files.append(file)
            else:
                skipped[_suffix(file)] += 1
    read = collections.Counter()
    by_hash: dict[bytes, bytes] = {}
    for file in files:
        text = _read(file)
        digest = hashlib.sha256(text).digest()
        if not text:
            skipped["empty"] += 1
        elif digest in by_hash:
            skipped["copies of others"] += 1
        else:
            by_hash[digest] = text
            read[_suffix(file)] += 1
    documents = [by_hash[digest] for digest in sorted(by_hash)]
    if sum(map(len, documents)) < 2:
        raise ValueError(
            f"text must hold at least two bytes, got fewer in {source}; skipped: "
            f"{_counts(skipped) or 'none'}"
        )
    if len(documents) == 1:
        cut = len(documents[0]) - max(1, len(documents[0]) // _VALIDATION_EVERY)
        validation, train = [documents[0][cut:]], [documents[0][:cut]]
    else:
        count = max(1, len(documents) // _VALIDATION_EVERY)
        validation, train = documents[:count], documents[count:]
    return Corpus(
        train=tuple(train),
        validation=tuple(validation),
        source=source,
        fingerprint=hashlib.sha256(b"".join(sorted(by_hash))).hexdigest(),
        read=read,
        skipped=skipped,
    )


def _suffix(file: Path) -> str:
    return file.suffix or "without suffix"


def _text_files(path: Path, skipped: collections.Counter[str]) -> list[Path]:
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"text must be files or folders that exist, got {str(path)!r}")
        return [path]
    found = []
    for file in _walk(path, skipped):
        if b"\0" in _read(file, 8192):
            skipped[f"binary {_suffix(file)}"] += 1
        else:
            found.append(file)
    return found


def _walk(
    folder: Path, skipped: collections.Counter[str], excluded: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """The files below a folder.

    Counts in `skipped` what it leaves out: hidden files and folders, folders by their name, links
    to folders, and whatever is not a regular file.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"text must be readable, got {error.filename!r}: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        entered = []
        for name in folders:
            if name == "__pycache__" or name in excluded:
                skipped[f"folders {name}"] += 1
            elif name.startswith("."):
                skipped["hidden"] += 1
            elif Path(parent, name).is_symlink():  # it may lead in a circle
                skipped["links to folders"] += 1
            else:
                entered.append(name)
        folders[:] = entered
        for name in names:
            file = Path(parent, name)
            if name.startswith("."):
                skipped["hidden"] += 1
            elif not file.is_file():  # reading a pipe or a socket would block
                skipped["not a file"] += 1
            else:
                yield file


def _read(file: Path, size: int = -1) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(size)
    except OSError as error:
        raise ValueError(f"text must be readable, got {str(file)!r}: {error.strerror}") from error


class PackedSequences:
    """Documents packed into sequences, as a random-access source for grain.

    Args:
      documents: bytes of each document; at least one document.
      seq_len: tokens per sequence (T). Only the last sequence may end with padding.

    Example:
      >>> sequences = PackedSequences([b"abc", b"d"], seq_len=4)
      >>> [sequences[i]["tokens"].tolist() for i in range(len(sequences))]
      [[256, 97, 98, 99], [256, 100, 0, 0]]
    """

    def __init__(self, documents: Sequence[bytes], *, seq_len: int):
        self._documents = documents
        self._seq_len = seq_len
        self._ends = np.cumsum([1 + len(document) for document in documents])

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
            part = self._part(which, offset, self._seq_len - used)
            segment += 1
            tokens[used : used + len(part)] = part
            segment_ids[used : used + len(part)] = segment
            used += len(part)
            which, offset = which + 1, 0
        return {"tokens": tokens, "segment_ids": segment_ids}

    def _part(self, which: int, offset: int, limit: int) -> np.ndarray:
        """At most `limit` tokens of a document from token `offset` on; byte i is token i + 1."""
        text = self._documents[which][max(offset - 1, 0) : offset - 1 + limit]
        part = np.frombuffer(text, np.uint8).astype(np.int32)
        return part if offset else np.concatenate([np.asarray([DOCUMENT_START], np.int32), part])

    def __repr__(self) -> str:
        # grain shows this text, and compares it when a saved position is restored.
        return f"PackedSequences({len(self._documents)} documents, seq_len={self._seq_len})"


class TrainingBatches:
    """An endless iterator of training batches whose position can be saved and restored.

    Args:
      documents: bytes of each training document.
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
        documents: Sequence[bytes],
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        sequences: tuple[int, int] | None = None,
    ):
        # Sequences are read by index: the documents are in memory, and the position is then a
        # single number, whichever sequences this process reads.
        self._sequences = _shuffled_sequences(documents, seq_len, seed).repeat()
        self._batch_size = batch_size
        self._own = sequences or (0, batch_size)
        self._batches = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._batches * self._batch_size
        sequences = (self._sequences[first + i] for i in range(*self._own))
        self._batches += 1
        return _stack(list(_not_filtered(sequences)))

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch, as JSON values."""
        return {"batches": self._batches}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` returned."""
        self._batches = int(state["batches"])


def validation_batches(
    documents: Sequence[bytes], *, seq_len: int, batch_size: int, num_sequences: int
) -> list[Batch]:
    """The fixed validation set: at most `num_sequences`, padded to full batches with empty ones."""
    chosen = _fixed_sequences(documents, seq_len, num_sequences)
    empty = {name: np.zeros_like(value) for name, value in chosen[0].items()}
    chosen += [empty] * (-len(chosen) % batch_size)
    return [_stack(chosen[i : i + batch_size]) for i in range(0, len(chosen), batch_size)]


def example_sequence(documents: Sequence[bytes], *, seq_len: int) -> Batch:
    """A packed sequence to plot: of those searched, the one with the longest second document."""

    def second_longest(sequence: dict[str, np.ndarray]) -> int:
        # Padding does not count. A sequence with a single document has a second one of length 0.
        return int(np.sort(np.bincount(sequence["segment_ids"], minlength=3)[1:])[-2])

    sequences = _fixed_sequences(documents, seq_len, _SEQUENCES_TO_SEARCH)
    return _stack([max(sequences, key=second_longest)])


def _fixed_sequences(
    documents: Sequence[bytes], seq_len: int, limit: int
) -> list[dict[str, np.ndarray]]:
    """At most `limit` sequences, always the same ones, from all over the documents."""
    packed = _shuffled_sequences(documents, seq_len, _VALIDATION_SEED)
    return list(_not_filtered(packed[i] for i in range(min(limit, len(packed)))))


def _shuffled_sequences(documents: Sequence[bytes], seq_len: int, seed: int) -> grain.MapDataset:
    sequences = PackedSequences(documents, seq_len=seq_len)
    return grain.MapDataset.source(sequences).seed(seed).shuffle()


def _not_filtered[Item](items: Iterable[Item | None]) -> Iterator[Item]:
    """The items, none of which is None: grain's type allows it for filters, and there are none."""
    return (item for item in items if item is not None)


def _stack(sequences: Sequence[dict[str, np.ndarray]]) -> Batch:
    return Batch(
        **{name: np.stack([sequence[name] for sequence in sequences]) for name in sequences[0]}
    )


def unigram_loss(train: Iterable[bytes], validation: Iterable[Batch]) -> float:
    """Validation loss, in nats per byte, of a model that knows only the frequency of each byte.

    The mean over the validation targets of -log((count + 1) / (total + 256)), with counts over the
    training documents (add-one smoothing). The targets are those of the model's validation loss:
    bytes that follow another token of their segment.
    """
    counts = np.ones(256, np.float64)
    for document in train:
        counts += np.bincount(np.frombuffer(document, np.uint8), minlength=256)
    losses = np.log(counts.sum()) - np.log(counts)
    targets = np.concatenate([_targets(batch) for batch in validation])
    return float(losses[targets].mean())


def _targets(batch: Batch) -> np.ndarray:
    previous, current = batch.segment_ids[:, :-1], batch.segment_ids[:, 1:]
    return batch.tokens[:, 1:][(previous == current) & (current != 0)]
