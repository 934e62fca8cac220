"""What a run shows of its progress: a bar on a terminal, lines of text elsewhere."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from tqdm import tqdm

from fsa_jax.training.metrics import Row

# Without a bar there is a line every so many steps, but never two within a second; and one after so
# many seconds, however few steps that were.
_STEPS = 50
_LEAST_SECONDS = 1.0
_MOST_SECONDS = 30.0


class Progress:
    """Shows a run on standard error; use as a context manager.

    Args:
      first_step: steps that are done.
      steps: the last step.
      show: False for a process that leaves it to another.
    """

    def __init__(self, first_step: int, steps: int, *, show: bool):
        self._steps = steps
        self._show = show
        self._bar = tqdm(
            initial=first_step,
            total=steps,
            unit="step",
            disable=not show or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._shown: dict[str, Any] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()

    def steps(self, rows: Sequence[Row]) -> None:
        """Shows finished steps."""
        row = rows[-1]
        self._shown |= {"loss": f"{row['loss']:.3f}", "tokens/s": f"{row['tokens_per_s']:.0f}"}
        # A terminal that was closed must not end the run.
        with contextlib.suppress(OSError):
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(len(rows))
        waited = time.monotonic() - self._last_line
        counted = any(row["step"] % _STEPS == 0 for row in rows)
        if waited >= (_LEAST_SECONDS if counted else _MOST_SECONDS):
            self._line(row["step"], self._shown)

    def held_out(self, row: Row) -> None:
        """Shows a held-out loss."""
        held_out = {"held-out loss": f"{row['held_out_loss']:.3f}"}
        self._shown |= held_out
        with contextlib.suppress(OSError):
            self._bar.set_postfix(self._shown)
        self._line(row["step"], held_out)

    def _line(self, step: int, values: Mapping[str, Any]) -> None:
        if not self._show or not self._bar.disable:
            return
        self._last_line = time.monotonic()
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        with contextlib.suppress(OSError):
            print(f"step {step}/{self._steps}: {shown}", file=sys.stderr, flush=True)
