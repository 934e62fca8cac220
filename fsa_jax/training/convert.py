"""`fsa-jax convert`: models between the folders of Hugging Face and those of `fsa-jax train`."""

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import jax
from flax import nnx
from tqdm import tqdm
from tyro import conf

from fsa_jax.config import NSAConfig
from fsa_jax.pretrained import load_pretrained, save_pretrained
from fsa_jax.pretrained.write import check_target
from fsa_jax.training import folder as files
from fsa_jax.training.checkpoint import Checkpoints, RunPosition
from fsa_jax.training.config import PRESETS, TrainConfig, config_to_json
from fsa_jax.training.data import TrainingBatches, load_corpus
from fsa_jax.training.loop import load_model
from fsa_jax.training.step import init_state
from fsa_jax.transformer import Transformer
from fsa_jax.versions import versions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Converts a model, or starts sparse attention from a dense one.

    Attributes:
      source: folder with config.json and safetensors, as Hugging Face or this command writes it, or
        folder of a run of `fsa-jax train`, whose last checkpoint is used.
      target: folder to write.
      to: safetensors, for transformers if all layers are dense; or run, a folder that `fsa-jax
        sample` and `train --resume` read, with a checkpoint of step 0 and a fresh optimiser, for
        models whose tokens are the bytes of `train`.
      text: of a run, the text that it will train on, as in `fsa-jax train`.
      attention: nsa starts sparse attention from the weights of a dense model. Default: what the
        source holds.
      layer_types: attention of each layer, for a hybrid, for example: full nsa nsa full.
      gates: start of the gates of sparse attention. closed: the model computes what the dense one
        does where the selected blocks cover the sequence; open: for training.
      param_dtype: dtype to convert the weights to. Default: as they are.
      max_shard_size: largest size of a file of weights, for example 5GB.
      overwrite: replace the model in target.
      nsa: sizes of the sparse attention that is started.
    """

    source: Annotated[Path, conf.Positional]
    target: Annotated[Path, conf.Positional]
    to: Literal["safetensors", "run"] = "safetensors"
    text: tuple[Path, ...] = ()
    attention: Literal["nsa", "full", "window"] | None = None
    layer_types: tuple[Literal["nsa", "full", "window"], ...] = ()
    gates: Literal["closed", "open"] = "closed"
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_size: str = "5GB"
    overwrite: bool = False
    nsa: NSAConfig = dataclasses.field(default_factory=NSAConfig)


def convert(config: ConvertConfig) -> Path:
    """Converts a model.

    Args:
      config: what to convert.

    Returns:
      The folder that was written.

    Raises:
      ValueError: the source is neither kind of folder, or cannot be read; the target holds files
        and `overwrite` is not set; an option does not fit the model.
      OSError: the target cannot be written.
    """
    if not config.source.is_dir():
        raise ValueError(f"source must be a folder, got {str(config.source)!r}")
    # Whatever can fail comes before whatever takes long.
    if config.to == "run":
        files.check_startable(config.target, resume=False, overwrite=config.overwrite)
    else:
        check_target(config.target, config.overwrite)
    if not files.has_checkpoint(config.source):
        return _convert(config, config.source)
    # A run is written as safetensors first, so that all options apply to it in the same way.
    config.target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{config.target.name}.", dir=config.target.absolute().parent
    ) as temporary:
        between = Path(temporary) / "model"
        save_pretrained(load_model(config.source, implementation=None)[0], between)
        return _convert(config, between)


def _convert(config: ConvertConfig, source: Path) -> Path:
    with _bar("loading") as progress:
        model = load_pretrained(
            source,
            attention=config.attention,
            nsa=None if config.nsa == NSAConfig() else config.nsa,
            gates=config.gates,
            param_dtype=config.param_dtype,
            layer_types=config.layer_types or None,
            progress=progress,
        )
    if config.to == "run":
        write_run(model, config.target, text=config.text, overwrite=config.overwrite)
        return config.target
    with _bar("writing") as progress:
        save_pretrained(
            model,
            config.target,
            like=source,
            overwrite=config.overwrite,
            max_shard_size=config.max_shard_size,
            progress=progress,
        )
    return config.target


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, where that is a terminal."""
    with tqdm(desc=what, unit="tensor", disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def write_run(
    model: Transformer, folder: Path, *, text: tuple[Path, ...] = (), overwrite: bool = False
) -> None:
    """Writes a model as a run at step 0, with the settings of the preset tiny.

    Args:
      model: a model of bytes.
      folder: the folder of the run.
      text: the text that the run will train on, as in `TrainConfig`.
      overwrite: whether to replace the run that is in it.

    Raises:
      ValueError: the folder holds a run and `overwrite` is not set, or does not belong to one; the
        model does not have the vocabulary of a run.
    """
    config = dataclasses.replace(PRESETS["tiny"], text=text, out=folder, model=model.config)
    # As in training, the checkpoint stores a number, so that an extended run keeps its schedule.
    config = dataclasses.replace(config, decay_steps=config.last_decay_step)
    files.check_startable(folder, resume=False, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder):
        if overwrite:
            files.clear(folder)
        corpus = load_corpus(config.text)
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
