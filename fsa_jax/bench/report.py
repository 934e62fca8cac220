"""The report of `fsa-jax bench`: tables in Markdown and plots, from the JSON files alone.

Rows are compared with rows of the same file only, since only those were timed in the same run.
The same files give the same bytes.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

type Row = dict[str, Any]

WHAT = "fsa-jax bench"
SUITES = ("kernels", "operator", "training", "prefill")
#: Methods in the order of their columns. Of ours the first that was run stands for the others.
OURS = ("triton", "nsa", "kv_outer", "xla")
METHODS = ("triton", "kv_outer", "nsa", "query_outer", "cudnn", "xla", "full")
#: Parts of the operator, and their names in tables and plots.
BRANCHES = {
    "compressed_attention": "compressed",
    "select_blocks": "selection",
    "selected_attention": "selected",
    "sliding_window_attention": "window",
    "combine_branches": "combine",
}
WHOLE, FULL, MODEL = "native_sparse_attention", "full_attention", "model"
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
_ALL_PASSES = (*PASSES, "step", "prefill")
_CHOICES = {"suite": SUITES, "pass": _ALL_PASSES}
_POSITIVE = {"ms", "length", "heads", "kv_heads"}

#: What tells shapes apart, with the letters of the tables; full attention knows no blocks.
_SHAPE = {
    "model": "model", "layers": "layers", "length": "T", "heads": "N", "kv_heads": "K",
    "width": "D", "block_size": "block size", "topk": "blocks", "selection": "selection",
    "packed": "packed", "dtype": "dtype",
}  # fmt: skip
_DENSE_SHAPE = [name for name in _SHAPE if name not in ("block_size", "topk", "selection")]
_ALWAYS = ("length", "heads", "kv_heads")

_DPI = 120
_LEGEND = """\
Times are ms a call, the median over rounds, with the spread over the rounds in brackets: (slowest -
fastest) / median. T tokens, N query heads, K key/value heads, D head width. *Ours* is the default
choice (`triton`; `nsa` for models) where it was run, else `kv_outer`, else `xla`. *x floor* is the
time of ours over the least that products and memory traffic take at the ceilings of the device.
*x best peer* is the time of ours over that of the fastest rival in the same run, below 1 where ours
is faster: `query_outer` (the kernel of vanilla NSA), `peer_*` (other projects' code), and full
attention for the whole operator and for models. A speed-up is above 1 where ours is faster. Plots
show the newest figure of each shape. -: not measured, or unknown.
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """A result file: its path below the folder of results, its content, its rows with times."""

    name: str
    content: dict[str, Any]
    rows: list[Row]


def report(results: Path, out: Path) -> None:
    """Writes `benchmarks.md` and `images/*.png` from all result files below a folder.

    Args:
      results: folder; JSON files in it that no benchmark wrote are passed over.
      out: folder to write into.

    Raises:
      ValueError: there is no result, or a file is broken or lacks a key.
    """
    runs = load(results)
    slugs: dict[str, str] = {}
    for run in runs:
        slug = re.sub(r"[^a-z0-9]+", "-", run.content["device"].lower()).strip("-") or "device"
        while slug in slugs and slugs[slug] != run.content["device"]:
            slug += "-x"
        slugs[slug] = run.content["device"]
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Benchmarks\n", _LEGEND]
    found = {s: [run for run in runs if run.content["device"] == d] for s, d in slugs.items()}
    for slug in sorted(found, key=lambda slug: (not _measured(found[slug]), slug)):
        parts += _device(found[slug], slug, out)
    text = "\n".join(parts).rstrip("\n") + "\n"
    (out / "benchmarks.md").write_text(text, encoding="utf-8", newline="\n")


# Reading


def load(results: Path) -> list[Run]:
    """The result files below a folder, oldest first, every key checked."""
    paths = sorted(results.rglob("*.json"))
    runs = [run for path in paths if (run := _read(path, path.relative_to(results).as_posix()))]
    if not runs:
        raise ValueError(f"{results} holds no results of `{WHAT}`: no *.json with that as 'what'")
    return sorted(runs, key=lambda run: (run.content["date"], run.name))


def _read(path: Path, name: str) -> Run | None:
    """A result file; None for other JSON."""
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
    """Raises ValueError unless all keys are there, of their types, numbers finite and not < 0."""
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


def _measured(runs: list[Run]) -> list[Run]:
    return [run for run in runs if run.content["measurement"]]


# Comparing


def shape(row: Row, names: Iterable[str] = _SHAPE) -> tuple:
    """What a row is of, as a key that sorts."""
    values = (row.get(name) for name in names)
    return tuple((value is not None, 0 if value is None else value) for value in values)


def is_peer(row: Row) -> bool:
    """Whether a row is of a rival of ours; a method that nobody knows is neither."""
    method = row["method"]
    rival = method in ("query_outer", "cudnn", "full") or method.startswith("peer_")
    return rival or row["function"] == FULL


def is_ours(row: Row) -> bool:
    """Whether a row is of a method that this package stands for."""
    return row["method"] in OURS and row["function"] != FULL


def rivals(row: Row, rows: Iterable[Row]) -> list[Row]:
    """Rows of peers of the same pass and shape; full attention is one of the whole operator."""

    def same(other: Row) -> bool:
        if other["pass"] != row["pass"] or not is_peer(other):
            return False
        if other["function"] == FULL and row["function"] == WHOLE:
            return shape(other, _DENSE_SHAPE) == shape(row, _DENSE_SHAPE)
        return other["function"] == row["function"] and shape(other) == shape(row)

    return [other for other in rows if same(other)]


def ours_of(rows: Iterable[Row]) -> Row | None:
    """The row that stands for ours among rows of one function, shape and pass."""
    found = [row for row in rows if is_ours(row)][::-1]  # of two alike the newer
    return min(found, key=lambda row: OURS.index(row["method"]), default=None)


def losses(run: Run) -> list[tuple[float, Row, Row]]:
    """(times slower, ours, the peer) of every row of ours that is slower than a peer."""
    pairs = ((row, peer) for row in run.rows if is_ours(row) for peer in rivals(row, run.rows))
    return [(row["ms"] / peer["ms"], row, peer) for row, peer in pairs if row["ms"] > peer["ms"]]


def times(rows: Iterable[Row], function: str) -> dict[str, float]:
    """Ms of ours by pass, and of both passes together, among rows of one shape."""
    rows = [row for row in rows if row["function"] == function]
    found = {name: ours_of(row for row in rows if row["pass"] == name) for name in PASSES}
    return _with_both({name: row["ms"] for name, row in found.items() if row})


def full_times(row: Row, rows: Iterable[Row]) -> tuple[str, dict[str, float]]:
    """Method and ms by pass of full attention at the shape of a row: cuDNN's, else XLA's."""
    wanted = shape(row, _DENSE_SHAPE)
    rows = [r for r in rows if r["function"] == FULL and shape(r, _DENSE_SHAPE) == wanted]
    for method in ("cudnn", "xla"):
        if found := {row["pass"]: row["ms"] for row in rows if row["method"] == method}:
            return method, _with_both(found)
    return "-", {}


def _with_both(found: dict[str, float]) -> dict[str, float]:
    return found | ({BOTH: sum(found.values())} if found.keys() >= set(PASSES) else {})


def ratios(over: Mapping[str, float], under: Mapping[str, float]) -> dict[str, float]:
    """Quotients of what both have."""
    return {name: over[name] / under[name] for name in over if name in under}


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by a key, in the order of the keys."""
    return {k: list(found) for k, found in itertools.groupby(sorted(rows, key=key), key)}


# Text


def number(value: float | None) -> str:
    """Three digits, more before the point; "-" for None."""
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}" if value >= 1 else f"{value:#.3g}"


def _time(row: Row | None) -> str:
    return "-" if row is None else f"{number(row['ms'])} ({100 * row['spread']:.0f}%)"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.split())


def describe(row: Row, names: Iterable[str] = _SHAPE) -> str:
    """The shape of a row in words."""
    found = [(name, row[name]) for name in names if row.get(name) is not None]
    return ", ".join(
        ("packed" if value else "not packed") if name == "packed"
        else _cell(value) if name in ("model", "dtype")
        else f"{_SHAPE[name]} {_cell(value)}"
        for name, value in found
    )  # fmt: skip


def _varying(rows: Sequence[Row]) -> list[str]:
    """What tells the rows apart; T, N and K always."""
    return [n for n in _SHAPE if n in _ALWAYS or len({shape(row, [n]) for row in rows}) > 1]


def _table(titles: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    titles = list(titles)
    rows = [
        titles,
        ["---"] * len(titles),
        *([_cell(value).replace("|", r"\|") for value in line] for line in lines),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _constant(rows: list[Row], names: Iterable[str]) -> str:
    """What all rows have in common, as a line of text."""
    text = describe(rows[0], [name for name in _SHAPE if name not in names])
    return f"All rows: {text}.\n" if text else ""


def _column(method: str) -> tuple:
    """Order of columns; other projects' methods come last."""
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


def _rows_table(rows: list[Row]) -> Iterator[str]:
    """One line a function, pass and shape: the time of each method."""
    names = _varying(rows)
    methods = sorted({row["method"] for row in rows}, key=_column)
    lines = []
    order = lambda row: (row["function"], _ALL_PASSES.index(row["pass"]), shape(row))  # noqa: E731
    for found in grouped(rows, order).values():
        line = [found[0]["function"], found[0]["pass"], *(found[0].get(name) for name in names)]
        # a case that was measured twice has both times in its cell
        line += ["; ".join(_time(r) for r in found if r["method"] == m) or "-" for m in methods]
        mine, floor, best = ours_of(found), None, None
        if mine:
            floor = mine["ms"] / mine["floor_ms"] if mine["floor_ms"] else None
            best = min(rivals(mine, rows), key=lambda row: row["ms"], default=None)
        ratio = "-" if not mine or not best else f"{number(mine['ms'] / best['ms'])} ({_who(best)})"
        lines.append([*line, number(floor), ratio])
    yield _constant(rows, names)
    titles = ["function", "pass", *(_SHAPE[name] for name in names)]
    titles += [f"`{method}`, ms" for method in methods]
    yield _table([*titles, "ours x floor", "ours x best peer"], lines)


def _who(row: Row) -> str:
    return f"full attention, {row['method']}" if row["function"] == FULL else row["method"]


def _operator_table(rows: list[Row]) -> Iterator[str]:
    """One line a shape: forward / backward of ours, by branch, and of full attention."""
    names = _varying(rows)
    lines = []
    for found in grouped([row for row in rows if row["function"] != FULL], shape).values():
        line = [found[0].get(name) for name in names]
        method, full = full_times(found[0], rows)
        whole = times(found, WHOLE)
        parts = [*(times(found, function) for function in BRANCHES), whole, full]
        line += [" / ".join(number(part.get(name)) for name in PASSES) for part in parts]
        faster = ratios(full, whole)
        lines.append([*line, method, *(number(faster.get(name)) for name in (*PASSES, BOTH))])
    if lines:
        yield "Ours by branch, forward / backward in ms, and full attention:\n"
        titles = [*(_SHAPE[name] for name in names), *BRANCHES.values(), "whole operator"]
        titles += ["full attention", "by", *(f"speed-up, {name}" for name in (*PASSES, BOTH))]
        yield _table(titles, lines)


def _models_table(rows: list[Row]) -> Iterator[str]:
    """One line a row: time, tokens a second, memory, and the speed-up over full attention."""
    names = [name for name in _varying(rows) if name not in ("model", "layers", "length")]
    names = ["model", "length", "layers", *names]
    lines = []
    for row in sorted(rows, key=lambda row: (shape(row), row["pass"], _column(row["method"]))):
        line = [*(row[name] for name in names), row["pass"], row["method"], _time(row)]
        line += [number(row["tokens_per_s"]), _percent(row["model_flops_utilisation"])]
        faster = [number(peer["ms"] / row["ms"]) for peer in rivals(row, rows) if is_ours(row)]
        floor = row["ms"] / row["floor_ms"] if row["floor_ms"] else None
        line += [number(_gib(row)), number(floor), "; ".join(faster) or "-"]
        lines.append(line)
    titles = [*(_SHAPE[name] for name in names), "pass", "method", "ms", "tokens/s", "MFU"]
    yield _constant(rows, names)
    yield _table([*titles, "peak GiB", "x floor", "speed-up"], lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _gib(row: Row) -> float | None:
    return None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30


def _device(runs: list[Run], slug: str, out: Path) -> Iterator[str]:
    """The section of a device; draws its plots."""
    yield f"## {_cell(runs[0].content['device'])}\n"
    yield _machine(runs)
    for run in runs:
        if not run.content["measurement"]:
            text = "not a measurement: kernels interpreted on a CPU, tiny sizes"
            yield f"**`{run.name}`: {text}.**\n"
        if not run.content["complete"]:
            yield f"**`{run.name}` is incomplete: cases were left out, or the run broke off.**\n"
    for suite in SUITES:
        for run in (run for run in runs if run.content["suite"] == suite):
            yield f"### {suite.capitalize()}, {_cell(run.content['date'])}\n"
            if suite == "operator":
                yield from _operator_table([r for r in run.rows if r["function"] != MODEL])
            for make, model in ((_rows_table, False), (_models_table, True)):
                if rows := [row for row in run.rows if (row["function"] == MODEL) == model]:
                    yield from make(rows)
            if not run.rows:
                yield "No measured rows.\n"
            yield f"Raw figures: `{run.name}`, commit {_cell(run.content['commit'])}.\n"
            yield from _errors(run)
    yield from _plots(runs, slug, out)
    yield from _losses(runs)


def _machine(runs: list[Run]) -> str:
    """Everything that a number is worth nothing without, as a list."""

    def all_of(values: Iterable[object]) -> str:
        return ", ".join(dict.fromkeys(_cell(value) for value in values))

    contents = [run.content for run in runs]
    facts = {f"{key}": [x.get(key, "unknown") for x in contents] for key in ("driver", "clocks")}
    packages = sorted({name for x in contents for name in x["versions"]})
    versions = {name: [x["versions"].get(name, "unknown") for x in contents] for name in packages}
    facts["versions"] = [", ".join(f"{name} {all_of(versions[name])}" for name in packages)]
    facts |= {"commit": [x["commit"] for x in contents], "date": [x["date"] for x in contents]}
    facts["ceilings"] = [
        f"{number(c['flops'] / 1e12)} TFLOP/s, {number(c['bytes'] / 1e12)} TB/s ({c['source']})"
        if (c := x["ceilings"]) else "unknown: no floors"
        for x in contents
    ]  # fmt: skip
    return "".join(f"* {name}: {all_of(values)}\n" for name, values in facts.items())


def _errors(run: Run) -> Iterator[str]:
    """Rows without a result, by reason and shape."""
    rows = [row for row in run.content["rows"] if "error" in row]
    for reason, found in grouped(rows, lambda row: _cell(row["error"])).items():
        lines = [f"No result: `{reason.replace('`', chr(39))}`\n"]
        for same in grouped(found, shape).values():
            names = (f"{row['function']} by {row['method']} {row['pass']}" for row in same)
            lines.append(f"* {describe(same[0])}: {', '.join(dict.fromkeys(names))}")
        yield "\n".join(lines) + "\n"


def _losses(runs: list[Run]) -> Iterator[str]:
    yield "### Where it loses\n"
    found = [(*loss, run.name) for run in runs for loss in losses(run)]
    compared = sum(len(rivals(row, run.rows)) for run in runs for row in run.rows if is_ours(row))
    if not found:
        text = f"Nowhere: none of {compared} pairs" if compared else "No peer was run beside ours"
        yield f"{text}.\n"
        return
    yield f"Every row of ours that is slower than a peer, {len(found)} of {compared} pairs:\n"
    titles = ["times slower", "function", "pass", "shape", "ours", "ms", "peer", "ms", "file"]
    order = sorted(found, key=lambda x: (-x[0], x[3], x[1]["function"], x[1]["pass"], shape(x[1])))
    yield _table(
        titles,
        (
            (number(times_slower), row["function"], row["pass"], describe(row), row["method"],
             _time(row), _who(peer), _time(peer), f"`{name}`")
            for times_slower, row, peer, name in order
        ),
    )  # fmt: skip


# Plots

#: Points of each line, by its label and style; a label has the same colour in all panels.
type Lines = dict[tuple[str, str], dict[int, float]]


def _plots(runs: list[Run], slug: str, out: Path) -> Iterator[str]:
    """Draws what there are rows for, gives the links; interpreted rows never join measured ones."""
    measured = _measured(runs)
    title = runs[0].content["device"] + ("" if measured else " (NOT A MEASUREMENT)")
    links = []
    for name, (caption, draw) in PLOTS.items():
        if (figure := draw(measured or runs)) is None:
            continue
        figure.suptitle(f"{title}\n{caption}", fontsize=11)
        (out / "images").mkdir(exist_ok=True)
        path = f"images/{slug}-{name}.png"
        figure.savefig(out / path, dpi=_DPI, metadata={"Software": None})
        links.append(f"![{caption}]({path})\n")
    if links:
        yield "### Plots\n"
        yield from links


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.5 * count, 4.8), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _line_plot(panels: Mapping[str, Lines], xlabel: str, ylabel: str) -> Figure | None:
    """A panel for each set of lines, over a log2 axis; None without a point."""
    panels = {title: lines for title, lines in panels.items() if lines}
    names = sorted({name for lines in panels.values() for name, _ in lines})
    if not names:
        return None
    figure, grid = _panels(len(panels))
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        for (name, style), points in sorted(lines.items()):
            x = sorted(points)
            label = None if style != "o-" and (name, "o-") in lines else name
            y = [points[value] for value in x]
            axes.plot(x, y, style, color=f"C{names.index(name)}", markersize=5, label=label)
        ticks = sorted({x for points in lines.values() for x in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:,}" for x in ticks], rotation=30)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _ratio_axes(figure: Figure | None) -> Figure | None:
    """Log axes of ratios with a line at 1."""
    for axes in figure.axes if figure else ():
        axes.axhline(1, color="black", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(LogLocator(2, subs=(1, 1.5), numticks=20))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    return figure


def _rows_of(runs: list[Run], function: str) -> list[tuple[Run, Row]]:
    """Rows of a function that are comparable over runs: not packed, blocks chosen by NSA."""
    rows = [(run, row) for run in runs for row in run.rows if row["function"] == function]
    return [(a, row) for a, row in rows if not row["packed"] and row["selection"] in (None, "nsa")]


def _labels(rows: list[Row], without: Sequence[str]) -> Callable[[Row], str]:
    """Says of a row what tells lines apart."""
    names = [name for name in _varying(rows) if name not in (*without, "selection")]
    return lambda row: describe(row, names)


def _draw_speedup(runs: list[Run]) -> Figure | None:
    found = [(run, row) for run, row in _rows_of(runs, WHOLE) if is_ours(row)]
    label = _labels([row for _, row in found], ["length"])
    panels: dict[str, Lines] = {"forward": {}, BOTH: {}}
    for run, row in found:
        method, full = full_times(row, run.rows)
        same = [other for other in run.rows if shape(other) == shape(row)]
        faster = ratios(full, times(same, WHOLE))
        for name, lines in panels.items():
            if name in faster:
                key = (f"{label(row)} ({method})", "o-")
                lines.setdefault(key, {})[row["length"]] = faster[name]
    return _ratio_axes(_line_plot(panels, "tokens T", "times faster"))


def _draw_selected(runs: list[Run]) -> Figure | None:
    kernels = [run for run in runs if run.content["suite"] == "kernels"]
    found = _rows_of(kernels, "selected_attention") or _rows_of(runs, "selected_attention")
    found = [(run, row) for run, row in found if is_ours(row)]
    label = _labels([row for _, row in found], ["heads", "kv_heads"])
    panels: dict[str, Lines] = {name: {} for name in PASSES}
    for run, row in found:
        for peer in rivals(row, run.rows):
            if peer["method"] == "query_outer":
                key = (label(row) or "all T", "o-" if row["method"] == "kv_outer" else "x:")
                points = panels.setdefault(row["pass"], {}).setdefault(key, {})
                points[row["heads"] // row["kv_heads"]] = peer["ms"] / row["ms"]
    return _ratio_axes(_line_plot(panels, "query heads a key head, G", "times faster"))


def _draw_split(runs: list[Run]) -> Figure | None:
    found = [(run, row) for f in (*BRANCHES, WHOLE) for run, row in _rows_of(runs, f)]
    cases: dict[tuple, list[Row]] = {}
    for run, row in found:
        key = [name for name in _SHAPE if name != "length"]
        cases.setdefault((run.content["date"], run.name, shape(row, key)), []).append(row)
    whole_cases = [rows for rows in cases.values() if any(row["function"] == WHOLE for row in rows)]
    if not whole_cases:
        return None
    rows = max(reversed(whole_cases), key=len)
    lengths = grouped(rows, lambda row: row["length"])
    x = range(len(lengths))
    figure, grid = _panels(len(PASSES))
    for axes, name in zip(grid, PASSES, strict=True):
        *parts, whole = (
            [times(at, function).get(name, 0) * 1024 / t for t, at in lengths.items()]
            for function in (*BRANCHES, WHOLE)
        )
        parts.append([max(a - sum(b), 0) for a, *b in zip(whole, *parts, strict=True)])
        bottom = [0.0] * len(x)
        for label, height in zip([*BRANCHES.values(), "rest"], parts, strict=True):
            axes.bar(x, height, bottom=bottom, label=label)
            bottom = [a + b for a, b in zip(bottom, height, strict=True)]
        axes.plot(x, whole, "k_", markersize=30, label="whole operator")
        axes.set_xticks(x, [f"{t:,}" for t in lengths])
        heads = describe(rows[0], ("heads", "kv_heads"))
        axes.set(title=f"{name}, {heads}", xlabel="tokens T", ylabel="ms for every 1,024 tokens")
        axes.legend(fontsize=8)
    return figure


def _draw_memory(runs: list[Run]) -> Figure | None:
    found = [row for _, row in _rows_of(runs, WHOLE) if is_ours(row) and row["peak_bytes"]]
    label = _labels(found, ["length"])
    panels: dict[str, Lines] = {name: {} for name in PASSES}
    for row in found:
        points = panels.setdefault(row["pass"], {}).setdefault((label(row), "o-"), {})
        points[row["length"]] = row["peak_bytes"] / 2**30
    for lines in filter(None, panels.values()):
        lengths = sorted({t for points in lines.values() for t in points})
        first = min(points.get(lengths[0], math.inf) for points in lines.values())
        lines["in proportion to T", ":"] = {t: first * t / lengths[0] for t in lengths}
    figure = _line_plot(panels, "tokens T", "peak memory, GiB")
    for axes in figure.axes if figure else ():
        axes.set_yscale("log")
    return figure


def _draw_roofline(runs: list[Run]) -> Figure | None:
    found = [row for run in runs for row in run.rows if row["flops"] and row["bytes"]]
    if not found:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    by_kind = grouped(found, lambda row: (row["function"], row["pass"], is_peer(row)))
    functions = sorted({row["function"] for row in found})
    for (function, name, peer), rows in by_kind.items():
        colour = f"C{functions.index(function)}"
        axes.scatter(
            [row["flops"] / row["bytes"] for row in rows],
            [1e3 * row["flops"] / row["ms"] for row in rows],
            marker="o" if name == "forward" else "^",
            facecolors="none" if peer else colour,
            edgecolors=colour,
            label=f"{function}, {name}{', peers' * peer}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    if known := [run.content["ceilings"] for run in runs if run.content["ceilings"]]:
        ceilings, ridge = known[-1], known[-1]["flops"] / known[-1]["bytes"]
        x = sorted([*axes.get_xlim(), ridge])
        y = [min(t * ceilings["bytes"], ceilings["flops"]) for t in x]
        axes.plot(x, y, "k-", label="ceilings")
    axes.set(xlabel="flop for every byte", ylabel="flop/s")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def _draw_models(runs: list[Run]) -> Figure | None:
    panels: dict[str, Lines] = {}
    for row in (row for run in runs for row in run.rows if row["function"] == MODEL):
        key = (row["model"], "o-" if row["method"] == "nsa" else "s--")
        panels.setdefault(row["pass"], {}).setdefault(key, {})[row["length"]] = row["tokens_per_s"]
    figure = _line_plot(panels, "tokens T", "tokens a second")
    for axes in figure.axes if figure else ():
        axes.set_ylim(bottom=0)
    return figure


#: Caption and drawing of each plot, by the end of its file's name.
PLOTS: dict[str, tuple[str, Callable[[list[Run]], Figure | None]]] = {
    "speedup": ("The whole operator against full attention, in the same run", _draw_speedup),
    "selected": (
        "Selected attention against query-outer (line: KV-outer, dotted: the choice)",
        _draw_selected,
    ),
    "split": ("Time by branch", _draw_split),
    "memory": ("Peak memory of the operator, by the compiler's account", _draw_memory),
    "roofline": ("Work done against the ceilings", _draw_roofline),
    "models": ("Whole models (line: sparse, dashed: full attention)", _draw_models),
}
