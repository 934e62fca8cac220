"""Tokens in files: the formats of pre-tokenised data.

A folder of pre-tokenised data has the files

    tokens.npy    the tokens of all documents one after another, unsigned integers
    offsets.npy   int64 [documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]
    tokens.json   "what", "version", "vocab_size", and "tokenizer", a fingerprint or null

`write_tokens` writes it. A .npy file has only the first, and a file .array_record has in each
record the tokens of a document, as little-endian unsigned integers of 32 bits.
"""

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fsa_jax.messages import naming

TOKENS, OFFSETS, DESCRIPTION = "tokens.npy", "offsets.npy", "tokens.json"
ARRAY_RECORD = ".array_record"
_WHAT, _VERSION = "fsa-jax tokens", 1
#: How many tokens are read at a time.
_CHUNK = 2**20


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
    with made_at_once(folder) as new:
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
        write_json(new / DESCRIPTION, description | {"tokenizer": tokenizer})
    return folder


def _check_range(tokens: np.ndarray, vocab_size: int, name: str) -> None:
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise ValueError(f"{name} must hold tokens in 0 .. {vocab_size - 1}, got {wrong}")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object to a file."""
    with naming(path):
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def made_at_once(folder: Path) -> Iterator[Path]:
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
    """Whether a path holds pre-tokenised data: a folder of the format above, or a file."""
    if path.is_dir():
        return (path / TOKENS).is_file()
    return path.suffix in (".npy", ARRAY_RECORD) and path.is_file()


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
    tokens = map_array(file)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"{file} must hold integers of shape [tokens], got {tokens.dtype} of shape "
            f"{tokens.shape}"
        )
    if not folder:
        return TokenData(tokens, _cut(tokens, begin, end), (file,))
    offsets = map_array(path / OFFSETS)
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


def map_array(file: Path) -> np.ndarray:
    """Maps the array in a .npy file into memory.

    Raises:
      ValueError: the file cannot be read.
    """
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


def copy_records(file: Path, folder: Path, vocab_size: int) -> TokenData:
    """Copies the documents of a file .array_record, which cannot be mapped, to a folder.

    Raises:
      ValueError: the file cannot be read, or a record does not hold tokens below `vocab_size`.
    """
    import grain

    try:
        source: Any = grain.sources.ArrayRecordDataSource(str(file))
        count = len(source)
    except Exception as error:  # the library raises any type
        raise ValueError(f"text must be readable, got {str(file)!r}: {error}") from error
    with TokenWriter(folder, vocab_size) as writer:
        for i in range(count):
            record = source[i]
            if len(record) % 4:
                raise ValueError(
                    f"{file}, record {i}, must hold integers of 32 bits, got {len(record)} bytes"
                )
            tokens = np.frombuffer(record, "<u4")
            _check_range(tokens, vocab_size, f"{file}, record {i},")
            writer.add(tokens)
    return read_tokens(folder)
