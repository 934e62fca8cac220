"""Plots of an evaluation: the loss by position, and heat maps of retrieval."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

_DPI = 120
_TASKS = ("recall", "needle")


def plot_loss(path: Path, values: dict[str, Any]) -> None:
    """Plots the loss of each model over the position in the document.

    Args:
      path: PNG file to write.
      values: the result, as in `evaluation.json`.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    buckets = values["loss"]["buckets"]
    x = range(len(buckets))
    for number, model in enumerate(values["models"]):
        mine = [bucket["models"][number] for bucket in buckets]
        errors = [one["standard_error"] or 0.0 for one in mine]
        y = [one["loss"] for one in mine]
        axes.errorbar(x, y, errors, fmt="o-", markersize=4, capsize=3, label=model["label"])
    names = [
        f"{b['from']}-{b['to'] - 1}" if b["to"] - b["from"] > 1 else b["from"] for b in buckets
    ]
    axes.set_xticks(x, [str(name) for name in names], rotation=30)
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss by position, with standard errors")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=_DPI, format="png")


def plot_retrieval(path: Path, values: dict[str, Any], number: int) -> None:
    """Plots a heat map by length and depth for each task and measure of a model.

    The colours of all models of an evaluation have the same scale.

    Args:
      path: PNG file to write.
      values: the result, as in `evaluation.json`.
      number: number of the model, from 1.
    """
    tasks = [task for task in _TASKS if task in values]
    least = min(
        mine["log_probability"]
        for task in tasks
        for cell in values[task]["cells"]
        for mine in cell["models"]
    )
    measures = {
        "exact_match": ("exact match", 0.0, 1.0),
        # A model that is always certain and right has no range of its own.
        "log_probability": ("log-probability of the answer (nats)", min(least, -1e-9), 0.0),
    }
    figure = Figure(figsize=(5.5 * len(tasks), 8), layout="constrained")
    grid = figure.subplots(len(measures), len(tasks), squeeze=False)
    for row, (name, (title, low, high)) in enumerate(measures.items()):
        for column, task in enumerate(tasks):
            axes = grid[row, column]
            found = _grid(values[task]["cells"], name, number - 1)
            image = _draw(axes, *found, low, high)
            axes.set_title(f"{task}: {title}", fontsize=10)
            figure.colorbar(image, ax=axes)
    figure.suptitle(values["models"][number - 1]["label"])
    figure.savefig(path, dpi=_DPI, format="png")


def _grid(cells: list[dict], name: str, model: int) -> tuple[list[int], list[float], np.ndarray]:
    """The lengths, the depths, and the values [depths, lengths] of a measure of a model."""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    found = np.zeros((len(depths), len(lengths)))
    for cell in cells:
        place = depths.index(cell["depth"]), lengths.index(cell["length"])
        found[place] = cell["models"][model][name]
    return lengths, depths, found


def _draw(
    axes: Axes, lengths: list[int], depths: list[float], found: np.ndarray, low: float, high: float
):
    image = axes.imshow(found, vmin=low, vmax=high, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(found):
        light = (value - low) / (high - low) > 0.6
        colour = "black" if light else "white"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth of the answer")
    return image
