"""The cache of tokens: what a source holds, tokenised once, in files that are memory-mapped.

The folder of a source holds its tokens in the format of `token_files`, unless the source is itself
a folder of that format, and an index: the documents in the order of their digests, each once.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from fsa_jax.messages import say
from fsa_jax.training.documents import TokenDocuments
from fsa_jax.training.token_files import (
    TOKENS,
    made_at_once,
    map_array,
    save_array,
    write_json,
)
from fsa_jax.training.user_cache import user_cache

_WHAT, _VERSION = "fsa-jax index", 1
_STARTS, _ENDS, _DIGESTS, _COUNTS = "starts.npy", "ends.npy", "digests.npy", "counts.npy"
_INDEX = "index.json"
#: One document in 20, but at least one, is held out for validation.
VALIDATION_EVERY = 20


@dataclasses.dataclass(frozen=True)
class IndexedTokens:
    """The documents of a source, split.

    Attributes:
      train: documents to train on.
      validation: documents held out.
      counts: int64 [vocab_size], how often each token occurs in `train`.
      digests: big-endian uint64 [documents, 4], SHA-256 of each distinct document, in order; those
        of `validation` are first. A single document, which is cut, has one digest.
      fingerprint: hexadecimal SHA-256 over the digests.
      skipped: number of documents that were left out, by reason.
    """

    train: TokenDocuments
    validation: TokenDocuments
    counts: np.ndarray
    digests: np.ndarray
    fingerprint: str
    skipped: Mapping[str, int]


def distinct(digests: bytes | bytearray) -> tuple[np.ndarray, np.ndarray]:
    """The order of documents: indices and digests, uint64 [documents, 4], each digest once."""
    keys = np.frombuffer(digests, ">u8").reshape(-1, 4)
    order = np.lexsort(keys.T[::-1])
    ordered = keys[order]
    first = np.ones(len(order), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order[first], ordered[first]


def cut_point(length: int) -> int:
    """Where a single document of `length` tokens is cut; the rest is for validation."""
    return length - max(1, length // VALIDATION_EVERY)


def write_index(
    folder: Path,
    tokens: np.ndarray,
    spans: np.ndarray,
    keys: np.ndarray,
    *,
    vocab_size: int,
    skipped: Mapping[str, int],
) -> None:
    """Writes the index of a source.

    Args:
      folder: where the files are written.
      tokens: the tokens.
      spans: int64 [documents, 2], start and length of the documents, in order. One digest: of the
        two parts of the document, the one for validation first.
      keys: their digests, as `distinct` returns them.
      vocab_size: all tokens are below it.
      skipped: number of documents that were left out, by reason.
    """
    count = max(1, len(keys) // VALIDATION_EVERY)
    starts, ends = spans[:, 0], np.cumsum(spans[:, 1])
    ends[count:] -= ends[count - 1]
    train = TokenDocuments(tokens, starts[count:], ends[count:], vocab_size)
    for name, values in (
        (_STARTS, starts),
        (_ENDS, ends),
        (_DIGESTS, keys),
        (_COUNTS, train.counts()),
    ):
        save_array(folder / name, np.ascontiguousarray(values))
    files = sorted(file for file in folder.iterdir() if file.suffix == ".npy")
    write_json(
        folder / _INDEX,
        {
            "what": _WHAT,
            "version": _VERSION,
            "validation": count,
            "vocab_size": vocab_size,
            "fingerprint": hashlib.sha256(keys.astype(">u8").tobytes()).hexdigest(),
            "skipped": dict(skipped),
            "files": {file.name: file_digest(file) for file in files},
        },
    )


def file_digest(file: Path) -> str:
    """Hexadecimal SHA-256 of a file, which is read in parts.

    Raises:
      ValueError: the file cannot be read.
    """
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"text must be readable, got {str(file)!r}: {error.strerror}") from error


def _read_index(folder: Path, tokens: np.ndarray | None) -> IndexedTokens:
    """Opens an index.

    Raises:
      ValueError: a file is missing or damaged.
    """
    try:
        values = json.loads((folder / _INDEX).read_bytes())
        for name, digest in values["files"].items():
            if file_digest(folder / name) != digest:
                raise ValueError(f"{name} has other bytes")
        starts, ends, digests, counts = (
            map_array(folder / name) for name in (_STARTS, _ENDS, _DIGESTS, _COUNTS)
        )
        tokens = map_array(folder / TOKENS) if tokens is None else tokens
        count, vocab_size = values["validation"], values["vocab_size"]
        return IndexedTokens(
            train=TokenDocuments(tokens, starts[count:], ends[count:], vocab_size),
            validation=TokenDocuments(tokens, starts[:count], ends[:count], vocab_size),
            counts=counts,
            digests=digests,
            fingerprint=values["fingerprint"],
            skipped=values["skipped"],
        )
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{_INDEX}: {type(error).__name__}") from error


def cached(
    key: str, write: Callable[[Path], None], tokens: np.ndarray | None = None
) -> IndexedTokens:
    """What the cache has under a key; it is written first if necessary.

    Processes that need the same key wait for the first of them.

    Args:
      key: a name that is different for different contents.
      write: writes the files into a folder.
      tokens: the tokens, if the cache holds only their index.

    Raises:
      OSError: the cache cannot be written.
    """
    temporary = Path(tempfile.gettempdir()) / f"fsa-jax-{os.getuid()}" / "tokens"
    root = user_cache("tokens") or temporary
    root.mkdir(parents=True, exist_ok=True)
    folder = root / key
    with _locked(root / f".{key}.lock") as alone:
        for unfinished in root.glob(f".{key}.*") if alone else ():  # of a process that was killed
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
        if folder.exists():
            try:
                return _read_index(folder, tokens)
            except ValueError as error:
                say(f"the cache of tokens {folder} is damaged and is written again: {error}")
                shutil.rmtree(folder)
        with made_at_once(folder) as new:
            write(new)
        return _read_index(folder, tokens)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds a lock, and says whether it does: some file systems have none."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        held = False
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held = True
        yield held
    finally:
        os.close(descriptor)
