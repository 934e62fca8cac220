"""The progress display of a run: a bar on a terminal, lines of text elsewhere."""

import contextlib
import datetime
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from tqdm import tqdm

from fsa_jax.training.metrics import Row

# Without a bar, a line is printed every _LINE_EVERY steps, but never two within _MIN_SECONDS, and
# always after _MAX_SECONDS, however few steps were made in that time.
_LINE_EVERY = 50
_MIN_SECONDS = 1.0
_MAX_SECONDS = 30.0


class Progress:
    """Shows the progress of a run on standard error; use it as a context manager.

    Args:
      first_step: number of steps that are already done.
      steps: the last step.
      show: False in a process that leaves the display to another one.
    """

    def __init__(self, first_step: int, steps: int, *, show: bool):
        self._first_step, self._steps = first_step, steps
        self._show = show
        self._bar = tqdm(
            initial=first_step,
            total=steps,
            unit="step",
            disable=not show or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._shown: dict[str, Any] = {}
        self._last_line = self._start = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()

    def steps(self, rows: Sequence[Row]) -> None:
        """Shows finished steps."""
        row = rows[-1]
        switched = "attention" in self._shown and row["attention"] != self._shown["attention"]
        if "attention" in row:
            self._shown["attention"] = row["attention"]
        self._shown |= {"loss": f"{row['loss']:.3f}", "tokens/s": f"{row['tokens_per_s']:.0f}"}
        if "mfu" in row:
            self._shown["MFU"] = f"{row['mfu']:.1%}"
        # A closed terminal must not end the run.
        with contextlib.suppress(OSError):
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(len(rows))
        waited = time.monotonic() - self._last_line
        due = any(row["step"] % _LINE_EVERY == 0 for row in rows)
        if switched or waited >= (_MIN_SECONDS if due else _MAX_SECONDS):
            # The bar shows the time that is left by itself.
            self._print_line(row["step"], self._shown | {"ETA": self._left(row["step"])})

    def _left(self, step: int) -> str:
        """The time until the last step, if the steps to come take as long as those until now."""
        done = max(step - self._first_step, 1)
        seconds = (time.monotonic() - self._start) / done * (self._steps - step)
        return str(datetime.timedelta(seconds=round(seconds)))

    def evaluation(self, row: Row) -> None:
        """Shows a validation loss."""
        shown = {"validation loss": f"{row['val_loss']:.3f}"}
        self._shown |= shown
        with contextlib.suppress(OSError):
            self._bar.set_postfix(self._shown)
        self._print_line(row["step"], shown)

    def _print_line(self, step: int, values: Mapping[str, Any]) -> None:
        if not self._show or not self._bar.disable:
            return
        self._last_line = time.monotonic()
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        with contextlib.suppress(OSError):
            print(f"step {step}/{self._steps}: {shown}", file=sys.stderr, flush=True)
