"""What a run starts with: the checks before anything that takes long, and its text."""

from fsa_jax.training.config import TrainConfig
from fsa_jax.training.data import Corpus, TokenCorpus, open_corpus
from fsa_jax.training.mesh import Placement, check_placement
from fsa_jax.training.optimizer import split_frozen
from fsa_jax.training.step import abstract_model
from fsa_jax.training.tensorboard import check_tensorboard
from fsa_jax.training.tokenizer import load_tokenizer


def check_start(config: TrainConfig, placement: Placement) -> None:
    """Raises ValueError if settings do not fit together or not the machine, before any reading."""
    sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    check_placement(placement, config.model, **sizes, accumulate=config.accumulate)
    if config.tensorboard:
        check_tensorboard()
    if config.freeze:
        split_frozen(abstract_model(config.model)[1], config.freeze)


def open_text(config: TrainConfig) -> Corpus | TokenCorpus:
    """The text of a run, as tokens that the model has.

    Raises:
      ValueError: the text or the tokenizer cannot be read, or the vocabulary is too small.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size must be at least the {tokenizer.vocab_size} of tokenizer "
            f"{config.tokenizer!r}, got {config.model.vocab_size}"
        )
    return open_corpus(
        config.text,
        tokenizer=tokenizer,
        column=config.text_column,
        weights=config.text_weights,
    )
