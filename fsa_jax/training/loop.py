"""The training job: it reads text, and writes metrics, checkpoints, plots and a validation loss."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

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
    TokenCorpus,
    TrainingBatches,
    example_sequence,
    target_bytes,
    unigram_loss,
    validation_batches,
)
from fsa_jax.training.flops import flops_per_token, peak_flops
from fsa_jax.training.mesh import (
    Placement,
    agreed,
    is_leader,
    join_processes,
    noticing_lost_processes,
    on_leader,
    wait_for_all,
)
from fsa_jax.training.metrics import (
    MetricsLog,
    Row,
    bits_per_byte,
    curve,
    read_metrics,
    validation_row,
)
from fsa_jax.training.plots import plot_blocks, plot_losses
from fsa_jax.training.progress import Progress
from fsa_jax.training.renamed import renamed_fields
from fsa_jax.training.start import check_start, initial_params, open_text
from fsa_jax.training.step import (
    StepMetrics,
    abstract_model,
    init_state,
    make_eval_step,
    make_train_step,
    state_shardings,
)
from fsa_jax.training.stopping import Stop, catching_signals
from fsa_jax.training.tensorboard import TensorBoard
from fsa_jax.training.tokenizer import keep_tokenizer, tokenizer_of_run
from fsa_jax.versions import versions

# Metrics are fetched from the device only once in _FETCH_EVERY steps, so that the device does not
# wait for the host. They are fetched earlier if the steps take longer than _FETCH_SECONDS together,
# so that progress is visible and the run can be stopped.
_FETCH_EVERY = 10
_FETCH_SECONDS = 1.0


@renamed_fields(held_out_loss="val_loss")
@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
      step: the last step.
      val_loss: the last validation loss, in nats per token.
      unigram_loss: validation loss of a unigram model fitted on the training documents, in nats per
        token.
      files: paths of the files that were written, and of the folder of the checkpoints.
      bytes_per_token: bytes of text per predicted token of the validation set.
      unit: what a token is: "byte" or "token".
    """

    step: int
    val_loss: float
    unigram_loss: float
    files: tuple[Path, ...]
    bytes_per_token: float = 1.0
    unit: str = "byte"

    @property
    def val_bits_per_byte(self) -> float:
        """The last validation loss in bits per byte of text."""
        return bits_per_byte(self.val_loss / self.bytes_per_token)


def train(config: TrainConfig) -> TrainResult:
    """Trains a language model and writes all results to `config.run_folder`.

    Args:
      config: the run; start from one of `PRESETS` with `dataclasses.replace`.

    Returns:
      The final losses, and the paths of what was written.

    Raises:
      ValueError: the text cannot be read; the folder already holds a run or is in use by another
        one; or there is no checkpoint to resume from, or only one of a different run.
      OSError: something cannot be written.
      FloatingPointError: the loss or the gradient is no longer finite.
      ProcessLost: another process of the run has ended.
      RunStopped: a signal (SIGINT, SIGTERM or SIGHUP) arrived, and the run has ended; see
        `RunStopped.saved` for its last checkpoint.
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
        check_start(config, placement)
        corpus = open_text(config)
        on_leader(functools.partial(_make, folder))
        on_leader(lambda: stack.enter_context(files.locked(folder)))
        on_leader(check)  # once more, now that no other run can interfere
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


class _Logs:
    """Writes rows of metrics to several logs."""

    def __init__(self, logs: Sequence[MetricsLog | TensorBoard]):
        self._logs = logs

    def write(self, rows: Sequence[Row]) -> None:
        for log in self._logs:
            log.write(rows)


class _Steps(NamedTuple):
    """The compiled steps of the training and of the evaluation of one kind of attention."""

    train: jax.stages.Compiled
    evaluate: jax.stages.Compiled


class _Run:
    """One call of `train`, from the first batch or a checkpoint to the last step."""

    def __init__(
        self, config: TrainConfig, corpus: Corpus | TokenCorpus, placement: Placement, stop: Stop
    ):
        self.placement = placement
        self.corpus = corpus
        self.folder = config.run_folder
        self.stop = stop
        # Whatever can fail comes before whatever takes long.
        if config.resume:
            with Checkpoints(self.folder) as checkpoints:
                step, position = checkpoints.newest(checkpoints.read_position, quiet=True)
            if config.decay_steps is None:
                decay_steps = position.config.last_decay_step
                config = dataclasses.replace(config, decay_steps=decay_steps)
            self._check_resumable(config, step, position)
        # The checkpoint stores a number, never None, so that an extended run keeps its schedule.
        self.config = config = dataclasses.replace(config, decay_steps=config.last_decay_step)
        self.batches = TrainingBatches(
            corpus.train,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            sequences=placement.own_sequences(config.batch_size),
        )
        self.validation = validation_batches(
            corpus.validation,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            num_sequences=config.eval_sequences,
        )
        self.val_bytes = target_bytes(self.validation, corpus.tokenizer.num_bytes)
        self.unigram_loss = unigram_loss(corpus.train, self.validation, corpus.unigram_counts())
        shardings = state_shardings(config, placement)
        model = placement.model(config.model)
        self.graphdef = abstract_model(model)[0]
        params = initial_params(config, model, shardings.params)
        self.num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
        peak = peak_flops(placement.mesh.devices.flat[0], config.model.dtype)
        #: The tokens a second at which the run would reach the peak of its devices.
        self.peak_tokens = peak and (
            peak * placement.mesh.size / flops_per_token(params, config.model)
        )
        start = functools.partial(init_state, config=config)
        self.state = jax.jit(start, out_shardings=shardings)(params)
        self.first_step = 0
        if config.resume:
            with Checkpoints(self.folder) as checkpoints:
                self.first_step = self._restore(checkpoints)
        self._compile()

    def _compile(self) -> None:
        """Compiles all steps ahead of time, so that tokens per second measure training alone."""
        config = self.config
        shape = (config.batch_size, config.seq_len)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.placement.batch)
        # The first and the last step to come; at the last there may only be an evaluation to do.
        ends = (min(self.first_step + 1, config.steps), config.steps)
        lowered = {}
        for full in dict.fromkeys(map(config.warms_attention, ends)):
            step = make_train_step(self.graphdef, config, self.placement, full_attention=full)
            lowered[full] = step.lower(self.state, ids, ids)
        # The caller's arguments are all known to be right by now, so messages may be printed before
        # the long wait.
        if is_leader():
            for message in self._messages():
                say(message)
        #: The steps with full attention (True), and those with the model's own (False).
        self.steps: dict[bool, _Steps] = {}
        for full, step in lowered.items():
            evaluate = make_eval_step(self.graphdef, self.placement, full_attention=full)
            evaluate = evaluate.lower(self.state.params, ids, ids)
            self.steps[full] = _Steps(step.compile(), evaluate.compile())

    def _messages(self) -> Iterator[str]:
        """The messages that a run prints before it compiles."""
        yield f"data: {self.corpus.summary}"
        config, last = self.config, self.config.last_decay_step
        if config.init is not None and not config.resume:
            yield f"the parameters start from those in {config.init}"
        if config.warms_attention(self.first_step + 1):
            yield (
                f"full attention up to step {config.last_full_step}, and then "
                f"{config.model.attention} with the same weights"
            )
        if config.resume and config.steps > last:
            yield (
                f"the learning rate falls until step {last} and then stays constant: a resumed run "
                "keeps the decay_steps of its checkpoint"
            )
        sizes, unit = self.corpus.sizes(), self.corpus.tokenizer.unit
        size = sizes[f"train_{unit}s"]
        yield f"{self.num_params} parameters, {size} {unit}s to train on; compiling"

    def _check_resumable(self, config: TrainConfig, step: int, position: RunPosition) -> None:
        """Raises ValueError unless the run can resume from a checkpoint."""
        check_resumable(position.config, config)
        saved = tokenizer_of_run(self.folder, position.config.tokenizer)
        if saved.fingerprint != self.corpus.tokenizer.fingerprint:
            raise ValueError(
                "tokenizer must be that of the checkpoint, got another one in "
                f"{config.tokenizer!r} (checkpoint: {position.config.tokenizer!r})"
            )
        if position.fingerprint != self.corpus.fingerprint:
            raise ValueError(
                "text must be the text of the checkpoint, got other bytes in "
                f"{self.corpus.source} (checkpoint: {_source(position.config.text)})"
            )
        if step > config.steps:
            raise ValueError(
                f"steps must be at least the {step} of the checkpoint, got {config.steps}"
            )

    def _restore(self, checkpoints: Checkpoints) -> int:
        """Restores the newest checkpoint that is complete, and returns its step."""

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
        """Trains up to the last step and writes all results."""
        metrics_file = self.folder / files.METRICS
        # The description is written first: it marks the folder as that of a run.
        self._write_description({})
        tokenizer = self.corpus.tokenizer
        on_leader(functools.partial(keep_tokenizer, self.folder, tokenizer))
        with (
            Checkpoints(self.folder, create=True) as checkpoints,
            MetricsLog(metrics_file, last_step=self.first_step, write=is_leader()) as metrics,
            TensorBoard(
                self.folder,
                last_step=self.first_step,
                write=self.config.tensorboard and is_leader(),
            ) as board,
            Progress(self.first_step, self.config.steps, show=is_leader()) as progress,
        ):
            evaluated = self.config.steps in curve(metrics.kept, "val_loss")[0]
            log = _Logs((metrics, board))
            evaluated = agreed(evaluated and self.first_step == self.config.steps)
            self._train(checkpoints, log, progress)
            if not evaluated and self.first_step == self.config.steps:
                self._evaluate(self.config.steps, log, progress)
        wait_for_all("trained")
        rows = read_metrics(metrics_file)
        last = next(row for row in reversed(rows) if "val_loss" in row)
        names = ("val_loss", "val_bits_per_byte", "held_out_loss", "attention")
        result = {name: last[name] for name in names if name in last}
        self._write_description({"step": self.config.steps} | result)
        written = [metrics_file, self.folder / files.DESCRIPTION, self.folder / files.LOSSES]
        if tokenizer.unit != "byte":
            written[2:2] = [self.folder / files.TOKENIZER, self.folder / files.TOKENIZER_CONFIG]
        name = f"attention={self.config.model.attention}"
        if is_leader():
            losses = {"unigram_loss": self.unigram_loss, "unit": tokenizer.unit}
            plot_losses(written[-1], {name: rows}, **losses)
        if "nsa" in self.config.model.types:
            written.append(self.folder / files.BLOCKS)
            self._plot_blocks(written[-1])
        if self.config.tensorboard:
            written.append(self.folder / files.TENSORBOARD)
        return TrainResult(
            step=self.config.steps,
            val_loss=last["val_loss"],
            unigram_loss=self.unigram_loss,
            bytes_per_token=last["val_bytes"] / last.get("val_tokens", last["val_bytes"]),
            unit=tokenizer.unit,
            files=(*written, self.folder / files.CHECKPOINTS),
        )

    def _train(self, checkpoints: Checkpoints, log: _Logs, progress: Progress) -> None:
        config, stop = self.config, self.stop
        pending: list[tuple[int, StepMetrics]] = []
        fetch_every = 1
        since = time.perf_counter()
        stop.stepping = True
        for step in range(self.first_step + 1, config.steps + 1):
            batch = next(self.batches)
            first, _ = self.placement.own_sequences(config.batch_size)
            arrays = (
                self.placement.place(x, first, config.batch_size)
                for x in (batch.tokens, batch.segment_ids)
            )
            steps = self.steps[config.warms_attention(step)]
            self.state, metrics = steps.train(self.state, *arrays)
            pending.append((step, metrics))
            stop.trained = True
            stopping = stop.due(step)
            last = step == config.steps
            evaluate = last or step % config.eval_every == 0
            save = last or stopping or step % config.checkpoint_every == 0
            # Steps with different attention are not timed together.
            switch = step == config.last_full_step
            if evaluate or save or switch or len(pending) >= fetch_every:
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
        """Waits for the pending steps and returns their rows of metrics."""
        fetched = jax.device_get([metrics for _, metrics in pending])
        seconds = time.perf_counter() - since
        tokens = len(pending) * self.config.batch_size * self.config.seq_len
        rows = [
            {
                "step": step,
                "loss": float(metrics.loss),
                "tokens_per_s": round(tokens / seconds, 1),
                "learning_rate": float(metrics.learning_rate),
                "grad_norm": float(metrics.grad_norm),
                **self._attention(step),
            }
            for (step, _), metrics in zip(pending, fetched, strict=True)
        ]
        for row in rows:
            if self.peak_tokens is not None:
                row["mfu"] = round(row["tokens_per_s"] / self.peak_tokens, 4)
            if not np.isfinite([row["loss"], row["grad_norm"]]).all():
                raise FloatingPointError(
                    f"loss and gradient must be finite, got {row['loss']} and {row['grad_norm']} "
                    f"at step {row['step']}: lower learning_rate={self.config.learning_rate}"
                )
        return rows

    def _attention(self, step: int) -> Row:
        """What a row of metrics says about the attention of its step, if a run has two kinds."""
        if self.config.attention_warmup is None:
            return {}
        full = self.config.warms_attention(step)
        return {"attention": "full" if full else self.config.model.attention}

    def _evaluate(self, step: int, log: _Logs, progress: Progress) -> None:
        evaluate = self.steps[self.config.warms_attention(step)].evaluate
        sums = [
            evaluate(
                self.state.params, *map(self.placement.place, (batch.tokens, batch.segment_ids))
            )
            for batch in self.validation
        ]
        total, count = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        num_bytes = None if self.corpus.tokenizer.unit == "byte" else self.val_bytes
        row = validation_row(step, total / count, int(count), num_bytes) | self._attention(step)
        log.write([row])
        progress.evaluation(row)

    def _save(self, checkpoints: Checkpoints, step: int) -> None:
        position = RunPosition(
            config=self.config,
            fingerprint=self.corpus.fingerprint,
            batches=self.batches.get_state(),
        )
        checkpoints.save(step, self.state, position)
        self.stop.saved = step

    def _write_description(self, result: Row) -> None:
        sizes = self.corpus.sizes()
        description = {
            "config": config_to_json(self.config),
            "versions": versions(),
            "devices": [str(device) for device in jax.devices()],
            "parameters": self.num_params,
            "data": {
                "source": self.corpus.source,
                "fingerprint": self.corpus.fingerprint,
                **sizes,
                # the old names of the two, for one more release
                "held_out_documents": sizes["val_documents"],
                "held_out_bytes": sizes["val_bytes"],
                "read": dict(self.corpus.read),
                "skipped": dict(self.corpus.skipped),
            },
            "unigram_loss": self.unigram_loss,
            "result": result,
        }
        on_leader(functools.partial(files.write_description, self.folder, description))

    def _plot_blocks(self, path: Path) -> None:
        batch = example_sequence(self.corpus.validation, seq_len=self.config.seq_len)
        # The unchanged configuration: the tokens of this sequence are not split over devices.
        graphdef = abstract_model(self.config.model)[0]

        @functools.partial(jax.jit, out_shardings=self.placement.replicated)
        def selected(params, tokens, segment_ids):
            return nnx.merge(graphdef, params).selected_blocks(tokens, segment_ids)

        blocks = selected(self.state.params, batch.tokens, batch.segment_ids)
        if not is_leader():
            return
        shown = np.asarray(blocks)[:, 0], batch.segment_ids[0], self.config.model.nsa
        plot_blocks(path, *shown, unit=self.corpus.tokenizer.unit)


def _source(data: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in data) or "the Python standard library"
