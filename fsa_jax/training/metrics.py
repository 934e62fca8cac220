"""metrics.jsonl: one JSON row a training step, and rows apart for held-out losses."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

Row = dict[str, Any]


def read_metrics(path: Path) -> list[Row]:
    """Reads the rows; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # A complete line ends with a newline, so what follows the last one is empty or cut off.
    return [json.loads(line) for line in lines[:-1]]


def curve(rows: Iterable[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that hold `name`, for example "loss" or "held_out_loss"."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


class MetricsLog:
    """Appends rows to a file; use as a context manager.

    Args:
      path: the file.
      last_step: rows of later steps are dropped, so that a resumed run writes no row twice.
      write: False for a process that leaves it to another: the file is not touched.
    """

    def __init__(self, path: Path, *, last_step: int, write: bool = True):
        self._file = None
        if not write:
            return
        kept = [row for row in read_metrics(path) if row["step"] <= last_step]
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(_lines(kept), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends the rows and hands them to the operating system."""
        if self._file is not None:
            self._file.write(_lines(rows))
            self._file.flush()


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
