"""The training job: data in; metrics, checkpoints, pictures and a held-out loss out."""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from fsa_jax.environment import versions
from fsa_jax.training.checkpoint import (
    Checkpoints,
    RunPosition,
    has_checkpoint,
    remove_checkpoints,
)
from fsa_jax.training.config import TrainConfig, check_resumable, config_to_json
from fsa_jax.training.data import (
    Corpus,
    TrainingBatches,
    held_out_batches,
    load_corpus,
    row_of_documents,
    unigram_loss,
)
from fsa_jax.training.mesh import (
    Placement,
    agreed,
    check_placement,
    is_leader,
    join_processes,
    noticing_lost_processes,
    wait_for_all,
)
from fsa_jax.training.metrics import MetricsLog, Row, curve, read_metrics
from fsa_jax.training.plots import plot_blocks, plot_losses
from fsa_jax.training.step import (
    StepMetrics,
    abstract_model,
    init_model,
    init_state,
    make_eval_step,
    make_train_step,
    state_shardings,
)
from fsa_jax.transformer import Transformer

# Losses are fetched from the device once in so many steps: it never waits for the host.
_FETCH_EVERY = 10

# Steps between two lines of text where there is no progress bar.
_LINE_EVERY = 50


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
      step: the last step.
      held_out_loss: nats per byte on the held-out rows.
      unigram_loss: that of a unigram byte model fitted on the training documents.
      files: what was written: files, and the folder of the checkpoints.
    """

    step: int
    held_out_loss: float
    unigram_loss: float
    files: tuple[Path, ...]


def train(config: TrainConfig) -> TrainResult:
    """Trains a byte-level language model and writes everything to `config.run_folder`.

    Args:
      config: the run; start from one of `PRESETS` with `dataclasses.replace`.

    Returns:
      The last losses and the paths of what was written.

    Raises:
      ValueError: the data cannot be read, the folder holds a run already, or there is no
        checkpoint to resume from, or one of another run.
      FloatingPointError: the loss is not finite any more.
      ProcessLost: another process of the run has ended.
    """
    if config.distributed:
        join_processes()
    folder = config.run_folder
    if config.resume and not has_checkpoint(folder):
        raise ValueError(f"resume must find a checkpoint in out, got {str(folder)!r} without one")
    if not config.resume and not config.overwrite and has_checkpoint(folder):
        raise ValueError(
            f"out must not hold a run already, got {str(folder)!r}: set resume to go on with it, "
            "overwrite to replace it, or out to another folder"
        )
    placement = Placement.build(config.mesh, fsdp=config.fsdp)
    sizes = {"batch_size": config.batch_size, "row_length": config.row_length}
    check_placement(placement, config.model, **sizes)
    corpus = load_corpus(config.data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be made, got {str(folder)!r}: {error.strerror}"
        ) from error
    wait_for_all("checked")
    if config.overwrite and is_leader():
        remove_checkpoints(folder)
    wait_for_all("removed")
    with noticing_lost_processes(), Checkpoints(folder, create=True) as checkpoints:
        return _Run(config, corpus, checkpoints, placement).finish()


def load_model(run_folder: Path, **changes: Any) -> tuple[Transformer, TrainConfig]:
    """Reads the model and the configuration of a run's last checkpoint.

    Args:
      run_folder: the folder that `train` wrote to.
      **changes: fields of the model's configuration to change, none that its parameters depend on.

    Raises:
      ValueError: there is no checkpoint, or it cannot be read.
    """
    if not has_checkpoint(run_folder):
        raise ValueError(
            "checkpoint must be the folder of a run with a checkpoint in it, got "
            f"{str(run_folder)!r}"
        )
    with Checkpoints(run_folder) as checkpoints:
        step = checkpoints.last_step()
        config = checkpoints.read_position(step).config
        graphdef, template = abstract_model(dataclasses.replace(config.model, **changes))
        return nnx.merge(graphdef, checkpoints.read_params(step, template)), config


class _Run:
    """One call of `train`, from the first batch or a checkpoint to the last step."""

    def __init__(
        self, config: TrainConfig, corpus: Corpus, checkpoints: Checkpoints, placement: Placement
    ):
        self.config = config
        self.placement = placement
        self.corpus = corpus
        self.checkpoints = checkpoints
        self.folder = config.run_folder
        # What can be wrong comes before what takes long.
        position = self._checked_position() if config.resume else None
        self.batches = TrainingBatches(
            corpus.train,
            row_length=config.row_length,
            batch_size=config.batch_size,
            seed=config.seed,
            rows=placement.own_rows(config.batch_size),
        )
        self.held_out = held_out_batches(
            corpus.held_out,
            row_length=config.row_length,
            batch_size=config.batch_size,
            rows=config.eval_rows,
        )
        self.unigram_loss = unigram_loss(corpus.train, self.held_out)
        shardings = state_shardings(config, placement)
        model = placement.model(config.model)
        self.graphdef, params = init_model(model, config.seed, shardings.params)
        self.num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
        start = functools.partial(init_state, config=config)
        self.state = jax.jit(start, out_shardings=shardings)(params)
        self.first_step = 0
        if position is not None:
            self.first_step = checkpoints.last_step()
            self.state = checkpoints.read_state(self.first_step, self.state)
            self.batches.set_state(position.batches)
        shape = (config.batch_size, config.row_length)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placement.rows)
        # Compiled ahead, so that tokens per second measure training alone.
        step = make_train_step(self.graphdef, config, placement)
        lowered = step.lower(self.state, ids, ids)
        # Nothing that the caller could have got wrong is left: a message may come before the wait.
        size = sum(map(len, corpus.train))
        if is_leader():
            print(
                f"{self.num_params} parameters; {size} bytes from {corpus.source}; compiling",
                file=sys.stderr,
                flush=True,
            )
        self.train_step = lowered.compile()
        evaluate = make_eval_step(self.graphdef, placement)
        self.eval_step = evaluate.lower(self.state.params, ids, ids).compile()

    def _checked_position(self) -> RunPosition:
        """Reads where the run stopped, and raises ValueError unless it can go on from there."""
        step = self.checkpoints.last_step()
        position = self.checkpoints.read_position(step)
        check_resumable(position.config, self.config)
        if position.fingerprint != self.corpus.fingerprint:
            raise ValueError(
                "data must be the data of the checkpoint, got other bytes in "
                f"{self.corpus.source} (checkpoint: {_source(position.config.data)})"
            )
        if step > self.config.steps:
            raise ValueError(
                f"steps must be at least the {step} of the checkpoint, got {self.config.steps}"
            )
        return position

    def finish(self) -> TrainResult:
        """Trains to the last step and writes everything."""
        metrics_file = self.folder / "metrics.jsonl"
        self._write_description({})
        evaluated = self.config.steps in curve(read_metrics(metrics_file), "held_out_loss")[0]
        evaluated = agreed(evaluated and self.first_step == self.config.steps)
        with (
            MetricsLog(metrics_file, last_step=self.first_step, write=is_leader()) as log,
            _Progress(self.first_step, self.config.steps, show=is_leader()) as progress,
        ):
            self._train(log, progress)
            if not evaluated and self.first_step == self.config.steps:
                self._evaluate(self.config.steps, log, progress)
        wait_for_all("trained")
        rows = read_metrics(metrics_file)
        held_out_loss = curve(rows, "held_out_loss")[1][-1]
        self._write_description({"step": self.config.steps, "held_out_loss": held_out_loss})
        files = [metrics_file, self.folder / "run.json", self.folder / "loss.png"]
        name = f"attention={self.config.model.attention}"
        if is_leader():
            plot_losses(files[-1], {name: rows}, unigram_loss=self.unigram_loss)
        if self.config.model.attention == "nsa":
            files.append(self.folder / "blocks.png")
            self._plot_blocks(files[-1])
        return TrainResult(
            step=self.config.steps,
            held_out_loss=held_out_loss,
            unigram_loss=self.unigram_loss,
            files=(*files, self.folder / self.checkpoints.folder.name),
        )

    def _train(self, log: MetricsLog, progress: "_Progress") -> None:
        config = self.config
        pending: list[tuple[int, StepMetrics]] = []
        since = time.perf_counter()
        for step in range(self.first_step + 1, config.steps + 1):
            batch = next(self.batches)
            first, _ = self.placement.own_rows(config.batch_size)
            arrays = (
                self.placement.place(x, first, config.batch_size)
                for x in (batch.tokens, batch.segment_ids)
            )
            self.state, metrics = self.train_step(self.state, *arrays)
            pending.append((step, metrics))
            last = step == config.steps
            evaluate = last or step % config.eval_every == 0
            save = last or step % config.checkpoint_every == 0
            if evaluate or save or len(pending) == _FETCH_EVERY:
                rows = self._fetch(pending, since)
                log.write(rows)
                progress.steps(rows)
                pending = []
                since = time.perf_counter()
            if evaluate:
                self._evaluate(step, log, progress)
            if save:
                self._save(step)
            if evaluate or save:
                since = time.perf_counter()

    def _fetch(self, pending: Sequence[tuple[int, StepMetrics]], since: float) -> list[Row]:
        """Waits for the pending steps and makes their rows."""
        fetched = jax.device_get([metrics for _, metrics in pending])
        seconds = time.perf_counter() - since
        tokens = len(pending) * self.config.batch_size * self.config.row_length
        rows = [
            {
                "step": step,
                "loss": float(metrics.loss),
                "tokens_per_s": round(tokens / seconds, 1),
                "learning_rate": float(metrics.learning_rate),
                "grad_norm": float(metrics.grad_norm),
            }
            for (step, _), metrics in zip(pending, fetched, strict=True)
        ]
        for row in rows:
            if not np.isfinite([row["loss"], row["grad_norm"]]).all():
                raise FloatingPointError(
                    f"loss and gradient must be finite, got {row['loss']} and {row['grad_norm']} "
                    f"at step {row['step']}: lower learning_rate={self.config.learning_rate}"
                )
        return rows

    def _evaluate(self, step: int, log: MetricsLog, progress: "_Progress") -> None:
        sums = [
            self.eval_step(
                self.state.params, *map(self.placement.place, (batch.tokens, batch.segment_ids))
            )
            for batch in self.held_out
        ]
        total, count = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        row = {"step": step, "held_out_loss": total / count, "held_out_bytes": int(count)}
        log.write([row])
        progress.held_out(row)

    def _save(self, step: int) -> None:
        position = RunPosition(
            config=self.config,
            fingerprint=self.corpus.fingerprint,
            batches=self.batches.get_state(),
        )
        self.checkpoints.save(step, self.state, position)

    def _write_description(self, result: Row) -> None:
        if not is_leader():
            return
        description = {
            "config": config_to_json(self.config),
            "versions": versions(),
            "devices": [str(device) for device in jax.devices()],
            "parameters": self.num_params,
            "data": {
                "source": self.corpus.source,
                "fingerprint": self.corpus.fingerprint,
                "train_documents": len(self.corpus.train),
                "train_bytes": sum(map(len, self.corpus.train)),
                "held_out_documents": len(self.corpus.held_out),
                "held_out_bytes": sum(map(len, self.corpus.held_out)),
            },
            "unigram_loss": self.unigram_loss,
            "result": result,
        }
        text = json.dumps(description, indent=2) + "\n"
        (self.folder / "run.json").write_text(text, encoding="utf-8")

    def _plot_blocks(self, path: Path) -> None:
        batch = row_of_documents(self.corpus.held_out, row_length=self.config.row_length)

        graphdef = abstract_model(self.config.model)[0]  # its tokens are on one device

        @functools.partial(jax.jit, out_shardings=self.placement.replicated)
        def selected(params, tokens, segment_ids):
            return nnx.merge(graphdef, params).selected_blocks(tokens, segment_ids)

        blocks = selected(self.state.params, batch.tokens, batch.segment_ids)
        if not is_leader():
            return
        plot_blocks(path, np.asarray(blocks)[:, 0], batch.segment_ids[0], self.config.model.nsa)


def _source(data: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in data) or "the Python standard library"


class _Progress:
    """A bar on a terminal; elsewhere a line of text now and then."""

    def __init__(self, first_step: int, steps: int, *, show: bool):
        self._steps = steps
        self._show = show
        self._bar = tqdm(
            initial=first_step,
            total=steps,
            unit="step",
            disable=not show or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._shown: dict[str, Any] = {}

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def steps(self, rows: Sequence[Row]) -> None:
        """Shows finished steps."""
        row = rows[-1]
        self._shown |= {"loss": f"{row['loss']:.3f}", "tokens/s": f"{row['tokens_per_s']:.0f}"}
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(len(rows))
        if self._bar.disable and any(row["step"] % _LINE_EVERY == 0 for row in rows):
            self._line(row["step"], self._shown)

    def held_out(self, row: Row) -> None:
        """Shows a held-out loss."""
        held_out = {"held-out loss": f"{row['held_out_loss']:.3f}"}
        self._shown |= held_out
        self._bar.set_postfix(self._shown)
        if self._bar.disable:
            self._line(row["step"], held_out)

    def _line(self, step: int, values: Row) -> None:
        if not self._show:
            return
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        print(f"step {step}/{self._steps}: {shown}", file=sys.stderr, flush=True)
