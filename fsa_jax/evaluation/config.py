"""The settings of an evaluation."""

import dataclasses
from pathlib import Path
from typing import Literal

from fsa_jax.arguments import scalars

TASKS = ("loss", "recall", "needle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluates trained models: the loss by position, and what they retrieve from long contexts.

    Several models are evaluated on the very same inputs and laid side by side, each beside its
    difference from the first one.

    Attributes:
      checkpoints: the models, each the folder of a run of `fsa-jax train`, whose last checkpoint is
        used, or a folder with the files of Hugging Face, as `fsa-jax convert` writes it.
      tasks: what to evaluate. loss: the loss on a text by position in the document. recall: the
        value of one of many keys. needle: a value hidden in the text.
      text: text files; files of records (.jsonl, .jsonl.gz, .parquet); folders that are searched
        for both; or pre-tokenised data: all of it is used. Default: the validation part of the text
        of the runs.
      text_column: the column of the text in files of records that text names.
      out: folder that the results are written to. Default: evaluations/NAME, or
        evaluations/NAME-vs-NAME, of the names of the checkpoints.
      overwrite: replace the evaluation that is in out.
      seq_len: tokens per sequence of the loss. Default: that of the first run.
      sequences: at most this many sequences of the text are used for the loss.
      lengths: lengths of the contexts of recall and needle in tokens, the answer included. Default:
        a quarter of seq_len, half of it, and seq_len.
      depths: where in the context the answer stands, from 0, its start, to 1, its end.
      samples: number of samples of each length and depth.
      answer_digits: number of digits of each value.
      seed: the same seed gives the same samples.
      batch_size: sequences, or samples, that are computed at a time.
      chunk_size: tokens whose logits the loss holds at a time.

    Raises:
      ValueError: a field breaks its rule; the message names the field and its value.
    """

    checkpoints: tuple[Path, ...]
    tasks: tuple[Literal["loss", "recall", "needle"], ...] = TASKS
    text: tuple[Path, ...] = ()
    text_column: str = "text"
    out: Path | None = None
    overwrite: bool = False
    seq_len: int | None = None
    sequences: int = 128
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 20
    answer_digits: int = 5
    seed: int = 0
    batch_size: int = 8
    chunk_size: int = 2048

    def __post_init__(self):
        if not self.checkpoints:
            raise ValueError("checkpoints must name at least one model, got none")
        for name in ("checkpoints", "text"):
            self._set(name, tuple(Path(path) for path in getattr(self, name)))
        if not self.tasks:
            raise ValueError(f"tasks must name at least one of {TASKS}, got none")
        for task in self.tasks:
            scalars.choice("tasks", task, TASKS)
        if not isinstance(self.text_column, str) or not self.text_column:
            raise ValueError(
                f"text_column must be a text that is not empty, got {self.text_column!r}"
            )
        for name, least in (
            ("sequences", 1),
            ("samples", 1),
            ("answer_digits", 1),
            ("seed", 0),
            ("batch_size", 1),
            ("chunk_size", 1),
        ):
            self._set(name, scalars.size(name, getattr(self, name), least))
        if self.seq_len is not None:
            self._set("seq_len", scalars.size("seq_len", self.seq_len, 2))
        self._set(
            "lengths", _ascending("lengths", [scalars.size("lengths", x) for x in self.lengths])
        )
        depths = [
            scalars.number("depths", x, "from 0 to 1", lambda x: 0 <= x <= 1) for x in self.depths
        ]
        if not depths:
            raise ValueError("depths must hold at least one number from 0 to 1, got none")
        self._set("depths", _ascending("depths", depths))
        if not isinstance(self.out, Path | None):
            raise ValueError(f"out must be a pathlib.Path or None, got {self.out!r}")

    def _set(self, name: str, value) -> None:
        object.__setattr__(self, name, value)

    @property
    def folder(self) -> Path:
        """The folder that the results are written to: `out`, or the default."""
        if self.out is not None:
            return self.out
        return Path("evaluations") / "-vs-".join(path.resolve().name for path in self.checkpoints)

    def to_json(self) -> dict:
        """The settings as JSON values."""
        values = dataclasses.asdict(self)
        for name in ("checkpoints", "text"):
            values[name] = [str(path) for path in values[name]]
        return values | {"out": None if self.out is None else str(self.out)}


def _ascending(name: str, values: list) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError(f"{name} must differ from one another, got {tuple(values)}")
    return tuple(sorted(values))
