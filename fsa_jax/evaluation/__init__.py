"""Evaluation of trained models: the job behind `fsa-jax eval`, as a library.

`models.py` opens checkpoints, `text.py` reads the text and packs it into sequences. `losses.py`
computes the loss by position; `tasks.py` makes the samples of the retrieval tasks, and `answers.py`
asks a model for them. `run.py` goes through all of it for each model on the very same inputs, and
`report.py` and `plots.py` show the result, which is one JSON value.
"""

from typing import TYPE_CHECKING

from fsa_jax import lazy

if TYPE_CHECKING:
    from fsa_jax.evaluation.config import EvalConfig as EvalConfig
    from fsa_jax.evaluation.models import OpenedModel as OpenedModel
    from fsa_jax.evaluation.models import open_model as open_model
    from fsa_jax.evaluation.run import evaluate as evaluate

__getattr__, __dir__ = lazy.exports(
    __name__,
    {
        "config": ["EvalConfig"],
        "models": ["OpenedModel", "open_model"],
        "run": ["evaluate"],
    },
)
