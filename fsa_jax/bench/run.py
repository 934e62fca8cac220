"""`fsa-jax bench`: runs suites, checks and times every case, and writes JSON after each case.

A case that fails records the reason, and the other cases go on. A wrong result ends the run, so
that no wrong result is ever timed.
"""

import dataclasses
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

from fsa_jax.bench.config import BenchConfig, Run
from fsa_jax.bench.measure import peers, roofline, timing
from fsa_jax.bench.suites import attention, decode, models
from fsa_jax.messages import naming
from fsa_jax.pallas import support

SUITES = ("kernels", "operator", "training", "prefill", "decode")


def bench(config: BenchConfig) -> list[Path]:
    """Runs the suites and returns the paths of the files written.

    Raises:
      WrongResult: a result differs from the definition.
      ValueError: a setting is invalid.
    """
    methods = peers.wanted(config.peer_path)
    if methods:  # torch needs memory too
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    run = Run(config, interpret=support.device_reason() is not None, peers=methods)
    config.out.mkdir(parents=True, exist_ok=True)
    if not run.interpret:
        try:
            run.ceilings = roofline.measure(config.rounds)
        except Exception as error:  # the report then has no floors
            timing.say(f"no ceilings: {timing.describe_error(error)}")
    chosen = {"quick": ("operator", "kernels"), "all": SUITES}.get(config.suite, (config.suite,))
    paths = []
    for number, name in enumerate(chosen, start=1):
        run.share = number / len(chosen)
        paths.append(_suite(run, name))
    return paths


def _suite(run: Run, name: str) -> Path:
    config = run.config
    path = config.out / f"{name}.json"
    machine = timing.describe_machine()
    peer = config.peer_path.name if config.peer_path else None
    paths = {"out": config.out.name, "report": None, "peer_path": peer}
    results: dict[str, Any] = {"what": "fsa-jax bench", "suite": name} | machine
    results |= {
        "measurement": not run.interpret,
        "complete": False,
        "arguments": dataclasses.asdict(config) | paths,
        "ceilings": run.ceilings,
        "rows": [],
    }
    rows = {
        "kernels": attention.kernels,
        "operator": attention.operator,
        "training": functools.partial(models.rows, "training"),
        "prefill": functools.partial(models.rows, "prefill"),
        "decode": decode.rows,
    }[name]
    for row in rows(run):
        results["rows"].append(row)
        results["seconds"] = round(time.perf_counter() - run.began, 1)
        _write(path, results)
    results["complete"] = not any("time budget" in row.get("error", "") for row in results["rows"])
    _write(path, results)
    return path


def _write(path: Path, results: dict[str, Any]) -> None:
    with naming(path):
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
