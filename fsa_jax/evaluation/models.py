"""Checkpoints opened for an evaluation: a model, its tokenizer, and the text it was trained on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from fsa_jax.pretrained import load_pretrained
from fsa_jax.training.checkpoint import Checkpoints, say_if_warming
from fsa_jax.training.config import BYTES, VOCAB_SIZE, TrainConfig
from fsa_jax.training.folder import TOKENIZER, has_checkpoint
from fsa_jax.training.step import abstract_model
from fsa_jax.training.tokenizer import Tokenizer, load_tokenizer, tokenizer_of_run
from fsa_jax.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model that can be evaluated.

    Attributes:
      path: the path that was given.
      model: the model.
      tokenizer: its tokenizer.
      text: the files or folders that it was trained on; () is Python's standard library, and
        None means that they are not known.
      text_column: the column of the text in files of records.
      text_weights: the weight of each of them; (): all documents counted alike.
      fingerprint: the fingerprint of that text at the time of training; None: not known.
      seq_len: tokens of its training sequences; None: not known.
      step: the training step of its parameters; None: not known.
    """

    path: Path
    model: Transformer
    tokenizer: Tokenizer
    text: tuple[Path, ...] | None = None
    text_column: str = "text"
    text_weights: tuple[float, ...] = ()
    fingerprint: str | None = None
    seq_len: int | None = None
    step: int | None = None

    def describe(self) -> dict[str, Any]:
        """The model in JSON values."""
        params = jax.tree.leaves(nnx.state(self.model, nnx.Param))
        config = self.model.config
        return {
            "path": str(self.path),
            "step": self.step,
            "attention": config.attention,
            "parameters": sum(leaf.size for leaf in params),
            "tokenizer": self.tokenizer.fingerprint,
            "config": json.loads(json.dumps(config.to_dict())),
        }


def open_model(path: Path) -> OpenedModel:
    """Opens a checkpoint.

    Args:
      path: the folder of a run of `fsa-jax train`, or one with the files of Hugging Face, see
        `load_pretrained`.

    Raises:
      ValueError: the path is no such folder; it has no checkpoint, or one that cannot be read; or
        the model has no tokenizer, or one that it does not fit.
    """
    if has_checkpoint(path):
        return _open_run(path)
    if not (path / "config.json").is_file():
        raise ValueError(
            "checkpoints must be folders of runs with a checkpoint in them, or of Hugging Face "
            f"with a config.json, got {str(path)!r}"
        )
    model = load_pretrained(path)
    return OpenedModel(path=path, model=model, tokenizer=_tokenizer_of_files(path, model))


def _open_run(path: Path) -> OpenedModel:
    with Checkpoints(path) as checkpoints:

        def read(step: int) -> tuple[Transformer, TrainConfig, str]:
            position = checkpoints.read_position(step)
            # The implementation that the run was trained with may not be available here.
            config = dataclasses.replace(position.config.model, implementation=None)
            graphdef, template = abstract_model(config)
            model = nnx.merge(graphdef, checkpoints.read_params(step, template))
            return model, position.config, position.fingerprint

        step, (model, config, fingerprint) = checkpoints.newest(read)
    say_if_warming(path, step, config)
    return OpenedModel(
        path=path,
        model=model,
        tokenizer=tokenizer_of_run(path, config.tokenizer),
        text=config.text,
        text_column=config.text_column,
        text_weights=config.text_weights,
        fingerprint=fingerprint,
        seq_len=config.seq_len,
        step=step,
    )


def _tokenizer_of_files(path: Path, model: Transformer) -> Tokenizer:
    """The tokenizer of a folder of Hugging Face."""
    vocab_size = model.config.vocab_size
    if not (path / TOKENIZER).exists():
        if vocab_size == VOCAB_SIZE:
            return load_tokenizer(BYTES)
        raise ValueError(
            f"checkpoints must have a {TOKENIZER} in their folder, unless they are models of bytes "
            f"with a vocabulary of {VOCAB_SIZE} tokens, got none in {str(path)!r} with {vocab_size}"
        )
    tokenizer = load_tokenizer(str(path))
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"checkpoints must have at least the {tokenizer.vocab_size} tokens of their "
            f"{TOKENIZER}, got {str(path)!r} with {vocab_size}"
        )
    return tokenizer
