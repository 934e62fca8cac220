"""`fsa-jax convert`: models between the folders of Hugging Face and those of `fsa-jax train`."""

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from flax import nnx
from tqdm import tqdm
from tyro import conf

from fsa_jax.config import NSAConfig
from fsa_jax.pretrained import load_pretrained, save_pretrained
from fsa_jax.pretrained.write import check_target
from fsa_jax.training import folder as files
from fsa_jax.training.checkpoint import Checkpoints, RunPosition, load_model
from fsa_jax.training.config import PRESETS, VOCAB_SIZE, TrainConfig, config_to_json
from fsa_jax.training.data import TrainingBatches, load_corpus
from fsa_jax.training.step import init_state
from fsa_jax.transformer import Transformer
from fsa_jax.versions import versions


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of a run that it keeps when it is resumed; `fsa-jax train --init` has all of them.

    Attributes:
      text: text files or folders that the run will train on. Default: as in the source if it is a
        run, otherwise the source of Python's standard library.
      steps: step after which training stops. Default, here and below: as in the source if it is a
        run, otherwise as in the preset tiny (`fsa-jax train --help` shows it).
      seed: seed of the data order and dropout.
      eval_sequences: number of sequences in the fixed validation set.
      batch_size: sequences per step.
      seq_len: bytes per sequence.
      learning_rate: peak learning rate.
      weight_decay: decoupled weight decay, applied to matrices only.
      warmup_steps: steps of the linear warmup from 0 to the peak learning rate.
      decay_steps: step at which the cosine decay reaches a tenth of the peak learning rate. Where
        steps are given, default: steps.
    """

    text: tuple[Path, ...] = ()
    steps: int | None = None
    seed: int | None = None
    eval_sequences: int | None = None
    batch_size: int | None = None
    seq_len: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    warmup_steps: int | None = None
    decay_steps: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are given."""
        return {name: value for name, value in vars(self).items() if value not in (None, ())}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Converts a model, or starts sparse attention from a dense one.

    Attributes:
      source: folder with config.json and safetensors, as Hugging Face or this command writes it, or
        folder of a run of `fsa-jax train`, whose last checkpoint is used.
      target: folder to write.
      to: safetensors, for transformers if all layers are dense; or run, a folder that `fsa-jax
        sample` and `fsa-jax train --resume` read, with a checkpoint of step 0 and a fresh
        optimiser, for models whose tokens are the bytes of `train` (vocabulary size 257).
      attention: nsa starts sparse attention from the weights of a dense model. Default: what the
        source holds.
      layer_types: attention of each layer, for a hybrid, for example: full nsa nsa full.
      gates: start of the gates of sparse attention. closed: the model computes what the dense one
        does where the selected blocks cover the sequence; open: for training.
      param_dtype: dtype to convert the weights to. Default: as they are.
      max_shard_size: largest size of a file of safetensors. Default: 5GB.
      overwrite: replace the weights and config.json, or the run, in target.
      nsa: sizes of the sparse attention that is started.
      run: settings of the run that is written, only with `--to run`.
    """

    source: Annotated[Path, conf.Positional, conf.arg(metavar="SOURCE")]
    target: Annotated[Path, conf.Positional, conf.arg(metavar="TARGET")]
    to: Literal["safetensors", "run"] = "safetensors"
    attention: Literal["nsa", "full", "window"] | None = None
    layer_types: tuple[Literal["nsa", "full", "window"], ...] = ()
    gates: Literal["closed", "open"] = "closed"
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_size: str | None = None
    overwrite: bool = False
    nsa: Annotated[NSAConfig | None, conf.AvoidSubcommands] = None
    run: RunSettings = dataclasses.field(default_factory=RunSettings)


def convert(config: ConvertConfig) -> Path:
    """Converts a model.

    Args:
      config: what to convert.

    Returns:
      The folder that was written.

    Raises:
      ValueError: the source is neither kind of folder, or cannot be read; the target holds files
        and `overwrite` is not set; an option does not fit the model, or has no effect.
      OSError: the target cannot be written.
    """
    if not config.source.is_dir():
        raise ValueError(f"source must be a folder, got {str(config.source)!r}")
    # Whatever can fail comes before whatever takes long.
    _check_used(config)
    if config.to == "run":
        files.check_startable(config.target, resume=False, overwrite=config.overwrite)
    else:
        with _naming_path("target"):
            check_target(config.target, config.overwrite)
    if not files.has_checkpoint(config.source):
        settings = dataclasses.replace(PRESETS["tiny"], **config.run.given)
        return _convert(config, config.source, settings, {})
    # A run is written as safetensors first, so that all options apply to it in the same way.
    config.target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{config.target.name}.", dir=config.target.absolute().parent
    ) as temporary:
        between = Path(temporary) / "model"
        model, saved = load_model(config.source, implementation=None)
        settings = _settings_like(saved, config.run)
        save_pretrained(model, between)
        for name in (files.TOKENIZER, files.TOKENIZER_CONFIG):
            if (config.source / name).is_file():
                shutil.copyfile(config.source / name, between / name)
        # What the files do not hold.
        kept = {name: getattr(saved.model, name) for name in ("dtype", "remat", "dropout_rate")}
        return _convert(config, between, settings, kept)


def _check_used(config: ConvertConfig) -> None:
    """Raises ValueError if an option is given that has no effect."""
    if config.to == "run":
        unused, other = {"max_shard_size": config.max_shard_size}, "safetensors"
    else:
        unused, other = config.run.given, "run"
    for name, value in unused.items():
        if value is not None:
            got = tuple(map(str, value)) if name == "text" else value
            raise ValueError(f"{name} must only be given with to={other!r}, got {got!r}")


def _settings_like(saved: TrainConfig, wanted: RunSettings) -> TrainConfig:
    """The settings of a new run: those of a saved one, apart from those that are wanted."""
    changes = wanted.given
    if "steps" in changes:
        changes = {"decay_steps": None} | changes
    return dataclasses.replace(saved, resume=False, overwrite=False, distributed=False, **changes)


def _convert(
    config: ConvertConfig, source: Path, settings: TrainConfig, fields: dict[str, Any]
) -> Path:
    """Converts a folder with safetensors; a run gets these settings and fields of its model."""
    with _bar("loading") as progress, _naming_path("source"):
        model = load_pretrained(
            source,
            attention=config.attention,
            nsa=config.nsa,
            gates=config.gates,
            param_dtype=config.param_dtype,
            layer_types=config.layer_types or None,
            progress=progress,
        )
    if config.to == "run":
        if model.config.vocab_size != VOCAB_SIZE:
            raise ValueError(
                f"to must be 'safetensors' unless the vocabulary is that of a run, {VOCAB_SIZE} "
                "(256 bytes and the document start), got to='run' and "
                f"vocab_size={model.config.vocab_size}"
            )
        settings = dataclasses.replace(settings, model=dataclasses.replace(model.config, **fields))
        write_run(model, settings, config.target, overwrite=config.overwrite)
        return config.target
    with _bar("writing") as progress:
        save_pretrained(
            model,
            config.target,
            like=source,
            overwrite=config.overwrite,
            max_shard_size="5GB" if config.max_shard_size is None else config.max_shard_size,
            progress=progress,
        )
    return config.target


@contextmanager
def _naming_path(name: str) -> Iterator[None]:
    """Gives the argument `path` of an error of fsa_jax.pretrained the name that it has here."""
    try:
        yield
    except ValueError as error:
        rule, got, rest = str(error).partition(", got ")
        if not rule.startswith("path must"):
            raise
        rest = rest.replace(", or path to another", f", or {name} to another")
        raise ValueError(name + rule.removeprefix("path") + got + rest) from error


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, where that is a terminal."""
    with tqdm(desc=what, unit="tensor", disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def write_run(
    model: Transformer, settings: TrainConfig, folder: Path, *, overwrite: bool = False
) -> None:
    """Writes a model as a run at step 0.

    Args:
      model: a model of bytes.
      settings: the settings of the run, with the configuration of the model.
      folder: the folder of the run.
      overwrite: whether to replace the run that is in it.

    Raises:
      ValueError: the folder holds a run and `overwrite` is not set, or does not belong to one; the
        text cannot be read.
    """
    config = dataclasses.replace(settings, out=folder)
    # As in training, the checkpoint stores a number, so that an extended run keeps its schedule.
    config = dataclasses.replace(config, decay_steps=config.last_decay_step)
    corpus = load_corpus(config.text)
    files.check_startable(folder, resume=False, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder):
        if overwrite:
            files.clear(folder)
        position = RunPosition(config, corpus.fingerprint, _first_batches(config, corpus.train))
        state = init_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), config)
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        description = {"config": config_to_json(config), "versions": versions()}
        files.write_description(folder, description | {"parameters": count})
        with Checkpoints(folder, create=True) as checkpoints:
            checkpoints.save(0, state, position)


def _first_batches(config: TrainConfig, documents: Sequence[bytes]) -> dict[str, int]:
    batches = TrainingBatches(
        documents, seq_len=config.seq_len, batch_size=config.batch_size, seed=config.seed
    )
    return batches.get_state()
