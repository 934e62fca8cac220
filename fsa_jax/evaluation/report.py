"""The result of an evaluation as tables in Markdown, which are also printed on the terminal."""

from collections.abc import Sequence
from typing import Any, NamedTuple

_TITLES = {
    "recall": "Recall: one of many keys",
    "needle": "Needle in the text",
}


class Section(NamedTuple):
    """A part of the report.

    Attributes:
      title: its title.
      table: a table in Markdown, whose columns are aligned.
      legend: what the table shows.
    """

    title: str
    table: str
    legend: str


def sections(values: dict[str, Any]) -> list[Section]:
    """The sections of the report of an evaluation.

    Args:
      values: the result, as in `evaluation.json`.
    """
    labels = [model["label"] for model in values["models"]]
    found = []
    if "loss" in values:
        legend = (
            "Loss in nats per token ± standard error, by the position in its document of the last "
            f"token read, from 0, in {values['loss']['sequences']} sequences of "
            f"{values['arguments']['seq_len']} tokens."
        )
        found.append(Section("Loss by position", _loss_table(values["loss"], labels), legend))
    for task, title in _TITLES.items():
        if task in values:
            chance, digits = values[task]["chance"], values["arguments"]["answer_digits"]
            legend = (
                "Exact: part of the samples whose greedy answer is right. log p: log-probability "
                "of the right answer in nats. Both ± standard error. A guess of "
                f"{digits} digits has {chance['exact_match']:.0e} and "
                f"{chance['log_probability']:.2f}. Depth 0 is the start of the context, 1 its end."
            )
            found.append(Section(title, _retrieval_table(values[task], labels), legend))
    return found


def markdown(values: dict[str, Any]) -> str:
    """The page of an evaluation, in Markdown, with its plots."""
    names = [model["label"] for model in values["models"]]
    text = values["text"]
    rows = [
        [x["label"], f"`{x['path']}`", x["step"] or "-", x["attention"], f"{x['parameters']:,}"]
        for x in values["models"]
    ]
    parts = [
        f"# Evaluation of {' and '.join(names)}\n",
        _table(["model", "checkpoint", "step", "attention", "parameters"], rows),
        f"Text: {text['source']} ({text['documents']} documents, {text['tokens']:,} tokens, "
        f"{text['bytes_per_token']:.2f} bytes per token).\n",
    ]
    for section in sections(values):
        parts += [f"## {section.title}\n", section.table, f"{section.legend}\n"]
    if "loss" in values:
        parts.append("![Loss by position](loss.png)\n")
    if any(task in values for task in _TITLES):
        parts += [
            f"![Retrieval of {name}](retrieval-{number}.png)\n"
            for number, name in enumerate(names, start=1)
        ]
    made = ", ".join(f"{name} {version}" for name, version in values["versions"].items())
    devices = ", ".join(values["devices"])
    parts.append(f"{values['date']}, commit {values['commit']}; {made}; {devices}.\n")
    return "\n".join(parts)


def _loss_table(loss: dict[str, Any], labels: Sequence[str]) -> str:
    titles = ["position", "tokens"]
    for label in labels:
        titles += [label, f"{label}, bits/byte"]
    titles += [f"{label} - {labels[0]}" for label in labels[1:]]
    rows = []
    for row in [*loss["buckets"], loss["all"]]:
        first, last = row["from"], row["to"] - 1
        cells = [f"{first}-{last}" if last > first else f"{first}", f"{row['tokens']:,}"]
        for mine in row["models"]:
            cells += [
                _with_error(mine["loss"], mine["standard_error"], ".4f"),
                "-" if mine["bits_per_byte"] is None else f"{mine['bits_per_byte']:.4f}",
            ]
        cells += [
            _with_error(mine["difference"], mine["difference_standard_error"], "+.4f")
            for mine in row["models"][1:]
        ]
        rows.append(cells)
    rows[-1][0] = "all"
    return _table(titles, rows)


def _retrieval_table(found: dict[str, Any], labels: Sequence[str]) -> str:
    titles = ["length", "depth", "samples"]
    for label in labels:
        titles += [f"{label}, exact", f"{label}, log p"]
    for label in labels[1:]:
        titles += [f"{label} - {labels[0]}, exact", f"{label} - {labels[0]}, log p"]
    rows = []
    for row in [*found["cells"], found["all"] | {"length": "all", "depth": "all"}]:
        cells = [row["length"], row["depth"], row["samples"]]
        for mine in row["models"]:
            cells += [
                _with_error(mine["exact_match"], mine["exact_match_standard_error"], ".2f"),
                _with_error(mine["log_probability"], mine["log_probability_standard_error"], ".2f"),
            ]
        for mine in row["models"][1:]:
            for name in ("exact_match_difference", "log_probability_difference"):
                cells.append(_with_error(mine[name], mine[f"{name}_standard_error"], "+.2f"))
        rows.append(cells)
    return _table(titles, rows)


def _with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


def _table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose columns are aligned, so that it is as readable on a terminal."""
    cells = [[str(x).replace("|", r"\|") for x in row] for row in (titles, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = (
        " | ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        for row in cells
    )
    return "".join(f"| {line} |\n" for line in lines)
