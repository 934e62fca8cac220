"""The report of `fsa-jax bench`: Markdown tables and plots, made only from the JSON files.

Rows are compared only with rows of the same file, since only these were timed in the same run. The
same files produce the same bytes.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fsa_jax.bench.report.plots import PLOTS
from fsa_jax.bench.report.results import (
    ALL_PASSES,
    BOTH,
    BRANCHES,
    FULL,
    METHODS,
    MODEL,
    PASSES,
    SHAPE,
    SUITES,
    WHOLE,
    Row,
    Run,
    cell,
    describe,
    full_times,
    grouped,
    is_ours,
    load,
    losses,
    measured_of,
    number,
    ours_of,
    ratios,
    rivals,
    shape,
    times,
    varying,
)
from fsa_jax.messages import naming

_DPI = 120
#: Everything after this mark is generated.
MARK = "<!-- From here on made by `fsa-jax bench --report`: edits below are lost. -->"
#: The number of kernels that a line of the kernel table names.
_NAMED = 5
_LEGEND = """\
Times are in ms per call: the median over rounds, followed in brackets by the spread over the
rounds, (slowest - fastest) / median. T is the number of tokens, N of query heads, K of key/value
heads, and D the head width. *Ours* is the default implementation if it was run (`default`;
`triton` where that is the same; `nsa` for models), else `kv_outer`, else `xla`. *x floor* is our
time divided by the least time that the products and the memory traffic take at the ceilings of
the device. *x best peer* is our time divided by that of the fastest rival in the same run; it is
below 1 where ours is faster. Rivals are `query_outer` (the kernel of vanilla NSA), `peer_*`
(other projects' code), and full attention for the whole operator and for models. A speed-up is
above 1 where ours is faster. The plots show the most recent measurement of each shape. A dash
means not measured, or unknown.
"""


def report(results: Path, out: Path) -> None:
    """Writes `benchmarks.md` and `images/*.png` from all result files below a folder.

    The text before `MARK` in an existing `benchmarks.md` is kept.

    Args:
      results: folder of results; other JSON files in it are ignored.
      out: folder to write into.

    Raises:
      ValueError: there is no result, or a file is invalid or lacks a key.
    """
    runs = load(results)
    slugs: dict[str, str] = {}
    for run in runs:
        slug = re.sub(r"[^a-z0-9]+", "-", run.content["device"].lower()).strip("-") or "device"
        while slug in slugs and slugs[slug] != run.content["device"]:
            slug += "-x"
        slugs[slug] = run.content["device"]
    out.mkdir(parents=True, exist_ok=True)
    parts = [_LEGEND]
    found = {s: [run for run in runs if run.content["device"] == d] for s, d in slugs.items()}
    for slug in sorted(found, key=lambda slug: (not measured_of(found[slug]), slug)):
        parts += _device(found[slug], slug, out)
    text = "\n".join(parts).rstrip("\n") + "\n"
    path = out / "benchmarks.md"
    text = f"{_head(path)}{MARK}\n\n{text}"
    with naming(path):
        path.write_text(text, encoding="utf-8", newline="\n")


def _head(path: Path) -> str:
    """The hand-written text before the mark of an existing report."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    head, mark, _ = text.partition(MARK)
    return head if mark else "# Benchmarks\n\n"


# Text


def _time(row: Row | None) -> str:
    if row is None:
        return "-"
    wrong = ", differs from ours" * (row.get("agrees") is False)
    return f"{number(row['ms'])} ({100 * row['spread']:.0f}%{wrong})"


def _table(titles: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    titles = list(titles)
    rows = [
        titles,
        ["---"] * len(titles),
        *([cell(value).replace("|", r"\|") for value in line] for line in lines),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _constant(rows: list[Row], names: Iterable[str]) -> str:
    """A line of text with the shape fields that all rows share."""
    text = describe(rows[0], [name for name in SHAPE if name not in names])
    return f"All rows: {text}.\n" if text else ""


def _column(method: str) -> tuple:
    """The sort key of method columns; other projects' methods come last."""
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


def _rows_table(rows: list[Row]) -> Iterator[str]:
    """One line for each function, pass and shape, with the time of each method."""
    names = varying(rows)
    methods = sorted({row["method"] for row in rows}, key=_column)
    lines = []
    order = lambda row: (row["function"], ALL_PASSES.index(row["pass"]), shape(row))  # noqa: E731
    for found in grouped(rows, order).values():
        line = [found[0]["function"], found[0]["pass"], *(found[0].get(name) for name in names)]
        # the cell of a case that was measured twice shows both times
        line += ["; ".join(_time(r) for r in found if r["method"] == m) or "-" for m in methods]
        mine, floor, best = ours_of(found), None, None
        if mine:
            floor = mine["ms"] / mine["floor_ms"] if mine["floor_ms"] else None
            best = min(rivals(mine, rows), key=lambda row: row["ms"], default=None)
        ratio = "-" if not mine or not best else f"{number(mine['ms'] / best['ms'])} ({_who(best)})"
        lines.append([*line, number(floor), ratio])
    yield _constant(rows, names)
    titles = ["function", "pass", *(SHAPE[name] for name in names)]
    titles += [f"`{method}`, ms" for method in methods]
    yield _table([*titles, "ours x floor", "ours x best peer"], lines)


def _who(row: Row) -> str:
    return f"full attention, {row['method']}" if row["function"] == FULL else row["method"]


def _operator_table(rows: list[Row]) -> Iterator[str]:
    """One line for each shape: our forward / backward times by branch, and full attention."""
    sparse = [row for row in rows if row["function"] != FULL]
    names, lines = varying(sparse), []
    for found in grouped(sparse, shape).values():
        line = [found[0].get(name) for name in names]
        method, full = full_times(found[0], rows)
        whole = times(found, WHOLE)
        parts = [*(times(found, function) for function in BRANCHES), whole, full]
        line += [" / ".join(number(part.get(name)) for name in PASSES) for part in parts]
        faster = ratios(full, whole)
        lines.append([*line, method, *(number(faster.get(name)) for name in (*PASSES, BOTH))])
    yield "Our times by branch, forward / backward in ms, and those of full attention:\n"
    titles = [*(SHAPE[name] for name in names), *BRANCHES.values(), "whole operator"]
    titles += ["full attention", "by", *(f"speed-up, {name}" for name in (*PASSES, BOTH))]
    yield _table(titles, lines)


def _models_table(rows: list[Row]) -> Iterator[str]:
    """One line for each row: time, tokens per second, memory, speed-up over full attention."""
    names = [name for name in varying(rows) if name not in ("model", "layers", "length")]
    names = ["model", "length", "layers", *names]
    lines = []
    for row in sorted(rows, key=lambda row: (shape(row), row["pass"], _column(row["method"]))):
        line = [*(row[name] for name in names), row["pass"], row["method"], _time(row)]
        mfu = row["model_flops_utilisation"]
        line += [number(row["tokens_per_s"]), "-" if mfu is None else f"{100 * mfu:.1f}%"]
        faster = [number(peer["ms"] / row["ms"]) for peer in rivals(row, rows) if is_ours(row)]
        gib = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30
        lines.append([*line, number(gib), "; ".join(faster) or "-"])
    titles = [*(SHAPE[name] for name in names), "pass", "method", "ms", "tokens/s", "MFU"]
    yield _constant(rows, names)
    yield _table([*titles, "peak GiB", "speed-up"], lines)


def _kernels_table(rows: list[Row]) -> Iterator[str]:
    """One line for each of our rows: the device time by kernel, longest first."""
    names = varying(rows)
    lines = []
    order = lambda row: (row["function"], ALL_PASSES.index(row["pass"]), shape(row))  # noqa: E731
    for row in sorted(rows, key=order):
        spent: dict[str, float] = {}
        for name, ms in row["kernels_ms"].items():
            spent[kernel_name(name)] = spent.get(kernel_name(name), 0) + ms
        longest = sorted(spent.items(), key=lambda item: (-item[1], item[0]))
        rest = sum(ms for _, ms in longest[_NAMED:])
        text = [f"{name} {number(ms)}" for name, ms in longest[:_NAMED]]
        text += [f"others {number(rest)}"] * (rest > 0)
        line = [row["function"], row["method"], row["pass"], *(row.get(name) for name in names)]
        lines.append([*line, number(row["ms"]), number(row["device_ms"]), ", ".join(text)])
    yield "Device time by kernel in ms per call, from the profiler.\n"
    yield _constant(rows, names)
    titles = ["function", "method", "pass", *(SHAPE[name] for name in names)]
    yield _table([*titles, "ms", "device, ms", "kernels"], lines)


def kernel_name(name: str) -> str:
    """The name of one of our kernels, or the kind of a kernel of XLA or a library."""
    if found := re.fullmatch(r"(\w+_kernel)(__\d+)?", name):
        return found[1]
    kinds = {"sort": "(?i)sort", "fusions": "fusion", "copies": "(?i)memcpy|memset|copy|transpose"}
    for kind, pattern in kinds.items():
        if re.search(pattern, name):
            return kind
    return re.split(r"[(<]", name.removeprefix("void "))[0][:60]


def _device(runs: list[Run], slug: str, out: Path) -> Iterator[str]:
    """The section of a device, with its plots."""
    yield f"## {cell(runs[0].content['device'])}\n"
    yield _machine(runs)
    for run in runs:
        if not run.content["measurement"]:
            text = "not a measurement: kernels interpreted on a CPU, tiny sizes"
            yield f"**`{run.name}`: {text}.**\n"
        if not run.content["complete"]:
            text = "cases were left out, or the run was interrupted"
            yield f"**`{run.name}` is incomplete: {text}.**\n"
    for suite in SUITES:
        for run in (run for run in runs if run.content["suite"] == suite):
            yield f"### {suite.capitalize()}, {cell(run.content['date'])}\n"
            models = [row for row in run.rows if row["function"] == MODEL]
            rows = [row for row in run.rows if row["function"] != MODEL]
            tables = [(_operator_table, rows if suite == "operator" else [])]
            profiled = [row for row in rows if is_ours(row) and row.get("kernels_ms")]
            tables = [*tables, (_rows_table, rows), (_kernels_table, profiled)]
            tables = [*tables, (_models_table, models)]
            source = f"Raw figures: `{run.name}`, commit {cell(run.content['commit'])}.\n"
            for make, wanted in tables:
                if wanted:
                    yield from (*make(wanted), source)
            if not run.rows:
                yield from ("No measured rows.\n", source)
            yield from _errors(run)
    yield from _plots(runs, slug, out)
    yield from _losses(runs)


def _machine(runs: list[Run]) -> str:
    """The machine, versions, commits, dates and ceilings of the runs, as a list."""

    def all_of(values: Iterable[object]) -> str:
        return ", ".join(dict.fromkeys(cell(value) for value in values))

    contents = [run.content for run in runs]
    facts = {key: [x.get(key, "unknown") for x in contents] for key in ("driver", "clocks")}
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
    """The rows without a result, by reason and shape."""
    rows = [row for row in run.content["rows"] if "error" in row]
    for reason, found in grouped(rows, lambda row: cell(row["error"])).items():
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
    yield f"Cases in which ours is slower than a peer, {len(found)} of {compared} pairs:\n"
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


def _plots(runs: list[Run], slug: str, out: Path) -> Iterator[str]:
    """Draws the plots that have rows and yields their links; interpreted rows are kept apart."""
    measured = measured_of(runs)
    title = runs[0].content["device"] + ("" if measured else " (NOT A MEASUREMENT)")
    links = []
    for name, (caption, draw) in PLOTS.items():
        if (figure := draw(measured or runs)) is None:
            continue
        figure.suptitle(f"{title}\n{caption}", fontsize=11)
        (out / "images").mkdir(exist_ok=True)
        path = f"images/{slug}-{name}.png"
        with naming(out / path):
            figure.savefig(out / path, dpi=_DPI, metadata={"Software": None})
        links.append(f"![{caption}]({path})\n")
    if links:
        yield "### Plots\n"
        yield from links
