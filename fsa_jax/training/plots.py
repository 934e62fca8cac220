"""Plots of a run: its losses, and the key blocks that its queries selected."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from fsa_jax.config import NSAConfig
from fsa_jax.messages import naming
from fsa_jax.training.metrics import Row, curve

_DPI = 120
# The training loss is drawn as a running mean, over the pale curve of the single steps. The mean is
# over at most this fraction of the run, so that it does not lag behind in a short run.
_SMOOTHING_STEPS = 20
_SMOOTHING_FRACTION = 0.05

# Limits on panels, and on points along an axis, keep plots of long sequences readable and small.
_MAX_LAYERS = 4
_MAX_HEADS = 4
_MAX_POINTS = 1024

_CHOICES = ("selected by score", "forced: first blocks", "forced: last blocks")
_COLOURS = ("white", "tab:blue", "tab:orange", "silver")


def plot_losses(
    path: Path, runs: Mapping[str, Iterable[Row]], *, unigram_loss: float, unit: str = "byte"
) -> None:
    """Plots the training and validation losses of one or more runs.

    Args:
      path: PNG file to write.
      runs: the rows of each run, as `read_metrics` returns them, by the name of the run.
      unigram_loss: validation loss of the unigram model, in nats per token.
      unit: what a token is: "byte" or "token".

    Raises:
      OSError: the file cannot be written.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, rows) in enumerate(runs.items()):
        rows = list(rows)
        colour = f"C{number}"
        steps, losses = curve(rows, "loss")
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _running_mean(losses), color=colour, label=f"{name}, training")
        if warm := [row["step"] for row in rows if row.get("attention") == "full"]:
            label = f"{name}, end of full attention"
            axes.axvline(max(warm), color=colour, linestyle="-.", linewidth=0.8, label=label)
        steps, losses = curve(rows, "val_loss")
        label = f"{name}, validation" + (f" ({losses[-1]:.3f} at the end)" if losses else "")
        axes.plot(steps, losses, "o--", color=colour, markersize=4, label=label)
    label = f"unigram {unit} model, validation ({unigram_loss:.3f})"
    axes.axhline(unigram_loss, color="black", linestyle=":", label=label)
    axes.set_xlabel("training step")
    axes.set_ylabel(f"loss (nats per {unit})")
    axes.set_title(f"{unit.capitalize()}-level language model: next-{unit} loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    with naming(path):
        figure.savefig(path, dpi=_DPI)


def _running_mean(values: list[float]) -> np.ndarray:
    """The mean of each value and those before it in a window, which is shorter at the start."""
    size = max(1, min(_SMOOTHING_STEPS, int(len(values) * _SMOOTHING_FRACTION)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - size, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_blocks(
    path: Path,
    block_indices: np.ndarray,
    segment_ids: np.ndarray,
    config: NSAConfig,
    unit: str = "byte",
) -> None:
    """Plots which blocks the queries of one sequence selected, in a panel per layer and KV head.

    Block indices count from the start of each query's own document; blocks are drawn at their
    positions in the sequence.

    Args:
      path: PNG file to write.
      block_indices: int32 [L, T, K, topk] of one sequence (L layers, T tokens, K KV heads), -1 in
        unused slots.
      segment_ids: int32 [T] of that sequence.
      config: the configuration of the selection.
      unit: what a token is: "byte" or "token".

    Raises:
      OSError: the file cannot be written.
    """
    layers = _evenly(block_indices.shape[0], _MAX_LAYERS)
    heads = _evenly(block_indices.shape[2], _MAX_HEADS)
    figure = Figure(figsize=(3.4 * len(heads) + 1.2, 3.3 * len(layers) + 1.2), layout="constrained")
    grid = figure.subplots(len(layers), len(heads), sharex=True, sharey=True, squeeze=False)
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            axes = grid[row, column]
            _draw_selection(axes, block_indices[layer, :, head], segment_ids, config)
            axes.set_title(f"layer {layer}, KV head {head}", fontsize=10)
            if row == len(layers) - 1:
                axes.set_xlabel(f"position of the key in the sequence ({unit}s)")
    figure.supylabel(f"position of the query in the sequence ({unit}s)")
    blocks = f"blocks of {config.block_size} {unit}s, at most {config.topk} per query"
    figure.suptitle(f"Blocks that each query selected ({blocks})\nlines: document boundaries")
    patches = [
        Patch(facecolor=colour, label=name)
        for name, colour in zip(_CHOICES, _COLOURS[1:], strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    with naming(path):
        figure.savefig(path, dpi=_DPI)


def _evenly(count: int, limit: int) -> list[int]:
    """At most `limit` evenly spaced numbers below `count`, among them the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, limit))})


def _draw_selection(axes: Axes, selected: np.ndarray, segment_ids: np.ndarray, config: NSAConfig):
    length = len(segment_ids)
    axes.imshow(
        selection_image(selected, segment_ids, config, max_points=_MAX_POINTS),
        cmap=ListedColormap(_COLOURS),
        vmin=0,
        vmax=len(_COLOURS) - 1,
        interpolation="nearest",
        extent=(0, length, length, 0),
    )
    for boundary in (np.flatnonzero(np.diff(segment_ids)) + 1).tolist():
        axes.axhline(boundary, color="black", linewidth=0.6)
        axes.axvline(boundary, color="black", linewidth=0.6)


def selection_image(
    selected: np.ndarray, segment_ids: np.ndarray, config: NSAConfig, *, max_points: int
) -> np.ndarray:
    """Which keys the selected blocks of each query cover, and why they were selected.

    Args:
      selected: int32 [T, topk], block indices from the start of the query's document; -1: unused.
      segment_ids: int32 [T].
      config: the configuration of the selection.
      max_points: a longer sequence is subsampled to at most this many queries and keys.

    Returns:
      uint8 [queries, keys]: 0 not selected, 1 by score, 2 forced as a first block, 3 forced as a
      last block.
    """
    length = len(segment_ids)
    position = np.arange(0, length, -(-length // max_points))
    new = np.concatenate([[True], np.diff(segment_ids) != 0])
    start = np.maximum.accumulate(np.where(new, np.arange(length), 0))[position]
    query_start, key_start = start[:, None], start[None, :]
    query, key = position[:, None], position[None, :]
    # The blocks of query and key, counted from the start of the query's document.
    own = (query - query_start) // config.block_size
    block = (key - query_start) // config.block_size
    hit = np.zeros(block.shape, bool)
    for slot in selected[position].T:
        hit |= block == slot[:, None]
    document = (segment_ids[position] != 0)[:, None] & (query_start == key_start)
    image = np.ones(block.shape, np.uint8)
    image[block > own - config.local_blocks] = 3
    image[block < config.init_blocks] = 2
    return image * (hit & document & (key <= query))
