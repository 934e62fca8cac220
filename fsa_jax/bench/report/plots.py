"""Plots of `fsa-jax bench`, from the rows of result files."""

import math
import re
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fsa_jax.bench.report.results import (
    BOTH,
    BRANCHES,
    MODEL,
    PASSES,
    SHAPE,
    WHOLE,
    Row,
    Run,
    describe,
    full_times,
    grouped,
    is_ours,
    is_peer,
    ratios,
    rivals,
    shape,
    times,
    varying,
)

#: The points of each line, by its label and style; a label has the same colour in all panels.
type Lines = dict[tuple[str, str], dict[int, float]]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.5 * count, 4.8), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _by_number(text: str) -> tuple:
    """Sorts labels by the numbers in them, with labels without numbers last."""
    numbers = [int(part.replace(",", "")) for part in re.findall(r"\d[\d,]*", text)]
    return not numbers, numbers, text


def _line_plot(panels: Mapping[str, Lines], xlabel: str, ylabel: str) -> Figure | None:
    """Draws a panel for each set of lines, with a log2 x axis; None if there are no points."""
    panels = {title: lines for title, lines in panels.items() if lines}
    names = sorted({name for lines in panels.values() for name, _ in lines}, key=_by_number)
    if not names:
        return None
    figure, grid = _panels(len(panels))
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        for (name, style), points in sorted(lines.items(), key=lambda x: names.index(x[0][0])):
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


def _log2_heights(figure: Figure | None, line: float | None) -> Figure | None:
    """Gives the figure log2 y axes, with a horizontal line at `line` unless it is None."""
    for axes in figure.axes if figure else ():
        if line is not None:
            axes.axhline(line, color="black", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(LogLocator(2, subs=(1, 1.5), numticks=20))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    return figure


def _rows_of(runs: list[Run], function: str) -> list[tuple[Run, Row]]:
    """The rows of a function that are comparable across runs: not packed, blocks chosen by NSA."""
    rows = [(run, row) for run in runs for row in run.rows if row["function"] == function]
    return [(a, row) for a, row in rows if not row["packed"] and row["selection"] in (None, "nsa")]


def _labels(rows: list[Row], without: Sequence[str]) -> Callable[[Row], str]:
    """A function that labels a row by the shape fields that distinguish the lines."""
    names = [name for name in varying(rows) if name not in (*without, "selection")]
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
    return _log2_heights(_line_plot(panels, "tokens T", "times faster"), line=1)


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
    return _log2_heights(_line_plot(panels, "query heads a key head, G", "times faster"), line=1)


def _draw_split(runs: list[Run]) -> Figure | None:
    found = [(run, row) for f in (*BRANCHES, WHOLE) for run, row in _rows_of(runs, f)]
    cases: dict[tuple, list[Row]] = {}
    for run, row in found:
        key = [name for name in SHAPE if name != "length"]
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
        axes.plot(x, whole, "k_", markersize=30, label="whole")
        axes.set_xticks(x, [f"{t:,}" for t in lengths])
        heads = describe(rows[0], ("heads", "kv_heads"))
        axes.set(title=f"{name}, {heads}", xlabel="tokens T", ylabel="ms for every 1,024 tokens")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
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
    return _log2_heights(_line_plot(panels, "tokens T", "peak memory, GiB"), line=None)


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
        title = f"{row['pass']}, {'packed documents' if row['packed'] else 'one document'}"
        panels.setdefault(title, {}).setdefault(key, {})[row["length"]] = row["tokens_per_s"]
    figure = _line_plot(panels, "tokens T", "tokens a second")
    for axes in figure.axes if figure else ():
        axes.set_ylim(bottom=0)
    return figure


#: The caption and drawing function of each plot, by the suffix of its file name.
PLOTS: dict[str, tuple[str, Callable[[list[Run]], Figure | None]]] = {
    "speedup": ("The whole operator against full attention, in the same run", _draw_speedup),
    "selected": (
        "Selected attention against query-outer (line: KV-outer, dotted: the choice)",
        _draw_selected,
    ),
    "split": ("Time by branch", _draw_split),
    "memory": ("Peak memory of the operator, by the compiler's account", _draw_memory),
    "roofline": ("Work done against the ceilings", _draw_roofline),
    "models": ("Decoder layers of models (line: sparse, dashed: full attention)", _draw_models),
}
