"""Checkpoints opened for an evaluation: a model, its tokenizer, and the text it was trained on."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from flax import nnx

from fsa_jax.pretrained import load_pretrained
from fsa_jax.training.checkpoint import Checkpoints
from fsa_jax.training.config import DOCUMENT_START, VOCAB_SIZE, TrainConfig
from fsa_jax.training.folder import has_checkpoint
from fsa_jax.training.step import abstract_model
from fsa_jax.transformer import Transformer


class Tokenizer(Protocol):
    """What an evaluation needs of a tokenizer; equal tokenizers give equal tokens.

    Texts are `str`; bytes that are not valid UTF-8 are surrogate escapes in them.
    """

    @property
    def start(self) -> int | None:
        """The token at the start of every document; None: there is none."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without a start token."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """The tokens of byte-level models: the bytes of the text, and 256 at the start of documents.

    Example:
      >>> ByteTokenizer().encode("aé")
      [97, 195, 169]
      >>> ByteTokenizer().decode([97, 195, 169])
      'aé'
    """

    start: int | None = DOCUMENT_START

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode("utf-8", "surrogateescape"))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of bytes."""
        return bytes(tokens).decode("utf-8", "surrogateescape")


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model that can be evaluated.

    Attributes:
      path: the path that was given.
      model: the model.
      tokenizer: its tokenizer.
      text: the text files or folders that it was trained on; () is Python's standard library, and
        None means that it is not known.
      fingerprint: the fingerprint of that text at the time of training; None: not known.
      seq_len: tokens of its training sequences; None: not known.
      step: the training step of its parameters; None: not known.
    """

    path: Path
    model: Transformer
    tokenizer: Tokenizer
    text: tuple[Path, ...] | None = None
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
            "config": json.loads(json.dumps(config.to_dict())),
        }


def open_model(path: Path) -> OpenedModel:
    """Opens a checkpoint.

    Args:
      path: the folder of a run of `fsa-jax train`, or one with the files of Hugging Face, see
        `load_pretrained`.

    Raises:
      ValueError: the path is no such folder; it has no checkpoint, or one that cannot be read; or
        the tokenizer of the model is not known.
    """
    if has_checkpoint(path):
        return _open_run(path)
    if not (path / "config.json").is_file():
        raise ValueError(
            "checkpoints must be folders of runs with a checkpoint in them, or of Hugging Face "
            f"with a config.json, got {str(path)!r}"
        )
    model = load_pretrained(path)
    return OpenedModel(path=path, model=model, tokenizer=_tokenizer(path, model))


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
    return OpenedModel(
        path=path,
        model=model,
        tokenizer=_tokenizer(path, model),
        text=config.text,
        fingerprint=fingerprint,
        seq_len=config.seq_len,
        step=step,
    )


def _tokenizer(path: Path, model: Transformer) -> Tokenizer:
    """The tokenizer of a checkpoint."""
    if model.config.vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"checkpoints must be byte-level models, whose vocabulary has {VOCAB_SIZE} tokens, got "
            f"{str(path)!r} with {model.config.vocab_size}"
        )
    return ByteTokenizer()
