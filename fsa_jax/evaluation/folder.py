"""The folder of an evaluation: what may be replaced in it, and how its files are written.

A folder with the `evaluation.json` of this program belongs to it, and of its files those named here
may be replaced. Other files in it, and all other folders, belong to the user.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsa_jax.evaluation.plots import plot_loss, plot_retrieval
from fsa_jax.evaluation.report import markdown
from fsa_jax.messages import naming

WHAT = "fsa-jax eval"
RESULT, PAGE, LOSS = "evaluation.json", "evaluation.md", "loss.png"
_RETRIEVAL = ("recall", "needle")
_OWN = ".fsa-jax."


def heat_map(number: int) -> str:
    """The name of the heat map of a model, whose number counts from 1."""
    return f"retrieval-{number}.png"


def check_writable(folder: Path, *, overwrite: bool) -> None:
    """Raises ValueError unless an evaluation may be written to the folder."""
    name = str(folder)
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"out must be a folder, got {name!r}, which is not one")
    # The lock and unfinished files of this program do not count.
    if all(path.name.startswith(_OWN) for path in folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"out must be a new folder or an empty one, got {name!r}: set overwrite to replace an "
            "evaluation in it, or out to another folder"
        )
    if _previous(folder) is None:
        raise ValueError(
            "overwrite must replace only an evaluation that this program wrote, got "
            f"{name!r}, where there is no {RESULT} of one: set out to another folder"
        )


def _previous(folder: Path) -> dict[str, Any] | None:
    """The evaluation in a folder; None if there is none of this program."""
    try:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("what") == WHAT else None


def _names(values: dict[str, Any]) -> list[str]:
    """The files of an evaluation; the first one marks the folder."""
    names = [RESULT, PAGE]
    if "loss" in values:
        names.append(LOSS)
    if any(task in values for task in _RETRIEVAL):
        names += [heat_map(number) for number in range(1, len(values["models"]) + 1)]
    return names


def write(folder: Path, values: dict[str, Any]) -> list[Path]:
    """Writes an evaluation to a folder that `check_writable` has accepted; returns the files.

    All files are complete under other names before the first one of a previous evaluation goes.

    Raises:
      OSError: a file cannot be written; a previous evaluation is then untouched.
    """
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    page = markdown(values)
    makers: dict[str, Callable[[Path], Any]] = {
        RESULT: lambda path: path.write_text(text, encoding="utf-8"),
        PAGE: lambda path: path.write_text(page, encoding="utf-8"),
        LOSS: lambda path: plot_loss(path, values),
    }
    for number in range(1, len(values["models"]) + 1):
        makers[heat_map(number)] = lambda path, number=number: plot_retrieval(path, values, number)
    previous = _previous(folder)
    names = _names(values)
    new = {name: folder / f"{_OWN}{name}.new" for name in names}
    try:
        for name, path in new.items():
            with naming(path):
                makers[name](path)
        for name, path in new.items():
            path.replace(folder / name)
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)
    for name in set(_names(previous)) - set(names) if previous else ():
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in names]
