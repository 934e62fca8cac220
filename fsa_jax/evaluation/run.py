"""`fsa-jax eval`: evaluates models on the very same inputs, and writes the result."""

import dataclasses
import datetime
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fsa_jax.evaluation import folder as files
from fsa_jax.evaluation.answers import answer
from fsa_jax.evaluation.config import EvalConfig
from fsa_jax.evaluation.losses import losses_by_bucket, token_losses
from fsa_jax.evaluation.models import OpenedModel, open_model
from fsa_jax.evaluation.tasks import Sample, Samples
from fsa_jax.evaluation.text import Sequences, Text, pack, read_text
from fsa_jax.messages import say
from fsa_jax.training.folder import locked
from fsa_jax.versions import commit, versions

RETRIEVAL = ("recall", "needle")
#: What a value is guessed right by chance, per digit: the context says that it has digits.
_DIGITS = 10


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What `evaluate` returns.

    Attributes:
      values: the result, as in `evaluation.json`; docs/evaluation.md describes it.
      files: the files that were written.
    """

    values: dict[str, Any]
    files: tuple[Path, ...]


def evaluate(config: EvalConfig) -> EvalResult:
    """Evaluates models, and writes the result to `config.folder`.

    Everything that can be wrong with the arguments is found before anything is computed, and an
    evaluation that is replaced stays until the new one is complete.

    Raises:
      ValueError: a checkpoint, the text, a length or the folder breaks its rule.
      FloatingPointError: a model gives a loss or a probability that is not finite.
      OSError: a file cannot be read or written.
    """
    files.check_writable(config.folder, overwrite=config.overwrite)
    models = [open_model(path) for path in config.checkpoints]
    _check_comparable(models)
    config = _with_lengths(config, models[0])
    text = read_text(models, config.text, models[0].tokenizer, column=config.text_column)
    sequences = None
    if "loss" in config.tasks:
        assert config.seq_len is not None
        sequences = pack(text, seq_len=config.seq_len, limit=config.sequences)
    maker = Samples(text, seed=config.seed, digits=config.answer_digits)
    samples = {task: _samples(config, maker, task) for task in RETRIEVAL if task in config.tasks}
    config.folder.mkdir(parents=True, exist_ok=True)
    with locked(config.folder):
        # Another evaluation may have ended since the first look.
        files.check_writable(config.folder, overwrite=config.overwrite)
        values = _evaluate(config, models, text, sequences, samples)
        return EvalResult(values, tuple(files.write(config.folder, values)))


#: The samples of each length and depth.
type Grid = dict[tuple[int, float], list[Sample]]


def _evaluate(
    config: EvalConfig,
    models: Sequence[OpenedModel],
    text: Text,
    sequences: Sequences | None,
    samples: dict[str, Grid],
) -> dict[str, Any]:
    labels = _labels(models)
    values: dict[str, Any] = {
        "what": files.WHAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "devices": [str(device) for device in jax.devices()],
        "arguments": config.to_json(),
        "text": text.describe(),
        "models": [
            {"label": label} | model.describe() for label, model in zip(labels, models, strict=True)
        ],
    }
    if sequences is not None:
        values["loss"] = _loss(config, models, labels, text, sequences)
    for task, grid in samples.items():
        values[task] = _retrieval(config, models, labels, task, grid)
    return values


def _check_comparable(models: Sequence[OpenedModel]) -> None:
    first = models[0]
    for other in models[1:]:
        if first.tokenizer.fingerprint != other.tokenizer.fingerprint:
            kinds = [f"{str(x.path)!r} with {x.tokenizer.vocab_size}" for x in (first, other)]
            raise ValueError(
                "checkpoints must have the same tokenizer, with the same begin and end tokens, to "
                f"be compared, got {kinds[0]} tokens and {kinds[1]} of another one"
            )


def _with_lengths(config: EvalConfig, first: OpenedModel) -> EvalConfig:
    """The configuration with the lengths that it leaves to the first model."""
    seq_len = config.seq_len or first.seq_len
    if seq_len is None:
        raise ValueError(
            f"seq_len must be given for {str(first.path)!r}, whose training sequences are not known"
        )
    lengths = config.lengths or tuple(sorted({max(seq_len // part, 1) for part in (4, 2, 1)}))
    return dataclasses.replace(config, seq_len=seq_len, lengths=lengths)


def _labels(models: Sequence[OpenedModel]) -> list[str]:
    """A name for each model: the last part of its path or, where that is not unique, a number."""
    names = [model.path.resolve().name for model in models]
    return [
        name if names.count(name) == 1 else f"{name} ({number})"
        for number, name in enumerate(names, start=1)
    ]


def _loss(
    config: EvalConfig,
    models: Sequence[OpenedModel],
    labels: Sequence[str],
    text: Text,
    sequences: Sequences,
) -> dict[str, Any]:
    losses = []
    for label, model in zip(labels, models, strict=True):
        say(f"{label}: loss of {len(sequences.tokens)} sequences of {config.seq_len} tokens")
        sizes = {"batch_size": config.batch_size, "chunk_size": config.chunk_size}
        losses.append(token_losses(model.model, sequences, **sizes))
    *buckets, whole = losses_by_bucket(losses, sequences, text.tokenizer.num_bytes)
    return {"sequences": len(sequences.tokens), "buckets": buckets, "all": whole}


def _samples(config: EvalConfig, maker: Samples, task: str) -> Grid:
    return {
        (length, depth): [maker.make(task, length, depth, i) for i in range(config.samples)]
        for length in config.lengths
        for depth in config.depths
    }


def _retrieval(
    config: EvalConfig,
    models: Sequence[OpenedModel],
    labels: Sequence[str],
    task: str,
    grid: Grid,
) -> dict[str, Any]:
    found = []
    for label, model in zip(labels, models, strict=True):
        scores = {}
        for length in config.lengths:
            say(f"{label}: {task} at {length} tokens")
            # The samples of all depths are batched together: they have the same length.
            chosen = [sample for depth in config.depths for sample in grid[length, depth]]
            pair = answer(model.model, chosen, batch_size=config.batch_size)
            parts = (np.split(x, len(config.depths)) for x in pair)
            for depth, *both in zip(config.depths, *parts, strict=True):
                scores[length, depth] = both
        found.append(scores)
    cells = []
    for (length, depth), samples in grid.items():
        mine = [scores[length, depth] for scores in found]
        cells.append(
            {
                "length": length,
                "depth": depth,
                "samples": len(samples),
                "models": [_cell(*scores, *mine[0], first=scores is mine[0]) for scores in mine],
            }
        )
    every = [[np.concatenate([s[place][i] for place in grid]) for i in range(2)] for s in found]
    whole = [_cell(*x, *every[0], first=x is every[0], single=False) for x in every]
    return {
        "chance": {
            "exact_match": float(_DIGITS**-config.answer_digits),
            "log_probability": -config.answer_digits * math.log(_DIGITS),
        },
        "cells": cells,
        "all": {"samples": len(every[0][0]), "models": whole},
    }


def _cell(
    log_probability: np.ndarray,
    right: np.ndarray,
    first_log_probability: np.ndarray,
    first_right: np.ndarray,
    *,
    first: bool,
    single: bool = True,
) -> dict[str, Any]:
    """The means of a model over some samples, and their differences from the first model."""
    values: dict[str, Any] = {}
    for name, mine, other in (
        ("exact_match", right.astype(np.float64), first_right.astype(np.float64)),
        ("log_probability", log_probability, first_log_probability),
    ):
        values |= _mean(name, mine)
        if not first:
            values |= _mean(f"{name}_difference", mine - other)
    if single:
        values["each"] = {
            "exact_match": [bool(x) for x in right],
            "log_probability": [float(x) for x in log_probability],
        }
    return values


def _mean(name: str, values: np.ndarray) -> dict[str, float | None]:
    """The mean of values, and its standard error, which a single value does not have."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {name: float(values.mean()), f"{name}_standard_error": error}
