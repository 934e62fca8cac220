"""Pictures of a run: its losses, and the blocks that queries chose."""

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
# The training loss is drawn as a running mean, with the single steps pale behind it.
_SMOOTHING_STEPS = 20
_SMOOTHING_SHARE = 0.05  # of the run at most, so that the mean of a short run does not lag behind

# At most so many panels and so many points a side: pictures of long rows stay readable and small.
_MAX_LAYERS = 4
_MAX_HEADS = 4
_MAX_POINTS = 1024

_CHOICES = ("chosen by score", "forced: first blocks", "forced: last blocks")
_COLOURS = ("white", "tab:blue", "tab:orange", "silver")


def plot_losses(path: Path, runs: Mapping[str, Iterable[Row]], *, unigram_loss: float) -> None:
    """Draws training and held-out losses of one run or more.

    Args:
      path: PNG file to write.
      runs: name of each run, and its rows as `read_metrics` gives them.
      unigram_loss: held-out loss of the unigram model, nats per byte.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, rows) in enumerate(runs.items()):
        rows = list(rows)
        colour = f"C{number}"
        steps, losses = curve(rows, "loss")
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _running_mean(losses), color=colour, label=f"{name}, training")
        steps, losses = curve(rows, "held_out_loss")
        label = f"{name}, held out ({losses[-1]:.3f} at the end)" if losses else f"{name}, held out"
        axes.plot(steps, losses, "o--", color=colour, markersize=4, label=label)
    label = f"unigram byte model, held out ({unigram_loss:.3f})"
    axes.axhline(unigram_loss, color="black", linestyle=":", label=label)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per byte)")
    axes.set_title("Byte-level language model: next-byte loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    with naming(path):
        figure.savefig(path, dpi=_DPI)


def _running_mean(values: list[float]) -> np.ndarray:
    """Mean of the last values, of fewer at the start."""
    size = max(1, min(_SMOOTHING_STEPS, int(len(values) * _SMOOTHING_SHARE)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - size, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_blocks(
    path: Path, block_indices: np.ndarray, segment_ids: np.ndarray, config: NSAConfig
) -> None:
    """Draws which blocks the queries of one row chose, a panel for each layer and KV head.

    Blocks count from the start of each query's own document; they are drawn where they are in
    the row.

    Args:
      path: PNG file to write.
      block_indices: int32 [L, T, K, topk] of one row, -1 in unused slots.
      segment_ids: int32 [T] of that row.
      config: the sizes that made the selection.
    """
    layers = _evenly(block_indices.shape[0], _MAX_LAYERS)
    heads = _evenly(block_indices.shape[2], _MAX_HEADS)
    figure = Figure(figsize=(3.4 * len(heads) + 1.2, 3.3 * len(layers) + 1.2), layout="constrained")
    grid = figure.subplots(len(layers), len(heads), sharex=True, sharey=True, squeeze=False)
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            axes = grid[row, column]
            _draw_choices(axes, block_indices[layer, :, head], segment_ids, config)
            axes.set_title(f"layer {layer}, KV head {head}", fontsize=10)
            if row == len(layers) - 1:
                axes.set_xlabel("key's position in the row (bytes)")
    figure.supylabel("query's position in the row (bytes)")
    blocks = f"blocks of {config.block_size} bytes, at most {config.topk} a query"
    figure.suptitle(f"Blocks that each query chose ({blocks})\nlines: document boundaries")
    patches = [
        Patch(facecolor=colour, label=name)
        for name, colour in zip(_CHOICES, _COLOURS[1:], strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    with naming(path):
        figure.savefig(path, dpi=_DPI)


def _evenly(count: int, most: int) -> list[int]:
    """Up to `most` numbers below `count`, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _draw_choices(axes: Axes, chosen: np.ndarray, segment_ids: np.ndarray, config: NSAConfig):
    length = len(segment_ids)
    axes.imshow(
        choice_image(chosen, segment_ids, config, max_points=_MAX_POINTS),
        cmap=ListedColormap(_COLOURS),
        vmin=0,
        vmax=len(_COLOURS) - 1,
        interpolation="nearest",
        extent=(0, length, length, 0),
    )
    for boundary in (np.flatnonzero(np.diff(segment_ids)) + 1).tolist():
        axes.axhline(boundary, color="black", linewidth=0.6)
        axes.axvline(boundary, color="black", linewidth=0.6)


def choice_image(
    chosen: np.ndarray, segment_ids: np.ndarray, config: NSAConfig, *, max_points: int
) -> np.ndarray:
    """Which keys each query's chosen blocks cover, and why.

    Args:
      chosen: int32 [T, topk], blocks counted from the start of the query's document; -1: none.
      segment_ids: int32 [T].
      config: the sizes that made the selection.
      max_points: longer rows are sampled down to at most so many queries and keys.

    Returns:
      uint8 [queries, keys]: 0 not chosen, 1 by score, 2 a first block, 3 a last block.
    """
    length = len(segment_ids)
    position = np.arange(0, length, -(-length // max_points))
    new = np.concatenate([[True], np.diff(segment_ids) != 0])
    start = np.maximum.accumulate(np.where(new, np.arange(length), 0))[position]
    query_start, key_start = start[:, None], start[None, :]
    query, key = position[:, None], position[None, :]
    # Blocks of query and key, counted from the query's document.
    own = (query - query_start) // config.block_size
    block = (key - query_start) // config.block_size
    hit = np.zeros(block.shape, bool)
    for slot in chosen[position].T:
        hit |= block == slot[:, None]
    document = (segment_ids[position] != 0)[:, None] & (query_start == key_start)
    image = np.ones(block.shape, np.uint8)
    image[block > own - config.local_blocks] = 3
    image[block < config.init_blocks] = 2
    return image * (hit & document & (key <= query))
