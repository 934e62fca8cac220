"""Tokens in files: the format of pre-tokenised data, and the cache of what is read.

A folder of pre-tokenised data has the files

    tokens.npy    the tokens of all documents one after another, unsigned integers
    offsets.npy   int64 [documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]
    tokens.json   "what", "version", "vocab_size", and "tokenizer", a fingerprint or null

`write_tokens` writes it. The cache of a source is a folder of the same format if the source is
text, and has, besides, an index: the documents in the order of their digests, each once.
"""

import array
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fsa_jax.messages import naming, say
from fsa_jax.training.documents import TokenDocuments
from fsa_jax.training.user_cache import user_cache

TOKENS, OFFSETS, DESCRIPTION = "tokens.npy", "offsets.npy", "tokens.json"
_WHAT, _VERSION = "fsa-jax tokens", 1
_STARTS, _ENDS, _DIGESTS, _COUNTS = "starts.npy", "ends.npy", "digests.npy", "counts.npy"
_INDEX = "index.json"
#: How many tokens are read at a time.
_CHUNK = 2**20
#: One document in 20, but at least one, is held out for validation.
VALIDATION_EVERY = 20


class TokenWriter:
    """Writes documents of tokens one after another; use it as a context manager.

    Args:
      folder: an existing folder, where `tokens.npy` and `offsets.npy` are written.
      vocab_size: all tokens are below it.

    Attributes:
      offsets: the number of tokens before each document and after the last one.
    """

    def __init__(self, folder: Path, vocab_size: int):
        self._folder, self._vocab_size = folder, vocab_size
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.offsets = array.array("q", [0])
        self._file = (folder / TOKENS).open("wb")
        self._write_header()

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with naming(self._folder / TOKENS), self._file:
            if kind is None:
                # NumPy leaves room in the header for the final length.
                self._file.seek(0)
                self._write_header()
        if kind is None:
            save_array(self._folder / OFFSETS, np.frombuffer(self.offsets, np.int64))

    def _write_header(self) -> None:
        described = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": described, "fortran_order": False, "shape": (self.offsets[-1],)}
        with naming(self._folder / TOKENS):
            np.lib.format.write_array_header_1_0(self._file, header)

    def add(self, tokens: np.ndarray) -> None:
        """Appends a document, integers [n]."""
        with naming(self._folder / TOKENS):
            self._file.write(np.asarray(tokens).astype(self._dtype).tobytes())
        self.offsets.append(self.offsets[-1] + len(tokens))


def save_array(path: Path, values: np.ndarray) -> None:
    """Writes an array to a .npy file."""
    with naming(path):
        np.save(path, values, allow_pickle=False)


def write_tokens(
    folder: Path,
    documents: Iterable[Sequence[int] | np.ndarray],
    *,
    vocab_size: int,
    tokenizer: str | None = None,
) -> Path:
    """Writes pre-tokenised data, which `--text` reads.

    Args:
      folder: a folder that does not exist yet.
      documents: the tokens of each document, with begin and end tokens if they should have them.
        They are taken one at a time.
      vocab_size: all tokens are below it.
      tokenizer: the `fingerprint` of the tokenizer; only runs with the same tokenizer then read
        the data.

    Returns:
      The folder.

    Raises:
      ValueError: the folder exists, or a document is not a sequence of tokens below `vocab_size`.
      OSError: the folder cannot be written.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp()) / "tokens"
      >>> read = read_tokens(write_tokens(folder, [[1, 2, 3], [4]], vocab_size=5))
      >>> read.tokens.tolist(), read.offsets.tolist()
      ([1, 2, 3, 4], [0, 3, 4])
    """
    if folder.exists():
        raise ValueError(f"folder must not exist yet, got {str(folder)!r}")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with _made_at_once(folder) as new:
        with TokenWriter(new, vocab_size) as writer:
            for number, document in enumerate(documents):
                tokens = np.asarray(document)
                if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
                    raise ValueError(
                        f"documents[{number}] must be a sequence of integers, got "
                        f"{tokens.dtype} of shape {tokens.shape}"
                    )
                _check_range(tokens, vocab_size, f"documents[{number}]")
                writer.add(tokens)
        description = {"what": _WHAT, "version": _VERSION, "vocab_size": vocab_size}
        _write_json(new / DESCRIPTION, description | {"tokenizer": tokenizer})
    return folder


def _check_range(tokens: np.ndarray, vocab_size: int, name: str) -> None:
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise ValueError(f"{name} must hold tokens in 0 .. {vocab_size - 1}, got {wrong}")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with naming(path):
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _made_at_once(folder: Path) -> Iterator[Path]:
    """A new folder, which gets its name only when it is complete, and is deleted after an error."""
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        yield new
        new.chmod(0o777 & ~_umask())
        new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@dataclasses.dataclass(frozen=True)
class TokenData:
    """Pre-tokenised data.

    Attributes:
      tokens: memory-mapped integers.
      offsets: int64 [documents + 1].
      files: the files that hold them.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    files: tuple[Path, ...]


def is_token_data(path: Path) -> bool:
    """Whether a path holds pre-tokenised data: a folder of the format above, or a .npy file."""
    if path.is_dir():
        return (path / TOKENS).is_file()
    return path.suffix == ".npy" and path.is_file()


def read_tokens(
    path: Path,
    *,
    begin: int | None = None,
    end: int | None = None,
    tokenizer: str | None = None,
) -> TokenData:
    """Opens pre-tokenised data.

    Args:
      path: a folder of the format above; or a .npy file of tokens, which are cut before each begin
        token or, without one, after each end token, and are one document without either.
      begin: the begin token.
      end: the end token.
      tokenizer: fingerprint of the tokenizer, if it must be the one that wrote the data.

    Raises:
      ValueError: the files do not have that format.
    """
    folder = path.is_dir()
    file = path / TOKENS if folder else path
    tokens = _map(file)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"{file} must hold integers of shape [tokens], got {tokens.dtype} of shape "
            f"{tokens.shape}"
        )
    if not folder:
        return TokenData(tokens, _cut(tokens, begin, end), (file,))
    offsets = _map(path / OFFSETS)
    if (
        offsets.ndim != 1
        or offsets.dtype.kind not in "iu"
        or len(offsets) < 1
        or offsets[0] != 0
        or offsets[-1] != len(tokens)
        or np.any(offsets[1:] < offsets[:-1])
    ):
        raise ValueError(
            f"{path / OFFSETS} must hold integers that never fall, from 0 to the {len(tokens)} "
            f"tokens of {TOKENS}, got {offsets.dtype} of shape {offsets.shape}"
        )
    written = _described(path / DESCRIPTION)
    if written is not None and tokenizer is not None and written != tokenizer:
        raise ValueError(f"tokenizer must be the one that wrote {str(path)!r}, got another one")
    return TokenData(tokens, offsets, (file, path / OFFSETS))


def _map(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"text must be readable, got {str(file)!r}: {reason}") from error


def _described(file: Path) -> str | None:
    """The fingerprint in the description of pre-tokenised data, which need not have one."""
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_bytes())
        if found["what"] != _WHAT or found["version"] != _VERSION:
            raise ValueError(f"{found['what']!r} of version {found['version']!r}")
        return found["tokenizer"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{file} must describe {_WHAT} of version {_VERSION}, got "
            f"{type(error).__name__}: {error}"
        ) from error


def _cut(tokens: np.ndarray, begin: int | None, end: int | None) -> np.ndarray:
    """Offsets of the documents in tokens that have no offsets."""
    cuts: list[np.ndarray] = [np.asarray([0, len(tokens)])]
    for at in range(0, len(tokens), _CHUNK):
        chunk = tokens[at : at + _CHUNK]
        if begin is not None:
            cuts.append(at + np.flatnonzero(chunk == begin))
        elif end is not None:
            cuts.append(at + 1 + np.flatnonzero(chunk == end))
    return np.unique(np.concatenate(cuts)).astype(np.int64)


def digest_of(tokens: np.ndarray, vocab_size: int, name: str) -> bytes:
    """SHA-256 over the tokens of a document, which must be below `vocab_size`."""
    digest = hashlib.sha256()
    for at in range(0, len(tokens), _CHUNK):
        chunk = tokens[at : at + _CHUNK]
        _check_range(chunk, vocab_size, name)
        digest.update(chunk.astype("<u4").tobytes())
    return digest.digest()


# The index and the cache


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
    _write_json(
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
            _map(folder / name) for name in (_STARTS, _ENDS, _DIGESTS, _COUNTS)
        )
        tokens = _map(folder / TOKENS) if tokens is None else tokens
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
    with _locked(root / f".{key}.lock"):
        if folder.exists():
            try:
                return _read_index(folder, tokens)
            except ValueError as error:
                say(f"the cache of tokens {folder} is damaged and is written again: {error}")
                shutil.rmtree(folder)
        with _made_at_once(folder) as new:
            write(new)
        return _read_index(folder, tokens)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock. File systems without locks do without: each process then writes for itself."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
