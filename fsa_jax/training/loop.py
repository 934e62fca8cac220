"""The training job: data in; metrics, checkpoints, pictures and a held-out loss out."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fsa_jax.messages import say
from fsa_jax.training import folder as files
from fsa_jax.training.checkpoint import Checkpoints, RunPosition
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
    on_leader,
    wait_for_all,
)
from fsa_jax.training.metrics import MetricsLog, Row, curve, read_metrics
from fsa_jax.training.plots import plot_blocks, plot_losses
from fsa_jax.training.progress import Progress
from fsa_jax.training.step import (
    StepMetrics,
    abstract_model,
    init_model,
    init_state,
    make_eval_step,
    make_train_step,
    state_shardings,
)
from fsa_jax.training.stopping import Stop, catching_signals
from fsa_jax.transformer import Transformer
from fsa_jax.versions import versions

# Losses are fetched from the device once in so many steps, so that it never waits for the host; or
# earlier where they take longer than this together: progress shows, and a run can be stopped.
_FETCH_EVERY = 10
_FETCH_SECONDS = 1.0


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
      ValueError: the data cannot be read, the folder holds a run already, or is in use, or there is
        no checkpoint to resume from, or one of another run.
      OSError: something cannot be written.
      FloatingPointError: the loss is not finite any more.
      ProcessLost: another process of the run has ended.
      RunStopped: a signal came (SIGINT, SIGTERM or SIGHUP), and the run has saved a checkpoint.
    """
    if config.distributed:
        join_processes()
    with catching_signals() as stop, noticing_lost_processes(), contextlib.ExitStack() as stack:
        stop.together = jax.process_count() > 1
        folder = config.run_folder
        check = functools.partial(
            files.check_startable, folder, resume=config.resume, overwrite=config.overwrite
        )
        on_leader(check)
        placement = Placement.build(config.mesh, fsdp=config.fsdp)
        sizes = {"batch_size": config.batch_size, "row_length": config.row_length}
        check_placement(placement, config.model, **sizes)
        corpus = load_corpus(config.data)
        on_leader(functools.partial(_make, folder))
        on_leader(lambda: stack.enter_context(files.locked(folder)))
        on_leader(check)  # again, now that no other run can come between
        run = _Run(config, corpus, placement, stop)
        if config.overwrite:
            on_leader(functools.partial(files.clear, folder))
        return run.finish()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"out must be a folder that can be made, got {str(folder)!r}: {error.strerror}"
        ) from error


def load_model(run_folder: Path, **changes: Any) -> tuple[Transformer, TrainConfig]:
    """Reads the model and the configuration of a run's last checkpoint.

    Args:
      run_folder: the folder that `train` wrote to.
      **changes: fields of the model's configuration to change, none that its parameters depend on.

    Raises:
      ValueError: there is no checkpoint, or it cannot be read.
    """
    if not files.has_checkpoint(run_folder):
        raise ValueError(
            "checkpoint must be the folder of a run with a checkpoint in it, got "
            f"{str(run_folder)!r}"
        )
    with Checkpoints(run_folder) as checkpoints:

        def read(step):
            config = checkpoints.read_position(step).config
            graphdef, template = abstract_model(dataclasses.replace(config.model, **changes))
            return nnx.merge(graphdef, checkpoints.read_params(step, template)), config

        return checkpoints.newest(read)[1]


class _Run:
    """One call of `train`, from the first batch or a checkpoint to the last step."""

    def __init__(self, config: TrainConfig, corpus: Corpus, placement: Placement, stop: Stop):
        self.placement = placement
        self.corpus = corpus
        self.folder = config.run_folder
        self.stop = stop
        # What can be wrong comes before what takes long.
        if config.resume:
            with Checkpoints(self.folder) as checkpoints:
                step, position = checkpoints.newest(checkpoints.read_position, quiet=True)
            if config.decay_steps is None:
                decay_steps = position.config.last_decay_step
                config = dataclasses.replace(config, decay_steps=decay_steps)
            self._check_resumable(config, step, position)
        # The file holds a number, so that a run that is made longer keeps its schedule.
        self.config = config = dataclasses.replace(config, decay_steps=config.last_decay_step)
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
        if config.resume:
            with Checkpoints(self.folder) as checkpoints:
                self.first_step = self._restore(checkpoints)
        self._compile()

    def _compile(self) -> None:
        """Compiles ahead, so that tokens per second measure training alone."""
        config = self.config
        shape = (config.batch_size, config.row_length)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.placement.rows)
        step = make_train_step(self.graphdef, config, self.placement)
        lowered = step.lower(self.state, ids, ids)
        # Nothing that the caller could have got wrong is left: a message may come before the wait.
        if is_leader():
            for message in self._messages():
                say(message)
        self.train_step = lowered.compile()
        evaluate = make_eval_step(self.graphdef, self.placement)
        self.eval_step = evaluate.lower(self.state.params, ids, ids).compile()

    def _messages(self) -> Iterator[str]:
        """What a run says before it compiles."""
        yield f"data: {self.corpus.summary}"
        config, last = self.config, self.config.last_decay_step
        if config.resume and config.steps > last:
            yield (
                f"the learning rate falls until step {last} and stays: a resumed run keeps the "
                "decay_steps of its checkpoint"
            )
        size = sum(map(len, self.corpus.train))
        yield f"{self.num_params} parameters, {size} bytes to train on; compiling"

    def _check_resumable(self, config: TrainConfig, step: int, position: RunPosition) -> None:
        """Raises ValueError unless the run can go on from a checkpoint."""
        check_resumable(position.config, config)
        if position.fingerprint != self.corpus.fingerprint:
            raise ValueError(
                "data must be the data of the checkpoint, got other bytes in "
                f"{self.corpus.source} (checkpoint: {_source(position.config.data)})"
            )
        if step > config.steps:
            raise ValueError(
                f"steps must be at least the {step} of the checkpoint, got {config.steps}"
            )

    def _restore(self, checkpoints: Checkpoints) -> int:
        """Goes to the newest checkpoint that is whole; gives its step."""

        def read(step):
            position = checkpoints.read_position(step)
            self._check_resumable(self.config, step, position)
            return position, checkpoints.read_state(step, self.state)

        step, (position, self.state) = checkpoints.newest(read)
        checkpoints.set_aside_after(step)
        self.batches.set_state(position.batches)
        self.stop.saved = step
        return step

    def finish(self) -> TrainResult:
        """Trains to the last step and writes everything."""
        metrics_file = self.folder / files.METRICS
        # The description comes first: it says whose the rest is.
        self._write_description({})
        with (
            Checkpoints(self.folder, create=True) as checkpoints,
            MetricsLog(metrics_file, last_step=self.first_step, write=is_leader()) as log,
            Progress(self.first_step, self.config.steps, show=is_leader()) as progress,
        ):
            evaluated = self.config.steps in curve(log.kept, "held_out_loss")[0]
            evaluated = agreed(evaluated and self.first_step == self.config.steps)
            self._train(checkpoints, log, progress)
            if not evaluated and self.first_step == self.config.steps:
                self._evaluate(self.config.steps, log, progress)
        wait_for_all("trained")
        rows = read_metrics(metrics_file)
        held_out_loss = curve(rows, "held_out_loss")[1][-1]
        self._write_description({"step": self.config.steps, "held_out_loss": held_out_loss})
        written = [metrics_file, self.folder / files.DESCRIPTION, self.folder / files.LOSSES]
        name = f"attention={self.config.model.attention}"
        if is_leader():
            plot_losses(written[-1], {name: rows}, unigram_loss=self.unigram_loss)
        if self.config.model.attention == "nsa":
            written.append(self.folder / files.BLOCKS)
            self._plot_blocks(written[-1])
        return TrainResult(
            step=self.config.steps,
            held_out_loss=held_out_loss,
            unigram_loss=self.unigram_loss,
            files=(*written, self.folder / files.CHECKPOINTS),
        )

    def _train(self, checkpoints: Checkpoints, log: MetricsLog, progress: Progress) -> None:
        config, stop = self.config, self.stop
        pending: list[tuple[int, StepMetrics]] = []
        fetch_every = 1
        since = time.perf_counter()
        stop.stepping = True
        for step in range(self.first_step + 1, config.steps + 1):
            batch = next(self.batches)
            first, _ = self.placement.own_rows(config.batch_size)
            arrays = (
                self.placement.place(x, first, config.batch_size)
                for x in (batch.tokens, batch.segment_ids)
            )
            self.state, metrics = self.train_step(self.state, *arrays)
            pending.append((step, metrics))
            stop.trained = True
            stopping = stop.due(step)
            last = step == config.steps
            evaluate = last or step % config.eval_every == 0
            save = last or stopping or step % config.checkpoint_every == 0
            if evaluate or save or len(pending) >= fetch_every:
                rows = self._fetch(pending, since)
                log.write(rows)
                progress.steps(rows)
                seconds = (time.perf_counter() - since) / len(pending)
                fetch_every = min(max(int(_FETCH_SECONDS / seconds), 1), _FETCH_EVERY)
                pending = []
                since = time.perf_counter()
            if evaluate:
                self._evaluate(step, log, progress)
            if save:
                self._save(checkpoints, step)
            if stopping:
                raise stop.stopped()
            if evaluate or save:
                since = time.perf_counter()
        stop.stepping = False

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

    def _evaluate(self, step: int, log: MetricsLog, progress: Progress) -> None:
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

    def _save(self, checkpoints: Checkpoints, step: int) -> None:
        position = RunPosition(
            config=self.config,
            fingerprint=self.corpus.fingerprint,
            batches=self.batches.get_state(),
        )
        checkpoints.save(step, self.state, position)
        self.stop.saved = step

    def _write_description(self, result: Row) -> None:
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
                "read": dict(self.corpus.read),
                "skipped": dict(self.corpus.skipped),
            },
            "unigram_loss": self.unigram_loss,
            "result": result,
        }
        on_leader(functools.partial(files.write_description, self.folder, description))

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
