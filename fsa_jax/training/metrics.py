"""metrics.jsonl: one row of JSON per training step, and separate rows for validation losses."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from fsa_jax.messages import naming, say
from fsa_jax.training.folder import DAMAGED_METRICS, kept_aside

Row = dict[str, Any]

#: The new name of each value that was renamed. Rows have both names for one more release.
_NEW_NAMES = {"held_out_loss": "val_loss", "held_out_bytes": "val_bytes"}
#: Values that must be finite numbers where a row has them.
_LOSSES = ("loss", "val_loss", "val_bits_per_byte", "held_out_loss")
#: How many bytes of a damaged line a message shows.
_SHOWN = 20


def bits_per_byte(nats: float) -> float:
    """A loss in bits per byte, from nats per byte."""
    return nats / math.log(2)


def validation_row(step: int, loss: float, count: int, num_bytes: int | None = None) -> Row:
    """The row of one evaluation.

    Args:
      step: the training step after which the model was evaluated.
      loss: mean validation loss in nats per token.
      count: number of tokens that were predicted.
      num_bytes: number of bytes of text that they stand for; None: the tokens are bytes.

    Returns:
      `val_loss` in nats per token, `val_bits_per_byte` and `val_bytes`, also under their old names,
      and, where tokens are not bytes, `val_tokens`.
    """
    row: Row = {"step": step, "val_loss": float(loss), "val_bytes": count}
    if num_bytes is not None:
        bits = bits_per_byte(row["val_loss"] * count / num_bytes)
        row |= {"val_bytes": num_bytes, "val_tokens": count, "val_bits_per_byte": bits}
    return _with_both_names(row)


def _with_both_names(row: Mapping[str, Any]) -> Row:
    """The row with both names of each value that was renamed, and with the bits per byte."""
    row = dict(row)
    for old, new in _NEW_NAMES.items():
        if old in row or new in row:
            row[new] = row.get(new, row.get(old))
            row[old] = row.get(old, row[new])
    if "val_loss" in row:
        row.setdefault("val_bits_per_byte", bits_per_byte(row["val_loss"]))
    return row


def read_metrics(path: Path) -> list[Row]:
    """Reads the rows of a run's metrics.

    Skips empty lines, and a last line that is incomplete because the run was killed.

    Args:
      path: the file; a file that does not exist has no rows.

    Returns:
      The rows in the order of the file, as dicts. Those of a training step have `step`, `loss` (in
      nats per token), `tokens_per_s`, `learning_rate`, `grad_norm` and, where the peak of the
      device is known, `mfu` (model flops utilisation, see `fsa_jax.training.flops`); those of an
      evaluation have `step`, `val_loss`, `val_bits_per_byte`, `val_bytes` and, where tokens are
      not bytes, `val_tokens`. Both have `attention` in a run with an attention warm-up: "full"
      during the warm-up, and then that of the model.

    Raises:
      ValueError: a line is not a row; the message names the file and the line.
      OSError: the file cannot be read.
    """
    rows = []
    for number, row in _parse(path):
        if isinstance(row, str):
            raise ValueError(f"{path}, line {number}: must be a row of metrics, got {row}")
        rows.append(row)
    return rows


def _parse(path: Path) -> Iterator[tuple[int, Row | str]]:
    """The number of each line that is not empty, and its row, or the damaged text as a string."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        # If the run was killed, the last line may be incomplete, without a newline.
        if line.strip() and (number < len(lines) or isinstance(row, dict)):
            yield number, row


#: Integers of at least this size may not fit a float.
_LARGEST = 2**1023


def _row(line: bytes) -> Row | str:
    try:
        row = json.loads(line)
        if _is_row(row):
            row = _with_both_names(row)
            json.dumps(row, allow_nan=False)  # a resumed run writes the row again
            return row
    except (ValueError, RecursionError):  # ValueError: also bytes that are not UTF-8
        pass
    return repr(line[:_SHOWN]) + "..." * (len(line) > _SHOWN)


def _is_row(value: Any) -> bool:
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        return False
    numbers = [value[name] for name in _LOSSES if name in value]
    return all(type(x) is float or (type(x) is int and abs(x) < _LARGEST) for x in numbers)


def curve(rows: Iterable[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have `name`, for example "loss" or "val_loss"."""
    points = [(row["step"], row[name]) for row in map(_with_both_names, rows) if name in row]
    return [step for step, _ in points], [value for _, value in points]


class MetricsLog:
    """Appends rows to a file; use it as a context manager.

    Lines of the file that are not rows are removed with a message, and a copy of the original file
    is kept beside it.

    Args:
      path: the file.
      last_step: rows of later steps are dropped, so that a resumed run writes no row twice.
      write: False in a process that leaves the file to another one and does not touch it.

    Attributes:
      kept: the rows that the file held and keeps.
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
            more = f" (and {others} more lines)" if others else ""
            say(
                f"{path}, line {number}: left out, since it is not a row of metrics: {row}{more}; "
                f"{copy.name} is the original file"
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
        """Appends the rows and flushes them to the operating system."""
        if self._file is not None:
            with naming(self._path):
                self._file.write(_lines(rows))
                self._file.flush()


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
