"""Metrics for TensorBoard, if a run asks for them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from fsa_jax.messages import naming
from fsa_jax.training.folder import TENSORBOARD


def check_tensorboard() -> None:
    """Raises ValueError, which says what to install, unless the metrics can be written."""
    try:
        import tensorboardX  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            "tensorboard must be False without the package tensorboardX, got True: in a clone of "
            "fsa-jax, pip install '.[tensorboard]' installs it"
        ) from error


class TensorBoard:
    """Writes rows of metrics for TensorBoard; use it as a context manager.

    Args:
      run_folder: the folder of the run, whose subfolder "tensorboard" is written to.
      last_step: TensorBoard hides what an earlier process of the run wrote for later steps.
      write: whether to write at all.
    """

    def __init__(self, run_folder: Path, *, last_step: int, write: bool):
        self._path = run_folder / TENSORBOARD
        self._writer: Any = None
        if write:
            import tensorboardX

            with naming(self._path):
                self._writer = tensorboardX.SummaryWriter(
                    str(self._path), purge_step=last_step + 1 if last_step else None
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._writer is not None:
            with naming(self._path):
                self._writer.close()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes each number of the rows under its name, at the step of its row."""
        if self._writer is None:
            return
        with naming(self._path):
            for row in rows:
                for name, value in row.items():
                    old = name.startswith("held_out")
                    if name != "step" and not old and isinstance(value, int | float):
                        self._writer.add_scalar(name, value, row["step"])
            self._writer.flush()
