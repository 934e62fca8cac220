"""Files that hold text: which a folder has, and the documents in each.

A text file is one document. A file of records (`.jsonl`, `.jsonl.gz`, `.parquet`) holds a document
in each record, in one column.
"""

import collections
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

#: Suffixes of files whose records are documents.
_JSON, _PARQUET = (".jsonl", ".jsonl.gz"), ".parquet"
#: How many records of a parquet file are in memory at a time.
_PARQUET_ROWS = 1024
#: How many names of columns a message lists.
_MOST_COLUMNS = 20


def has_records(file: Path) -> bool:
    """Whether a file holds records, by its suffix."""
    return file.name.endswith((*_JSON, _PARQUET))


def suffix(file: Path) -> str:
    """The suffix of a file, for counts of what was read."""
    return ".jsonl.gz" if file.name.endswith(".jsonl.gz") else file.suffix or "without suffix"


def find_files(path: Path, skipped: collections.Counter[str]) -> list[Path]:
    """The files with text at a path, which may be a folder.

    Args:
      path: a file, whatever its suffix, or a folder.
      skipped: counts what a folder holds besides.

    Raises:
      ValueError: the path does not exist, or cannot be read.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"text must be files or folders that exist, got {str(path)!r}")
        return [path]
    found = []
    for file in walk(path, skipped):
        if not has_records(file) and b"\0" in read_file(file, 8192):
            skipped[f"binary {suffix(file)}"] += 1
        else:
            found.append(file)
    return found


def walk(
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


def read_file(file: Path, size: int = -1) -> bytes:
    """The bytes of a file, or the first `size` of them.

    Raises:
      ValueError: the file cannot be read.
    """
    try:
        with file.open("rb") as opened:
            return opened.read(size)
    except OSError as error:
        raise ValueError(f"text must be readable, got {str(file)!r}: {error.strerror}") from error


def read_documents(file: Path, column: str) -> Iterator[tuple[str, bytes]]:
    """The documents of a file, and where each of them is, for messages.

    Args:
      file: a text file or a file of records.
      column: the column of the text in records.

    Raises:
      ValueError: a record has no text; the message names the file and the line or row.
    """
    if file.name.endswith(_PARQUET):
        yield from _read_parquet(file, column)
    elif file.name.endswith(_JSON):
        yield from _read_json(file, column)
    else:
        yield str(file), read_file(file)


def _read_json(file: Path, column: str) -> Iterator[tuple[str, bytes]]:
    number = 0
    try:
        with _open_json(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield where, _text(_json_record(line, where), column, where)
    # Reading of compressed files fails late, at the line after the last good one.
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"text must be readable, got {str(file)!r}, line {number + 1}: {reason}"
        ) from error


def _open_json(file: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(file) if file.name.endswith(".gz") else file.open("rb")


def _json_record(line: bytes, where: str) -> Mapping[str, object]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: must be a JSON object, got {_short(line)}: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object, got {_short(line)}")
    return record


def _short(line: bytes) -> str:
    return repr(line[:40]) + "..." * (len(line) > 40)


def _text(record: Mapping[str, object], column: str, where: str) -> bytes:
    if column not in record:
        raise ValueError(_no_column(where, column, list(record)))
    text = record[column]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {column!r} must be text, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise ValueError(f"{where}: {column!r} must be valid Unicode, got {error}") from error


def _no_column(where: str, column: str, names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:_MOST_COLUMNS])) + ", ..." * (len(names) > _MOST_COLUMNS)
    return f"{where}: text_column must be a column, got {column!r} (columns: {shown or 'none'})"


def _read_parquet(file: Path, column: str) -> Iterator[tuple[str, bytes]]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if column not in names:
                raise ValueError(_no_column(str(file), column, names))
            for batch in opened.iter_batches(_PARQUET_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    where = f"{file}, row {row}"
                    if isinstance(text, bytes):
                        yield where, text
                    else:
                        yield where, _text({column: text}, column, where)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"text must be readable, got {str(file)!r} after row {row}: {error}"
        ) from error
