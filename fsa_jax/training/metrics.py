"""metrics.jsonl: one JSON row a training step, and rows apart for held-out losses."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from fsa_jax.messages import naming, say
from fsa_jax.training.folder import DAMAGED_METRICS, kept_aside

Row = dict[str, Any]

_LOSSES = ("loss", "held_out_loss")
#: Bytes of a damaged line that a message shows.
_SHOWN = 20


def read_metrics(path: Path) -> list[Row]:
    """Reads the rows; empty lines, and a last line that was cut off by a kill, are left out.

    Args:
      path: the file; there are no rows where there is none.

    Raises:
      ValueError: a line is no row; the message names the file and the line.
      OSError: the file cannot be read.
    """
    rows = []
    for number, row in _parse(path):
        if isinstance(row, str):
            raise ValueError(f"{path}, line {number}: must be a row of metrics, got {row}")
        rows.append(row)
    return rows


def _parse(path: Path) -> Iterator[tuple[int, Row | str]]:
    """The number of each line that is not empty, and its row or what stands in its place."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        # A kill may have cut off the last line, which then has no newline.
        if line.strip() and (number < len(lines) or isinstance(row, dict)):
            yield number, row


#: Integers from here on may be no float.
_LARGEST = 2**1023


def _row(line: bytes) -> Row | str:
    try:
        row = json.loads(line)
        json.dumps(row, allow_nan=False)  # it has to be written again
    except (ValueError, RecursionError):  # also bytes that are not UTF-8
        row = None
    if isinstance(row, dict) and type(row.get("step")) is int:
        numbers = [row[name] for name in _LOSSES if name in row]
        if all(type(x) is float or (type(x) is int and abs(x) < _LARGEST) for x in numbers):
            return row
    return repr(line[:_SHOWN]) + "..." * (len(line) > _SHOWN)


def curve(rows: Iterable[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that hold `name`, for example "loss" or "held_out_loss"."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


class MetricsLog:
    """Appends rows to a file; use as a context manager.

    Lines of the file that are no rows are left out with a message, and a copy of the file as it was
    is kept beside it.

    Args:
      path: the file.
      last_step: rows of later steps are dropped, so that a resumed run writes no row twice.
      write: False for a process that leaves it to another: the file is not touched.

    Attributes:
      kept: the rows that were there and stay.
    """

    def __init__(self, path: Path, *, last_step: int, write: bool = True):
        self._file, self._path = None, path
        self.kept: list[Row] = []
        if not write:
            return
        parsed = list(_parse(path))
        if damaged := [(number, row) for number, row in parsed if isinstance(row, str)]:
            copy = kept_aside(path.parent, DAMAGED_METRICS)
            with naming(copy):
                shutil.copyfile(path, copy)
            (number, row), others = damaged[0], len(damaged) - 1
            more = f" (and {others} lines more)" if others else ""
            say(
                f"{path}, line {number}: left out, for it is no row of metrics: {row}{more}; "
                f"{copy.name} is the file as it was"
            )
        rows = [row for _, row in parsed if isinstance(row, dict)]
        self.kept = [row for row in rows if row["step"] <= last_step]
        fresh = path.with_name(f".fsa-jax.{path.name}.new")
        with naming(fresh):
            fresh.write_text(_lines(self.kept), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            with naming(self._path):
                self._file.close()

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends the rows and hands them to the operating system."""
        if self._file is not None:
            with naming(self._path):
                self._file.write(_lines(rows))
                self._file.flush()


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
