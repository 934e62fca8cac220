"""Result files of `fsa-jax bench`: reading and checking them, and which rows are compared."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

type Row = dict[str, Any]

WHAT = "fsa-jax bench"
SUITES = ("kernels", "operator", "training", "prefill", "decode")
#: METHODS is in the order of the columns. The first method of OURS that was run represents ours.
OURS = ("default", "triton", "nsa", "kv_outer", "xla")
METHODS = (
    "default", "triton", "kv_outer", "query_tile", "nsa", "query_outer", "cudnn", "xla", "full",
)  # fmt: skip
#: The parts of the operator, and their names in tables and plots.
BRANCHES = {
    "compressed_attention": "compressed",
    "select_blocks": "selection",
    "selected_attention": "selected",
    "sliding_window_attention": "window",
    "combine_branches": "combine",
}
WHOLE, FULL, MODEL = "native_sparse_attention", "full_attention", "model"
#: Sparse attention of one query per sequence, with all branches.
STEP = "decode_step"
PASSES = ("forward", "backward")
BOTH = "forward + backward"

_NUMBER = (int, float)
_MAYBE = (int, float, NoneType)
_FILE_KEYS = {
    "suite": str, "measurement": bool, "complete": bool, "date": str, "commit": str, "device": str,
    "driver": str, "versions": dict, "ceilings": (dict, NoneType), "rows": list,
}  # fmt: skip
_CEILING_KEYS = {"flops": _NUMBER, "bytes": _NUMBER, "source": str}
_ROW_KEYS = {
    "function": str, "method": str, "pass": str, "length": int, "heads": int, "kv_heads": int,
    "width": int, "block_size": int, "topk": int, "selection": (str, NoneType), "packed": bool,
    "dtype": str,
}  # fmt: skip
_MODEL_KEYS = {"model": str, "layers": int}
_MEASURED_KEYS = {
    "ms": _NUMBER, "spread": _NUMBER, "flops": _MAYBE, "bytes": _MAYBE, "floor_ms": _MAYBE,
    "peak_bytes": _MAYBE,
}  # fmt: skip
_MEASURED_MODEL_KEYS = {"tokens_per_s": _NUMBER, "model_flops_utilisation": _MAYBE}
ALL_PASSES = (*PASSES, "step", "prefill", "decode")
_CHOICES = {"suite": SUITES, "pass": ALL_PASSES}
_POSITIVE = {"ms", "length", "heads", "kv_heads"}

#: The fields that distinguish shapes, with their letters in the tables. Full attention has no
#: blocks.
SHAPE = {
    "model": "model", "layers": "layers", "batch": "B", "length": "T", "heads": "N",
    "kv_heads": "K", "width": "D", "block_size": "block size", "topk": "blocks",
    "selection": "selection", "packed": "packed", "dtype": "dtype",
}  # fmt: skip
_DENSE_SHAPE = [name for name in SHAPE if name not in ("block_size", "topk", "selection")]
ALWAYS = ("length", "heads", "kv_heads")


@dataclasses.dataclass(frozen=True)
class Run:
    """A result file: its path below the results folder, its content, and its rows with times."""

    name: str
    content: dict[str, Any]
    rows: list[Row]


# Reading


def load(results: Path) -> list[Run]:
    """Reads the result files below a folder, oldest first, and checks every key."""
    paths = sorted(results.rglob("*.json"))
    runs = [run for path in paths if (run := _read(path, path.relative_to(results).as_posix()))]
    if not runs:
        raise ValueError(f"{results} holds no results of `{WHAT}`: no *.json with that as 'what'")
    return sorted(runs, key=lambda run: (run.content["date"], run.name))


def _read(path: Path, name: str) -> Run | None:
    """Reads a result file; None for other JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("what") != WHAT:
        return None
    _check(f"{path}", content, _FILE_KEYS)
    if content["ceilings"] is not None:
        _check(f"{path}, ceilings", content["ceilings"], _CEILING_KEYS)
    for number, row in enumerate(content["rows"]):
        model = isinstance(row, dict) and row.get("function") == MODEL
        keys = _ROW_KEYS | (_MODEL_KEYS if model else {})
        if isinstance(row, dict) and "error" not in row:
            keys |= _MEASURED_KEYS | (_MEASURED_MODEL_KEYS if model else {})
        _check(f"{path}, row {number}", row, keys)
    return Run(name, content, [row for row in content["rows"] if "error" not in row])


def _check(where: str, table: object, kinds: Mapping[str, Any]) -> None:
    """Raises ValueError unless all keys exist with the right types and finite numbers >= 0."""
    if not isinstance(table, dict):
        raise ValueError(f"{where}: must be an object, got {table!r}")
    for key, kind in kinds.items():
        if key not in table:
            raise ValueError(f"{where}: key {key!r} is missing")
        value = table[key]
        good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        good &= key not in _CHOICES or value in _CHOICES[key]
        if good and isinstance(value, _NUMBER):
            good = math.isfinite(value) and value >= 0 and (value > 0 or key not in _POSITIVE)
        if not good:
            raise ValueError(f"{where}: bad value of key {key!r}: {value!r}")


def measured_of(runs: list[Run]) -> list[Run]:
    return [run for run in runs if run.content["measurement"]]


# Comparing


def shape(row: Row, names: Iterable[str] = SHAPE) -> tuple:
    """The shape of a row as a sortable key."""
    values = (row.get(name) for name in names)
    return tuple((value is not None, 0 if value is None else value) for value in values)


def is_peer(row: Row) -> bool:
    """Whether a row is of a rival method; an unknown method is neither a rival nor ours."""
    method = row["method"]
    rival = method in ("query_outer", "cudnn", "full") or method.startswith("peer_")
    return rival or row["function"] == FULL


def is_ours(row: Row) -> bool:
    """Whether a row is of a method that this package offers as its own."""
    return row["method"] in OURS and row["function"] != FULL


def rivals(row: Row, rows: Iterable[Row]) -> list[Row]:
    """The rows of peers with the same pass and shape.

    Full attention is a peer of the whole operator and of the decoding step.
    """

    def same(other: Row) -> bool:
        if other["pass"] != row["pass"] or not is_peer(other):
            return False
        if other["function"] == FULL and row["function"] in (WHOLE, STEP):
            return shape(other, _DENSE_SHAPE) == shape(row, _DENSE_SHAPE)
        return other["function"] == row["function"] and shape(other) == shape(row)

    return [other for other in rows if same(other)]


def ours_of(rows: Iterable[Row]) -> Row | None:
    """The row that represents our methods among rows of one function, shape and pass."""
    found = [row for row in rows if is_ours(row)][::-1]  # the newer of two equal ones
    return min(found, key=lambda row: OURS.index(row["method"]), default=None)


def losses(run: Run) -> list[tuple[float, Row, Row]]:
    """(times slower, our row, the peer's row) for every row of ours that is slower than a peer."""
    pairs = ((row, peer) for row in run.rows if is_ours(row) for peer in rivals(row, run.rows))
    return [(row["ms"] / peer["ms"], row, peer) for row, peer in pairs if row["ms"] > peer["ms"]]


def times(rows: Iterable[Row], function: str) -> dict[str, float]:
    """Our times in ms by pass, and of both passes together, among rows of one shape."""
    rows = [row for row in rows if row["function"] == function]
    found = {name: ours_of(row for row in rows if row["pass"] == name) for name in PASSES}
    return _with_both({name: row["ms"] for name, row in found.items() if row})


def full_times(row: Row, rows: Iterable[Row]) -> tuple[str, dict[str, float]]:
    """The method and ms by pass of full attention at a row's shape: cuDNN's if run, else XLA's."""
    wanted = shape(row, _DENSE_SHAPE)
    rows = [r for r in rows if r["function"] == FULL and shape(r, _DENSE_SHAPE) == wanted]
    for method in ("cudnn", "xla"):
        if found := {row["pass"]: row["ms"] for row in rows if row["method"] == method}:
            return method, _with_both(found)
    return "-", {}


def _with_both(found: dict[str, float]) -> dict[str, float]:
    return found | ({BOTH: sum(found.values())} if found.keys() >= set(PASSES) else {})


def ratios(over: Mapping[str, float], under: Mapping[str, float]) -> dict[str, float]:
    """The quotients for the keys that both have."""
    return {name: over[name] / under[name] for name in over if name in under}


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """The rows grouped by a key, in the order of the keys."""
    return {k: list(found) for k, found in itertools.groupby(sorted(rows, key=key), key)}


def number(value: float | None) -> str:
    """Formats a number with three digits, or more before the decimal point; "-" for None."""
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}" if value >= 1 else f"{value:#.3g}"


def cell(value: object) -> str:
    """Formats a value for the tables."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.split())


def describe(row: Row, names: Iterable[str] = SHAPE) -> str:
    """The shape of a row in words."""
    found = [(name, row[name]) for name in names if row.get(name) is not None]
    return ", ".join(
        ("packed" if value else "not packed") if name == "packed"
        else cell(value) if name in ("model", "dtype")
        else f"{SHAPE[name]} {cell(value)}"
        for name, value in found
    )  # fmt: skip


def varying(rows: Sequence[Row]) -> list[str]:
    """The shape fields in which the rows differ, and always T, N and K."""
    return [n for n in SHAPE if n in ALWAYS or len({shape(row, [n]) for row in rows}) > 1]
