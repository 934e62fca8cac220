"""Compares the default model with sparse and with full attention, trained with several seeds.

    uv run python benchmarks/nsa_vs_full.py            # 3 seeds of each; a run takes minutes
    uv run python benchmarks/nsa_vs_full.py --jobs 4   # four runs at a time
    uv run python benchmarks/nsa_vs_full.py --report   # only redraws the plot from the JSON

It writes benchmarks/results/<platform>/nsa_vs_full.json (all validation and training losses,
versions, commit, date) and docs/images/nsa_vs_full.png, which is drawn from that JSON file alone.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from fsa_jax.training import PRESETS, TrainConfig, read_metrics, train
from fsa_jax.training.config import config_to_json
from fsa_jax.training.metrics import curve
from fsa_jax.training.renamed import rename_flags, with_new_names
from fsa_jax.versions import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "nsa_vs_full.png"
ATTENTIONS = ("nsa", "full")


def train_one(config: TrainConfig) -> dict:
    """Trains one run; returns its losses and a description of its data."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(dataclasses.replace(config, out=Path(folder)))
        rows = read_metrics(Path(folder) / "metrics.jsonl")
        description = json.loads((Path(folder) / "run.json").read_text())
    print(config.model.attention, config.seed, result.val_loss, flush=True)
    # File names are enough, without paths of this machine: the fingerprint identifies the bytes.
    source = ", ".join(path.name for path in config.text) or "the Python standard library"
    return {
        "attention": config.model.attention,
        "seed": config.seed,
        "parameters": description["parameters"],
        "data": description["data"] | {"source": source},
        "unigram_loss": result.unigram_loss,
        "val_loss": curve(rows, "val_loss"),
        "loss": [round(value, 4) for value in curve(rows, "loss")[1]],
    }


def measure(seeds: int, jobs: int, text: tuple[Path, ...]) -> dict:
    """Trains every seed with both kinds of attention; returns the contents of the JSON file."""
    preset = dataclasses.replace(PRESETS["tiny"], text=text)
    configs = [
        dataclasses.replace(
            preset, seed=seed, model=dataclasses.replace(preset.model, attention=attention)
        )
        for seed in range(seeds)
        for attention in ATTENTIONS
    ]
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        runs = list(pool.map(train_one, configs))
    data_of_runs = [run.pop("data") for run in runs]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    settings = config_to_json(preset)
    for name in ("text", "out", "seed"):
        del settings[name]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "data": data_of_runs[0],
        "config": settings,
        "runs": runs,
    }


def load(path: Path) -> dict:
    """Reads the results from a JSON file, in which `val_loss` may have its old name."""
    results = json.loads(path.read_text(encoding="utf-8"))
    results["runs"] = [
        with_new_names(run, {"held_out_loss": "val_loss"}) for run in results["runs"]
    ]
    return results


def summary(results: dict) -> dict:
    """The final validation losses, their means, and the excess of sparse attention in percent."""
    final = {
        attention: [
            run["val_loss"][1][-1] for run in results["runs"] if run["attention"] == attention
        ]
        for attention in ATTENTIONS
    }
    nsa, full = (np.asarray(final[attention]) for attention in ATTENTIONS)
    return {
        "val_loss": final,
        "mean": {name: float(np.mean(values)) for name, values in final.items()},
        "gap_percent_by_seed": (100 * (nsa / full - 1)).tolist(),
        "gap_percent": float(100 * (nsa.mean() / full.mean() - 1)),
        "unigram_loss": results["runs"][0]["unigram_loss"],
    }


def draw(results: dict) -> None:
    """Plots the validation losses of all runs, with sparse and with full attention."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    found = summary(results)
    for number, attention in enumerate(ATTENTIONS):
        curves = [run["val_loss"] for run in results["runs"] if run["attention"] == attention]
        for steps, losses in curves:
            axes.plot(steps, losses, color=f"C{number}", alpha=0.35, linewidth=0.9)
        mean = np.mean([losses for _, losses in curves], axis=0)
        name = {"nsa": "native sparse attention", "full": "full attention"}[attention]
        label = f"{name}: {found['mean'][attention]:.3f} at the end, mean of {len(curves)} seeds"
        axes.plot(curves[0][0], mean, "o-", color=f"C{number}", markersize=4, label=label)
    unigram = found["unigram_loss"]
    axes.axhline(unigram, color="black", linestyle=":", label=f"unigram byte model: {unigram:.3f}")
    axes.set_xlabel("training step")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.set_title("The same model with sparse and with full attention")
    axes.grid(alpha=0.3)
    axes.legend()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    """Trains and writes the JSON file unless --report is given; draws and prints a summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds per attention")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at the same time")
    parser.add_argument(
        "--text", "--data", type=Path, nargs="*", default=(), help="as of fsa-jax train"
    )
    parser.add_argument("--report", action="store_true", help="only redraw the plot from the JSON")
    flags = parser.parse_args(rename_flags(sys.argv[1:], {"data": "text"}))
    path = RESULTS / jax.devices()[0].platform / "nsa_vs_full.json"
    if not flags.report:
        results = measure(flags.seeds, flags.jobs, tuple(flags.text))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = load(path)
    draw(results)
    print(json.dumps(summary(results), indent=1))


if __name__ == "__main__":
    main()
