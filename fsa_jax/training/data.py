"""Text files to packed rows of bytes.

A document is the bytes of one file after the id DOCUMENT_START. The documents, one after another,
are cut into rows; in a row, each document or part of one is a segment, and segments count from 1.
Every byte is in exactly one row of an epoch. The rows are shuffled over the whole corpus, so that
a batch is not one long file.
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

# One document in 20 is held out (and at least one).
_HELD_OUT_EVERY = 20

# Folders of the standard library that are not its own text: installed packages, and tests with
# their data (half of all bytes, much of it tables).
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})

# The held-out rows do not depend on the seed of the run: runs stay comparable.
_HELD_OUT_SEED = 0

# So many suffixes stand in the line that says what was read.
_SHOWN = 6

# Most rows are the middle of one file: enough rows to find one with a boundary, in an instant.
_ROWS_TO_SEARCH = 2000


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents to train on, documents held out, and a name for exactly these bytes.

    Attributes:
      train: bytes of each training document.
      held_out: bytes of each held-out document.
      source: the files or folders, as text for people.
      fingerprint: hexadecimal SHA-256 over all documents of both sides.
      read: files read, by suffix.
      skipped: files that were found and left out, by reason and suffix.
    """

    train: tuple[bytes, ...]
    held_out: tuple[bytes, ...]
    source: str
    fingerprint: str
    read: Mapping[str, int] = dataclasses.field(default_factory=dict)
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def summary(self) -> str:
        """Which files were read and which were not, in a line."""
        read = f"read {sum(self.read.values())} files ({_counts(self.read)}) of {self.source}"
        return f"{read}; skipped: {_counts(self.skipped) or 'none'}"


def _counts(counts: Mapping[str, int]) -> str:
    """The largest counts, and the sum of the others."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {name}" for name, count in ordered[:_SHOWN]]
    rest = sum(count for _, count in ordered[_SHOWN:])
    return ", ".join(shown + [f"{rest} others"] * bool(rest))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows.

    Attributes:
      tokens: int32 [B, T], bytes and DOCUMENT_START; 0 at padding.
      segment_ids: int32 [B, T], from 1 in each row; 0 at padding.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray


def load_corpus(paths: Sequence[Path] = ()) -> Corpus:
    """Reads documents and splits off the held-out ones.

    The order and the split follow from a hash of each document's bytes, so they depend on no
    path and on no listing order, and a copy of a training document is never held out: identical
    documents count once. A single document is cut: its last 5% are held out.

    Args:
      paths: text files, whatever their suffix, and folders that are searched recursively (hidden
        files, and binary ones, with a NUL byte in their first 8 KiB, are left out). Empty: the
        standard library's *.py files.

    Returns:
      The corpus.

    Raises:
      ValueError: a path is missing or unreadable, or there is no text in it.

    Example:
      >>> corpus = load_corpus()
      >>> len(corpus.train) > len(corpus.held_out) > 0
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
            f"data must hold at least two bytes of text, got none in {source}; skipped: "
            f"{_counts(skipped) or 'none'}"
        )
    if len(documents) == 1:
        cut = len(documents[0]) - max(1, len(documents[0]) // _HELD_OUT_EVERY)
        held_out, train = [documents[0][cut:]], [documents[0][:cut]]
    else:
        count = max(1, len(documents) // _HELD_OUT_EVERY)
        held_out, train = documents[:count], documents[count:]
    return Corpus(
        train=tuple(train),
        held_out=tuple(held_out),
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
            raise ValueError(f"data must be files or folders that exist, got {str(path)!r}")
        return [path]
    found = []
    for file in _walk(path, skipped):
        if b"\0" in _read(file, 8192):
            skipped[f"binary {_suffix(file)}"] += 1
        else:
            found.append(file)
    return found


def _walk(
    folder: Path, skipped: collections.Counter[str], left_out: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """The files below a folder; counts those of no use to anyone, and folders by their name."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"data must be readable, got {error.filename!r}: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        entered = []
        for name in folders:
            if name == "__pycache__" or name in left_out:
                skipped[f"folders {name}"] += 1
            elif name.startswith("."):
                skipped["hidden"] += 1
            elif Path(parent, name).is_symlink():  # which may lead round in a circle
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
        raise ValueError(f"data must be readable, got {str(file)!r}: {error.strerror}") from error


class PackedRows:
    """Documents packed into rows, as a random-access source for grain.

    Args:
      documents: at least one.
      row_length: tokens of a row (T). Only the last row may end with padding.

    Example:
      >>> rows = PackedRows([b"abc", b"d"], row_length=4)
      >>> [rows[i]["tokens"].tolist() for i in range(len(rows))]
      [[256, 97, 98, 99], [256, 100, 0, 0]]
    """

    def __init__(self, documents: Sequence[bytes], *, row_length: int):
        self._documents = documents
        self._row_length = row_length
        self._ends = np.cumsum([1 + len(document) for document in documents])

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self._row_length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`: "tokens" and "segment_ids", int32 [T], both 0 at padding."""
        tokens = np.zeros(self._row_length, np.int32)
        segment_ids = np.zeros(self._row_length, np.int32)
        begin = index * self._row_length
        which = int(np.searchsorted(self._ends, begin, side="right"))
        offset = begin - (int(self._ends[which - 1]) if which else 0)
        used = segment = 0
        while used < self._row_length and which < len(self._documents):
            part = self._part(which, offset, self._row_length - used)
            segment += 1
            tokens[used : used + len(part)] = part
            segment_ids[used : used + len(part)] = segment
            used += len(part)
            which, offset = which + 1, 0
        return {"tokens": tokens, "segment_ids": segment_ids}

    def _part(self, which: int, offset: int, most: int) -> np.ndarray:
        """Up to `most` tokens of a document from token `offset` on; byte i is token i + 1."""
        text = self._documents[which][max(offset - 1, 0) : offset - 1 + most]
        part = np.frombuffer(text, np.uint8).astype(np.int32)
        return part if offset else np.concatenate([np.asarray([DOCUMENT_START], np.int32), part])

    def __repr__(self) -> str:
        # grain shows it, and compares it when a saved position is set.
        return f"PackedRows({len(self._documents)} documents, row_length={self._row_length})"


class TrainingBatches:
    """Endless training batches whose position can be saved and set.

    Args:
      documents: the training documents.
      row_length: tokens of a row (T).
      batch_size: rows of a batch (B).
      seed: seed of the order.
      rows: first and one past the last row of a batch that this process reads; None: all.

    Example:
      >>> batches = TrainingBatches([b"one document"], row_length=8, batch_size=2, seed=0)
      >>> next(batches).tokens.shape
      (2, 8)
    """

    def __init__(
        self,
        documents: Sequence[bytes],
        *,
        row_length: int,
        batch_size: int,
        seed: int,
        rows: tuple[int, int] | None = None,
    ):
        # Read by number: the documents are in memory, and a position is one number whatever rows
        # this process reads.
        self._rows = _shuffled_rows(documents, row_length, seed).repeat()
        self._batch_size = batch_size
        self._own = rows or (0, batch_size)
        self._batches = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._batches * self._batch_size
        rows = (self._rows[first + i] for i in range(*self._own))
        self._batches += 1
        # grain's type allows None, for filters; there is none here
        return _stack([row for row in rows if row is not None])

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch, as JSON values."""
        return {"batches": self._batches}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave."""
        self._batches = int(state["batches"])


def held_out_batches(
    documents: Sequence[bytes], *, row_length: int, batch_size: int, rows: int
) -> list[Batch]:
    """The fixed held-out set: up to `rows` rows, the last batch filled up with empty rows."""
    taken = _fixed_rows(documents, row_length, rows)
    empty = {name: np.zeros_like(value) for name, value in taken[0].items()}
    taken += [empty] * (-len(taken) % batch_size)
    return [_stack(taken[i : i + batch_size]) for i in range(0, len(taken), batch_size)]


def row_of_documents(documents: Sequence[bytes], *, row_length: int) -> Batch:
    """One packed row for a picture: of some rows the one with the longest second document."""

    def second_longest(row: dict[str, np.ndarray]) -> int:
        # Without the padding, and with a 0 for the second document of a row that has one.
        return int(np.sort(np.bincount(row["segment_ids"], minlength=3)[1:])[-2])

    rows = _fixed_rows(documents, row_length, _ROWS_TO_SEARCH)
    return _stack([max(rows, key=second_longest)])


def _fixed_rows(
    documents: Sequence[bytes], row_length: int, most: int
) -> list[dict[str, np.ndarray]]:
    """Up to `most` rows, always the same ones, from all over the documents."""
    packed = _shuffled_rows(documents, row_length, _HELD_OUT_SEED)
    rows = (packed[i] for i in range(min(most, len(packed))))
    # grain's type allows None, for filters; there is none here.
    return [row for row in rows if row is not None]


def _shuffled_rows(documents: Sequence[bytes], row_length: int, seed: int) -> grain.MapDataset:
    rows = PackedRows(documents, row_length=row_length)
    return grain.MapDataset.source(rows).seed(seed).shuffle()


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})


def unigram_loss(train: Iterable[bytes], held_out: Iterable[Batch]) -> float:
    """Held-out loss of a model that knows only how frequent each byte is, in nats per byte.

    Mean over the held-out targets of -log((count + 1) / (total + 256)), with counts over the
    training documents (add-one smoothing). The targets are those of the model's held-out loss:
    bytes that follow another token of their segment.
    """
    counts = np.ones(256, np.float64)
    for document in train:
        counts += np.bincount(np.frombuffer(document, np.uint8), minlength=256)
    losses = np.log(counts.sum()) - np.log(counts)
    targets = np.concatenate([_targets(batch) for batch in held_out])
    return float(losses[targets].mean())


def _targets(batch: Batch) -> np.ndarray:
    before, after = batch.segment_ids[:, :-1], batch.segment_ids[:, 1:]
    return batch.tokens[:, 1:][(before == after) & (after != 0)]
