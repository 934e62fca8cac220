"""Training of language models: the job behind `fsa-jax train`, as a library."""

from typing import TYPE_CHECKING

from fsa_jax import lazy

if TYPE_CHECKING:
    from fsa_jax.training.checkpoint import Checkpoints as Checkpoints
    from fsa_jax.training.checkpoint import load_model as load_model
    from fsa_jax.training.config import PRESETS as PRESETS
    from fsa_jax.training.config import TrainConfig as TrainConfig
    from fsa_jax.training.data import Corpus as Corpus
    from fsa_jax.training.data import TrainingBatches as TrainingBatches
    from fsa_jax.training.data import load_corpus as load_corpus
    from fsa_jax.training.data import open_corpus as open_corpus
    from fsa_jax.training.loop import TrainResult as TrainResult
    from fsa_jax.training.loop import train as train
    from fsa_jax.training.mesh import ProcessLost as ProcessLost
    from fsa_jax.training.metrics import read_metrics as read_metrics
    from fsa_jax.training.plots import plot_blocks as plot_blocks
    from fsa_jax.training.plots import plot_losses as plot_losses
    from fsa_jax.training.step import next_byte_loss as next_byte_loss
    from fsa_jax.training.stopping import RunStopped as RunStopped
    from fsa_jax.training.token_files import write_tokens as write_tokens
    from fsa_jax.training.tokenizer import load_tokenizer as load_tokenizer
    from fsa_jax.training.tokenizer import tokenizer_of_run as tokenizer_of_run

__getattr__, __dir__ = lazy.exports(
    __name__,
    {
        "checkpoint": ["Checkpoints", "load_model"],
        "config": ["PRESETS", "TrainConfig"],
        "data": ["Corpus", "TrainingBatches", "load_corpus", "open_corpus"],
        "loop": ["TrainResult", "train"],
        "mesh": ["ProcessLost"],
        "metrics": ["read_metrics"],
        "plots": ["plot_blocks", "plot_losses"],
        "step": ["next_byte_loss"],
        "stopping": ["RunStopped"],
        "token_files": ["write_tokens"],
        "tokenizer": ["load_tokenizer", "tokenizer_of_run"],
    },
)
