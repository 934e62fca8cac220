"""Trains the default model with sparse and with full attention, over several seeds, and compares.

    uv run python benchmarks/nsa_vs_full.py            # trains 3 seeds of each, minutes per run
    uv run python benchmarks/nsa_vs_full.py --report   # only redraws from the committed JSON

Writes benchmarks/results/<platform>/nsa_vs_full.json (every held-out loss, every training loss,
versions, commit, date) and docs/images/nsa_vs_full.png, which is drawn from that JSON alone.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import subprocess
import tempfile
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from fsa_jax.environment import versions
from fsa_jax.training import PRESETS, read_metrics, train
from fsa_jax.training.config import config_to_json
from fsa_jax.training.metrics import curve

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "nsa_vs_full.png"
ATTENTIONS = ("nsa", "full")


def measure(seeds: int, steps: int | None) -> dict:
    """Trains every seed with both attentions; returns what the report needs, and every number."""
    config = PRESETS["tiny"]
    if steps:
        config = dataclasses.replace(config, steps=steps, decay_steps=steps)
    runs = []
    for seed in range(seeds):
        for attention in ATTENTIONS:
            with tempfile.TemporaryDirectory() as folder:
                run = dataclasses.replace(
                    config,
                    seed=seed,
                    out=Path(folder),
                    model=dataclasses.replace(config.model, attention=attention),
                )
                result = train(run)
                rows = read_metrics(Path(folder) / "metrics.jsonl")
                description = json.loads((Path(folder) / "run.json").read_text())
            runs.append(
                {
                    "attention": attention,
                    "seed": seed,
                    "parameters": description["parameters"],
                    "unigram_loss": result.unigram_loss,
                    "held_out_loss": curve(rows, "held_out_loss"),
                    "loss": [round(value, 4) for value in curve(rows, "loss")[1]],
                    "tokens_per_s": float(np.median(curve(rows, "tokens_per_s")[1])),
                }
            )
            print(attention, seed, result.held_out_loss, flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    settings = config_to_json(config)
    for name in ("data", "out", "seed"):
        del settings[name]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "versions": versions(),
        "platform": jax.devices()[0].platform,
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
        "data": description["data"] | {"source": "the Python standard library"},
        "config": settings,
        "runs": runs,
    }


def summary(results: dict) -> dict:
    """Mean and spread of the last held-out losses, and the gap in percent."""
    last = {
        attention: [
            run["held_out_loss"][1][-1] for run in results["runs"] if run["attention"] == attention
        ]
        for attention in ATTENTIONS
    }
    nsa, full = (np.asarray(last[attention]) for attention in ATTENTIONS)
    return {
        "held_out_loss": last,
        "mean": {name: float(np.mean(values)) for name, values in last.items()},
        "gap_percent_by_seed": (100 * (nsa / full - 1)).tolist(),
        "gap_percent": float(100 * (nsa.mean() / full.mean() - 1)),
        "unigram_loss": results["runs"][0]["unigram_loss"],
    }


def draw(results: dict) -> None:
    """Held-out losses of all runs: sparse and full attention in one plot."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    found = summary(results)
    for number, attention in enumerate(ATTENTIONS):
        curves = [run["held_out_loss"] for run in results["runs"] if run["attention"] == attention]
        for steps, losses in curves:
            axes.plot(steps, losses, color=f"C{number}", alpha=0.35, linewidth=0.9)
        mean = np.mean([losses for _, losses in curves], axis=0)
        name = {"nsa": "native sparse attention", "full": "full attention"}[attention]
        label = f"{name}: {found['mean'][attention]:.3f} at the end, mean of {len(curves)} seeds"
        axes.plot(curves[0][0], mean, "o-", color=f"C{number}", markersize=4, label=label)
    unigram = found["unigram_loss"]
    axes.axhline(unigram, color="black", linestyle=":", label=f"unigram byte model: {unigram:.3f}")
    axes.set_xlabel("training step")
    axes.set_ylabel("held-out loss (nats per byte)")
    axes.set_title("The same model with sparse and with full attention")
    axes.grid(alpha=0.3)
    axes.legend()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    """Measures (unless --report), writes the JSON, draws, and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--report", action="store_true", help="redraw from the JSON")
    flags = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / jax.devices()[0].platform / "nsa_vs_full.json"
    if not flags.report:
        results = measure(flags.seeds, flags.steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = json.loads(path.read_text(encoding="utf-8"))
    draw(results)
    print(json.dumps(summary(results), indent=1))


if __name__ == "__main__":
    main()
